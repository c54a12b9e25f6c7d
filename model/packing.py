r"""Packing: the G completions of a prompt in one row, the prompt once.

    [ prompt | completion_1 | ... | completion_G ]

A completion's positions start where the prompt's end (`next_position`), and it sees the prompt and itself
only. So the row gives

    log pi_theta(y_t | image, x, y_<t)        for every token t of every completion y,

as G rows of their own would, in values and gradients up to rounding. But the image is encoded once and the
prompt forwarded once (the idea of Prefix Grouper, arXiv 2506.05433; the official code forwards both once per
completion).

This file lays rows out; model/logprobs.py forwards them. It reads `prompt` and `tokens` of a completion
(`grpo.Completion`), and `ids`, `positions`, `next_position` and `image_tokens` of a prompt (`prompt.Prompt`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A longer group is split into several rows: a row's mask takes its length squared.
ROW_TOKENS = 8192
# A batch of rows has at most so many tokens, and so many image tokens: each of these is four patches, and
# costs more than text.
BATCH_TOKENS = 8192
BATCH_IMAGE_TOKENS = 2048


class Continuation(NamedTuple):
    """A prompt and the tokens behind it: all that packing reads of a completion."""

    prompt: Any
    tokens: list[int]


@dataclass
class PackedRow:
    """Completions of one prompt that share a row, and how many tokens the row has."""

    prompt: Any
    completions: list
    length: int


@dataclass(frozen=True)
class PackedBatch:
    """B rows of at most T tokens that are forwarded together, holding N tokens of completions."""

    completions: list  # in the order of their tokens
    sizes: list[int]  # how many of the N tokens belong to each completion
    prompts: list  # one a row
    ids: Tensor  # [B, T] int64
    positions: Tensor  # [3, B, T] int64, temporal, vertical and horizontal
    segment: Tensor  # [B, T] int64: 0 the prompt; 1, 2, ... its completions; -1 padding
    where: Tensor  # [N] int64: the place in B * T whose hidden state predicts a token
    targets: Tensor  # [N] int64: that token


def pack(completions: list, batch_scale: float = 1.0) -> list[list[PackedRow]]:
    """Cuts completions into rows, and gathers rows into batches that are forwarded together.

    Completions that follow one another and have the same prompt object share a row. A row has at most
    ROW_TOKENS tokens, a batch at most BATCH_TOKENS and BATCH_IMAGE_TOKENS; batch_scale: the fraction of these
    that is used. A row has at least one completion and a batch at least one row, however long. Rows of
    similar length go together, as the shorter ones are padded to the longest. Completions of 4, 4, 2 and 3
    tokens, two of each prompt, with prompts of 5 and 9 tokens and batches of 24 tokens:

        rows       [p p p p p | a a a | b b b]    [q q q q q q q q q | c | d d]      of 11 and 12 tokens
        batches    both are one: 2 * 12 = 24
    """
    # Completions into rows. The last token of a completion is predicted, never an input.
    rows: list[PackedRow] = []
    for completion in completions:
        prompt = completion.prompt
        count = len(completion.tokens)
        same_prompt = bool(rows) and rows[-1].prompt is prompt
        if not same_prompt or rows[-1].length + count > ROW_TOKENS * batch_scale:
            rows.append(PackedRow(prompt, [], len(prompt)))
        rows[-1].completions.append(completion)
        rows[-1].length += max(0, count - 1)

    # Rows into batches, the longest first: the first row of a batch is as long as the batch.
    batches: list[list[PackedRow]] = []
    image_tokens = 0
    for row in sorted(rows, key=lambda row: -row.length):
        image_tokens += row.prompt.image_tokens
        is_full = not batches or image_tokens > BATCH_IMAGE_TOKENS * batch_scale
        if not is_full:
            is_full = (len(batches[-1]) + 1) * batches[-1][0].length > BATCH_TOKENS * batch_scale
        if is_full:
            batches.append([])
            image_tokens = row.prompt.image_tokens
        batches[-1].append(row)
    return batches


def lay_out(rows: list[PackedRow]) -> PackedBatch:
    """Returns the tensors of a batch of rows, on the CPU, padded on the right.

    A prompt p q r with the completions a b c and d e (positions of text: one number for all three axes):

        ids         p  q  r  a  b  d  .  .        c and e are predicted, never an input
        segment     0  0  0  1  1  2 -1 -1
        positions   0  1  2  3  4  3  .  .
        where             2  3  4  2  5           the places that predict a b c, then d e
        targets           a  b  c  d  e
    """
    length = max(row.length for row in rows)
    length = -(-length // 8) * 8  # kernels want masks whose rows are multiples of 8
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    segment = torch.full((len(rows), length), -1)
    where: list[int] = []
    targets: list[int] = []
    for r, row in enumerate(rows):
        # The prompt, once.
        prompt_end = len(row.prompt)
        ids[r, :prompt_end] = row.prompt.ids
        positions[:, r, :prompt_end] = row.prompt.positions
        segment[r, :prompt_end] = 0
        # Its completions, one behind the other.
        start = prompt_end
        for number, completion in enumerate(row.completions, start=1):
            inputs = completion.tokens[:-1]
            end = start + len(inputs)
            ids[r, start:end] = torch.tensor(inputs, dtype=torch.long)
            positions[:, r, start:end] = row.prompt.next_position + torch.arange(len(inputs))
            segment[r, start:end] = number
            # The prompt's last token predicts the first token, and each token the next one.
            predicting = [prompt_end - 1, *range(start, end)]
            where += [r * length + place for place in predicting][: len(completion.tokens)]
            targets += completion.tokens
            start = end
    completions = [completion for row in rows for completion in row.completions]
    return PackedBatch(
        completions=completions,
        sizes=[len(completion.tokens) for completion in completions],
        prompts=[row.prompt for row in rows],
        ids=ids,
        positions=positions,
        segment=segment,
        where=torch.tensor(where, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
    )


def packed_mask(segment: Tensor) -> Tensor:
    """Returns who may see whom: [B, 1, T, T] bool for segment [B, T], True where a row may see a column.

    A token sees itself, and what stands before it in the prompt and in its own completion. Padding sees at
    least itself, as a softmax over nothing would be NaN. For the segment 0 0 1 1 2:

                 0  0  1  1  2
        prompt   x
        prompt   x  x
        y_1      x  x  x
        y_1      x  x  x  x
        y_2      x  x        x
    """
    length = segment.shape[1]
    order = torch.arange(length, device=segment.device)
    is_prompt = segment[:, None, :] == 0
    same_segment = segment[:, None, :] == segment[:, :, None]
    not_later = order[None, :] <= order[:, None]
    return ((is_prompt | same_segment) & not_later)[:, None]

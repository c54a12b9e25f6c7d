r"""Packing: the G completions of a prompt in one row, the prompt once.

    [ prompt | completion_1 | ... | completion_G ]

A completion's positions start at the end of the prompt, and it sees the prompt and itself only. So the row
gives

    log pi_theta(y_t | image, x, y_<t)        for every token t of every completion y,

exactly as G rows of their own would, in values and gradients, but the image is encoded once and the prompt
forwarded once (the idea of Prefix Grouper, arXiv 2506.05433; the official code forwards both once per
completion).

This file lays rows out; the model that reads them is in vlm.py. Of a prompt it needs `ids`, `positions`,
`next_position` and `image_tokens` (see `vlm.Prompt`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_TOKENS = 8192  # a longer group is split into several rows: a row's mask takes its length squared
BATCH_TOKENS = 8192  # rows are forwarded and differentiated together up to so many tokens,
BATCH_IMAGE_TOKENS = (
    2048  # and so many image tokens: each is four patches in the image encoder, and costs more than text
)


@dataclass(frozen=True)
class PackedRow:
    """Which completions of which group share a row, and how many tokens it has."""

    group: int
    completions: list[int]
    length: int


@dataclass(frozen=True)
class PackedBatch:
    """B rows of at most T tokens that are forwarded together, holding N tokens of completions.

    which: of each completion, in order, its group and its number in it; sizes: how many of the N tokens are
    its own. prompts: one a row. ids, segment: [B, T]; positions: [3, B, T]. segment: 0 is the prompt, 1, 2,
    ... its completions, -1 padding. where: [N] the place in B * T whose hidden state predicts a token;
    targets: [N] that token.
    """

    which: list[tuple[int, int]]
    sizes: list[int]
    prompts: list
    ids: Tensor
    positions: Tensor
    segment: Tensor
    where: Tensor
    targets: Tensor


def pack(groups: list[tuple], batch_scale: float = 1.0) -> list[list[PackedRow]]:
    """Cuts groups into rows, and gathers rows into batches that are forwarded together.

    groups: (prompt, completions as lists of token ids). A row has at most ROW_TOKENS tokens, a batch at most
    BATCH_TOKENS and BATCH_IMAGE_TOKENS; budget: the share of these that is used. A row has at least one
    completion and a batch at least one row, however long. Rows of similar length go together, as the shorter
    ones are padded to the longest.
    """
    rows, batches = [], []
    for g, (prompt, completions) in enumerate(groups):
        fresh = len(rows)
        for i, ids in enumerate(completions):
            if len(rows) == fresh or rows[-1].length + len(ids) > ROW_TOKENS * batch_scale:
                rows.append(PackedRow(g, [], len(prompt)))
            rows[-1] = PackedRow(g, [*rows[-1].completions, i], rows[-1].length + max(0, len(ids) - 1))
    images = 0
    for row in sorted(rows, key=lambda row: -row.length):
        images += groups[row.group][0].image_tokens
        full = batches and (len(batches[-1]) + 1) * batches[-1][0].length > BATCH_TOKENS * batch_scale
        if not batches or full or images > BATCH_IMAGE_TOKENS * batch_scale:
            batches.append([])
            images = groups[row.group][0].image_tokens
        batches[-1].append(row)
    return batches


def lay_out(groups: list[tuple], rows: list[PackedRow]) -> PackedBatch:
    """The tensors of a batch of rows, on the CPU, padded on the right.

    The last token of a completion is predicted, never an input; its first is predicted by the prompt's last.
    """
    length = -(-max(row.length for row in rows) // 8) * 8  # kernels want masks whose rows are multiples of 8
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(3, len(rows), length, dtype=torch.long)
    segment, where, targets, sizes = torch.full((len(rows), length), -1), [], [], []
    for r, row in enumerate(rows):
        prompt, completions = groups[row.group]
        end = len(prompt)
        ids[r, :end], positions[:, r, :end], segment[r, :end] = prompt.ids, prompt.positions, 0
        for number, i in enumerate(row.completions, start=1):
            completion, start = completions[i], end
            end = start + max(0, len(completion) - 1)
            ids[r, start:end] = torch.tensor(completion[:-1], dtype=torch.long)
            segment[r, start:end] = number
            positions[:, r, start:end] = prompt.next_position + torch.arange(end - start)
            where += [r * length + t for t in [len(prompt) - 1, *range(start, end)]][: len(completion)]
            targets += completion
            sizes.append(len(completion))
    which = [(row.group, i) for row in rows for i in row.completions]
    prompts = [groups[row.group][0] for row in rows]
    where, targets = torch.tensor(where, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
    return PackedBatch(which, sizes, prompts, ids, positions, segment, where, targets)


def packed_mask(segment: Tensor) -> Tensor:
    """[B, 1, T, T] bool for segment [B, T] (see `PackedBatch`): True where a query (row) may see
    a key (column).

    A token sees what stands before it in the prompt and in its own completion. Padding sees at least itself:
    a softmax over nothing would be NaN.
    """
    order = torch.arange(segment.shape[1], device=segment.device)
    shared_or_own = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return (shared_or_own & (order[None, :] <= order[:, None]))[:, None]

"""Generation: n sampled completions for every prompt of a batch,

    y_t ~ top-p( softmax( logits(image, x, y_<t) / temperature ) )    until an end token or max_new_tokens.

`model.generate(num_return_sequences=n)` repeats image and prompt n times, copies the whole cache at every
token and carries rows that are finished. Here a prompt is paid for once:

    admit    encodes images, forwards prompts, keeps their keys and values once for all samples
    sample   draws the next token of every row
    step     forwards one token per row; a row attends to its prompt's keys and to its own (in cache.py)
    retire   rows that are finished leave; waiting prompts take their place

Differs from `model.generate` in one more point: a token that stands for image data is never sampled, because
a completion that holds one could not be fed back (R1-V issue 91).
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.decode import Rows, recorded, slots_in_memory, step
from model.forward import embed, hidden_states
from model.prompt import Prompt
from model.sampling import sample
from model.vlm import VLM

PREFILL_TOKENS = 16384  # prompts are forwarded so many tokens at a time
# Tokens between two looks at which rows are finished; a look waits for the GPU. Until then finished rows go
# on writing, in a column that nobody reads.
CHECK_EVERY = {"cpu": 1, "cuda": 16}
LEAVE_BELOW = 0.8  # finished rows leave when this share is still being written: leaving copies the cache


@torch.no_grad()
def generate(
    vlm: VLM,
    prompts: list[Prompt],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> list[list[list[int]]]:
    """Samples n completions a prompt: [prompts][n][tokens], the end token included where one was reached.

    temperature 0 is greedy. top_p in (0, 1] keeps the likeliest tokens up to that much probability, top_k the
    k likeliest (0: all). `generator` makes it reproducible, on CUDA as long as the free memory, and with it
    the number of rows at once, stays the same; it is fastest on the model's own device. Where memory runs
    out, prompts that are done are kept, and the others begin again with half as many rows at a time. Raises
    ValueError for arguments out of range, OutOfMemoryError if not even a few rows fit.
    """
    whole = n >= 1 and max_new_tokens >= 1 and top_k >= 0
    if not whole or not 0 <= temperature < math.inf or not 0 < top_p <= 1:  # written so that NaN is wrong
        raise ValueError("need n, max_new_tokens >= 1, 0 <= temperature < inf, 0 < top_p <= 1, top_k >= 0")
    results: list[list] = [[None] * n for _ in prompts]
    draw_token = functools.partial(
        sample, temperature=temperature, top_p=top_p, top_k=top_k, generator=generator
    )
    while waiting := [i for i, samples in enumerate(results) if None in samples]:
        try:
            with vlm.on_device():
                write(vlm, prompts, waiting, n, max_new_tokens, draw_token, results)
            break
        except torch.OutOfMemoryError:
            pass  # out of this block first: the exception holds the rows
        vlm.use_less_memory()
    return results


def write(
    vlm: VLM,
    prompts: list[Prompt],
    waiting: list[int],
    n: int,
    new_tokens: int,
    draw_token: Callable[[Tensor, object], Tensor],
    results: list[list],
) -> None:
    """Writes n completions of the waiting prompts into `results`; draw_token: logits [R, vocabulary] and
    the pieces of `Rows` -> tokens [R]."""
    waiting = sorted(waiting, key=lambda i: len(prompts[i]))  # the longest come first: all others fit
    longest = len(prompts[waiting[-1]])
    slots = min(len(waiting), slots_in_memory(vlm, longest, n, new_tokens))
    rows = Rows(vlm, slots, n, longest, new_tokens)
    steps: dict[tuple, Callable[[], None]] = {}
    pool = torch.cuda.graph_pool_handle() if vlm.device.type == "cuda" else None
    while rows.owners or waiting:
        if waiting and len(rows.prompt_lengths) <= 0.75 * slots:
            chosen = [waiting.pop() for _ in range(min(len(waiting), slots - len(rows.prompt_lengths)))]
            admit(vlm, rows, prompts, chosen)
        rows.take(draw_token(rows.logits[: len(rows.owners)], pieces=rows.pieces))
        if rows.time % CHECK_EVERY[vlm.device.type] == 0:
            retire(rows, results)
        if rows.owners:
            shape = rows.shape()
            if shape not in steps:
                steps[shape] = recorded(functools.partial(step, vlm, rows, *shape), vlm, pool)
            steps[shape]()


def admit(vlm: VLM, rows: Rows, prompts: list[Prompt], chosen: list[int]) -> None:
    """Forwards prompts and opens n rows for each; chosen: which ones, the longest first."""
    while chosen:
        batch = chosen[: max(1, int(PREFILL_TOKENS * vlm.fallbacks.batch_scale) // len(prompts[chosen[0]]))]
        chosen = chosen[len(batch) :]
        logits, layers = prefill(vlm, [prompts[i] for i in batch])
        start, slot, n = len(rows.owners), len(rows.prompt_lengths), rows.n
        new, into = slice(start, start + len(batch) * n), slice(slot, slot + len(batch))
        for layer, (keys, values) in enumerate(layers):
            rows.prompt_keys[layer][into, :, : keys.shape[2]] = keys
            rows.prompt_values[layer][into, :, : keys.shape[2]] = values
        lengths = [len(prompts[i]) for i in batch]
        first = rows.first.new_tensor([prompts[i].next_position for i in batch])
        rows.prompt_length[into] = rows.prompt_length.new_tensor(lengths)
        rows.logits[new] = logits.masked_fill(rows.banned, -torch.inf).repeat_interleave(n, dim=0)
        rows.first[new], rows.written[new], rows.finished[new] = first.repeat_interleave(n), 0, False
        rows.place(list(range(slot * n, (slot + len(batch)) * n)), start)
        rows.owners += [(i, sample, rows.time) for i in batch for sample in range(n)]
        rows.prompt_lengths += lengths


def retire(rows: Rows, results: list[list]) -> None:
    """Hands over what finished rows have written and drops them, once they are enough for it to pay."""
    finished = rows.finished[: len(rows.owners)].tolist()
    if finished.count(False) >= LEAVE_BELOW * len(finished):
        return
    leaving = [row for row, done in enumerate(finished) if done]
    end_ids = set(rows.end_ids.tolist())
    for row, ids in zip(
        leaving, rows.tokens[torch.tensor(leaving, device=rows.tokens.device), : rows.new_tokens].tolist()
    ):
        prompt, sample, _ = rows.owners[row]
        end = next((t for t, token in enumerate(ids) if token in end_ids), len(ids))
        results[prompt][sample] = ids[: end + 1]
    rows.keep([row for row, done in enumerate(finished) if not done])


# ---- Forward: a prompt at once, then a token at a time -----------------------------------------------------


class Recorder:
    """Stands where transformers expects a cache; keeps a layer's keys and values [prompts, heads, P, d]."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_) -> tuple[Tensor, Tensor]:
        """Called by each layer."""
        self.layers.append((keys, values))
        return keys, values


def prefill(vlm: VLM, prompts: list[Prompt]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Forwards prompts: the logits [prompts, vocabulary] of their first tokens, and each layer's keys and
    values.

    Prompts are padded on the right, to the longest; causal attention keeps padding out of sight of what is
    real.
    """
    ids = torch.nn.utils.rnn.pad_sequence([p.ids for p in prompts], batch_first=True)
    positions = torch.nn.utils.rnn.pad_sequence([p.positions.T for p in prompts], batch_first=True).permute(
        2, 0, 1
    )
    recorder = Recorder()
    embeds = embed(vlm.model, ids.to(vlm.device), prompts)
    hidden = hidden_states(vlm.model, embeds, positions.to(vlm.device), None, recorder)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=vlm.device)
    return vlm.model.lm_head(
        hidden[torch.arange(len(prompts), device=vlm.device), last]
    ).float(), recorder.layers


# ---- Sampling ----------------------------------------------------------------------------------------------

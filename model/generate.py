"""Generation: n sampled completions for every prompt of a batch,

    y_t ~ top-p( softmax( logits(image, x, y_<t) / temperature ) )    until an end token or max_new_tokens.

`model.generate(num_return_sequences=n)` repeats image and prompt n times, copies the whole cache at every
token and carries rows that are finished. Here a prompt is paid for once:

    prefill  encodes images, forwards prompts, makes their keys and values once for all samples
    sample   draws the next token of every row (in sampling.py)
    step     forwards one token per row; a row attends to its prompt's keys and to its own (in decode.py)
    evict    finished rows leave; waiting prompts take their place

Differs from `model.generate` in one more point: a token that stands for image data is never sampled, because
a completion that holds one could not be fed back (R1-V issue 91).
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.decode import Layers, Rows, capture_graph, slots_in_memory, step
from model.forward import embed, hidden_states
from model.fused import float_logits
from model.prompt import Prompt
from model.sampling import sample
from model.vlm import VLM

PREFILL_TOKENS = 16384  # prompts are forwarded so many tokens at a time
# Tokens between two looks at which rows are finished; a look waits for the GPU. Until then finished rows go
# on writing, in a column that nobody reads.
CHECK_EVERY = {"cpu": 1, "cuda": 16}
REFILL_BELOW = 0.75  # waiting prompts are prefilled when this share of the slots is in use, or less
LEAVE_BELOW = (
    0.8  # finished rows leave when less than this share is being written: leaving copies the cache
)


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
    the number of rows at once, stays the same; it is fastest on the model's own device. On out-of-memory it
    keeps the finished prompts and retries the rest with half as many rows. Raises ValueError for arguments
    out of range, OutOfMemoryError if not even a few rows fit.
    """
    whole_numbers = n >= 1 and max_new_tokens >= 1 and top_k >= 0
    fractions = 0 <= temperature < math.inf and 0 < top_p <= 1  # False for NaN
    if not (whole_numbers and fractions):
        raise ValueError(
            "need n, max_new_tokens >= 1, 0 <= temperature < inf, 0 < top_p <= 1, top_k >= 0"
        )
    results: list[list] = [[None] * n for _ in prompts]
    draw = functools.partial(
        sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        generator=generator,
    )

    def attempt() -> None:
        waiting = [i for i, samples in enumerate(results) if None in samples]
        if waiting:
            with vlm.on_device():
                schedule(vlm, prompts, waiting, n, max_new_tokens, draw, results)

    vlm.retry(attempt)
    return results


def schedule(
    vlm: VLM,
    prompts: list[Prompt],
    waiting: list[int],
    n: int,
    new_tokens: int,
    draw: Callable[..., Tensor],
    results: list[list],
) -> None:
    """Writes n completions of the waiting prompts into `results`: prefills, decodes and evicts in turn.

    draw: (logits [R, vocabulary], pieces of `Rows`) -> tokens [R].
    """
    waiting = sorted(waiting, key=lambda i: len(prompts[i]))
    longest = len(prompts[waiting[-1]])
    slots = min(len(waiting), slots_in_memory(vlm, longest, n, new_tokens))
    rows = Rows(vlm, slots, n, longest, new_tokens)
    graphs: dict[tuple, Callable[[], None]] = {}
    pool = torch.cuda.graph_pool_handle() if vlm.device.type == "cuda" else None
    while rows.owners or waiting:
        # Prefill: waiting prompts go into free slots, the longest first, so that all others fit.
        used = len(rows.prompt_lengths)
        if waiting and used <= REFILL_BELOW * slots:
            count = min(len(waiting), slots - used)
            chosen = [waiting.pop() for _ in range(count)]
            fill_slots(vlm, rows, prompts, chosen)
        # Sample.
        token = draw(rows.logits[: len(rows.owners)], pieces=rows.pieces)
        rows.append(token)
        # Evict.
        if rows.time % CHECK_EVERY[vlm.device.type] == 0:
            evict(rows, results)
        # Decode: a step, captured once for each shape.
        if rows.owners:
            shape = rows.shape()
            if shape not in graphs:
                one_step = functools.partial(step, vlm, rows, *shape)
                graphs[shape] = capture_graph(one_step, vlm, pool)
            graphs[shape]()


def fill_slots(vlm: VLM, rows: Rows, prompts: list[Prompt], chosen: list[int]) -> None:
    """Prefills the chosen prompts, PREFILL_TOKENS at a time, and opens their rows.

    chosen: the numbers of the prompts, the longest first, as all of a batch are padded to its first.
    """
    while chosen:
        tokens = int(PREFILL_TOKENS * vlm.fallbacks.batch_scale)
        count = max(1, tokens // len(prompts[chosen[0]]))
        batch = [prompts[i] for i in chosen[:count]]
        rows.add(chosen[:count], batch, *prefill(vlm, batch))
        chosen = chosen[count:]


def evict(rows: Rows, results: list[list]) -> None:
    """Copies what finished rows have written into `results` and frees them, once enough are finished."""
    finished = rows.finished[: len(rows.owners)].tolist()
    leaving = [row for row, done in enumerate(finished) if done]
    staying = [row for row, done in enumerate(finished) if not done]
    if len(staying) >= LEAVE_BELOW * len(finished):
        return
    end_ids = set(rows.end_ids.tolist())
    index = torch.tensor(leaving, device=rows.tokens.device)
    # All but the scrap column.
    written = rows.tokens[index, :-1].tolist()
    for row, ids in zip(leaving, written):
        owner = rows.owners[row]
        end = next((t for t, token in enumerate(ids) if token in end_ids), len(ids))
        results[owner.prompt][owner.sample] = ids[: end + 1]
    rows.compact(staying)


# ---- Prefill -----------------------------------------------------------------------------------------------


class KVCache:
    """Stands where transformers expects a cache; holds each layer's keys and values."""

    def __init__(self):
        self.layers: Layers = []  # [prompts, heads, P, head_dim] both

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Holds a layer's keys and values, and returns them; each layer calls it."""
        self.layers.append((keys, values))
        return keys, values


def prefill(vlm: VLM, prompts: list[Prompt]) -> tuple[Tensor, Layers]:
    """Forwards prompts; returns the logits of their first tokens, and each layer's keys and values.

    logits: [prompts, vocabulary] float32; keys, values: [prompts, heads, P, head_dim]. Prompts are padded on
    the right, to the longest; causal attention hides padding from what is real.
    """
    ids = pad_sequence([p.ids for p in prompts], batch_first=True)
    positions = pad_sequence([p.positions.T for p in prompts], batch_first=True)  # [prompts, P, 3]
    positions = positions.permute(2, 0, 1).to(vlm.device)
    cache = KVCache()
    embeds = embed(vlm.model, ids.to(vlm.device), prompts)
    hidden = hidden_states(vlm.model, embeds, positions, None, cache)
    # The hidden state of each prompt's last token predicts the first token of its completions.
    row = torch.arange(len(prompts), device=vlm.device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=vlm.device)
    logits = float_logits(hidden[row, last], vlm.model.lm_head.weight)
    return logits, cache.layers

"""Decoding: the KV cache that the samples of a prompt share, and one step of all rows on it.

    step     forwards one token per row; a row attends to its prompt's keys and to its own (`fused.attend`)

All tensors are allocated once and written in place, so a step is a fixed sequence of kernels on fixed
addresses. A GPU captures it once as a CUDA graph and replays it: launching hundreds of small kernels from
Python takes longer than running them. The small operations between the matrix products are compiled, which
makes few kernels of many (fused.py).
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model import fused
from model.prompt import Prompt
from model.vlm import VLM

CPU_CACHE_BYTES = (
    1 << 29
)  # memory for keys and values on a CPU; on CUDA it is derived from what is free
SAMPLING_BYTES = (
    32  # per row and vocabulary entry: logits, probabilities and their sums, in all their copies
)
# Rows, slots, prompt tokens and new tokens of a step are rounded up to multiples of these, so that a GPU
# captures few graphs.
BUCKETS = {"cpu": (1, 1, 1, 1), "cuda": (64, 8, 256, 128)}

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer


class Owner(NamedTuple):
    """The completion that a row writes: sample number `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    born: int  # tokens that `Rows` had drawn when it began


class Rows:
    """The rows being decoded and the prompts they belong to, in tensors that are allocated once.

    A prompt sits in a *slot*. Sample i of the prompt in slot s has the *cell* s * n + i, by which `attend`
    finds its prompt. Rows are dense: when some are evicted, the others move up. Prompts A and B with n = 2,
    after A1 has left:

        slot            0       1
        prompt          A       B
        cell            0   1   2   3
        sample          A0  -   B0  B1
        row_of_cell     0   0   1   2       nobody uses cell 1; it points to any row

        row             0   1   2   3
        sample          A0  B0  B1  -
        cell_of_row     0   2   3   0       nobody uses row 3; it points to any cell

    R: rows, S: slots, P: tokens of the longest prompt, T: new tokens of a row, at most.
    """

    def __init__(
        self,
        vlm: VLM,
        slots: int,
        n: int,
        prompt_tokens: int,
        new_tokens: int,
    ):
        text = vlm.model.config.text_config
        rows = slots * n
        self.n = n  # samples of a prompt
        self.heads = text.num_key_value_heads
        self.dtype = vlm.model.dtype
        self.limits = (rows, slots, prompt_tokens, new_tokens)  # R, S, P, T as allocated
        zeros = functools.partial(torch.zeros, device=vlm.device)
        integers = functools.partial(zeros, dtype=torch.long)

        def cache(count: int, tokens: int) -> list[Tensor]:
            shape = (count, self.heads, tokens, head_size(text))
            return [zeros(shape, dtype=self.dtype) for _ in range(text.num_hidden_layers)]

        # The KV cache: of each prompt once, and of the tokens that each row has written.
        self.prompt_keys = cache(slots, prompt_tokens)  # [layers][S, heads, P, head_dim]
        self.prompt_values = cache(slots, prompt_tokens)  # [layers][S, heads, P, head_dim]
        self.keys = cache(rows, new_tokens)  # [layers][R, heads, T, head_dim]
        self.values = cache(rows, new_tokens)  # [layers][R, heads, T, head_dim]

        # Where prompts and rows are, and what rows have written.
        self.prompt_length = integers(slots)  # [S]
        self.row_of_cell = integers(rows)  # [S * n]
        self.cell_of_row = integers(rows)  # [R]
        self.first = integers(rows)  # [R] the position of the first token written
        self.written = integers(rows)  # [R] tokens written
        self.tokens = integers(rows, new_tokens + 1)  # [R, T + 1] the last column is scrap
        self.finished = zeros(rows, dtype=torch.bool)  # [R]
        self.logits = zeros(rows, text.vocab_size)  # [R, vocabulary] float32

        # What stays the same.
        self.end_ids = torch.tensor(vlm.end_ids, device=vlm.device)
        self.banned = zeros(text.vocab_size, dtype=torch.bool)  # [vocabulary] never sampled
        self.banned[torch.tensor(vlm.vision_ids, device=vlm.device)] = True
        self.count = torch.arange(max(prompt_tokens, new_tokens), device=vlm.device)  # 0, 1, 2, ...
        merge = can_merge_qkv(vlm)
        blocks = vlm.model.model.language_model.layers
        self.project = [
            project_qkv(block.self_attn, merge) for block in blocks
        ]  # [layers] functions
        self.pieces = fused.compiled(vlm.fallbacks) if vlm.device.type == "cuda" else fused

        # What the host knows without asking the GPU.
        self.buckets = BUCKETS[vlm.device.type]
        self.owners: list[Owner] = []  # of each row
        self.prompt_lengths: list[int] = []  # of each slot in use
        self.time = 0  # tokens drawn so far

    def add(
        self,
        numbers: list[int],
        prompts: list[Prompt],
        logits: Tensor,
        layers: Layers,
    ) -> None:
        """Puts prompts into the next free slots and opens n rows for each.

        numbers: of the prompts, for the owners of their rows. logits: [prompts, vocabulary] of their first
        tokens. layers: [prompts, heads, tokens, head_dim] each.
        """
        slot = len(self.prompt_lengths)
        slots = slice(slot, slot + len(prompts))
        start = len(self.owners)
        rows = slice(start, start + len(prompts) * self.n)
        # The prompts: their keys, values and lengths.
        for layer, (keys, values) in enumerate(layers):
            tokens = keys.shape[2]
            self.prompt_keys[layer][slots, :, :tokens] = keys
            self.prompt_values[layer][slots, :, :tokens] = values
        lengths = [len(prompt) for prompt in prompts]
        self.prompt_lengths += lengths
        self.prompt_length[slots] = self.prompt_length.new_tensor(lengths)
        # Their rows: nothing is written yet, and the logits of the first token are there.
        first = self.first.new_tensor([prompt.next_position for prompt in prompts])
        self.first[rows] = first.repeat_interleave(self.n)
        self.written[rows] = 0
        self.finished[rows] = False
        logits = logits.masked_fill(self.banned, -torch.inf)
        self.logits[rows] = logits.repeat_interleave(self.n, dim=0)
        cell = slot * self.n
        self._assign([*range(cell, cell + len(prompts) * self.n)], start)
        for number in numbers:
            self.owners += [Owner(number, sample, self.time) for sample in range(self.n)]

    def append(self, token: Tensor) -> None:
        """Appends the token [R] drawn for each row, and marks the rows that it finishes."""
        live = slice(len(self.owners))
        new_tokens = self.limits[3]
        column = self.written[live, None].clamp(max=new_tokens)
        self.tokens[live].scatter_(1, column, token[:, None])
        self.written[live] += 1
        full = self.written[live] >= new_tokens
        self.finished[live] |= torch.isin(token, self.end_ids) | full
        self.time += 1

    def shape(self) -> tuple[int, ...]:
        """Returns the R, S, P and T that the next step covers.

        Each is what is needed, rounded up to BUCKETS, and at most what is allocated.
        """
        oldest = min(owner.born for owner in self.owners)
        needed = (
            len(self.owners),
            len(self.prompt_lengths),
            max(self.prompt_lengths),
            self.time - oldest,
        )
        rounded = [math.ceil(size / bucket) * bucket for size, bucket in zip(needed, self.buckets)]
        return tuple(map(min, rounded, self.limits))

    def compact(self, rows: list[int]) -> None:
        """Moves these rows, and the prompts that they need, up to the front; all others are gone."""
        cell_of_row = self.cell_of_row.tolist()
        cells = [cell_of_row[row] for row in rows]
        slots = sorted({cell // self.n for cell in cells})
        _move_up(rows, [*self.keys, *self.values])
        _move_up(rows, [self.first, self.written, self.tokens, self.finished])
        _move_up(slots, [*self.prompt_keys, *self.prompt_values, self.prompt_length])
        self.owners = [self.owners[row] for row in rows]
        self.prompt_lengths = [self.prompt_lengths[slot] for slot in slots]
        # Rows and cells that nobody uses must still point inside.
        self.cell_of_row.zero_()
        self.row_of_cell.zero_()
        first_cell = {slot: new * self.n for new, slot in enumerate(slots)}
        self._assign([first_cell[cell // self.n] + cell % self.n for cell in cells], 0)

    def _assign(self, cells: list[int], start: int) -> None:
        """Gives the rows from `start` on these cells."""
        cell = self.cell_of_row.new_tensor(cells)
        row = torch.arange(start, start + len(cells), device=cell.device)
        self.cell_of_row[row] = cell
        self.row_of_cell[cell] = row


def _move_up(kept: list[int], tensors: list[Tensor]) -> None:
    """Moves the kept entries of each tensor to its front, in place."""
    if kept == list(range(len(kept))):
        return
    index = torch.tensor(kept, device=tensors[0].device)
    for tensor in tensors:
        tensor[: len(kept)] = tensor[index]


# ---- Memory ------------------------------------------------------------------------------------------------


def slots_in_memory(vlm: VLM, prompt_tokens: int, n: int, new_tokens: int) -> int:
    """Returns how many prompts, with n rows each, fit into the free memory: at least one."""
    config = vlm.model.config
    token = cache_token_bytes(config, vlm.model.dtype)
    row = new_tokens * token + SAMPLING_BYTES * config.text_config.vocab_size
    slot = prompt_tokens * token + n * row
    budget = int(cache_budget(vlm.device) * vlm.fallbacks.row_scale)
    return max(1, budget // slot)


def cache_token_bytes(config, dtype: torch.dtype) -> int:
    """Returns the bytes that the keys and values of one token take."""
    text = config.text_config
    numbers = 2 * text.num_key_value_heads * head_size(text)
    return text.num_hidden_layers * numbers * dtype.itemsize


def head_size(text) -> int:
    """Returns the width of a head; text: the text model's configuration, which names it or not."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_budget(device: torch.device) -> int:
    """Returns the bytes that caches may take: half of what is free on CUDA, CPU_CACHE_BYTES on a CPU."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved but does not use is free, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free // 2


# ---- A step ------------------------------------------------------------------------------------------------


def step(vlm: VLM, rows: Rows, R: int, S: int, P: int, T: int) -> None:
    """Forwards the last token of the first R rows; leaves the logits of the next in `rows.logits`.

    This is the transformer, a token a row: everything but attention treats the R tokens like any [R, hidden]
    batch. It covers S slots, P tokens of each prompt and T written tokens of each row (see `Rows.shape`).
    Idempotent, and never synchronizes with the GPU. CUDA graph capture needs both.
    """
    model = vlm.model.model.language_model
    f = rows.pieces
    # What all layers share: the rotation of the token's position, and which keys do not exist.
    token, index, cos, sin, unseen, unwritten = f.begin(
        rows.tokens[:R],
        rows.written[:R],
        rows.first[:R],
        rows.prompt_length[:S],
        rows.count[:P],
        rows.count[:T],
        model.rotary_emb.inv_freq,
        model.rotary_emb.attention_scaling,
        rows.heads,
        rows.dtype,
    )
    row_of_cell = rows.row_of_cell[: S * rows.n].view(S, rows.n)
    cell_of_row = rows.cell_of_row[:R]
    x = model.embed_tokens(token)
    change = torch.zeros_like(x)
    for layer, block in enumerate(model.layers):
        attention = block.self_attn
        mlp = block.mlp
        # Queries, keys and values; the keys and values go into the row's cache.
        x, h = f.add_norm(x, change, *scale(block.input_layernorm))
        q, k, v = rows.project[layer](h)
        keys = rows.keys[layer]
        values = rows.values[layer]
        q = f.rotate_and_write(
            q,
            k,
            v,
            cos,
            sin,
            index,
            keys[:R],
            values[:R],
            head_norms(attention),
        )
        # Attention to the prompt's tokens and to the row's own.
        caches = (
            _per_head(rows.prompt_keys[layer], S, P),
            _per_head(rows.prompt_values[layer], S, P),
            _per_head(keys, R, T),
            _per_head(values, R, T),
        )
        h = f.attend(q, *caches, unseen, unwritten, row_of_cell, cell_of_row)
        # The MLP.
        change = attention.o_proj(h)
        x, h = f.add_norm(x, change, *scale(block.post_attention_layernorm))
        h = f.swiglu(mlp.gate_proj(h), mlp.up_proj(h))
        change = mlp.down_proj(h)
    x, h = f.add_norm(x, change, *scale(model.norm))
    logits = fused.float_logits(h, vlm.model.lm_head.weight)
    f.write_logits(logits, rows.banned, rows.logits[:R])


def _per_head(cache: Tensor, count: int, tokens: int) -> Tensor:
    """Returns a view [count * heads, tokens, d] of the first of a cache [rows, heads, all tokens, d]."""
    heads = cache.shape[1]
    return cache.flatten(0, 1)[: count * heads, :tokens]


def scale(norm) -> tuple[Tensor, float]:
    """Returns weight and epsilon of an RMS norm."""
    return norm.weight, norm.variance_epsilon


def head_norms(attention) -> tuple[Tensor, Tensor, float] | None:
    """Returns weights and epsilon of the norms of each head's queries and keys, which Qwen3-VL has."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, *scale(attention.k_norm)


def can_merge_qkv(vlm: VLM) -> bool:
    """Tells if `project_qkv` may merge: on a GPU where the copies take a tenth of what is free at most."""
    size = 0
    for layer in vlm.model.model.language_model.layers:
        size += sum(projection.weight.nbytes for projection in qkv_projections(layer.self_attn))
    return vlm.device.type == "cuda" and 5 * size <= cache_budget(vlm.device)


def qkv_projections(attention) -> list[torch.nn.Linear]:
    """Returns the three projections in front of an attention."""
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def project_qkv(attention, merge: bool) -> Callable[[Tensor], Sequence[Tensor]]:
    """Returns the function from h [R, hidden] to its queries, keys and values.

    merge: the three matrices become one, unless one does more (LoRA). It is a copy, up to 6% of the weights,
    for the length of a rollout: one matrix product is faster than three.
    """
    projections = qkv_projections(attention)
    if not merge or any(type(each) is not torch.nn.Linear for each in projections):
        return lambda h: [each(h) for each in projections]
    weight = torch.cat([each.weight for each in projections])
    bias = None
    if projections[0].bias is not None:
        bias = torch.cat([each.bias for each in projections])
    widths = [each.out_features for each in projections]
    return lambda h: torch.nn.functional.linear(h, weight, bias).split(widths, dim=1)


# ---- CUDA graphs -------------------------------------------------------------------------------------------


def capture_graph(step: Callable[[], None], vlm: VLM, pool) -> Callable[[], None]:
    """Captures a step as a CUDA graph and returns its replay; returns the step itself where that fails.

    A graph is the list of kernels that a function launches, with their addresses and all numbers that Python
    worked out (here R, S, P and T) frozen into it. A replay launches the list at once and runs no Python, so
    everything that changes from step to step must be in tensors that stay where they are: hence `Rows`, and a
    graph for each shape.

    The step runs once before its capture, because libraries set themselves up in their first call, which they
    may not do during a capture. Capturing computes nothing. All graphs take their scratch memory from one
    pool: no two run at the same time, and nothing in it outlives a step. A CPU captures nothing, nor does a
    process in which it has failed once. Raises OutOfMemoryError.
    """
    if vlm.device.type != "cuda" or not vlm.fallbacks.graphs:
        return step
    stream = None
    try:
        with torch.cuda.device(vlm.device):
            stream = torch.cuda.current_stream()
            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step()
        return graph.replay
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        if stream is not None:
            _leave_capture(stream, vlm.device, pool)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        vlm.fallbacks.graphs = False
        print(f"decoding without a CUDA graph: {error}", file=sys.stderr)
        return step


def _leave_capture(stream, device: torch.device, pool) -> None:
    """Undoes what a capture that breaks off leaves behind.

    Its stream is current, and the allocator believes that it goes on, so that freeing memory would fail.
    """
    torch.cuda.set_stream(stream)
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except (RuntimeError, AttributeError):
        pass  # it had ended after all

"""Decoding: the KV cache whose prefixes many rows share, and one step of all rows on it.

    step     forwards one token per row; a row attends to its prefix's keys and to its own (`fused.attend`)

All tensors are allocated once and written in place, so a step is a fixed sequence of kernels on fixed
addresses. A GPU captures it once as a CUDA graph and replays it: launching hundreds of small kernels from
Python takes longer than running them. The small operations between the matrix products are compiled, which
makes few kernels of many (fused.py).
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from model import fused
from model.lora import LoRALinear
from model.schedule import CELLS, Limits, Moves, find_limits
from model.vlm import VLM

CPU_CACHE_BYTES = 1 << 29  # for keys and values on a CPU; on CUDA it is derived from what is free
# Per row and vocabulary entry: logits, probabilities and their sums, in all their copies.
SAMPLING_BYTES = 32

Layer = tuple[Tensor, Tensor]  # keys and values
Layers = list[Layer]
Step = Callable[[], None]  # does the same to the same tensors each time


@dataclass(frozen=True)
class Prefix:
    """The tokens that prompts have in common, after they have been forwarded."""

    layers: Layers  # [heads, tokens, d] each
    tokens: int


@dataclass(frozen=True)
class Prefilled:
    """A prompt that has been forwarded and waits for rows."""

    prefix: Prefix
    layers: Layers  # of its tail, [heads, tail, d] each
    tail: int  # tokens behind the prefix
    first: int  # the position of the first token of its completions
    logits: Tensor  # [vocabulary] of that token


class Rows:
    """The rows that are decoded and the prefixes that they read, in tensors that are allocated once.

    Which of them is whose is the schedule's business (schedule.py). A row's own tokens are those that its
    prompt has behind the prefix, its *tail*, and those that it writes. With a tail of 2, after 3 tokens:

        own token    0   1   2   3   4   -   -
        key of       t0  t1  w0  w1  w2             w2 is forwarded by the next step, which writes its key
        position     5   6   7   8   9              first = 7, written = 3, tail = 2

    R: rows, S: slots, P: tokens of the longest prefix, T: own tokens of a row, at most.
    """

    def __init__(self, vlm: VLM, limits: Limits, new_tokens: int, products: "list[Products]"):
        text = vlm.model.config.text_config
        device = vlm.device
        rows = limits.rows
        self.new_tokens = new_tokens
        self.products = products  # of each layer
        self.heads = text.num_key_value_heads
        self.dtype = vlm.model.dtype
        zeros = functools.partial(torch.zeros, device=device)
        integers = functools.partial(zeros, dtype=torch.long)

        def cache(count: int, tokens: int) -> list[Tensor]:
            shape = (count, self.heads, tokens, head_size(text))
            layers = range(text.num_hidden_layers)
            return [zeros(shape, dtype=self.dtype) for _ in layers]

        # The KV cache: of each prefix, and of each row's own tokens.
        self.prefix_keys = cache(limits.slots, limits.prefix_tokens)  # [layers][S, heads, P, d]
        self.prefix_values = cache(limits.slots, limits.prefix_tokens)  # [layers][S, heads, P, d]
        self.keys = cache(rows, limits.own_tokens)  # [layers][R, heads, T, d]
        self.values = cache(rows, limits.own_tokens)  # [layers][R, heads, T, d]

        # Where rows find their prefix. What nobody uses points to any row or cell.
        self.prefix_length = integers(limits.slots)  # [S]
        self.row_of_cell = integers(limits.slots * limits.cells)  # [S * cells]
        self.cell_of_row = integers(rows)  # [R]

        # What rows have written.
        self.seeds = integers(rows)  # [R] of their random numbers
        self.tail = integers(rows)  # [R]
        self.first = integers(rows)  # [R] the position of the first token written
        self.written = integers(rows)  # [R] tokens written
        self.tokens = integers(rows, new_tokens + 1)  # [R, new tokens + 1] the last column is scrap
        self.finished = zeros(rows, dtype=torch.bool)  # [R]
        self.logits = zeros(rows, text.vocab_size)  # [R, vocabulary] float32

        # What stays the same.
        self.end_ids = torch.tensor(vlm.end_ids, device=device)
        self.banned_ids = torch.tensor(vlm.vision_ids, device=device)  # never sampled
        longest = max(limits.prefix_tokens, limits.own_tokens)
        self.count = torch.arange(longest, device=device)  # 0, 1, 2, ...
        self.pieces = fused.compiled(vlm.fallbacks) if device.type == "cuda" else fused

    def open(
        self, prompt: Prefilled, seeds: Tensor, rows: Sequence[int], slots: Sequence[int]
    ) -> None:
        """Lets rows write completions of a prompt; its prefix goes into these slots.

        seeds: [rows] of the random numbers of each.
        """
        places = torch.tensor([*rows, *slots], device=self.tokens.device)
        rows, slots = places.split([len(rows), len(slots)])
        for layer, (keys, values) in enumerate(prompt.layers):
            self.keys[layer][rows, :, : prompt.tail] = keys
            self.values[layer][rows, :, : prompt.tail] = values
        prefix = prompt.prefix
        for layer, (keys, values) in enumerate(prefix.layers if len(slots) else ()):
            self.prefix_keys[layer][slots, :, : prefix.tokens] = keys
            self.prefix_values[layer][slots, :, : prefix.tokens] = values
        self.prefix_length[slots] = prefix.tokens
        # Nothing is written yet, and the logits of the first token are there.
        self.seeds[rows] = seeds
        self.tail[rows] = prompt.tail
        self.first[rows] = prompt.first
        self.written[rows] = 0
        self.finished[rows] = False
        self.logits[rows] = prompt.logits

    def point(self, cells: dict[int, int]) -> None:
        """Points rows to their cells, and cells to their rows. What nobody uses points to 0.

        cells: of each row in use. {0: 1, 1: 2} makes cell_of_row 1 2 and row_of_cell 0 0 1.
        """
        row_of_cell = [0] * len(self.row_of_cell)
        cell_of_row = [0] * len(self.cell_of_row)
        for row, cell in cells.items():
            row_of_cell[cell] = row
            cell_of_row[row] = cell
        self.row_of_cell.copy_(torch.tensor(row_of_cell))
        self.cell_of_row.copy_(torch.tensor(cell_of_row))

    def per_head(self, layer: int, R: int, L: int, S: int, P: int, N: int, T: int) -> list[Tensor]:
        """Returns views [places * heads, tokens, d] of keys and values, for `attend`.

        They are of P tokens of S prefixes, T own tokens of the L long rows, and N of the other R - L rows.
        """
        prefixes = (self.prefix_keys[layer], self.prefix_values[layer])
        own = (self.keys[layer], self.values[layer])
        views = [cache[:S, :, :P] for cache in prefixes]
        views += [cache[:L, :, :T] for cache in own]
        views += [cache[L:R, :, :N] for cache in own]
        return [view.flatten(0, 1) for view in views]

    def append(self, token: Tensor) -> None:
        """Appends the token [R] drawn for each row, and marks the rows that it finishes."""
        live = slice(len(token))
        column = self.written[live, None].clamp(max=self.new_tokens)
        self.tokens[live].scatter_(1, column, token[:, None])
        self.written[live] += 1
        full = self.written[live] >= self.new_tokens
        self.finished[live] |= torch.isin(token, self.end_ids) | full

    def move(self, rows: Moves, slots: Moves) -> None:
        """Copies rows and slots to other places, to which the keys of each dict go."""
        own = [self.seeds, self.tail, self.first, self.written, self.tokens, self.finished]
        _move(rows, [*self.keys, *self.values, *own])
        _move(slots, [*self.prefix_keys, *self.prefix_values, self.prefix_length])


def _move(places: Moves, tensors: list[Tensor]) -> None:
    """Copies entries of each tensor from the keys of `places` to their values."""
    if not places:
        return
    pairs = torch.tensor(list(places.items()), device=tensors[0].device)
    source, target = pairs.T
    for tensor in tensors:
        tensor[target] = tensor[source]


# ---- Memory ------------------------------------------------------------------------------------------------


def limits_in_memory(
    vlm: VLM, prefixes: Sequence[int], prefix_tokens: int, own_tokens: int, n: int
) -> Limits:
    """Returns how many rows and slots fit into the free memory: see `schedule.find_limits`."""
    config = vlm.model.config
    return find_limits(
        prefixes,
        prefix_tokens,
        own_tokens,
        n,
        most_cells=CELLS[vlm.device.type],
        token_bytes=cache_token_bytes(config, vlm.model.dtype),
        row_bytes=SAMPLING_BYTES * config.text_config.vocab_size,
        budget=int(cache_budget(vlm.device) * vlm.fallbacks.row_scale),
    )


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


def step(
    vlm: VLM,
    rows: Rows,
    R: int,  # rows
    L: int,  # long rows, which stand first
    S: int,  # slots
    C: int,  # cells of a slot
    P: int,  # tokens of a prefix
    N: int,  # own tokens of a row
    T: int,  # own tokens of a long row
) -> None:
    """Forwards the last token of the first R rows; leaves the logits of the next in `rows.logits`.

    This is the transformer, a token a row: everything but attention treats the R tokens like any [R, hidden]
    batch. R to T are those of `Schedule.shape`. Idempotent, and never synchronizes with the GPU. CUDA graph
    capture needs both.
    """
    model = vlm.model.model.language_model
    f = rows.pieces
    # The norms in front of each layer, and of the output matrix.
    norms = [*(block.input_layernorm for block in model.layers), model.norm]
    # The last token of each row: x is the residual stream, h its norm, which the next product takes.
    state = (rows.tokens[:R], rows.written[:R], rows.tail[:R], rows.first[:R])
    embeddings = model.embed_tokens.weight
    x, h, index, position = f.embed_last(*state, embeddings, *scale(norms[0]))
    # What all layers share: the rotation of the token's position, and which keys do not exist.
    cos, sin, unseen, unwritten = f.begin(
        index,
        position,
        rows.prefix_length[:S],
        rows.count[:P],
        rows.count[:T],
        model.rotary_emb.inv_freq,
        model.rotary_emb.attention_scaling,
        rows.heads,
        rows.dtype,
    )
    row_of_cell = rows.row_of_cell[: S * C].view(S, C)
    cell_of_row = rows.cell_of_row[:R]
    for layer, block in enumerate(model.layers):
        products = rows.products[layer]
        # Queries, keys and values; the keys and values go into the row's cache.
        q, k, v = products.qkv(h)
        own = (rows.keys[layer][:R], rows.values[layer][:R])
        q = f.rotate_and_write(q, k, v, cos, sin, index, *own, head_norms(block.self_attn))
        # Attention to the prefix's tokens and to the row's own.
        caches = rows.per_head(layer, R, L, S, P, N, T)
        h = f.attend(q, *caches, unseen, unwritten, row_of_cell, cell_of_row)
        change = products.o(h)
        # The MLP.
        x, h = f.add_norm(x, change, *scale(block.post_attention_layernorm))
        gate, up = products.gate_up(h)
        h = f.swiglu(gate, up)
        change = products.down(h)
        x, h = f.add_norm(x, change, *scale(norms[layer + 1]))
    fused.float_logits(h, vlm.model.lm_head.weight, out=rows.logits[:R])


def scale(norm) -> tuple[Tensor, float]:
    """Returns weight and epsilon of an RMS norm."""
    return norm.weight, norm.variance_epsilon


def head_norms(attention) -> tuple[Tensor, Tensor, float] | None:
    """Returns weights and epsilon of the norms of each head's queries and keys, which Qwen3-VL has."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, *scale(attention.k_norm)


# ---- Its matrix products -----------------------------------------------------------------------------------

Product = Callable[[Tensor], Tensor]  # [R, in] -> [R, out]
SeveralProducts = Callable[[Tensor], Sequence[Tensor]]  # of one input


class Products(NamedTuple):
    """The matrix products of a layer."""

    qkv: SeveralProducts  # queries, keys and values
    o: Product
    gate_up: SeveralProducts
    down: Product


def make_products(vlm: VLM) -> list[Products]:
    """Returns the matrix products of each layer, in few kernels where a GPU has room for copies of weights.

    Those of queries, keys and values are joined to one matrix, up to 6% of the weights: one product is faster
    than three. With LoRA each product would take three kernels; there all changed weights are merged,
    W + (alpha / R) B A rounded to W's dtype, which is also what a run exports. That copies gate and up
    anyway, so they are joined, too. All for the length of a rollout. Copies take a fifth of the memory of the
    KV cache at most: a rollout with fewer rows takes more steps, and soon longer (docs/speed.md).
    """
    blocks = vlm.model.model.language_model.layers
    found = [_linears(block) for block in blocks]
    join_qkv = merge_change = False
    if vlm.device.type == "cuda":
        room = cache_budget(vlm.device) // 5
        lora = [layer for layer in chain(*found) if type(layer) is LoRALinear]
        changed = sum(layer.weight.nbytes for layer in lora)
        merge_change = 0 < changed <= room
        qkv = sum(each.weight.nbytes for layers in found for each in layers[:3])
        join_qkv = qkv <= room and (merge_change or not changed)
    return [_layer_products(layers, join_qkv, merge_change) for layers in found]


def _linears(block) -> list[torch.nn.Linear]:
    attention, mlp = block.self_attn, block.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    return [*qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _layer_products(linears: list, join_qkv: bool, merge_change: bool) -> Products:
    """Returns the products of a layer; see `make_products`."""

    def weight(layer) -> Tensor:
        return layer.merged() if type(layer) is LoRALinear else layer.weight

    def product(layer) -> Product:
        if type(layer) is not LoRALinear:
            return layer
        if not merge_change:
            return layer.cast_changes()
        return functools.partial(linear, weight=layer.merged(), bias=layer.bias)

    def several(layers: list, join: bool) -> SeveralProducts:
        if not join:
            separate = [product(layer) for layer in layers]
            return lambda h: [each(h) for each in separate]
        matrix = torch.cat([weight(layer) for layer in layers])
        bias = None
        if layers[0].bias is not None:
            bias = torch.cat([layer.bias for layer in layers])
        widths = [layer.out_features for layer in layers]
        return lambda h: linear(h, matrix, bias).split(widths, dim=1)

    q, k, v, o, gate, up, down = linears
    return Products(
        qkv=several([q, k, v], join_qkv),
        o=product(o),
        gate_up=several([gate, up], merge_change),
        down=product(down),
    )


# ---- CUDA graphs -------------------------------------------------------------------------------------------


def capture_graph(step: Step, vlm: VLM, pool) -> Step:
    """Captures a step as a CUDA graph and returns its replay; returns the step itself where that fails.

    A graph is the list of kernels that a function launches, with their addresses and all numbers that Python
    worked out (here R, L, S, C, P, N and T) frozen into it. A replay launches the list at once and runs no
    Python, so everything that changes from step to step must be in tensors that stay where they are: hence
    `Rows`, and a graph for each shape.

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

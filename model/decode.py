"""The cache that the samples of a prompt share, and one step of decoding on it.

    step     forwards one token per row; a row attends to its prompt's keys and to its own (`fused.attend`)

All tensors are allocated once and written in place, so a step is a fixed sequence of kernels on fixed
addresses. On a GPU it is therefore recorded once as a CUDA graph and replayed: launching hundreds of small
kernels from Python takes longer than running them. What stands between the matrix products is compiled there,
so that they are not thousands (fused.py).
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from model import fused
from model.vlm import VLM

CPU_CACHE_BYTES = 1 << 29  # memory for keys and values on a CPU; on CUDA it is derived from what is free
SAMPLING_BYTES = 32  # per row and vocabulary entry: logits, probabilities and their sums, in all their copies
# Rows, slots, prompt tokens and new tokens of a step are rounded up to multiples of these: a GPU records few
# graphs.
BUCKETS = {"cpu": (1, 1, 1, 1), "cuda": (64, 8, 256, 128)}


class Rows:
    """The rows being written and the prompts they belong to, in tensors that are allocated once.

    A prompt sits in a *slot*; sample i of the prompt in slot s has the *cell* s * n + i, by which `attend`
    finds its prompt. Rows are kept dense: when some leave, the others move up. With R rows, S slots, P tokens
    in the longest prompt and T new tokens:

    prompt_keys, prompt_values: a layer each, [S, heads, P, head_dim]; prompt_length: [S]. keys, values: a
    layer each, [R, heads, T, head_dim], of the tokens that the row has written. row_of_cell: [S * n],
    cell_of_row: [R]; written: [R] tokens written; first: [R] the position of the first of them. tokens: [R, T
    + 1] (the last column is scrap: where finished rows go on writing); logits: [R, vocabulary], float32.
    banned: [vocabulary], True for tokens that are never sampled; count: 0, 1, 2, ... in_one: a layer each,
    the three projections before attention as one, on a GPU. pieces: `fused`, or its functions compiled.
    """

    def __init__(self, vlm: VLM, slots: int, n: int, prompt_tokens: int, new_tokens: int):
        text, device, dtype, rows = vlm.model.config.text_config, vlm.device, vlm.model.dtype, slots * n
        heads, head_dim = text.num_key_value_heads, head_size(text)

        def per_layer(*shape) -> list[Tensor]:
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(text.num_hidden_layers)]

        def integers(*shape) -> Tensor:
            return torch.zeros(shape, device=device, dtype=torch.long)

        self.prompt_keys, self.prompt_values = (
            per_layer(slots, heads, prompt_tokens, head_dim) for _ in range(2)
        )
        self.keys, self.values = (per_layer(rows, heads, new_tokens, head_dim) for _ in range(2))
        self.prompt_length, self.row_of_cell, self.cell_of_row = (
            integers(slots),
            integers(rows),
            integers(rows),
        )
        self.written, self.first, self.tokens = integers(rows), integers(rows), integers(rows, new_tokens + 1)
        self.finished = torch.ones(rows, device=device, dtype=torch.bool)
        self.logits = torch.zeros(rows, text.vocab_size, device=device)
        self.end_ids = integers(0).new_tensor(vlm.end_ids)
        self.banned = torch.zeros(text.vocab_size, device=device, dtype=torch.bool)
        self.banned[integers(0).new_tensor(vlm.vision_ids)] = True
        self.count = torch.arange(max(prompt_tokens, new_tokens), device=device)
        self.n, self.heads, self.dtype, self.new_tokens = n, heads, dtype, new_tokens
        self.buckets = BUCKETS[device.type]
        self.in_one = all_in_one(vlm)
        self.pieces = fused.compiled(vlm.fallbacks) if device.type == "cuda" else fused
        # What the host knows, so that it need not ask the GPU:
        self.owners: list[
            tuple[int, int, int]
        ] = []  # of each row: its prompt, which sample of it, when it began
        self.prompt_lengths: list[int] = []  # of each slot in use
        self.time = 0  # tokens drawn so far

    def take(self, token: Tensor) -> None:
        """Writes down the token [R] drawn for each row."""
        live, self.time = slice(len(self.owners)), self.time + 1
        self.tokens[live].scatter_(1, self.written[live, None].clamp(max=self.new_tokens), token[:, None])
        self.written[live] += 1
        self.finished[live] |= torch.isin(token, self.end_ids) | (self.written[live] >= self.new_tokens)

    def shape(self) -> tuple[int, int, int, int]:
        """Rows, slots, prompt tokens and new tokens that the next step has to deal with, rounded up to
        buckets."""
        longest = self.time - min(born for _, _, born in self.owners)
        used = len(self.owners), len(self.prompt_lengths), max(self.prompt_lengths), longest
        most = len(self.written), len(self.prompt_length), self.prompt_keys[0].shape[2], self.new_tokens
        return tuple(
            min(limit, -(-x // bucket) * bucket) for x, limit, bucket in zip(used, most, self.buckets)
        )

    def keep(self, rows: list[int]) -> None:
        """Moves these rows, and the prompts that they need, up to the front; all others are gone."""
        cells = self.cell_of_row.tolist()
        slots = sorted({cells[row] // self.n for row in rows})
        moved = {slot: new for new, slot in enumerate(slots)}
        _move_up(rows, self.keys + self.values + [self.written, self.first, self.finished, self.tokens])
        _move_up(slots, self.prompt_keys + self.prompt_values + [self.prompt_length])
        self.owners = [self.owners[i] for i in rows]
        self.prompt_lengths = [self.prompt_lengths[i] for i in slots]
        self.cell_of_row.zero_()  # rows and cells that nobody uses must still point inside
        self.row_of_cell.zero_()
        self.place([moved[cells[row] // self.n] * self.n + cells[row] % self.n for row in rows], 0)

    def place(self, cells: list[int], start: int) -> None:
        """Puts the rows from `start` on into these cells."""
        cell = self.cell_of_row.new_tensor(cells)
        row = torch.arange(start, start + len(cells), device=cell.device)
        self.cell_of_row[row], self.row_of_cell[cell] = cell, row


def _move_up(which: list[int], tensors: list[Tensor]) -> None:
    if which != list(range(len(which))):
        index = torch.tensor(which, device=tensors[0].device)
        for tensor in tensors:
            tensor[: len(which)] = tensor[index]


def slots_in_memory(vlm: VLM, prompt_tokens: int, n: int, new_tokens: int) -> int:
    """How many prompts, with n rows each, fit into the memory there is: the token budget."""
    row = new_tokens * cache_token_bytes(vlm.model.config, vlm.model.dtype)
    row += SAMPLING_BYTES * vlm.model.config.text_config.vocab_size
    slot = prompt_tokens * cache_token_bytes(vlm.model.config, vlm.model.dtype) + n * row
    return max(1, int(cache_budget(vlm.device) * vlm.fallbacks.row_scale) // slot)


def cache_token_bytes(config, dtype: torch.dtype) -> int:
    """The bytes that the keys and values of one token take."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_size(text) * dtype.itemsize


def head_size(text) -> int:
    """The width of a head; text: the text model's configuration, which names it or not."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def cache_budget(device: torch.device) -> int:
    """The bytes that caches may take: half of what is free on CUDA, a fixed amount on a CPU."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, but free
    return (torch.cuda.mem_get_info(device)[0] + held) // 2


# ---- A step -------------------------------------------------------------------------


def step(vlm: VLM, rows: Rows, R: int, S: int, P: int, T: int) -> None:
    """Forwards the last token of the first R rows; leaves the logits of the next in `rows.logits`.

    This is the transformer, a token a row: everything but attention treats the R tokens like any [R, hidden]
    batch. It looks at S slots, P tokens of each prompt and T written tokens of each row (see `Rows.shape`).
    Done twice it gives the same, and it never asks the GPU for a number, as `recorded` needs.
    """
    model, f, n, heads = vlm.model.model.language_model, rows.pieces, rows.n, rows.heads
    token, index, cos, sin, unseen, unwritten = f.begin(
        rows.tokens[:R], rows.written[:R], rows.first[:R], rows.prompt_length[:S], rows.count[:P],
        rows.count[:T], model.rotary_emb.inv_freq, model.rotary_emb.attention_scaling, heads, rows.dtype,
    )  # fmt: skip
    row_of_cell, cell_of_row = rows.row_of_cell[: S * n].view(S, n), rows.cell_of_row[:R]
    x = model.embed_tokens(token)
    change = torch.zeros_like(x)
    for layer, block in enumerate(model.layers):
        x, h = f.add_norm(x, change, *scale(block.input_layernorm))
        q, k, v = project(block.self_attn, rows.in_one[layer], h)
        own = rows.keys[layer][:R], rows.values[layer][:R]
        q = f.rotate_and_write(q, k, v, cos, sin, index, *own, head_norms(block.self_attn))
        prompt = (
            x.flatten(0, 1)[: S * heads, :P] for x in (rows.prompt_keys[layer], rows.prompt_values[layer])
        )
        own = (x.flatten(0, 1)[: R * heads, :T] for x in (rows.keys[layer], rows.values[layer]))
        h = f.attend(q, *prompt, *own, unseen, unwritten, row_of_cell, cell_of_row)
        x, h = f.add_norm(x, block.self_attn.o_proj(h), *scale(block.post_attention_layernorm))
        change = block.mlp.down_proj(f.swiglu(block.mlp.gate_proj(h), block.mlp.up_proj(h)))
    x, h = f.add_norm(x, change, *scale(model.norm))
    f.write_logits(vlm.model.lm_head(h), rows.banned, rows.logits[:R])


def scale(norm) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMS norm."""
    return norm.weight, norm.variance_epsilon


def head_norms(attention) -> tuple[Tensor, Tensor, float] | None:
    """Weights and epsilon of the norms of each head's queries and keys, which Qwen3-VL has."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight, *scale(attention.k_norm)


def project(attention, whole: tuple[Tensor, Tensor | None] | None, h: Tensor) -> list[Tensor]:
    """Queries, keys and values of h [R, hidden]; whole: what `in_one` gave."""
    projections = projections_of(attention)
    if whole is None:
        return [each(h) for each in projections]
    return torch.nn.functional.linear(h, *whole).split([each.out_features for each in projections], dim=1)


def projections_of(attention) -> tuple:
    """The three layers in front of an attention."""
    return attention.q_proj, attention.k_proj, attention.v_proj


def all_in_one(vlm: VLM) -> list[tuple[Tensor, Tensor | None] | None]:
    """What `in_one` gives for each layer, on a GPU where it takes less than a tenth of what is still free."""
    attentions = [layer.self_attn for layer in vlm.model.model.language_model.layers]
    size = sum(each.weight.nbytes for attention in attentions for each in projections_of(attention))
    if vlm.device.type != "cuda" or 10 * size > 2 * cache_budget(vlm.device):
        return [None] * len(attentions)
    return [in_one(attention) for attention in attentions]


def in_one(attention) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the three projections as those of one; None if one does more than that (LoRA).

    A copy, up to 6% of the weights, for the length of a rollout: one matrix product is faster than three.
    """
    projections = projections_of(attention)
    if any(type(each) is not torch.nn.Linear for each in projections):
        return None
    bias = None if projections[0].bias is None else torch.cat([each.bias for each in projections])
    return torch.cat([each.weight for each in projections]), bias


def recorded(step: Callable[[], None], vlm: VLM, pool) -> Callable[[], None]:
    """The step as a CUDA graph to replay; the step itself on a CPU, and where recording has failed in this
    process.

    A graph is the list of kernels that a function launches, with their addresses and all numbers that Python
    worked out (here R, S, P and T) frozen into it. A replay launches the list at once and runs no Python, so
    everything that changes from step to step must be in tensors that stay where they are: hence `Rows`, and a
    graph for each shape.

    The step is done once before it is recorded, because libraries set themselves up in their first call,
    which they may not do during a recording. Recording computes nothing. All graphs take their scratch memory
    from one pool: no two run at the same time, and nothing in it outlives a step.
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
            _leave_recording(stream, vlm.device, pool)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        vlm.fallbacks.graphs = False
        print(f"decoding without a CUDA graph: {error}", file=sys.stderr)
        return step


def _leave_recording(stream, device: torch.device, pool) -> None:
    """Undoes what a recording that breaks off leaves behind.

    Its stream is current, and the allocator believes that it goes on, so that freeing memory would fail.
    """
    torch.cuda.set_stream(stream)
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except (RuntimeError, AttributeError):
        pass  # it had ended after all

"""The cache that the samples of a prompt share, and one step of decoding on it.

    step     forwards one token per row; a row attends to its prompt's keys and to its own (see `attend`)

All tensors are allocated once and written in place, so a step is a fixed sequence of kernels on fixed
addresses. On a GPU it is therefore recorded once as a CUDA graph and replayed: launching a thousand small
kernels from Python takes longer than running them.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from vlm import VLM

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
    """

    def __init__(self, vlm: VLM, slots: int, n: int, prompt_tokens: int, new_tokens: int):
        text, device, dtype, rows = vlm.model.config.text_config, vlm.device, vlm.model.dtype, slots * n
        heads, head_dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads

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
        self.end_ids, self.vision_ids = (
            integers(0).new_tensor(vlm.end_ids),
            integers(0).new_tensor(vlm.vision_ids),
        )
        self.n, self.new_tokens, self.buckets = n, new_tokens, BUCKETS[device.type]
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
    return max(1, int(cache_budget(vlm.device) * vlm.limits.rows) // slot)


def cache_token_bytes(config, dtype: torch.dtype) -> int:
    """The bytes that the keys and values of one token take."""
    text = config.text_config
    heads, head_dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize


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
    model, index = vlm.model.model.language_model, (rows.written[:R] - 1).clamp(0, rows.new_tokens - 1)
    x = model.embed_tokens(rows.tokens[:R].gather(1, index[:, None])[:, 0])
    cos, sin = rotation(model.rotary_emb, rows.first[:R] + index, x.dtype)
    seen = torch.arange(P, device=x.device) < rows.prompt_length[:S, None, None, None]
    own = torch.arange(T, device=x.device) <= index[:, None, None, None]
    everyone = torch.arange(R, device=x.device)
    for layer, block in enumerate(model.layers):
        h, attention = block.input_layernorm(x), block.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (project(h).unflatten(1, (-1, cos.shape[-1])) for project in projections)
        rows.keys[layer][everyone, :, index] = rotate(k, cos, sin)
        rows.values[layer][everyone, :, index] = v
        x = x + attention.o_proj(attend(rotate(q, cos, sin), rows, layer, seen, own))
        x = x + block.mlp(block.post_attention_layernorm(x))
    logits = vlm.model.lm_head(model.norm(x)).float()
    rows.logits[:R] = logits.index_fill_(1, rows.vision_ids, -torch.inf)


def rotation(rotary, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin [R, 1, head_dim] for text at position [R]: the same position in time, height and width."""
    angle = position[:, None, None].float() * rotary.inv_freq.float()
    angle = torch.cat([angle, angle], dim=-1)
    return (angle.cos() * rotary.attention_scaling).to(dtype), (angle.sin() * rotary.attention_scaling).to(
        dtype
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [R, heads, head_dim]; cos, sin: [R, 1, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attend(q: Tensor, rows: Rows, layer: int, seen: Tensor, own: Tensor) -> Tensor:
    """Attention of q [R, heads, head_dim] to the row's prompt and to its own tokens; returns [R, heads *
    head_dim].

    The softmax over both is the mean of the two softmaxes, weighted with their sums (Hydragen, arXiv
    2402.05099), so the n samples of a prompt can read its keys together, as one matrix product, and none
    needs a copy of them. seen: [S, 1, 1, P], own: [R, 1, 1, T]: True where there is a token. With 2 prompts,
    n = 2 and one row gone, rows 0, 1, 2 may stand in cells 0, 2, 3: their queries are laid out by cell, [2
    slots, 2 samples], for the prompts (cell 1 holds a query that nobody asked), and what comes of it is laid
    out by row again.
    """
    (R, _, d), (S, P), T = q.shape, (len(seen), seen.shape[-1]), own.shape[-1]
    q = (q * d**-0.5).view(R, rows.keys[layer].shape[1], -1, d)  # [R, key heads, query heads of each, d]
    kv, g = q.shape[1:3]
    cells = (
        q[rows.row_of_cell[: S * rows.n]]
        .view(S, rows.n, kv, g, d)
        .transpose(1, 2)
        .reshape(S, kv, rows.n * g, d)
    )
    parts = partial_attention(
        cells, rows.prompt_keys[layer][:S, :, :P], rows.prompt_values[layer][:S, :, :P], seen
    )
    parts = [x.view(S, kv, rows.n, g, -1).transpose(1, 2).flatten(0, 1)[rows.cell_of_row[:R]] for x in parts]
    prompt_sum, prompt_weight, prompt_top = parts
    keys, values = rows.keys[layer][:R, :, :T], rows.values[layer][:R, :, :T]
    own_sum, own_weight, own_top = partial_attention(q, keys, values, own)
    a = (prompt_top - own_top).sigmoid()  # e^top over the sum of both: no overflow
    b = (own_top - prompt_top).sigmoid()
    out = (a * prompt_sum + b * own_sum) / (a * prompt_weight + b * own_weight)
    return out.to(q.dtype).flatten(1)


def partial_attention(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j e^(s_j - top) v_j, sum_j e^(s_j - top) and top = max_j s_j over the visible keys, s = q . k."""
    scores = float_scores(q, keys).masked_fill_(~visible, -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return (weights.to(values.dtype) @ values).float(), weights.sum(dim=-1, keepdim=True), top


def float_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Q . k in float32, also of bfloat16 [A, B, Q, d] and [A, B, K, d]: a score of 100 rounded to bfloat16 is
    off by up to 0.25."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(
            q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32
        ).unflatten(0, q.shape[:2])
    return q.float() @ keys.float().transpose(-1, -2)


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
    if vlm.device.type != "cuda" or not vlm.limits.record:
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
        vlm.limits.record = False
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

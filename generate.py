"""Generation: n sampled completions for every prompt of a batch,

    y_t ~ top-p( softmax( logits(image, x, y_<t) / temperature ) )        until an end token or max_new_tokens.

Three steps, each a function:

    prefill   encodes the image and forwards the prompt once per prompt, however many completions are wanted
    branch    gives each of the n completions a row of a cache that is allocated once, at its full length
    decode    forwards one token per row, writing its keys and values in place; finished rows leave the batch

`model.generate(num_return_sequences=n)` repeats image and prompt n times and copies the whole cache at every token.
Differs from it in one more point: a token that stands for image data is never sampled, because a completion that holds
one could not be fed back (R1-V issue 91).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm import VLM, Prompt

PREFILL_TOKENS = 16384  # prompts are forwarded so many tokens at a time
CPU_CACHE_BYTES = 1 << 29  # memory for keys and values on a CPU; on CUDA it is derived from what is free
SAMPLING_BYTES = 40  # per row and vocabulary entry: logits, probabilities, their order, noise
CHECK_EVERY = {"cpu": 1, "cuda": 16}  # tokens between two looks at which rows are finished; a look waits for the GPU


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

    temperature 0 is greedy. top_p in (0, 1] keeps the smallest set of tokens with that much probability, top_k the k
    likeliest (0: all). `generator` makes it reproducible, on CUDA as long as the free memory, and with it the batches,
    stay the same; it is fastest on the model's own device.
    Raises ValueError for arguments out of range.
    """
    if n < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError("need n >= 1, max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
    results: list = [None] * len(prompts)
    for batch in _batches(vlm, prompts, n, max_new_tokens):
        rows, logits = branch(*prefill(vlm, [prompts[i] for i in batch]), n, max_new_tokens)
        tokens = decode(vlm, rows, logits, max_new_tokens, temperature, top_p, top_k, generator)
        completions = [_cut(ids, vlm.end_ids) for ids in tokens.tolist()]
        for k, i in enumerate(batch):
            results[i] = completions[k * n : (k + 1) * n]
    return results


# ---- The cache -------------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of every layer, [rows, heads, columns, head_dim], allocated once and written in place.

    transformers' attention calls `update` with the keys and values of the new tokens and attends to what comes back.
    """

    def __init__(self, config, rows: int, columns: int, device, dtype):
        text = config.text_config
        shape = (rows, text.num_key_value_heads, columns, text.hidden_size // text.num_attention_heads)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(text.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(text.num_hidden_layers)]
        self.column = 0  # where the next token is written

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        end = self.column + keys.shape[2]
        self.keys[layer][:, :, self.column : end] = keys
        self.values[layer][:, :, self.column : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps the rows of these indices, in this order."""
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]


@dataclass
class Rows:
    """The rows that are still being written.

    index: [R] which completion of the batch a row is. visible: [R, columns] bool, False where the cache holds
    padding. position: [R] the position of the next token.
    """

    cache: Cache
    index: Tensor
    visible: Tensor
    position: Tensor

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.index, self.visible, self.position = self.index[rows], self.visible[rows], self.position[rows]


# ---- Prefill, branch, decode -------------------------------------------------------------------------------------------


def prefill(vlm: VLM, prompts: list[Prompt]) -> tuple[Rows, Tensor]:
    """Forwards every prompt once. Returns a row per prompt and the logits [prompts, vocabulary] of the first token.

    Prompts are padded on the right, to the longest; a causal mask keeps padding out of sight of what is real.
    """
    length, device = max(map(len, prompts)), vlm.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache = Cache(vlm.model.config, len(prompts), length, device, vlm.model.dtype)
    visible = torch.arange(length, device=device) < lengths[:, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    last, step = [], max(1, PREFILL_TOKENS // length)
    for i in range(0, len(prompts), step):
        chunk = slice(i, i + step)
        embeds = torch.nn.utils.rnn.pad_sequence(vlm.embed(prompts[chunk]), batch_first=True)
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, length - embeds.shape[1]))
        positions = torch.zeros(3, len(embeds), length, dtype=torch.long)
        for row, prompt in enumerate(prompts[chunk]):
            positions[:, row, : len(prompt)] = prompt.positions
        mask = (causal & visible[chunk, None, :])[:, None]
        hidden = vlm.forward(embeds, positions.to(device), mask, _View(cache, chunk))
        last.append(hidden[torch.arange(len(hidden), device=device), lengths[chunk] - 1])
    cache.column = length
    position = torch.tensor([p.next_position for p in prompts], device=device)
    rows = Rows(cache, torch.arange(len(prompts), device=device), visible, position)
    return rows, vlm.model.lm_head(torch.cat(last)).float()


class _View:
    """Some rows of a cache, written from column 0 on."""

    def __init__(self, cache: Cache, rows: slice):
        self.cache, self.rows = cache, rows

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        self.cache.keys[layer][self.rows] = keys
        self.cache.values[layer][self.rows] = values
        return keys, values


def branch(prompt_rows: Rows, logits: Tensor, n: int, max_new_tokens: int) -> tuple[Rows, Tensor]:
    """Copies each prompt's keys and values into n rows with room for max_new_tokens more columns."""
    cache = prompt_rows.cache
    for tensors in (cache.keys, cache.values):
        for layer, old in enumerate(tensors):
            rows, heads, columns, head_dim = old.shape
            new = old.new_zeros(rows, n, heads, columns + max_new_tokens, head_dim)
            new[:, :, :, :columns] = old[:, None]
            tensors[layer] = new.flatten(0, 1)
    room = prompt_rows.visible.new_ones(len(logits), max_new_tokens)
    visible = torch.cat([prompt_rows.visible, room], dim=1).repeat_interleave(n, dim=0)
    index = torch.arange(len(visible), device=visible.device)
    return Rows(cache, index, visible, prompt_rows.position.repeat_interleave(n)), logits.repeat_interleave(n, dim=0)


def decode(vlm: VLM, rows: Rows, logits: Tensor, max_new_tokens: int, temperature, top_p, top_k, generator) -> Tensor:
    """Writes all rows to their end. Returns [rows, max_new_tokens] int64; after a row's end token, anything."""
    tokens = torch.full((len(logits), max_new_tokens), vlm.end_ids[0], device=logits.device)
    end_ids = torch.tensor(vlm.end_ids, device=logits.device)
    banned = torch.tensor(vlm.vision_ids, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for t in range(max_new_tokens):
        token = sample(logits.index_fill(1, banned, -torch.inf), temperature, top_p, top_k, generator)
        tokens[rows.index, t] = token
        if t == max_new_tokens - 1:
            break
        finished |= torch.isin(token, end_ids)
        if t % CHECK_EVERY.get(logits.device.type, 16) == 0 and (left := int((~finished).sum())) < 0.8 * len(token):
            if left == 0:  # dropping rows copies the cache, so it waits until a fifth of them is finished
                break
            alive = (~finished).nonzero()[:, 0]
            rows.select(alive)
            token, finished = token[alive], finished[alive]
        logits = decode_step(vlm, rows, token)
    return tokens


def decode_step(vlm: VLM, rows: Rows, token: Tensor) -> Tensor:
    """Forwards one token [R] a row; returns the logits [R, vocabulary] of the next. A CUDA graph would capture this."""
    embeds = vlm.model.get_input_embeddings()(token)[:, None]
    mask = rows.visible[:, None, None, : rows.cache.column + 1]
    hidden = vlm.forward(embeds, rows.position.expand(3, -1)[:, :, None], mask, rows.cache)
    rows.cache.column += 1
    rows.position = rows.position + 1
    return vlm.model.lm_head(hidden[:, 0]).float()


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, generator) -> Tensor:
    """Draws one token a row from logits [R, vocabulary]; temperature 0 takes the likeliest.

    A draw is argmax(p / e) with e ~ Exp(1): the same distribution as `torch.multinomial`, without waiting for the GPU.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        best, which = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(1, which, best)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(dim=-1) - ordered  # the probability of all tokens before this one
        probs = torch.zeros_like(probs).scatter(1, order, ordered * (likelier < top_p))
    device = probs.device if generator is None else generator.device
    noise = torch.empty(probs.shape, device=device).exponential_(generator=generator).clamp_min(1e-30)
    return (probs / noise.to(probs.device)).argmax(dim=-1)


# ---- Batches -----------------------------------------------------------------------------------------------------------


def cache_token_bytes(config, dtype: torch.dtype) -> int:
    """The bytes that one token of one row takes in the cache."""
    text = config.text_config
    return 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * dtype.itemsize


def cache_budget(device: torch.device) -> int:
    """The bytes that caches may take: half of what is free on CUDA, a fixed amount on a CPU."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, but free
    return (torch.cuda.mem_get_info(device)[0] + unused) // 2


def _batches(vlm: VLM, prompts: list[Prompt], n: int, max_new_tokens: int) -> list[list[int]]:
    """Indices of prompts in batches of similar length whose caches fit into memory."""
    room, token_bytes = cache_budget(vlm.device), cache_token_bytes(vlm.model.config, vlm.model.dtype)
    sampling = SAMPLING_BYTES * vlm.model.config.text_config.vocab_size
    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):  # the longest of a batch comes first
        width = len(prompts[batches[-1][0]]) if batches else 0
        rows = (len(batches[-1]) + 1) * n if batches else n
        if not batches or rows * ((width + max_new_tokens) * token_bytes + sampling) > room:
            batches.append([])
        batches[-1].append(i)
    return batches


def _cut(ids: list[int], end_ids: list[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    end = next((t for t, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]

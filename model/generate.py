"""Generation: n sampled completions for every prompt of a batch,

    y_t ~ top-p( softmax( logits(image, x, y_<t) / temperature ) )    until an end token or max_new_tokens.

`model.generate(num_return_sequences=n)` repeats image and prompt n times, copies the whole cache at every
token and carries rows that are finished. Here an image is paid for once, for all questions about it and all
their answers:

    prefill  forwards image and question 1, then question 2, 3, ... behind the same image: makes the keys
             and values of the image once, and those of each question
    sample   draws the next token of every row (in sampling.py)
    step     forwards one token per row; a row attends to its image's keys and to its own (in decode.py)
    evict    finished rows leave; prompts that wait take their place (in schedule.py)

Differs from `model.generate` in one more point: a token that stands for image data is never sampled, because
a completion that holds one could not be fed back (R1-V issue 91).
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.decode import (
    Layer,
    Layers,
    Prefilled,
    Prefix,
    Rows,
    Step,
    capture_graph,
    limits_in_memory,
    make_products,
    step,
)
from model.forward import embed, hidden_states
from model.fused import float_logits
from model.prompt import Prompt, split_prompt
from model.sampling import Sampling, sample
from model.schedule import Groups, Moves, Owner, Schedule, Waiting, group_by_prefix, run
from model.vlm import VLM

PREFILL_TOKENS = 16384  # prompts are forwarded so many tokens at a time

pad_rows = functools.partial(pad_sequence, batch_first=True)  # [T_i, ...] of each -> [rows, T, ...]


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
    k likeliest (0: all). `generator` makes it reproducible: each completion has random numbers of its own,
    whatever fits into memory at once. On out-of-memory it keeps the finished prompts and retries the rest
    with half as many rows. Raises ValueError for arguments out of range, OutOfMemoryError if not even a few
    rows fit.
    """
    whole_numbers = n >= 1 and max_new_tokens >= 1 and top_k >= 0
    fractions = 0 <= temperature < math.inf and 0 < top_p <= 1  # False for NaN
    if not (whole_numbers and fractions):
        raise ValueError(
            "need n, max_new_tokens >= 1, 0 <= temperature < inf, 0 < top_p <= 1, top_k >= 0"
        )
    results: list[list] = [[None] * n for _ in prompts]
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k)
    # A seed for each completion.
    source = generator or vlm
    shape = (len(prompts), n)
    seeds = torch.randint(2**63 - 1, shape, device=source.device, generator=generator)
    seeds = seeds.to(vlm.device)

    def attempt() -> None:
        waiting = [i for i, samples in enumerate(results) if None in samples]
        if waiting:
            with vlm.on_device():
                rollout = Rollout(vlm, prompts, seeds, sampling, results)
                rollout.run(waiting)

    vlm.retry(attempt)
    return results


@dataclass
class Rollout:
    """Does with tensors what a schedule says (see `schedule.run`)."""

    vlm: VLM
    prompts: list[Prompt]
    seeds: Tensor  # [prompts, n]
    sampling: Sampling
    results: list[list]  # [prompts][n]
    prefilled: dict[int, Prefilled] = field(default_factory=dict)  # prompts that wait for rows
    prefixes: dict[int, Prefix] = field(default_factory=dict)  # those that prompts wait for
    graphs: dict[tuple, Step] = field(default_factory=dict)  # by a step's shape
    pool: tuple[int, int] | None = None  # where CUDA graphs have their scratch memory

    def run(self, numbers: list[int]) -> None:
        """Writes the completions of the prompts with these numbers into `results`."""
        vlm = self.vlm
        waiting = self.find_prefixes(numbers)
        # Rows and slots for all of them, or for as many as fit beside copies of weights.
        products = make_products(vlm)
        counts = Counter(each.prefix for each in waiting).values()
        prefix_tokens = max(each.prefix_tokens for each in waiting)
        new_tokens = self.sampling.max_new_tokens
        own_tokens = max(each.tail for each in waiting) + new_tokens
        n = self.seeds.shape[1]
        limits = limits_in_memory(vlm, counts, prefix_tokens, own_tokens, n)
        self.rows = Rows(vlm, limits, new_tokens, products)
        # Write the completions.
        if vlm.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        schedule = Schedule(limits, n, vlm.device.type)
        tokens = int(PREFILL_TOKENS * vlm.fallbacks.batch_scale)
        groups = group_by_prefix(waiting, tokens)
        run(schedule, groups, tokens, self)

    def find_prefixes(self, numbers: list[int]) -> list[Waiting]:
        """Splits prompts into a prefix and a tail.

        Prompts about the same images, with the same words before and between them, share a prefix. Three
        prompts about the images A and B:

            A What?    A Why?    B What?     ->     prefixes 0 0 1, tails "What?", "Why?", "What?"
        """
        prefixes: dict[tuple, int] = {}
        waiting = []
        for number in numbers:
            prompt = self.prompts[number]
            end = split_prompt(prompt)
            words = tuple(prompt.ids[:end].tolist())
            prefix = prefixes.setdefault((prompt.images, words), len(prefixes))
            tail = len(prompt) - end
            waiting.append(Waiting(number, prefix, end, tail))
        return waiting

    def prefill(self, groups: Groups) -> None:
        """Forwards prompts: of each group the first, then the others behind the same prefix."""
        # A prompt of each prefix that is not there yet: the prefix, then its own tail.
        first: dict[int, Waiting] = {}
        for each, *_ in groups:
            if each.prefix not in self.prefixes:
                first.setdefault(each.prefix, each)
        new = list(first.values())
        if new:
            prompts = [self.prompts[each.prompt] for each in new]
            logits, layers = prefill(self.vlm, prompts)
            for row, each in enumerate(new):
                end = each.prefix_tokens
                shared = cut(layers, row, 0, end)
                self.prefixes[each.prefix] = Prefix(shared, end)
                tail = cut(layers, row, end, end + each.tail)
                self.hold_prefilled(each, tail, logits[row])
        # The tails of the others.
        prompts = chain(*groups)
        others = [each for each in prompts if each.prompt not in self.prefilled]
        if others:
            prompts = [self.prompts[each.prompt] for each in others]
            prefixes = [self.prefixes[each.prefix] for each in others]
            logits, layers = prefill_tails(self.vlm, prompts, prefixes)
            for row, each in enumerate(others):
                tail = cut(layers, row, 0, each.tail)
                self.hold_prefilled(each, tail, logits[row])
        # The rest of a group that was cut comes next.
        last = groups[-1][0].prefix
        self.prefixes = {last: self.prefixes[last]}

    def hold_prefilled(self, each: Waiting, tail: Layers, logits: Tensor) -> None:
        """Holds what a prompt brought until it has rows."""
        prefix = self.prefixes[each.prefix]
        first = self.prompts[each.prompt].next_position
        self.prefilled[each.prompt] = Prefilled(prefix, tail, each.tail, first, logits)

    def enter(self, new: Waiting, rows: list[int], slots: list[int]) -> None:
        """Opens rows for a prompt that is prefilled, and puts its prefix into slots."""
        number = new.prompt
        prompt = self.prefilled.pop(number)
        seeds = self.seeds[number]
        self.rows.open(prompt, seeds, rows, slots)
        self.moved = True

    def sample(self, schedule: Schedule) -> None:
        """Draws a token for each row."""
        how = self.sampling
        rows = self.rows
        pieces = rows.pieces
        covered = slice(schedule.covered_rows)
        seeds = rows.seeds[covered]
        uniform = functools.partial(pieces.uniform_numbers, seeds, rows.written[covered])
        logits = rows.logits[covered]
        # Tokens that stand for image data are never drawn.
        logits.index_fill_(1, rows.banned_ids, -torch.inf)
        tokens = sample(
            logits,
            how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            uniform=uniform,
            pieces=pieces,
        )
        rows.append(tokens)

    def find_finished(self, schedule: Schedule) -> list[int]:
        """Returns the rows that are finished; a look waits for the GPU."""
        covered = schedule.covered_rows
        finished = self.rows.finished[:covered].tolist()
        return [row for row in schedule.owners if finished[row]]

    def leave(self, finished: list[int], owners: list[Owner]) -> None:
        """Copies what finished rows have written into `results`."""
        index = torch.tensor(finished, device=self.vlm.device)
        # All but the scrap column.
        written = self.rows.tokens[index, :-1].tolist()
        ends = set(self.vlm.end_ids)
        for owner, ids in zip(owners, written):
            ended = (t for t, token in enumerate(ids, start=1) if token in ends)
            end = next(ended, len(ids))
            self.results[owner.prompt][owner.sample] = ids[:end]
        self.moved = True

    def move(self, rows: Moves, slots: Moves) -> None:
        """Copies rows and slots to where they move."""
        self.rows.move(rows, slots)
        self.moved |= bool(rows or slots)

    def step(self, schedule: Schedule) -> None:
        """Decodes one token of each row; a GPU captures it once for each shape."""
        if self.moved:
            self.rows.point(schedule.cells())
            self.moved = False
        shape = schedule.shape()
        if shape not in self.graphs:
            one_step = functools.partial(step, self.vlm, self.rows, *shape)
            self.graphs[shape] = capture_graph(one_step, self.vlm, self.pool)
        self.graphs[shape]()


# ---- Prefill -----------------------------------------------------------------------------------------------


class KVCache:
    """Stands where transformers expects a cache; holds each layer's keys and values.

    before: keys and values of each layer that stand before them, [rows, heads, P, head_dim].
    """

    def __init__(self, before: Iterable[Layer] = ()):
        self.layers: Layers = []  # [rows, heads, T, head_dim] both
        self.before = iter(before)

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> Layer:
        """Holds a layer's keys and values, and returns all that there are; each layer calls it."""
        self.layers.append((keys, values))
        before = next(self.before, None)
        if before is not None:
            keys = torch.cat([before[0], keys], dim=2)
            values = torch.cat([before[1], values], dim=2)
        return keys, values


def prefill(vlm: VLM, prompts: list[Prompt]) -> tuple[Tensor, Layers]:
    """Forwards prompts; returns the logits of their first tokens, and each layer's keys and values.

    logits: [prompts, vocabulary] float32; keys, values: [prompts, heads, P, head_dim]. Prompts are padded on
    the right, to the longest; causal attention hides padding from what is real.
    """
    ids, positions = pad(prompts, vlm.device)
    embeds = embed(vlm.model, ids, prompts)
    cache = KVCache()
    hidden = hidden_states(vlm.model, embeds, positions, None, cache)
    logits = first_logits(vlm, hidden, prompts)
    return logits, cache.layers


def prefill_tails(vlm: VLM, prompts: list[Prompt], prefixes: list[Prefix]) -> tuple[Tensor, Layers]:
    """Forwards what prompts have behind their prefixes, which are there already; returns as `prefill` does.

    Two prompts p q a b and p q c d e about an image p q, which an earlier prompt has brought:

        keys     p  q | a  b  .            p  q | c  d  e
        a        x  x   x             c    x  x   x
        b        x  x   x  x          d    x  x   x  x
                                      e    x  x   x  x  x
    """
    tails = [cut_tail(prompt, prefix.tokens) for prompt, prefix in zip(prompts, prefixes)]
    ids, positions = pad(tails, vlm.device)
    # Each sees its whole prefix, and what stands before it in its own tail.
    lengths = [prefix.tokens for prefix in prefixes]
    longest = max(lengths)
    width = longest + ids.shape[1]
    key = torch.arange(width, device=vlm.device)
    query = key[longest:, None]
    ends = torch.tensor(lengths, device=vlm.device)
    in_prefix = key < ends[:, None, None]
    in_tail = (key >= longest) & (key <= query)
    mask = (in_prefix | in_tail)[:, None]  # [prompts, 1, T, P + T]
    # Their keys and values stand behind those of the prefixes.
    embeds = vlm.model.get_input_embeddings()(ids)
    cache = KVCache(pad_layers(prefixes))
    hidden = hidden_states(vlm.model, embeds, positions, mask, cache)
    logits = first_logits(vlm, hidden, tails)
    return logits, cache.layers


def cut(layers: Layers, row: int, start: int, end: int) -> Layers:
    """Returns views of the keys and values of a row's tokens: [heads, end - start, head_dim] both."""
    tokens = (row, slice(None), slice(start, end))
    return [(keys[tokens], values[tokens]) for keys, values in layers]


def cut_tail(prompt: Prompt, start: int) -> Prompt:
    """Returns what a prompt has behind its first tokens: text, at the positions it has there."""
    ids = prompt.ids[start:]
    positions = prompt.positions[:, start:]
    no_places = prompt.places[:0]
    return Prompt(ids, positions, images=(), places=no_places)


def pad(prompts: list[Prompt], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the ids [rows, T] and positions [3, rows, T] of prompts, padded on the right with 0.

    For the texts p q r and s t (positions of text: one number for all three axes):

        ids        p q r      s t 0
        positions  0 1 2      0 1 0
    """
    ids = pad_rows([prompt.ids for prompt in prompts])
    places = pad_rows([prompt.positions.T for prompt in prompts])  # [rows, T, 3]
    return ids.to(device), places.permute(2, 0, 1).to(device)


def pad_layers(prefixes: list[Prefix]) -> Iterator[Layer]:
    """Yields keys and values of all prefixes, a layer at a time: [prefixes, heads, P, head_dim] both."""
    for layer in zip(*[prefix.layers for prefix in prefixes]):
        both = []  # keys, values
        for parts in zip(*layer):
            tokens = [part.transpose(0, 1) for part in parts]
            padded = pad_rows(tokens)  # [prefixes, P, heads, head_dim]
            both.append(padded.transpose(1, 2))
        yield tuple(both)


def first_logits(vlm: VLM, hidden: Tensor, prompts: list[Prompt]) -> Tensor:
    """Returns the logits [rows, vocabulary] that the last token of each row predicts the next one with."""
    row = torch.arange(len(prompts), device=vlm.device)
    lengths = [len(prompt) for prompt in prompts]
    last = torch.tensor(lengths, device=vlm.device) - 1
    return float_logits(hidden[row, last], vlm.model.lm_head.weight)

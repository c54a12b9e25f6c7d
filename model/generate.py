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
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.decode import (
    Layers,
    Prefilled,
    Prefix,
    Rows,
    capture_graph,
    limits_in_memory,
    make_products,
    step,
)
from model.forward import embed, hidden_states
from model.fused import float_logits
from model.prompt import Prompt, split_prompt
from model.sampling import sample
from model.schedule import Owner, Schedule, Waiting, group_by_prefix, run
from model.vlm import VLM

PREFILL_TOKENS = 16384  # prompts are forwarded so many tokens at a time


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
    draw = functools.partial(
        sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    source = vlm.device if generator is None else generator.device
    shape = (len(prompts), n)
    seeds = torch.randint(
        2**63 - 1,
        shape,
        device=source,
        generator=generator,
    ).to(vlm.device)

    def attempt() -> None:
        waiting = [i for i, samples in enumerate(results) if None in samples]
        if waiting:
            with vlm.on_device():
                rollout = Rollout(
                    vlm,
                    prompts,
                    seeds,
                    max_new_tokens,
                    draw,
                    results,
                )
                rollout.run(waiting)

    vlm.retry(attempt)
    return results


class Rollout:
    """Does with tensors what a schedule says (see `schedule.run`)."""

    def __init__(
        self,
        vlm: VLM,
        prompts: list[Prompt],
        seeds: Tensor,
        new_tokens: int,
        draw: Callable[..., Tensor],
        results: list[list],
    ):
        self.vlm = vlm
        self.prompts = prompts
        self.seeds = seeds  # [prompts, n]
        self.new_tokens = new_tokens
        self.draw = draw  # (logits [R, vocabulary], uniform, pieces of `Rows`) -> tokens [R]
        self.results = results  # [prompts][n]
        self.prefilled: dict[int, Prefilled] = {}  # prompts that are not in rows yet
        self.prefixes: dict[int, Prefix] = {}  # those that prompts wait for
        self.graphs: dict[tuple, Callable[[], None]] = {}  # by the shape of a step
        self.pool = torch.cuda.graph_pool_handle() if vlm.device.type == "cuda" else None

    def run(self, numbers: list[int]) -> None:
        """Writes the completions of the prompts with these numbers into `results`."""
        scale = self.vlm.fallbacks.batch_scale
        n = self.seeds.shape[1]
        # Prompts about the same images, with the same words before and between them, share a prefix.
        prefixes: dict[tuple, int] = {}
        waiting = []
        for number in numbers:
            prompt = self.prompts[number]
            end = split_prompt(prompt)
            key = (prompt.images, tuple(prompt.ids[:end].tolist()))
            prefix = prefixes.setdefault(key, len(prefixes))
            waiting.append(
                Waiting(
                    number,
                    prefix,
                    end,
                    len(prompt) - end,
                )
            )
        # Rows and slots for all of them, or for as many as fit beside copies of weights.
        products = make_products(self.vlm)
        counts = [0] * len(prefixes)
        for each in waiting:
            counts[each.prefix] += 1
        longest = max(each.prefix_tokens for each in waiting)
        own_tokens = max(each.tail for each in waiting) + self.new_tokens
        limits = limits_in_memory(
            self.vlm,
            counts,
            longest,
            own_tokens,
            n,
        )
        self.rows = Rows(
            self.vlm,
            limits,
            self.new_tokens,
            products,
        )
        schedule = Schedule(limits, n, self.vlm.device.type)
        tokens = int(PREFILL_TOKENS * scale)
        run(
            schedule,
            group_by_prefix(waiting, tokens),
            tokens,
            self,
        )

    def prefill(self, groups: list[list[Waiting]]) -> None:
        """Forwards prompts: of each group the first, then the others behind the same prefix."""
        first: dict[int, Waiting] = {}
        for group in groups:
            if group[0].prefix not in self.prefixes:
                first.setdefault(group[0].prefix, group[0])
        new = list(first.values())
        if new:
            logits, layers = prefill(self.vlm, [self.prompts[each.prompt] for each in new])
            for row, each in enumerate(new):
                self.prefixes[each.prefix] = Prefix(layers, row, each.prefix_tokens)
                self.hold_prefilled(
                    each,
                    layers,
                    row,
                    each.prefix_tokens,
                    logits[row],
                )
        others = [each for group in groups for each in group if each.prompt not in self.prefilled]
        if others:
            prompts = [self.prompts[each.prompt] for each in others]
            prefixes = [self.prefixes[each.prefix] for each in others]
            logits, layers = prefill_tails(self.vlm, prompts, prefixes)
            for row, each in enumerate(others):
                self.hold_prefilled(
                    each,
                    layers,
                    row,
                    0,
                    logits[row],
                )
        # The rest of a group that was cut comes next.
        last = groups[-1][0].prefix
        self.prefixes = {last: self.prefixes[last]}

    def hold_prefilled(
        self,
        each: Waiting,
        layers: Layers,
        row: int,
        start: int,
        logits: Tensor,
    ) -> None:
        """Holds what a prompt brought until it has rows."""
        prefix = self.prefixes[each.prefix]
        first = self.prompts[each.prompt].next_position
        self.prefilled[each.prompt] = Prefilled(
            prefix,
            layers,
            row,
            start,
            each.tail,
            first,
            logits,
        )

    def enter(
        self,
        new: Waiting,
        rows: list[int],
        slots: list[int],
    ) -> None:
        """Opens rows for a prompt that is prefilled, and puts its prefix into slots."""
        self.rows.open(
            self.prefilled.pop(new.prompt),
            self.seeds[new.prompt],
            rows,
            slots,
        )
        self.moved = True

    def sample(self, schedule: Schedule) -> None:
        """Draws a token for each row."""
        rows = self.rows
        covered = slice(schedule.covered_rows)
        uniform = functools.partial(
            rows.pieces.uniform_numbers, rows.seeds[covered], rows.written[covered]
        )
        rows.append(self.draw(rows.logits[covered], uniform=uniform, pieces=rows.pieces))

    def find_finished(self, schedule: Schedule) -> list[int]:
        """Returns the rows that are finished; a look waits for the GPU."""
        finished = self.rows.finished[: schedule.covered_rows].tolist()
        return [row for row in schedule.owners if finished[row]]

    def leave(
        self,
        finished: list[int],
        owners: list[Owner],
    ) -> None:
        """Copies what finished rows have written into `results`."""
        index = torch.tensor(finished, device=self.vlm.device)
        # All but the scrap column.
        written = self.rows.tokens[index, :-1].tolist()
        ends = set(self.vlm.end_ids)
        for owner, ids in zip(owners, written):
            end = next((t for t, token in enumerate(ids) if token in ends), len(ids))
            self.results[owner.prompt][owner.sample] = ids[: end + 1]
        self.moved = True

    def move_up(
        self,
        rows: dict[int, int],
        slots: dict[int, int],
    ) -> None:
        """Copies rows and slots to where they move."""
        self.rows.move(rows, slots)

    def step(self, schedule: Schedule) -> None:
        """Decodes one token of each row; a GPU captures it once for each shape."""
        if self.moved:
            self.rows.point(schedule.cells())
            self.moved = False
        shape = schedule.shape()
        if shape not in self.graphs:
            one_step = functools.partial(
                step,
                self.vlm,
                self.rows,
                *shape,
            )
            self.graphs[shape] = capture_graph(one_step, self.vlm, self.pool)
        self.graphs[shape]()


# ---- Prefill -----------------------------------------------------------------------------------------------


class KVCache:
    """Stands where transformers expects a cache; holds each layer's keys and values.

    before: keys and values of each layer that stand before them, [rows, heads, P, head_dim].
    """

    def __init__(self, before: Iterable[tuple[Tensor, Tensor]] = ()):
        self.layers: Layers = []  # [rows, heads, T, head_dim] both
        self.before = iter(before)

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Holds a layer's keys and values, and returns all that there are; each layer calls it."""
        self.layers.append((keys, values))
        before = next(self.before, None)
        if before is None:
            return keys, values
        return torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)


def prefill(vlm: VLM, prompts: list[Prompt]) -> tuple[Tensor, Layers]:
    """Forwards prompts; returns the logits of their first tokens, and each layer's keys and values.

    logits: [prompts, vocabulary] float32; keys, values: [prompts, heads, P, head_dim]. Prompts are padded on
    the right, to the longest; causal attention hides padding from what is real.
    """
    ids, positions = pad([p.ids for p in prompts], [p.positions for p in prompts], vlm.device)
    cache = KVCache()
    embeds = embed(vlm.model, ids, prompts)
    hidden = hidden_states(
        vlm.model,
        embeds,
        positions,
        None,
        cache,
    )
    return first_logits(vlm, hidden, [len(prompt) for prompt in prompts]), cache.layers


def prefill_tails(
    vlm: VLM,
    prompts: list[Prompt],
    prefixes: list[Prefix],
) -> tuple[Tensor, Layers]:
    """Forwards what prompts have behind their prefixes, which are there already; returns as `prefill` does.

    Two prompts p q a b and p q c d e about an image p q, which an earlier prompt has brought:

        keys     p  q | a  b  .            p  q | c  d  e
        a        x  x   x             c    x  x   x
        b        x  x   x  x          d    x  x   x  x
                                      e    x  x   x  x  x
    """
    tails = [slice(prefix.tokens, None) for prefix in prefixes]
    parts = list(zip(prompts, tails))
    ids, positions = pad(
        [p.ids[tail] for p, tail in parts], [p.positions[:, tail] for p, tail in parts], vlm.device
    )
    # Each sees its whole prefix, and what stands before it in its own tail.
    longest = max(prefix.tokens for prefix in prefixes)
    count = torch.arange(longest, device=vlm.device)
    lengths = torch.tensor([prefix.tokens for prefix in prefixes], device=vlm.device)
    in_prefix = count < lengths[:, None, None]  # [prompts, 1, P]
    width = ids.shape[1]
    causal = torch.ones(
        width,
        width,
        dtype=torch.bool,
        device=vlm.device,
    ).tril()
    shape = (len(prompts), width, -1)
    mask = torch.cat([in_prefix.expand(shape), causal.expand(shape)], dim=2)[:, None]
    # The keys and values of the prefixes, a layer at a time.
    padded = functools.partial(pad_sequence, batch_first=True)

    def before(layer: int, part: int) -> Tensor:
        found = [p.layers[layer][part][p.row, :, : p.tokens].transpose(0, 1) for p in prefixes]
        return padded(found).transpose(1, 2)

    layers = range(len(prefixes[0].layers))
    cache = KVCache((before(layer, 0), before(layer, 1)) for layer in layers)
    embeds = vlm.model.get_input_embeddings()(ids)
    hidden = hidden_states(
        vlm.model,
        embeds,
        positions,
        mask,
        cache,
    )
    return first_logits(vlm, hidden, [len(p.ids[tail]) for p, tail in parts]), cache.layers


def pad(
    ids: list[Tensor],
    positions: list[Tensor],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Puts rows [T] and their positions [3, T] together on the device: [rows, T] and [3, rows, T]."""
    together = functools.partial(pad_sequence, batch_first=True)
    places = together([each.T for each in positions])  # [rows, T, 3]
    return together(ids).to(device), places.permute(2, 0, 1).to(device)


def first_logits(
    vlm: VLM,
    hidden: Tensor,
    lengths: list[int],
) -> Tensor:
    """Returns the logits [rows, vocabulary] that the last token of each row predicts the next one with."""
    row = torch.arange(len(lengths), device=vlm.device)
    last = torch.tensor(lengths, device=vlm.device) - 1
    return float_logits(hidden[row, last], vlm.model.lm_head.weight)

"""Scheduling of a rollout: which completion is written where. Bookkeeping of the host, without a tensor.

A *row* writes a completion. Prompts about one image begin alike, up to the end of the image: that is their
*prefix*, whose keys are in a *slot*, once for all rows that read them. A slot has a few *cells*, by which its
rows find it; a prefix that more rows read takes several slots. Prompts A1, A2 about image A and B about
image B, with n = 2 completions each and 3 cells a slot:

    row      0     1     2     3     4     5            slot     0         1         2
    writes   A1.0  A1.1  A2.0  A2.1  B.0   B.1          prefix   A         A         B
    cell     0     1     2     3     6     7            cell     0  1  2   3  4  5   6  7  8
                                                        row      0  1  2   3  -  -   4  5  -

A1.0 is finished and leaves: its row is free for the next prompt, whatever A1.1 does. The rows of A fill its
cells anew, so that they need one slot, and slot 1 is free as well:

    row      0     1     2     3     4     5            slot     0         1         2
    writes   -     A1.1  A2.0  A2.1  B.0   B.1          prefix   A         -         B
    cell     -     0     1     2     6     7            row      1  2  3   -  -  -   4  5  -

Most completions are short and few are long. A step on a GPU reads the first NEAR tokens of all rows, and what
is behind them only of the first L rows. So rows that get long change places with short ones in front:

    row      0     1     2     3     4     5
    tokens   401   388   385   90    12    200          L = 3, NEAR = 384

`generate` does what is said here with tensors, `training/estimate.py` counts it without any.
"""

import heapq
import math
import sys
from collections import deque
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import NamedTuple

# Rows, long rows, slots, cells of a slot, prefix tokens and own tokens of a step are rounded up to multiples
# of these, so that a GPU captures few graphs.
BUCKETS = {"cpu": (1, 1, 1, 1, 1, 1), "cuda": (128, 32, 16, 16, 4096, 256)}
# A row with more own tokens is long. A CPU reads all of each row.
NEAR = {"cpu": sys.maxsize, "cuda": 384}
# Tokens between two looks at which rows are finished; a look waits for the GPU. Until then finished rows go
# on writing, in a column that nobody reads.
CHECK_EVERY = {"cpu": 1, "cuda": 16}
# Cells of a slot whose prefix many rows read. On a GPU, whose steps have all of them, more would stand empty
# when most rows have left.
CELLS = {"cpu": 128, "cuda": 16}
SLOTS = 3  # times as many as full ones would be: the last rows of a prefix keep a slot
DENSE = 0.8  # rows move up when less than this share of those that a step covers is written


class Waiting(NamedTuple):
    """A prompt that waits for its rows."""

    prompt: int  # its number
    prefix: Hashable
    prefix_tokens: int
    tail: int  # tokens behind the prefix


Groups = list[list[Waiting]]  # prompts of one prefix, those of another, ...
Moves = dict[int, int]  # from where to where rows move, or slots


class Owner(NamedTuple):
    """The completion that a row writes: sample number `sample` of prompt number `prompt`."""

    prompt: int
    sample: int
    prefix: Hashable
    born: int  # tokens drawn before its first, less the tail of its prompt


class Limits(NamedTuple):
    """The most of everything that there is memory for."""

    rows: int
    slots: int
    cells: int  # of a slot
    prefix_tokens: int
    own_tokens: int  # of a row: what its prompt has behind the prefix, and what it writes


def find_limits(
    prefixes: Sequence[int],
    prefix_tokens: int,
    own_tokens: int,
    n: int,
    most_cells: int,
    token_bytes: int,
    row_bytes: int,
    budget: int,
) -> Limits:
    """Returns how much of a rollout fits into `budget` bytes: all of it, or n rows at least.

    prefixes: how many prompts begin with each prefix. prefix_tokens, own_tokens: the longest. n: completions
    of a prompt. most_cells: see CELLS. token_bytes: of a token in the cache. row_bytes: of a row besides.
    """
    cells = max(n, min(most_cells, n * max(prefixes)))
    rows = n * sum(prefixes)
    slots = sum(math.ceil(count * n / cells) for count in prefixes)
    row = own_tokens * token_bytes + row_bytes
    slot = prefix_tokens * token_bytes
    if rows * row + slots * slot > budget:
        # As many rows as fit together with their slots.
        fitting = int(budget / (row + SLOTS * slot / cells))
        rows = min(rows, max(n, fitting // n * n))
        slots = min(slots, math.ceil(SLOTS * rows / cells))
    return Limits(rows, slots, cells, prefix_tokens, own_tokens)


class Schedule:
    """The rows and slots of a rollout, and what is in them."""

    def __init__(self, limits: Limits, n: int, device: str):
        self.limits = limits
        self.n = n  # completions of a prompt
        self.buckets = BUCKETS[device]
        self.check_every = CHECK_EVERY[device]
        self.near = NEAR[device]
        self.time = 0  # tokens drawn so far
        self.owners: dict[int, Owner] = {}  # of each row in use
        self.rows_of: dict[Hashable, list[int]] = {}  # of each prefix
        self.slots_of: dict[Hashable, list[int]] = {}  # of each prefix
        self.lengths: dict[Hashable, int] = {}  # of each prefix in a slot, in tokens
        self.free_rows = list(range(limits.rows))  # heaps: the first of them is the smallest
        self.free_slots = list(range(limits.slots))

    def has_room(self, prefix: Hashable) -> bool:
        """Tells if a prompt with this prefix can enter now."""
        rows = len(self.rows_of.get(prefix, ())) + self.n
        slots = math.ceil(rows / self.limits.cells)
        more = slots - len(self.slots_of.get(prefix, ()))
        return len(self.free_rows) >= self.n and len(self.free_slots) >= more

    def enter(self, new: Waiting) -> tuple[list[int], list[int]]:
        """Gives a prompt n rows; returns them, and the slots that its prefix takes besides those it had."""
        rows = [heapq.heappop(self.free_rows) for _ in range(self.n)]
        born = self.time - new.tail
        for sample, row in enumerate(rows):
            self.owners[row] = Owner(new.prompt, sample, new.prefix, born)
        self.lengths[new.prefix] = new.prefix_tokens
        self.rows_of.setdefault(new.prefix, []).extend(rows)
        return rows, self._fit_slots(new.prefix)

    def leave(self, rows: Sequence[int]) -> list[Owner]:
        """Frees rows, and the slots that are not needed any more; returns whose rows they were."""
        owners = [self.owners.pop(row) for row in rows]
        for row, owner in zip(rows, owners):
            self.rows_of[owner.prefix].remove(row)
            heapq.heappush(self.free_rows, row)
        for prefix in {owner.prefix for owner in owners}:
            self._fit_slots(prefix)
        return owners

    def move_up(self) -> tuple[Moves, Moves]:
        """Moves the last rows and slots to free ones at the front, if a step covers many that are free.

        Returns from where to where rows move, and slots.
        """
        if len(self.owners) >= DENSE * self.covered_rows:
            return {}, {}
        rows = _moves(self.owners, self.free_rows)
        in_use = list(chain(*self.slots_of.values()))
        slots = _moves(in_use, self.free_slots)
        self._move(rows, slots)
        return rows, slots

    def bring_long_rows_forward(self) -> tuple[Moves, Moves]:
        """Exchanges long rows behind the front with what stands there; returns as `move_up` does.

        If the rows 1 and 2 of 0, 1, 2 are long, 2 and 0 change places: {2: 0, 0: 2}.
        """
        long = set(self.long_rows)
        front = set(range(len(long)))
        behind = sorted(long - front)
        places = sorted(front - long)
        rows = {}
        for row, place in zip(behind, places):
            rows[row] = place
            if place in self.owners:
                rows[place] = row
            else:
                self.free_rows.remove(place)
                self.free_rows.append(row)
        heapq.heapify(self.free_rows)
        self._move(rows, {})
        return rows, {}

    def _move(self, rows: Moves, slots: Moves) -> None:
        self.owners = {rows.get(row, row): owner for row, owner in self.owners.items()}
        for places, moves in ((self.rows_of, rows), (self.slots_of, slots)):
            for prefix, old in places.items():
                places[prefix] = [moves.get(place, place) for place in old]

    def cells(self) -> dict[int, int]:
        """Returns the cell of each row in use; a step covers the first cells of each slot, see `shape`.

        In the first drawing above steps cover 3 cells a slot: {0: 0, 1: 1, 2: 2, 3: 3, 4: 6, 5: 7}.
        """
        width = self.shape()[3]
        cells = {}
        for prefix, rows in self.rows_of.items():
            slots = self.slots_of[prefix]
            for number, row in enumerate(rows):
                place, cell = divmod(number, self.limits.cells)
                cells[row] = slots[place] * width + cell
        return cells

    @property
    def covered_rows(self) -> int:
        """Counts the rows up to the last that is in use."""
        return max(self.owners, default=-1) + 1

    @property
    def long_rows(self) -> list[int]:
        """Returns the rows that have more than NEAR tokens before rows can move again."""
        looks = self.time // self.check_every
        last_step = (looks + 1) * self.check_every - 1
        return [row for row, owner in self.owners.items() if last_step - owner.born > self.near]

    def shape(self) -> tuple[int, ...]:
        """Returns the R, L, S, C, P, N and T that the next step covers.

        Each is what is needed, rounded up to BUCKETS, and at most what is allocated: R rows, L
        long ones, S slots, C cells of a slot, P tokens of a prefix, N own tokens of a row, T of a long one.
        For the first drawing above, on a CPU, with tails of 2 tokens and after 3 tokens: R = 6, L = 0, S = 3,
        C = 3, N = T = 5, and P is the longer prefix.
        """
        needed = (
            self.covered_rows,
            max(self.long_rows, default=-1) + 1,
            max(chain(*self.slots_of.values())) + 1,
            max(map(len, self.rows_of.values())),
            max(self.lengths.values()),
            self.time - min(owner.born for owner in self.owners.values()),
        )
        rounded = [math.ceil(size / bucket) * bucket for size, bucket in zip(needed, self.buckets)]
        most = (self.limits.rows, *self.limits)
        R, L, S, C, P, T = map(min, rounded, most)
        N = min(T, self.near)
        if N == T:  # long rows have been brought forward, and are not long yet
            L = 0
        return R, L, S, C, P, N, T

    def _fit_slots(self, prefix: Hashable) -> list[int]:
        """Gives a prefix as many slots as its rows need; returns the new ones."""
        slots = self.slots_of.setdefault(prefix, [])
        needed = math.ceil(len(self.rows_of[prefix]) / self.limits.cells)
        new = [heapq.heappop(self.free_slots) for _ in range(needed - len(slots))]
        slots += new
        while len(slots) > needed:
            heapq.heappush(self.free_slots, slots.pop())
        if not slots:
            del self.slots_of[prefix], self.rows_of[prefix], self.lengths[prefix]
        return new


def _moves(in_use, free: list[int]) -> Moves:
    """Returns from where to where the last places in use move, so that the free ones are all behind them.

    In use 0, 3, 4 and free 1, 2: 4 moves to 1 and 3 to 2. `free` is changed to 3, 4.
    """
    count = len(in_use)
    last = sorted((place for place in in_use if place >= count), reverse=True)
    moves = {place: heapq.heappop(free) for place in last}
    for place in last:
        heapq.heappush(free, place)
    return moves


# ---- Prompts that wait -------------------------------------------------------------------------------------


def group_by_prefix(waiting: Sequence[Waiting], tokens: int) -> Groups:
    """Groups prompts with the same prefix, which is forwarded once; a prefill has at most so many tokens.

    A group that is larger is cut. The longest prefixes come last, whence they are taken first. With at most
    16 tokens, prompts A1, A2, A3 with a prefix of 10 and tails of 3, 2, 2 tokens, and B with a prefix of 8:

        B  |  A1 A2  |  A3        10 + 2 * 3 = 16 tokens, as tails are padded to the longest
    """
    by_prefix: dict[Hashable, list[Waiting]] = {}
    for each in waiting:
        by_prefix.setdefault(each.prefix, []).append(each)
    groups: Groups = []
    for prompts in by_prefix.values():
        prompts.sort(key=lambda each: -each.tail)
        count = max(1, (tokens - prompts[0].prefix_tokens) // prompts[0].tail)
        groups += [prompts[i : i + count] for i in range(0, len(prompts), count)]
    return sorted(groups, key=lambda group: group[0].prefix_tokens)


def take_groups(groups: Groups, prompts: int, tokens: int) -> Groups:
    """Takes the last groups, until they have so many prompts, or no more tokens fit into one prefill.

    Of the groups B | A1 A2 | A3 above, for 2 prompts and with 40 tokens, it takes A3, then A1 A2: two
    prefixes of 10 and three tails of 3 are 29 tokens.
    """
    taken = [groups.pop()]
    while groups and sum(map(len, taken)) < prompts:
        # All prefixes and all tails are padded to the longest.
        together = list(chain(*taken, groups[-1]))
        prefixes = (len(taken) + 1) * max(each.prefix_tokens for each in together)
        tails = len(together) * max(each.tail for each in together)
        if prefixes + tails > tokens:
            break
        taken.append(groups.pop())
    return taken


# ---- The loop ----------------------------------------------------------------------------------------------


def run(schedule: Schedule, groups: Groups, prefill_tokens: int, work) -> None:
    """Writes n completions of all prompts in the groups: prefills, samples, evicts and decodes in turn.

    work: does what is scheduled (`generate.Rollout`), or counts it (`training/estimate.py`).
    """
    ready: deque[Waiting] = deque()  # prefilled, and not in rows yet
    while schedule.owners or groups or ready:
        # Prefill, as soon as a prompt can enter; each takes n rows.
        while ready or groups:
            first = ready[0] if ready else groups[-1][0]
            if not schedule.has_room(first.prefix):
                break
            if not ready:
                wanted = len(schedule.free_rows) // schedule.n
                taken = take_groups(groups, wanted, prefill_tokens)
                work.prefill(taken)
                ready.extend(chain(*taken))
            new = ready.popleft()
            work.enter(new, *schedule.enter(new))
        # Sample a token of each row.
        work.sample(schedule)
        schedule.time += 1
        # Evict rows that are finished, and move up.
        if schedule.time % schedule.check_every == 0:
            finished = work.find_finished(schedule)
            if finished:
                work.leave(finished, schedule.leave(finished))
                work.move(*schedule.move_up())
            work.move(*schedule.bring_long_rows_forward())
        # Decode.
        if schedule.owners:
            work.step(schedule)

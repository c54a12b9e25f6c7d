"""The schedule of a rollout: exact counts of a small case, and what must hold whatever the lengths are."""

import random
import sys

import pytest
import torch
from checkpoints import load_lively, noise_image, publish
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from model import generate as generate_module
from model import schedule as schedule_module
from model.schedule import Limits, Schedule, Waiting, find_limits, group_by_prefix
from training import estimate
from training import memory_plan as plan
from training.settings import Settings

sys.path.append(str(ROOT / "bench"))
from shapes import shape_config  # noqa: E402


def test_a_small_case_by_hand():
    """Two questions about image A, one about image B; n = 2; four rows, three cells a slot, a look a token.

    token   1    2    3    4
    A1.0    x                   after token 1 the last row moves into its place
    A1.1    x    x    x
    A2.0    x    x
    A2.1    x    x              after token 2 there are two free rows, and B enters
    B.0               x    x
    B.1               x
    """
    waiting = [Waiting(0, "A", 10, 2), Waiting(1, "A", 10, 2), Waiting(2, "B", 8, 3)]
    lengths = [[1, 3], [2, 2], [2, 1]]
    counts = estimate.count_rollout(waiting, lengths, Limits(4, 3, 3, 10, 9), "cpu")
    assert counts.images == 2 and counts.prefill_tokens == 10 + 2 + 2 + 8 + 3
    assert counts.prefills == 2 and counts.moved >= 1
    # R rows, L long ones, S slots, C cells of a slot, P tokens of a prefix, N own ones, T of long.
    assert [*counts.shapes] == [
        (3, 0, 1, 3, 10, 3, 3),
        (1, 0, 1, 1, 10, 4, 4),
        (1, 0, 1, 1, 8, 4, 4),
    ]
    assert counts.steps == 3 and counts.live_share == 5 / 5


def test_long_rows_change_places_with_short_ones_and_free_ones():
    """n = 2: after 9 tokens 0.0 leaves row 0, then 2 enters rows 4 and 0; near = 4, so those of 0 and 1 are
    long, which stand in rows 1 to 3. Row 3 and row 0 change places; later row 2 does with the free row 0."""
    schedule = Schedule(Limits(6, 3, 4, 10, 30), 2, "cpu")
    schedule.near = 4
    for number in range(2):
        schedule.enter(Waiting(number, "A", 10, 2))
    schedule.time = 9
    schedule.leave([0])
    assert schedule.enter(Waiting(2, "A", 10, 2))[0] == [0, 4]
    assert sorted(schedule.long_rows) == [1, 2, 3] and schedule.shape()[:2] == (5, 4)
    assert schedule.bring_long_rows_forward() == ({3: 0, 0: 3}, {})
    assert sorted(schedule.long_rows) == [0, 1, 2] and schedule.shape()[:2] == (5, 3)
    assert schedule.owners[0][:2] == (1, 1) and schedule.owners[3][:2] == (2, 0)
    assert schedule.bring_long_rows_forward() == ({}, {})
    schedule.leave([0])
    assert schedule.bring_long_rows_forward() == ({2: 0}, {})
    assert sorted(schedule.free_rows) == [2, 5] and sorted(schedule.owners) == [0, 1, 3, 4]
    assert sorted(schedule.rows_of["A"]) == [0, 1, 3, 4]


def everything_is_written(seed, groups, n, rows, slots, cells, device):
    rng = random.Random(seed)
    waiting = []
    for prefix in range(groups):
        for _ in range(rng.randint(1, 4)):
            waiting.append(Waiting(len(waiting), prefix, 5 + prefix, rng.randint(1, 6)))
    lengths = [[rng.randint(1, 30) for _ in range(n)] for _ in waiting]
    limits = Limits(rows * n, max(slots, -(-n // cells)), cells, 5 + groups, 6 + 30)

    class Checked(estimate.Counts):
        def step(self, schedule):
            """Each row has a cell of its own in a slot of its prefix, inside of what the step covers."""
            R, L, S, C, P, N, T = schedule.shape()
            taken = schedule.cells()
            assert taken.keys() == schedule.owners.keys() and len({*taken.values()}) == len(taken)
            for row, cell in taken.items():
                prefix = schedule.owners[row].prefix
                assert row < R <= limits.rows and cell // C in schedule.slots_of[prefix]
                assert cell // C < S <= limits.slots and schedule.lengths[prefix] <= P
                owner = schedule.owners[row]
                began = self.ends[owner.prompt, owner.sample] - lengths[owner.prompt][owner.sample]
                own = waiting[owner.prompt].tail + schedule.time - began
                assert own <= T or T == limits.own_tokens  # what is finished may write on
                assert row < L <= R or own <= N or N == T
            assert len(schedule.free_rows) + len(schedule.owners) == limits.rows
            super().step(schedule)

    counts = Checked(lengths)
    schedule = Schedule(limits, n, device)
    schedule.near = rng.choice([1, 6, 15, 10**9])
    schedule_module.run(schedule, group_by_prefix(waiting, 40), 40, counts)
    assert counts.ends.keys() == {(w.prompt, i) for w in waiting for i in range(n)}
    assert not schedule.owners and not schedule.slots_of
    assert counts.steps >= max(map(max, lengths)) - 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5),
    st.integers(1, 6), st.sampled_from(["cpu", "cuda"]),
)  # fmt: skip
def test_every_completion_is_written_in_a_cell_of_its_own(
    seed, groups, n, rows, slots, cells, device
):
    everything_is_written(seed, groups, n, rows, slots, cells, device)


MISTAKES = {
    "a slot too few": ("math.ceil(len(self.rows_of[prefix]) / self.limits.cells)", "1"),
    "cells of the width that is allocated": ("[place] * width + cell", "[place] * self.limits.cells + cell"),
    "rows move, and their owners do not": ("{rows.get(row, row): owner for", "{row: owner for"),
    "own tokens without the tail": ("self.time - new.tail", "self.time"),
    "a step too late": ("last_step - owner.born > self.near", "last_step - owner.born > 1 + self.near"),
    "a free place stays free": ("self.free_rows.remove(place)", "pass"),
    "one way only": ("rows[place] = row", "pass"),
    "a row is free twice": ("self.free_rows, row)", "self.free_rows, row); self.free_rows.append(row)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake, monkeypatch):
    old, new = MISTAKES[mistake]
    path = schedule_module.__file__
    source = open(path, encoding="utf-8").read()
    assert source.count(old) == 1
    made = dict(vars(schedule_module))
    exec(compile(source.replace(old, new), path, "exec"), made)
    monkeypatch.setitem(globals(), "Schedule", made["Schedule"])
    with pytest.raises((AssertionError, KeyError, IndexError, ValueError)):
        for seed in range(200):
            everything_is_written(seed, 4, 3, 2, 5, 4, "cpu")


def test_a_rollout_does_what_is_counted(tmp_path, monkeypatch):
    """The same shapes of steps, in the same order, with tensors and without."""
    vlm = load_lively(publish(tmp_path, "qwen"))
    vlm.end_ids = [vlm.end_ids[0], *range(3, 330, 9)]
    images = [vlm.patches(noise_image(60, 60 + 30 * i, seed=i)) for i in range(3)]
    prompts = [vlm.prompt("Why? " * (1 + i), image) for image in images for i in range(3)]
    limits = []

    def few(vlm, prefixes, prefix_tokens, own_tokens, n):
        limits.append(Limits(4 * n, 3, 4, prefix_tokens, own_tokens))
        return limits[-1]

    shapes, step = [], generate_module.step
    waiting, group = [], generate_module.group_by_prefix
    monkeypatch.setattr(generate_module, "limits_in_memory", few)
    monkeypatch.setattr(
        generate_module,
        "step",
        lambda vlm, rows, *shape: shapes.append(shape) or step(vlm, rows, *shape),
    )
    monkeypatch.setattr(
        generate_module, "group_by_prefix", lambda w, tokens: waiting.extend(w) or group(w, tokens)
    )
    rng = torch.Generator().manual_seed(0)
    written = generate_module.generate(vlm, prompts, 2, 12, generator=rng)
    lengths = [[len(ids) for ids in each] for each in written]
    assert len({length for each in lengths for length in each}) > 4
    counts = estimate.count_rollout(waiting, lengths, limits[0], "cpu")
    assert counts.shapes == estimate.Counter(shapes)


@pytest.mark.parametrize("budget", [1, 500, 5_000, 50_000, 10**9])
def test_what_fits_fits(budget):
    sizes = dict(prefix_tokens=100, own_tokens=50, n=4, most_cells=16, token_bytes=2, row_bytes=7)
    found = find_limits([3, 1, 8], budget=budget, **sizes)
    taken = found.rows * (50 * 2 + 7) + found.slots * 100 * 2
    assert found.rows % 4 == 0 and 4 <= found.rows <= 48 and found.slots * found.cells >= 4
    assert taken <= budget + 200 or found.rows == 4
    assert (found.rows == 48) == (budget >= 48 * 107 + 4 * 200)


def case_of(images, new_tokens=1024, image_tokens=1024, size="3b", card="h100", **flags):
    s = Settings(images_per_step=images, max_new_tokens=new_tokens, **flags)
    questions = images * s.group_size
    work = plan.Work(image_tokens, 80, new_tokens, s.group_size, questions, s.answers)
    return estimate.Case(shape_config(size), s, work, estimate.CARDS[card])


def test_the_attention_of_an_update_by_hand():
    """Three groups of 1,104 prompt tokens; the last token of a completion is predicted, never an input.

    A batch holds 2,048 image tokens, so two rows: the longest two. Rows are padded to multiples of 8.
    """
    case = case_of(3, new_tokens=10, group_size=2)
    batches = estimate.pack_update(case, [[3, 5], [10, 1], [10, 10]])
    found = estimate.describe_batches(batches)
    assert found == dict(
        batches=2,
        rows=3,
        shortest_row=1104 + 2 + 4,
        longest_row=1104 + 9 + 9,
        tokens=1122 + 1113 + 1110,
        padded_tokens=2 * 1128 + 1112,
        shapes=[(2, 1128), (1, 1112)],
        lengths=[1122, 1113, 1110],
    )


TRAINED_3B = 3_754_622_976
ADAPTERS_3B = 29_933_568
PIXELS = 2 * 4096 * 3 * 2 * 14 * 14 * 4  # two images of 4,096 patches, float32
FEATURES = 2 * 1024 * 2048 * 2  # two images of 1,024 tokens, 2,048 bfloat16 numbers each
# A batch of 2 x 1,120 tokens: an id, three positions and a segment each; 19 tokens of completions.
TOKENS = 8 * (5 * 2 * 1120 + 2 * 19)


@pytest.mark.parametrize(
    "flags, to_gpu, from_gpu",
    [
        (
            {},
            dict(weights=6 * TRAINED_3B, pixels=4 * PIXELS),
            dict(weights=2 * TRAINED_3B, state=12 * TRAINED_3B // 5),
        ),
        (
            dict(offload=True),
            dict(weights=6 * TRAINED_3B, pixels=4 * PIXELS, masters=8 * TRAINED_3B),
            dict(gradients=4 * TRAINED_3B),
        ),
        (
            dict(lora_rank=16),
            dict(weights=12 * ADAPTERS_3B, pixels=PIXELS, features=4 * FEATURES),
            dict(weights=4 * ADAPTERS_3B, state=12 * ADAPTERS_3B // 5, features=FEATURES),
        ),
    ],
)
def test_the_bytes_of_a_step_by_hand(flags, to_gpu, from_gpu):
    """Two rollouts of two images, the reference, and an update in one batch."""
    case = case_of(2, new_tokens=10, group_size=2, **flags)
    batches = estimate.pack_update(case, [[3, 5], [10, 1]])
    ends = dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 9)
    rollouts = [estimate.Counts([], prefill_tokens=n, looked=7, ends=ends) for n in (100, 50)]
    to_gpu |= dict(tokens=2 * TOKENS + 150 * (8 + 3 * 8))
    from_gpu |= dict(tokens=2 * (4 * 10 * 8 + 7))
    moved = estimate.moved_bytes(case, rollouts, batches)
    assert moved == dict(to_gpu=to_gpu, from_gpu=from_gpu)


def test_a_questioner_step_of_the_defaults():
    """The counts that docs/speed.md shows, exactly; half of what the issue allows."""
    found = estimate.estimate(case_of(128))
    assert found["decode_steps"] <= 10_500 and found["images_encoded"] == 128
    assert found["prefill_tokens"] == 128 * 1050 + 1024 * 54 <= 200_000
    assert found["recordings"] <= 24 and found["live_share"] > 0.85
    assert found["asking"]["images_encoded"] == 128
    update = found["update"]
    assert (update["batches"], update["rows"], update["padded_tokens"]) == (64, 128, 242_816)
    assert {rows for rows, _ in update["shapes"]} == {2} and update["longest_row"] == 2768
    to_gpu = found["bytes"]["to_gpu"]
    assert (to_gpu["weights"], to_gpu["pixels"]) == (6 * TRAINED_3B, 4 * 64 * PIXELS)
    assert 1800 < found["seconds"]["iteration"] <= 1.4 * 3600

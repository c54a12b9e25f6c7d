"""The schedule of a rollout: exact counts of a small case, and what must hold whatever the lengths are."""

import random

import pytest
import torch
from checkpoints import load_lively, noise_image, publish
from hypothesis import given, settings
from hypothesis import strategies as st

from model import generate as generate_module
from model import schedule as schedule_module
from model.schedule import Limits, Schedule, Waiting, find_limits, group_by_prefix
from training import estimate


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
    # R rows, S slots, C cells of a slot, P tokens of a prefix, T of a row's own.
    assert [*counts.shapes] == [(3, 1, 3, 10, 3), (1, 1, 1, 10, 4), (1, 1, 1, 8, 4)]
    assert counts.steps == 3 and counts.live_share == 5 / 5


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
            R, S, C, P, T = schedule.shape()
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
            assert len(schedule.free_rows) + len(schedule.owners) == limits.rows
            super().step(schedule)

    counts = Checked(lengths)
    schedule = Schedule(limits, n, device)
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


def test_a_questioner_step_of_the_defaults(monkeypatch):
    """The counts that docs/speed.md shows, exactly; half of what the issue allows."""
    import sys

    from conftest import ROOT

    sys.path.append(str(ROOT / "bench"))
    from shapes import shape_config

    from training import memory_plan as plan
    from training.settings import Settings

    s = Settings(images_per_step=128)
    work = plan.Work(1024, 80, s.max_new_tokens, s.group_size, 1024, s.answers)
    case = estimate.Case(shape_config("3b"), s, work, estimate.CARDS["h100"])
    found = estimate.estimate(case)
    assert found["decode_steps"] <= 10_500 and found["images_encoded"] == 128
    assert found["prefill_tokens"] == 128 * 1050 + 1024 * 54 <= 200_000
    assert found["recordings"] <= 12 and found["live_share"] > 0.85
    assert found["asking"]["images_encoded"] == 128
    assert 1800 < found["seconds"]["iteration"] <= 1.6 * 3600

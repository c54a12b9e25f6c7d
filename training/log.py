"""What a run says and writes down: lines, a bar, the table with a row an iteration, the record of a step."""

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from tqdm import tqdm

from grpo import group_advantages
from training.distributed import Ranks

SILENCE = 25  # seconds after which it says what it is doing


class Console:
    """The voice of a run; of several processes only the first speaks. doing: what it is at, in words."""

    def __init__(self, speaks: bool):
        self.speaks, self.doing = speaks, "starting"
        self.spoke = self.began = time.monotonic()

    def say(self, message: str) -> None:
        """A line that does not break a progress bar."""
        self.spoke = time.monotonic()
        if self.speaks:
            tqdm.write(message, file=sys.stderr)

    def begin(self, doing: str) -> None:
        """Something else begins."""
        self.doing, self.began = doing, time.monotonic()

    def progress(self, done: int, steps: int, what: str) -> Iterator[int]:
        """The steps done + 1 to `steps`, with a bar if standard error is a terminal."""
        hidden = None if self.speaks else True
        bar = tqdm(range(done + 1, steps + 1), what, leave=False, disable=hidden, initial=done, total=steps)
        for step in bar:
            self.begin(f"{what}, step {step} of {steps}")
            if not bar.disable:
                self.spoke = time.monotonic()
            yield step

    @contextmanager
    def break_silence(self):
        """In a `with` block it says what it is doing whenever it has been silent for long."""
        over = threading.Event()

        def watch():
            while not over.wait(1):
                if time.monotonic() - self.spoke > SILENCE:
                    self.say(f"... {self.doing}, for {time.monotonic() - self.began:.0f} s")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


RUNGS = ("1-2", "3-4", "5-6", "7-9")  # objects that a question about built-in scenes asks to list


HEADER = (
    f"iteration greedy sampled  {'  '.join(RUNGS)} | valid  r_unc first-last clusters"
    " | curated objects right seconds"
)


def row(k: int, results: dict, records: list[dict]) -> str:
    """A row of the console's table. records: those of iteration k."""
    asking = [r for r in records if r["phase"] == "questioner"]
    curation = next((r for r in records if r["phase"] == "curation"), {})
    third = max(1, len(asking) // 3)  # single steps may fall where a phase rises
    seconds = sum(r.get("seconds", 0.0) for r in records) if k else None
    rungs = results.get("sampled_by_objects", {})
    cells = [f"{k or 'base':>9}", _cell(results.get("greedy_accuracy"), 6)]
    cells += [_cell(results.get("sampled_accuracy"), 7), *(_cell(rungs.get(name), 4, 2) for name in RUNGS)]
    first, last = asking[:third], asking[-third:]
    cells += ["|", _cell(_mean_of("validity", last), 5), _cell(_mean_of("r_unc", first), 8), "-"]
    cells += [_cell(_mean_of("r_unc", last), 6), _cell(_mean_of("clusters", last), 8, 1)]
    cells += ["|", f"{curation.get('curated', '-'):>7}", _cell(results.get("objects"), 7, 1)]
    return " ".join([*cells, _cell(results.get("silver_accuracy"), 5, 2), _cell(seconds, 7, 0)])


def mean(values: list) -> float:
    """0.0 if there are none."""
    return sum(values) / len(values) if values else 0.0


def _mean_of(name: str, records: list[dict]) -> float | None:
    """The mean of a number in the records that have it; None if none has."""
    values = [record[name] for record in records if record.get(name) is not None]
    return mean(values) if values else None


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def plain(value):
    """A number as JSON has it: rounded, null for what is not finite."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def skipped_in_a_row(records: list[dict]) -> int:
    """How many of the last GRPO steps were skipped."""
    skipped = [record["skipped"] for record in records if "skipped" in record]
    return len(list(takewhile(bool, reversed(skipped))))


def of_groups(groups: list, end_ids: list[int], seconds: float, ranks: Ranks) -> dict:
    """What a GRPO step wrote, over the groups of all processes."""
    mine = [[g.rewards, [[len(c), not c or c[-1] not in end_ids] for c in g.completions]] for g in groups]
    rewards, completions = zip(*(ranks.all_gather(mine) or [([], [])]))
    lengths = [length for group in completions for length, _ in group]
    return dict(
        reward=mean([r for group in rewards for r in group]),
        equal_groups=mean([all_equal(group) for group in rewards]),
        length=mean(lengths),
        truncated=mean([cut for group in completions for _, cut in group]),
        tokens_per_second=sum(lengths) / max(seconds, 1e-9),
    )


def all_equal(rewards: list[float]) -> bool:
    """Whether these rewards of a group teach nothing: 0.1 and 1 - 0.9 are the same to GRPO."""
    return bool(rewards) and not group_advantages(torch.tensor([rewards])).any()

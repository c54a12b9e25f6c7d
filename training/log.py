"""Lines, a progress bar and a table for people; numbers as they are written to metrics.jsonl."""

import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from grpo import Group, flatten, group_advantages
from model.vlm import VLM
from training.distributed import Ranks
from training.scenes import RUNGS
from training.troubles import mean_field

SILENCE = 25  # seconds after which it says what it is doing


class Console:
    """Speaks for a run on standard error; of several ranks only the main one does."""

    def __init__(self, speaks: bool):
        self.speaks = speaks
        self.doing = "starting"  # what the run is at, in words
        self.began = time.monotonic()  # when it began that
        self.spoke = self.began  # when it last said something

    def say(self, message: str) -> None:
        """Prints a line that does not break a progress bar."""
        self.spoke = time.monotonic()
        if self.speaks:
            tqdm.write(message, file=sys.stderr)

    def begin(self, doing: str) -> None:
        """Notes what the run does from now on."""
        self.doing = doing
        self.began = time.monotonic()

    def progress(self, done: int, steps: int, what: str) -> Iterator[int]:
        """Yields the steps done + 1 to `steps`, with a bar if standard error is a terminal."""
        hidden = None if self.speaks else True  # None: unless it is a terminal
        bar = tqdm(
            range(done + 1, steps + 1), what, leave=False, disable=hidden, initial=done, total=steps
        )
        for step in bar:
            self.begin(f"{what}, step {step} of {steps}")
            if not bar.disable:
                self.spoke = time.monotonic()
            yield step

    @contextmanager
    def break_silence(self):
        """Says, in a `with` block, what the run is doing whenever it has been silent for SILENCE seconds."""
        over = threading.Event()

        def watch():
            while not over.wait(1):
                now = time.monotonic()
                if now - self.spoke > SILENCE:
                    self.say(f"... {self.doing}, for {now - self.began:.0f} s")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def quiet_libraries() -> None:
    """Silences what libraries print where a sentence of ours says it, or where nothing is wrong."""
    # The hub's retries, for a mistyped model.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # A strange image is used, or skipped and listed.
    warnings.filterwarnings("ignore", module="PIL")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


# ---- The table ---------------------------------------------------------------------------------------------

HEADER = (
    f"iteration greedy sampled  {'  '.join(RUNGS)} | valid  r_unc first-last clusters"
    " | curated objects right seconds"
)


def table_row(k: int, results: dict, records: list[dict]) -> str:
    """Writes a row of the console's table, below HEADER. records: those of iteration k."""
    # A phase may rise while single steps fall: its first third is compared with its last.
    asking = [record for record in records if record["phase"] == "questioner"]
    third = max(1, len(asking) // 3)
    first, last = asking[:third], asking[-third:]
    curation = next((record for record in records if record["phase"] == "curation"), {})
    rungs = results.get("sampled_by_objects", {})
    seconds = sum(record.get("seconds", 0.0) for record in records) if k else None
    cells = [
        f"{k or 'base':>9}",
        _cell(results.get("greedy_accuracy"), 6),
        _cell(results.get("sampled_accuracy"), 7),
        *(_cell(rungs.get(name), 4, 2) for name in RUNGS),
        "|",
        _cell(mean_field("validity", last), 5),
        _cell(mean_field("r_unc", first), 8),
        "-",
        _cell(mean_field("r_unc", last), 6),
        _cell(mean_field("clusters", last), 8, 1),
        "|",
        f"{curation.get('curated', '-'):>7}",
        _cell(results.get("objects"), 7, 1),
        _cell(results.get("silver_accuracy"), 5, 2),
        _cell(seconds, 7, 0),
    ]
    return " ".join(cells)


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.{digits}f}"


# ---- Records -----------------------------------------------------------------------------------------------


def mean(values: list) -> float:
    """Averages numbers; 0.0 if there are none."""
    return sum(values) / len(values) if values else 0.0


def plain(value):
    """Returns a number as JSON has it: rounded, null for what is not finite. Anything else stays."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def rollout_metrics(groups: list[Group], vlm: VLM, seconds: float, ranks: Ranks) -> dict:
    """Returns the metrics of what a GRPO step sampled, over the groups of all ranks."""
    # Of each completion its reward, its length, and if it was cut off.
    mine = []
    for completion in flatten(groups):
        tokens = completion.tokens
        mine.append([completion.reward, len(tokens), vlm.is_cut_off(tokens)])
    sampled = ranks.all_gather(mine)
    equal = [all_equal([completion.reward for completion in group]) for group in groups]
    lengths = [length for _, length, _ in sampled]
    return dict(
        outputs=len(sampled),
        reward=mean([reward for reward, _, _ in sampled]),
        equal_groups=mean(ranks.all_gather(equal)),
        length=mean(lengths),
        truncated=mean([is_cut_off for _, _, is_cut_off in sampled]),
        tokens_per_second=sum(lengths) / max(seconds, 1e-9),
    )


def all_equal(rewards: list[float]) -> bool:
    """Returns true if the rewards of a group teach nothing: 0.1 and 1 - 0.9 are the same to GRPO."""
    return bool(rewards) and not group_advantages(torch.tensor([rewards])).any()

"""The folder of a run: plain files that a person can open, and a state that survives a stop at any moment.

    config.json                  every setting
    metrics.jsonl                one record a GRPO step, curation or measurement
    curated/iteration-K.jsonl    the Reasoner's training set of iteration K
    questioner/, reasoner/       both roles after the last complete iteration, as Hugging Face checkpoints
    state.json                   how many iterations are complete
    skipped.txt                  images that could not be used, and why

Checkpoints are written to saving/ first. When both are there in full, saving/state.json says so in one atomic step;
only then do they take the place of the old ones. A stop before that moment leaves iteration k - 1, one after it k.
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from grpo import Group
from images import Found
from vlm import VLM

HEADER = " iteration  greedy  sampled | valid  r_unc first-last  clusters | curated  silver right  seconds"


class Run:
    """What a run writes: its files and its lines on the console."""

    def __init__(self, folder: Path, images: Found, scene_size: int):
        self.folder, self.images, self.scene_size = folder, images, scene_size
        self.completed = 0  # iterations
        self.records: list[dict] = []
        self.skips_told = 0
        self.header_printed = False

    def create(self, config: dict) -> None:
        """Makes the folder and writes the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        (self.folder / "skipped.txt").unlink(missing_ok=True)  # of the run that is resumed; the same are found again
        self.tell_skips()

    def reopen(self) -> None:
        """Goes back to the end of the last complete iteration: its checkpoints, and no record of a later one."""
        finish_saving(self.folder)
        state, metrics = self.folder / "state.json", self.folder / "metrics.jsonl"
        self.completed = json.loads(state.read_text())["completed_iterations"] if state.exists() else 0
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break  # the last line, cut off in the middle
            if self.completed and record["iteration"] <= self.completed:
                self.records.append(record)
        replace_text(metrics, "".join(json.dumps(record) + "\n" for record in self.records))

    def save_roles(self, k: int, questioner: VLM, reasoner: VLM) -> None:
        """Saves both roles and says that iteration k is complete."""
        staging = self.folder / "saving"
        shutil.rmtree(staging, ignore_errors=True)
        for role, vlm in (("questioner", questioner), ("reasoner", reasoner)):
            vlm.save(staging / role)
        replace_text(staging / "state.json", json.dumps({"completed_iterations": k}) + "\n")
        finish_saving(self.folder)
        self.completed = k

    def write(self, record: dict) -> None:
        """Adds a record to metrics.jsonl; a number that is not finite becomes null."""
        record = {k: (round(v, 6) if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in record.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self.tell_skips()

    def log(self, k: int, phase: str, step: int, metrics: dict, groups: list[Group], start: float, end_ids: list[int]) -> None:
        """The record of one GRPO step that began at time `start`."""
        completions = [c for group in groups for c in group.completions]
        tokens, seconds = sum(map(len, completions)), time.time() - start
        record = dict(iteration=k, phase=phase, step=step, reward=mean([r for group in groups for r in group.rewards]))
        record |= dict(equal_groups=mean([len(set(group.rewards)) == 1 for group in groups]))
        record |= metrics | dict(length=tokens / len(completions), seconds=seconds, tokens_per_second=tokens / seconds)
        record |= dict(truncated=mean([not c or c[-1] not in end_ids for c in completions]))
        self.write(record)
        if metrics["skipped"]:
            self.say(f"step {step}: the gradient is not finite; the step is skipped and the weights are unchanged")

    def report(self, k: int, results: dict) -> None:
        """Writes and prints what was measured after iteration k (0: before the first): one row of the table."""
        self.write(dict(iteration=k, phase="measure") | results)
        mine = [r for r in self.records if r["iteration"] == k]
        asking = [r for r in mine if r["phase"] == "questioner"]
        curation = next((r for r in mine if r["phase"] == "curation"), {})
        if not self.header_printed:
            print(HEADER)
            self.header_printed = True
        first, last = (asking[0], asking[-1]) if asking else ({}, {})
        cells = [f"{k or 'base':>10}", _cell(results.get("greedy_accuracy"), 7), _cell(results.get("sampled_accuracy"), 8), " |"]
        cells += [_cell(last.get("validity"), 5), _cell(first.get("r_unc"), 8), "-", _cell(last.get("r_unc"), 5)]
        cells += [_cell(last.get("clusters"), 9), " |", f"{curation.get('curated', '-'):>7}"]
        print(*cells, _cell(results.get("silver_accuracy"), 13), _cell(sum(r.get("seconds", 0.0) for r in mine) if k else None, 8, 0), flush=True)

    def progress(self, steps: int, what: str) -> Iterator[int]:
        """1 .. steps, with a progress bar if standard error is a terminal."""
        return tqdm(range(1, steps + 1), desc=what, leave=False, disable=None)

    def say(self, message: str) -> None:
        """A line for the user that does not break a progress bar."""
        tqdm.write(message, file=sys.stderr)

    def tell_skips(self) -> None:
        """Names the images that were skipped since the last call."""
        new = self.images.skipped[self.skips_told :]
        self.skips_told += len(new)
        if new:
            with open(self.folder / "skipped.txt", "a", encoding="utf-8") as file:
                for path, reason in new:
                    self.say(f"skipped {printable(path)}: {reason}")
                    file.write(f"{printable(path)}\t{reason}\n")


def printable(path: str) -> str:
    """A path whose bytes are not UTF-8, with those bytes spelled out."""
    return path.encode("utf-8", errors="backslashreplace").decode()


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that it is there in full or as it was before."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def finish_saving(folder: Path) -> None:
    """Moves checkpoints that were written in full to their place; deletes what was cut short. May be cut short itself."""
    staging = folder / "saving"
    if (staging / "state.json").exists():
        for role in ("questioner", "reasoner"):
            if (staging / role).exists():
                shutil.rmtree(folder / role, ignore_errors=True)
                os.replace(staging / role, folder / role)
        os.replace(staging / "state.json", folder / "state.json")
    shutil.rmtree(staging, ignore_errors=True)


def mean(values: list) -> float:
    return sum(values) / len(values) if values else 0.0


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

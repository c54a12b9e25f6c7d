"""The folder of a run: plain files that a person can open, and how far the run is.

    config.json                  every setting
    metrics.jsonl                one record a GRPO step, curation or measurement
    candidates/iteration-K.jsonl every valid question that was proposed for curation, with its votes
    curated/iteration-K.jsonl    those that were kept: the Reasoner's training set of iteration K
    questioner/, reasoner/       both roles after the last complete iteration, as Hugging Face checkpoints
    skipped.txt                  images that could not be used, and why
    state/                       what an interrupted run goes on from (see state.py)

An iteration has four phases. The state is saved at the border of two phases, every few steps, and when the user stops the
run. Of several ranks the first writes, and all wait for it.
"""

import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from engine.images import Found, Pictures
from engine.shards import Ranks
from engine.state import State, entry, read_tensors, recover, replace_text, write_state, write_tensors
from grpo import Group, MasterAdamW
from vlm import VLM

PHASES = ("questioner", "curation", "reasoner", "measure")
HEADER = " iteration  greedy  sampled | valid  r_unc first-last  clusters | curated  silver right  seconds"
BAD_STEPS = 3  # in a row with a loss or gradient that is not finite stop a run


class RunError(Exception):
    """The run cannot go on; the message is a sentence for the user that says why and what to do."""


class Stopped(Exception):
    """The user has stopped the run, and its state is saved."""


class Run:
    """What a run writes, its files and its lines on the console, and where in its loop it is."""

    def __init__(
        self, folder: Path, images: Found, scene_size: int, seed: int, save_every: int, ranks: Ranks
    ):
        self.folder, self.images, self.scene_size, self.save_every, self.ranks = (
            folder,
            images,
            scene_size,
            save_every,
            ranks,
        )
        self.state, self.number = State(), 0  # the state, and how many were written
        self.seed, self.pictures = seed, Pictures(images, "")
        self.records: list[dict] = []
        self.skips_told = 0
        self.header_printed = self.stopping = False
        self.locked = None

    # ---- Beginning, and going on ---------------------------------------------------------------------------------------

    def create(self, config: dict) -> None:
        """Makes the folder and writes the settings, and which images there are: a resumed run has the same."""
        if self.ranks.first:
            self.lock()
            found = {"paths": self.images.paths, "skipped": self.images.skipped}
            replace_text(self.folder / "images.json", json.dumps(found) + "\n")
            replace_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.tell_skips()
        self.ranks.any(False)  # the others wait until the folder is there

    def lock(self) -> None:
        """Raises ValueError if another process works on this run. However this process ends, its lock ends with it."""
        if self.locked:
            return
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        self.locked = open(self.folder / "lock", "w")
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.locked.close()
            raise ValueError(f"another process is working on {self.folder}") from error

    def unlock(self) -> None:
        """Lets another process work on this run."""
        if self.locked:
            self.locked.close()

    def reopen(self, config: dict) -> None:
        """Goes back to the newest state that is whole; what was written after it is forgotten. Raises ValueError if none is."""
        found = None
        if self.ranks.first:
            self.lock()
            replace_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
            number, state, complaints = recover(self.folder)
            if complaints and state is None:
                raise ValueError(f"no state of {self.folder} is whole: {complaints[0]}")
            for complaint in complaints:
                self.say(f"{complaint}; going on from the state before it")
            metrics = self.folder / "metrics.jsonl"
            if metrics.exists():
                os.truncate(metrics, state.metrics if state else 0)
            found = [number, asdict(state or State())]
        self.number, state = self.ranks.gather([found])[0]
        self.state = State(**state)
        self.pictures = Pictures(self.images, f"{self.seed} {self.state.iteration}", self.state.pictures)
        self.images.skipped[:] = [(path, why) for path, why in self.state.skipped] or self.images.skipped
        if (self.folder / "metrics.jsonl").exists():
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            self.records = [json.loads(line) for line in lines]
        self.skips_told = 0
        self.tell_skips()

    def at(self, k: int, phase: str) -> bool:
        """Whether this phase of iteration k is what comes next."""
        return (self.state.iteration, self.state.phase) == (k, phase)

    # ---- The state -------------------------------------------------------------------------------------------------------

    def steps(self, role: str, count: int, optimizer: MasterAdamW) -> Iterator[int]:
        """The steps of a training phase that are still to do, from 1 to `count`; saves on the way, and at the end.

        Raises Stopped when the user has asked for it, after the step, and RunError after too many skipped steps.
        """
        for step in self.progress(count, f"iteration {self.state.iteration}: {role}"):
            yield step
            self.state.step, stop = step, self.ranks.any(self.stopping)
            if self.skipped_in_a_row() >= BAD_STEPS:
                raise RunError(
                    f"loss or gradient were not finite {BAD_STEPS} steps in a row, the weights are those of before: "
                    "start a new run (--name) with a lower --lr or with --dtype float32"
                )
            if (step % self.save_every == 0 and step < count) or stop:
                self.save({role: optimizer.weights(), "moments": optimizer.moments()})
            if stop:
                raise Stopped
        self.advance({role: optimizer.weights()})

    def advance(
        self, tensors: dict[str, dict[str, Tensor]] | None = None, files: dict[str, Path] | None = None
    ) -> None:
        """The phase is done: on to the next, with a saved state."""
        phase = PHASES.index(self.state.phase) + 1
        self.state.iteration, self.state.phase, self.state.step = (
            self.state.iteration + phase // 4,
            PHASES[phase % 4],
            0,
        )
        for name in ("moments", "reference"):
            self.state.files.pop(name, None)
        if self.state.phase == "questioner":
            self.pictures = Pictures(
                self.images, f"{self.seed} {self.state.iteration}"
            )  # each iteration has its own order
        self.save(tensors or {}, files)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raises Stopped on all ranks if the user has asked any of them to stop."""
        if self.ranks.any(self.stopping):
            raise Stopped

    def curated(self, k: int) -> Path:
        """Where the Reasoner's training set of iteration k is."""
        return self.folder / "curated" / f"iteration-{k}.jsonl"

    def candidates(self, k: int) -> Path:
        """Where all that was proposed for the Reasoner's training set of iteration k is."""
        return self.folder / "candidates" / f"iteration-{k}.jsonl"

    def of(self, phase: str) -> list[dict]:
        """The records of a phase, of all iterations so far."""
        return [record for record in self.records if record["phase"] == phase]

    def save(self, tensors: dict[str, dict[str, Tensor]], files: dict[str, Path] | None = None) -> None:
        """Saves the state, with new tensors (each rank those it owns) and files under their names; others stay as they are."""
        self.number += 1
        for name, owned in tensors.items():
            part = write_tensors(self.folder, f"{self.number:06}-{name}-{self.ranks.rank}", owned)
            self.state.files[name] = [tuple(part) for part in self.ranks.gather([part])]
        if self.ranks.first:
            for name, path in (files or {}).items():
                self.state.files[name] = [entry(self.folder, path)]
            metrics = self.folder / "metrics.jsonl"
            self.state.metrics = entry(self.folder, metrics)[1] if metrics.exists() else 0
            self.state.pictures, self.state.skipped = self.pictures.position, self.images.skipped
            write_state(self.folder, self.number, self.state)
        self.ranks.any(False)  # nobody goes on before it is there

    @torch.no_grad()
    def begin(self, role: str, vlm: VLM, optimizer: MasterAdamW) -> VLM:
        """The reference of this phase: the role as it was when the phase began. Goes on with the moments if it was cut short."""
        reference = vlm.copy()
        if self.state.step == 0:
            self.state.files["reference"] = self.state.files[role]
        else:
            optimizer.load_moments(read_tensors(self.folder, self.state.files["moments"]))
            weights = read_tensors(self.folder, self.state.files["reference"])
            for name, parameter in reference.model.named_parameters():
                parameter.copy_(weights[name])
        reference.park()
        return reference

    def restore(self, optimizers: dict[str, MasterAdamW]) -> None:
        """Gives both roles the weights of the state; in a new run they are the base model's, and saved as such."""
        if "questioner" not in self.state.files:
            self.save({"base": optimizers["questioner"].weights()})
            base = self.state.files.pop("base")
            self.state.files |= {"questioner": base, "reasoner": base}
        for role, optimizer in optimizers.items():
            optimizer.load_weights(read_tensors(self.folder, self.state.files[role]))

    def export(self, roles: dict[str, VLM]) -> None:
        """Writes both roles as Hugging Face checkpoints, each in the place of the one before."""
        for role, vlm in roles.items() if self.ranks.first else ():
            new, old = self.folder / f"{role}.new", self.folder / f"{role}.old"
            for leftover in (new, old):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                vlm.save(new)
            except SafetensorError as error:
                raise OSError(f"{new} cannot be written: {error}") from error
            if (self.folder / role).exists():
                os.replace(self.folder / role, old)
            os.replace(new, self.folder / role)
            shutil.rmtree(old, ignore_errors=True)

    # ---- Records and lines ------------------------------------------------------------------------------------------------

    def write(self, record: dict) -> None:
        """Adds a record to metrics.jsonl; a number that is not finite becomes null."""
        record = {
            k: (round(v, 6) if math.isfinite(v) else None) if isinstance(v, float) else v
            for k, v in record.items()
        }
        if self.ranks.first:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self.tell_skips()

    def log(self, metrics: dict, groups: list[Group], start: float, end_ids: list[int]) -> None:
        """The record of the GRPO step that began at time `start`; `groups` are this rank's, `metrics` those of all."""
        mine = [
            [
                g.rewards,
                [len(c) for c in g.completions],
                [not c or c[-1] not in end_ids for c in g.completions],
            ]
            for g in groups
        ]
        rewards, lengths, truncated = zip(*self.ranks.gather(mine))
        lengths, seconds = [length for group in lengths for length in group], time.time() - start
        record = dict(iteration=self.state.iteration, phase=self.state.phase, step=self.state.step + 1)
        record |= dict(
            reward=mean([r for group in rewards for r in group]),
            equal_groups=mean([len(set(group)) == 1 for group in rewards]),
        )
        record |= metrics | dict(
            length=mean(lengths), seconds=seconds, tokens_per_second=sum(lengths) / seconds
        )
        self.write(record | dict(truncated=mean([t for group in truncated for t in group])))
        if metrics["skipped"]:
            self.say(
                f"step {self.state.step + 1}: loss or gradient is not finite; the step is skipped and the weights are unchanged"
            )

    def warn(self, signature: str, message: str | None) -> None:
        """Writes and prints that a failure signature has shown itself; does nothing if there is no message."""
        if message is not None:
            self.write(
                dict(iteration=self.state.iteration, phase="warning", signature=signature, message=message)
            )
            self.say(f"warning, {signature}: {message}")

    def skipped_in_a_row(self) -> int:
        """How many of the last GRPO steps were skipped."""
        skipped = [record["skipped"] for record in self.records if "skipped" in record]
        return len(list(takewhile(bool, reversed(skipped))))

    def report(self, k: int, results: dict) -> None:
        """Writes and prints what was measured after iteration k (0: before the first): one row of the table."""
        self.write(dict(iteration=k, phase="measure") | results)
        mine = [r for r in self.records if r["iteration"] == k]
        asking = [r for r in mine if r["phase"] == "questioner"]
        curation = next((r for r in mine if r["phase"] == "curation"), {})
        if not self.ranks.first:
            return
        if not self.header_printed:
            print(HEADER)
            self.header_printed = True
        first, last = (asking[0], asking[-1]) if asking else ({}, {})
        cells = [
            f"{k or 'base':>10}",
            _cell(results.get("greedy_accuracy"), 7),
            _cell(results.get("sampled_accuracy"), 8),
            " |",
        ]
        cells += [
            _cell(last.get("validity"), 5),
            _cell(first.get("r_unc"), 8),
            "-",
            _cell(last.get("r_unc"), 5),
        ]
        cells += [_cell(last.get("clusters"), 9), " |", f"{curation.get('curated', '-'):>7}"]
        print(
            *cells,
            _cell(results.get("silver_accuracy"), 13),
            _cell(sum(r.get("seconds", 0.0) for r in mine) if k else None, 8, 0),
            flush=True,
        )

    def progress(self, steps: int, what: str) -> Iterator[int]:
        """The steps that are still to do, with a progress bar if standard error is a terminal."""
        done = self.state.step
        hidden = None if self.ranks.first else True
        return tqdm(
            range(done + 1, steps + 1), desc=what, leave=False, disable=hidden, initial=done, total=steps
        )

    def say(self, message: str) -> None:
        """A line for the user that does not break a progress bar."""
        if self.ranks.first:
            tqdm.write(message, file=sys.stderr)

    def tell_skips(self) -> None:
        """Names the images that were skipped since the last call."""
        new = self.images.skipped[self.skips_told :]
        self.skips_told += len(new)
        for path, reason in new:
            self.say(f"skipped {printable(path)}: {reason}")
        if new and self.ranks.first:
            replace_text(
                self.folder / "skipped.txt",
                "".join(f"{printable(p)}\t{why}\n" for p, why in self.images.skipped),
            )


def printable(path: str) -> str:
    """A path on one line: line ends, control characters and bytes that are not UTF-8 spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def mean(values: list) -> float:
    return sum(values) / len(values) if values else 0.0


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

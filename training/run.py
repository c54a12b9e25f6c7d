"""A run: its two roles, where in the loop it is, and its folder of plain files that a person can open.

    config.json                  every setting
    metrics.jsonl                one record a GRPO step, curation or measurement
    probes/iteration-K.jsonl     fixed questions that the base asked, with the Reasoner's votes at its end
    candidates/iteration-K.jsonl every valid question that was proposed for curation, with its votes
    curated/iteration-K.jsonl    those that were kept: the Reasoner's training set of iteration K
    questioner/, reasoner/       both roles after the last complete iteration, as Hugging Face checkpoints
    questioner-adapter/, ...     with --lora-rank also what was trained, for PEFT
    skipped.txt                  images that could not be used, and why
    state/                       what an interrupted run goes on from (see state.py)

An iteration has four phases. `loop.py` walks through all of them; what is done already is skipped here, so
that a run that was stopped goes on where it was. The state is saved at the border of two phases, every few
steps, and when the user stops the run. Of several processes the first writes, and all wait for it.
"""

import gc
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from curate import VotedQuestion
from model import lora
from model.prompt import Picture
from model.vlm import VLM
from training import folder as folder_module
from training import log as records
from training.distributed import Ranks
from training.folder import cut_records, read_records, replace_folder, replace_text
from training.images import Found, ImageError, Pictures, load_image, make_relative
from training.log import Console
from training.policy import Trained
from training.settings import UNKNOWN_INSTRUCTIONS, Settings, knows, printable
from training.state import State, copy_tensors, entry, lock, read_tensors, recover, write_state, write_tensors

PHASES = ("questioner", "curation", "reasoner", "measure")
BAD_STEPS = 3  # in a row with a loss or gradient that is not finite stop a run
NOT_FINITE = (
    f"loss or gradient were not finite {BAD_STEPS} steps in a row, the weights are those of before: start a "
    "new run (--name) with a lower --lr or with --dtype float32"
)


class RunError(Exception):
    """The run cannot go on; the message is a sentence for the user that says why and what to do."""


class Stopped(Exception):
    """The user has stopped the run, and its state is saved."""


class Run:
    """What carries the algorithm: roles, images, random numbers, records and files.

    questioner, reasoner: the two roles. In a training phase `policy` is the role in training, and `reference`
    the role as it was when the phase began.
    """

    def __init__(
        self, folder: Path, images: Found, scene_size: int, token_side: int, settings: Settings, ranks: Ranks
    ):
        self.folder, self.images, self.ranks = folder, images, ranks
        self.scene_size = scene_size  # pixels along one side of a built-in scene
        self.token_side = token_side  # pixels along one side of the model's image token
        self.settings, self.seed, self.save_every = settings, settings.seed, settings.save_every
        self.state, self.number = State(), 0  # the state, and how many were written
        self.pictures = self.in_order("")
        self.records: list[dict] = []
        self.skips_told = 0
        self.header_printed = self.stopping = False
        self.console = Console(ranks.is_main)
        self.locked = self.questioner = self.reasoner = self.policy = self.reference = self.generator = None
        self.started = time.monotonic()

    # ---- Beginning, and going on ---------------------------------------------------------------------

    def create(self, config: dict) -> None:
        """Makes the folder and writes the settings and which images there are, for a run that goes on."""
        if self.ranks.is_main:
            self.locked = self.locked or lock(self.folder)
            found = {"paths": self.images.paths, "skipped": self.images.skipped}
            replace_text(self.folder / "images.json", json.dumps(found) + "\n")
            replace_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.tell_skips()
        self.ranks.barrier()  # the others wait until the folder is there

    def unlock(self) -> None:
        """Lets another process work on this run."""
        if self.locked:
            self.locked.release()

    def reopen(self, config: dict) -> None:
        """Goes back to the newest state that is whole; what was written after it is forgotten.

        Raises ValueError if no state is whole, or all are gone.
        """
        found = None
        if self.ranks.is_main:
            self.locked = self.locked or lock(self.folder)
            self.console.begin(f"reading the state of {self.folder}")
            number, state, complaints = recover(self.folder)
            for complaint in complaints:
                self.console.say(f"{complaint}; going on from the state before it")
            cut_records(self.folder, state.metrics if state else 0)
            replace_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
            found = [number, asdict(state or State())]
        self.number, state = self.ranks.broadcast(found)
        self.state = State(**state)
        self.pictures = self.in_order(self.state.iteration, self.state.pictures)
        self.images.skipped[:] = [(path, why) for path, why in self.state.skipped] or self.images.skipped
        self.records, self.skips_told = read_records(self.folder), 0
        self.tell_skips()

    @torch.no_grad()
    def cast(self, questioner: VLM, reasoner: VLM) -> None:
        """Takes both roles, with the weights of the state; a new run's are the base's, and saved as such."""
        self.questioner, self.reasoner = questioner, reasoner
        if "questioner" not in self.state.files:
            self.save({"base": questioner.trained_weights() if self.ranks.is_main else {}})
            base = self.state.files.pop("base")
            self.state.files |= {"questioner": base, "reasoner": base}
        else:
            for role, vlm in self.roles.items():
                copy_tensors(vlm.model.named_parameters(), read_tensors(self.folder, self.state.files[role]))
        for vlm in self.roles.values():
            vlm.offload()

    @property
    def roles(self) -> dict[str, VLM]:
        """Both roles by name."""
        return {"questioner": self.questioner, "reasoner": self.reasoner}

    # ---- Phases and steps ------------------------------------------------------------------------------

    def at(self, k: int, phase: str) -> bool:
        """Whether this phase of iteration k is what comes next."""
        self.started = time.monotonic()
        self.console.begin(f"iteration {k}: {phase}")
        return (self.state.iteration, self.state.phase) == (k, phase)

    def steps(self, k: int, role: str, count: int) -> Iterator[int]:
        """The steps of a training phase that are still to do, to `count`; saves on the way and at the end.

        Raises Stopped, after the step, if the user asks for it, and RunError after too many skipped steps.
        """
        if not self.at(k, role):
            return
        if count:
            self.begin_training(role)
        for step in self.console.progress(self.state.step, count, f"iteration {k}: {role}"):
            self.generator, self.started = self.seeded(k, role, step), time.monotonic()
            yield step
            self.state.step, stop = step, self.ranks.any(self.stopping)
            if records.skipped_in_a_row(self.records) >= BAD_STEPS:
                raise RunError(NOT_FINITE)
            if (step % self.save_every == 0 and step < count) or stop:
                self.save({role: self.policy.weights(), "moments": self.policy.moments()})
            if stop:
                raise Stopped
        self.advance({role: self.policy.weights()} if count else {})
        self.policy = self.reference = None
        gc.collect()  # the masters go, whose modules refer to one another; the state has them
        self.roles[role].offload()

    def begin_training(self, role: str) -> None:
        """Sets `policy` and `reference`; if the phase was cut short, as they were then."""
        s, vlm, files = self.settings, self.roles[role], self.state.files
        self.reference = vlm.copy()
        if self.state.step == 0:
            files["reference"] = files[role]
        else:
            began = read_tensors(self.folder, files["reference"])
            copy_tensors(self.reference.model.named_parameters(), began)
        self.policy = Trained(vlm, s.lr, s.weight_decay, s.offload, s.gradient_checkpointing, self.ranks)
        self.policy.load_weights(read_tensors(self.folder, files[role]))
        if self.state.step:
            self.policy.load_moments(read_tensors(self.folder, files["moments"]))

    def seeded(self, *place) -> torch.Generator:
        """Random numbers that depend on nothing but a place in the run (and the process)."""
        generator = torch.Generator(self.questioner.device)
        return generator.manual_seed(self.ranks.seed(self.seed, *place))

    @property
    def sampling(self) -> dict:
        """The settings of `generate.generate`, and the random numbers of this step."""
        s = self.settings
        return dict(
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            generator=self.generator,
        )

    def in_order(self, what: int | str, position: int = 0) -> Pictures:
        """The images in the order of an iteration, scaled down on loading to what a model sees of them."""
        seed, most = f"{self.seed} {what}", self.settings.max_pixels
        return Pictures(self.images, seed, position, most, self.token_side)

    def next_images(self, count: int) -> list[Picture]:
        """The next images; of several processes this one's share of them."""
        return make_relative(self.folder, self.pictures.load_next(count, self.ranks))

    def image_batches(self, k: int, phase: str, count: int, size: int) -> Iterator[list[Picture]]:
        """The next `count` images, `size` at a time: decoded images are large."""
        for done in range(0, count, size):
            self.generator = self.seeded(k, phase, done)
            yield self.next_images(min(size, count - done))
            self.stop_if_asked()

    def next_examples(self, examples: list[VotedQuestion], count: int, step: int) -> list:
        """What the step takes of the curated questions, round and round (see `readable`)."""
        places = range((step - 1) * count, step * count)
        return self.readable(self.share([examples[i % len(examples)] for i in places]))

    def share(self, items: list) -> list:
        """Of several processes, this one's share of a list that all have."""
        return self.ranks.shard(items)

    def together(self, votes: list[list[VotedQuestion | None]]) -> list[list[VotedQuestion | None]]:
        """The votes of all processes."""
        everywhere = self.ranks.all_gather([[v and asdict(v) for v in group] for group in votes])
        return [[v and VotedQuestion(**v) for v in group] for group in everywhere]

    def gather(self, items: list) -> list:
        """The inverse of `share`: what all processes have of a list."""
        return self.ranks.all_gather(items)

    def once(self, function, *arguments) -> dict:
        """What a function gives that one of several processes does for all."""
        return self.ranks.broadcast(function(*arguments) if self.ranks.is_main else {})

    def advance(self, tensors: dict[str, dict[str, Tensor]] | None = None, files: dict | None = None) -> None:
        """The phase is done: on to the next, with a saved state."""
        phase = PHASES.index(self.state.phase) + 1
        self.state.iteration, self.state.phase = self.state.iteration + phase // 4, PHASES[phase % 4]
        self.state.step = 0
        for name in ("moments", "reference"):
            self.state.files.pop(name, None)
        if self.state.phase == "questioner":  # each iteration has its own order
            self.pictures = self.in_order(self.state.iteration)
        self.save(tensors or {}, files)
        if self.state.iteration <= self.settings.iterations:  # else it is done
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raises Stopped in all processes if the user has asked any of them to stop."""
        if self.ranks.any(self.stopping):
            raise Stopped

    # ---- Files -------------------------------------------------------------------------------------------

    def save(self, tensors: dict[str, dict[str, Tensor]], files: dict[str, Path] | None = None) -> None:
        """Saves the state, with new tensors (each process its part) and files; others stay as they are."""
        self.number += 1
        for name, part in tensors.items():
            path = write_tensors(self.folder, f"{self.number:06}-{name}-{self.ranks.rank}", part)
            self.state.files[name] = [tuple(part) for part in self.ranks.all_gather([path])]
        if self.ranks.is_main:
            for name, path in (files or {}).items():
                self.state.files[name] = [entry(self.folder, path)]
            metrics = self.folder / "metrics.jsonl"
            self.state.metrics = entry(self.folder, metrics)[1] if metrics.exists() else 0
            self.state.pictures, self.state.skipped = self.pictures.position, self.images.skipped
            write_state(self.folder, self.number, self.state)
        self.ranks.barrier()  # nobody goes on before it is there

    def finish_curation(self, k: int, candidates: list[VotedQuestion], curated: list[VotedQuestion]) -> None:
        """Writes both, and goes on to the next phase."""
        if self.ranks.is_main:
            folder_module.write_examples(self.folder / "candidates" / f"iteration-{k}.jsonl", candidates)
            folder_module.write_examples(self.folder / "curated" / f"iteration-{k}.jsonl", curated)
        if not curated:
            why = "no question of middling confidence" if candidates else "not one question was valid"
            self.console.say(f"iteration {k}: {why}; the Reasoner is not trained")
        self.advance(files={"curated": self.folder / "curated" / f"iteration-{k}.jsonl"})

    def curated(self, k: int) -> list[VotedQuestion]:
        """The Reasoner's training set of iteration k; [] in iteration 0."""
        return folder_module.read_examples(self.folder / "curated" / f"iteration-{k}.jsonl") if k else []

    def probes(self, when: int | str) -> list[VotedQuestion]:
        """The fixed questions that the base asked, with its own first votes ("base") or those of iteration
        k."""
        return folder_module.read_examples(self._probes_file(when))

    def write_probes(self, when: int | str, probes: list[VotedQuestion]) -> None:
        """Writes what `probes` reads."""
        if self.ranks.is_main:
            folder_module.write_examples(self._probes_file(when), probes)
        self.ranks.barrier()  # nobody reads it before it is there

    def _probes_file(self, when: int | str) -> Path:
        name = "base" if when == "base" else f"iteration-{when}"
        return self.folder / "probes" / f"{name}.jsonl"

    def probe_images(self, count: int) -> list[Picture]:
        """Images for the fixed questions; of several processes this one's share."""
        order = self.in_order("probes")
        return make_relative(self.folder, order.load_next(min(count, len(self.images.paths)), self.ranks))

    def readable(self, examples: list[VotedQuestion]) -> list[tuple[VotedQuestion, Image.Image]]:
        """Questions with their images. What can no longer be read is listed with the skipped, and left
        out."""
        found, bad = [], []
        for example in examples:
            try:
                path = str(self.folder / example.image)
                image = load_image(path, self.settings.max_pixels, self.token_side)
                found.append((example, image))
            except ImageError as error:
                bad.append((example.image, str(error)))
        new = dict.fromkeys(tuple(b) for b in self.ranks.all_gather(bad))
        self.images.skipped.extend(b for b in new if b not in self.images.skipped)
        self.tell_skips()
        return found

    def finish_iteration(self, k: int, probes: list[VotedQuestion]) -> None:
        """Writes the votes on the probes and both roles as checkpoints; then comes the next iteration."""
        self.write_probes(k, probes)
        for role, vlm in self.roles.items() if self.ranks.is_main and k else ():
            replace_folder(self.folder / role, vlm.save)
            if self.settings.lora_rank:
                write = partial(lora.save_adapter, vlm.model, str(vlm.source))
                replace_folder(self.folder / f"{role}-adapter", write)
        files = {"probes base": self._probes_file("base"), "probes 0": self._probes_file(0)}
        self.advance(files={} if k else files)

    # ---- Records and lines ---------------------------------------------------------------------------------

    def of(self, phase: str) -> list[dict]:
        """The records of a phase, of all iterations so far."""
        return [record for record in self.records if record["phase"] == phase]

    def write(self, record: dict) -> None:
        """Adds a record to metrics.jsonl; a number that is not finite becomes null."""
        record = {name: records.plain(value) for name, value in record.items()}
        if self.ranks.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self.tell_skips()

    def log(self, metrics: dict, groups: list, more: dict) -> None:
        """The record of this GRPO step, of what `grpo.update` gave and was given, and more."""
        step, seconds = self.state.step + 1, time.monotonic() - self.started
        place = dict(iteration=self.state.iteration, phase=self.state.phase, step=step)
        written = records.group_metrics(groups, self.questioner.end_ids, seconds, self.ranks)
        self.write(place | written | self.ranks.mean(metrics) | more | dict(seconds=seconds))
        if not more["validity"]:
            self.console.say(f"step {step}: not one output was valid")
        if metrics["skipped"]:
            self.console.say(
                f"step {step}: loss or gradient is not finite; skipped, the weights are unchanged"
            )

    def warn_of_new(self, *instructions: str) -> None:
        """Warns if the checkpoint was made for others."""
        if not knows(self.questioner.source, instructions):
            self.console.say(UNKNOWN_INSTRUCTIONS)

    def warn(self, signature: str, message: str | None) -> None:
        """Writes and prints that a failure signature has shown itself, if there is a message."""
        if message is not None:
            place = dict(iteration=self.state.iteration, phase="warning")
            self.write(place | dict(signature=signature, message=message))
            self.console.say(f"warning, {signature}: {message}")

    def report(self, k: int, results: dict) -> None:
        """Writes and prints what was measured after iteration k: one row of the table."""
        self.write(dict(iteration=k, phase="measure") | results)
        if not self.ranks.is_main:
            return
        if not self.header_printed:
            print(records.HEADER)
            self.header_printed = True
        print(records.table_row(k, results, [r for r in self.records if r["iteration"] == k]), flush=True)

    def tell_skips(self) -> None:
        """Names the images that were skipped since the last call."""
        new = self.images.skipped[self.skips_told :]
        self.skips_told += len(new)
        for path, reason in new:
            self.console.say(f"skipped {printable(path)}: {reason}")
        if new and self.ranks.is_main:
            lines = [f"{printable(path)}\t{why}\n" for path, why in self.images.skipped]
            replace_text(self.folder / "skipped.txt", "".join(lines))

"""A run: its two roles, where in the loop it is, and its folder of plain files that a person can open.

    config.json                  every setting
    metrics.jsonl                one record a GRPO step, curation or measurement
    probes/base.jsonl            fixed questions that the base asked, with its own first votes
    probes/iteration-K.jsonl     the same questions, with the Reasoner's votes at the end of iteration K
    candidates/iteration-K.jsonl every valid question that was proposed for curation, with its votes
    curated/iteration-K.jsonl    those that were kept: the Reasoner's training set of iteration K
    questioner/, reasoner/       both roles after the last complete iteration, as Hugging Face checkpoints
    questioner-adapter/, ...     with --lora-rank also what was trained, for PEFT
    samples/                     what the models wrote: a few examples a step (see measure/samples.py)
    skipped.txt                  images that could not be used, and why
    state/                       what an interrupted run goes on from (see state.py)

An iteration has four phases. `loop.py` walks through all of them; what is done already is skipped here, so
that a run that was stopped goes on where it was. The state is saved at the border of two phases, every few
steps, and when the user stops the run. Of several processes the first writes, and all wait for it.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import grpo
import questioner
import reasoner
from curate import VotedQuestion, Votes
from model import lora
from model.checkpoint import Checkpoint
from model.prompt import Patches, Picture
from model.sampling import Sampling
from model.vlm import VLM
from training.distributed import Ranks
from training.folder import (
    cut_records,
    read_examples,
    read_records,
    replace_folder,
    replace_text,
    write_examples,
    write_json_lines,
)
from training.images import Found, ImageError, Pictures
from training.log import HEADER, Console, plain, rollout_metrics, table_row
from training.photographs import Photographs
from training.policy import Trained
from training.settings import UNKNOWN_INSTRUCTIONS, Settings, knows, printable
from training.state import (
    State,
    copy_tensors,
    entry,
    lock,
    read_tensors,
    recover,
    write_state,
    write_tensors,
)
from training.troubles import judge_phase

PHASES = ("questioner", "curation", "reasoner", "measure")
BAD_STEPS = 3  # so many steps in a row with a gradient that is not finite stop a run
NOT_FINITE = (
    f"loss or gradient were not finite {BAD_STEPS} steps in a row, the weights are those of before: start a "
    "new run (--name) with a lower --lr or with --dtype float32"
)


class RunError(Exception):
    """The run cannot go on; the message is a sentence for the user that says why and what to do."""


class Stopped(Exception):
    """The user has stopped the run, and its state is saved."""


class Run:
    """Holds what carries the algorithm: roles, images, random numbers, records and files."""

    def __init__(
        self,
        folder: Path,
        images: Found,
        origin: dict,
        checkpoint: Checkpoint,
        device: torch.device,
        settings: Settings,
        ranks: Ranks,
    ):
        self.folder = folder
        self.settings = settings
        self.seed = settings.seed
        self.ranks = ranks
        self.console = Console(ranks.is_main)
        # What the processes of a run share, and exchange: see training/distributed.py.
        self.shard = ranks.shard
        self.all_gather = ranks.all_gather
        self.all_mean = ranks.mean

        self.images = images
        self.origin = origin  # the scene_size, program and code of its config.json
        self.scene_size = origin["scene_size"]  # pixels along one side of a built-in scene
        self.checkpoint = checkpoint  # of the base model
        self.device = device
        self.batch_scale = 1.0  # fraction of the usual batch size that fits into the memory
        self.skips_told = 0  # skipped images that were named already
        self.troubles_told: set[tuple] = set()  # phase of an iteration, kind: see `tell_troubles`

        self.state = State()
        self.number = 0  # states that were written
        # Scaled down for the model. Scenes have paths relative to the folder, so that it can be moved.
        self.photographs = Photographs(settings.max_pixels, checkpoint.token_side, folder)
        self.pictures = self.in_order("")
        self.records: list[dict] = []  # the lines of metrics.jsonl
        self.started = time.monotonic()  # of the phase or step at hand
        self.header_printed = False
        self.stopping = False  # the user has asked for it
        self.locked = None

        self.questioner: VLM | None = None
        self.reasoner: VLM | None = None
        self.policy: Trained | None = None  # in a training phase: the role in training
        self.reference: VLM | None = None  # the same, as it was when the phase began, or the base
        self.generator: torch.Generator | None = None  # the random numbers of this step

    # ---- Beginning, and going on ---------------------------------------------------------------------

    def create(self) -> None:
        """Makes the folder and writes the settings and which images there are, for a run that goes on."""
        if self.ranks.is_main:
            self.locked = self.locked or lock(self.folder)
            replace_text(self.folder / "images.json", json.dumps(asdict(self.images)) + "\n")
            config = asdict(self.settings) | self.origin
            replace_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.tell_skips()
        self.ranks.barrier()  # the others wait until the folder is there

    def unlock(self) -> None:
        """Lets another process work on this run."""
        if self.locked:
            self.locked.release()

    def reopen(self) -> None:
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
            cut_records(self.folder, state.metrics)
            found = [number, asdict(state)]
        self.number, state = self.ranks.broadcast(found)
        self.state = State(**state)
        self.pictures = self.in_order(self.state.iteration, self.state.pictures)
        if self.state.skipped:
            self.images.skipped[:] = map(tuple, self.state.skipped)
        self.records = read_records(self.folder)
        self.tell_skips()

    def restore_roles(self) -> None:
        """Gives both roles the weights of the state. A new run saves the base model's first."""
        self.photographs.patches = self.questioner.patches  # both roles cut them alike
        if "questioner" in self.state.files:
            for role, vlm in self.roles.items():
                self.restore(vlm, role)
        else:
            self.save({"base": self.questioner.trained_weights() if self.ranks.is_main else {}})
            base = self.state.files["base"]
            self.state.files |= {"questioner": base, "reasoner": base}
        for vlm in self.roles.values():
            vlm.offload()

    def load_base(self) -> VLM:
        """Returns the base model: the weights that both roles began with, from the state."""
        base = self.questioner.copy()
        self.restore(base, "base")
        return base

    def restore(self, vlm: VLM, name: str) -> None:
        """Copies the weights that have this name in the state into a model, rounded to its dtype."""
        saved = read_tensors(self.folder, self.state.files[name])
        copy_tensors(vlm.model.named_parameters(), saved)

    @property
    def roles(self) -> dict[str, VLM]:
        """Both roles by name."""
        return {"questioner": self.questioner, "reasoner": self.reasoner}

    # ---- Phases and steps ------------------------------------------------------------------------------

    def is_done(self, k: int, phase: str) -> bool:
        """Tells if this phase of iteration k is done already. If it is not, it begins now.

        Raises RunError if another phase comes first.
        """
        asked = (k, PHASES.index(phase))
        next_one = (self.state.iteration, PHASES.index(self.state.phase))
        if asked > next_one:
            raise RunError(
                f"iteration {self.state.iteration}: {self.state.phase} comes before {k}: {phase}"
            )
        self.started = time.monotonic()
        self.console.begin(f"iteration {k}: {phase}")
        return asked < next_one

    @contextmanager
    def training(self, role: str) -> Iterator[None]:
        """Trains a role in a `with` block: sets `policy` and `reference`, and saves the role at the end.

        The other role has no optimizer: it is frozen. A step of the policy's optimizer also refreshes the
        role. A phase that was cut short goes on with the weights and the optimizer state of then.
        """
        s = self.settings
        vlm = self.roles[role]
        files = self.state.files
        is_new = self.state.step == 0
        if is_new:
            is_anchored = role == "questioner" and s.anchor_beta > 0
            files["reference"] = files["base" if is_anchored else role]
        self.reference = vlm.copy()
        if files["reference"] != files[role]:
            self.restore(self.reference, "reference")
        self.policy = Trained(
            vlm, s.lr, s.weight_decay, s.offload, s.gradient_checkpointing, self.ranks
        )
        self.policy.load_weights(read_tensors(self.folder, files[role]))
        if not is_new:
            self.policy.load_optimizer_state(read_tensors(self.folder, files["moments"]))

        yield

        self.finish_phase({role: self.policy.weights()})
        self.policy = None
        self.reference = None
        gc.collect()  # the masters go, whose modules refer to one another; the state has them
        vlm.offload()

    def steps(self, role: str, count: int) -> Iterator[int]:
        """Yields the steps of a phase that are still to do, up to `count`. Seeds each, and saves on the way.

        Raises Stopped, after the step, if the user asks for it, and RunError after too many skipped steps.
        """
        k = self.state.iteration
        for step in self.console.progress(self.state.step, count, f"iteration {k}: {role}"):
            self.generator = self.seeded(k, role, step)
            self.started = time.monotonic()
            yield step
            self.state.step = step
            skipped = [record["skipped"] for record in self.records if "skipped" in record]
            if sum(skipped[-BAD_STEPS:]) == BAD_STEPS:
                raise RunError(NOT_FINITE)
            is_stopped = self.ranks.any(self.stopping)
            is_due = step % self.settings.save_every == 0 and step < count
            if is_due or is_stopped:
                self.save({role: self.policy.weights(), "moments": self.policy.optimizer_state()})
            if is_stopped:
                raise Stopped

    def seeded(self, *place) -> torch.Generator:
        """Random numbers that depend on nothing but a place in the run (and the process)."""
        return torch.Generator(self.device).manual_seed(self.ranks.seed(self.seed, *place))

    @property
    def sampling(self) -> Sampling:
        """Returns how the models' outputs are drawn, with the random numbers of this step."""
        s = self.settings
        return Sampling(s.max_new_tokens, s.temperature, s.top_p, generator=self.generator)

    def in_order(self, what: int | str, position: int = 0) -> Pictures:
        """Returns the images in the random order of an iteration, scaled down to what a model sees."""
        return Pictures(self.images, f"{self.seed} {what}", position, self.photographs)

    def next_images(self, count: int) -> list[Picture]:
        """Returns the next images; of several processes this one's part of them.

        The run cycles through the images, in a new random order each time.
        """
        return self.pictures.load_next(count, self.ranks)

    def image_batches(self, count: int, size: int) -> Iterator[list[Picture]]:
        """Yields the next `count` images, `size` at a time, as decoded images are large. Seeds each batch."""
        for done in range(0, count, size):
            self.generator = self.seeded(self.state.iteration, self.state.phase, done)
            yield self.next_images(min(size, count - done))
            self.stop_if_asked()

    def next_questions(
        self, order: list[VotedQuestion], step: int
    ) -> list[tuple[VotedQuestion, Patches]]:
        """Returns the curated questions of a step with their images; cycles through them in this order.

        With fewer questions than images a step, each step takes all of them.
        """
        count = min(self.settings.images_per_step, len(order))

        def choose(step: int) -> list[VotedQuestion]:
            places = range((step - 1) * count, step * count)
            return self.shard([order[place % len(order)] for place in places])

        found = self.load_images(choose(step))
        if step < self.settings.reasoner_steps:
            self.photographs.expect([question.image for question in choose(step + 1)])
        return found

    def finish_phase(self, tensors: dict[str, dict[str, Tensor]] | None = None) -> None:
        """Goes on to the next phase, with a saved state. tensors: what is new in it, by name."""
        number = PHASES.index(self.state.phase) + 1
        self.state.phase = PHASES[number % len(PHASES)]
        self.state.step = 0
        for name in ("moments", "reference"):
            self.state.files.pop(name, None)
        if self.state.phase == PHASES[0]:  # each iteration has its own order of the images
            self.state.iteration += 1
            self.pictures = self.in_order(self.state.iteration)
        self.save(tensors or {})
        if self.state.iteration <= self.settings.iterations:  # else it is done
            self.stop_if_asked()

    # ---- Several processes ---------------------------------------------------------------------------

    def all_gather_votes(self, votes: Votes) -> Votes:
        """Returns the votes of all processes."""
        as_json = [[vote and asdict(vote) for vote in group] for group in votes]
        everywhere = self.all_gather(as_json)
        return [[vote and VotedQuestion(**vote) for vote in group] for group in everywhere]

    def on_main(self, function: Callable[..., dict], *arguments) -> dict:
        """Runs a function on the first process and returns its result on all."""
        result = function(*arguments) if self.ranks.is_main else {}
        return self.ranks.broadcast(result)

    def stop_if_asked(self) -> None:
        """Raises Stopped in all processes if the user has asked any of them to stop."""
        if self.ranks.any(self.stopping):
            raise Stopped

    # ---- Files -------------------------------------------------------------------------------------------

    def save(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Saves the state, with new tensors (each process its part); other files stay as they are."""
        self.number += 1
        for name, part in tensors.items():
            paths = write_tensors(self.folder, f"{self.number:06}-{name}-{self.ranks.rank}", part)
            self.state.files[name] = self.all_gather(paths)
        if self.ranks.is_main:
            metrics = self.folder / "metrics.jsonl"
            self.state.metrics = entry(self.folder, metrics)[1] if metrics.exists() else 0
            self.state.pictures = self.pictures.position
            self.state.skipped = self.images.skipped
            write_state(self.folder, self.number, self.state)
        self.ranks.barrier()  # nobody goes on before it is there

    def finish_curation(
        self, k: int, candidates: list[VotedQuestion], curated: list[VotedQuestion]
    ) -> None:
        """Writes the candidates and the training set, and goes on to the next phase."""
        if self.ranks.is_main:
            write_examples(self._questions_file("candidates", k), candidates)
            path = self._questions_file("curated", k)
            write_examples(path, curated)
            self.state.files["curated"] = [entry(self.folder, path)]
        self.finish_phase()

    def read_curated(self, k: int) -> list[VotedQuestion]:
        """Reads the Reasoner's training set of iteration k; [] in iteration 0."""
        return read_examples(self._questions_file("curated", k)) if k else []

    def read_probes(self, when: int | str) -> list[VotedQuestion]:
        """Reads the fixed questions with the base's first votes ("base"), or with those of iteration k."""
        return read_examples(self._questions_file("probes", when))

    def write_probes(self, when: int | str, probes: list[VotedQuestion]) -> None:
        """Writes what `read_probes` reads. A run needs those of the base to go on."""
        if self.ranks.is_main:
            path = self._questions_file("probes", when)
            write_examples(path, probes)
            if when in ("base", 0):
                self.state.files[f"probes {when}"] = [entry(self.folder, path)]
        self.ranks.barrier()  # nobody reads it before it is there

    def _questions_file(self, kind: str, when: int | str) -> Path:
        name = when if when == "base" else f"iteration-{when}"
        return self.folder / kind / f"{name}.jsonl"

    def probe_images(self, count: int) -> list[Picture]:
        """Returns the images of the fixed questions; of several processes this one's part."""
        count = min(count, len(self.images.paths))
        return self.in_order("probes").load_next(count, self.ranks)

    def load_images(self, questions: list[VotedQuestion]) -> list[tuple[VotedQuestion, Patches]]:
        """Returns questions with their images. Those that can no longer be read join the skipped ones."""
        found = []
        unreadable = []
        paths = [question.image for question in questions]
        for question, image in zip(questions, self.photographs.load(paths)):
            if isinstance(image, ImageError):
                unreadable.append((question.image, str(image)))
            else:
                found.append((question, image))
        for path, why in self.all_gather(unreadable):
            if (path, why) not in self.images.skipped:
                self.images.skipped.append((path, why))
        self.tell_skips()
        return found

    def finish_iteration(self, k: int, probes: list[VotedQuestion]) -> None:
        """Writes the votes on the probes, and both roles as checkpoints; goes on to the next iteration."""
        self.write_probes(k, probes)
        if k > 0 and self.ranks.is_main:
            for role, vlm in self.roles.items():
                replace_folder(self.folder / role, vlm.save)
                if self.settings.lora_rank:
                    write = partial(lora.save_adapter, vlm.model, str(vlm.source))
                    replace_folder(self.folder / f"{role}-adapter", write)
        self.finish_phase()

    # ---- Records and lines ---------------------------------------------------------------------------------

    def phase_records(self, phase: str) -> list[dict]:
        """Returns the records of a phase, of all iterations so far."""
        return [record for record in self.records if record["phase"] == phase]

    def write_record(self, record: dict) -> None:
        """Adds a record to metrics.jsonl; a number that is not finite becomes null."""
        record = {name: plain(value) for name, value in record.items()}
        if self.ranks.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self.tell_troubles(record)
        self.tell_skips()

    def tell_troubles(self, record: dict) -> None:
        """Says what went wrong in a step or a curation; each kind of trouble once a phase."""
        place = f"iteration {record['iteration']}, {record['phase']}"
        step = f", step {record['step']}" if "step" in record else ""
        for kind, sentence in judge_phase([record], asdict(self.settings)).items():
            if (place, kind) not in self.troubles_told:
                self.troubles_told.add((place, kind))
                self.console.say(f"{place}{step}: {sentence}")

    def log(self, step: int, groups: list[grpo.Group], metrics: dict) -> None:
        """Writes the record of a GRPO step: what was sampled, and its metrics."""
        seconds = time.monotonic() - self.started
        place = dict(iteration=self.state.iteration, phase=self.state.phase, step=step)
        sampled = rollout_metrics(groups, self.questioner, seconds, self.ranks)
        self.write_record(place | sampled | metrics | dict(seconds=seconds))

    def write_samples(self, step: int, samples: list[dict]) -> None:
        """Writes examples of what a GRPO step sampled, in place of those of an earlier try at this step."""
        if samples and self.ranks.is_main:
            place = f"iteration-{self.state.iteration}/{self.state.phase}-{step:04}.jsonl"
            write_json_lines(self.folder / "samples" / place, samples)

    def warn_of_prompts(self) -> None:
        """Warns if the checkpoint was made for other prompts, or the Questioner's names not all blocks."""
        asking = self.settings.questioner_prompt or questioner.INSTRUCTION
        answering = self.settings.reasoner_prompt or reasoner.INSTRUCTION
        if not knows(self.questioner.source, [asking, answering]):
            self.console.say(UNKNOWN_INSTRUCTIONS)
        for tag in ("<type>", "<question>", "<answer>"):
            if tag not in asking:
                why = "an output without this block is no valid question"
                self.console.say(f"warning: the Questioner's prompt does not name {tag}; {why}")

    def warn(self, signature: str, message: str | None) -> None:
        """Writes and prints that a failure signature has shown itself, if there is a message."""
        if message is None:
            return
        place = dict(iteration=self.state.iteration, phase="warning")
        self.write_record(place | dict(signature=signature, message=message))
        self.console.say(f"warning, {signature}: {message}")

    def report(self, k: int, results: dict) -> None:
        """Writes and prints what was measured after iteration k: one row of the table."""
        self.write_record(dict(iteration=k, phase="measure") | results)
        if not self.ranks.is_main:
            return
        if not self.header_printed:
            print(HEADER)
            self.header_printed = True
        print(table_row(k, results, [r for r in self.records if r["iteration"] == k]), flush=True)

    def tell_skips(self) -> None:
        """Names the images that were skipped since the last call."""
        new = self.images.skipped[self.skips_told :]
        self.skips_told += len(new)
        for path, reason in new:
            self.console.say(f"skipped {printable(path)}: {reason}")
        if new and self.ranks.is_main:
            lines = [f"{printable(path)}\t{why}\n" for path, why in self.images.skipped]
            replace_text(self.folder / "skipped.txt", "".join(lines))

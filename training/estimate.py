"""Estimates how long a run takes on a GPU that is not there: counts of its work, divided by stated rates.

    lengths drawn -> the rollout's own schedule, without tensors -> Counts -> seconds on a Card

Nothing of it has been measured on a GPU: it gives the order of magnitude. What is counted is exact for the
lengths that are drawn (geometric); the rates are what such cards usually reach.
"""

import math
import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from model.decode import SAMPLING_BYTES, cache_token_bytes
from model.generate import PREFILL_TOKENS
from model.packing import BATCH_IMAGE_TOKENS, BATCH_TOKENS
from model.schedule import (
    CELLS,
    Limits,
    Owner,
    Schedule,
    Waiting,
    find_limits,
    group_by_prefix,
    run,
)
from training import memory_plan as plan
from training.settings import Settings

GIB = 2**30
QUESTION_TOKENS = 100  # of a Questioner's output, on average
ANSWER_TOKENS = 250  # of an answer
SPECIAL_TOKENS = 26  # of a prompt before its image
READ = 0.7  # of a card's bytes a second: gpt-fast reads 7B in bfloat16 at 70% on an A100
COMPUTED = 0.4  # of its operations a second
KERNEL = 2e-6  # seconds of a kernel in a CUDA graph that has nothing to do
LAUNCH = 1e-5  # seconds of a kernel that Python launches
CAPTURE = 0.15  # seconds to capture a CUDA graph
LINK = 2e10  # bytes a second between a GPU and pinned memory
DISK = 1.5e9  # bytes a second, written and checked
STEP_KERNELS = 18  # of a layer of a decode step (docs/speed.md)
PREFILL_KERNELS = 30  # of a layer
SAMPLING_KERNELS = 40
SCORES = 4  # times that attention scores are read or written


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    memory: float  # bytes
    bandwidth: float  # bytes a second
    operations: float  # dense bfloat16 operations a second


CARDS = {
    "a100": Card(85e9, 2.0e12, 312e12),
    "h100": Card(85e9, 3.35e12, 989e12),
    "h200": Card(150e9, 4.8e12, 989e12),
    "l40s": Card(51e9, 0.86e12, 362e12),
    "4090": Card(25.7e9, 1.0e12, 165e12),
}


@dataclass
class Counts:
    """The work of a rollout; does as `schedule.run` says, and only counts."""

    lengths: list[list[int]]  # [prompts][n] tokens of each completion
    shapes: Counter = field(default_factory=Counter)  # (R, S, C, P, T) -> steps
    images: int = 0  # encoded
    prefill_tokens: int = 0
    prefills: int = 0
    moved: int = 0  # rows that moved up
    ends: dict[tuple[int, int], int] = field(default_factory=dict)  # completion -> its last token
    time: int = 0
    last: Hashable = None  # the prefix that was forwarded last

    @property
    def steps(self) -> int:
        """Counts the decode steps."""
        return sum(self.shapes.values())

    @property
    def live_share(self) -> float:
        """Returns the share of the rows in all steps that a completion needs."""
        covered = sum(shape[0] * count for shape, count in self.shapes.items())
        return sum(length - 1 for group in self.lengths for length in group) / max(1, covered)

    def prefill(self, groups: list[list[Waiting]]) -> None:
        """Counts the tokens: of a prefix once, of a tail for each prompt."""
        self.prefills += 1
        for group in groups:
            if self.last != group[0].prefix:  # else it is the rest of a group that was cut
                self.images += 1
                self.prefill_tokens += group[0].prefix_tokens
            self.last = group[0].prefix
            self.prefill_tokens += sum(each.tail for each in group)

    def enter(self, new: Waiting, rows: list[int], slots: list[int]) -> None:
        """Notes when each of a prompt's completions ends."""
        for sample, length in enumerate(self.lengths[new.prompt]):
            self.ends[new.prompt, sample] = self.time + length

    def sample(self, schedule: Schedule) -> None:
        """Counts the time, as the schedule does."""
        self.time = schedule.time + 1

    def find_finished(self, schedule: Schedule) -> list[int]:
        """Returns the rows whose completion has ended."""
        owners = schedule.owners.items()
        return [
            row for row, owner in owners if self.ends[owner.prompt, owner.sample] <= schedule.time
        ]

    def leave(self, finished: list[int], owners: list[Owner]) -> None:
        """Does nothing: what a row has written is not there."""

    def move_up(self, rows: dict[int, int], slots: dict[int, int]) -> None:
        """Counts the rows."""
        self.moved += len(rows)

    def step(self, schedule: Schedule) -> None:
        """Counts a step by its shape."""
        self.shapes[schedule.shape()] += 1


def count_rollout(
    waiting: list[Waiting], lengths: list[list[int]], limits: Limits, device: str = "cuda"
) -> Counts:
    """Runs the schedule of a rollout with completions of these lengths [prompts][n]."""
    counts = Counts(lengths)
    schedule = Schedule(limits, len(lengths[0]), device)
    run(schedule, group_by_prefix(waiting, PREFILL_TOKENS), PREFILL_TOKENS, counts)
    return counts


def draw_lengths(
    prompts: int, n: int, mean: float, most: int, rng: random.Random
) -> list[list[int]]:
    """Draws geometric lengths [prompts][n] with this mean, cut off at `most`."""
    scale = math.log(1 - 1 / mean)

    def draw() -> int:
        return min(most, 1 + int(math.log(1 - rng.random()) / scale))

    return [[draw() for _ in range(n)] for _ in range(prompts)]


# ---- Of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run to estimate: its model, its settings, the work of a step, and a GPU."""

    config: PreTrainedConfig
    settings: Settings
    work: plan.Work
    card: Card

    @property
    def flags(self) -> dict:
        """Returns the flags that the memory plan takes besides; without any it checkpoints to fit."""
        s = self.settings
        flags = dict(
            checkpointing=s.gradient_checkpointing,
            offload=s.offload,
            lora_rank=s.lora_rank,
            freeze_vision=s.freeze_vision,
        )
        memory = int(self.card.memory)
        if not plan.fits(memory, self.config, torch.bfloat16, self.work, **flags):
            flags["checkpointing"] = True
        return flags


def rollout(case: Case, images: int, questions: int, n: int, mean: float) -> Counts:
    """Counts a rollout of n completions of `questions` prompts about each of so many images."""
    work = case.work
    rng = random.Random(0)
    prefix = SPECIAL_TOKENS + work.image_tokens
    tail = work.prompt_tokens - work.image_tokens - SPECIAL_TOKENS
    waiting = [
        Waiting(i * questions + j, i, prefix, tail) for i in range(images) for j in range(questions)
    ]
    moments = plan.memory_plan(
        case.config, torch.bfloat16, int(case.card.memory), work, **case.flags
    )
    others = sum(size for name, size in moments[1].parts.items() if name != "cache")
    limits = find_limits(
        [questions] * images,
        prefix,
        tail + work.new_tokens,
        n,
        most_cells=CELLS["cuda"],
        token_bytes=cache_token_bytes(case.config, torch.bfloat16),
        row_bytes=SAMPLING_BYTES * case.config.text_config.vocab_size,
        budget=max(0, int(case.card.memory) - others) // 2,
    )
    lengths = draw_lengths(images * questions, n, mean, work.new_tokens, rng)
    return count_rollout(waiting, lengths, limits)


def rollout_seconds(case: Case, counts: Counts) -> dict[str, float]:
    """Returns the seconds of a rollout's parts."""
    text = case.config.text_config
    text_weights, image_weights = weights(case.config)
    step_bytes = sum(
        steps * read_bytes(case.config, torch.bfloat16, shape)
        for shape, steps in counts.shapes.items()
    )
    kernels = STEP_KERNELS * text.num_hidden_layers + SAMPLING_KERNELS
    decode = step_bytes / (READ * case.card.bandwidth) + counts.steps * kernels * KERNEL
    # A prefill multiplies each token, and each image token's four patches, with all weights.
    operations = 2 * text_weights * counts.prefill_tokens
    operations += 2 * image_weights * 4 * counts.images * case.work.image_tokens
    launches = counts.prefills * PREFILL_KERNELS * text.num_hidden_layers * LAUNCH
    prefill = operations / (COMPUTED * case.card.operations) + launches
    return dict(decode=decode, prefill=prefill, captures=CAPTURE * len(counts.shapes))


def read_bytes(config: PreTrainedConfig, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Counts the bytes that a decode step of this shape reads (see `Schedule.shape`).

    They are the weights and the caches, and attention scores and probabilities several times.
    """
    R, S, C, P, T = shape
    text = config.text_config
    text_weights, _ = weights(config)
    scores = 4 * SCORES * text.num_attention_heads * (S * C * P + R * T)
    read = text_weights * dtype.itemsize + cache_token_bytes(config, dtype) * (S * P + R * T)
    return read + text.num_hidden_layers * scores + R * text.vocab_size * SAMPLING_BYTES


def weights(config: PreTrainedConfig) -> tuple[int, int]:
    """Counts the weights that a token is multiplied with in the text model, and those of the encoder."""
    sizes = plan.parameter_sizes(config)
    embedding = (
        0 if config.tie_word_embeddings else sizes["model.language_model.embed_tokens.weight"]
    )
    image = sum(size for name, size in sizes.items() if "visual" in name)
    return sum(sizes.values()) - image - embedding, image


def update_seconds(case: Case, mean: float) -> dict[str, float]:
    """Returns the seconds of an update's parts, the reference's forward pass among them."""
    work = case.work
    flags = case.flags
    text_weights, image_weights = weights(case.config)
    groups = work.questions // work.group_size
    tokens = groups * (work.prompt_tokens + work.group_size * mean)
    patches = 4 * groups * work.image_tokens
    # Operations a weight: 2 of the reference, 2 forward, 4 backward, 2 once more.
    passes = 10 if flags["checkpointing"] else 8
    operations = passes * (text_weights * tokens + image_weights * patches)
    trained = sum(
        plan.trained_sizes(case.config, flags["lora_rank"], flags["freeze_vision"]).values()
    )
    batches = max(tokens / BATCH_TOKENS, groups * work.image_tokens / BATCH_IMAGE_TOKENS)
    memory = int(case.card.memory)
    batches /= plan.fit_batches(memory, case.config, torch.bfloat16, work, **flags)
    moved = 2 * trained  # the plain copy, made anew
    if flags[
        "offload"
    ]:  # weights in twice and gradients out once a batch; moments stay in CPU memory
        moved += batches * (2 + 2 + 4) * trained + 8 * trained
    saved = 12 * trained / case.settings.save_every
    return dict(
        update=operations / (COMPUTED * case.card.operations),
        optimizer=30 * trained / (READ * case.card.bandwidth),
        copies=(moved + 3 * 2 * trained) / LINK,  # and each role comes to the GPU
        saving=saved / DISK,
    )


def estimate(case: Case) -> dict:
    """Returns counts of a Questioner step, and seconds of its parts, of each phase and of an iteration."""
    s = case.settings
    images = s.images_per_step
    ask = rollout(case, images, 1, s.group_size, QUESTION_TOKENS)
    vote = rollout(case, images, s.group_size, s.answers, ANSWER_TOKENS)
    answer = rollout(case, images, 1, s.group_size, ANSWER_TOKENS)
    poll = rollout(case, images, 1, s.answers, ANSWER_TOKENS)
    # Parts of a Questioner step. Photographs become patches while the step before runs.
    asking = rollout_seconds(case, ask)
    parts = {f"ask: {name}": value for name, value in asking.items()}
    parts |= {f"vote: {name}": value for name, value in rollout_seconds(case, vote).items()}
    parts |= update_seconds(case, QUESTION_TOKENS)
    questioner = sum(parts.values())
    # The other phases.
    update = sum(update_seconds(case, ANSWER_TOKENS).values())
    reasoner = sum(rollout_seconds(case, answer).values()) + update
    batch = sum(asking.values()) + sum(rollout_seconds(case, poll).values())
    curation = batch * s.candidates / images
    iteration = s.questioner_steps * questioner + curation + s.reasoner_steps * reasoner
    phases = dict(questioner_step=questioner, curation=curation, reasoner_step=reasoner)
    return dict(
        decode_steps=vote.steps,
        live_share=vote.live_share,
        recordings=len(vote.shapes),
        images_encoded=vote.images,
        prefill_tokens=vote.prefill_tokens,
        prefills=vote.prefills,
        rows=max(shape[0] for shape in vote.shapes),
        slots=max(shape[1] for shape in vote.shapes),
        asking=dict(
            decode_steps=ask.steps,
            live_share=ask.live_share,
            recordings=len(ask.shapes),
            images_encoded=ask.images,
            prefill_tokens=ask.prefill_tokens,
        ),
        seconds=parts | phases | dict(iteration=iteration),
    )


def describe(card: str, results: dict) -> str:
    """Says what was estimated, as a table."""
    lines = [f"an estimate for one {card.upper()}; nothing was measured", ""]
    for name, value in results.items():
        if name not in ("seconds", "asking"):
            number = f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
            lines.append(f"  vote: {name.replace('_', ' '):28} {number:>10}")
    lines += ["", "  seconds"]
    for name, value in results["seconds"].items():
        lines.append(f"  {name.replace('_', ' '):34} {value:>10,.1f}")
    return "\n".join(lines)

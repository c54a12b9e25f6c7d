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

from model.decode import SAMPLING_BYTES, cache_token_bytes, head_size
from model.generate import PREFILL_TOKENS
from model.packing import Continuation, PackedBatch, lay_out, pack
from model.prompt import Prompt
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
HOST = 5e10  # bytes a second of the computer's memory, where AdamW runs with --offload
DISK = 1.5e9  # bytes a second, written and checked
STEP_KERNELS = 18  # of a layer of a decode step without LoRA (docs/speed.md)
LONG_KERNELS = 3  # more of a layer where rows are long
PREFILL_KERNELS = 30  # of a layer
SAMPLING_KERNELS = 41
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
    shapes: Counter = field(default_factory=Counter)  # (R, L, S, C, P, N, T) -> steps
    images: int = 0  # encoded
    prefill_tokens: int = 0
    prefills: int = 0
    moved: int = 0  # rows that changed their place
    looked: int = 0  # flags that looks have brought
    ends: dict[tuple[int, int], int] = field(default_factory=dict)  # completion -> its last token
    time: int = 0
    last: Hashable = None  # the prefix that was forwarded last

    @property
    def steps(self) -> int:
        """Counts the decode steps."""
        return sum(self.shapes.values())

    @property
    def long_steps(self) -> int:
        """Counts the decode steps in which rows are long."""
        return sum(count for shape, count in self.shapes.items() if shape[1])

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
        """Returns the rows whose completion has ended, as a look at all flags would."""
        self.looked += schedule.covered_rows
        owners = schedule.owners.items()
        ends = {row: self.ends[owner.prompt, owner.sample] for row, owner in owners}
        return [row for row, end in ends.items() if end <= schedule.time]

    def leave(self, finished: list[int], owners: list[Owner]) -> None:
        """Does nothing: what a row has written is not there."""

    def move(self, rows: dict[int, int], slots: dict[int, int]) -> None:
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

    @property
    def trained(self) -> int:
        """Counts the elements that are trained."""
        s = self.settings
        return sum(plan.trained_sizes(self.config, s.lora_rank, s.freeze_vision).values())

    @property
    def encoder_is_frozen(self) -> bool:
        """Tells if images are encoded once a step, and their features kept."""
        return self.settings.freeze_vision or self.settings.lora_rank > 0


def rollout(
    case: Case, images: int, questions: int, n: int, mean: float, training: bool = True
) -> Counts:
    """Counts a rollout of n completions of `questions` prompts about each of so many images.

    training: a role is in training meanwhile. Curation has its memory for the cache.
    """
    work = case.work
    rng = random.Random(0)
    prefix = SPECIAL_TOKENS + work.image_tokens
    tail = work.prompt_tokens - work.image_tokens - SPECIAL_TOKENS
    waiting = [Waiting(i, i // questions, prefix, tail) for i in range(images * questions)]
    _, answering, _, curation, _ = plan.memory_plan(
        case.config, torch.bfloat16, int(case.card.memory), work, **case.flags
    )
    parts = answering.parts if training else curation.parts
    others = sum(size for name, size in parts.items() if name != "cache")
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
    launched = kernels * counts.steps + LONG_KERNELS * text.num_hidden_layers * counts.long_steps
    decode = step_bytes / (READ * case.card.bandwidth) + launched * KERNEL
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
    R, L, S, C, P, N, T = shape
    text = config.text_config
    text_weights, _ = weights(config)
    own = R * N + L * (T - N)
    scores = 4 * SCORES * text.num_attention_heads * (S * C * P + own)
    read = text_weights * dtype.itemsize + cache_token_bytes(config, dtype) * (S * P + own)
    return read + text.num_hidden_layers * scores + R * text.vocab_size * SAMPLING_BYTES


def weights(config: PreTrainedConfig) -> tuple[int, int]:
    """Counts the weights that a token is multiplied with in the text model, and those of the encoder."""
    sizes = plan.parameter_sizes(config)
    embedding = sizes["model.language_model.embed_tokens.weight"]
    if config.tie_word_embeddings:  # it is the output matrix, too
        embedding = 0
    image = sum(size for name, size in sizes.items() if "visual" in name)
    return sum(sizes.values()) - image - embedding, image


def pack_update(case: Case, lengths: list[list[int]]) -> list[PackedBatch]:
    """Lays out the batches of an update whose completions have these lengths [groups][G]."""
    work = case.work
    completions = []
    for group in lengths:
        positions = torch.zeros(3, work.prompt_tokens)
        prompt = Prompt(positions[0], positions, (), torch.zeros(work.image_tokens))
        completions += [Continuation(prompt, [0] * length) for length in group]
    memory = int(case.card.memory)
    scale = plan.fit_batches(memory, case.config, torch.bfloat16, work, **case.flags)
    return [lay_out(rows) for rows in pack(completions, scale)]


def describe_batches(batches: list[PackedBatch]) -> dict:
    """Returns the shapes of an update's attention: rows x tokens of each batch, and each row's own length."""
    shapes = [tuple(batch.ids.shape) for batch in batches]
    lengths = [length for batch in batches for length in (batch.segment >= 0).sum(dim=1).tolist()]
    return dict(
        batches=len(batches),
        rows=len(lengths),
        shortest_row=min(lengths),
        longest_row=max(lengths),
        tokens=sum(lengths),
        padded_tokens=sum(rows * tokens for rows, tokens in shapes),
        shapes=shapes,
        lengths=lengths,
    )


def moved_bytes(
    case: Case, rollouts: list[Counts], batches: list[PackedBatch]
) -> dict[str, dict[str, int]]:
    """Counts the bytes that cross between the computer's memory and the GPU in a step, by what they are.

    The plain copies come for each rollout and for the reference. Each of these and the update encodes all
    images, or reads the features of a frozen encoder. What is smaller than some megabytes is left out.
    """
    work = case.work
    s = case.settings
    trained = case.trained
    copy = trained * (4 if s.lora_rank else 2)
    images = work.questions // work.group_size
    encodings = len(rollouts) + 2
    patches = images * plan.patches_bytes(case.config, work.image_tokens)
    laid_out = 0
    for batch in batches:
        tensors = (batch.ids, batch.positions, batch.segment, batch.where, batch.targets)
        laid_out += sum(tensor.nbytes for tensor in tensors)
    # A prompt's token: its id and three positions. A completion leaves with its whole row of tokens.
    prompts = 32 * sum(counts.prefill_tokens for counts in rollouts)
    written = sum(8 * work.new_tokens * len(counts.ends) + counts.looked for counts in rollouts)
    to_gpu = dict(weights=(len(rollouts) + 1) * copy, tokens=prompts + 2 * laid_out)
    from_gpu = dict(tokens=written)
    if case.encoder_is_frozen:
        later = len(getattr(case.config.vision_config, "deepstack_visual_indexes", ()))
        width = (1 + later) * case.config.text_config.hidden_size
        features = 2 * width * images * work.image_tokens
        to_gpu |= dict(pixels=patches, features=encodings * features)
        from_gpu |= dict(features=features)
    else:
        to_gpu |= dict(pixels=encodings * patches)
    if s.offload:
        # FSDP2 casts on the GPU: float32 weights come for each forward and each backward pass.
        to_gpu |= dict(masters=len(batches) * (4 + 4) * trained)
        from_gpu |= dict(gradients=len(batches) * 4 * trained)
    else:
        # Made anew after each step, and saved every few steps.
        from_gpu |= dict(weights=copy, state=12 * trained // s.save_every)
    return dict(to_gpu=to_gpu, from_gpu=from_gpu)


def update_seconds(
    case: Case, batches: list[PackedBatch], moved: dict[str, dict[str, int]]
) -> dict[str, float]:
    """Returns the seconds of an update's parts, the reference's forward pass among them.

    moved: the bytes that are copied in its step (see `moved_bytes`).
    """
    s = case.settings
    text = case.config.text_config
    text_weights, image_weights = weights(case.config)
    if case.encoder_is_frozen:
        image_weights = 0
    # Operations a weight: 2 of the reference, 2 forward, 4 backward, 2 once more.
    passes = 10 if case.flags["checkpointing"] else 8
    operations = 0
    for batch in batches:
        rows, tokens = batch.ids.shape
        operations += passes * rows * 4 * case.work.image_tokens * image_weights
        # A token's scores and what they weigh: two products with all tokens of its row.
        attention = 2 * text.num_hidden_layers * head_size(text) * text.num_attention_heads * tokens
        operations += passes * rows * tokens * (text_weights + attention)
    adam = HOST if s.offload else READ * case.card.bandwidth
    saved = 12 * case.trained / s.save_every
    return dict(
        update=operations / (COMPUTED * case.card.operations),
        optimizer=30 * case.trained / adam,
        copies=sum(sum(each.values()) for each in moved.values()) / LINK,
        saving=saved / DISK,
    )


def estimate(case: Case) -> dict:
    """Returns counts of a Questioner step, and seconds of its parts, of each phase and of an iteration."""
    s = case.settings
    images = s.images_per_step
    ask = rollout(case, images, 1, s.group_size, QUESTION_TOKENS)
    vote = rollout(case, images, s.group_size, s.answers, ANSWER_TOKENS)
    answer = rollout(case, images, 1, s.group_size, ANSWER_TOKENS)
    curate_ask = rollout(case, images, 1, 1, QUESTION_TOKENS, training=False)
    curate_vote = rollout(case, images, 1, s.answers, ANSWER_TOKENS, training=False)
    # Parts of a Questioner step. Photographs become patches while the step before runs.
    asking = rollout_seconds(case, ask)
    parts = {f"ask: {name}": value for name, value in asking.items()}
    parts |= {f"vote: {name}": value for name, value in rollout_seconds(case, vote).items()}
    batches = pack_update(case, ask.lengths)
    moved = moved_bytes(case, [ask, vote], batches)
    parts |= update_seconds(case, batches, moved)
    questioner = sum(parts.values())
    # The other phases.
    answered = pack_update(case, answer.lengths)
    update = sum(update_seconds(case, answered, moved_bytes(case, [answer], answered)).values())
    reasoner = sum(rollout_seconds(case, answer).values()) + update
    # Curation asks a question about each image.
    curated = [rollout_seconds(case, counts) for counts in (curate_ask, curate_vote)]
    curation = s.candidates / images * sum(sum(each.values()) for each in curated)
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
        long_rows=max(shape[1] for shape in vote.shapes),
        slots=max(shape[2] for shape in vote.shapes),
        asking=dict(
            decode_steps=ask.steps,
            live_share=ask.live_share,
            recordings=len(ask.shapes),
            images_encoded=ask.images,
            prefill_tokens=ask.prefill_tokens,
        ),
        update=describe_batches(batches),
        bytes=moved,
        seconds=parts | phases | dict(iteration=iteration),
    )


def describe(card: str, results: dict) -> str:
    """Says what was estimated, as a table."""
    lines = [f"an estimate for one {card.upper()}; nothing was measured", ""]
    for name, value in results.items():
        if not isinstance(value, dict):
            lines.append(describe_count(f"vote: {name}", value))
    for name, value in results["update"].items():
        if not isinstance(value, list):
            lines.append(describe_count(f"update: {name}", value))
    for way, parts in results["bytes"].items():
        lines += ["", f"  megabytes {way.replace('_gpu', ' the GPU')}"]
        lines += [describe_count(name, value // 10**6) for name, value in parts.items()]
    lines += ["", "  seconds"]
    for name, value in results["seconds"].items():
        lines.append(f"  {name.replace('_', ' '):34} {value:>10,.1f}")
    return "\n".join(lines)


def describe_count(name: str, value: float) -> str:
    """Says a number, as a line of a table."""
    number = f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
    return f"  {name.replace('_', ' '):34} {number:>10}"

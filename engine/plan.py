"""The plan: how much memory each moment of an iteration takes, before anything is loaded.

Per parameter, a role that is trained has its weight, a float32 master, a float32 gradient and AdamW's two float32 moments;
a float32 weight is its own master. The other role and the reference (the KL's other side) are frozen: on a GPU they are
only while they work. With --offload masters and moments are on the CPU. Of several GPUs each has all weights and gradients, but
the masters and moments of its own share of the tensors only (see ranks.py).

Activations are counted from what autograd keeps (found with `saved_tensors_hooks` in transformers 5.23): of a token or
patch each layer keeps 8 vectors of its width and 4 of its MLP's, and 2 more of its width in float32, from the norms; the
image encoder, which cuts its windows out and puts them together again, keeps 12 in place of 8. A test compares the total
with the peak of an update: 15% at most between them.
"""

from dataclasses import dataclass, replace

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from cache import CPU_CACHE_BYTES, SAMPLING_BYTES, cache_token_bytes
from generate import PREFILL_TOKENS
from packing import BATCH_IMAGE_TOKENS, BATCH_TOKENS, LOGITS, ROW_TOKENS


@dataclass(frozen=True)
class Work:
    """What a step deals with: tokens of an image, of the text around it and of the longest completion, G, and how many
    questions (each of them answered `answers` times)."""

    image_tokens: int
    text_tokens: int
    new_tokens: int
    group_size: int
    questions: int
    answers: int

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Moment:
    """What is in memory at a moment of the loop: name of the part -> bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def parameter_sizes(config: Qwen2_5_VLConfig) -> dict[str, int]:
    """The number of elements of each parameter of a model of this shape, by name; no weights are made."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return {name: p.numel() for name, p in model.named_parameters()}


def memory_plan(
    config: Qwen2_5_VLConfig,
    dtype: torch.dtype,
    device_bytes: int | None,
    work: Work,
    checkpointing: bool,
    offload: bool,
    ranks: int = 1,
) -> list[Moment]:
    """The memory of the moments of one iteration that take most, on the GPU, of `ranks`, that has most to hold.

    device_bytes: the memory of the GPU, None on a CPU. `work` is what all ranks have to do.
    """
    sizes, work = parameter_sizes(config), replace(work, questions=-(-work.questions // ranks))
    parameters = sum(sizes.values())
    owned = -(-parameters // ranks)
    weights = parameters * dtype.itemsize
    trained, other, reference = {"trained role": weights}, {"other role": weights}, {"reference": weights}
    optimizer = {"float32 masters": 0 if dtype == torch.float32 else 4 * owned, "AdamW moments": 8 * owned}
    device = "cpu" if device_bytes is None else "cuda"
    gradients = {
        "gradients": 4 * parameters,
        "activations": activation_bytes(config, dtype, work, checkpointing, device),
    }
    always = trained | ({} if offload else optimizer)
    if device_bytes is None:  # one memory for all
        always = trained | other | reference | optimizer

    def with_cache(parts: dict[str, int], rows: int, n: int) -> dict[str, int]:
        free = CPU_CACHE_BYTES if device_bytes is None else max(0, device_bytes - sum(parts.values())) // 2
        return parts | {"rollouts": min(rollout_bytes(config, dtype, work, rows, n), free)}

    return [
        Moment(
            "Questioner's rollouts", with_cache(always | other, work.questions * work.answers, work.answers)
        ),
        Moment("Questioner's update", always | gradients),
        Moment("curation", with_cache(trained | other, work.questions * work.answers, work.answers)),
        Moment("Reasoner's rollouts", with_cache(always, work.questions, work.group_size)),
        Moment("Reasoner's update", always | gradients),
    ]


def rollout_bytes(config: Qwen2_5_VLConfig, dtype: torch.dtype, work: Work, rows: int, n: int) -> int:
    """Keys and values of all rows and their prompts, what sampling needs, and one layer of a prefill's activations."""
    text, tokens = config.text_config, rows * work.new_tokens + rows // n * work.prompt_tokens
    prefill = min(PREFILL_TOKENS, rows // n * work.prompt_tokens) * (
        6 * text.hidden_size + 3 * text.intermediate_size
    )
    return (
        tokens * cache_token_bytes(config, dtype)
        + rows * text.vocab_size * SAMPLING_BYTES
        + prefill * dtype.itemsize
    )


def largest_batch(work: Work) -> tuple[int, int]:
    """How many rows of how many tokens are forwarded and differentiated together at most (see `vlm.pack`)."""
    group = work.prompt_tokens + work.group_size * (work.new_tokens - 1)
    row = min(group, max(ROW_TOKENS, work.prompt_tokens + work.new_tokens - 1))
    return min(max(1, min(BATCH_TOKENS // row, BATCH_IMAGE_TOKENS // work.image_tokens)), work.questions), row


def activation_bytes(
    config: Qwen2_5_VLConfig, dtype: torch.dtype, work: Work, checkpointing: bool, device: str
) -> int:
    """What the backward pass keeps at most, see this file's docstring: shorter completions put more images in a batch."""
    lengths = sorted({max(1, work.new_tokens * i // 32) for i in range(1, 33)})
    return max(
        batch_bytes(config, dtype, replace(work, new_tokens=length), checkpointing, device)
        for length in lengths
    )


def batch_bytes(
    config: Qwen2_5_VLConfig, dtype: torch.dtype, work: Work, checkpointing: bool, device: str
) -> int:
    """The same for the largest batch of completions that all have `work.new_tokens` tokens."""
    rows, row = largest_batch(work)
    text, vision = config.text_config, config.vision_config
    patches = vision.spatial_merge_size**2 * rows * work.image_tokens

    def layer(tokens: int, width: int, mlp: int, vectors: int) -> int:
        return tokens * ((vectors * width + 4 * mlp) * dtype.itemsize + 2 * width * 4)

    text_layer = layer(rows * row, text.hidden_size, text.intermediate_size, 8)
    vision_layer = layer(patches, vision.hidden_size, vision.intermediate_size, 12)
    mask = rows * row * row * dtype.itemsize
    matrix = (
        text.vocab_size * text.hidden_size * dtype.itemsize
    )  # the gradient of the matrix that makes the logits
    logits = min(LOGITS[device], rows * row * text.vocab_size) * (
        4 + dtype.itemsize
    )  # in float32, and before that
    if not checkpointing:
        return mask + text.num_hidden_layers * text_layer + vision.depth * vision_layer + logits + matrix
    inputs = (
        text.num_hidden_layers * rows * row * text.hidden_size + vision.depth * patches * vision.hidden_size
    ) * dtype.itemsize
    return mask + inputs + matrix + max(text_layer, vision_layer, logits, matrix)

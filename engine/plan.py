"""The plan: how much memory each moment of an iteration takes, before anything is loaded.

A role in training has, per parameter, a float32 master, a float32 gradient and AdamW's two float32 moments:
16 bytes, shared by the processes, and in the computer's memory with --offload. Of the sharded model two
layers at a time are there in whole, in the dtype it computes in, and all that is in no layer (embeddings, the
output matrix); the gradient of the latter is reduced last, in float32, when the activations are gone. The
plain copies (both roles, and the reference) are in the computer's memory, and on a GPU only while they work.
One process in float32 trains its plain copy itself, which then stays.

Activations are counted from what autograd keeps of a token or patch in each layer (found with
`saved_tensors_hooks` in transformers 5.23; `kept` in families/). A test compares the total with the peak of
an update: 15% at most between them.
"""

import json
from dataclasses import dataclass, replace
from functools import cache

import torch
from transformers import PreTrainedConfig

import lora
from cache import CPU_CACHE_BYTES, SAMPLING_BYTES, cache_token_bytes
from families import FAMILIES
from generate import PREFILL_TOKENS
from packing import BATCH_IMAGE_TOKENS, BATCH_TOKENS, LOGITS, ROW_TOKENS


@dataclass(frozen=True)
class Work:
    """What a step deals with.

    Tokens of an image, of the text around it and of the longest completion, G, and how many questions (each
    of them answered `answers` times).
    """

    image_tokens: int
    text_tokens: int
    new_tokens: int
    group_size: int
    questions: int
    answers: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first that is written."""
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Moment:
    """What is in memory at a moment of the loop: name of the part -> bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def parameter_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The number of elements of each parameter of a model of this shape, by name; no weights are made."""
    return trained_sizes(config, 0, False)


def trained_sizes(config: PreTrainedConfig, lora_rank: int, freeze_vision: bool) -> dict[str, int]:
    """The number of elements of each parameter that is trained, by name."""
    return dict(_trained_sizes(config.to_json_string(use_diff=False), lora_rank, freeze_vision))


@cache
def _trained_sizes(config: str, lora_rank: int, freeze_vision: bool) -> list[tuple[str, int]]:
    with torch.device("meta"):
        fields = json.loads(config)
        model = FAMILIES[fields["model_type"]].MODEL
        model = model(model.config_class(**fields))
        if lora_rank:
            lora.add_lora(model, lora_rank)
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    return [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]


def memory_plan(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device_bytes: int | None,
    work: Work,
    checkpointing: bool,
    offload: bool,
    ranks: int = 1,
    lora_rank: int = 0,
    freeze_vision: bool = False,
    budget: float = 1.0,
) -> list[Moment]:
    """The memory of the moments of one iteration that take most, on one GPU of `ranks`.

    device_bytes: of the GPU, None on a CPU. work: of all ranks. budget: the share of the token budgets.
    """
    sizes = trained_sizes(config, lora_rank, freeze_vision)
    work = replace(work, questions=-(-work.questions // ranks))
    trained, master = sum(sizes.values()), torch.float32 if lora_rank else dtype
    sharded, own = ranks > 1 or offload or master != torch.float32, -(-trained // ranks)
    # A plain copy is what is trained; what is frozen is there once, for all of them.
    copy, all_weights = trained * master.itemsize, sum(parameter_sizes(config).values()) * dtype.itemsize
    frozen = all_weights - (0 if lora_rank else copy)
    base, copies = {"frozen weights": frozen} if frozen else {}, {"questioner": copy, "reasoner": copy}
    in_training = {"float32 masters": 4 * own if sharded else 0, "AdamW's moments": 8 * own}
    device = "cpu" if device_bytes is None else "cuda"
    update = update_parts(config, dtype, sizes, work, checkpointing, device, sharded, budget)
    gone = device_bytes is not None and offload
    in_training, update["gradients"] = ({}, 0) if gone else (in_training, 4 * own)
    # What stays while nothing works: on a CPU all copies, on a GPU the one that is trained itself.
    stays = base | (
        copies | {"reference": copy} if device_bytes is None else {} if sharded else {"trained role": copy}
    )

    def rollouts(name: str, role: str, rows: int, n: int, training: bool) -> Moment:
        parts = stays | in_training if training else base | (copies if device_bytes is None else {})
        if not ("trained role" in parts and name.startswith(role.title())):
            parts = parts | {role: copy}
        cache = cache_bytes(config, dtype, work, rows, n, device_bytes, sum(parts.values()), budget)
        return Moment(name, parts | {"cache": cache})

    answers, G = work.questions * work.answers, work.group_size
    return [
        rollouts("Questioner's phase, asking", "questioner", work.questions, G, True),
        rollouts("Questioner's phase, answering", "reasoner", answers, work.answers, True),
        Moment("an update, in both phases", stays | in_training | update),
        rollouts("curation", "reasoner", answers, work.answers, False),
        rollouts("Reasoner's phase, answering", "reasoner", work.questions, G, True),
    ]


USABLE = 0.95  # of a GPU's memory: a twentieth is left for what nobody planned


def fitting_budget(device_bytes: int | None, *what, **flags) -> float:
    """The share of the token budgets with which every moment fits: 1, 1/2, ... 1/64; 1 on a CPU.

    A GPU with less memory forwards and differentiates fewer tokens at a time. device_bytes: what is free of
    it. what, flags: the other arguments of `memory_plan`.
    1/64 if nothing fits.
    """
    if device_bytes is None:
        return 1.0
    config, dtype, work = what

    def fits(budget: float) -> bool:
        moments = memory_plan(config, dtype, device_bytes, work, **flags, budget=budget)
        return max(moment.total for moment in moments) <= USABLE * device_bytes

    return next((0.5**halvings for halvings in range(7) if fits(0.5**halvings)), 1 / 64)


def update_parts(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    sizes: dict[str, int],
    work: Work,
    checkpointing: bool,
    device: str,
    sharded: bool,
    budget: float = 1.0,
) -> dict[str, int]:
    """What an update takes besides weights, gradients and moments. sizes: of what is trained."""
    rest, layer = layer_sizes(sizes)
    activations = activation_bytes(config, dtype, work, checkpointing, device, sizes, budget)
    if not sharded:
        return {"whole layers": 0, "activations": activations}
    last = rest * (dtype.itemsize + 4 + 4)
    return {"whole layers": (rest + 2 * layer) * dtype.itemsize, "activations": max(activations, last)}


def cache_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    work: Work,
    rows: int,
    n: int,
    device_bytes: int | None,
    taken: int,
    budget: float = 1.0,
) -> int:
    """What rollouts take beside weights: half of what is free, at least what a prompt with n rows needs."""
    free = CPU_CACHE_BYTES if device_bytes is None else max(0, device_bytes - taken) // 2
    least, most = (rollout_bytes(config, dtype, work, count, n, budget) for count in (n, rows))
    return max(least, min(most, free))


def host_plan(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    offload: bool,
    ranks: int = 1,
    lora_rank: int = 0,
    freeze_vision: bool = False,
) -> Moment:
    """What one process with a GPU keeps in the computer's memory: three plain copies, and what --offload
    moves there.

    It is pinned, and pinned memory is rounded up to a power of two: of a copy as one, of masters and
    gradients each tensor's.
    """
    sizes = trained_sizes(config, lora_rank, freeze_vision).values()
    itemsize = 4 if lora_rank else dtype.itemsize
    parts = {"three plain copies": 3 * _power_of_two(sum(sizes) * itemsize)}
    if offload:
        shards = [-(-4 * size // ranks) for size in sizes]
        parts["masters and gradients"] = 2 * sum(map(_power_of_two, shards))
        parts["AdamW's moments"] = 2 * sum(shards)
    return Moment("in the computer's memory, for each process", parts)


def disk_plan(
    config: PreTrainedConfig,
    stored: torch.dtype,
    saves: int,
    lora_rank: int = 0,
    freeze_vision: bool = False,
) -> Moment:
    """What the run folder takes at most, besides images and lists.

    stored: the dtype of exports, the base's. saves: how many states are saved within a phase.
    Of what is trained a state has float32 weights of both roles and the reference, and AdamW's two moments.
    Two states are kept while a third is written, and share what has not changed; one more than `saves` is
    counted, as Ctrl-C saves another. An export is written beside the one that it replaces.
    """
    trained = sum(trained_sizes(config, lora_rank, freeze_vision).values())
    whole = sum(parameter_sizes(config).values()) * stored.itemsize
    states = 4 * trained * (2 + 3 * min(3, saves + 1))  # reference and other role; role and moments of each
    return Moment("on the disk, at most", {"states": states, "checkpoints": 3 * whole})


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def layer_sizes(sizes: dict[str, int]) -> tuple[int, int]:
    """The elements of all that is in no layer (embeddings, the output matrix), and of the largest layer."""
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        parts = name.split(".")
        where = next((parts[: i + 2] for i, part in enumerate(parts) if part in ("layers", "blocks")), [])
        layers[".".join(where)] = layers.get(".".join(where), 0) + size
    rest = layers.pop("", 0)
    return rest, max(layers.values())


def rollout_bytes(
    config: PreTrainedConfig, dtype: torch.dtype, work: Work, rows: int, n: int, budget: float = 1.0
) -> int:
    """Keys and values of all rows and prompts, what sampling needs, and one layer of a prefill."""
    text, tokens = config.text_config, rows * work.new_tokens + rows // n * work.prompt_tokens
    cache, sampling = tokens * cache_token_bytes(config, dtype), rows * text.vocab_size * SAMPLING_BYTES
    layer = 6 * text.hidden_size + 3 * text.intermediate_size
    prefill = min(max(int(PREFILL_TOKENS * budget), work.prompt_tokens), rows // n * work.prompt_tokens)
    return cache + sampling + prefill * layer * dtype.itemsize


def largest_batch(work: Work, budget: float = 1.0) -> tuple[int, int]:
    """How many rows of how many tokens are forwarded and differentiated together at most (see
    `packing.pack`)."""
    group = work.prompt_tokens + work.group_size * (work.new_tokens - 1)
    row = min(group, max(int(ROW_TOKENS * budget), work.prompt_tokens + work.new_tokens - 1))
    rows = min(BATCH_TOKENS * budget // row, BATCH_IMAGE_TOKENS * budget // work.image_tokens)
    return min(max(1, int(rows)), work.questions), row


def activation_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    work: Work,
    checkpointing: bool,
    device: str,
    sizes: dict[str, int],
    budget: float = 1.0,
) -> int:
    """What the backward pass keeps at most (see the top); shorter completions put more images in a batch."""
    lengths = sorted({max(1, work.new_tokens * i // 32) for i in range(1, 33)})
    works = [replace(work, new_tokens=length) for length in lengths]
    return max(batch_bytes(config, dtype, each, checkpointing, device, sizes, budget) for each in works)


def batch_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    work: Work,
    checkpointing: bool,
    device: str,
    sizes: dict[str, int],
    budget: float = 1.0,
) -> int:
    """The same for the largest batch of completions that all have `work.new_tokens` tokens.

    sizes: of what is trained. A frozen image encoder is done with before, and a frozen output matrix has no
    gradient.
    """
    rows, row = largest_batch(work, budget)
    text, vision = config.text_config, config.vision_config
    patches = vision.spatial_merge_size**2 * rows * work.image_tokens
    of_token, of_patch = (a * dtype.itemsize + 4 * b for a, b in FAMILIES[config.model_type].kept(config))

    text_layer = rows * row * of_token
    depth = vision.depth if any("visual" in name for name in sizes) else 0
    vision_layer = patches * of_patch if depth else 0
    mask = rows * row * row * (1 + dtype.itemsize)  # of what sees what, and what is added to scores
    # In no layer: the last norm, the states that predict and their gradient; pixels and the merger.
    ends = rows * row * text.hidden_size * (3 * dtype.itemsize + 2 * 4)
    later = len(getattr(vision, "deepstack_visual_indexes", ()))  # features besides the last layer's
    ends += 2 * later * rows * row * text.hidden_size * dtype.itemsize
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ends += patches * (pixels + 6 * (1 + later) * vision.hidden_size) * dtype.itemsize if depth else 0
    matrix = text.vocab_size * text.hidden_size * dtype.itemsize  # the gradient of the output matrix
    matrix = matrix if any("embed_tokens" in name for name in sizes) else 0
    predicted = rows * min(work.group_size * work.new_tokens, row)  # tokens of completions
    made = min(max(int(LOGITS[device] * budget), text.vocab_size), predicted * text.vocab_size)
    forward = made * (4 + 4)  # logits in float32 and their exponentials
    backward = made * (4 + (0 if dtype == torch.float32 else dtype.itemsize)) + matrix  # and a cast of them
    logits = max(forward, backward)
    if not checkpointing:
        return ends + mask + text.num_hidden_layers * text_layer + depth * vision_layer + logits
    inputs = text.num_hidden_layers * rows * row * text.hidden_size + depth * patches * vision.hidden_size
    one_layer = max(text_layer, vision_layer, matrix) + matrix
    return ends + mask + inputs * dtype.itemsize + max(one_layer, logits)

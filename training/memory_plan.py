"""The plan: how much memory each moment of an iteration takes, before anything is loaded.

A role in training has, per parameter, a float32 master, a float32 gradient and AdamW's two float32 moments:
16 bytes, shared by the processes, and in the computer's memory with --offload. Of the sharded model a layer
at a time is there in whole, in the dtype it computes in, and all that is in no layer (embeddings, the output
matrix, what merges patches). The plain copies (both roles, and the reference) are in the computer's memory,
and on a GPU only while they work. One process in float32 trains its plain copy itself, which then stays.

An update has several moments that may take most: the logits, a layer's backward pass, that of the embeddings,
and the end, when FSDP2 reduces the gradients of what is in no layer (`batch_moments`, `whole_layers`). What
autograd keeps of a token or patch was found with `saved_tensors_hooks` in transformers 5.23 (`kept` in
families/). A test compares the total with the peak of an update: 15% at most between them.
"""

import json
from dataclasses import dataclass, replace
from functools import cache

import torch
from transformers import PreTrainedConfig

from model import lora
from model.decode import CPU_CACHE_BYTES, SAMPLING_BYTES, cache_token_bytes
from model.families import FAMILIES
from model.generate import PREFILL_TOKENS
from model.logprobs import LOGITS
from model.packing import BATCH_IMAGE_TOKENS, BATCH_TOKENS, ROW_TOKENS

USABLE = 0.95  # of a GPU's memory: a twentieth is left for what nobody planned


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
    batch_scale: float = 1.0,
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
    sharing = ranks if sharded else None
    update = update_parts(config, dtype, sizes, work, checkpointing, device, sharing, batch_scale)
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
        cache = cache_bytes(config, dtype, work, rows, n, device_bytes, sum(parts.values()), batch_scale)
        return Moment(name, parts | {"cache": cache})

    answers, G = work.questions * work.answers, work.group_size
    return [
        rollouts("Questioner's phase, asking", "questioner", work.questions, G, True),
        rollouts("Questioner's phase, answering", "reasoner", answers, work.answers, True),
        Moment("an update, in both phases", stays | in_training | update),
        rollouts("curation", "reasoner", answers, work.answers, False),
        rollouts("Reasoner's phase, answering", "reasoner", work.questions, G, True),
    ]


def fits(device_bytes: int, config: PreTrainedConfig, dtype: torch.dtype, work: Work, **flags) -> bool:
    """Returns true if every moment fits. flags: the other arguments of `memory_plan`."""
    moments = memory_plan(config, dtype, device_bytes, work, **flags)
    return max(moment.total for moment in moments) <= USABLE * device_bytes


def fit_batches(device_bytes: int | None, *inputs, **flags) -> float:
    """Returns the fraction of the usual batch size with which every moment fits: 1, 1/2, ... 1/64.

    A GPU with less memory forwards and differentiates fewer tokens at a time. device_bytes: what is free of
    it; None on a CPU, where it is 1. inputs, flags: see `fits`. It is 1/64, too, if nothing fits.
    """
    if device_bytes is None:
        return 1.0
    for halvings in range(7):
        batch_scale = 0.5**halvings
        if fits(device_bytes, *inputs, **flags, batch_scale=batch_scale):
            break
    return batch_scale


def update_parts(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    sizes: dict[str, int],
    work: Work,
    checkpointing: bool,
    device: str,
    ranks: int | None,
    batch_scale: float = 1.0,
) -> dict[str, int]:
    """Returns what an update takes besides weights, gradients and moments, where it takes most.

    sizes: of what is trained. ranks: how many share it; None: the plain copy is trained.
    """
    activations = activation_moments(config, dtype, work, checkpointing, device, sizes, batch_scale) | {
        "end": 0
    }
    whole = whole_layers(config, dtype, sizes, ranks) if ranks else dict.fromkeys(activations, 0)
    most = max(activations, key=lambda name: activations[name] + whole[name])
    return {"whole layers": whole[most], "activations": activations[most]}


def whole_layers(
    config: PreTrainedConfig, dtype: torch.dtype, sizes: dict[str, int], ranks: int
) -> dict[str, int]:
    """Returns the weights and gradients that FSDP2 holds in whole, in bytes, by moment.

    After a layer's backward pass its gradients are copied into a float32 buffer, which is summed over the
    ranks into another. The first buffer stays until the next layer gets that far. With several ranks the next
    layer's weights are fetched meanwhile. What is in no layer stays throughout, and is reduced last.
    """
    rest, layer = layer_sizes(sizes)
    size, buffer, text = dtype.itemsize, 4 * layer, config.text_config
    weights = rest + layer * (1 if ranks == 1 else 2)
    matrix = text.vocab_size * text.hidden_size * size if any("embed_tokens" in name for name in sizes) else 0
    # The plain copy adds the gradient of an output matrix of its own at once; here it waits for the end.
    waiting = 0 if config.tie_word_embeddings else matrix
    first_gradient = min(layer, text.hidden_size * text.intermediate_size) * size
    return {
        "logits": rest * size,
        "text layer": weights * size + buffer + first_gradient + waiting,
        "end of a text layer": weights * size + buffer + layer * size + waiting,
        "embeddings": rest * size + buffer + waiting,
        "image layer": weights * size + buffer + matrix + waiting,
        "end": rest * max(size + 4, 4 + -(-4 // ranks)),
    }


def cache_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    work: Work,
    rows: int,
    n: int,
    device_bytes: int | None,
    taken: int,
    batch_scale: float = 1.0,
) -> int:
    """What rollouts take beside weights: half of what is free, at least what a prompt with n rows needs."""
    free = CPU_CACHE_BYTES if device_bytes is None else max(0, device_bytes - taken) // 2
    least, most = (rollout_bytes(config, dtype, work, count, n, batch_scale) for count in (n, rows))
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
    config: PreTrainedConfig, dtype: torch.dtype, work: Work, rows: int, n: int, batch_scale: float = 1.0
) -> int:
    """Keys and values of all rows and prompts, what sampling needs, and one layer of a prefill."""
    text, tokens = config.text_config, rows * work.new_tokens + rows // n * work.prompt_tokens
    cache, sampling = tokens * cache_token_bytes(config, dtype), rows * text.vocab_size * SAMPLING_BYTES
    layer = 6 * text.hidden_size + 3 * text.intermediate_size
    prefill = min(max(int(PREFILL_TOKENS * batch_scale), work.prompt_tokens), rows // n * work.prompt_tokens)
    return cache + sampling + prefill * layer * dtype.itemsize


def largest_batch(work: Work, batch_scale: float = 1.0) -> tuple[int, int]:
    """How many rows of how many tokens are forwarded and differentiated together at most (see
    `packing.pack`)."""
    group = work.prompt_tokens + work.group_size * (work.new_tokens - 1)
    row = min(group, max(int(ROW_TOKENS * batch_scale), work.prompt_tokens + work.new_tokens - 1))
    rows = min(BATCH_TOKENS * batch_scale // row, BATCH_IMAGE_TOKENS * batch_scale // work.image_tokens)
    return min(max(1, int(rows)), work.questions), row


def activation_moments(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    work: Work,
    checkpointing: bool,
    device: str,
    sizes: dict[str, int],
    batch_scale: float = 1.0,
) -> dict[str, int]:
    """Returns the most that each moment of a batch takes; shorter completions put more images in a batch."""
    most: dict[str, int] = {}
    for length in sorted({max(1, work.new_tokens * i // 32) for i in range(1, 33)}):
        shorter = replace(work, new_tokens=length)
        moments = batch_moments(config, dtype, shorter, checkpointing, device, sizes, batch_scale)
        most = {name: max(value, most.get(name, 0)) for name, value in moments.items()}
    return most


def batch_moments(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    work: Work,
    checkpointing: bool,
    device: str,
    sizes: dict[str, int],
    batch_scale: float = 1.0,
) -> dict[str, int]:
    """Returns the bytes of activations and their gradients at the moments of the largest batch.

    All completions have `work.new_tokens` tokens. sizes: of what is trained. A frozen image encoder is done
    with before, and a frozen embedding has no gradient.
    """
    rows, row = largest_batch(work, batch_scale)
    text, vision, size = config.text_config, config.vision_config, dtype.itemsize
    encoder = any("visual" in name for name in sizes)
    tokens = rows * row
    patches = vision.spatial_merge_size**2 * rows * work.image_tokens if encoder else 0
    text_layer, image_layer, merged = kept_bytes(config, dtype, sizes)
    states = tokens * text.hidden_size * size
    later = len(getattr(vision, "deepstack_visual_indexes", ()))  # features besides the last layer's
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    # Kept until the backward pass has come by: of the image encoder, and of the text model.
    of_image = patches * vision.hidden_size * size if checkpointing else patches * image_layer
    of_token = states if checkpointing else tokens * text_layer
    seen = vision.depth * of_image + patches * (pixels * size + merged)
    mask = tokens * row * (1 + size)  # of what sees what, and what is added to scores
    read = seen + text.num_hidden_layers * of_token + later * states + mask

    # A layer that is differentiated: made again if it was not kept, its MLP's gradients, and its states'.
    in_text = states + 2 * tokens * text.intermediate_size * size
    in_image = patches * (vision.hidden_size + 2 * vision.intermediate_size) * size
    if checkpointing:
        in_text += tokens * text_layer
        in_image += patches * image_layer

    # An output matrix that embeds tokens, too, waits for its second gradient, and is added to in place.
    matrix = text.vocab_size * text.hidden_size * size if any("embed_tokens" in name for name in sizes) else 0
    waiting = matrix if config.tie_word_embeddings else 0
    moments = {
        "logits": read + logits_bytes(config, dtype, work, tokens, row, device, matrix, batch_scale),
        "text layer": read + in_text + waiting,
        "end of a text layer": read - (0 if checkpointing else tokens * text_layer) + states + waiting,
        "embeddings": seen + matrix + waiting + (1 + later) * states,
    }
    return moments | ({"image layer": seen + in_image} if encoder else {})


def kept_bytes(config: PreTrainedConfig, dtype: torch.dtype, sizes: dict[str, int]) -> list[int]:
    """Returns the bytes that autograd keeps of a token in a text layer, of a patch in a layer and beyond."""
    kept = FAMILIES[config.model_type].kept(config)
    if not any("language_model" in name and "norm" in name for name in sizes):
        # A frozen norm keeps its input, but not what it multiplies with its weight.
        plain, norms = kept["text layer"]
        kept["text layer"] = (plain - norms, norms)
    return [plain * dtype.itemsize + 4 * norms for plain, norms in kept.values()]


def logits_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    work: Work,
    tokens: int,
    row: int,
    device: str,
    matrix: int,
    batch_scale: float,
) -> int:
    """Returns what stands between the last layer and the loss (see `packing.TargetLogprobs`)."""
    width, words = config.text_config.hidden_size, config.text_config.vocab_size
    predicted = tokens // row * min(work.group_size * work.new_tokens, row)  # tokens of completions
    made = min(max(int(LOGITS[device] * batch_scale), words), predicted * words)
    forward = made * (4 + 4)  # logits in float32 and their exponentials
    backward = made * (4 + (0 if dtype == torch.float32 else dtype.itemsize)) + matrix  # and a cast of them
    # The last norm's input in float32, its result before and after its weight, and the states that predict.
    states = tokens * width * (4 + 2 * dtype.itemsize) + 2 * predicted * width * dtype.itemsize
    return states + max(forward, backward)

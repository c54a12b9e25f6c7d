"""Plans how much memory each moment of an iteration takes, before anything is loaded.

    bytes of a moment = frozen weights + plain copies of roles + what is in training + what works

A role in training has, per parameter, a float32 master, a float32 gradient and AdamW's two float32 moments:
16 bytes, shared by the processes, and in the computer's memory with --offload. Of the sharded model a layer
at a time is there in whole, in the dtype it computes in, and all that is in no layer (embeddings, the output
matrix, what merges patches). The plain copies (both roles, and the reference) are in the computer's memory,
and on a GPU only while they work. One process in float32 trains its plain copy itself, which then stays.

An update has several moments that may take most: the logits, a layer's backward pass, that of the embeddings,
and the end, when FSDP2 reduces the gradients of what is in no layer (`batch_moments`, `whole_layers`). What
autograd keeps of a token or patch was found with `saved_tensors_hooks` in transformers 5.23: see
`count_activations` in the files of the families. A test compares the total with the peak of an update: 15% at
most between them.
"""

import json
import re
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

GIB = 2**30
LAYER = re.compile(r"\w+\.(layers|blocks)\.\d+")  # in the name of a parameter
OFFLOADED = 4.0  # times the usual batch size with --offload
SMALLEST = 1 / 64  # of the usual batch size
USABLE = 0.95  # of a GPU's memory: a twentieth is left for what nobody planned
Sizes = dict[str, int]  # elements of each parameter, or bytes of each part


@dataclass(frozen=True)
class Work:
    """The work of a step."""

    image_tokens: int  # of an image
    text_tokens: int  # of the text around it
    new_tokens: int  # of the longest completion
    group_size: int  # the paper's G
    questions: int  # in a step
    answers: int  # to each question, the paper's m

    @property
    def prompt_tokens(self) -> int:
        """Counts the tokens before the first that is generated."""
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class Case:
    """A case to plan for: a model, the part of it that is trained, and the work of one rank."""

    config: PreTrainedConfig
    dtype: torch.dtype  # that it computes in
    work: Work
    sizes: Sizes  # elements of each parameter that is trained, by name
    checkpointing: bool
    device: str  # "cpu" or "cuda"
    shards: int | None = None  # ranks that share the role in training; None: its copy is trained
    batch_scale: float = 1.0  # fraction of the usual batch size

    @property
    def embedding_bytes(self) -> int:
        """Returns the bytes of the matrix that embeds tokens, 0 if it is not trained."""
        if not any("embed_tokens" in name for name in self.sizes):
            return 0
        text = self.config.text_config
        return text.vocab_size * text.hidden_size * self.dtype.itemsize


@dataclass(frozen=True)
class Moment:
    """A moment of the loop, and what is in memory then."""

    name: str
    parts: Sizes  # name of the part -> bytes

    @property
    def total(self) -> int:
        """Adds up all parts, in bytes."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size)
        return f"{self.total / GIB:.2f} GiB ({parts})"


def parameter_sizes(config: PreTrainedConfig) -> Sizes:
    """Counts the elements of each parameter of a model of this shape, by name; no weights are made."""
    return trained_sizes(config, 0, False)


def trained_sizes(config: PreTrainedConfig, lora_rank: int, freeze_vision: bool) -> Sizes:
    """Counts the elements of each parameter that is trained, by name."""
    return _trained_sizes(config.to_json_string(use_diff=False), lora_rank, freeze_vision)


@cache
def _trained_sizes(config: str, lora_rank: int, freeze_vision: bool) -> Sizes:
    fields = json.loads(config)
    kind = FAMILIES[fields["model_type"]].MODEL
    with torch.device("meta"):
        model = kind(kind.config_class(**fields))
        if lora_rank:
            lora.add_lora(model, lora_rank)
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


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
    """Returns the moments of one iteration that take most memory, on one GPU of `ranks`.

    device_bytes: of the GPU; None on a CPU. work: of all ranks. batch_scale: see `fit_batches`.
    """
    on_gpu = device_bytes is not None
    sizes = trained_sizes(config, lora_rank, freeze_vision)
    work = replace(work, questions=_divide_up(work.questions, ranks))
    copy_dtype = torch.float32 if lora_rank else dtype
    sharded = ranks > 1 or offload or copy_dtype != torch.float32
    device = "cuda" if on_gpu else "cpu"
    shards = ranks if sharded else None
    case = Case(config, dtype, work, sizes, checkpointing, device, shards, batch_scale)
    in_training, update = training_parts(case, offloaded=on_gpu and offload)

    # A plain copy is what is trained; what is frozen is there once, for all of them.
    copy = sum(sizes.values()) * copy_dtype.itemsize
    frozen = sum(parameter_sizes(config).values()) * dtype.itemsize
    if not lora_rank:
        frozen -= copy
    base = {"frozen weights": frozen}

    # What stays while nothing works: on a CPU all copies, on a GPU the one that is trained itself.
    if not on_gpu:
        base = base | {"questioner": copy, "reasoner": copy}
        stays = base | {"reference": copy}
    elif sharded:
        stays = base
    else:
        stays = base | {"trained role": copy}

    def rollouts(name: str, role: str, rows: int, n: int, training: bool = True) -> Moment:
        parts = stays | in_training if training else base
        if "trained role" not in parts or not name.startswith(role.title()):
            parts = parts | {role: copy}
        return Moment(
            name, parts | rollout_parts(case, parts, device_bytes, rows, n, lora_rank > 0)
        )

    questions = work.questions
    answers = work.questions * work.answers
    return [
        rollouts("Questioner's phase, asking", "questioner", questions, work.group_size),
        rollouts("Questioner's phase, answering", "reasoner", answers, work.answers),
        Moment("an update, in both phases", stays | in_training | update),
        rollouts("curation", "reasoner", answers, work.answers, training=False),
        rollouts("Reasoner's phase, answering", "reasoner", questions, work.group_size),
    ]


def fits(
    device_bytes: int, config: PreTrainedConfig, dtype: torch.dtype, work: Work, **flags
) -> bool:
    """Returns true if every moment fits. flags: the other arguments of `memory_plan`."""
    moments = memory_plan(config, dtype, device_bytes, work, **flags)
    return max(moment.total for moment in moments) <= USABLE * device_bytes


def fit_batches(device_bytes: int | None, *inputs, **flags) -> float:
    """Returns the fraction of the usual batch size with which every moment fits: 1, 1/2, ... 1/64.

    A GPU with less memory forwards and differentiates fewer tokens at a time. With --offload all weights come
    to the GPU and go again for each batch, so there it may be 4, too. device_bytes: what is free of it; None
    on a CPU, where it is 1. inputs, flags: see `fits`. It is 1/64, too, if nothing fits.
    """
    if device_bytes is None:
        return 1.0
    batch_scale = OFFLOADED if flags.get("offload") else 1.0
    while batch_scale > SMALLEST:
        if fits(device_bytes, *inputs, **flags, batch_scale=batch_scale):
            break
        batch_scale /= 2
    return batch_scale


def training_parts(case: Case, offloaded: bool) -> tuple[Sizes, Sizes]:
    """Returns what the role in training takes throughout its phase, and what an update takes besides.

    offloaded: masters, gradients and moments are in the computer's memory.
    """
    update = update_parts(case)
    if offloaded:
        return {}, update | {"gradients": 0}
    own = _divide_up(sum(case.sizes.values()), case.shards or 1)  # elements of this rank
    masters = 4 * own if case.shards else 0
    return {"float32 masters": masters, "AdamW's moments": 8 * own}, update | {"gradients": 4 * own}


def update_parts(case: Case) -> Sizes:
    """Returns what an update takes besides weights, gradients and moments, where it takes most."""
    activations = activation_moments(case)
    activations["end"] = 0
    whole = whole_layers(case) if case.shards else dict.fromkeys(activations, 0)
    most = max(activations, key=lambda name: activations[name] + whole[name])
    return {"whole layers": whole[most], "activations": activations[most]}


def whole_layers(case: Case) -> Sizes:
    """Returns the weights and gradients that FSDP2 holds in whole, in bytes, by moment.

    After a layer's backward pass its gradients are copied into a float32 buffer, which is summed over the
    ranks into another. The first buffer stays until the next layer gets that far. With several ranks the next
    layer's weights are fetched meanwhile. What is in no layer stays throughout, and is reduced last.
    """
    rest, layer = layer_sizes(case.sizes)
    size = case.dtype.itemsize
    text = case.config.text_config
    weights = (rest + layer * (1 if case.shards == 1 else 2)) * size
    buffer = 4 * layer
    matrix = case.embedding_bytes
    # The plain copy adds the gradient of an output matrix of its own at once; here it waits for the end.
    waiting = buffer if case.config.tie_word_embeddings else buffer + matrix
    first_gradient = min(layer, text.hidden_size * text.intermediate_size) * size
    return {
        "logits": rest * size,
        "text layer": weights + first_gradient + waiting,
        "end of a text layer": weights + layer * size + waiting,
        "embeddings": rest * size + waiting,
        "image layer": weights + matrix + waiting,
        "end": rest * max(size + 4, 4 + _divide_up(4, case.shards)),
    }


def host_plan(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    offload: bool,
    ranks: int = 1,
    lora_rank: int = 0,
    freeze_vision: bool = False,
) -> Moment:
    """Returns what a process with a GPU keeps in the computer's memory: plain copies, and what is offloaded.

    It is pinned, and pinned memory is rounded up to a power of two: of a copy as one, of masters and
    gradients each tensor's.
    """
    sizes = trained_sizes(config, lora_rank, freeze_vision).values()
    itemsize = 4 if lora_rank else dtype.itemsize
    parts = {"three plain copies": 3 * _power_of_two(sum(sizes) * itemsize)}
    if offload:
        shards = [_divide_up(4 * size, ranks) for size in sizes]
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
    """Returns what the run folder takes at most, besides images and lists.

    stored: the dtype of exports, the base's. saves: how many states are saved within a phase.
    Of what is trained a state has the base's weights as they were stored, float32 weights of both roles and
    of the reference, and AdamW's two moments.
    Two states are kept while a third is written, and share what has not changed; one more than `saves` is
    counted, as Ctrl-C saves another. An export is written beside the one that it replaces.
    """
    trained = sum(trained_sizes(config, lora_rank, freeze_vision).values())
    whole = sum(parameter_sizes(config).values()) * stored.itemsize
    base = trained * (4 if lora_rank else stored.itemsize)
    # Reference and other role once; of each state the role in training and its moments.
    states = base + 4 * trained * (2 + 3 * min(3, saves + 1))
    return Moment("on the disk, at most", {"states": states, "checkpoints": 3 * whole})


def _power_of_two(size: int) -> int:
    """Rounds up to a power of two."""
    return 1 << (size - 1).bit_length()


def _divide_up(size: int, parts: int) -> int:
    """Divides, and rounds up."""
    return -(-size // parts)


def layer_sizes(sizes: Sizes) -> tuple[int, int]:
    """Counts the elements of all that is in no layer (embeddings, output matrix), and of the largest layer.

        model.language_model.layers.11.mlp.up_proj.weight    layer language_model.layers.11
        model.visual.blocks.3.norm1.weight                   layer visual.blocks.3
        lm_head.weight                                       in no layer

    Returns (rest, layer).
    """
    rest = 0
    layers: Sizes = {}
    for name, size in sizes.items():
        found = LAYER.search(name)
        if found is None:
            rest += size
        else:
            layers[found[0]] = layers.get(found[0], 0) + size
    return rest, max(layers.values())


def rollout_parts(
    case: Case, others: Sizes, device_bytes: int | None, rows: int, n: int, lora: bool
) -> Sizes:
    """Returns what a rollout takes besides `others`: half of what is free, but enough for n rows."""
    parts = {}
    free = CPU_CACHE_BYTES
    if device_bytes is not None:
        free = max(0, device_bytes - sum(others.values())) // 2
        if lora and (merged := merged_bytes(case.config, case.dtype)) <= free // 5:
            parts = {"merged weights": merged}
            free -= merged // 2
    parts["cache"] = max(rollout_bytes(case, n, n), min(rollout_bytes(case, rows, n), free))
    return parts


def patches_bytes(config: PreTrainedConfig, image_tokens: int) -> int:
    """Returns the bytes of an image's patches, in float32, as they wait in the computer's memory."""
    vision = config.vision_config
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return 4 * pixels * vision.spatial_merge_size**2 * image_tokens


def merged_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Returns the bytes of weights that LoRA changes, which a rollout merges (see `decode.make_products`)."""
    linear = re.compile(r"language_model\.layers\..*proj\.weight")
    sizes = parameter_sizes(config).items()
    return sum(size for name, size in sizes if linear.search(name)) * dtype.itemsize


def rollout_bytes(case: Case, rows: int, n: int) -> int:
    """Returns the bytes of a rollout: the KV cache, what sampling needs, and one layer of a prefill.

    rows: completions that are sampled together, n of each prompt. An image's keys are there once for n rows
    at most, and each row has those of its prompt's text.
    """
    text = case.config.text_config
    work = case.work
    prompt_tokens = rows // n * work.prompt_tokens
    tokens = rows // n * work.image_tokens + rows * (work.text_tokens + work.new_tokens)
    cache = tokens * cache_token_bytes(case.config, case.dtype)
    sampling = rows * text.vocab_size * SAMPLING_BYTES
    layer = (6 * text.hidden_size + 3 * text.intermediate_size) * case.dtype.itemsize  # of a token
    prefilled = min(prompt_tokens, max(int(PREFILL_TOKENS * case.batch_scale), work.prompt_tokens))
    return cache + sampling + prefilled * layer


def largest_batch(work: Work, batch_scale: float = 1.0) -> tuple[int, int]:
    """Returns how many rows of how many tokens are forwarded together at most (see `packing.pack`)."""
    group = work.prompt_tokens + work.group_size * (work.new_tokens - 1)
    row = min(group, max(int(ROW_TOKENS * batch_scale), work.prompt_tokens + work.new_tokens - 1))
    by_tokens = int(BATCH_TOKENS * batch_scale // row)
    by_images = int(BATCH_IMAGE_TOKENS * batch_scale // work.image_tokens)
    rows = max(1, min(by_tokens, by_images))
    return min(rows, work.questions), row


def activation_moments(case: Case) -> Sizes:
    """Returns the most that each moment of a batch takes; shorter completions put more images in a batch."""
    most: Sizes = {}
    lengths = {max(1, case.work.new_tokens * i // 32) for i in range(1, 33)}
    for length in lengths:
        moments = batch_moments(replace(case, work=replace(case.work, new_tokens=length)))
        most = {name: max(value, most.get(name, 0)) for name, value in moments.items()}
    return most


def batch_moments(case: Case) -> Sizes:
    """Returns the bytes of activations and their gradients at the moments of the largest batch.

    All completions have `work.new_tokens` tokens. A frozen image encoder is done with before, and a frozen
    embedding has no gradient.
    """
    rows, row = largest_batch(case.work, case.batch_scale)
    text = case.config.text_config
    vision = case.config.vision_config
    size = case.dtype.itemsize
    encoder = any("visual" in name for name in case.sizes)
    tokens = rows * row
    patches = vision.spatial_merge_size**2 * rows * case.work.image_tokens if encoder else 0
    text_layer, image_layer, merged = kept_bytes(case)
    states = tokens * text.hidden_size * size
    patch_states = patches * vision.hidden_size * size
    later = len(getattr(vision, "deepstack_visual_indexes", ()))  # features of middle layers

    # Kept until the backward pass has come by: of the image encoder, and of the text model.
    kept_text = states if case.checkpointing else tokens * text_layer
    kept_image = patch_states if case.checkpointing else patches * image_layer
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    seen = vision.depth * kept_image + patches * (pixels * size + merged)
    mask = tokens * row * (1 + size)  # of what sees what, and what is added to scores
    read = seen + text.num_hidden_layers * kept_text + later * states + mask

    # A layer that is differentiated: made again if it was not kept, its MLP's gradients, and its states'.
    in_text = states + 2 * tokens * text.intermediate_size * size
    in_image = patch_states + 2 * patches * vision.intermediate_size * size
    ended = read + states
    if case.checkpointing:
        in_text += tokens * text_layer
        in_image += patches * image_layer
    else:
        ended -= tokens * text_layer

    # An output matrix that embeds tokens, too, waits for its second gradient, and is added to in place.
    matrix = case.embedding_bytes
    waiting = matrix if case.config.tie_word_embeddings else 0
    moments = {
        "logits": read + logits_bytes(case, tokens, row),
        "text layer": read + in_text + waiting,
        "end of a text layer": ended + waiting,
        "embeddings": seen + matrix + waiting + (1 + later) * states,
    }
    if encoder:
        moments["image layer"] = seen + in_image
    return moments


def kept_bytes(case: Case) -> list[int]:
    """Returns the bytes that autograd keeps of a token in a text layer, of a patch in a layer and beyond."""
    kept = FAMILIES[case.config.model_type].count_activations(case.config)
    if not any("language_model" in name and "norm" in name for name in case.sizes):
        # A frozen norm keeps its input, but not what it multiplies with its weight.
        plain, norms = kept["text layer"]
        kept["text layer"] = (plain - norms, norms)
    return [plain * case.dtype.itemsize + 4 * norms for plain, norms in kept.values()]


def logits_bytes(case: Case, tokens: int, row: int) -> int:
    """Returns what stands between the last layer and the loss (see `logprobs.TargetLogprobs`)."""
    width = case.config.text_config.hidden_size
    words = case.config.text_config.vocab_size
    size = case.dtype.itemsize
    completions = case.work.group_size * case.work.new_tokens
    predicted = tokens // row * min(completions, row)  # tokens of completions
    made = min(predicted * words, max(int(LOGITS[case.device] * case.batch_scale), words))
    # Forward: logits in float32 and their exponentials. Backward: their gradient, and a cast of it.
    forward = made * (4 + 4)
    backward = made * (4 if case.dtype == torch.float32 else 4 + size) + case.embedding_bytes
    # The last norm's input in float32, its result before and after its weight, and the states that predict.
    states = tokens * width * (4 + 2 * size) + 2 * predicted * width * size
    return states + max(forward, backward)

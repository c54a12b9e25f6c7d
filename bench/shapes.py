"""What the benchmarks share: random models of the published shapes, groups of a given size, timing."""

import argparse
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import grpo
from model.checkpoint import open_checkpoint
from model.families import FAMILIES
from model.prompt import Patches, Prompt, rope_positions
from model.vlm import VLM

# ---- Models ------------------------------------------------------------------------------------------------


def text_shape(hidden: int, mlp: int, layers: int, heads: int, key_heads: int) -> dict:
    """The shape of a text model, under transformers' names."""
    heads = dict(num_attention_heads=heads, num_key_value_heads=key_heads)
    return dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers) | heads


def vision_shape(hidden: int, mlp: int, depth: int, heads: int, full: list[int]) -> dict:
    """The shape of an image encoder; full: the blocks in which a patch sees more than its window."""
    attention = dict(num_heads=heads, fullatt_block_indexes=full)
    return dict(hidden_size=hidden, intermediate_size=mlp, depth=depth) | attention


PUBLISHED_VISION = vision_shape(1280, 3420, 32, 16, [7, 15, 23, 31])
# Text, vision, vocabulary, whether input and output embeddings are one matrix. "3b" and "7b" are as in the
# config.json of Qwen2.5-VL; "small" has their proportions and 25 million parameters.
SHAPES = {
    "tiny": (text_shape(64, 128, 2, 4, 2), vision_shape(32, 64, 2, 2, [1]), 512, True),
    "small": (text_shape(384, 1408, 8, 6, 2), vision_shape(256, 684, 5, 4, [2, 4]), 8192, True),
    "3b": (text_shape(2048, 11008, 36, 16, 2), PUBLISHED_VISION, 151_936, True),
    "7b": (text_shape(3584, 18944, 28, 28, 4), PUBLISHED_VISION, 152_064, False),
}


def text_shape_3(
    hidden: int, mlp: int, layers: int, heads: int, key_heads: int = 8, head_dim: int = 128
) -> dict:
    """The shape of Qwen3-VL's text model: the width of a head does not follow from the others."""
    return text_shape(hidden, mlp, layers, heads, key_heads) | dict(head_dim=head_dim)


def vision_shape_3(hidden: int, mlp: int, depth: int, heads: int, deepstack: list[int]) -> dict:
    """The shape of Qwen3-VL's image encoder; deepstack: the blocks whose features the text model gets."""
    width = dict(hidden_size=hidden, intermediate_size=mlp, depth=depth, num_heads=heads)
    return width | dict(deepstack_visual_indexes=deepstack)


VISION_TINY = vision_shape_3(32, 64, 3, 2, [0, 1])
VISION_SMALL = vision_shape_3(256, 1024, 5, 4, [1, 2, 3])
VISION_2B = vision_shape_3(1024, 4096, 24, 16, [5, 11, 17])
VISION_8B = vision_shape_3(1152, 4304, 27, 16, [8, 16, 24])
# The same for Qwen3-VL; "qwen3-small" has the proportions of 4B and 26 million parameters.
SHAPES_3 = {
    "qwen3-tiny": (text_shape_3(64, 128, 3, 4, 2, 32), VISION_TINY, 512, True),
    "qwen3-small": (text_shape_3(320, 1216, 8, 8, 2, 64), VISION_SMALL, 8192, True),
    "qwen3-2b": (text_shape_3(2048, 6144, 28, 16), VISION_2B, 151_936, True),
    "qwen3-4b": (text_shape_3(2560, 9728, 36, 32), VISION_2B, 151_936, True),
    "qwen3-8b": (text_shape_3(4096, 12288, 36, 32), VISION_8B, 151_936, False),
}
SIZES = (*SHAPES, *SHAPES_3)
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def shape_config(size: str, vocab_size: int = 0) -> PreTrainedConfig:
    """The configuration of a model of this shape; its last five words are the special tokens."""
    third = size in SHAPES_3
    text, vision, published, tied = (SHAPES_3 if third else SHAPES)[size]
    vocab_size = vocab_size or published
    *special, end = [vocab_size - i for i in range(1, 6)]
    head_dim = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    if third:
        sections = [head_dim // 16 * 3, head_dim // 32 * 5, head_dim // 32 * 5]  # 24, 20, 20 of 64
        rope = dict(rope_theta=5e6, mrope_section=sections, mrope_interleaved=True)
        patches = dict(patch_size=16, num_position_embeddings=2304)
    else:
        sections = [
            head_dim // 8,
            head_dim // 16 * 3,
            head_dim // 16 * 3,
        ]  # 16, 24, 24 of 64, as published
        rope = dict(rope_theta=1e6, mrope_section=sections)
        patches = dict(patch_size=14, window_size=112)
    text = text | dict(vocab_size=vocab_size, rope_parameters=dict(rope_type="default") | rope)
    text |= dict(
        eos_token_id=end, bos_token_id=end, pad_token_id=end, max_position_embeddings=32768
    )
    vision = vision | patches | dict(spatial_merge_size=2, out_hidden_size=text["hidden_size"])
    ids = dict(zip(SPECIAL, special))
    kind = FAMILIES["qwen3_vl" if third else "qwen2_5_vl"].MODEL.config_class
    config = kind(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    config._attn_implementation = "sdpa"
    return config


def random_vlm(size: str, device: str, dtype: str, vocab_size: int = 0) -> VLM:
    """A model with random weights, made on its device, whose images are cut as the model reads them.

    The toy's tokenizer stands in, as no word matters.
    """
    config = shape_config(size, vocab_size)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = FAMILIES[config.model_type].MODEL(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    ends = [config.text_config.eos_token_id]  # as `model.generate` has it
    toy = open_checkpoint(ROOT / "toy")
    cut = toy.image_processor.to_dict() | dict(patch_size=config.vision_config.patch_size)
    opened = replace(
        toy, config=config, end_ids=ends, image_processor=type(toy.image_processor)(**cut)
    )
    return VLM(model.eval(), opened)


def patch_pixels(vision: PreTrainedConfig) -> int:
    """How many numbers a patch has: colours, frames, and pixels of each."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


# ---- What they work on -------------------------------------------------------------------------------------


def random_prompt(vlm: VLM, tokens: int, seed: int, behind: int | None = None) -> Prompt:
    """A prompt of exactly so many tokens, about 85% of them one image; behind: tokens behind it, at most."""
    config, rng = vlm.model.config, torch.Generator().manual_seed(seed)
    side, start = image_side(tokens), 4
    if behind is not None:
        start = max(start, tokens - behind - 1 - side * side)
    end = start + side * side
    ids = torch.randint(10, config.text_config.vocab_size - 10, (tokens,), generator=rng)
    ids[start - 1], ids[end] = config.vision_start_token_id, config.vision_end_token_id
    ids[start:end] = config.image_token_id
    merge = config.vision_config.spatial_merge_size
    grid = torch.tensor([[1, merge * side, merge * side]])
    positions = rope_positions([start], grid.tolist(), merge, tokens)
    pixels = torch.randn(int(grid.prod()), patch_pixels(config.vision_config), generator=rng)
    return Prompt(ids, positions, (Patches(pixels, grid),), torch.arange(start, end))


def image_side(prompt_tokens: int) -> int:
    """How many image tokens are on each side of the square image of such a prompt."""
    return max(2, int((0.85 * prompt_tokens) ** 0.5))


def random_prompts(vlm: VLM, args: argparse.Namespace) -> list[Prompt]:
    """As many and as long as the flags say."""
    return [random_prompt(vlm, args.prompt_tokens, seed) for seed in range(args.prompts)]


def random_completions(vlm: VLM, group_size: int, tokens: int, seed: int) -> list[list[int]]:
    """The completions of one prompt, all equally long, without an end token."""
    rng, vocab_size = torch.Generator().manual_seed(seed), vlm.model.config.text_config.vocab_size
    return torch.randint(10, vocab_size - 10, (group_size, tokens), generator=rng).tolist()


def random_groups(vlm: VLM, args: argparse.Namespace) -> list[grpo.Group]:
    """As many and as large as the flags say; every other completion has the reward 1, the rest 0."""
    rewards = [float(i % 2) for i in range(args.group_size)]
    completions = [
        random_completions(vlm, args.group_size, args.new_tokens, seed)
        for seed in range(args.prompts)
    ]
    return [grpo.make_group(p, c, rewards) for p, c in zip(random_prompts(vlm, args), completions)]


TEMPLATES = (
    "How many {c} {s} are {p} the {d} {s}?",
    "Is the {s} {p} the {c} {s} {d}?",
    "What is the {c} thing {p} the {d} {s} called?",
)
WORDS = dict(
    c=["red", "green", "blue", "small", "large"],
    s=["dog", "car", "tree", "sign", "house"],
    p=["left of", "above", "behind"],
    d=["old", "new", "broken", "open", "closed", "wet"],
)


def random_questions(count: int, seed: int = 0) -> list[str]:
    """Questions made of a few templates and words: some alike, some not."""
    rng = random.Random(seed)
    return [
        rng.choice(TEMPLATES).format(**{k: rng.choice(v) for k, v in WORDS.items()})
        for _ in range(count)
    ]


# ---- Flags -------------------------------------------------------------------------------------------------


def arguments(description: str, **extra) -> argparse.Namespace:
    """The flags that all benchmarks know; `extra` adds integer flags with these defaults."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    add_model_flags(parser, "small", "cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(prompt_tokens=300, group_size=8, new_tokens=48, prompts=4, repeats=5) | extra
    add_counts(parser, sizes)
    return parse(parser)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; what cannot run here gets a sentence."""
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here")
    if args.prompt_tokens < 20:
        parser.error("--prompt-tokens must be at least 20: an image and some text")
    return args


def add_model_flags(parser: argparse.ArgumentParser, size: str, device: str) -> None:
    """Which model, where, in which dtype, with these defaults; and --json."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    parser.add_argument("--size", choices=SIZES, default=size, help="shape of the random model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="where it runs")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=dtype, help="of the weights"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )


def add_counts(parser: argparse.ArgumentParser, defaults: dict[str, int]) -> None:
    """A flag for each of these whole numbers."""
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=count, default=value, help=name.replace("_", " "))


def count(text: str) -> int:
    """A whole number of at least 1, from a command line."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# ---- Measuring ---------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Waits until the device has done all that it was told to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str) -> float:
    """How long the work takes, until the device has done it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def compare(ours: Callable, theirs: Callable, device: str, repeats: int) -> dict[str, float]:
    """Medians of both sides, measured in turns after one warm-up each, and their ratio."""
    ours(), theirs()
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*pairs))
    return dict(ours_s=a, theirs_s=b, ratio=b / a)


def peak_extra_bytes(work: Callable[[], object], device: str) -> int:
    """How much more memory tensors take at the peak of the work than before it.

    On a CPU torch's profiler tells of every allocation. (The process's own peak depends on what its allocator
    kept of earlier work: the same update measured 0.9 or 1.2 GB.)
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def show(title: str, args: argparse.Namespace, results: dict) -> None:
    """Prints a table, or with --json one object that holds the settings, the machine and the results."""
    if str(args.device).startswith("cuda"):
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    machine = dict(device=device) | versions | dict(date=time.strftime("%Y-%m-%d"))
    if args.json:
        print(
            json.dumps(dict(benchmark=title, settings=vars(args), machine=machine, results=results))
        )
        return
    print(f"{title}: {' '.join(f'{k}={v}' for k, v in vars(args).items() if k != 'json')}")
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"  on {device}, {named}, {machine['date']}")
    for name, value in results.items():
        number = f"{value:>14,.4g}" if isinstance(value, float) else f"{value!s:>14}"
        print(f"  {name:<44} {number}")

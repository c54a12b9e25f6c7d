"""What the benchmarks have in common: random models of the published shapes, prompts of a given length, timing."""

import argparse
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))

from vlm import VLM, Prompt, load_processors, rope_positions  # noqa: E402

VISION = dict(
    depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, fullatt_block_indexes=[7, 15, 23, 31]
)
SHAPES = {  # "3b" and "7b" as in the config.json of Qwen2.5-VL; "small" has their proportions and 25 million parameters
    "tiny": dict(
        text=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        vision=dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=64, fullatt_block_indexes=[1]),
        vocab_size=512,
        tied=True,
    ),
    "small": dict(
        text=dict(
            hidden_size=384,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
        ),
        vision=dict(
            depth=5, hidden_size=256, num_heads=4, intermediate_size=684, fullatt_block_indexes=[2, 4]
        ),
        vocab_size=8192,
        tied=True,
    ),
    "3b": dict(
        text=dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
        ),
        vision=VISION,
        vocab_size=151_936,
        tied=True,
    ),
    "7b": dict(
        text=dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        vision=VISION,
        vocab_size=152_064,
        tied=False,
    ),
}


def arguments(description: str, **extra) -> argparse.Namespace:
    """The flags that all benchmarks know; `extra` adds integer flags with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--size", choices=SHAPES, default="small", help="shape of the randomly initialised model"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if cuda else "float32",
        help="of the weights",
    )
    defaults = dict(prompt_tokens=300, group_size=8, new_tokens=48, prompts=4, repeats=5) | extra
    for name, value in defaults.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=count, default=value, help=name.replace("_", " ")
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not cuda:
        parser.error("--device cuda: there is no GPU here")
    if args.prompt_tokens < 20:
        parser.error("--prompt-tokens must be at least 20: an image and some text")
    return args


def count(text: str) -> int:
    """A whole number of at least 1, from a command line."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def shape_config(size: str, vocab_size: int = 0) -> Qwen2_5_VLConfig:
    """The configuration of a model of this shape; its last five words are the special tokens."""
    shape = SHAPES[size]
    vocab_size = vocab_size or shape["vocab_size"]
    special = [vocab_size - i for i in range(1, 6)]
    head_dim = shape["text"]["hidden_size"] // shape["text"]["num_attention_heads"]
    sections = [head_dim // 8, head_dim // 16 * 3, head_dim // 16 * 3]  # 16, 24, 24 of 64, as published
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=sections)
    text = shape["text"] | dict(vocab_size=vocab_size, rope_parameters=rope, max_position_embeddings=32768)
    text |= dict(eos_token_id=special[4], bos_token_id=special[4], pad_token_id=special[4])
    vision = shape["vision"] | dict(
        out_hidden_size=text["hidden_size"], window_size=112, patch_size=14, spatial_merge_size=2
    )
    ids = dict(
        zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), special)
    )
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=shape["tied"], **ids
    )
    config._attn_implementation = "sdpa"
    return config


def random_vlm(size: str, device: str, dtype: str, vocab_size: int = 0) -> VLM:
    """A model with random weights, made on its device; the toy's tokenizer stands in, as none of its words matter."""
    config = shape_config(size, vocab_size)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    return VLM(model.eval(), *load_processors(Path(__file__).parent.parent / "toy"))


def random_prompt(vlm: VLM, tokens: int, seed: int) -> Prompt:
    """A prompt of exactly so many tokens, about 85% of them one image."""
    rng = torch.Generator().manual_seed(seed)
    side = max(2, int((0.85 * tokens) ** 0.5))
    grid, start = torch.tensor([[1, 2 * side, 2 * side]]), 4
    after = tokens - start - side * side
    ids = torch.randint(10, vlm.model.config.text_config.vocab_size - 10, (tokens,), generator=rng)
    ids[start : start + side * side] = vlm.model.config.image_token_id
    ids[start - 1], ids[start + side * side] = (
        vlm.model.config.vision_start_token_id,
        vlm.model.config.vision_end_token_id,
    )
    pixels = torch.randn(4 * side * side, 3 * 2 * 14 * 14, generator=rng)
    return Prompt(ids, rope_positions(start, grid[0].tolist(), 2, after), pixels, grid, start, side * side)


def random_completions(vlm: VLM, group_size: int, tokens: int, seed: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(
        10, vlm.model.config.text_config.vocab_size - 10, (group_size, tokens), generator=rng
    ).tolist()


TEMPLATES = (
    "How many {c} {s} are {p} the {d} {s}?",
    "Is the {s} {p} the {c} {s} {d}?",
    "What is the {c} thing {p} the {d} {s} called?",
)
WORDS = dict(
    c=["red", "green", "blue", "small", "large"],
    s=["dog", "car", "tree", "sign", "house"],
    p=["left of", "above", "behind"],
)
WORDS["d"] = ["old", "new", "broken", "open", "closed", "wet"]


def random_questions(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        rng.choice(TEMPLATES).format(**{k: rng.choice(v) for k, v in WORDS.items()}) for _ in range(count)
    ]


# ---- Measuring -----------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], device: str, repeats: int
) -> dict[str, float]:
    """Medians of both sides, measured in turns after one warm-up each, and their ratio."""
    ours(), theirs()
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
    a, b = (statistics.median(side) for side in zip(*pairs))
    return dict(ours_s=a, theirs_s=b, ratio=b / a)


def peak_extra_bytes(work: Callable[[], object], device: str) -> int:
    """How much more memory tensors take at the peak of the work than before it.

    On a CPU torch's profiler tells of every allocation. (The process's own peak depends on what its allocator kept of
    earlier work: the same update measured 0.9 or 1.2 GB.)
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(
        itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    )


def show(title: str, args: argparse.Namespace, results: dict) -> None:
    """Prints a table, or with --json one object that holds the settings, the machine and the results."""
    cuda = str(args.device).startswith("cuda")
    device = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    machine = dict(device=device, torch=torch.__version__, transformers=transformers.__version__)
    machine["date"] = time.strftime("%Y-%m-%d")
    if args.json:
        print(json.dumps(dict(benchmark=title, settings=vars(args), machine=machine, results=results)))
        return
    print(f"{title}: {' '.join(f'{k}={v}' for k, v in vars(args).items() if k != 'json')}")
    print(
        f"  on {device}, torch {machine['torch']}, transformers {machine['transformers']}, {machine['date']}"
    )
    for name, value in results.items():
        print(f"  {name:<44} {value:>14,.4g}" if isinstance(value, float) else f"  {name:<44} {value!s:>14}")

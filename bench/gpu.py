"""Everything that only a GPU can tell, in one command and eight minutes: `python bench/gpu.py`.

Random weights of a published shape, made on the device; nothing is downloaded. Each part is a process of its
own with a time limit of its own. What it finds is printed at once, and written to --out as a JSON line: a
part that fails or hangs costs only itself. In this order:

    machine     versions, the card, the bytes a second that it copies and the matrix products that it does
    attention   gradients of masked attention, with cuDNN's backend on and off (pytorch#196678)
    tests       the tests that run on a device (tests/test_device.py)
    rollout     seconds of a capture and of a decode step, against the bytes that a step must read
    update      one with T % 128 == 64: finite or not, its seconds, its peak against the memory plan's
    gap         log-probabilities of the same tokens by decoding and by the packed forward pass
    toy         one iteration of the toy's own run: accuracy before and after
    lora        rollout and update again, with LoRA
    estimate    what training/estimate.py expects for rollout and update, against what was found

On a machine without a GPU the same runs at a tiny size. --part runs some parts in this process, without a
limit.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from iteration import Stopwatch, watch_rollouts, watch_updates
from shapes import (
    ROOT,
    add_counts,
    add_model_flags,
    image_side,
    parse,
    peak_extra_bytes,
    random_groups,
    random_prompts,
    random_vlm,
    seconds,
    shape_config,
)
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

import grpo
import loop
from model import generate as rollouts
from model.lora import add_lora
from model.packing import lay_out, pack
from model.schedule import CELLS, Waiting, find_limits
from model.vlm import VLM
from training import estimate as estimates
from training import memory_plan as plan
from training.policy import Trained
from training.settings import Settings

GIB = 2**30
SIZES = dict(prompt_tokens=1205, group_size=8, new_tokens=256, prompts=32)
TINY_SIZES = dict(prompt_tokens=60, group_size=2, new_tokens=8, prompts=2)
UPDATED = 8  # groups of an update at most
LORA_RANK = 16
SHARP = 0.3  # temperature: random weights are nearly undecided

Found = Iterator[tuple[str, object]]  # names and values, as they become known


# ---- The machine -------------------------------------------------------------------------------------------


def machine(args) -> Found:
    """Names what is there, and measures the memory and the matrix products."""
    for name in ("torch", "transformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)
    n = 8192 if args.device == "cuda" else 1024
    if args.device == "cuda":
        yield "CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        yield "card", torch.cuda.get_device_name()
        yield "memory (GiB)", torch.cuda.mem_get_info()[1] / GIB
    yield "copy (GB/s)", copy_bandwidth(args.device) / 1e9
    a = torch.randn(n, n, device=args.device, dtype=getattr(torch, args.dtype))
    product = min(seconds(lambda: a @ a, args.device) for _ in range(10))
    yield "matrix products (TFLOP/s)", 2 * n**3 / product / 1e12


def copy_bandwidth(device: str) -> float:
    """Returns bytes a second; a copy reads and writes each byte."""
    size = 2**30 if device == "cuda" else 2**26
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def attention(args) -> Found:
    """Differentiates masked attention whose scores are all far below -88.7, at T % 128 == 64."""
    T, d = 704, 128
    for enabled in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        made = dict(device=args.device, dtype=getattr(torch, args.dtype))
        noise = [torch.randn(1, 2, T, d, **made) for _ in range(3)]
        q, k, v = (x + shift for x, shift in zip(noise, (4, -4, 0)))  # scores near -181
        inputs = [x.requires_grad_() for x in (q, k, v)]
        mask = torch.full((1, 1, T, T), -torch.inf, **made).triu(1)
        scaled_dot_product_attention(*inputs, attn_mask=mask).square().sum().backward()
        gradients = "finite" if all(x.grad.isfinite().all() for x in inputs) else "NaN"
        backend = SDPBackend(torch._fused_sdp_choice(*inputs, mask)).name
        yield f"cuDNN {'on' if enabled else 'off'}", f"{gradients}, {backend}"


def tests(args) -> Found:
    """Runs the tests of a device."""
    import pytest

    file = str(ROOT / "tests" / "test_device.py")
    yield "exit code", int(pytest.main(["-q", file, "--device", args.device]))


# ---- What an iteration is made of --------------------------------------------------------------------------


def random_role(args, lora_rank: int) -> VLM:
    """Returns a role whose completions never end early."""
    vlm = random_vlm(args.size, args.device, args.dtype)
    vlm.end_ids = [-1]
    if lora_rank:
        add_lora(vlm.model, lora_rank)
    return vlm


def rollout(args, lora_rank: int = 0) -> Found:
    """Measures the second of two rollouts; the first one compiles."""
    vlm = random_role(args, lora_rank)
    prompts = random_prompts(vlm, args)
    sizes = (args.group_size, args.new_tokens)
    rng = torch.Generator(args.device).manual_seed(0)

    def work() -> None:
        rollouts.generate(vlm, prompts, *sizes, top_p=0.99, generator=rng)

    yield "the first (s)", seconds(work, args.device)
    with Stopwatch(args.device) as watch:
        watch_rollouts(watch)
        watch.clear()
        work()
        watch.lap()
    spent = watch.spent
    yield "in all (s)", spent.total()
    yield "decode (s)", spent["decode"] + spent["sampling"]
    yield "prefill (s)", spent["prefill"] + spent["encode images"]
    yield "captures (s)", spent["record graphs"]
    # A step against its bytes. The steps are those of the same schedule.
    counts = counted(args)
    config = vlm.model.config
    read = sum(
        steps * estimates.read_bytes(config, vlm.model.dtype, shape)
        for shape, steps in counts.shapes.items()
    )
    yield "a capture (s)", spent["record graphs"] / len(counts.shapes)
    yield "a step (ms)", 1e3 * spent["decode"] / counts.steps
    yield "sampling of a step (ms)", 1e3 * spent["sampling"] / (counts.steps + 1)
    yield "bytes of a step (GB)", read / counts.steps / 1e9
    yield "share of the copies' bandwidth", read / spent["decode"] / copy_bandwidth(args.device)


def counted(args) -> estimates.Counts:
    """Counts the work of this rollout, if all of its rows fit."""
    prefix = 4 + image_side(args.prompt_tokens) ** 2 + 1
    tail = args.prompt_tokens - prefix
    lengths = [[args.new_tokens] * args.group_size] * args.prompts
    waiting = [Waiting(i, i, prefix, tail) for i in range(args.prompts)]
    free = dict(most_cells=CELLS[args.device], token_bytes=0, row_bytes=0, budget=0)
    own = tail + args.new_tokens
    limits = find_limits([1] * args.prompts, prefix, own, args.group_size, **free)
    return estimates.count_rollout(waiting, lengths, limits, args.device)


def update(args, lora_rank: int = 0) -> Found:
    """Measures the second of two updates; the first one makes AdamW's moments."""
    vlm = random_role(args, lora_rank)
    push_scores_down(vlm)
    vlm.offload()
    policy = Trained(vlm, 1e-6, 1e-2, checkpointing=True)
    groups = random_groups(vlm, updated(args))
    grpo.add_reference(groups, vlm)
    rows, *_ = pack(grpo.flatten(groups))
    yield "T % 128", lay_out(rows).ids.shape[1] % 128
    metrics = {}

    def work() -> None:
        metrics.update(grpo.update(policy, policy.optimizer, groups))

    work()
    yield "gradient's norm", metrics["grad_norm"]
    reference = seconds(lambda: grpo.add_reference(groups, vlm), args.device)
    there = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    with Stopwatch(args.device) as watch:
        watch_updates(watch, policy)
        watch.clear()
        peak = there + peak_extra_bytes(work, args.device)
        watch.lap()
    spent = watch.spent
    yield "skipped", metrics["skipped"]
    yield "reference (s)", reference
    yield "forward (s)", spent["log-probabilities"] + spent["encode images"]
    yield "backward (s)", spent["backward"]
    yield "optimizer (s)", spent["optimizer"]
    yield "refresh (s)", spent["refresh"]
    yield "in all (s)", reference + spent.total()
    yield "peak (GiB)", peak / GIB
    case = planned(args, lora_rank)
    total = torch.cuda.mem_get_info()[1] if args.device == "cuda" else None
    dtype = getattr(torch, args.dtype)
    moments = plan.memory_plan(case.config, dtype, total, case.work, **case.flags)
    most = next(moment for moment in moments if moment.name.startswith("an update"))
    yield "planned (GiB)", most.total / GIB


@torch.no_grad()
def push_scores_down(vlm: VLM) -> None:
    """Lets every attention score of one layer be below -88.7, which cuDNN's backward pass cannot bear.

    Published Qwen2.5-VL has such heads. Qwen3-VL has no biases to make them with.
    """
    attention = vlm.model.model.language_model.layers[0].self_attn
    if attention.q_proj.bias is not None:
        attention.q_proj.bias.fill_(8)
        attention.k_proj.bias.fill_(-8)


def updated(args) -> argparse.Namespace:
    """Returns the sizes of the update: a few groups, and rows that are 64 tokens longer than n times 128."""
    row = args.prompt_tokens + args.group_size * (args.new_tokens - 1)
    prompt_tokens = args.prompt_tokens + (64 - row) % 128
    changed = dict(prompt_tokens=prompt_tokens, prompts=min(args.prompts, UPDATED))
    return argparse.Namespace(**vars(args) | changed)


def gap(args) -> Found:
    """Compares log-probabilities: of a token when it was drawn, and in the packed row of its group."""
    vlm = random_role(args, 0)
    vlm.vision_ids = np.zeros(0, int)  # the packed forward pass bans nothing
    prompts = random_prompts(vlm, args)
    sizes = (args.group_size, args.new_tokens)
    rng = torch.Generator(args.device).manual_seed(0)
    draw = rollouts.sample
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens and log-probabilities [rows]

    def sample(logits, temperature, **how) -> torch.Tensor:
        token = draw(logits, temperature=temperature, **how)
        logp = (logits / temperature).log_softmax(dim=1)
        drawn.append((token, logp.gather(1, token[:, None])[:, 0]))
        return token

    with mock.patch.object(rollouts, "sample", sample):
        written = rollouts.generate(vlm, prompts, *sizes, temperature=SHARP, generator=rng)
    # All rows begin and end together; which is whose, their tokens tell.
    tokens, decoded = (torch.stack(x[: args.new_tokens], dim=1).cpu() for x in zip(*drawn))
    rows = dict(zip(map(tuple, tokens.tolist()), decoded))
    apart = []
    with torch.no_grad():
        for prompt, group in zip(prompts, written):
            packed = vlm.logprobs(prompt, group, SHARP)
            apart += [x.cpu() - rows[tuple(ids)] for ids, x in zip(group, packed)]
    apart = torch.cat(apart).abs()
    yield "mean log-probability", decoded.mean().item()
    yield "mean gap", apart.mean().item()
    yield "largest gap", apart.max().item()


def lora(args) -> Found:
    """Measures a rollout and an update with LoRA."""
    for part in (rollout, update):
        for name, value in part(args, LORA_RANK):
            yield f"{part.__name__}: {name}", value


def toy(args) -> Found:
    """Runs `python loop.py`; on a CPU at its smallest, as the tests have the whole of it."""
    flags = ["--device", args.device, "--name", "x", "--iterations", "1"]
    if args.device == "cpu":
        flags += (
            "--questioner-steps 1 --reasoner-steps 1 --images-per-step 4 --candidates 8".split()
        )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        yield "exit code", loop.main(flags)
        lines = Path("runs/x/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        os.chdir(ROOT)
    measured = [record for record in map(json.loads, lines) if record["phase"] == "measure"]
    for when, record in (("base", measured[0]), ("end", measured[-1])):
        for name in ("sampled_accuracy", "greedy_accuracy"):
            yield f"{name}, {when}", record[name]


# ---- Against the estimate ----------------------------------------------------------------------------------


def planned(args, lora_rank: int = 0) -> estimates.Case:
    """Returns the update as the memory plan and the estimate see it."""
    changed = updated(args)
    image = image_side(changed.prompt_tokens) ** 2
    text = changed.prompt_tokens - image
    questions = changed.prompts * args.group_size
    work = plan.Work(image, text, args.new_tokens, args.group_size, questions, answers=1)
    settings = Settings(gradient_checkpointing=True, lora_rank=lora_rank)
    return estimates.Case(shape_config(args.size), settings, work, card(args.device))


def card(device: str) -> estimates.Card:
    """Returns the card by its name; an H100 if it is another one."""
    name = torch.cuda.get_device_name().lower() if device == "cuda" else ""
    cards = [card for known, card in estimates.CARDS.items() if known in name]
    return (cards or [estimates.CARDS["h100"]])[0]


def estimate(args) -> Found:
    """Gives the seconds that were estimated, and how many times as long it took."""
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    found = {}
    for line in map(json.loads, lines):
        if line["name"] == "torch":  # another run begins
            found.clear()
        found[line["part"], line["name"]] = line["value"]
    case = planned(args)
    groups = case.work.questions // args.group_size
    lengths = [[args.new_tokens] * args.group_size] * groups
    batches = estimates.pack_update(case, lengths)
    moved = estimates.moved_bytes(case, [], batches)
    parts = estimates.update_seconds(case, batches, moved)
    whole_update = parts["update"] + parts["optimizer"] + parts["copies"]
    expected = dict(
        rollout=estimates.rollout_seconds(case, counted(args)), update={"in all": whole_update}
    )
    for part, names in expected.items():
        for name, guess in names.items():
            yield f"{part}, {name}: estimated (s)", guess
            if value := found.get((part, f"{name} (s)")):
                yield f"{part}, {name}: found / estimated", value / guess


# ---- Running the parts -------------------------------------------------------------------------------------

PARTS = {  # with the seconds that each may take
    machine: 25,
    attention: 25,
    tests: 80,
    rollout: 75,
    update: 75,
    gap: 45,
    toy: 60,
    lora: 75,
    estimate: 15,
}


def report(args, part: str, name: str, value: object) -> None:
    """Prints what was found, and appends it to the file."""
    line = json.dumps(dict(part=part, name=name, value=value))
    shown = f"{value:,.4g}" if isinstance(value, float) else value
    print(line if args.json else f"{part}: {name:50} {shown}", flush=True)
    with open(args.out, "a", encoding="utf-8") as file:
        print(line, file=file)


def run_here(part: Callable[..., Found], args) -> None:
    """Runs a part in this process."""
    try:
        for name, value in part(args):
            report(args, part.__name__, name, value)
    except Exception as error:
        traceback.print_exc()
        report(args, part.__name__, "FAILED", f"{type(error).__name__}: {error}"[:300])


def run_apart(part: Callable[..., Found], args) -> None:
    """Runs a part in a process of its own, and ends all that the part has started."""
    start = time.time()
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part.__name__]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        if code := process.wait(PARTS[part]):
            report(args, part.__name__, "FAILED", f"exit code {code}")
    except subprocess.TimeoutExpired:
        report(args, part.__name__, "FAILED", f"took longer than {PARTS[part]} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    report(args, part.__name__, "seconds", time.time() - start)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    style = argparse.RawDescriptionHelpFormatter
    names = [part.__name__ for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--part", nargs="+", choices=names, help="only these, in this process")
    parser.add_argument("--out", default="gpu.jsonl", help="the file (default: gpu.jsonl)")
    add_model_flags(parser, *(("3b", "cuda") if cuda else ("tiny", "cpu")))
    parser.set_defaults(dtype="bfloat16")
    add_counts(parser, SIZES if cuda else TINY_SIZES)
    args = parse(parser)
    args.out = Path(args.out).resolve()
    return args


def main() -> None:
    """Some parts here, or each in a process of its own."""
    args = parse_arguments()
    for part in PARTS:
        if not args.part:
            run_apart(part, args)
        elif part.__name__ in args.part:
            run_here(part, args)


if __name__ == "__main__":
    main()

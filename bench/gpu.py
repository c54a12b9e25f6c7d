"""Everything that only a GPU can tell, in one command and under nine minutes: `python bench/gpu.py`.

Random weights of the published shapes, made on the device; nothing is downloaded. Each part is a process of
its own, so that what fails or takes too long is reported and the rest goes on, and no part finds the memory
of another.

    bandwidth   bytes a second that the device copies, and the matrix products it does in --dtype
    rollout     `generate` against `model.generate` (bench/rollout.py)
    decode      a decode step against reading weights and live cache once at that bandwidth
    update      the packed update against the plain one (bench/update.py), and its share of the matrix peak
    memory      the peak of rollouts and of an update, with all that the loop keeps on the device, and the
                plan's: 3B, 3B and 7B with --offload
    iteration   where the seconds go (bench/iteration.py)
    learn       the toy's own run on this device: accuracy before and after
    tests       the tests that run on a device (tests/test_device.py)

On a machine without a GPU the same runs at --size tiny.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import (
    ROOT,
    add_counts,
    add_model_flags,
    image_side,
    peak_extra_bytes,
    random_groups,
    random_prompts,
    random_vlm,
    seconds,
    shape_config,
    show,
    synchronize,
)

import grpo
from model.decode import cache_token_bytes
from model.generate import generate
from training import memory_plan as plan
from training.policy import Trained

BENCH = ROOT / "bench"
SECONDS = dict(  # that a part may take
    bandwidth=30, rollout=90, decode=60, update=60, memory=150, iteration=60, learn=150, tests=120
)
SIZES = dict(prompt_tokens=1205, group_size=8, new_tokens=256, prompts=32)
TINY_SIZES = dict(prompt_tokens=60, group_size=2, new_tokens=8, prompts=2)


# ---- Parts that are measured here; each returns name -> number ---------------------------------------------


def bandwidth(args) -> dict:
    """A copy of n bytes reads and writes 2 n; a product of two n x n matrices is 2 n^3 operations."""
    size, n = (2**30, 8192) if args.device == "cuda" else (2**26, 1024)
    source, target = (torch.ones(size, dtype=torch.uint8, device=args.device) for _ in range(2))
    a = torch.ones(n, n, device=args.device, dtype=getattr(torch, args.dtype))
    copy = min(seconds(lambda: target.copy_(source), args.device) for _ in range(10))
    product = min(seconds(lambda: a @ a, args.device) for _ in range(10))
    return {"copy_gb_per_s": 2 * size / copy / 1e9, "matrix_tflops": 2 * n**3 / product / 1e12}


def decode(args) -> dict:
    """The time of a step is the difference of a long and a short rollout, divided by that of their lengths.

    A step must read all weights of the text model and, of each layer, the keys and values of every prompt
    once and of every row.
    """
    vlm, rng = (
        random_vlm(args.size, args.device, args.dtype),
        torch.Generator(args.device).manual_seed(0),
    )
    vlm.end_ids, prompts = [-1], random_prompts(vlm, args)

    def rollout(new_tokens: int) -> float:
        sampling = dict(max_new_tokens=new_tokens, top_p=0.99, generator=rng)
        return seconds(lambda: generate(vlm, prompts, args.group_size, **sampling), args.device)

    short = max(1, args.new_tokens // 4)
    rollout(short), rollout(args.new_tokens)
    step = (rollout(args.new_tokens) - rollout(short)) / (args.new_tokens - short)
    weights = sum(p.nbytes for name, p in vlm.model.named_parameters() if "visual" not in name)
    rows, average = args.prompts * args.group_size, (args.new_tokens + short) / 2
    tokens = args.prompts * args.prompt_tokens + rows * average
    cache = tokens * cache_token_bytes(vlm.model.config, vlm.model.dtype)
    bound = (weights + cache) / (bandwidth(args)["copy_gb_per_s"] * 1e9)
    return {"step_ms": 1000 * step, "bound_ms": 1000 * bound, "share_of_bound": bound / step}


def memory(args) -> dict:
    """Peaks of a role's rollouts and update, and the plan's numbers for the same moments."""
    published = [("3b", False), ("3b", True), ("7b", True)]
    results = {}
    for size, offload in published if args.device == "cuda" else [(args.size, False)]:
        measured, planned = peaks(args, size, offload), planned_peaks(args, size, offload)
        for moment in measured:
            name = f"{size}{', offload' if offload else ''}: {moment}"
            results[f"{name} (GiB)"] = measured[moment] / 2**30
            results[f"{name}, planned (GiB)"] = planned[moment] / 2**30
        if args.device == "cuda":
            gc.collect()  # FSDP's modules refer to one another
            torch.cuda.empty_cache()
    return results


def peaks(args, size: str, offload: bool) -> dict[str, int]:
    """Bytes on the device at the peak of each; on a CPU only what they need beside the models."""
    vlm = random_vlm(size, args.device, args.dtype)
    vlm.end_ids = [-1]
    vlm.offload()
    reference = vlm.copy()
    policy = Trained(vlm, 1e-6, 1e-2, offload, checkpointing=True)
    groups, rng = random_groups(vlm, args), torch.Generator(args.device).manual_seed(0)
    prompts = [group[0].prompt for group in groups]

    def rollouts() -> None:
        generate(vlm, prompts, args.group_size, args.new_tokens, generator=rng)

    def update() -> None:
        grpo.add_reference(groups, reference)
        grpo.update(policy, policy.optimizer, groups)

    update()  # so that the moments are there
    there = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    return {
        work.__name__: there + peak_extra_bytes(work, args.device) for work in (rollouts, update)
    }


def planned_peaks(args, size: str, offload: bool) -> dict[str, int]:
    """The same by the memory plan."""
    image_tokens = image_side(args.prompt_tokens) ** 2
    text_tokens, questions = args.prompt_tokens - image_tokens, args.prompts * args.group_size
    work = plan.Work(
        image_tokens, text_tokens, args.new_tokens, args.group_size, questions, answers=1
    )
    total = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else None
    dtype = getattr(torch, args.dtype)
    moments = plan.memory_plan(shape_config(size), dtype, total, work, True, offload)
    totals = {moment.name: moment.total for moment in moments}
    names = dict(rollouts="Reasoner's phase, answering", update="an update, in both phases")
    return {name: totals[moment] for name, moment in names.items()}


def learn(args) -> dict:
    """`python loop.py` on this device; on a CPU at its smallest, as the tests have the whole one."""
    small = (
        "--iterations 1 --questioner-steps 1 --reasoner-steps 1 --images-per-step 4 --candidates 8"
    )
    flags = [
        "--device",
        args.device,
        "--name",
        "x",
        *(small.split() if args.device == "cpu" else []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "loop.py"), *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        lines = (Path(folder) / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
    measured = [record for record in map(json.loads, lines) if record["phase"] == "measure"]
    return {
        f"{name}, {when}": measured[i][name]
        for name in ("sampled_accuracy", "greedy_accuracy")
        for i, when in ((0, "base"), (-1, "end"))
    }


def tests(args) -> dict:
    """The tests that run on a device."""
    file, start = str(ROOT / "tests" / "test_device.py"), time.time()
    command = [sys.executable, "-m", "pytest", "-q", file, "--device", args.device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:], file=sys.stderr)
    return {"exit code (0: all passed)": float(done.returncode), "seconds": time.time() - start}


HERE = dict(bandwidth=bandwidth, decode=decode, memory=memory, learn=learn, tests=tests)
OTHERS = ("rollout", "update", "iteration")


# ---- Running the parts -------------------------------------------------------------------------------------


def run_part(part: str, args) -> dict:
    """The results of a part, in a process of its own; raises RuntimeError with its last words."""
    sizes = {name: getattr(args, name) for name in SIZES}
    if part in ("update", "iteration"):
        sizes["prompts"] = min(args.prompts, 4)  # the plain side takes long
    flags = ["--size", args.size, "--device", args.device, "--dtype", args.dtype, "--json"]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    file, extra = (
        (f"{part}.py", ["--repeats=1"]) if part in OTHERS else ("gpu.py", [f"--part={part}"])
    )
    command = [sys.executable, str(BENCH / file), *flags, *extra]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS[part])
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took longer than {SECONDS[part]} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    results = json.loads(done.stdout)["results"]
    return results | update_share(args, sizes, results["ours_s"]) if part == "update" else results


def update_share(args, sizes: dict[str, int], spent: float) -> dict:
    """6 operations a weight and token (2 forward, 4 backward), without attention and the image encoder."""
    parameters = plan.parameter_sizes(shape_config(args.size)).items()
    weights = sum(
        n for name, n in parameters if "visual" not in name and "embed_tokens" not in name
    )
    row = sizes["prompt_tokens"] + sizes["group_size"] * (sizes["new_tokens"] - 1)
    tflops = 6 * weights * sizes["prompts"] * row / spent / 1e12
    return {
        "ours_tflops": tflops,
        "share_of_matrix_peak": tflops / bandwidth(args)["matrix_tflops"],
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    cuda, style = torch.cuda.is_available(), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument(
        "--part", choices=[*SECONDS], help="one part; in this process if it is measured here"
    )
    add_model_flags(parser, *(("3b", "cuda") if cuda else ("tiny", "cpu")))
    add_counts(parser, SIZES if cuda else TINY_SIZES)
    args = parser.parse_args()
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not cuda:
        parser.error(f"--device {args.device}: there is no such device here")
    return args


def main() -> None:
    """One part, or each in a process of its own."""
    args = parse_arguments()
    if args.part in HERE:
        results = HERE[args.part](args)
        synchronize(args.device)
        show(f"gpu: {args.part}", args, results)
        return
    results, start = {}, time.time()
    for part in [args.part] if args.part else SECONDS:
        began = time.time()
        try:
            found = run_part(part, args)
            results |= {f"{part}: {name}": value for name, value in found.items()}
        except (RuntimeError, ValueError, KeyError) as error:
            results[f"{part}: FAILED"] = str(error)[:200]
        print(f"{part}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    results["seconds in all"] = time.time() - start
    show("gpu", args, results)


if __name__ == "__main__":
    main()

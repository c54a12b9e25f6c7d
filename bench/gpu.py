"""Everything that only a GPU can tell, in one command and under nine minutes: `python bench/gpu.py`.

Random weights of the published shapes, made on the device; nothing is downloaded. Each part is a process of its own, so that what
fails or takes too long is reported and the rest goes on, and no part finds the memory of another.

    bandwidth   bytes a second that the device copies, and the bfloat16 (on a CPU float32) matrix products it does
    rollout     `generate` against `model.generate`                                        (bench/rollout.py)
    decode      a decode step against the time that reading weights and live cache once takes at that bandwidth
    update      the packed update against the plain one, and its share of the matrix peak  (bench/update.py)
    memory      the peak of rollouts and update, both roles and the optimizer there, against the plan; 3B, 3B and 7B with --offload
    iteration   where the seconds go                                                       (bench/iteration.py)
    learn       the toy's own run on this device: accuracy before and after
    tests       the tests that run on a device (tests/test_device.py)

On a machine without a GPU the same runs at --size tiny.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from shapes import (
    SHAPES,
    count,
    peak_extra_bytes,
    random_completions,
    random_prompt,
    random_vlm,
    seconds,
    show,
    synchronize,
)

import grpo
from engine import plan
from generate import cache_token_bytes, generate

ROOT = Path(__file__).parent.parent
LIMITS = dict(
    bandwidth=30, rollout=90, decode=60, update=60, memory=150, iteration=60, learn=150, tests=120
)  # seconds


# ---- Parts that are measured here; each returns name -> number -----------------------------------------------------------


def bandwidth(args) -> dict:
    """Reading and writing: a copy of n bytes moves 2 n. A product of two n x n matrices is 2 n^3 operations."""
    cuda = args.device == "cuda"
    size, n = (2**30, 8192) if cuda else (2**26, 1024)
    source, target = (torch.ones(size, dtype=torch.uint8, device=args.device) for _ in range(2))
    a = torch.ones(n, n, device=args.device, dtype=getattr(torch, args.dtype))
    copy = min(seconds(lambda: target.copy_(source), args.device) for _ in range(10))
    product = min(seconds(lambda: a @ a, args.device) for _ in range(10))
    return {"copy_gb_per_s": 2 * size / copy / 1e9, "matrix_tflops": 2 * n**3 / product / 1e12}


def decode(args) -> dict:
    """The time of a step is the difference of two rollouts of different lengths, divided by the difference of their steps.

    A step must read all weights of the text model and, of each layer, the keys and values of every prompt once and of every row.
    """
    vlm, rng = random_vlm(args.size, args.device, args.dtype), torch.Generator(args.device).manual_seed(0)
    vlm.end_ids = [-1]
    prompts = [random_prompt(vlm, args.prompt_tokens, seed) for seed in range(args.prompts)]

    def rollout(new_tokens: int) -> float:
        return seconds(
            lambda: generate(vlm, prompts, args.group_size, new_tokens, top_p=0.99, generator=rng),
            args.device,
        )

    short = max(1, args.new_tokens // 4)
    rollout(short), rollout(args.new_tokens)
    step = (rollout(args.new_tokens) - rollout(short)) / (args.new_tokens - short)
    weights = sum(p.nbytes for name, p in vlm.model.named_parameters() if "visual" not in name)
    rows, average = args.prompts * args.group_size, (args.new_tokens + short) / 2
    cache = (args.prompts * args.prompt_tokens + rows * average) * cache_token_bytes(
        vlm.model.config, vlm.model.dtype
    )
    bound = (weights + cache) / (bandwidth(args)["copy_gb_per_s"] * 1e9)
    return {"step_ms": 1000 * step, "bound_ms": 1000 * bound, "share_of_bound": bound / step}


def memory(args) -> dict:
    """Peaks of a role's rollouts and update, with all that the loop keeps on the device then, and the plan's numbers for the same."""
    results = {}
    for size, offload in (
        [("3b", False), ("3b", True), ("7b", True)] if args.device == "cuda" else [(args.size, False)]
    ):
        name = f"{size}{', offload' if offload else ''}"
        measured = peaks(args, size, offload)
        work = plan.Work(
            args.image_tokens,
            args.prompt_tokens - args.image_tokens,
            args.new_tokens,
            args.group_size,
            args.prompts * args.group_size,
            1,
        )
        total = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else None
        config, dtype = random_vlm(size, "meta", args.dtype).model.config, getattr(torch, args.dtype)
        planned = {m.name: m.total for m in plan.memory_plan(config, dtype, total, work, True, offload)}
        for moment, planned_bytes in (
            ("rollouts", planned["Reasoner's rollouts"]),
            ("update", planned["Reasoner's update"]),
        ):
            results[f"{name}: {moment} (GiB)"] = measured[moment] / 2**30
            results[f"{name}: {moment}, planned (GiB)"] = planned_bytes / 2**30
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return results


def peaks(args, size: str, offload: bool) -> dict[str, int]:
    """Bytes on the device at the peak of rollouts and of an update; on a CPU only what they need beside the models."""
    vlm = random_vlm(size, args.device, args.dtype)
    vlm.end_ids = [-1]
    vlm.checkpoint_activations()
    reference = vlm.copy()
    reference.park()
    rng = torch.Generator(args.device).manual_seed(0)
    prompts = [random_prompt(vlm, args.prompt_tokens, seed) for seed in range(args.prompts)]
    groups = [
        grpo.Group(
            p,
            random_completions(vlm, args.group_size, args.new_tokens, i),
            [i % 2 for i in range(args.group_size)],
        )
        for i, p in enumerate(prompts)
    ]
    with grpo.MasterAdamW(vlm.model.named_parameters(), 1e-6, 1e-2, offload) as optimizer:

        def update() -> None:
            with reference.on(args.device):
                grpo.add_reference(groups, reference)
            grpo.update(vlm, groups, optimizer)

        update()  # so that the moments are there
        there = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        work = {
            "rollouts": lambda: generate(vlm, prompts, args.group_size, args.new_tokens, generator=rng),
            "update": update,
        }
        return {name: there + peak_extra_bytes(do, args.device) for name, do in work.items()}


def learn(args) -> dict:
    """`python loop.py` on this device; on a CPU at its smallest, as the tests have the whole one."""
    small = (
        "--iterations 1 --questioner-steps 1 --reasoner-steps 1 --images-per-step 4 --candidates 8".split()
        if args.device == "cpu"
        else []
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "loop.py"), "--device", args.device, "--name", "x", *small]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        records = [
            json.loads(line)
            for line in (Path(folder) / "runs" / "x" / "metrics.jsonl").read_text().splitlines()
        ]
    measured = [r for r in records if r["phase"] == "measure"]
    return {
        f"{name}, {when}": measured[i][name]
        for name in ("sampled_accuracy", "greedy_accuracy")
        for i, when in ((0, "base"), (-1, "end"))
    }


def tests(args) -> dict:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(ROOT / "tests" / "test_device.py"),
        "--device",
        args.device,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:], file=sys.stderr)
    return {
        "exit code (0: all passed)": float(done.returncode),
        "seconds": float(done.stdout.split(" in ")[-1].split("s")[0] or 0),
    }


def update_share(args, results: dict) -> dict:
    """6 operations a weight and token (2 forward, 4 backward), without attention and the image encoder, against the matrix peak."""
    config = random_vlm(args.size, "meta", args.dtype).model.config
    weights = sum(
        n
        for name, n in plan.parameter_sizes(config).items()
        if "visual" not in name and "embed_tokens" not in name
    )
    tokens = args.prompts * (args.prompt_tokens + args.group_size * (args.new_tokens - 1))
    tflops = 6 * weights * tokens / results["ours_s"] / 1e12
    return {"ours_tflops": tflops, "share_of_matrix_peak": tflops / bandwidth(args)["matrix_tflops"]}


HERE = dict(bandwidth=bandwidth, decode=decode, memory=memory, learn=learn, tests=tests)
OTHERS = ("rollout", "update", "iteration")


# ---- Running the parts ---------------------------------------------------------------------------------------------------


def run_part(part: str, args) -> dict:
    """The results of a part that runs in a process of its own; raises RuntimeError with its last words."""
    flags = ["--size", args.size, "--device", args.device, "--dtype", args.dtype, "--json"]
    flags += [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("prompt_tokens", "group_size", "new_tokens", "prompts")
    ]
    file = f"{part}.py" if part in OTHERS else "gpu.py"
    extra = ["--part", part] if part not in OTHERS else ["--repeats", "1"]
    if part in ("update", "iteration"):
        flags[-1] = f"--prompts={min(args.prompts, 4)}"  # the plain side takes long
    command = [sys.executable, str(Path(__file__).with_name(file)), *flags, *extra]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS[part])
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took longer than {LIMITS[part]} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(done.stdout)["results"]


def parse_arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=[*LIMITS], help="one part, in this process if it is measured here")
    parser.add_argument(
        "--size",
        choices=SHAPES,
        default="3b" if cuda else "tiny",
        help="shape of the model (default: 3b on a GPU, else tiny)",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if cuda else "cpu",
        help="default: cuda if there is one",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if cuda else "float32",
        help="of the weights",
    )
    for name, full, tiny in (
        ("prompt_tokens", 1205, 60),
        ("group_size", 8, 2),
        ("new_tokens", 256, 8),
        ("prompts", 32, 2),
    ):
        default = full if cuda else tiny
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=count,
            default=default,
            help=f"{name.replace('_', ' ')} (default: {default})",
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: there is no GPU here")
    args.image_tokens = (
        max(2, int((0.85 * args.prompt_tokens) ** 0.5)) ** 2
    )  # as in random_prompt: 1,024 of 1,205
    return args


def main() -> None:
    args = parse_arguments()
    if args.part in HERE:
        results = HERE[args.part](args)
        synchronize(args.device)
        show(f"gpu: {args.part}", args, results)
        return
    results, start = {}, time.time()
    for part in [args.part] if args.part else LIMITS:
        began = time.time()
        try:
            found = run_part(part, args)
            if part == "update":
                share = argparse.Namespace(**vars(args) | {"prompts": min(args.prompts, 4)})
                found |= update_share(share, found)
            results |= {f"{part}: {name}": value for name, value in found.items()}
        except (RuntimeError, ValueError, KeyError) as error:
            results[f"{part}: FAILED"] = str(error)[:200]
        print(f"{part}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    results["seconds in all"] = time.time() - start
    show("gpu", args, results)


if __name__ == "__main__":
    main()

"""How many GPUs of which size a model needs, by the memory plan: the tables in docs/memory.md and README.

bfloat16, groups of 8, 1,024 image tokens, up to 1,024 new tokens. A model fits if the plan's largest moment
takes at most 95% of what the GPU offers, with smaller batches where the usual ones do not fit.

With --measure: the plan of an update against the peak of its tensors, for small random models on the CPU.
"""

import argparse
from dataclasses import dataclass
from functools import cache

import torch
from shapes import peak_extra_bytes, random_completions, random_prompt, random_vlm, shape_config

import grpo
from model.vlm import VLM
from training import memory_plan as plan
from training.policy import Trained

MODELS = {
    "3b": "Qwen2.5-VL 3B",
    "7b": "Qwen2.5-VL 7B",
    "qwen3-2b": "Qwen3-VL 2B",
    "qwen3-4b": "Qwen3-VL 4B",
    "qwen3-8b": "Qwen3-VL 8B",
}
# The name's GB -> the GiB that a process can have.
GPUS = {12: 11.0, 16: 14.7, 24: 22.0, 40: 39.4, 80: 78.0, 141: 139.0}
COUNTS = (1, 2, 4, 8, 16)
FLAGS = {
    "": (False, False, 0),
    "`--gradient-checkpointing`": (True, False, 0),
    "`--gradient-checkpointing --offload`": (True, True, 0),
    "`--lora-rank 16`": (False, False, 16),
    "`--gradient-checkpointing --lora-rank 16`": (True, False, 16),
}
SAVES = 3  # states within a phase of 20 steps, with --save-every 5: the defaults
WORK = plan.Work(
    image_tokens=1024, text_tokens=100, new_tokens=1024, group_size=8, questions=1024, answers=10
)


@cache
def gpus_needed(size: str, gib: float, checkpointing: bool, offload: bool, rank: int) -> int | None:
    """The smallest number of GPUs with which every moment fits; None if even the largest is too small."""
    config, available = shape_config(size), int(gib * 2**30)

    def fits(count: int) -> bool:
        what = (config, torch.bfloat16)
        how = dict(checkpointing=checkpointing, offload=offload, ranks=count, lora_rank=rank)
        batch_scale = plan.fit_batches(available, *what, WORK, **how)
        return plan.fits(available, *what, WORK, **how, batch_scale=batch_scale)

    return next(filter(fits, COUNTS), None)


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    names = [f"{gb} GB" for gb in GPUS]
    lines = [
        "| model | flags | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(GPUS),
    ]
    for size, model in MODELS.items():
        for flags, how in FLAGS.items():
            cells = [str(gpus_needed(size, gib, *how) or "-") for gib in GPUS.values()]
            lines.append(f"| {model} | {flags} | " + " | ".join(cells) + " |")
    return lines


def update_table() -> list[str]:
    """What an update takes on one GPU, the computer's memory and the disk, in GiB, in Markdown."""
    lines = [
        "| model | flags | masters, moments, gradients | frozen weights | whole layers | activations "
        "| **an update** | weights in rollouts | in the computer's memory | on the disk |",
        "| --- | --- |" + " --- |" * 8,
    ]
    for size, model in MODELS.items():
        for flags, (checkpointing, offload, rank) in FLAGS.items():
            config, how = shape_config(size), (checkpointing, offload, 1, rank)
            moments = plan.memory_plan(config, torch.bfloat16, 141 * 2**30, WORK, *how)
            answering, update = moments[1].parts, moments[2].parts
            frozen = update.get("frozen weights", 0)
            known = ("frozen weights", "whole layers", "activations")
            trained = sum(value for name, value in update.items() if name not in known)
            sizes = [
                trained,
                frozen,
                update["whole layers"],
                update["activations"],
                moments[2].total,
            ]
            sizes += [
                answering["reasoner"] + frozen,
                plan.host_plan(config, torch.bfloat16, *how[1:]).total,
            ]
            sizes += [plan.disk_plan(config, torch.bfloat16, SAVES, rank).total]
            lines.append(
                f"| {model} | {flags} | " + " | ".join(f"{s / 2**30:.1f}" for s in sizes) + " |"
            )
    return lines


WAYS = {  # README's rows: what is tried, in this order, and what the table calls it
    "all weights": {
        "fits": (False, False, 0),
        "checkpointing": (True, False, 0),
        "checkpointing, offload": (True, True, 0),
    },
    "`--lora-rank 16`": {"fits": (False, False, 16), "checkpointing": (True, False, 16)},
}


def table_by_gpu() -> list[str]:
    """README's: with which flags a model fits on one GPU, and what it takes besides, in Markdown."""
    heads = [f"{gb} GB" for gb in GPUS] + ["GiB of the computer's memory", "GiB on the disk"]
    lines = [
        "| model | trained | " + " | ".join(heads) + " |",
        "| --- | --- |" + " --- |" * len(heads),
    ]
    for size, model in MODELS.items():
        for name, ways in WAYS.items():
            cells = [first_fitting(size, gib, ways) for gib in GPUS.values()]
            cells += [host_gibs(size, ways), disk_gibs(size, ways)]
            lines.append(f"| {model} | {name} | " + " | ".join(cells) + " |")
    return lines


def first_fitting(size: str, gib: float, ways: dict) -> str:
    """The first of the ways with which one GPU is enough."""
    return next((words for words, how in ways.items() if gpus_needed(size, gib, *how) == 1), "-")


def host_gibs(size: str, ways: dict) -> str:
    """Of the computer's memory, without and with offload; with LoRA an export makes all weights of a role."""
    config, gibs = shape_config(size), {}
    whole = 2 * sum(plan.parameter_sizes(config).values())
    for words, (_, offload, rank) in ways.items():
        most = plan.host_plan(config, torch.bfloat16, offload, 1, rank).total + (
            whole if rank else 0
        )
        gibs[f"{most / 2**30:.0f}"] = words.partition(", ")[2]
    return ", ".join(f"{gib} with {words}" if words else gib for gib, words in gibs.items())


def disk_gibs(size: str, ways: dict) -> str:
    """What the run folder takes at most."""
    [rank] = {rank for _, _, rank in ways.values()}
    return f"{plan.disk_plan(shape_config(size), torch.bfloat16, SAVES, rank).total / 2**30:.0f}"


@dataclass(frozen=True)
class Case:
    """An update that is measured: how the model is trained, and what is in its only row."""

    sharded: bool
    checkpointing: bool
    prompt_tokens: int = 300
    group_size: int = 8
    new_tokens: int = 48


def planned_and_measured(vlm: VLM, case: Case) -> tuple[int, int]:
    """Returns the bytes of an update besides weights, gradients and moments: of the plan, and at the peak.

    The gradients are there already, as they are from the second batch of an update on. The reference does not
    matter here.
    """
    policy = Trained(vlm.copy(), 1e-6, 0.0, offload=case.sharded, checkpointing=case.checkpointing)
    prompt = random_prompt(vlm, case.prompt_tokens, 0)
    completions = random_completions(vlm, case.group_size, case.new_tokens, 0)
    group = grpo.make_group(prompt, completions, [float(i % 2) for i in range(case.group_size)])
    for completion in group:
        completion.ref_logp = torch.zeros(case.new_tokens)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    measured = peak_extra_bytes(lambda: grpo.backward(policy, [group]), "cpu")
    text_tokens = len(prompt) - prompt.image_tokens
    work = plan.Work(prompt.image_tokens, text_tokens, case.new_tokens, case.group_size, 1, 1)
    what = (vlm.model.config, vlm.model.dtype, None, work, case.checkpointing, case.sharded)
    parts = plan.memory_plan(*what)[2].parts
    return parts["whole layers"] + parts["activations"], measured


TRAINED = {
    "float32": ("float32", False),
    "float32, sharded": ("float32", True),
    "bfloat16": ("bfloat16", True),
}


def measured_table() -> list[str]:
    """The plan of an update against its measured peak, in MB, in Markdown."""
    lines = [
        "| random model | trained in | checkpointing | plan, MB | measured, MB | plan / measured |",
        "| --- |" + " --- |" * 5,
    ]
    for size in ("small", "qwen3-small"):
        for trained, (dtype, sharded) in TRAINED.items():
            vlm = random_vlm(size, "cpu", dtype)
            for checkpointing in (False, True):
                case = Case(sharded, checkpointing)
                planned, measured = planned_and_measured(vlm, case)
                cells = [size, trained, "yes" if checkpointing else "no"]
                cells += [
                    f"{planned / 1e6:.1f}",
                    f"{measured / 1e6:.1f}",
                    f"{planned / measured:.3f}",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Prints the tables of the plan, or with --measure the one that a CPU can check."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument(
        "--measure", action="store_true", help="the plan of an update against its peak"
    )
    if parser.parse_args().measure:
        print("\n".join(measured_table()))
        return
    print("\n".join([*table(), "", *update_table(), "", *table_by_gpu()]))


if __name__ == "__main__":
    main()

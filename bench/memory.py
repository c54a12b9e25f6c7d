"""How many GPUs of which size a model needs, by the memory plan: the tables in docs/memory.md and README.

bfloat16, groups of 8, 1,024 image tokens, up to 1,024 new tokens. A model fits if the plan's largest moment
takes at most 95% of what the GPU offers, with smaller batches where the usual ones do not fit.
"""

import argparse

import torch
from shapes import shape_config

from engine import plan

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


def gpus_needed(size: str, gib: float, checkpointing: bool, offload: bool, rank: int) -> int | None:
    """The smallest number of GPUs with which every moment fits; None if even the largest is too small."""
    config, available = shape_config(size), int(gib * 2**30)

    def fits(count: int) -> bool:
        what = (config, torch.bfloat16)
        how = dict(checkpointing=checkpointing, offload=offload, ranks=count, lora_rank=rank)
        budget = plan.fitting_budget(available, *what, WORK, **how)
        moments = plan.memory_plan(*what, available, WORK, **how, budget=budget)
        return max(moment.total for moment in moments) <= plan.USABLE * available

    return next(filter(fits, COUNTS), None)


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    names = [f"{gb} GB" for gb in GPUS]
    lines = ["| model | flags | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(GPUS)]
    for size in ("3b", "7b"):
        for flags, how in FLAGS.items():
            cells = [str(gpus_needed(size, gib, *how) or "-") for gib in GPUS.values()]
            lines.append(f"| {size.upper()} | {flags} | " + " | ".join(cells) + " |")
    return lines


def update_table() -> list[str]:
    """What an update takes on one GPU, the computer's memory and the disk, in GiB, in Markdown."""
    lines = [
        "| model | flags | masters, moments, gradients | frozen weights | whole layers | activations "
        "| **an update** | weights in rollouts | in the computer's memory | on the disk |",
        "| --- | --- |" + " --- |" * 8,
    ]
    for size in ("3b", "7b"):
        for flags, (checkpointing, offload, rank) in FLAGS.items():
            config, how = shape_config(size), (checkpointing, offload, 1, rank)
            moments = plan.memory_plan(config, torch.bfloat16, 141 * 2**30, WORK, *how)
            answering, update = moments[1].parts, moments[2].parts
            frozen = update.get("frozen weights", 0)
            known = ("frozen weights", "whole layers", "activations")
            trained = sum(value for name, value in update.items() if name not in known)
            sizes = [trained, frozen, update["whole layers"], update["activations"], moments[2].total]
            sizes += [answering["reasoner"] + frozen, plan.host_plan(config, torch.bfloat16, *how[1:]).total]
            sizes += [plan.disk_plan(config, torch.bfloat16, SAVES, rank).total]
            lines.append(
                f"| {size.upper()} | {flags} | " + " | ".join(f"{s / 2**30:.1f}" for s in sizes) + " |"
            )
    return lines


WAYS = {  # README's columns: what is tried, in this order, and what the table calls it
    "all weights": {
        "fits": (False, False, 0),
        "checkpointing": (True, False, 0),
        "checkpointing, offload": (True, True, 0),
    },
    "`--lora-rank 16`": {"fits": (False, False, 16), "checkpointing": (True, False, 16)},
}


def table_by_gpu() -> list[str]:
    """README's: with which flags a model fits on one GPU, and what it takes besides, in Markdown."""
    columns = [(size, name) for size in ("3b", "7b") for name in WAYS]
    heads = " | ".join(f"{size.upper()}, {name}" for size, name in columns)
    lines = [f"| one GPU of | {heads} |", "| --- |" + " --- |" * len(columns)]
    for gb, gib in GPUS.items():
        cells = [first_fitting(size, gib, WAYS[name]) for size, name in columns]
        lines.append(f"| {gb} GB | " + " | ".join(cells) + " |")
    for name, gibs in {"GiB of the computer's memory": host_gibs, "GiB on the disk": disk_gibs}.items():
        lines.append(f"| {name} | " + " | ".join(gibs(size, WAYS[way]) for size, way in columns) + " |")
    return lines


def first_fitting(size: str, gib: float, ways: dict) -> str:
    """The first of the ways with which one GPU is enough."""
    return next((words for words, how in ways.items() if gpus_needed(size, gib, *how) == 1), "-")


def host_gibs(size: str, ways: dict) -> str:
    """Of the computer's memory, without and with offload; with LoRA an export makes all weights of a role."""
    config, gibs = shape_config(size), {}
    whole = 2 * sum(plan.parameter_sizes(config).values())
    for words, (_, offload, rank) in ways.items():
        most = plan.host_plan(config, torch.bfloat16, offload, 1, rank).total + (whole if rank else 0)
        gibs[f"{most / 2**30:.0f}"] = words.partition(", ")[2]
    return ", ".join(f"{gib} with {words}" if words else gib for gib, words in gibs.items())


def disk_gibs(size: str, ways: dict) -> str:
    """What the run folder takes at most."""
    [rank] = {rank for _, _, rank in ways.values()}
    return f"{plan.disk_plan(shape_config(size), torch.bfloat16, SAVES, rank).total / 2**30:.0f}"


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    print("\n".join([*table(), "", *update_table(), "", *table_by_gpu()]))

"""How many GPUs of which size a model needs, by the memory plan: the table in the README.

bfloat16, groups of 8, 1,024 image tokens, up to 1,024 new tokens. A model fits if the plan's largest moment takes at most 95%
of what the GPU offers.
"""

import argparse

import torch
from shapes import shape_config

from engine import plan

GPUS = {24: 22.0, 40: 39.4, 80: 78.0, 141: 139.0}  # the name's GB -> the GiB that a process can have
COUNTS = (1, 2, 4, 8, 16)
FLAGS = {
    "": (False, False),
    "`--gradient-checkpointing`": (True, False),
    "`--gradient-checkpointing --offload`": (True, True),
}


def gpus_needed(size: str, gib: float, checkpointing: bool, offload: bool) -> int | None:
    """The smallest number of GPUs with which every moment fits, None if even the largest number is too small."""
    config, work, available = shape_config(size), plan.Work(1024, 100, 1024, 8, 1024, 10), int(gib * 2**30)

    def fits(count: int) -> bool:
        moments = plan.memory_plan(config, torch.bfloat16, available, work, checkpointing, offload, count)
        return max(moment.total for moment in moments) <= 0.95 * available

    return next(filter(fits, COUNTS)) if fits(COUNTS[-1]) else None


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    lines = [
        "| model | flags | " + " | ".join(f"{gb} GB" for gb in GPUS) + " |",
        "| --- | --- |" + " --- |" * len(GPUS),
    ]
    for size in ("3b", "7b"):
        for flags, (checkpointing, offload) in FLAGS.items():
            cells = [str(gpus_needed(size, gib, checkpointing, offload) or "-") for gib in GPUS.values()]
            lines.append(f"| {size.upper()} | {flags} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("\n".join(table()))

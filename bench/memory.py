"""How many GPUs of which size a model needs, by the memory plan: the table in the README.

bfloat16, groups of 8, 1,024 image tokens, up to 1,024 new tokens. A model fits if the plan's largest moment
takes at most 95% of what the GPU offers.
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
WORK = plan.Work(
    image_tokens=1024, text_tokens=100, new_tokens=1024, group_size=8, questions=1024, answers=10
)


def gpus_needed(size: str, gib: float, checkpointing: bool, offload: bool) -> int | None:
    """The smallest number of GPUs with which every moment fits; None if even the largest is too small."""
    config, available = shape_config(size), int(gib * 2**30)

    def fits(count: int) -> bool:
        moments = plan.memory_plan(config, torch.bfloat16, available, WORK, checkpointing, offload, count)
        return max(moment.total for moment in moments) <= 0.95 * available

    return next(filter(fits, COUNTS), None)


def table() -> list[str]:
    """The lines of the table, in Markdown."""
    names = [f"{gb} GB" for gb in GPUS]
    lines = ["| model | flags | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(GPUS)]
    for size in ("3b", "7b"):
        for flags, (checkpointing, offload) in FLAGS.items():
            cells = [str(gpus_needed(size, gib, checkpointing, offload) or "-") for gib in GPUS.values()]
            lines.append(f"| {size.upper()} | {flags} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    print("\n".join(table()))

"""How many GPUs of which size a model needs, by the memory plan: the tables in docs/memory.md.

bfloat16, groups of 8, 1,024 image tokens, up to 1,024 new tokens. A model fits if the plan's largest moment
takes at most 95% of what the GPU offers.
"""

import argparse

import torch
from shapes import shape_config

from engine import plan

# The name's GB -> the GiB that a process can have.
GPUS = {12: 11.0, 16: 14.7, 24: 22.0, 40: 39.4, 80: 78.0, 141: 139.0}
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


def update_table() -> list[str]:
    """What an update takes on one GPU, in GiB, and what is in the computer's memory, in Markdown."""
    columns, rows = [], {}
    for size in ("3b", "7b"):
        for flags, (checkpointing, offload) in FLAGS.items():
            config, available = shape_config(size), 141 * 2**30
            moments = plan.memory_plan(config, torch.bfloat16, available, WORK, checkpointing, offload)
            columns.append(f"{size.upper()} {flags}".strip())
            for name, value in moments[2].parts.items():
                rows.setdefault(name, {})[columns[-1]] = value
            rows.setdefault("**an update, in all**", {})[columns[-1]] = moments[2].total
            rows.setdefault("a plain copy, in rollouts", {})[columns[-1]] = moments[1].parts["reasoner"]
            host = plan.host_plan(config, torch.bfloat16, offload)
            rows.setdefault(host.name, {})[columns[-1]] = host.total
    lines = ["| GiB | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, values in rows.items():
        cells = [f"{values.get(column, 0) / 2**30:.1f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()
    print("\n".join([*table(), "", *update_table()]))

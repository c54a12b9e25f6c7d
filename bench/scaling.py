"""How the cost grows: a rollout and an update at 1, 2 and 4 times the images, the group and the new tokens.

    python bench/scaling.py --size small

Nothing should grow faster than its factor.
"""

import argparse
import statistics

import torch
from shapes import arguments, random_groups, random_prompts, random_vlm, seconds, show

import grpo
from model.generate import generate


def main() -> None:
    """Of each setting and factor the median seconds, and how many times those of factor 1."""
    args = arguments(__doc__, prompts=2, group_size=4, new_tokens=24, repeats=3)
    vlm = random_vlm(args.size, args.device, args.dtype)
    vlm.end_ids = [-1]  # nothing ends early
    results = {}
    for setting in ("prompts", "group_size", "new_tokens"):
        for work in (rollout, update):
            spent = {
                factor: median_seconds(work, vlm, args, setting, factor) for factor in (1, 2, 4)
            }
            for factor, value in spent.items():
                name = f"{work.__name__}, {setting} x {factor}"
                results |= {f"{name} (s)": value, f"{name}: times the first": value / spent[1]}
    show("scaling", args, results)


def median_seconds(work, vlm, args, setting: str, factor: int) -> float:
    """Of the work with this setting so many times as large, after one warm-up."""
    args = argparse.Namespace(**vars(args) | {setting: getattr(args, setting) * factor})
    work(vlm, args)
    return statistics.median(
        seconds(lambda: work(vlm, args), args.device) for _ in range(args.repeats)
    )


def rollout(vlm, args) -> None:
    """Samples a group for each prompt."""
    rng = torch.Generator(args.device).manual_seed(0)
    generate(
        vlm, random_prompts(vlm, args), args.group_size, args.new_tokens, top_p=0.99, generator=rng
    )


def update(vlm, args) -> None:
    """The reference's forward, then the policy's forward and backward."""
    groups = random_groups(vlm, args)
    grpo.add_reference(groups, vlm)
    grpo.backward(vlm, groups)
    vlm.model.zero_grad()


if __name__ == "__main__":
    main()

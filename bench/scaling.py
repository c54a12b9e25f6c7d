"""How the cost grows: seconds of a rollout and of an update at 1, 2 and 4 times the images, the group and the new tokens.

python bench/scaling.py --size small
"""

import copy

import torch
from shapes import arguments, random_completions, random_prompt, random_vlm, seconds, show

import grpo
from generate import generate


def main() -> None:
    args = arguments(__doc__, prompts=2, group_size=4, new_tokens=24, repeats=3)
    vlm = random_vlm(args.size, args.device, args.dtype)
    vlm.end_ids = [-1]  # nothing ends early
    results = {}
    for setting in ("prompts", "group_size", "new_tokens"):
        for name, work in (("rollout", rollout), ("update", update)):
            base = None
            for factor in (1, 2, 4):
                changed = copy.copy(args)
                setattr(changed, setting, getattr(args, setting) * factor)
                work(vlm, changed)
                spent = sorted(
                    seconds(lambda w=work, c=changed: w(vlm, c), args.device) for _ in range(args.repeats)
                )[args.repeats // 2]
                base = base or spent
                results[f"{name}, {setting} x {factor} (s)"] = spent
                results[f"{name}, {setting} x {factor}: times the first"] = spent / base
    show("scaling", args, results)


def rollout(vlm, args) -> None:
    prompts = [random_prompt(vlm, args.prompt_tokens, seed) for seed in range(args.prompts)]
    generate(
        vlm,
        prompts,
        args.group_size,
        args.new_tokens,
        top_p=0.99,
        generator=torch.Generator(args.device).manual_seed(0),
    )


def update(vlm, args) -> None:
    groups = []
    for seed in range(args.prompts):
        completions = random_completions(vlm, args.group_size, args.new_tokens, seed)
        groups.append(
            grpo.Group(
                random_prompt(vlm, args.prompt_tokens, seed),
                completions,
                [float(i % 2) for i in range(args.group_size)],
            )
        )
    grpo.add_reference(groups, vlm)
    grpo.backward(vlm, groups)
    vlm.model.zero_grad()


if __name__ == "__main__":
    main()

"""What each trick of rollouts and updates buys: the same work with it and without it, everything else left alone.

    python bench/tricks.py --size small

--vocab-size is that of the last part, whose subject is memory. In the part on finished rows, --new-tokens is the mean of
geometric lengths.
"""

from contextlib import contextmanager

import torch
from shapes import arguments, compare, peak_extra_bytes, random_completions, random_prompt, random_vlm, show

import generate
import grpo
import vlm as vlm_module


def main() -> None:
    args = arguments(__doc__, vocab_size=151_936)
    vlm = random_vlm(args.size, args.device, args.dtype)
    results = rollout_tricks(args, vlm) | update_tricks(args, vlm) | vocabulary_trick(args)
    show("tricks", args, results)


def rollout_tricks(args, vlm) -> dict[str, float]:
    prompts = [random_prompt(vlm, args.prompt_tokens, seed) for seed in range(args.prompts)]
    rng, n = torch.Generator(args.device).manual_seed(0), args.group_size

    def rollout(prompts=prompts, n=n, new_tokens=args.new_tokens) -> None:
        generate.generate(vlm, prompts, n, new_tokens, top_p=0.99, generator=rng)

    vlm.end_ids = [-1]  # nothing ends early
    results = ratio(
        "prompt once a group", rollout, lambda: rollout([p for p in prompts for _ in range(n)], 1), args
    )
    results |= ratio(
        "top-p without a sort", rollout, changed(rollout, generate, sample=sample_by_sorting), args
    )
    take, lengths = generate.Rows.take, geometric_lengths(len(prompts) * n, args.new_tokens)

    def take_until(rows, token) -> None:
        """Ends each row at its own length, the same with and without the trick."""
        take(rows, token)
        goals = torch.tensor(
            [lengths[prompt * n + sample] for prompt, sample, _ in rows.owners], device=token.device
        )
        rows.finished[: len(goals)] |= rows.written[: len(goals)] >= goals

    uneven = changed(lambda: rollout(new_tokens=4 * args.new_tokens), generate.Rows, take=take_until)
    return results | ratio("finished rows leave", uneven, changed(uneven, generate, LEAVE_BELOW=1e-9), args)


def geometric_lengths(count: int, mean: int) -> list[int]:
    """As answers have them: most are short, one is four times the mean."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.empty(count).geometric_(1 / mean, generator=rng).clamp(max=4 * mean).int().tolist()
    return [4 * mean, *drawn[1:]]


def update_tricks(args, vlm) -> dict[str, float]:
    groups = random_groups(args, vlm)

    def update() -> None:
        grpo.backward(vlm, groups)

    results = ratio("a group in one row", update, changed(update, vlm_module, ROW_TOKENS=1), args)
    return results | ratio("rows in batches", update, changed(update, vlm_module, BATCH_TOKENS=1), args)


def vocabulary_trick(args) -> dict[str, float]:
    """Peak memory of an update with logits of all tokens at once, against logits in chunks."""
    vlm = random_vlm(args.size, args.device, args.dtype, args.vocab_size)
    groups = random_groups(args, vlm)

    def update() -> None:
        grpo.backward(vlm, groups)

    update()  # so that the gradients themselves are there before and after
    chunks = peak_extra_bytes(update, args.device)
    at_once = peak_extra_bytes(changed(update, vlm_module, LOGITS={args.device: 1 << 60}), args.device)
    return {"logits in chunks: peak, MB": chunks / 1e6, "logits at once: peak, MB": at_once / 1e6}


def random_groups(args, vlm) -> list[grpo.Group]:
    rewards = [float(i % 2) for i in range(args.group_size)]
    groups = [
        grpo.Group(
            random_prompt(vlm, args.prompt_tokens, seed),
            random_completions(vlm, args.group_size, args.new_tokens, seed),
            rewards,
        )
        for seed in range(args.prompts)
    ]
    grpo.add_reference(groups, vlm)
    return groups


def ratio(name: str, with_it, without, args) -> dict[str, float]:
    measured = compare(with_it, without, args.device, args.repeats)
    return {
        f"{name} (s)": measured["ours_s"],
        f"without (s), {name}": measured["theirs_s"],
        f"ratio, {name}": measured["ratio"],
    }


def changed(work, module, **values):
    """The work, with these names of a module replaced while it runs."""

    def run() -> None:
        with replaced(module, values):
            work()

    return run


@contextmanager
def replaced(module, values: dict):
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def sample_by_sorting(logits, temperature, top_p, top_k, generator):
    """Nucleus sampling as it is usually written."""
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    probs = torch.where(probs.cumsum(dim=-1) - probs < top_p, probs, 0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


if __name__ == "__main__":
    main()

"""What each trick of rollouts and updates buys: the same work with it and without it, all else left alone.

    python bench/tricks.py --size small

--vocab-size is that of the last part, whose subject is memory. In the part on finished rows, --new-tokens is
the mean of geometric lengths.
"""

from contextlib import contextmanager

import torch
from shapes import (
    arguments,
    compare,
    peak_extra_bytes,
    random_groups,
    random_prompts,
    random_vlm,
    show,
)

import grpo
from model import generate, logprobs, packing


def main() -> None:
    """All tricks, one after the other."""
    args = arguments(__doc__, vocab_size=151_936)
    vlm = random_vlm(args.size, args.device, args.dtype)
    results = rollout_tricks(args, vlm) | update_tricks(args, vlm) | vocabulary_trick(args)
    show("tricks", args, results)


def rollout_tricks(args, vlm) -> dict[str, float]:
    """The prompt once, no sort, and finished rows that leave."""
    prompts, n = random_prompts(vlm, args), args.group_size
    rng = torch.Generator(args.device).manual_seed(0)

    def rollout(prompts=prompts, n=n, new_tokens=args.new_tokens) -> None:
        generate.generate(vlm, prompts, n, new_tokens, top_p=0.99, generator=rng)

    vlm.end_ids = [-1]  # nothing ends early
    repeated = [p for p in prompts for _ in range(n)]
    by_sorting = changed(rollout, generate, sample=sample_by_sorting)
    results = ratio("prompt once a group", rollout, lambda: rollout(repeated, 1), args)
    results |= ratio("top-p without a sort", rollout, by_sorting, args)

    lengths = geometric_lengths(len(prompts) * n, args.new_tokens)
    uneven = lambda: rollout(new_tokens=4 * args.new_tokens)  # noqa: E731
    leaving = changed(uneven, generate.Rollout, find_finished=finished_at(lengths, n, False))
    staying = changed(uneven, generate.Rollout, find_finished=finished_at(lengths, n, True))
    return results | ratio("finished rows leave", leaving, staying, args)


def geometric_lengths(count: int, mean: int) -> list[int]:
    """As answers have them: most are short, one is four times the mean."""
    rng = torch.Generator().manual_seed(0)
    drawn = (
        torch.empty(count).geometric_(1 / mean, generator=rng).clamp(max=4 * mean).int().tolist()
    )
    return [4 * mean, *drawn[1:]]


def finished_at(lengths: list[int], n: int, together: bool):
    """`Rollout.find_finished` with an end for each row at its own length; together: all leave at the end."""

    def find_finished(rollout, schedule) -> list[int]:
        written = rollout.rows.written.tolist()
        found = [
            row
            for row, owner in schedule.owners.items()
            if written[row] >= lengths[owner.prompt * n + owner.sample]
        ]
        return [] if together and len(found) < len(schedule.owners) else found

    return find_finished


def sample_by_sorting(logits, temperature, top_p, top_k, uniform, pieces=None):
    """Nucleus sampling as it is usually written."""
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    probs = torch.where(probs.cumsum(dim=-1) - probs < top_p, probs, 0)
    return order.gather(1, torch.multinomial(probs, 1))[:, 0]


def update_tricks(args, vlm) -> dict[str, float]:
    """A group in one row, and several rows in a batch."""
    update = update_of(args, vlm)
    results = ratio("a group in one row", update, changed(update, packing, ROW_TOKENS=1), args)
    return results | ratio(
        "rows in batches", update, changed(update, packing, BATCH_TOKENS=1), args
    )


def vocabulary_trick(args) -> dict[str, float]:
    """Peak memory of an update with logits of all tokens at once, against logits in chunks."""
    vlm = random_vlm(args.size, args.device, args.dtype, args.vocab_size)
    update = update_of(args, vlm)
    unchunked = changed(update, logprobs, LOGITS={args.device: 1 << 60})
    update()  # so that the gradients themselves are there before and after
    peaks = [peak_extra_bytes(work, args.device) / 1e6 for work in (update, unchunked)]
    return dict(zip(("logits in chunks: peak, MB", "logits at once: peak, MB"), peaks))


def update_of(args, vlm):
    """Forward and backward on random groups, as a function."""
    groups = random_groups(vlm, args)
    grpo.add_reference(groups, vlm)
    return lambda: grpo.backward(vlm, groups)


# ---- With and without --------------------------------------------------------------------------------------


def ratio(name: str, with_it, without, args) -> dict[str, float]:
    """Seconds of both, and how many times as long it takes without the trick."""
    measured = compare(with_it, without, args.device, args.repeats)
    names = (f"{name} (s)", f"without (s), {name}", f"ratio, {name}")
    return dict(zip(names, (measured["ours_s"], measured["theirs_s"], measured["ratio"])))


def changed(work, module, **values):
    """The work, with these names of a module replaced while it runs."""

    def run() -> None:
        with replaced(module, values):
            work()

    return run


@contextmanager
def replaced(module, values: dict):
    """Names of a module have these values for the length of a `with` block."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


if __name__ == "__main__":
    main()

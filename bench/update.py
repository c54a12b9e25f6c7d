"""The update: packed log-probabilities and their gradient against the plain forward, at equal settings.

    python bench/update.py --size small --prompt-tokens 300 --group-size 8 --new-tokens 48
    python bench/update.py --vocab-size 151936          for the peak memory

The plain side is a batch of G rows for each group, each row with its own copy of the image and the prompt, as
in TRL and the official code; logits for the completion tokens only (`logits_to_keep`), log-softmax, gather
(TRL spares one copy of the logits there). It differentiates a group at a time, ours a batch of packed rows.
Both take the same GRPO loss.
"""

import itertools

import torch
from shapes import arguments, compare, peak_extra_bytes, random_groups, random_vlm, show

import grpo


def main() -> None:
    """Whether both sides agree, then the seconds and the peak of each."""
    args = arguments(__doc__, vocab_size=0)
    vlm = random_vlm(args.size, args.device, args.dtype, args.vocab_size)
    groups = random_groups(vlm, args)
    grpo.add_reference(groups, vlm)

    def ours() -> float:
        vlm.model.zero_grad()
        return grpo.backward(vlm, groups)["loss"]

    def theirs() -> float:
        vlm.model.zero_grad()
        return grpo.backward(Plain(vlm), groups)["loss"]

    results = {"loss_difference": abs(ours() - theirs())}
    results["gradient_difference"] = gradient_difference(vlm, ours, theirs)
    results |= compare(ours, theirs, args.device, args.repeats)
    for name, policy in dict(
        ours=vlm, theirs=Plain(vlm)
    ).items():  # the gradients themselves are there already
        peak = peak_extra_bytes(lambda policy=policy: grpo.backward(policy, groups), args.device)
        results[f"{name}_peak_mb"] = peak / 1e6
    results["memory_ratio"] = results["theirs_peak_mb"] / results["ours_peak_mb"]
    show("update", args, results)


class Plain:
    """A policy for `grpo`: one row a completion, by transformers' own forward."""

    def __init__(self, vlm):
        self.vlm = vlm

    def retry(self, attempt):
        """See grpo.py: here memory must suffice."""
        return attempt()

    def batches(self, completions, temperature):
        """See grpo.py; a batch is a group, whose completions are equally long."""
        model = self.vlm.model
        for _, batch in itertools.groupby(
            completions, key=lambda completion: id(completion.prompt)
        ):
            group = list(batch)
            prompt = group[0].prompt
            n, length = len(group), len(group[0].tokens)
            written = torch.tensor([completion.tokens for completion in group])
            ids = torch.cat([prompt.ids.expand(n, -1), written], dim=1).to(model.device)
            model.model.rope_deltas = None
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=prompt.images[0].pixels.repeat(n, 1).to(model.device, model.dtype),
                image_grid_thw=prompt.images[0].grid.repeat(n, 1).to(model.device),
                logits_to_keep=length + 1,
                use_cache=False,
            ).logits[:, :-1]
            logp = (logits.float() / temperature).log_softmax(-1)
            logp = logp.gather(2, ids[:, len(prompt) :, None])[..., 0]
            yield group, list(logp), n / len(completions)


def gradient_difference(vlm, ours, theirs) -> float:
    """The norm of the difference of the two gradients, relative to the norm of the gradient."""

    def gradient(work) -> list[torch.Tensor]:
        work()
        return [p.grad.float().clone() for p in vlm.model.parameters() if p.grad is not None]

    def norm(tensors) -> float:
        return torch.stack([tensor.norm() for tensor in tensors]).norm().item()

    a, b = gradient(ours), gradient(theirs)
    return norm([x - y for x, y in zip(a, b)]) / norm(b)


if __name__ == "__main__":
    main()

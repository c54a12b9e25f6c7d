"""The update: packed log-probabilities and their gradient against the plain forward, at equal settings.

    python bench/update.py --size small --prompt-tokens 300 --group-size 8 --new-tokens 48
    python bench/update.py --vocab-size 151936          for the peak memory

The plain side is a batch of G rows for each group, each row with its own copy of the image and the prompt, as in TRL and
the official code; logits for the completion tokens only (`logits_to_keep`), log-softmax, gather (TRL spares one copy of
the logits there). It differentiates a group at a time, ours a batch of packed rows. Both take the same GRPO loss.
"""

import torch
from shapes import arguments, compare, peak_extra_bytes, random_completions, random_prompt, random_vlm, show

import grpo


def main() -> None:
    args = arguments(__doc__, vocab_size=0)
    vlm = random_vlm(args.size, args.device, args.dtype, args.vocab_size)
    groups = [random_group(vlm, args, seed) for seed in range(args.prompts)]
    grpo.add_reference(groups, vlm)
    policies = dict(ours=vlm, theirs=Plain(vlm))

    def gradient(policy) -> float:
        vlm.model.zero_grad()
        return grpo.backward(policy, groups)["loss"]

    losses = {name: gradient(policy) for name, policy in policies.items()}
    results = {
        "loss_difference": abs(losses["ours"] - losses["theirs"]),
        "gradient_difference": difference(gradient, policies, vlm),
    }
    results |= compare(
        lambda: gradient(policies["ours"]), lambda: gradient(policies["theirs"]), args.device, args.repeats
    )
    for name, policy in policies.items():
        vlm.model.zero_grad()
        gradient(policy)  # so that the gradients themselves are there before and after
        results[f"{name}_peak_mb"] = (
            peak_extra_bytes(lambda policy=policy: grpo.backward(policy, groups), args.device) / 1e6
        )
    results["memory_ratio"] = results["theirs_peak_mb"] / results["ours_peak_mb"]
    show("update", args, results)


def random_group(vlm, args, seed: int) -> grpo.Group:
    completions = random_completions(vlm, args.group_size, args.new_tokens, seed)
    rewards = [float(i % 2) for i in range(args.group_size)]
    return grpo.Group(random_prompt(vlm, args.prompt_tokens, seed), completions, rewards)


class Plain:
    """A policy for `grpo`: one row a completion, by transformers' own forward."""

    def __init__(self, vlm):
        self.vlm = vlm

    def packed_logprobs(self, groups, temperature):
        for g, (prompt, completions) in enumerate(groups):
            n, model = len(completions), self.vlm.model
            ids = torch.cat([prompt.ids.expand(n, -1), torch.tensor(completions)], dim=1).to(model.device)
            model.model.rope_deltas = None
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=prompt.pixels.repeat(n, 1).to(model.device, model.dtype),
                image_grid_thw=prompt.grid.repeat(n, 1).to(model.device),
                logits_to_keep=len(completions[0]) + 1,
                use_cache=False,
            ).logits[:, :-1]
            logp = (
                (logits.float() / temperature).log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0]
            )
            yield [(g, i) for i in range(n)], list(logp)


def difference(gradient, policies, vlm) -> float:
    """The largest difference of the two gradients, relative to the norm of the gradient."""
    both = []
    for policy in policies.values():
        gradient(policy)
        both.append([p.grad.to_dense().float().clone() for p in vlm.model.parameters() if p.grad is not None])
    norm = torch.stack([g.norm() for g in both[1]]).norm().item()
    return torch.stack([(a - b).norm() for a, b in zip(*both)]).norm().item() / norm


if __name__ == "__main__":
    main()

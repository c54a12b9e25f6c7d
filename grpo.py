r"""Group Relative Policy Optimization, by hand (DeepSeekMath, arXiv 2402.03300; VisPlay, section 3.1).

G completions y_1 .. y_G of one prompt have rewards r_1 .. r_G. There is no value network: the group is its
own baseline,

    A_i     = (r_i - mean(r_1 .. r_G)) / (std(r_1 .. r_G) + 1e-4)                          -> group_advantages
    rho_i,t = exp(log pi(y_i,t) - log pi_old(y_i,t))
    KL_i,t  = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1                           -> kl_estimate
    L       = 1/N sum_i 1/|y_i| sum_t [ -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta KL ]   -> grpo_loss

`update` makes one optimizer step out of it; as each rollout is used once, rho = 1 and the clip is idle. What
the official code does otherwise is in docs/differences.md.

This file knows nothing of models or files. A policy, or a reference, is anything that has `batches(groups,
temperature)`, which yields (which, logps, share) of completions that are forwarded together: which [(g, i),
..], completion i of group g; logps, the log-probabilities [T_i] of each; share, their part of all. And
`use_less_memory()`, for smaller batches. A policy has `parameters()` besides (see vlm.py, engine/shards.py).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Group:
    """The G completions of one prompt, with their rewards.

    old_logp, ref_logp: of completion i the log-probabilities [T_i] under the policy that sampled it (filled
    in by the first `update`) and under the reference (by `add_reference`).
    """

    prompt: Any
    completions: list[list[int]]
    rewards: list[float]
    ref_logp: dict[int, Tensor] = field(default_factory=dict)
    old_logp: dict[int, Tensor] = field(default_factory=dict)


# ---- The equations -------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) over each group. rewards: [N, G], returns [N, G].

    std divides by G. A group whose rewards are all equal has advantage 0, exactly.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # 0.1 + 0.1 + 0.1 has a mean that is not 0.1
    return torch.where(equal, 0.0, centred / (rewards.std(dim=1, correction=0, keepdim=True) + eps))


def kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(pi || pi_ref) per token at a sample of pi: unbiased and never negative (Schulman's k3)."""
    difference = ref_logp - logp
    return difference.exp() - difference - 1.0


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    beta: float = 0.01,
) -> tuple[Tensor, dict[str, float]]:
    """The GRPO loss of B completions of at most T tokens, a mean over tokens, then over completions.

    logp, old_logp, ref_logp: [B, T] log-probabilities; mask: [B, T], nonzero where there is a token (what
    stands elsewhere does not matter, NaN included); advantages: [B]. Returns the loss and its parts as
    numbers: policy_loss, kl, clip_share (tokens whose ratio is clipped), ratio.
    """
    real = mask.bool()
    logp, old_logp, ref_logp = (torch.where(real, x, 0.0) for x in (logp, old_logp, ref_logp))
    advantage = advantages[:, None].to(logp.dtype)
    rho = (logp - old_logp).exp()
    unclipped, clipped = rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage
    policy, kl = -torch.minimum(unclipped, clipped), kl_estimate(logp, ref_logp)
    tokens = real.sum(dim=1, keepdim=True).clamp(min=1)
    weight = real.to(logp.dtype) / (tokens * max(1, len(logp)))
    loss = ((policy + beta * kl) * weight).sum()
    parts = {"policy_loss": policy, "kl": kl, "clip_share": (clipped < unclipped).float(), "ratio": rho}
    metrics = {name: (part.detach() * weight).sum().item() for name, part in parts.items()}
    return loss, {"loss": loss.item()} | metrics


# ---- The update ----------------------------------------------------------------------------------------


def add_reference(groups: list[Group], reference, temperature: float = 1.0) -> None:
    """Fills in the reference's log-probabilities of every group."""
    while True:
        try:
            with torch.no_grad():
                for which, logps, _ in reference.batches(pairs(groups), temperature):
                    for (g, i), logp in zip(which, logps):
                        groups[g].ref_logp[i] = logp
            return
        except torch.OutOfMemoryError:
            pass  # out of this block first: the exception holds the batch
        reference.use_less_memory()


def update(
    policy,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    clip: float = 0.2,
    beta: float = 0.01,
    temperature: float = 1.0,
    max_norm: float = 1.0,
) -> dict[str, float]:
    """One optimizer step on all groups; begins again with smaller batches where memory runs out.

    Returns the means of `grpo_loss`'s metrics, `grad_norm` before clipping, and `skipped`: 1 if the gradient
    was not finite, which changes nothing.
    """
    while True:
        try:
            metrics = backward(policy, groups, clip, beta, temperature)
            break
        except torch.OutOfMemoryError:
            pass  # as above
        optimizer.zero_grad()
        policy.use_less_memory()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # over all shards
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return metrics | {"grad_norm": norm, "skipped": float(not math.isfinite(norm))}


def backward(
    policy, groups: list[Group], clip: float = 0.2, beta: float = 0.01, temperature: float = 1.0
) -> dict[str, float]:
    """Adds the gradient of the loss of all groups, each batch by its share; returns the loss's metrics.

    The first call keeps log pi as log pi_old, as the policy is the one that sampled; later calls read it.
    """
    advantages = [group_advantages(torch.tensor([g.rewards]))[0].tolist() for g in groups]
    totals: dict[str, float] = {}
    for which, logps, share in policy.batches(pairs(groups), temperature):
        for (g, i), logp in zip(which, logps):
            groups[g].old_logp.setdefault(i, logp.detach())
        logp, mask = _pad(logps)
        old = _pad([groups[g].old_logp[i] for g, i in which])[0]
        ref = _pad([groups[g].ref_logp[i] for g, i in which])[0]
        advantage = torch.tensor([advantages[g][i] for g, i in which], device=logp.device)
        loss, metrics = grpo_loss(logp, old, ref, advantage, mask, clip, beta)
        (loss * share).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + share * value
    return totals


def pairs(groups: list[Group]) -> list[tuple[Any, list[list[int]]]]:
    """What `batches` takes."""
    return [(group.prompt, group.completions) for group in groups]


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors [T_i] -> ([B, T], mask [B, T])."""
    mask = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (rows, mask))

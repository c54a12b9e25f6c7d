r"""Group Relative Policy Optimization, by hand (DeepSeekMath, arXiv 2402.03300; VisPlay, section 3.1).

G completions y_1 .. y_G of one prompt have rewards r_1 .. r_G. There is no value network: the group is its
own baseline,

    A_i     = (r_i - mean(r_1 .. r_G)) / (std(r_1 .. r_G) + 1e-4)                          -> group_advantages
    rho_i,t = exp(log pi(y_i,t) - log pi_old(y_i,t))
    KL_i,t  = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1                           -> kl_estimate
    L       = 1/N sum_i 1/|y_i| sum_t [ -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta KL ]   -> grpo_loss

A `Completion` travels from the rollout to the loss. `update` makes one optimizer step of many groups. As each
rollout is used once, rho = 1 and the clip is idle. docs/differences.md lists what the official code does
otherwise.

This file knows nothing of models or files. It asks two things of a model: see `Policy`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(eq=False)
class Completion:
    """One sampled completion y of a prompt. Its fields are filled in as they become known."""

    prompt: Any  # what the policy was given; completions of one group share one object
    tokens: list[int]  # y_1 .. y_T
    reward: float = 0.0  # r
    advantage: float = 0.0  # A, set by `backward`
    old_logp: Tensor | None = None  # [T] log pi_old, set by the first `backward`
    ref_logp: Tensor | None = None  # [T] log pi_ref, set by `add_reference`


Group = list[Completion]  # the G completions of one prompt
Batch = tuple[list[Completion], list[Tensor], float]  # see `Policy.batches`


class Policy(Protocol):
    """A model, as GRPO sees it: the policy in training, or the reference."""

    def batches(self, completions: list[Completion], temperature: float) -> Iterator[Batch]:
        """Yields completions a batch at a time, with their log-probabilities and the weight of the batch.

        The log-probabilities are one tensor [T] a completion. The weight is the batch's part of all
        completions, so that the weighted losses of all batches add up to the loss.
        """

    def retry(self, attempt: Callable[[], Any]) -> Any:
        """Returns attempt(). Tries again with smaller batches whenever memory runs out."""


def make_group(
    prompt: Any, completions: Iterable[list[int]], rewards: Sequence[float] = ()
) -> Group:
    """Returns the completions (token ids) of one prompt as a group, with their rewards if they are known."""
    group = [Completion(prompt, tokens) for tokens in completions]
    if rewards:
        set_rewards([group], [rewards])
    return group


def set_rewards(groups: Sequence[Group], rewards: Sequence[Sequence[float]]) -> None:
    """Writes the rewards of each group into its completions. Raises ValueError for too few or too many."""
    for group, group_rewards in zip(groups, rewards, strict=True):
        for completion, reward in zip(group, group_rewards, strict=True):
            completion.reward = reward


# ---- The equations -------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) over each group. rewards: [N, G], returns [N, G].

    std divides by G. A group whose rewards are all equal has advantage 0, exactly.
    """
    if not rewards.is_floating_point():
        rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, correction=0, keepdim=True)
    # Equal rewards may differ from their mean: that of 0.1, 0.1, 0.1 is not 0.1.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + eps))


def kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimates KL(pi || pi_ref) per token at a sample of pi: unbiased, never negative (Schulman's k3)."""
    difference = ref_logp - logp
    return difference.exp() - difference - 1.0


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each row over the tokens of its mask: [B, T] -> [B]; 0 for a row without tokens."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    beta: float = 0.01,
) -> tuple[Tensor, dict[str, float]]:
    """The GRPO loss of B completions of at most T tokens: a mean over tokens, then over completions.

    logp, old_logp, ref_logp: [B, T] log-probabilities. mask: [B, T], nonzero where there is a token; other
    places do not matter, NaN included. advantages: [B]. Returns the loss and its parts as numbers:
    policy_loss, kl, clip_share (tokens whose ratio is clipped), ratio.
    """
    # Padding becomes 0 before it can spread a NaN.
    logp, old_logp, ref_logp = (
        torch.where(mask.bool(), x, 0.0) for x in (logp, old_logp, ref_logp)
    )
    mask = mask.bool().to(logp.dtype)
    advantage = advantages[:, None].to(logp.dtype)

    rho = (logp - old_logp).exp()
    unclipped = rho * advantage
    clipped = rho.clamp(1 - clip, 1 + clip) * advantage
    policy_loss = -torch.minimum(unclipped, clipped)
    kl = kl_estimate(logp, ref_logp)
    per_token_loss = policy_loss + beta * kl
    loss = masked_mean(per_token_loss, mask).mean()

    is_clipped = (clipped < unclipped).to(logp.dtype)
    parts = {"policy_loss": policy_loss, "kl": kl, "clip_share": is_clipped, "ratio": rho}
    metrics = {name: masked_mean(part.detach(), mask).mean().item() for name, part in parts.items()}
    return loss, {"loss": loss.item()} | metrics


# ---- The update ----------------------------------------------------------------------------------------


def add_reference(groups: list[Group], reference: Policy, temperature: float = 1.0) -> None:
    """Sets the log-probabilities under the reference, of every completion of every group."""

    @torch.no_grad()
    def attempt() -> None:
        for batch, logps, _ in reference.batches(flatten(groups), temperature):
            for completion, logp in zip(batch, logps):
                completion.ref_logp = logp

    reference.retry(attempt)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    clip: float = 0.2,
    beta: float = 0.01,
    temperature: float = 1.0,
    max_norm: float = 1.0,
) -> dict[str, float]:
    """Makes one optimizer step on all groups.

    Returns the means of `grpo_loss`'s metrics, `grad_norm` before clipping, and `skipped`: 1 if the gradient
    was not finite; then weights and optimizer state stay as they are.
    """
    first_time = [completion for completion in flatten(groups) if completion.old_logp is None]

    def attempt() -> dict[str, float]:
        # Drop what an attempt that ran out of memory has left.
        optimizer.zero_grad()
        for completion in first_time:
            completion.old_logp = None
        return backward(policy, groups, clip, beta, temperature)

    metrics = policy.retry(attempt)

    # Clip, step, and forget the gradient.
    parameters = [p for param_group in optimizer.param_groups for p in param_group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if hasattr(norm, "full_tensor"):  # over the shards of all processes
        norm = norm.full_tensor()
    is_finite = math.isfinite(float(norm))
    if is_finite:
        optimizer.step()
    optimizer.zero_grad()
    return metrics | {"grad_norm": float(norm), "skipped": float(not is_finite)}


def backward(
    policy: Policy,
    groups: list[Group],
    clip: float = 0.2,
    beta: float = 0.01,
    temperature: float = 1.0,
) -> dict[str, float]:
    """Adds the gradient of the loss of all groups, a batch at a time; returns the loss's metrics.

    The first call keeps log pi as log pi_old, as the policy is the one that sampled; later calls read it.
    """
    for group in groups:
        rewards = torch.tensor([[completion.reward for completion in group]])
        for completion, advantage in zip(group, group_advantages(rewards)[0].tolist()):
            completion.advantage = advantage

    totals: dict[str, float] = {}
    for batch, logps, weight in policy.batches(flatten(groups), temperature):
        for completion, logp in zip(batch, logps):
            if completion.old_logp is None:
                completion.old_logp = logp.detach()

        # Tensors [T_i] -> [B, T], padded on the right.
        logp, mask = pad(logps)
        old_logp, _ = pad([completion.old_logp for completion in batch])
        ref_logp, _ = pad([completion.ref_logp for completion in batch])
        advantages = torch.tensor(
            [completion.advantage for completion in batch], device=logp.device
        )

        loss, metrics = grpo_loss(logp, old_logp, ref_logp, advantages, mask, clip, beta)
        (loss * weight).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + weight * value
    return totals


def flatten(groups: list[Group]) -> list[Completion]:
    """Returns all completions of all groups, group after group."""
    return [completion for group in groups for completion in group]


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads tensors [T_i] on the right: returns [B, T], and the mask [B, T] that is True at the tokens."""
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)

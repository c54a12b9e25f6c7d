r"""Group Relative Policy Optimization, by hand (DeepSeekMath, arXiv 2402.03300; VisPlay, section 3.1).

G completions y_1 .. y_G of one prompt have rewards r_1 .. r_G. There is no value network: the group is its own baseline,

    A_i     = (r_i - mean(r_1 .. r_G)) / (std(r_1 .. r_G) + eps)                           -> group_advantages
    rho_i,t = exp(log pi(y_i,t) - log pi_old(y_i,t))
    KL_i,t  = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1                           -> kl_estimate
    L       = 1/N sum_i 1/|y_i| sum_t [ -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta KL ]   -> grpo_loss

`update` makes one step of AdamW out of it. What differs from the official code: it averages over all tokens of the
batch at once (`token_mean=True` here) instead of over each completion first, and divides by the sample standard
deviation of the group (G - 1) where this file takes the group's own (G).

This file knows nothing of images, roles or files: a policy is anything with `packed_logprobs(groups, temperature)`, which
yields the log-probabilities of some completions after the other (see `vlm.VLM`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.shards import Ranks


@dataclass
class Group:
    """The G completions of one prompt, with all that an update needs to know of them.

    old_logp, ref_logp: of completion i a tensor [T_i] of log-probabilities under the policy that sampled it and under
    the reference. The first `update` fills in old_logp, `add_reference` fills in ref_logp.
    """

    prompt: Any
    completions: list[list[int]]
    rewards: list[float]
    ref_logp: dict[int, Tensor] = field(default_factory=dict)
    old_logp: dict[int, Tensor] = field(default_factory=dict)


# ---- The equations -----------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) over each group. rewards: [N, G], returns [N, G].

    std is that of the group itself (divided by G). A group whose rewards are all equal has advantage 0, exactly.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # 0.1 + 0.1 + 0.1 has a mean that is not 0.1
    return torch.where(equal, 0.0, centred / (rewards.std(dim=1, correction=0, keepdim=True) + eps))


def kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(pi || pi_ref) per token, estimated at a sample of pi: unbiased and never negative (Schulman's k3)."""
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
    token_mean: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The GRPO loss of B completions of at most T tokens.

    logp, old_logp, ref_logp: [B, T] log-probabilities; mask: [B, T], nonzero where there is a token (what stands in the
    other places does not matter, NaN included); advantages: [B]. Averages over the tokens of each completion, then over
    completions; with `token_mean` over all tokens at once. Returns the loss and its parts as numbers: policy_loss, kl,
    clip_share (tokens whose ratio is clipped), ratio.
    """
    real = mask.bool()
    logp, old_logp, ref_logp = (torch.where(real, x, 0.0) for x in (logp, old_logp, ref_logp))
    advantage = advantages[:, None].to(logp.dtype)
    rho = (logp - old_logp).exp()
    unclipped, clipped = rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage
    policy, kl = -torch.minimum(unclipped, clipped), kl_estimate(logp, ref_logp)

    tokens = real.sum(dim=1, keepdim=True).clamp(min=1)
    weight = real.to(logp.dtype) / (real.sum().clamp(min=1) if token_mean else tokens * max(1, len(logp)))
    loss = ((policy + beta * kl) * weight).sum()
    parts = {"policy_loss": policy, "kl": kl, "clip_share": (clipped < unclipped).float(), "ratio": rho}
    metrics = {name: (part.detach() * weight).sum().item() for name, part in parts.items()}
    return loss, {"loss": loss.item()} | metrics


# ---- The update --------------------------------------------------------------------------------------------------------


class MasterAdamW:
    """AdamW on float32 master weights; train inside `with optimizer:`.

    At a learning rate of 1e-6 a bfloat16 weight never moves: the step is far below the spacing of its values. So the
    optimizer holds and moves a float32 copy and rounds it into the model after each step. Gradients are added up in
    float32 too, as soon as each is ready. A float32 model is its own master.

    Make one per role and keep it: what 20 steps change is mostly still below the rounding, and adds up over the phases in
    the masters only. Each `with` is a phase: it starts with fresh moments, and at its end the masters are parked on the CPU.

    With `offload` masters and moments stay on the CPU throughout, 12 bytes a parameter that the GPU does not hold. A
    phase has so few steps that carrying each gradient over and the weights back is no great matter. They pass one tensor
    at a time (hence an AdamW for each) through one pinned buffer, which the GPU reads and writes at full speed.

    Of several `ranks` each owns some of the tensors, and has masters and moments of these alone (see ranks.py).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        lr: float,
        weight_decay: float,
        offload: bool = False,
        ranks: Ranks | None = None,
    ):
        self.settings, self.offload, self.ranks = (
            dict(lr=lr, weight_decay=weight_decay, fused=True),
            offload,
            ranks or Ranks(),
        )
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.owner = self.ranks.owners({name: p.numel() for name, p in self.parameters.items()})
        self.masters = {
            name: p
            if p.dtype == torch.float32 and not offload
            else p.detach().to("cpu", torch.float32, copy=True)
            for name, p in self.parameters.items()
            if self.owner[name] == self.ranks.rank
        }

    def __enter__(self) -> "MasterAdamW":
        for name, master in self.masters.items():
            if master is not self.parameters[name] and not self.offload:
                master.data = master.data.to(self.parameters[name].device)
        self.adamw = {
            name: torch.optim.AdamW([master], **self.settings) for name, master in self.masters.items()
        }
        self.gradients: dict[str, Tensor] = {}
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._add_gradient(name, p))
            for name, p in self.parameters.items()
        ]
        largest, cuda = (
            max(p.numel() for p in self.parameters.values()),
            any(p.is_cuda for p in self.parameters.values()),
        )
        self.buffer = torch.empty(largest, pin_memory=cuda) if self.offload else None
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()
        del self.adamw, self.gradients, self.buffer
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                master.data = master.data.cpu()

    def _add_gradient(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad.to_dense().float(), None
        self.gradients[name] = self.gradients[name].add_(gradient) if name in self.gradients else gradient

    def step(self, max_norm: float) -> float:
        """Clips the gradient to `max_norm`, steps, clears it; returns its norm before clipping.

        A gradient that is not finite changes nothing but is still cleared: the caller sees the norm.
        """
        used = self._reduce()
        norms = [gradient.norm() for gradient in self.gradients.values()]
        norm = math.hypot(*self.ranks.gather([torch.stack(norms).norm().item() if norms else 0.0]))
        if math.isfinite(norm):
            for name in list(self.gradients):
                self._step_one(name, min(1.0, max_norm / (norm + 1e-6)))
            for name in used:
                self.ranks.broadcast(self.parameters[name].data, self.owner[name])
        self.gradients.clear()
        return norm

    def discard(self) -> float:
        """Clears the gradient, and what a backward pass that was cut short left of it, instead of stepping; returns NaN for its norm."""
        self.gradients.clear()
        for parameter in self.parameters.values():
            parameter.grad = None
        return math.nan

    def _reduce(self) -> list[str]:
        """Makes the gradients of the tensors that this rank owns the sum over all ranks; returns which have any."""
        if self.ranks.size == 1:
            return list(self.gradients)
        somewhere = set(self.ranks.gather(list(self.gradients)))
        used = [name for name in self.parameters if name in somewhere]
        for name in used:
            gradient = self.gradients.pop(name, None)
            if gradient is None:
                gradient = torch.zeros_like(self.parameters[name], dtype=torch.float32)
            self.ranks.reduce(gradient, self.owner[name])
            if name in self.masters:
                self.gradients[name] = gradient
        return used

    @torch.no_grad()
    def _step_one(self, name: str, scale: float) -> None:
        parameter, master, gradient, staged = (
            self.parameters[name],
            self.masters[name],
            self.gradients.pop(name).mul_(scale),
            None,
        )
        if self.offload:
            staged = self.buffer[: gradient.numel()].view_as(gradient)
            gradient = staged.copy_(gradient)
        master.grad = gradient
        self.adamw[name].step()
        master.grad = None
        if (
            staged is not None
        ):  # in the parameter's own dtype: a copy that converts would not read pinned memory
            staged = self.buffer.view(parameter.dtype)[: parameter.numel()].view_as(parameter)
            parameter.copy_(staged.copy_(master))
        elif master is not parameter:
            parameter.copy_(master)

    # What an interrupted run needs, of the tensors that this rank owns:

    def weights(self) -> dict[str, Tensor]:
        """The masters by name."""
        return {name: master.detach() for name, master in self.masters.items()}

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, named NAME:exp_avg and so on."""
        kinds = {name: adamw.state[self.masters[name]] for name, adamw in self.adamw.items()}
        return {f"{name}:{kind}": tensor for name, state in kinds.items() for kind, tensor in state.items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts float32 weights by name into the model, all of them, and into the masters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
            if name in self.masters and self.masters[name] is not parameter:
                self.masters[name].copy_(weights[name])

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Goes on with these moments, inside a `with`."""
        for key, tensor in moments.items():
            name, kind = key.rsplit(":", 1)
            if name in self.masters:
                device = self.masters[name].device
                self.adamw[name].state[self.masters[name]][kind] = tensor.to(device)


def add_reference(groups: list[Group], reference, temperature: float = 1.0) -> None:
    """Fills in the reference's log-probabilities of every group."""
    with torch.no_grad():
        for which, logps in reference.packed_logprobs(
            [(g.prompt, g.completions) for g in groups], temperature
        ):
            for (g, i), logp in zip(which, logps):
                groups[g].ref_logp[i] = logp


def update(
    policy,
    groups: list[Group],
    optimizer: MasterAdamW,
    clip: float = 0.2,
    beta: float = 0.01,
    temperature: float = 1.0,
    max_norm: float = 1.0,
    token_mean: bool = False,
) -> dict[str, float]:
    """One optimizer step on all groups; of several ranks each gives its own.

    In the first update after a rollout the policy is the one that sampled, so its log-probabilities are kept as
    log pi_old, every ratio is 1 and nothing is clipped; later updates on the same groups find them there. Returns the
    means of `grpo_loss`'s metrics, `grad_norm`, and `skipped`: 1 if loss or gradient were not finite, which changes nothing.
    """
    return take_step(optimizer, backward(policy, groups, clip, beta, temperature, token_mean), max_norm)


def backward(
    policy,
    groups: list[Group],
    clip: float = 0.2,
    beta: float = 0.01,
    temperature: float = 1.0,
    token_mean: bool = False,
    total: int | None = None,
) -> dict[str, float]:
    """Adds the gradient of the loss of all groups, as many completions at a time as the policy forwards together.

    It is that of one batch of all completions: each part counts by its share of the completions (or of the tokens).
    total: how many completions (or tokens) there are, if other ranks have some of them: then what all ranks get adds up.
    """
    advantages = [group_advantages(torch.tensor([g.rewards]))[0].tolist() for g in groups]
    here = sum(sum(map(len, g.completions)) if token_mean else len(g.completions) for g in groups)
    totals: dict[str, float] = {}
    for which, logps in policy.packed_logprobs([(g.prompt, g.completions) for g in groups], temperature):
        for (g, i), logp in zip(which, logps):
            groups[g].old_logp.setdefault(i, logp.detach())
        logp, mask = _pad(logps)
        old, _ = _pad([groups[g].old_logp[i] for g, i in which])
        ref, _ = _pad([groups[g].ref_logp[i] for g, i in which])
        advantage = torch.tensor([advantages[g][i] for g, i in which], device=logp.device)
        loss, metrics = grpo_loss(logp, old, ref, advantage, mask, clip, beta, token_mean)
        share = (sum(map(len, logps)) if token_mean else len(logps)) / max(1, total or here)
        (loss * share).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + share * value
    return totals


def take_step(optimizer: MasterAdamW, metrics: dict[str, float], max_norm: float = 1.0) -> dict[str, float]:
    """The optimizer step after `backward`, whose metrics are completed: over all ranks, with `grad_norm` and `skipped`."""
    metrics = optimizer.ranks.add(metrics)
    norm = optimizer.step(max_norm) if math.isfinite(metrics.get("loss", 0.0)) else optimizer.discard()
    return metrics | {"grad_norm": norm, "skipped": float(not math.isfinite(norm))}


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tensors [T_i] -> ([B, T], mask [B, T])."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]

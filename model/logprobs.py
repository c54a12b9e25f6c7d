"""Log-probabilities of completions: a packed batch through the model, logits a chunk at a time.

log pi_theta(y_t | image, x, y_<t)        for every token t of every completion y of a batch
"""

import torch
from torch import Tensor

from model.forward import embed, hidden_states
from model.offload import Fallbacks
from model.packing import PackedBatch, packed_mask


class PackedForward(torch.nn.Module):
    """The model as GRPO sees it: a packed batch in, the log-probabilities [N] of its completions' tokens out.

    A module, so that the whole of it can be sharded over processes (see engine/shards.py). With
    `checkpointing` the backward pass computes a layer's activations again instead of keeping them: one more
    forward. fallbacks: how many logits are made at a time (see `Fallbacks`).
    """

    def __init__(self, model, checkpointing: bool = False, fallbacks: Fallbacks | None = None):
        super().__init__()
        self.model, self.checkpointing, self.fallbacks = model, checkpointing, fallbacks or Fallbacks()
        if checkpointing:
            new_name = "activation_checkpointing_enable"  # since transformers 5.2x
            enable = getattr(model, new_name if hasattr(model, new_name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False})

    def forward(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Log-probabilities [N], float32, of `batch.targets`; `temperature` divides the logits."""
        layers = (*self.model.model.visual.blocks, *self.model.model.language_model.layers)
        for layer in layers:  # a layer checkpoints itself while it is told that it trains
            layer.training = self.checkpointing and torch.is_grad_enabled()
        device = self.model.lm_head.weight.device
        embeds = embed(self.model, batch.ids.to(device), batch.prompts)
        mask = packed_mask(batch.segment.to(device))
        hidden = hidden_states(self.model, embeds, batch.positions.to(device), mask).flatten(0, 1)
        for layer in layers:
            layer.training = False
        where, targets = batch.where.to(device), batch.targets.to(device)
        weight = self.model.lm_head.weight
        return token_logprobs(hidden[where], weight, targets, temperature, self.fallbacks.batch_scale)


# So many logits are made at a time: 39 MB of float32 on a CPU; a GPU wants larger matrices.
LOGITS = {"cpu": 64 * 151_936, "cuda": 512 * 151_936}


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, batch_scale: float = 1.0
) -> Tensor:
    """[N] log-probabilities, float32, of targets [N]; hidden: [N, hidden], weight: [vocabulary, hidden].

    budget: the share of LOGITS that is made at a time.
    """
    size = max(1, int(LOGITS[hidden.device.type] * batch_scale) // len(weight))
    return TargetLogprobs.apply(hidden, weight, targets, temperature, size)


class TargetLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature) at N targets, `size` of them at a time.

    151,936 logits take 0.6 MB a token, so all of them are never there at once: forward keeps only each
    token's log-sum-exp; backward makes a chunk's logits z again, turns them in place into

        d log p(target) / d z_v = 1[v = target] - softmax(z)_v

    and multiplies that into the gradients of hidden and W.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, size: int
    ) -> Tensor:
        pieces = zip(hidden.split(size), targets.split(size))
        logps, totals = zip(*(target_logprobs(h, weight, target, temperature) for h, target in pieces))
        ctx.save_for_backward(hidden, weight, targets, torch.cat(totals))
        ctx.temperature, ctx.size = temperature, size
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        hidden, weight, targets, totals = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        pieces = zip(
            *(
                x.split(ctx.size)
                for x in (hidden, targets[:, None], totals[:, None], gradient[:, None], grad_hidden)
            )
        )
        for h, target, total, g, out in pieces:
            g = g / ctx.temperature
            z = (h @ weight.T).float().div_(ctx.temperature).sub_(total).exp_().mul_(-g)
            z = z.scatter_add_(1, target, g).to(weight.dtype)
            torch.mm(z, weight, out=out)
            if grad_weight is not None:
                grad_weight.addmm_(z.T, h)
            del z  # before the next is made: there is one chunk's logits at a time
        return grad_hidden, grad_weight, None, None, None


def target_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature) at the targets, and each token's log-sum-exp: [n], float32."""
    logits = (hidden @ weight.T).float().div_(temperature)
    total = logits.logsumexp(dim=1)
    return logits.gather(1, targets[:, None])[:, 0] - total, total

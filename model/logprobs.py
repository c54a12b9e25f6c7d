"""Log-probabilities of completions: a packed batch through the model, logits a chunk at a time.

    log pi_theta(y_t | image, x, y_<t)        for every token t of every completion y of a batch

The vocabulary is large: 151,936 logits of a token take 0.6 MB. So the logits of a batch are never there at
once, neither in the forward nor in the backward pass.
"""

import torch
from torch import Tensor

from model.forward import embed, hidden_states
from model.fused import float_logits
from model.offload import Fallbacks
from model.packing import PackedBatch, packed_mask

# So many logits are made at a time: 39 MB of float32 on a CPU; a GPU wants larger matrices.
LOGITS = {"cpu": 64 * 151_936, "cuda": 512 * 151_936}


class PackedForward(torch.nn.Module):
    """The model as GRPO sees it: a packed batch in, the log-probabilities [N] of its completions' tokens out.

    A module, so that the whole of it can be sharded over processes (training/policy.py). With `checkpointing`
    the backward pass computes a layer's activations again instead of keeping them: one more forward pass.
    fallbacks: `batch_scale` is the fraction of LOGITS that is made at a time.
    """

    def __init__(self, model, checkpointing: bool, fallbacks: Fallbacks):
        super().__init__()
        self.model = model
        self.checkpointing = checkpointing
        self.fallbacks = fallbacks
        if checkpointing:
            new_name = "activation_checkpointing_enable"  # transformers 5.17 has the old one
            name = new_name if hasattr(model, new_name) else "gradient_checkpointing_enable"
            getattr(model, name)({"use_reentrant": False})

    def forward(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Returns log-probabilities [N], float32, of `batch.targets`; `temperature` divides the logits."""
        # transformers recomputes a layer only while its `training` is True.
        model = self.model.model
        layers = (*model.visual.blocks, *model.language_model.layers)
        for layer in layers:
            layer.training = self.checkpointing and torch.is_grad_enabled()

        # The last hidden states of all rows.
        output_matrix = self.model.lm_head.weight
        device = output_matrix.device
        embeds = embed(self.model, batch.ids.to(device), batch.prompts)
        mask = packed_mask(batch.segment.to(device))
        positions = batch.positions.to(device)
        hidden = hidden_states(self.model, embeds, positions, mask)
        for layer in layers:
            layer.training = False

        # Those that predict a token of a completion.
        predicting = hidden.flatten(0, 1)[batch.where.to(device)]
        targets = batch.targets.to(device)
        scale = self.fallbacks.batch_scale
        return token_logprobs(predicting, output_matrix, targets, temperature, scale)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, batch_scale: float = 1.0
) -> Tensor:
    """Returns the log-probabilities [N], float32, of targets [N].

    hidden: [N, hidden]. weight: the output matrix [vocabulary, hidden]. batch_scale: the fraction of LOGITS
    that is made at a time.
    """
    logits = int(LOGITS[hidden.device.type] * batch_scale)
    chunk = max(1, logits // len(weight))
    return TargetLogprobs.apply(hidden, weight, targets, temperature, chunk)


class TargetLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature) at N targets, `chunk` of them at a time.

    The forward pass keeps each token's log-sum-exp alone. The backward pass makes a chunk's logits z again,
    turns them in place into

        d log p(target) / d z_v = 1[v = target] - softmax(z)_v

    and multiplies that into the gradients of hidden and W.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        logps: list[Tensor] = []
        totals: list[Tensor] = []
        for h, target in zip(hidden.split(chunk), targets.split(chunk)):
            z = float_logits(h, weight).div_(temperature)
            total = z.logsumexp(dim=1)
            at_targets = z.gather(1, target[:, None])[:, 0]
            del z  # before the next is made: one chunk's logits are there at a time
            logps.append(at_targets - total)
            totals.append(total)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(totals))
        ctx.temperature = temperature
        ctx.chunk = chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        hidden, weight, targets, totals = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        columns = [column[:, None] for column in (targets, totals, gradient / ctx.temperature)]
        parts = [each.split(ctx.chunk) for each in (hidden, grad_hidden, *columns)]
        for h, grad_h, target, total, g in zip(*parts):
            z = float_logits(h, weight).div_(ctx.temperature)
            z = z.sub_(total).exp_().mul_(-g)  # -g softmax(z)
            z = z.scatter_add_(1, target, g).to(weight.dtype)
            torch.mm(z, weight, out=grad_h)
            if grad_weight is not None:
                grad_weight.addmm_(z.T, h)
            del z
        return grad_hidden, grad_weight, None, None, None

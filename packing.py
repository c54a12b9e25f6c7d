"""Packing: a group in one row."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_TOKENS = (
    8192  # a longer group is split into several rows: the attention mask of a row takes its length squared
)
BATCH_TOKENS = 8192  # rows are forwarded and differentiated together up to so many tokens,
BATCH_IMAGE_TOKENS = (
    2048  # and so many image tokens: in the image encoder each is four patches, and costs more than text
)
# So many logits are made at a time: 39 MB of float32 on a CPU; a GPU wants larger matrices, and has room for them.
LOGITS = {"cpu": 64 * 151_936, "cuda": 512 * 151_936}


def packed_mask(segment: Tensor) -> Tensor:
    """[B, 1, T, T] bool for segment [B, T]: 0 is the prompt, 1, 2, ... its completions, -1 padding.

    A token sees what stands before it in the prompt and in its own completion. Padding sees at least itself: a softmax
    over nothing would be NaN.
    """
    order = torch.arange(segment.shape[1], device=segment.device)
    shared_or_own = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return (shared_or_own & (order[None, :] <= order[:, None]))[:, None]


@dataclass(frozen=True)
class PackedRow:
    """Which completions of which group share a row, and how many tokens it has."""

    group: int
    completions: list[int]
    length: int


def pack(groups: list[tuple], budget: float = 1.0) -> list[list[PackedRow]]:
    """Cuts groups into rows of at most ROW_TOKENS tokens, and gathers rows into batches of at most BATCH_TOKENS and
    BATCH_IMAGE_TOKENS.

    budget: the share of these that is used.

    A row has at least one completion and a batch at least one row, however long. Rows of similar length go together,
    as the shorter ones are padded to the longest.
    """
    rows, batches = [], []
    for g, (prompt, completions) in enumerate(groups):
        fresh = len(rows)
        for i, ids in enumerate(completions):
            if len(rows) == fresh or rows[-1].length + len(ids) > ROW_TOKENS * budget:
                rows.append(PackedRow(g, [], len(prompt)))
            rows[-1] = PackedRow(g, [*rows[-1].completions, i], rows[-1].length + max(0, len(ids) - 1))
    images = 0
    for row in sorted(rows, key=lambda row: -row.length):
        images += groups[row.group][0].image_tokens
        full = batches and (len(batches[-1]) + 1) * batches[-1][0].length > BATCH_TOKENS * budget
        if not batches or full or images > BATCH_IMAGE_TOKENS * budget:
            batches.append([])
            images = groups[row.group][0].image_tokens
        batches[-1].append(row)
    return batches


class TargetLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature) at N targets, `size` of them at a time.

    151,936 logits take 0.6 MB a token, so all of them are never there at once: forward keeps only each token's
    log-sum-exp; backward makes a chunk's logits z again, turns them in place into

        d log p(target) / d z_v = 1[v = target] - softmax(z)_v

    and multiplies that into the gradients of hidden and W.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, size: int
    ) -> Tensor:
        logps, totals = [], []
        for h, target in zip(hidden.split(size), targets.split(size)):
            logits = (h @ weight.T).float().div_(temperature)
            totals.append(logits.logsumexp(dim=1))
            logps.append(logits.gather(1, target[:, None])[:, 0] - totals[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(totals))
        ctx.temperature, ctx.size = temperature, size
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        hidden, weight, targets, totals = ctx.saved_tensors
        grad_hidden, grad_weight = (
            torch.empty_like(hidden),
            torch.zeros_like(weight) if ctx.needs_input_grad[1] else None,
        )
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
        return grad_hidden, grad_weight, None, None, None

"""Sampling: one token a row from logits, greedy or from a nucleus, without asking the GPU for a number."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model import fused


@dataclass(frozen=True)
class Sampling:
    """Says how completions are drawn: what `generate.generate` takes besides prompts and their number."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # the likeliest tokens up to so much probability
    top_k: int = 0  # the k likeliest tokens; 0: all
    generator: torch.Generator | None = None  # of the random numbers; None: torch's own


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    uniform: Callable[[int], Tensor],
    pieces=fused,
) -> Tensor:
    """Draws one token a row [R] from logits [R, vocabulary]; temperature 0 takes the likeliest.

    uniform: how many draws -> random numbers in [0, 1), [draws, R, 1].

    The nucleus is every token that has less than top_p of probability in likelier ones (equally likely tokens
    are in it together, where a sort would cut between them). Sorting 151,936 probabilities to find it takes
    longer than the transformer's step, so a token is drawn first, and drawn again from the likelier ones if
    it was outside: that is the distribution of the nucleus alone. A token of probability 0 never comes out.

    Few rows draw again. A GPU must not be asked how many, so there it is a number of rows that more are
    outside than once in a billion times. pieces: as `Rows` has them.
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    if 0 < top_k < logits.shape[-1]:
        best, index = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(1, index, best)
    # The first draw, of all rows.
    probs, likeliest = pieces.likelihoods(logits, temperature)
    on_cpu = probs.device.type == "cpu"
    bound = top_p if top_p < 1 else math.inf
    first, *more = uniform(_count_rounds(top_p))
    token, drawn, outside = pieces.draw(probs, probs.cumsum(dim=1), first, bound)
    if not more:
        return torch.where(outside, likeliest, token)[:, 0]
    # The rows that draw again.
    if on_cpu:
        which = outside[:, 0].nonzero()[:, 0]
    else:
        count = _rows_outside(len(probs), top_p)
        which = outside[:, 0].int().topk(count, sorted=False).indices
    left = probs[which]
    drawn = drawn[which]
    # They draw from what is likelier than what they drew.
    for numbers in more:
        if on_cpu and not outside.any():
            break
        left = pieces.likelier(left, drawn)
        drawn = pieces.draw_again(which, left, left.cumsum(dim=1), token, outside, numbers, bound)
    return torch.where(outside, likeliest, token)[:, 0]


def _count_rounds(top_p: float) -> int:
    """Counts the draws after which less than one row in a billion is still outside the nucleus.

    Such a row gets its likeliest token. The first draw is outside with probability 1 - top_p at most, and
    what is left outside shrinks by half on average.
    """
    if top_p == 1:
        return 1
    return math.ceil(min(fused.MOST_ROUNDS, math.log(1e-9) / math.log1p(-top_p)))


@functools.cache
def _rows_outside(rows: int, top_p: float) -> int:
    """Returns how many rows draw again: with probability 1 - 1e-9 no more are outside after the first draw.

    They are outside independently of one another, with probability 1 - top_p at most: their number is
    binomial. A row beyond it gets its likeliest token.
    """
    if top_p < 0.5:
        return rows
    most = 0
    exactly = top_p**rows  # the probability that `most` rows are outside,
    at_most = exactly  # and that no more are
    while at_most < 1 - 1e-9 and most < rows:
        most += 1
        exactly *= (rows - most + 1) / most * (1 - top_p) / top_p
        at_most += exactly
    return most

"""The small functions between the matrix products of a decode step, and those of sampling.

Each is a few elementwise operations and sums, which as they stand launch a kernel each and read and write
everything again. `compiled` has torch.compile make one to three kernels of each; as they stand they are what
a CPU runs, and what a GPU runs where nothing can be compiled.
"""

import sys
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor


def add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream [R, hidden] after a change, and its RMS norm."""
    x = x + change
    return x, rms_norm(x, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [..., width], worked out in float32."""
    scaled = x.float()
    scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The MLP's activation [R, mlp]."""
    return torch.nn.functional.silu(gate) * up


def begin(
    tokens: Tensor,
    written: Tensor,
    first: Tensor,
    prompt_length: Tensor,
    prompt_count: Tensor,
    own_count: Tensor,
    inv_freq: Tensor,
    scaling: float,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """What all layers of a step need, made once: the last token [R] of each row, its index among the row's
    own, cos and sin of its position, and `unseen` and `unwritten`, the masks of `attend`.

    The tensors are those of `Rows`; the counts are 0, 1, 2, ... up to P and T.
    """
    index = (written - 1).clamp(0, tokens.shape[1] - 2)
    token = tokens.gather(1, index[:, None])[:, 0]
    unseen = (prompt_count >= prompt_length[:, None, None]).repeat_interleave(heads, dim=0)
    unwritten = (own_count > index[:, None, None]).repeat_interleave(heads, dim=0)
    return token, index, *rotation(first + index, inv_freq, scaling, dtype), unseen, unwritten


def rotation(position: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cos and sin [R, 1, head_dim] for text at position [R]: the same position in time, height and width."""
    angle = position[:, None, None].float() * inv_freq.float()
    angle = torch.cat([angle, angle], dim=-1)
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [R, heads, head_dim]; cos, sin: [R, 1, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Writes a token's key and value k, v [R, heads * d] into keys, values [R, heads, T, d] at index [R].

    norms: weights [d] of q's and k's norms within a head, and epsilon; None: there are none. Returns the
    token's queries [R, key heads, query heads of each, d], rotated and divided by sqrt(d).
    """
    q, k, v = (x.unflatten(1, (-1, cos.shape[-1])) for x in (q, k, v))
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    everyone = torch.arange(len(index), device=index.device)
    keys[everyone, :, index] = rotate(k, cos, sin)
    values[everyone, :, index] = v
    return (rotate(q, cos, sin) * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))


def attend(
    q: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    keys: Tensor,
    values: Tensor,
    unseen: Tensor,
    unwritten: Tensor,
    row_of_cell: Tensor,
    cell_of_row: Tensor,
) -> Tensor:
    """Attention of q [R, key heads, query heads of each, d] to the row's prompt and to its own tokens;
    returns [R, heads * d].

    The softmax over both is the mean of the two softmaxes, weighted with their sums (Hydragen, arXiv
    2402.05099), so the n samples of a prompt can read its keys together, as one matrix product, and none
    needs a copy of them. prompt_keys, prompt_values: [S * key heads, P, d]; keys, values: [R * key heads, T,
    d]. unseen: [S * key heads, 1, P], unwritten: [R * key heads, 1, T]: True where there is no token. With 2
    prompts, n = 2 and one row gone, rows 0, 1, 2 may stand in cells 0, 2, 3: their queries are laid out by
    cell, row_of_cell [S, n], for the prompts (cell 1 holds a query that nobody asked), and what comes of it
    is laid out by row again.
    """
    (R, kv, g, d), (S, n) = q.shape, row_of_cell.shape
    cells = q[row_of_cell].transpose(1, 2).reshape(S * kv, n * g, d)
    parts = partial_attention(cells, prompt_keys, prompt_values, unseen)
    parts = [x.view(S, kv, n, g, -1).transpose(1, 2).flatten(0, 1)[cell_of_row] for x in parts]
    prompt_sum, prompt_weight, prompt_top = parts
    parts = partial_attention(q.flatten(0, 1), keys, values, unwritten)
    own_sum, own_weight, own_top = (x.view(R, kv, g, -1) for x in parts)
    a = (prompt_top - own_top).sigmoid()  # e^top over the sum of both: no overflow
    b = (own_top - prompt_top).sigmoid()
    out = (a * prompt_sum + b * own_sum) / (a * prompt_weight + b * own_weight)
    return out.to(q.dtype).flatten(1)


def partial_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j e^(s_j - top) v_j, sum_j e^(s_j - top) and top = max_j s_j over keys not hidden, s = q . k.

    The shapes are those of torch.bmm throughout: of others torch.compile makes more kernels.
    """
    scores = float_scores(q, keys).masked_fill_(hidden, -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return torch.bmm(weights.to(values.dtype), values).float(), weights.sum(dim=-1, keepdim=True), top


def float_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Q . k in float32, also of bfloat16 [B, Q, d] and [B, K, d]: a score of 100 rounded to bfloat16 is off
    by up to 0.25."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, keys.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(q.float(), keys.float().transpose(1, 2))


def write_logits(logits: Tensor, banned: Tensor, into: Tensor) -> None:
    """Puts logits [R, vocabulary] where sampling reads them, in float32; banned [vocabulary]: not to come."""
    into.copy_(logits.masked_fill(banned, -torch.inf))


# ---- Sampling ----------------------------------------------------------------------------------------------


def likelihoods(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities [R, vocabulary], and the likeliest token [R, 1] of each row."""
    best, likeliest = logits.max(dim=-1, keepdim=True)
    return ((logits - best) / temperature).softmax(dim=-1), likeliest  # at most 0: nothing overflows


def draw(probs: Tensor, sums: Tensor, uniform: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row [R, 1]: the first whose cumulative probability exceeds a uniform number; its
    probability; and if it is outside of the nucleus, that is, if likelier ones have `bound` together.

    sums: the cumulative probabilities, which need not end at 1. They are no part of this, as the cumsum that
    torch compiles for a GPU may round differently each time.
    """
    token = torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp(max=probs.shape[1] - 1)
    drawn = probs.gather(1, token)
    likelier = torch.where(probs > drawn, probs, 0).sum(dim=1, keepdim=True)
    return token, drawn, (likelier >= bound) | (drawn == 0)


def likelier(probs: Tensor, drawn: Tensor) -> Tensor:
    """Probabilities [K, vocabulary] without those that are no larger than what was drawn [K, 1]."""
    return torch.where(probs <= drawn, 0, probs)


def draw_again(
    which: Tensor, probs: Tensor, sums: Tensor, token: Tensor, outside: Tensor, uniform: Tensor, bound: float
) -> Tensor:
    """Draws for the rows `which` [K], from probs [K, vocabulary]; returns the probability of what was drawn.

    token, outside and uniform [R, 1] are of all rows; those inside the nucleus keep their token.
    """
    new, drawn, still = draw(probs, sums, uniform[which], bound)
    was = outside[which]
    token[which] = torch.where(was, new, token[which])
    outside[which] = was & still
    return drawn


# ---- Compiling ---------------------------------------------------------------------------------------------

# Of each argument the dimensions that change from call to call; torch makes one kernel for all their sizes.
# All others are the model's: said to be dynamic, too, they would cost the kernels their speed.
CHANGING = {
    add_norm: (0, 0),
    swiglu: (0, 0),
    begin: ((0, 1), 0, 0, 0, 0, 0),
    rotate_and_write: (0, 0, 0, 0, 0, 0, (0, 2), (0, 2)),
    attend: (0, (0, 1), (0, 1), (0, 1), (0, 1), (0, 2), (0, 2), (0, 1), 0),
    write_logits: (0, (), 0),
    likelihoods: (0,),
    draw: (0, 0, 0),
    likelier: (0, 0),
    draw_again: (0, 0, 0, 0, 0, 0),
}


# Torch compiles again where a size is 1, and where a cache is full: 2 of each for prompts, rows and tokens.
VARIANTS = 64


def mark(args: Sequence, changing: tuple) -> None:
    """Tells torch.compile which dimensions of these arguments change."""
    for argument, dimensions in zip(args, changing):
        torch._dynamo.maybe_mark_dynamic(argument, dimensions)


def compiled(fallbacks) -> SimpleNamespace:
    """The functions above under their names, compiled when they are first called.

    Where one cannot be compiled (no Triton, no compiler, an old torch) it is said once, `fallbacks.compile`
    is switched off, and the plain functions go on. All give the same when they are done twice.
    """

    def faster(function, changing):
        made = torch.compile(function, fullgraph=True)

        def call(*args):
            if fallbacks.compile:
                try:
                    mark(args, changing)
                    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                        return made(*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # torch's compilers fail in many ways
                    fallbacks.compile = False
                    print(f"decoding without compiled kernels: {error}"[:500], file=sys.stderr)
            return function(*args)

        return call

    return SimpleNamespace(**{f.__name__: faster(f, changing) for f, changing in CHANGING.items()})

"""The small functions between the matrix products of a decode step, and those of sampling.

Each is a few elementwise operations and sums, which as they stand launch a kernel each and read and write
everything again. `compiled` has torch.compile make one to three kernels of each; as they stand they are what
a CPU runs, and what a GPU runs where nothing can be compiled.
"""

import sys
from types import SimpleNamespace

import torch
from torch import Tensor


def add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream [R, hidden] after a change, and its RMS norm."""
    x = x + change
    scaled = x.float()
    scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)
    return x, weight * scaled.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The MLP's activation [R, mlp]."""
    return torch.nn.functional.silu(gate) * up


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
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, index: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Writes a token's key and value k, v [R, heads, d] into keys, values [R, heads, T, d] at index [R].

    Returns its queries [R, key heads, query heads of each, d], rotated and divided by sqrt(d).
    """
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
    needs a copy of them. unseen: [S, 1, 1, P], unwritten: [R, 1, 1, T]: True where there is no token. With 2
    prompts, n = 2 and one row gone, rows 0, 1, 2 may stand in cells 0, 2, 3: their queries are laid out by
    cell, row_of_cell [S, n], for the prompts (cell 1 holds a query that nobody asked), and what comes of it
    is laid out by row again.
    """
    (_, kv, g, d), (S, n) = q.shape, row_of_cell.shape
    cells = q[row_of_cell].transpose(1, 2).reshape(S, kv, n * g, d)
    parts = partial_attention(cells, prompt_keys, prompt_values, unseen)
    parts = [x.view(S, kv, n, g, -1).transpose(1, 2).flatten(0, 1)[cell_of_row] for x in parts]
    prompt_sum, prompt_weight, prompt_top = parts
    own_sum, own_weight, own_top = partial_attention(q, keys, values, unwritten)
    a = (prompt_top - own_top).sigmoid()  # e^top over the sum of both: no overflow
    b = (own_top - prompt_top).sigmoid()
    out = (a * prompt_sum + b * own_sum) / (a * prompt_weight + b * own_weight)
    return out.to(q.dtype).flatten(1)


def partial_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j e^(s_j - top) v_j, sum_j e^(s_j - top) and top = max_j s_j over keys not hidden, s = q . k."""
    scores = float_scores(q, keys).masked_fill_(hidden, -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    out = torch.bmm(weights.to(values.dtype).flatten(0, 1), values.flatten(0, 1))
    return out.unflatten(0, q.shape[:2]).float(), weights.sum(dim=-1, keepdim=True), top


def float_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Q . k in float32, also of bfloat16 [A, B, Q, d] and [A, B, K, d]: a score of 100 rounded to bfloat16 is
    off by up to 0.25."""
    q, keys, (A, B) = q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), q.shape[:2]
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, keys, out_dtype=torch.float32).unflatten(0, (A, B))
    return torch.bmm(q.float(), keys.float()).unflatten(0, (A, B))


def write_logits(logits: Tensor, banned: Tensor, into: Tensor) -> None:
    """Puts logits [R, vocabulary] where sampling reads them, in float32; the banned ids are never sampled."""
    into.copy_(logits)
    into.index_fill_(1, banned, -torch.inf)


# ---- Sampling ----------------------------------------------------------------------------------------------


def likelihoods(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities [R, vocabulary], and the likeliest token [R, 1] of each row."""
    best, likeliest = logits.max(dim=-1, keepdim=True)
    return ((logits - best) / temperature).softmax(dim=-1), likeliest  # at most 0: nothing overflows


def draw(probs: Tensor, uniform: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row [R, 1]: the first whose cumulative probability exceeds a uniform number; its
    probability; and whether it is outside of the nucleus, that is, likelier ones have `bound` together.

    probs need not sum to 1.
    """
    cumulative = probs.cumsum(dim=1)
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    token = token.clamp(max=probs.shape[1] - 1)
    drawn = probs.gather(1, token)
    likelier = torch.where(probs > drawn, probs, 0).sum(dim=1, keepdim=True)
    return token, drawn, (likelier >= bound) | (drawn == 0)


def draw_again(
    which: Tensor, left: Tensor, drawn: Tensor, token: Tensor, outside: Tensor, uniform: Tensor, bound: float
) -> tuple[Tensor, Tensor]:
    """Draws for the rows `which` [K] among what is likelier than what they drew; what is left, and drawn.

    left: [K, vocabulary]. token, outside and uniform [R, 1] are of all rows; rows inside keep their token.
    """
    left = torch.where(left <= drawn, 0, left)
    again, drawn, still = draw(left, uniform[which], bound)
    was = outside[which]
    token[which] = torch.where(was, again, token[which])
    outside[which] = was & still
    return left, drawn


# ---- Compiling ---------------------------------------------------------------------------------------------

# Of each argument the dimensions that change from call to call; torch makes one kernel for all their sizes.
# All others are the model's: said to be dynamic, too, they would cost the kernels their speed.
CHANGING = {
    add_norm: (0, 0),
    swiglu: (0, 0),
    rotation: (0,),
    rotate_and_write: (0, 0, 0, 0, 0, 0, (0, 2), (0, 2)),
    attend: (0, (0, 2), (0, 2), (0, 2), (0, 2), (0, 3), (0, 3), (0, 1), 0),
    write_logits: (0, (), 0),
    likelihoods: (0,),
    draw: (0, 0),
    draw_again: (0, 0, 0, 0, 0, 0),
}


def compiled(limits) -> SimpleNamespace:
    """The functions above under their names, compiled when they are first called.

    Where one cannot be compiled (no Triton, no compiler, an old torch) it is said once, `limits.compile` is
    switched off, and the plain functions go on. All give the same when they are done twice.
    """

    def faster(function, changing):
        made = torch.compile(function, fullgraph=True)

        def call(*args):
            if limits.compile:
                try:
                    for argument, dimensions in zip(args, changing):
                        torch._dynamo.maybe_mark_dynamic(argument, dimensions)
                    return made(*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # torch's compilers fail in many ways
                    limits.compile = False
                    print(f"decoding without compiled kernels: {error}"[:500], file=sys.stderr)
            return function(*args)

        return call

    return SimpleNamespace(**{f.__name__: faster(f, changing) for f, changing in CHANGING.items()})

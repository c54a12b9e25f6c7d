"""The small functions between the matrix products of a decode step, and those of sampling.

Each is a few elementwise operations and sums, which as they stand launch a kernel each and read and write
everything again. `compiled` has torch.compile make few kernels of each; as they stand they are what
a CPU runs, and what a GPU runs where nothing can be compiled.
"""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor


def add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the residual stream [R, hidden] after a change, and its RMS norm."""
    x = x + change
    return x, rms_norm(x, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes the RMS norm of x [..., width] in float32, and returns it in x's dtype."""
    scaled = x.float()
    square = scaled.pow(2).mean(-1, keepdim=True)
    scaled = scaled * torch.rsqrt(square + eps)
    return weight * scaled.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes the MLP's activation [R, mlp]."""
    return torch.nn.functional.silu(gate) * up


def embed_last(
    tokens: Tensor,
    written: Tensor,
    tail: Tensor,
    first: Tensor,
    embeddings: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeds the last token of each row.

    tokens to first: those of `Rows`. embeddings: [vocabulary, hidden]. Returns its vector x [R, hidden], the
    RMS norm of x, and the token's index [R] among the row's own and its position [R]: with a tail of 2, 3
    tokens written and first = 7 they are 4 and 9.
    """
    most = tokens.shape[1] - 2  # behind it stands the scrap column
    last = (written - 1).clamp(0, most)
    token = tokens.gather(1, last[:, None])
    x = embeddings[token[:, 0]]
    return x, rms_norm(x, norm_weight, eps), tail + last, first + last


def begin(
    index: Tensor,
    position: Tensor,
    prefix_length: Tensor,
    prefix_count: Tensor,
    own_count: Tensor,
    inv_freq: Tensor,
    scaling: float,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Makes once what all layers of a step need.

    index, position: see `embed_last`. prefix_length: that of `Rows`. The counts are 0, 1, 2, ... up to P and
    T. Returns cos and sin of the position, and `unseen` and `unwritten`, the masks of `attend`: a row whose
    token has index 4 is unwritten at 5 and 6 if T is 7.
    """
    cos, sin = rotation(position, inv_freq, scaling, dtype)
    unseen = hide(prefix_count >= prefix_length[:, None, None], heads)
    unwritten = hide(own_count > index[:, None, None], heads)
    return cos, sin, unseen, unwritten


def hide(hidden: Tensor, heads: int) -> Tensor:
    """Returns what is added to the scores [B * heads, Q, K] of keys, of which some are hidden [B, 1, K].

    [[[False, True]], [[True, False]]] and 2 heads give [[[0, -inf]], [[0, -inf]], [[-inf, 0]], [[-inf, 0]]].
    """
    added = torch.where(hidden, -torch.inf, 0.0)
    return added.repeat_interleave(heads, dim=0)


def rotation(
    position: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [R, 1, head_dim] for text at position [R].

    A text's token has the same position in time, height and width.
    """
    position = position[:, None, None].float()
    angle = position * inv_freq.float()
    angle = torch.cat([angle, angle], dim=-1)
    cos = (angle.cos() * scaling).to(dtype)
    sin = (angle.sin() * scaling).to(dtype)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [R, heads, head_dim] by its position; cos, sin: [R, 1, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat([-b, a], dim=-1)
    return x * cos + turned * sin


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
    d = cos.shape[-1]
    heads = (-1, d)
    q = q.unflatten(1, heads)
    k = k.unflatten(1, heads)
    v = v.unflatten(1, heads)
    if norms is not None:
        q_weight, k_weight, eps = norms
        q = rms_norm(q, q_weight, eps)
        k = rms_norm(k, k_weight, eps)
    row = torch.arange(len(index), device=index.device)
    keys[row, :, index] = rotate(k, cos, sin)
    values[row, :, index] = v
    q = rotate(q, cos, sin) * d**-0.5
    return q.unflatten(1, (k.shape[1], -1))


def attend(
    q: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    long_keys: Tensor,
    long_values: Tensor,
    keys: Tensor,
    values: Tensor,
    unseen: Tensor,
    unwritten: Tensor,
    row_of_cell: Tensor,
    cell_of_row: Tensor,
) -> Tensor:
    """Attends from q [R, key heads, query heads of each, d] to the row's prefix and to its own tokens.

    The softmax over all is the mean of the softmaxes over parts, weighted with their sums (`merge`). So the
    rows with a prefix can read its keys together, as one matrix product, and none needs a copy of them:
    queries are laid out by cell for the prefixes, and what comes of it by row again. With the prefixes A and
    B, 2 cells a slot, and one row that reads A:

        by row     A0  B0  B1
        by cell    A0  A0  B0  B1      A0 stands in the free cell, too, and nobody reads what comes of it

    Own tokens are those of the first L rows, which may have T of them, and of the others, which have N at
    most: no short row reads cells as far as T. L or R - L may be 0.

    prefix_keys, prefix_values: [S * key heads, P, d]; long_keys, long_values: [L * key heads, T, d]; keys,
    values: [(R - L) * key heads, N, d]. unseen: [S * key heads, 1, P], unwritten: [R * key heads, 1, T]: -inf
    where there is no token, else 0. row_of_cell: [S, cells], cell_of_row: [R]. Returns [R, heads * d].
    """
    R, kv, g, d = q.shape
    S, n = row_of_cell.shape
    # To the prefixes.
    by_cell = q[row_of_cell].transpose(1, 2)  # [S, key heads, cells, query heads of each, d]
    by_slot = by_cell.reshape(S * kv, n * g, d)
    found = []
    for part in partial_attention(by_slot, prefix_keys, prefix_values, unseen):
        by_cell = part.view(S, kv, n, g, -1).transpose(1, 2)
        by_row = by_cell.flatten(0, 1)[cell_of_row]
        found.append(by_row)
    # To the rows' own tokens, long rows first. `-short`: torch.compile sees that there are as many keys.
    q_own = q.flatten(0, 1)
    long = len(long_keys)
    short, near = keys.shape[:2]
    groups = []
    if long:
        groups.append(partial_attention(q_own[:long], long_keys, long_values, unwritten[:long]))
    if short:
        groups.append(partial_attention(q_own[-short:], keys, values, unwritten[-short:, :, :near]))
    own = [torch.cat(parts) if long and short else parts[0] for parts in zip(*groups)]
    # Together.
    total, weight = merge(found, [part.view(R, kv, g, -1) for part in own])
    return (total / weight).to(q.dtype).flatten(1)


def merge(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention to some keys and to others (Hydragen, arXiv 2402.05099).

    Each is the sum, the weight and the top of `partial_attention`. Returns sum_j e^s_j v_j and sum_j e^s_j
    over the keys of both, divided by e^one_top + e^other_top; nothing overflows.
    """
    one_sum, one_weight, one_top = one
    other_sum, other_weight, other_top = other
    a = (one_top - other_top).sigmoid()
    b = (other_top - one_top).sigmoid()
    total = a * one_sum + b * other_sum
    weight = a * one_weight + b * other_weight
    return total, weight


def partial_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns sum_j e^(s_j - top) v_j, sum_j e^(s_j - top) and top = max_j s_j.

    s_j = q . k_j + hidden_j. q: [B, Q, d]; keys, values: [B, K, d]; hidden: [B, 1, K]. Float32, [B, Q, d] and
    [B, Q, 1].
    The shapes are those of torch.bmm throughout: of others torch.compile makes more kernels.
    """
    scores = float_scores(q, keys).add_(hidden)
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    weighted = torch.bmm(weights.to(values.dtype), values)
    return weighted.float(), total, top


def float_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Returns q . k in float32, also of bfloat16 [B, Q, d] and [B, K, d].

    A score of 100 rounded to bfloat16 is off by up to 0.25.
    """
    keys = keys.transpose(1, 2)
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q, keys, out_dtype=torch.float32)
    return torch.bmm(q.float(), keys.float())


def float_logits(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns the logits hidden W^T in float32, for hidden [N, hidden] and the output matrix W.

    out: where they are written, if given. Rounded to bfloat16, log-probabilities are off by 0.03; a CPU has
    no kernel that avoids it.
    """
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, weight.T, out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    logits = (hidden @ weight.T).float()
    return logits if out is None else out.copy_(logits)


# ---- Sampling ----------------------------------------------------------------------------------------------

# Of SplitMix64, as int64: what its state grows by, and what its mixing multiplies with.
GROWTH, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
MOST_ROUNDS = 64  # draws of a token


def uniform_numbers(seeds: Tensor, drawn: Tensor, rounds: int) -> Tensor:
    """Returns random numbers [rounds, R, 1] in [0, 1) that depend on seeds [R] and drawn [R] alone.

    drawn: how many tokens a row has drawn. So what a completion draws does not depend on when it is written,
    in which row, and beside which others. They are numbers of SplitMix64 (Steele et al. 2014, "Fast
    splittable pseudorandom number generators"): number i of a seed is a mix of the bits of seed + i * GROWTH.
    """
    draws = torch.arange(rounds, device=seeds.device)
    number = 1 + MOST_ROUNDS * drawn + draws[:, None]
    x = seeds + number * GROWTH
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    x = x ^ shifted(x, 31)
    # The 24 bits of a float32.
    fraction = shifted(x, 40).float() / 2**24
    return fraction[..., None]


def shifted(x: Tensor, bits: int) -> Tensor:
    """Shifts int64 to the right, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def likelihoods(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns probabilities [R, vocabulary], and the likeliest token [R, 1] of each row."""
    best, likeliest = logits.max(dim=-1, keepdim=True)
    scaled = (logits - best) / temperature  # at most 0: nothing overflows
    return scaled.softmax(dim=-1), likeliest


def draw(
    probs: Tensor, sums: Tensor, uniform: Tensor, bound: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a token a row: the first whose cumulative probability exceeds a uniform number [R, 1].

    sums: the cumulative probabilities, which need not end at 1. They are no part of this, as the cumsum that
    torch compiles for a GPU may round differently each time. Returns token, its probability and if it is
    outside of the nucleus, that is, if likelier ones have `bound` together: [R, 1] each. With probabilities
    .1, .6, .3, bound = .8 and a uniform number of .05 it draws token 0, which is outside (.9).
    """
    threshold = uniform * sums[:, -1:]
    token = torch.searchsorted(sums, threshold, right=True)
    token = token.clamp(max=probs.shape[1] - 1)
    drawn = probs.gather(1, token)
    share = likelier(probs, drawn).sum(dim=1, keepdim=True)
    outside = (share >= bound) | (drawn == 0)
    return token, drawn, outside


def likelier(probs: Tensor, drawn: Tensor) -> Tensor:
    """Returns probabilities [R, vocabulary] with 0 for those no larger than what was drawn [R, 1]."""
    return probs * (probs > drawn)


def draw_again(
    which: Tensor,
    probs: Tensor,
    sums: Tensor,
    token: Tensor,
    outside: Tensor,
    uniform: Tensor,
    bound: float,
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
    embed_last: ((0, 1), 0, 0, 0),
    begin: (0, 0, 0, 0, 0),
    rotate_and_write: (0, 0, 0, 0, 0, 0, (0, 2), (0, 2)),
    attend: (0, *[(0, 1)] * 6, (0, 2), (0, 2), (0, 1), 0),
    uniform_numbers: (0, 0),
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
    """Returns the functions above under their names, compiled when they are first called.

    Where one cannot be compiled (no Triton, no compiler, an old torch) it is said once, `fallbacks.compile`
    is switched off, and the plain functions go on. All give the same when they are done twice.
    """

    def compile_lazily(function: Callable) -> Callable:
        fast = torch.compile(function, fullgraph=True)

        def call(*args):
            if fallbacks.compile:
                try:
                    mark(args, CHANGING[function])
                    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                        return fast(*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # torch's compilers fail in many ways
                    fallbacks.compile = False
                    print(f"decoding without compiled kernels: {error}"[:500], file=sys.stderr)
            return function(*args)

        return call

    pieces = {function.__name__: compile_lazily(function) for function in CHANGING}
    return SimpleNamespace(**pieces)

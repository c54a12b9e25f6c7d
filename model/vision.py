"""What all image encoders share: attention in few large steps, the patches' embedding and their positions.

All images of a batch go through an encoder at once. transformers' own forward takes an attention call for
each image or window, and asks the device for each length; here segments of equal length are neighbours, and
one call does them all. All lengths and orders are worked out on the CPU.

The layers themselves are transformers' modules; they find `grouped_attention` by its name in their
configuration.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface


@dataclass(frozen=True)
class Segments:
    """Which patches see each other: neighbours, `count` segments of `length` patches after the other.

    groups: (count, length), .. order: [T] the patches to look at, in this order; None: as they come.
    """

    groups: list[tuple[int, int]]
    order: Tensor | None = None
    back: Tensor | None = None  # the inverse of `order`


def grouped_attention(
    module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    segments=None,
    **_,
) -> tuple[Tensor, None]:
    """Attention of q, k, v [1, heads, T, d] within segments; without any, of all to all. Returns [1, T,
    heads, d]."""
    segments = segments or Segments([(1, q.shape[2])])
    if segments.order is not None:
        q, k, v = (x[:, :, segments.order] for x in (q, k, v))
    parts, sizes = [], [count * length for count, length in segments.groups]
    for (count, length), *qkv in zip(segments.groups, *(x[0].split(sizes, dim=1) for x in (q, k, v))):
        qkv = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)  # [count, heads, length, d]
        out = scaled_dot_product_attention(*qkv, dropout_p=dropout, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(parts)
    return (out if segments.back is None else out[segments.back])[None], None


AttentionInterface.register("grouped", grouped_attention)


def runs(lengths: list[int]) -> list[tuple[int, int]]:
    """[4, 4, 9] -> [(2, 4), (1, 9)]"""
    return [(lengths.count(length), length) for length in dict.fromkeys(lengths)]


def embed_patches(visual, pixels: Tensor) -> Tensor:
    """[patches, hidden] of pixels [patches, channels * 2 * side * side].

    A kernel as large as a patch makes the convolution a matrix product, at which cuDNN's conv3d can be very
    slow, or take gigabytes (pytorch#166643, transformers#45041).
    """
    kernel = visual.patch_embed.proj.weight.flatten(1)
    return linear(pixels.to(kernel.dtype), kernel, visual.patch_embed.proj.bias)


def in_units(grid: Tensor, merge: int) -> Tensor:
    """[rows, columns, ..] -> [patches, ..]: in units of merge x merge, as an image's patches come."""
    return grid.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2).flatten(0, 3)


def rotations(visual, grids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [patches, head_dim], float32: half of the angles by a patch's row, half by its column."""
    places = []
    for frames, height, width in grids.tolist():
        place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=2)
        places.append(in_units(place, visual.spatial_merge_size).repeat(frames, 1))
    places = torch.cat(places).to(device, non_blocking=True)
    angles = (places[:, :, None].float() * visual.rotary_pos_emb.inv_freq.float().to(device)).flatten(1)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()

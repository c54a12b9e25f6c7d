"""The image encoder, in few large steps: all images of a batch at once, and all windows of a size at once.

Qwen2.5-VL's image encoder (arXiv 2502.13923, section 2.1) attends within windows of 112 x 112 pixels in all
layers but a few, in which it attends within the image. transformers' own forward takes one attention call a
window, 1,792 of them for an image of 1,024 tokens, and asks the device for every window's length. Here
patches are sorted so that windows of equal length are neighbours: one call for each length. All lengths and
orders are worked out on the CPU.

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


def encode_images(visual, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """The features [tokens, hidden] of each image, as transformers' `visual` makes them.

    pixels: [patches, channels * 2 * 14 * 14] of all images; grids: [images, 3] int64, on the CPU.
    """
    visual.config._attn_implementation = "grouped"
    unit, device = visual.spatial_merge_size**2, pixels.device
    order, windows, images = sort_patches(visual, grids.tolist())
    order = order.to(device, non_blocking=True)
    images = Segments(images.groups, *(x.to(device, non_blocking=True) for x in (images.order, images.back)))
    # A kernel as large as a patch makes the convolution a matrix product, at which cuDNN's conv3d can be very
    # slow, or take gigabytes (pytorch#166643, transformers#45041).
    kernel = visual.patch_embed.proj.weight.flatten(1)
    x = linear(pixels.to(kernel.dtype), kernel, visual.patch_embed.proj.bias)
    x = x.unflatten(0, (-1, unit))[order].flatten(0, 1)
    rotation = [r.unflatten(0, (-1, unit))[order].flatten(0, 1) for r in rotations(visual, grids, device)]
    whole = torch.tensor([0, len(x)], dtype=torch.int32)  # transformers would cut here; it finds one piece
    for number, block in enumerate(visual.blocks):
        segments = images if number in visual.fullatt_block_indexes else windows
        x = block(x, cu_seqlens=whole, position_embeddings=tuple(rotation), segments=segments)
    features = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    features = visual.merger(x)[features]
    return list(features.split([t * h * w // unit for t, h, w in grids.tolist()]))


def sort_patches(visual, grids: list[list[int]]) -> tuple[Tensor, Segments, Segments]:
    """(order of the merged patches [T / 4], windows, images): windows of equal length are neighbours.

    Patches come in units of 2 x 2, which are merged into one token at the end and stay together.
    """
    merge = visual.spatial_merge_size
    side, unit = visual.window_size // merge // visual.patch_size, merge**2
    windows, lengths, start = [], [], 0
    # Frames are images of their own.
    for height, width in ((h, w) for frames, h, w in grids for _ in range(frames)):
        tokens = torch.arange((height // merge) * (width // merge)) + start
        start += len(tokens)
        lengths.append(len(tokens) * unit)
        for rows in tokens.view(height // merge, width // merge).split(side):
            windows += [window.flatten() for window in rows.split(side, dim=1)]
    windows.sort(key=len)
    order = torch.cat(windows)
    inside = Segments(runs([len(window) * unit for window in windows]))
    # Back from windows to images, image by image, those of equal length together.
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    by_image = sorted(torch.arange(start).split([n // unit for n in lengths]), key=len)
    patches = place[torch.cat(by_image)][:, None] * unit + torch.arange(unit)
    back = torch.empty(start * unit, dtype=torch.long)
    back[patches.flatten()] = torch.arange(start * unit)
    return order, inside, Segments(runs(sorted(lengths)), patches.flatten(), back)


def runs(lengths: list[int]) -> list[tuple[int, int]]:
    """[4, 4, 9] -> [(2, 4), (1, 9)]"""
    return [(lengths.count(length), length) for length in dict.fromkeys(lengths)]


def rotations(visual, grids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [patches, head_dim], float32: half of the angles by a patch's row, half by its column."""
    merge, rows, columns = visual.spatial_merge_size, [], []
    for frames, height, width in grids.tolist():
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        for places, axis in ((rows, row), (columns, column)):  # in units of merge x merge
            axis = axis.unflatten(0, (-1, merge)).unflatten(2, (-1, merge)).transpose(1, 2)
            places.append(axis.flatten().repeat(frames))
    places = torch.stack([torch.cat(rows), torch.cat(columns)], dim=1).to(device, non_blocking=True)
    angles = (places[:, :, None].float() * visual.rotary_pos_emb.inv_freq.float().to(device)).flatten(1)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()

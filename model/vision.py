"""Shared parts of the image encoders: attention in few large steps, patches and their positions.

All images of a batch go through an encoder at once. transformers' own forward takes an attention call for
each image or window, and asks the device for each length; here segments of equal length are neighbours, and
one call does them all. All lengths and orders are worked out on the CPU.

The layers themselves are transformers' modules; they find `grouped_attention` by its name in their
configuration.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_position_ids

Rotation = tuple[Tensor, Tensor]  # cos and sin, [patches, head_dim] both


@dataclass(frozen=True)
class Segments:
    """Groups of segments of equal length, one after the other; a patch sees the patches of its segment.

    Images of 4, 4 and 9 patches: groups {4: 2, 9: 1}, and two calls of attention.

        patch      0 1 2 3 | 4 5 6 7 | 8 9 10 11 12 13 14 15 16
        group      0         0         1
    """

    groups: Counter[int]  # patches of a segment -> how many segments have so many, in order
    order: Tensor | None = None  # [T] the patches in the order of the segments; None: as they come
    back: Tensor | None = None  # [T] the inverse of `order`


def grouped_attention(
    module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling=None,
    dropout=0.0,
    segments=None,
    **_,
) -> tuple[Tensor, None]:
    """Attends within segments, or without any from all patches to all, for q, k, v [1, heads, T, d].

    Returns [1, T, heads, d], and None in place of the weights: the signature is that of transformers.
    """
    # transformers' own forward gives no segments; it cuts q, k and v itself.
    if segments is None:
        segments = Segments(Counter([q.shape[2]]))
    sizes = [length * count for length, count in segments.groups.items()]

    def split(x: Tensor) -> list[Tensor]:
        """[1, heads, T, d] -> [count, heads, length, d] for each group: its segments are a batch."""
        if segments.order is not None:
            x = x[:, :, segments.order]
        parts = zip(x[0].split(sizes, dim=1), segments.groups)
        return [part.unflatten(1, (-1, length)).transpose(0, 1) for part, length in parts]

    outputs = []
    for batch in zip(split(q), split(k), split(v)):
        output = scaled_dot_product_attention(*batch, dropout_p=dropout, scale=scaling)
        output = output.transpose(1, 2)
        outputs.append(output.flatten(0, 1))
    output = torch.cat(outputs)
    if segments.back is not None:
        output = output[segments.back]
    return output[None], None


AttentionInterface.register("grouped", grouped_attention)


def run_block(block, x: Tensor, rotation: Rotation, segments: Segments) -> Tensor:
    """Runs a layer of an encoder on patches x [T, hidden], which see each other within segments."""
    # transformers would cut the patches into pieces here; it is told of one piece.
    pieces = torch.tensor([0, len(x)], dtype=torch.int32)
    return block(x, cu_seqlens=pieces, position_embeddings=rotation, segments=segments)


def embed_patches(visual, pixels: Tensor) -> Tensor:
    """Embeds pixels [patches, channels * 2 * side * side]: [patches, hidden].

    A kernel as large as a patch makes the convolution a matrix product, at which cuDNN's conv3d can be very
    slow, or take gigabytes (pytorch#166643, transformers#45041).
    """
    projection = visual.patch_embed.proj
    kernel = projection.weight.flatten(1)
    pixels = pixels.to(kernel.dtype)
    return linear(pixels, kernel, projection.bias)


def rotations(visual, grids: Tensor, device: torch.device) -> Rotation:
    """Returns cos and sin [patches, head_dim] float32 of a patch's row (half of the angles) and its column.

    grids: [images, 3] int64, patches in time, height and width. The angles of the patch in row 1, column 3,
    with head_dim = 8 and so the frequencies f and g:

        1f 1g  3f 3g  1f 1g  3f 3g
    """
    places = get_vision_position_ids(grids, visual.spatial_merge_size)  # [patches, 2], on the CPU
    places = places.to(device, non_blocking=True)
    return visual.rotary_pos_emb(places, places)  # of the first it takes the device

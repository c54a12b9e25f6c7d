"""Qwen3-VL, the dense sizes: what is its own is the image encoder, and what it hands to the text model.

Every layer attends within the image. To the patches a table of learned positions is added, which is stretched
over the image whatever its size. Features of some middle layers go to the text model besides those of the
last, and are added to its states after its first layers, at the image's tokens (DeepStack, arXiv 2406.04334).
"""

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from model.vision import Segments, embed_patches, in_units, rotations, runs

MODEL = Qwen3VLForConditionalGeneration
PROCESSOR = "Qwen3VLProcessor"


def kept(config) -> dict[str, tuple[int, int]]:
    """Counts the vectors that a layer keeps.

    A text layer keeps 4 of its width, 5 of the heads', 1 of the keys' and 4 of its MLP's, and in float32 what
    goes into norms: 2 of its width, 1 of the heads' and 1 of the keys'. An image layer keeps 11 of its width
    and 2 of its MLP's. Each merger keeps 3; the last one keeps its input besides.
    """
    text, vision = config.text_config, config.vision_config
    width, heads, keys = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    heads, keys = heads * text.head_dim, keys * text.head_dim
    mergers = 1 + len(vision.deepstack_visual_indexes)
    return {
        "text layer": (4 * width + 5 * heads + keys + 4 * text.intermediate_size, 2 * width + heads + keys),
        "image layer": (11 * vision.hidden_size + 2 * vision.intermediate_size, 0),
        "merged": ((3 * mergers + 1) * vision.hidden_size, 0),
    }


def encode_images(visual, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """The features [tokens, hidden * depths] of each image: of the last layer, then of those in the middle.

    pixels: [patches, channels * 2 * 16 * 16] of all images; grids: [images, 3] int64, on the CPU.
    """
    visual.config._attn_implementation = "grouped"
    order = grids[:, 1:].prod(dim=1).argsort(stable=True)  # images of equal length become neighbours
    x = embed_patches(visual, pixels).split(grids.prod(dim=1).tolist())
    x, grids = torch.cat([x[i] for i in order]), grids[order]
    x = x + learned_positions(visual, grids).to(x.dtype)
    rotation, depths = rotations(visual, grids, pixels.device), []
    segments = Segments(runs([h * w for frames, h, w in grids.tolist() for _ in range(frames)]))
    whole = torch.tensor([0, len(x)], dtype=torch.int32)  # transformers would cut here; it finds one piece
    for number, block in enumerate(visual.blocks):
        x = block(x, cu_seqlens=whole, position_embeddings=rotation, segments=segments)
        if number in visual.deepstack_visual_indexes:
            which = visual.deepstack_visual_indexes.index(number)
            depths.append(visual.deepstack_merger_list[which](x))
    features = torch.cat([visual.merger(x), *depths], dim=1)
    features = features.split((grids.prod(dim=1) // visual.spatial_merge_size**2).tolist())
    return [features[i] for i in order.argsort()]


def learned_positions(visual, grids: Tensor) -> Tensor:
    """[patches, hidden] float32: the table of positions, interpolated linearly between its corners."""
    side, made = visual.num_grid_per_side, []
    table = visual.pos_embed.weight.float().unflatten(0, (side, side))

    def weights(count: int) -> Tensor:
        """[count, side]: how much of each entry along the table's side is in each of `count` patches."""
        entries = torch.arange(side, device=table.device)
        place = torch.arange(count, device=table.device) * (side - 1) / max(count - 1, 1)
        return (1 - (place[:, None] - entries).abs()).clamp(min=0)

    for frames, height, width in grids.tolist():
        rows = weights(height) @ (weights(width) @ table).flatten(1)  # [height, width * hidden]
        made.append(in_units(rows.unflatten(1, (width, -1)), visual.spatial_merge_size).repeat(frames, 1))
    return torch.cat(made)

"""Qwen3-VL, the dense sizes: what is its own is the image encoder, and what it hands to the text model.

Every layer attends within the image. To the patches a table of learned positions is added, which is stretched
over the image whatever its size. Features of some middle layers go to the text model besides those of the
last, and are added to its states after its first layers, at the image's tokens (DeepStack, arXiv 2406.04334).
"""

from collections import Counter

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from model.vision import Segments, embed_patches, rotations, run_block

MODEL = Qwen3VLForConditionalGeneration
PROCESSOR = "Qwen3VLProcessor"


def count_activations(config) -> dict[str, tuple[int, int]]:
    """Counts the numbers that autograd keeps (see families.py).

    A text layer keeps 4 vectors of its width, 5 of the heads', 1 of the keys' and 4 of its MLP's, and in
    float32 what goes into norms: 2 of its width, 1 of the heads' and 1 of the keys'. An image layer keeps 11
    of its width and 2 of its MLP's. Each merger keeps 3; the last one keeps its input besides.
    """
    text = config.text_config
    vision = config.vision_config
    mergers = 1 + len(vision.deepstack_visual_indexes)
    width = text.hidden_size
    heads = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    text_layer = 4 * width + 5 * heads + keys + 4 * text.intermediate_size
    text_norms = 2 * width + heads + keys
    image_layer = 11 * vision.hidden_size + 2 * vision.intermediate_size
    merged = (3 * mergers + 1) * vision.hidden_size
    return {
        "text layer": (text_layer, text_norms),
        "image layer": (image_layer, 0),
        "merged": (merged, 0),
    }


def encode_images(visual, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """Returns the features [tokens, hidden * depths] of each image: of the last layer, then of middle ones.

    pixels: [patches, channels * 2 * 16 * 16] of all images; grids: [images, 3] int64, on the CPU.
    """
    # Images are sorted by length, so that those of equal length are neighbours.
    lengths = grids[:, 1:].prod(dim=1)
    order = lengths.argsort(stable=True)
    sizes = grids.prod(dim=1).tolist()
    x = embed_patches(visual, pixels).split(sizes)
    x = torch.cat([x[image] for image in order])
    grids = grids[order]
    x = x + learned_positions(visual, grids).to(x.dtype)
    rotation = rotations(visual, grids, pixels.device)
    # Frames are images of their own.
    lengths = lengths[order].repeat_interleave(grids[:, 0])
    segments = Segments(Counter(lengths.tolist()))
    # The layers; DeepStack's features come from some of them.
    depths = []
    for number, block in enumerate(visual.blocks):
        x = run_block(block, x, rotation, segments)
        if number in visual.deepstack_visual_indexes:
            depth = visual.deepstack_visual_indexes.index(number)
            depths.append(visual.deepstack_merger_list[depth](x))
    last = visual.merger(x)
    features = torch.cat([last, *depths], dim=1)
    # Back to the images' own order.
    tokens = grids.prod(dim=1) // visual.spatial_merge_size**2
    features = features.split(tokens.tolist())
    return [features[image] for image in order.argsort()]


def learned_positions(visual, grids: Tensor) -> Tensor:
    """Interpolates the table of positions linearly between its entries: [patches, hidden] float32.

    A side with 3 entries stretched over 5 patches puts them at 0, 1/2, 1, 3/2 and 2. A patch takes from each
    entry 1 less its distance, if that is positive:

        patch        0    1    2    3    4
        entry 0      1   1/2   0    0    0
        entry 1      0   1/2   1   1/2   0
        entry 2      0    0    0   1/2   1
    """
    table = visual.pos_embed.weight.float()
    # The four entries around each patch, and what it takes from each: [patches, 4] both.
    entries, parts = get_vision_interpolation_indices_and_weights(
        grids,
        visual.num_grid_per_side,
        align_corners=True,
        spatial_merge_size=visual.spatial_merge_size,
    )
    entries = entries.to(table.device, non_blocking=True)
    parts = parts.to(table.device, non_blocking=True)
    return embedding_bag(entries, table, mode="sum", per_sample_weights=parts)

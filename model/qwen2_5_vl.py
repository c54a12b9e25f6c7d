"""Qwen2.5-VL (arXiv 2502.13923), and MiMo-VL: its image encoder attends within windows (section 2.1).

Windows are of 112 x 112 pixels, in all layers but a few, which attend within the image. transformers' own
forward takes one attention call a window, 1,792 of them for an image of 1,024 tokens; here patches are sorted
so that windows of equal length are neighbours (see vision.py).
"""

from collections import Counter

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from model.vision import Segments, embed_patches, rotations, run_block

MODEL = Qwen2_5_VLForConditionalGeneration
PROCESSOR = "Qwen2_5_VLProcessor"


def count_activations(config) -> dict[str, tuple[int, int]]:
    """Counts the numbers that autograd keeps (see families.py).

    A layer keeps 8 vectors of its width and 4 of its MLP's, and 2 in float32 from norms. An image layer keeps
    11 in place of 8, as it cuts its windows out and puts them together again. The merger keeps 4, and one in
    float32.
    """
    text = config.text_config
    vision = config.vision_config
    text_layer = 8 * text.hidden_size + 4 * text.intermediate_size
    image_layer = 11 * vision.hidden_size + 4 * vision.intermediate_size
    return {
        "text layer": (text_layer, 2 * text.hidden_size),
        "image layer": (image_layer, 2 * vision.hidden_size),
        "merged": (4 * vision.hidden_size, vision.hidden_size),
    }


def encode_images(visual, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """Returns the features [tokens, hidden] of each image, as transformers' `visual` makes them.

    pixels: [patches, channels * 2 * 14 * 14] of all images; grids: [images, 3] int64, on the CPU.
    """
    device = pixels.device
    unit = visual.spatial_merge_size**2
    order, windows, images = sort_patches(visual, grids)
    order = order.to(device, non_blocking=True)
    images = Segments(
        images.groups,
        images.order.to(device, non_blocking=True),
        images.back.to(device, non_blocking=True),
    )

    def by_window(x: Tensor) -> Tensor:
        """Sorts the patches of x [T, ...], in their units, window by window."""
        units = x.unflatten(0, (-1, unit))
        return units[order].flatten(0, 1)

    x = by_window(embed_patches(visual, pixels))
    rotation = tuple(by_window(angle) for angle in rotations(visual, grids, device))
    for number, block in enumerate(visual.blocks):
        segments = images if number in visual.fullatt_block_indexes else windows
        x = run_block(block, x, rotation, segments)
    # A unit becomes a token; tokens go back to where they stand in their image.
    features = visual.merger(x)[order.argsort()]
    tokens = grids.prod(dim=1) // unit
    return list(features.split(tokens.tolist()))


def sort_patches(visual, grids: Tensor) -> tuple[Tensor, Segments, Segments]:
    """Sorts the patches of images by windows, those of equal length together.

    Patches come in units of 2 x 2, which are merged into one token at the end and stay together. An image of
    112 x 168 pixels has 8 x 12 patches and 4 x 6 tokens. A window has 4 x 4 tokens, or fewer at an edge:

         0  1  2  3 |  4  5
         6  7  8  9 | 10 11        order    4 5 10 11 16 17 22 23,  0 1 2 3 6 7 8 9 12 ... 20 21
        12 13 14 15 | 16 17        windows  {32: 1, 64: 1}    a window of 32 patches, then one of 64
        18 19 20 21 | 22 23        images   {96: 1}           all patches of the image

    Returns order, windows and images. order: [T / 4] the tokens, window by window. `images.order` leads from
    there to the patches image by image, those of equal length together; `images.back` leads back.
    """
    merge = visual.spatial_merge_size
    unit = merge**2
    # The tokens [tokens] of each image and each window; frames are images of their own.
    sizes = grids[:, 1:].prod(dim=1) // unit
    sizes = sizes.repeat_interleave(grids[:, 0])
    tokens = torch.arange(sizes.sum())
    images = sorted(tokens.split(sizes.tolist()), key=len)
    tokens, ends = get_vision_window_index(
        grids,
        merge,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
    )
    sizes = ends.diff() // unit
    windows = sorted(tokens.split(sizes.tolist()), key=len)
    order = torch.cat(windows)
    # The place of each image's patches in the order by windows.
    places = order.argsort()[torch.cat(images)]
    patches = places[:, None] * unit + torch.arange(unit)
    patches = patches.flatten()
    # How many of them each segment has.
    lengths = Counter(len(window) * unit for window in windows)
    by_window = Segments(lengths)
    lengths = Counter(len(image) * unit for image in images)
    by_image = Segments(lengths, patches, patches.argsort())
    return order, by_window, by_image

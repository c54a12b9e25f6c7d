"""Qwen2.5-VL (arXiv 2502.13923), and MiMo-VL: its image encoder attends within windows (section 2.1).

Windows are of 112 x 112 pixels, in all layers but a few, which attend within the image. transformers' own
forward takes one attention call a window, 1,792 of them for an image of 1,024 tokens; here patches are sorted
so that windows of equal length are neighbours (see vision.py).
"""

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from model.vision import Segments, embed_patches, rotations, runs

MODEL = Qwen2_5_VLForConditionalGeneration
PROCESSOR = "Qwen2_5_VLProcessor"


def kept(config) -> dict[str, tuple[int, int]]:
    """Counts the vectors that a layer keeps: 8 of its width and 4 of its MLP's, and 2 in float32 from norms.

    An image layer keeps 11 in place of 8, as it cuts its windows out and puts them together again.
    The merger keeps 4, and one in float32.
    """
    text, vision = config.text_config, config.vision_config
    return {
        "text layer": (8 * text.hidden_size + 4 * text.intermediate_size, 2 * text.hidden_size),
        "image layer": (11 * vision.hidden_size + 4 * vision.intermediate_size, 2 * vision.hidden_size),
        "merged": (4 * vision.hidden_size, vision.hidden_size),
    }


def encode_images(visual, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """The features [tokens, hidden] of each image, as transformers' `visual` makes them.

    pixels: [patches, channels * 2 * 14 * 14] of all images; grids: [images, 3] int64, on the CPU.
    """
    visual.config._attn_implementation = "grouped"
    unit, device = visual.spatial_merge_size**2, pixels.device
    order, windows, images = sort_patches(visual, grids.tolist())
    order = order.to(device, non_blocking=True)
    images = Segments(images.groups, *(x.to(device, non_blocking=True) for x in (images.order, images.back)))
    x = embed_patches(visual, pixels).unflatten(0, (-1, unit))[order].flatten(0, 1)
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

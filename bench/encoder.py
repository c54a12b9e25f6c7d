"""The image encoder: `families.encode_images` against transformers' own forward, on the same weights.

    python bench/encoder.py --size small --image-tokens 1024 --prompts 1

Forward and backward of one batch of square images.
"""

import copy

import torch
from shapes import arguments, compare, patch_pixels, peak_extra_bytes, random_vlm, show

from model.families import encode_images


def main() -> None:
    """Both sides in turns, the largest difference of their features, and the peak of each."""
    args = arguments(__doc__, image_tokens=1024)
    visual = random_vlm(args.size, args.device, args.dtype).model.model.visual
    plain = copy.deepcopy(visual)
    side = 2 * max(1, round(args.image_tokens**0.5))
    grids = torch.tensor([[1, side, side]] * args.prompts)
    rng = torch.Generator().manual_seed(0)
    width = patch_pixels(visual.config)
    pixels = torch.randn(int(grids.prod(1).sum()), width, generator=rng).to(args.device)

    def ours() -> torch.Tensor:
        features = torch.cat(encode_images(visual, pixels, grids))
        features.sum().backward()
        return features.detach()

    def theirs() -> torch.Tensor:
        made = plain(pixels.to(plain.dtype), grids.to(args.device))
        later = getattr(made, "deepstack_features", None) or []
        features = torch.cat([made.pooler_output, *later], dim=1)
        features.sum().backward()
        return features.detach()

    results = compare(ours, theirs, args.device, args.repeats)
    results["difference"] = (ours() - theirs()).abs().max().item()
    for name, work in dict(ours=ours, theirs=theirs).items():
        results[f"{name}_peak_mb"] = peak_extra_bytes(work, args.device) / 1e6
    show("encoder", args, results)


if __name__ == "__main__":
    main()

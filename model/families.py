"""The families of models that can be trained, a file each. Such a file has

    MODEL           transformers' class of the whole model; its configuration is MODEL.config_class
    PROCESSOR       the name of transformers' processor, for who loads what was saved
    encode_images   (visual, pixels [patches, ..], grids [images, 3]) -> the features of each image,
                    [tokens, hidden * depths]: what goes where the text model embeds tokens, and what is added
                    to its states after the first layer, the second, ... (see `vlm.hidden_states`)
    kept            (config) -> how many numbers autograd keeps, in the model's dtype and in float32: of a
                    token in a "text layer", of a patch in an "image layer", and of a patch behind the last
                    layer and beside them, where patches are "merged" into tokens (training/memory_plan.py)

All else is the same code for all of them. What sets a decode step apart is seen from its layers (cache.py).
"""

from torch import Tensor

from model import qwen2_5_vl, qwen3_vl

FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}  # by model_type in config.json


def encode_images(visual, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """The features of each image; visual: the image encoder of a model of any family."""
    family = FAMILIES[visual.config.model_type.removesuffix("_vision")]
    return family.encode_images(visual, pixels, grids)

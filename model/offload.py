"""Where the weights are: on the device, or in CPU memory and on the device only while they work."""

import copy
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Limits:
    """What is known of the GPU: which shares of the token budgets and of the rows of a rollout fit, if it can
    record steps, and if torch can compile for it."""

    budget: float = 1.0
    rows: float = 1.0
    record: bool = True
    compile: bool = True


def copy_model(model):
    """A copy that shares the frozen weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def _padded_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // 256) * 256  # so that each tensor in a shared buffer starts where its dtype may

"""Where the weights are: on the device, or in CPU memory and on the device only while they work."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Fallbacks:
    """Fallbacks of a GPU, adjusted when something fails. Roles that are copies of one another share them."""

    batch_scale: float = 1.0  # the fraction of the usual batch size that fits in memory
    row_scale: float = 1.0  # the fraction of the rows of a rollout that fits
    graphs: bool = True  # whether CUDA graphs of decode steps work
    compile: bool = True  # whether torch.compile works


def copy_model(model):
    """A copy that shares the frozen weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def _padded_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // 256) * 256  # so that each tensor in a shared buffer starts where its dtype may


def retry_with_less_memory(attempt: Callable[[], Any], use_less_memory: Callable[[], None]) -> Any:
    """Returns attempt(). Calls use_less_memory() and tries again whenever memory runs out.

    Raises what use_less_memory raises when nothing smaller is left.
    """
    while True:
        try:
            return attempt()
        except torch.OutOfMemoryError:
            pass  # leave this block first: the exception keeps the batch's tensors alive
        use_less_memory()

"""Where the weights are: on the device, or in CPU memory and on the device only while they work."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Returns a copy that shares the frozen weights."""
    same = {id(p): p for p in model.parameters() if not p.requires_grad}
    # deepcopy would copy all that a buffer's memory holds: of an offloaded model the weights, once more.
    own = {id(buffer): buffer.clone() for buffer in model.buffers()}
    return copy.deepcopy(model, same | own)


def offloadable(model) -> list[Tensor]:
    """Returns what is offloaded: not the frozen weights, as several copies share them."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return [*trained, *model.buffers()]


def move_to_cpu(tensors: list[Tensor], pinned: bool) -> None:
    """Moves tensors into one buffer in CPU memory, pinned or not; each stays the same object.

    A GPU reads pinned memory fastest, but each request for it is rounded up to a power of two: hence one
    buffer. Two tensors of 400 and 100 bytes, each at a multiple of 256, where any dtype may start:

        byte      0           400     512        612     768
        buffer    | tensor 0  | free  | tensor 1 | free  |
    """
    sizes = [math.ceil(tensor.nbytes / 256) * 256 for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
    for tensor, part in zip(tensors, buffer.split(sizes)):
        place = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.data)


@contextmanager
def copied_to(device: torch.device, tensors: list[Tensor]) -> Iterator[None]:
    """Has tensors on a device for the length of a `with` block; then they are what they were before."""
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, data in zip(tensors, home):
            tensor.data = data


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

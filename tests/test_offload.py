"""Where weights are: what a copy takes, and in which dtype they cross between the devices."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.offload import copy_model
from training.policy import Trained


def storages(model):
    """Bytes of memory that a model holds, however many tensors share it."""
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


def test_a_copy_of_an_offloaded_model_takes_its_own_bytes(random_vlm):
    """deepcopy would copy the one buffer of all weights once more for each buffer of a module."""
    vlm = random_vlm.copy()
    tied = vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
    needed = sum(p.nbytes for p in vlm.model.parameters())
    vlm.offload()
    twin = copy_model(vlm.model)
    assert storages(twin) <= 1.01 * needed + 4096
    for a, b in zip(
        [*vlm.model.parameters(), *vlm.model.buffers()], [*twin.parameters(), *twin.buffers()]
    ):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert (twin.lm_head.weight is twin.get_input_embeddings().weight) == tied


def test_weights_are_rounded_before_they_leave_the_masters_device(toy):
    """A copy that also casts would move float32, through memory that is not pinned."""
    vlm = toy.copy()
    vlm.model.bfloat16()
    policy = Trained(vlm, 1e-3, 1e-2)
    casting = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default and args[0].dtype != args[1].dtype:
                casting.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with Watch():
        policy.refresh()
    assert policy.sharded and not casting

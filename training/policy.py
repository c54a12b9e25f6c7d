"""The role in training: float32 masters, their optimizer, and the plain copy that rollouts read.

    masters (float32, sharded over the ranks)  --forward, backward, AdamW-->  masters
    masters  --rounded after each step-->  plain copy (the model's dtype, whole on each rank)

At a learning rate of 1e-6 a step is far below the spacing of bfloat16 numbers, so a bfloat16 weight would
never move. Hence the masters, which last from phase to phase. One process in float32 needs none of this and
trains the plain copy itself.

Several processes (`torchrun --nproc-per-node 8 loop.py ...`) share one run. Each rank works on its part of
the images with a plain copy of each role: rollouts, votes, rewards and advantages need nobody else. FSDP2
shards the masters a layer at a time, and reduces the gradients. With `offload` it keeps the shards in CPU
memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from model.logprobs import PackedForward
from model.offload import copy_model, retry_with_less_memory
from model.packing import Continuation, PackedBatch, lay_out, pack
from model.vlm import VLM
from training.distributed import Ranks, backend


class Trained:
    """A role in training: a `grpo.Policy` with its AdamW, and what an interrupted run needs of them."""

    def __init__(
        self,
        vlm: VLM,
        lr: float,
        weight_decay: float,
        offload: bool = False,
        checkpointing: bool = False,
        ranks: Ranks | None = None,
    ):
        self.vlm = vlm  # the plain copy; `optimizer.step` refreshes it
        self.ranks = ranks or Ranks()
        is_float32 = all(
            p.dtype == torch.float32 for p in vlm.model.parameters() if p.requires_grad
        )
        self.sharded = self.ranks.size > 1 or not is_float32 or offload
        if self.sharded:
            self.forward = shard(vlm, offload, checkpointing, self.ranks.size)
        else:
            vlm.load_to_device()
            self.forward = PackedForward(vlm.model, checkpointing, vlm.fallbacks)
        # By name; of sharded ones this rank's part, as DTensors.
        named = self.forward.model.named_parameters()
        self.masters = {name: p for name, p in named if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=lr, weight_decay=weight_decay, fused=True
        )
        if self.sharded:
            self.optimizer.register_step_post_hook(lambda *_: self.refresh())

    def parameters(self) -> list[Tensor]:
        """Returns the masters."""
        return list(self.masters.values())

    def batches(self, completions: list, temperature: float = 1.0) -> Iterator:
        """See `grpo.Policy`. Weights are parts of the completions of all ranks, times the number of ranks.

        FSDP averages gradients over the ranks, hence the factor. Every forward and backward pass is a
        collective. So a rank with fewer batches than another makes filler batches, which count for nothing.
        """
        packed = pack(completions, self.vlm.fallbacks.batch_scale)
        counts = self.ranks.all_gather([[len(completions), len(packed)]])
        total = sum(count for count, _ in counts) / self.ranks.size
        for rows in packed:
            batch = lay_out(rows)
            logps = self.forward(batch, temperature).split(batch.sizes)
            yield batch.completions, list(logps), len(batch.completions) / total
        most = max(batches for _, batches in counts)
        for _ in range(most - len(packed)):
            (0.0 * self.forward(self._filler(), temperature).sum()).backward()

    def _filler(self) -> PackedBatch:
        prompt = self.vlm.prompt("", Image.new("RGB", (56, 56)))
        (rows,) = pack([Continuation(prompt, self.vlm.end_ids[:1])])
        return lay_out(rows)

    def retry(self, attempt: Callable[[], Any]) -> Any:
        """See `grpo.Policy`. What an attempt that broke off has left is cleared before the next."""
        return retry_with_less_memory(attempt, self.use_less_memory)

    def use_less_memory(self) -> None:
        """Halves the batches, see `VLM.use_less_memory`.

        Several ranks cannot try again: the others wait for this one within a layer. FSDP2 of torch 2.11
        cannot forget a backward pass that broke off. Raises OutOfMemoryError in both cases.
        """
        if self.ranks.size > 1 or (self.sharded and not hasattr(self.forward, "reset_iter_state")):
            raise torch.OutOfMemoryError("an update that ran out of memory cannot begin again here")
        if self.sharded:
            self.forward.zero_grad()  # gradients of whole layers that were not reduced yet
            self.forward.reset_iter_state()
        self.optimizer.zero_grad()
        self.vlm.use_less_memory()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the masters into the plain copy, a tensor at a time."""
        plain = dict(self.vlm.model.named_parameters())
        for name, master in self.masters.items():
            # Rounded where the master is: what crosses to CPU memory is half as much.
            rounded = master.full_tensor().to(plain[name].dtype)
            plain[name].copy_(rounded)

    # What an interrupted run needs. Parts of a sharded tensor are slices along dimension 0, in the order of
    # the ranks.

    def weights(self) -> dict[str, Tensor]:
        """Returns this rank's part of the masters, by name."""
        return {name: _local(p).detach() for name, p in self.masters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Returns this rank's part of AdamW's moments, and its step counts, named NAME:exp_avg and so on."""
        state = {}
        for name, parameter in self.masters.items():
            for kind, tensor in self.optimizer.state[parameter].items():
                state[f"{name}:{kind}"] = _local(tensor)
        return state

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Puts whole tensors, by name, into the masters, and refreshes the plain copy."""
        for name, whole in weights:
            master = self.masters[name]
            _local(master).copy_(_local(_like(master, whole)))
        if self.sharded:
            self.refresh()

    def load_optimizer_state(self, state: Iterator[tuple[str, Tensor]]) -> None:
        """Goes on with this optimizer state: whole tensors, by name."""
        for key, whole in state:
            name, kind = key.rsplit(":", 1)
            master = self.masters[name]
            if kind == "step":
                tensor = whole.to(_local(master).device)
            else:
                tensor = _like(master, whole)
            self.optimizer.state[master][kind] = tensor


def shard(vlm: VLM, offload: bool, checkpointing: bool, size: int) -> PackedForward:
    """Returns the model once more, as float32 masters that are sharded over `size` ranks.

    It computes in the plain copy's dtype. Layers are sharded one after the other, so that a device never
    holds the whole model in float32.
    """
    device = vlm.device
    if not dist.is_initialized():  # one process: a group of its own
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    # cast_forward_inputs: a layer gets what it would get in the plain model, float32 rotations among them.
    precision = MixedPrecisionPolicy(vlm.model.dtype, torch.float32, cast_forward_inputs=False)
    to_cpu = offload and device.type == "cuda"
    forward = PackedForward(copy_model(vlm.model), checkpointing, vlm.fallbacks)
    rules = dict(
        mesh=init_device_mesh(device.type, (size,)),
        mp_policy=precision,
        offload_policy=CPUOffloadPolicy() if to_cpu else OffloadPolicy(),
        # What is frozen stays as it is, shared with the plain copy.
        ignored_params={p for p in forward.parameters() if not p.requires_grad},
    )
    for layer in (*forward.model.model.visual.blocks, *forward.model.model.language_model.layers):
        if any(p.requires_grad for p in layer.parameters()):
            fully_shard(_to_masters(layer, device), **rules)
    return fully_shard(_to_masters(forward, device), **rules)


def _to_masters(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Makes a module's trained weights float32 on the device; returns the module."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device, torch.float32)
    for buffer in module.buffers():
        # A view would keep the plain copy's whole buffer alive.
        buffer.data = buffer.data.to(device, copy=True)
    return module


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(master: Tensor, whole: Tensor) -> Tensor:
    """Shards a whole tensor, which every rank has, as the master is sharded."""
    whole = whole.to(torch.float32)
    if not isinstance(master, DTensor):
        return whole.to(master.device)
    made = distribute_tensor(whole, master.device_mesh, master.placements, src_data_rank=None)
    return made.to(master.device)

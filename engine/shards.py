"""Several processes, one run (`torchrun --nproc-per-node 8 loop.py ...`): each works on its share of the images.

All ranks hold the same weights. A group never leaves its rank, so rollouts, votes, rewards and advantages need nobody
else. What ranks exchange is small (questions, votes, metrics), but for two things in an optimizer step: each tensor has
one rank that owns its float32 master and AdamW's moments; the gradients are added up there, and the new weights come
back from there (ZeRO stage 1, arXiv 1910.02054).

With one process, which is the normal case, every function here gives back what it was given. What is exchanged is JSON
and tensors: torch's own `all_gather_object` would pickle.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=2)  # that one rank waits for another, whose completions may be far longer


class Ranks:
    """This process among all of a run: `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This rank's part of a list that all ranks have."""
        return items[self.rank :: self.size]

    def gather(self, mine: list) -> list:
        """The inverse of `share`: one list of what all ranks give, the same on each. Items are what JSON can hold."""
        if self.size == 1:
            return mine
        parts = self._exchange(mine)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return any(self.gather([flag]))

    def add(self, values: dict[str, float]) -> dict[str, float]:
        """The sums over all ranks; a rank need not have all the names."""
        parts = self.gather([values])
        return {
            name: sum(part.get(name, 0.0) for part in parts)
            for name in {name: 0 for part in parts for name in part}
        }

    def owners(self, sizes: dict[str, int]) -> dict[str, int]:
        """Which rank owns each tensor; sizes: name -> elements. The largest goes first, always to the rank that has least."""
        load, owner = [0] * self.size, {}
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            owner[name] = load.index(min(load))
            load[owner[name]] += sizes[name]
        return owner

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Adds up a tensor over all ranks; only the owner's is the sum afterwards."""
        if self.size > 1:
            dist.reduce(tensor, owner)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrites a tensor with the owner's."""
        if self.size > 1:
            dist.broadcast(tensor, owner)

    def _exchange(self, value) -> list:
        """What each rank gave, by rank; through the CPU, as it is small."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        longest = max(map(int, lengths))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(texts, lengths)]


@contextmanager
def started() -> Iterator[Ranks]:
    """The ranks that torchrun has started, connected for the length of a `with` block; without torchrun, one."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    yield Ranks(dist.get_rank(), size)
    dist.destroy_process_group()  # not after an error: a rank that is gone would be waited for

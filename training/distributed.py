"""Several processes (ranks) work on one run: which one this is, and what they exchange.

`torchrun --nproc-per-node 3` starts ranks 0, 1 and 2 of size 3. A list is dealt out like cards, and collected
in its old order:

    items            a b c d e f g
    shard(items)     rank 0: a d g      rank 1: b e      rank 2: c f
    all_gather       a b c d e f g      on each of them

With one process, the normal case, every method returns what it was given. Ranks exchange JSON: torch's own
`all_gather_object` would pickle.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest

import torch
import torch.distributed as dist

# One rank waits this long for another, whose completions may be far longer.
TIMEOUT = timedelta(hours=2)
MISSING = object()  # where a rank has fewer items than another


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of a run: `rank` of `size`."""

    rank: int = 0  # 0 to size - 1
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Is true on rank 0, which writes files and speaks to the user."""
        return self.rank == 0

    def shard(self, items: list) -> list:
        """Returns this rank's part of a list that all ranks have: every `size`-th item."""
        return items[self.rank :: self.size]

    def all_gather(self, items: list) -> list:
        """Collects the items of all ranks into one list, the same on each; the inverse of `shard`.

        Items are what JSON can hold; parts may differ in length.
        """
        if self.size == 1:
            return items
        parts = self._exchange(items)
        rounds = zip_longest(*parts, fillvalue=MISSING)
        return [item for one_round in rounds for item in one_round if item is not MISSING]

    def broadcast(self, value):
        """Returns rank 0's value (what JSON can hold) on all ranks."""
        return self.all_gather([value])[0]

    def barrier(self) -> None:
        """Waits until all ranks have come here."""
        self.all_gather([])

    def any(self, flag: bool) -> bool:
        """Returns true on all ranks if the flag is true on one of them."""
        return any(self.all_gather([flag]))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Averages each named value over all ranks; a name that a rank lacks counts as 0 there."""
        sums: dict[str, float] = {}
        for part in self.all_gather([values]):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        return {name: total / self.size for name, total in sums.items()}

    def seed(self, *words) -> int:
        """Hashes the words, and the rank, into a seed of 63 bits."""
        if self.rank:
            words += (f"rank {self.rank}",)
        digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def _exchange(self, value) -> list:
        """Returns the value of each rank, by rank. Bytes travel through the CPU, as they are few."""
        text = json.dumps(value).encode()
        longest = torch.tensor([len(text)])
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        # Texts of one length: JSON may end in spaces.
        mine = torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8)
        texts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(texts, mine)
        return [json.loads(each.numpy().tobytes()) for each in texts]


def join() -> Ranks:
    """Joins the processes that torchrun has started, and returns this one's place; (0, 1) without torchrun.

    Raises ValueError if there are fewer GPUs than processes, or WORLD_SIZE is no number.
    """
    said = os.environ.get("WORLD_SIZE") or "1"
    if not said.isdecimal():
        raise ValueError(f"WORLD_SIZE, which torchrun sets, is no number of processes but {said!r}")
    size = int(said)
    if size <= 1:
        return Ranks()
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK") or 0)
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(f"torchrun started more processes than there are GPUs here ({count})")
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend(), timeout=TIMEOUT)
    return Ranks(dist.get_rank(), size)


def leave() -> None:
    """Leaves the other processes, at a good end. After an error it would wait for those that are gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def backend() -> str:
    """Returns how tensors travel: by NCCL on a GPU, where torch has it (not on Windows), else by gloo."""
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if has_nccl else "gloo"


def is_lost(error: RuntimeError) -> bool:
    """Returns true if the error says that another process has ended or cannot be reached."""
    signs = ("gloo", "Connection", "connection", "NCCL", "timed out", "TCPStore")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)

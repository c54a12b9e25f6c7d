"""Several processes (ranks), one run: who this one is, and what all of them know.

With one process, which is the normal case, every function gives back what it was given. What is exchanged is
JSON: torch's own `all_gather_object` would pickle.
"""

import hashlib
import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist

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
        """The inverse of `share`: one list of what all ranks give, the same on each. Items are what JSON can
        hold."""
        if self.size == 1:
            return mine
        parts = self._exchange(mine)
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]

    def seed(self, *place) -> int:
        """A seed that depends on nothing but these words and the rank."""
        words = [*place] + ([f"rank {self.rank}"] if self.rank else [])
        digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return any(self.gather([flag]))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The means over all ranks; of a name that a rank does not have, its value there is 0."""
        parts = self.gather([values])
        names = {name: None for part in parts for name in part}
        return {name: sum(part.get(name, 0.0) for part in parts) / self.size for name in names}

    def _exchange(self, value) -> list:
        """What each rank gave, by rank; through the CPU, as it is small."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        longest = max(map(int, lengths))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(texts, lengths)]


def join() -> Ranks:
    """The ranks that torchrun has started; without torchrun, one. Raises ValueError if there are too few
    GPUs."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks()
    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"torchrun started more processes than there are GPUs here ({count})")
        torch.cuda.set_device(local)
    dist.init_process_group(backend(), timeout=PATIENCE)
    return Ranks(dist.get_rank(), size)


def leave() -> None:
    """Parts from the others, at a good end. After an error it is left out: who is gone would be waited
    for."""
    if dist.is_initialized():
        dist.destroy_process_group()


def backend() -> str:
    """How tensors travel: on a GPU by NCCL, where torch has it (it has not on Windows), else by gloo."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def lost(error: RuntimeError) -> bool:
    """Whether an error says that another process has ended or cannot be reached."""
    signs = ("gloo", "Connection", "connection", "NCCL", "timed out", "TCPStore")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)

"""The state of a run on disk: after a kill at any moment it goes on from here as if nothing had happened.

    state/000007.json           where the run stands, with the length and checksum of every file that it needs
    state/000007-reasoner-0.safetensors    float32 weights of a role, what rank 0 owns of them
    state/000007-moments-0.safetensors     AdamW's moments of the role in training

The files of a state are written first, under names that nothing refers to yet. The state is there with the
one rename that gives 000007.json its name; a kill before leaves 000006 the newest. A state that does not
match its checksums is passed over for the one before, so two are kept. What has not changed, as the weights
of the frozen role, is not written again: the new state refers to the old file. There is nothing random to
remember: see `Run.seeded`.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.folder import replace_text

KEPT = 2  # states
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what a damaged file may look like


@dataclass
class State:
    """Where a run stands: `step` steps of this phase of this iteration are done.

    pictures: the position in the images. metrics: bytes of metrics.jsonl. skipped: images that proved
    unreadable, and why. files: a name ("questioner", "moments", "curated", ...) -> the parts that hold it,
    each a path in the run's folder with its length and checksum.
    """

    iteration: int = 0
    phase: str = "measure"
    step: int = 0
    pictures: int = 0
    metrics: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)


def write_state(folder: Path, number: int, state: State) -> None:
    """Makes `state` the newest of the run in `folder`, and deletes what no kept state needs."""
    body = json.dumps(asdict(state))
    text = json.dumps({"checksum": zlib.crc32(body.encode()), "state": json.loads(body)}, indent=1)
    replace_text(folder / "state" / f"{number:06}.json", text + "\n")
    kept = sorted((folder / "state").glob("*.json"))[-KEPT:]
    needed = {path.name for path in kept}
    for path in kept:
        try:
            needed |= {Path(part[0]).name for parts in _body(path)["files"].values() for part in parts}
        except UNREADABLE:
            continue  # the older one has been damaged since: it needs nothing any more
    for path in (folder / "state").iterdir():
        if path.name not in needed:
            path.unlink()


def recover(folder: Path) -> tuple[int, State | None, list[str]]:
    """The number and the content of the newest state that is whole; newer ones are deleted, with a sentence
    for each.

    (0, None, ...) of a run that has not written any. Call it only while no other process can write. Raises
    ValueError if all are damaged, or gone.
    """
    damaged: dict[Path, str] = {}
    for path in sorted((folder / "state").glob("*.json"), reverse=True):
        try:
            state = State(**_body(path))
            for parts in state.files.values():
                for name, size, checksum in parts:
                    if (folder / name).stat().st_size != size or _checksum(folder / name) != checksum:
                        raise ValueError(f"{name} is damaged")
            if state.metrics and (folder / "metrics.jsonl").stat().st_size < state.metrics:
                raise ValueError("metrics.jsonl is cut off")
        except UNREADABLE as error:
            damaged[path] = f"{path} cannot be used: {error}"
            continue
        for other in damaged:
            other.unlink()
        return int(path.stem), state, list(damaged.values())
    if damaged:
        raise ValueError(f"no state of {folder} is whole: {next(iter(damaged.values()))}")
    if (folder / "metrics.jsonl").exists():  # the base is saved before the first record
        raise ValueError(f"{folder} cannot go on: its state/ is gone; choose another --name")
    return 0, None, []


def _body(path: Path) -> dict:
    whole = json.loads(path.read_text())
    if zlib.crc32(json.dumps(whole["state"]).encode()) != whole["checksum"]:
        raise ValueError("its checksum is wrong")
    return whole["state"]


def lock(folder: Path) -> FileLock:
    """Raises ValueError if another process works on the run in `folder`. Its lock ends with a process."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    taken = FileLock(folder / "lock")
    try:
        taken.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"another process is working on {folder}") from error
    return taken


# ---- Files -------------------------------------------------------------------------------------------------


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> tuple[str, int, int]:
    """Writes state/NAME.safetensors to the disk; returns its entry for `State.files`. Raises OSError."""
    path = folder / "state" / f"{name}.safetensors"
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    return entry(folder, path)


def entry(folder: Path, path: Path) -> tuple[str, int, int]:
    """Brings a file that has been written to the disk; returns its entry for `State.files`."""
    with open(path, "r+b") as file:  # Windows brings only what may be written to the disk
        os.fsync(file.fileno())
    return path.relative_to(folder).as_posix(), path.stat().st_size, _checksum(path)


def read_tensors(folder: Path, parts: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in these parts, by name, one after the other.

    What is in several parts is a tensor's slices along dimension 0, in the order of the parts (numbers, as
    AdamW's step counts, are the same in each).
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / name, framework="pt")) for name, _, _ in parts]
        for key in dict.fromkeys(key for file in files for key in file.keys()):
            slices = [file.get_tensor(key) for file in files if key in file.keys()]
            yield key, slices[0] if slices[0].dim() == 0 or len(slices) == 1 else torch.cat(slices)


@torch.no_grad()
def copy_tensors(parameters: Iterable[tuple[str, Tensor]], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Puts tensors by name into parameters, rounded to their dtype."""
    parameters = dict(parameters)
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum

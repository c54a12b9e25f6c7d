"""The state of a run on disk: after a kill at any moment it goes on from here as if nothing had happened.

    state/000007.json           where the run stands, with the length and checksum of every file that it needs
    state/000007-reasoner-0-0.safetensors    float32 weights of a role, what rank 0 owns of them
    state/000007-reasoner-0-1.safetensors    more of them: a file has about a GiB
    state/000007-moments-0-0.safetensors     AdamW's moments of the role in training

The files of a state are written first, under names that nothing refers to yet. The state is there with the
one rename that gives 000007.json its name; a kill before leaves 000006 the newest. A state that does not
match its checksums is passed over for the one before, so two are kept. What has not changed, as the weights
of the frozen role, is not written again: the new state refers to the old file. There is nothing random to
remember: see `Run.seeded`.
"""

import errno
import json
import os
import sys
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

Part = tuple[str, int, int]  # a file's path in the run's folder, its length in bytes, its checksum
KEPT = 2  # states
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # of NFS and others
PART_BYTES = 1 << 30  # of a file, unless one tensor has more
# What a damaged file may look like.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass
class State:
    """The place in the loop at which a run stands.

    files: a name ("questioner", "moments", "curated", ...) -> the parts that hold it.
    """

    iteration: int = 0
    phase: str = "measure"
    step: int = 0  # so many steps of the phase are done
    pictures: int = 0  # position in the order of the images
    metrics: int = 0  # bytes of metrics.jsonl
    skipped: list[tuple[str, str]] = field(default_factory=list)  # unreadable images, and why
    files: dict[str, list[Part]] = field(default_factory=dict)


def write_state(folder: Path, number: int, state: State) -> None:
    """Makes `state` the newest of the run in `folder`, and deletes what no kept state needs."""
    states = folder / "state"
    body = json.dumps(asdict(state))
    text = json.dumps({"checksum": zlib.crc32(body.encode()), "state": json.loads(body)}, indent=1)
    replace_text(states / f"{number:06}.json", text + "\n")
    # The files of the newest states stay.
    kept = sorted(states.glob("*.json"))[-KEPT:]
    needed = {path.name for path in kept}
    for path in kept:
        try:
            needed |= {Path(name).name for name, _, _ in _parts(_read_body(path))}
        except UNREADABLE:
            continue  # the older one has been damaged since: it needs nothing any more
    for path in states.iterdir():
        if path.name not in needed:
            path.unlink()


def recover(folder: Path) -> tuple[int, State, list[str]]:
    """Finds the newest state that is whole; returns its number, the state, and a sentence for each newer one.

    The newer ones are damaged, and deleted. (0, State(), []) for a run that has not written any. Call it only
    while no other process can write. Raises ValueError if all are damaged, or gone.
    """
    damaged: dict[Path, str] = {}
    for path in sorted((folder / "state").glob("*.json"), reverse=True):
        try:
            state = _read_state(folder, path)
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
    return 0, State(), []


def _read_state(folder: Path, path: Path) -> State:
    """Reads a state, after checking its files. Raises one of UNREADABLE if it is not whole."""
    body = _read_body(path)
    for name, size, checksum in _parts(body):
        file = folder / name
        if file.stat().st_size != size or _checksum(file) != checksum:
            raise ValueError(f"{name} is damaged")
    state = State(**body)
    if state.metrics and (folder / "metrics.jsonl").stat().st_size < state.metrics:
        raise ValueError("metrics.jsonl is cut off")
    return state


def _read_body(path: Path) -> dict:
    """Reads the fields of a state, after comparing them with their checksum."""
    whole = json.loads(path.read_text())
    if zlib.crc32(json.dumps(whole["state"]).encode()) != whole["checksum"]:
        raise ValueError("its checksum is wrong")
    return whole["state"]


def _parts(body: dict) -> list[Part]:
    """Lists all files that a state needs."""
    return [part for parts in body["files"].values() for part in parts]


def lock(folder: Path) -> FileLock | None:
    """Locks the run in `folder`, until this process ends. Where files cannot be locked it warns: None.

    Raises ValueError if another process works on it.
    """
    (folder / "state").mkdir(parents=True, exist_ok=True)
    file = FileLock(folder / "lock")
    try:
        file.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"another process is working on {folder}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        why = "files cannot be locked here, so start no second process on it"
        print(f"warning: {folder}: {why} ({error.strerror})", file=sys.stderr)
        return None
    return file


# ---- Files -------------------------------------------------------------------------------------------------


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> list[Part]:
    """Writes state/NAME-0.safetensors and so on; returns them for `State.files`. Raises OSError.

    safetensors copies all tensors of a file from the GPU before it writes the first: hence PART_BYTES. With
    files of 10 bytes, tensors a, b, c, d of 4, 6, 2 and 20 bytes are written as a b | c | d.
    """
    # Which tensors go into a file together.
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > PART_BYTES:
            files.append({})
            size = 0
        files[-1][key] = tensor
        size += tensor.nbytes
    # Write one after the other.
    parts = []
    for number, file in enumerate(files):
        path = folder / "state" / f"{name}-{number}.safetensors"
        try:
            save_file({key: tensor.contiguous() for key, tensor in file.items()}, path)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        parts.append(entry(folder, path))
    return parts


def entry(folder: Path, path: Path) -> Part:
    """Syncs a file that has been written to the disk; returns its part of `State.files`."""
    with open(path, "r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())
    return path.relative_to(folder).as_posix(), path.stat().st_size, _checksum(path)


def read_tensors(folder: Path, parts: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in these parts, one after the other, as (name, tensor).

    The parts of each rank have a slice of a tensor along dimension 0; a rank with no row of it has none:

        parts of rank 0    weight [2, 8]    bias [1]     step []
        parts of rank 1    weight [1, 8]                 step []
        yielded            weight [3, 8]    bias [1]     step []     numbers are the same in each
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(folder / name, framework="pt")) for name, _, _ in parts
        ]
        names = {}  # in the order of the files
        for file in files:
            names |= dict.fromkeys(file.keys())
        for name in names:
            slices = [file.get_tensor(name) for file in files if name in file.keys()]
            is_number = slices[0].dim() == 0
            yield name, slices[0] if is_number or len(slices) == 1 else torch.cat(slices)


@torch.no_grad()
def copy_tensors(
    parameters: Iterable[tuple[str, Tensor]], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Copies tensors into the parameters of the same names, rounded to their dtype."""
    parameters = dict(parameters)
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum

"""Reads and writes the plain files of a run's folder, among them questions with their votes as JSON lines."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from curate import VotedQuestion

# The bytes of a path that are not UTF-8 are kept.
TEXT = dict(encoding="utf-8", errors="surrogateescape")
# Errors of file systems that sync files, and no folders.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO, errno.EBADF)


def write_examples(path: Path, examples: Iterable[VotedQuestion]) -> None:
    """Writes voted questions as JSON lines."""
    write_json_lines(path, map(asdict, examples))


def write_json_lines(path: Path, lines: Iterable[dict]) -> None:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    path.write_text("".join(written), **TEXT)


def read_examples(path: Path) -> list[VotedQuestion]:
    """Reads what `write_examples` wrote."""
    return [VotedQuestion(**fields) for fields in _read_json_lines(path)]


def read_records(folder: Path) -> list[dict]:
    """Reads all of metrics.jsonl; it may not be there yet."""
    path = folder / "metrics.jsonl"
    return _read_json_lines(path) if path.exists() else []


def _read_json_lines(path: Path) -> list[dict]:
    """Reads JSON lines. Only a line feed ends a line: a text may hold U+2028."""
    return [json.loads(line) for line in path.read_text(**TEXT).split("\n") if line]


def cut_records(folder: Path, size: int) -> None:
    """Cuts metrics.jsonl off behind its first `size` bytes, if it is there."""
    path = folder / "metrics.jsonl"
    if path.exists():
        os.truncate(path, size)


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that, whatever happens, it is there in full or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with open(new, "w", **TEXT) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    # The rename is on the disk only when its folder is; Windows opens no folders.
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder beside the old one, then moves it into its place. Raises OSError."""
    new = path.with_name(path.name + ".new")
    old = path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        write(new)
    except SafetensorError as error:
        raise OSError(f"{new} cannot be written: {error}") from error
    try:
        if path.exists():
            os.replace(path, old)
    except OSError:  # it is mounted, or came with a container's image
        _replace_files(path, new)
        return
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _replace_files(path: Path, new: Path) -> None:
    """Moves the files of one folder into another, each in one moment; then the other's own files go."""
    names = [file.name for file in new.iterdir()]
    for name in names:
        os.replace(new / name, path / name)
    for file in path.iterdir():
        if file.name not in names:
            file.unlink()
    new.rmdir()

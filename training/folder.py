"""The files of a run's folder that a person opens: questions with their votes, one JSON line each."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from curate import VotedQuestion


def printable(path: str) -> str:
    """A path on one line: line ends, control characters and bytes that are not UTF-8 spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)


def write_examples(path: Path, examples: Iterable[VotedQuestion]) -> None:
    """Writes examples as JSON lines; the bytes of a path that are not UTF-8 are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in examples]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def read_examples(path: Path) -> list[VotedQuestion]:
    """Reads what `write_examples` wrote."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return [VotedQuestion(**json.loads(line)) for line in text.split("\n") if line]


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that, whatever happens, it is there in full or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    try:  # the rename itself is on the disk only when its folder is; Windows opens no folders
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder beside the old one, then puts it in its place. Raises OSError."""
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(new)
    except SafetensorError as error:
        raise OSError(f"{new} cannot be written: {error}") from error
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def cut_records(folder: Path, size: int) -> None:
    """Forgets what metrics.jsonl has beyond its first `size` bytes."""
    if (folder / "metrics.jsonl").exists():
        os.truncate(folder / "metrics.jsonl", size)


def read_records(folder: Path) -> list[dict]:
    """All of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line]

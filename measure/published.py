"""Published records: read from the hub or a folder, and written as questions or images."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from training.folder import replace_text


class LeftOut(ValueError):
    """Raised for a record that becomes no question; the message says why."""


def load_records(source: str, config: str | None, split: str | None) -> Iterator[dict]:
    """Reads the records of a hub id or a folder, images as the bytes of their files.

    Without a split it reads the only one. Raises ValueError with a sentence, also later, from the iterator.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("this command needs the package datasets: pip install datasets") from None
    with _explained(source):
        found = datasets.load_dataset(source, config, split=split, streaming=True)
        if split is None:
            if len(found) > 1:
                raise ValueError(f"it has the splits {', '.join(found)}; choose one with --split")
            found = next(iter(found.values()))
        return _iterate(iter(found.decode(False)), source)


def _iterate(records: Iterator[dict], source: str) -> Iterator[dict]:
    """Yields the records, with a bar on a terminal. Raises ValueError with a sentence for any error."""
    with _explained(source):
        yield from tqdm(records, unit=" records", leave=False, disable=None)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns any error in a `with` block into a ValueError with one sentence."""
    try:
        yield
    except Exception as error:  # of the network, of the hub, of files: datasets raises many kinds
        lines = str(error).splitlines() or [type(error).__name__]
        line = "".join(filter(str.isprintable, lines[0]))
        raise ValueError(f"{source} cannot be read: {line}") from error


# ---- Images ----

_SUFFIXES = {  # of a file, by its first bytes
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"RIFF": ".webp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def list_images(value: object) -> list[bytes]:
    """Returns the images in a field, none or several, each as the bytes of its file.

    The field holds an image, {"bytes": ...} or a list of these. Raises LeftOut for others, as for a path.
    """
    if isinstance(value, (list, tuple)):
        images = []
        for one in value:
            images += list_images(one)
        return images
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value in (None, b"", ""):
        return []
    if not isinstance(value, bytes):
        raise LeftOut("its image has no bytes")
    return [value]


def name_image(image: bytes) -> str:
    """Returns the name of an image's file: the hash of its bytes, and its kind. Raises LeftOut."""
    for start, suffix in _SUFFIXES.items():
        if image.startswith(start):
            return hashlib.sha256(image).hexdigest()[:20] + suffix
    raise LeftOut("its image is of no known kind")


def save_images(images: list[bytes], folder: Path) -> list[str]:
    """Writes images, each once, and returns the names of their files.

    Raises LeftOut before the first is written.
    """
    names = [name_image(image) for image in images]
    for name, data in zip(names, images):
        path = folder / name
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(data)
            os.replace(part, path)
    return names


# ---- Files ----


def write_questions(lines: Iterable[dict | str], out: Path, limit: float) -> Counter:
    """Writes questions.jsonl and the images that the lines hold, and stops after `limit` questions.

    lines: a question each, or the reason why there is none. Returns the number of questions, under "", and
    how often each reason occurred.
    """
    written: list[str] = []
    counts = _count(lines, lambda line: written.append(_store_question(line, out)), limit)
    if written:
        replace_text(out / "questions.jsonl", "".join(written))
    return counts


def write_images(records: Iterable[dict], out: Path, limit: float) -> Counter:
    """Writes every image of the records and nothing else of them. Counts records as `write_questions`."""
    return _count(records, lambda record: _write_images(record, out), limit)


def _count(records: Iterable, write: Callable, limit: float) -> Counter:
    """Writes records until `limit` are written. Counts these, under "", and the reasons of those left out."""
    counts = Counter()
    for record in records:
        try:
            write(record)
            counts[""] += 1
        except LeftOut as error:
            counts[str(error)] += 1
        if counts[""] >= limit:
            break
    return counts


def _store_question(line: dict | str, out: Path) -> str:
    """Saves the images of a line; returns it as JSON with their paths. Raises LeftOut, also for a reason."""
    if isinstance(line, str):
        raise LeftOut(line)
    names = save_images(line.pop("images"), out / "images")
    paths = [f"images/{name}" for name in names]
    line |= {"images": paths} if len(paths) > 1 else {"image": paths[0]}
    return json.dumps(line) + "\n"


def _write_images(record: dict, out: Path) -> None:
    """Saves the images of a record. Raises LeftOut."""
    images = list_images(record.get("images"))
    if not images:
        raise LeftOut("no image")
    save_images(images, out / "images")

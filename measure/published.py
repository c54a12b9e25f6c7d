"""Published records: read from the hub or a folder, and written as questions or images."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm


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
    try:
        found = datasets.load_dataset(source, config, split=split, streaming=True)
        if split is None:
            if len(found) > 1:
                raise ValueError(f"it has the splits {', '.join(found)}; choose one with --split")
            found = next(iter(found.values()))
        if hasattr(found, "decode"):  # older datasets give pictures
            found = found.decode(False)
        return _iterate(iter(found), source)
    except Exception as error:  # of the network, of the hub, of files: datasets raises many kinds
        raise ValueError(_describe(source, error)) from error


def _iterate(records: Iterator[dict], source: str) -> Iterator[dict]:
    """Yields the records, with a bar on a terminal. Raises ValueError with a sentence for any error."""
    try:
        yield from tqdm(records, unit=" records", leave=False, disable=None)
    except Exception as error:
        raise ValueError(_describe(source, error)) from error


def _describe(source: str, error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"{source} cannot be read: {''.join(filter(str.isprintable, lines[0]))}"


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


def list_images(value: object) -> list:
    """Returns the images in a field, none or several, each as bytes or as a picture of Pillow.

    The field holds an image, {"bytes": ...} or a list of these. Raises LeftOut for others, as for a path.
    """
    if isinstance(value, (list, tuple)):
        images = []
        for one in value:
            images += list_images(one)
        return images
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == b"" or value == "":
        return []
    if not isinstance(value, bytes) and not hasattr(value, "getbands"):
        raise LeftOut("its image has no bytes")
    return [value]


def encode_image(image: object) -> tuple[str, bytes]:
    """Returns the name of an image's file, which is the hash of its bytes, and the bytes. Raises LeftOut."""
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        try:
            image.convert("RGBA" if "A" in image.getbands() else "RGB").save(buffer, "PNG")
        except Exception:  # Pillow's readers raise many kinds on broken files
            raise LeftOut("its image cannot be read") from None
        image = buffer.getvalue()
    for start, suffix in _SUFFIXES.items():
        if image.startswith(start):
            return hashlib.sha256(image).hexdigest()[:20] + suffix, image
    raise LeftOut("its image is of no known kind")


def save_images(images: list, folder: Path) -> list[str]:
    """Writes images, each once, and returns the names of their files.

    Raises LeftOut before the first is written.
    """
    files = [encode_image(image) for image in images]
    for name, data in files:
        path = folder / name
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(data)
            os.replace(part, path)
    return [name for name, _ in files]


# ---- Files ----


def write_questions(lines: Iterable[dict | str], out: Path, limit: float) -> Counter:
    """Writes questions.jsonl and the images that the lines hold, and stops after `limit` questions.

    lines: a question each, or the reason why there is none. Returns the number of questions, under "", and
    how often each reason occurred.
    """
    part = out / "questions.jsonl.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            counts = _count(lines, lambda line: _write_question(line, out, file), limit)
        if counts[""]:
            os.replace(part, out / "questions.jsonl")
    finally:
        part.unlink(missing_ok=True)
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


def _write_question(line: dict | str, out: Path, file: TextIO) -> None:
    """Saves the images of a line and writes it with their paths. Raises LeftOut, also for a reason."""
    if isinstance(line, str):
        raise LeftOut(line)
    images = line["images"] if "images" in line else [line["image"]]
    paths = [f"images/{name}" for name in save_images(images, out / "images")]
    stored = {"images": paths} if "images" in line else {"image": paths[0]}
    file.write(json.dumps(line | stored) + "\n")


def _write_images(record: dict, out: Path) -> None:
    """Saves the images of a record one by one. Raises LeftOut."""
    images = list_images(record.get("images"))
    if not images:
        raise LeftOut("no image")
    for image in images:
        save_images([image], out / "images")

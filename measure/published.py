"""Published records: read from the hub or a folder, and written as questions or images."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm


class LeftOut(ValueError):
    """A record becomes no question; the message says why."""


def records_of(source: str, config: str | None, split: str | None) -> Iterator[dict]:
    """The records of a hub id or folder, images as the bytes of their files. Without a split the only one.

    Raises ValueError with a sentence, also later, from the iterator.
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
        found = found.decode(False) if hasattr(found, "decode") else found  # older datasets give pictures
        return _told(iter(found), source)
    except Exception as error:  # of the network, of the hub, of files: datasets raises many kinds
        raise ValueError(_sentence(source, error)) from error


def _told(records: Iterator[dict], source: str) -> Iterator[dict]:
    """The records, with a bar on a terminal; an error becomes a sentence."""
    try:
        yield from tqdm(records, unit=" records", leave=False, disable=None)
    except Exception as error:
        raise ValueError(_sentence(source, error)) from error


def _sentence(source: str, error: Exception) -> str:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{source} cannot be read: {''.join(filter(str.isprintable, said))}"


def images_of(value: object) -> list:
    """The images in a field: bytes, {"bytes": ...} or pictures of Pillow; a list of them, one or none."""
    if isinstance(value, (list, tuple)):
        return [image for one in value for image in images_of(one)]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == b"" or value == "":
        return []
    if not isinstance(value, bytes) and not hasattr(value, "getbands"):
        raise LeftOut("its image has no bytes")
    return [value]


_STARTS = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"RIFF": ".webp"}
_STARTS |= {b"II*\0": ".tif", b"MM\0*": ".tif"}


def encode_image(image: object) -> tuple[str, bytes]:
    """Returns the name of an image's file, which is the hash of its bytes, and the bytes. Raises LeftOut."""
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        try:
            image.convert("RGBA" if "A" in image.getbands() else "RGB").save(buffer, "PNG")
        except Exception:  # Pillow's readers raise many kinds on broken files
            raise LeftOut("its image cannot be read") from None
        image = buffer.getvalue()
    suffix = next((suffix for start, suffix in _STARTS.items() if image.startswith(start)), None)
    if suffix is None:
        raise LeftOut("its image is of no known kind")
    return hashlib.sha256(image).hexdigest()[:20] + suffix, image


def save_images(images: list, folder: Path) -> list[str]:
    """Writes images, each once, and returns the names of their files. Raises LeftOut before the first is
    written."""
    files = [encode_image(image) for image in images]
    for name, data in files:
        path = folder / name
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(data)
            os.replace(part, path)
    return [name for name, _ in files]


def write_questions(lines: Iterable[dict | str], out: Path, limit: float) -> Counter:
    """Writes questions.jsonl and the images that the lines hold.

    lines: a question each, or the reason why there is none. Counts the questions, as "", and each reason.
    """
    counts, part = Counter(), out / "questions.jsonl.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            for line in lines:
                try:
                    if isinstance(line, str):
                        raise LeftOut(line)
                    file.write(json.dumps(_with_paths(line, out / "images")) + "\n")
                    counts[""] += 1
                except LeftOut as error:
                    counts[str(error)] += 1
                if counts[""] >= limit:
                    break
        if counts[""]:
            os.replace(part, out / "questions.jsonl")
    finally:
        part.unlink(missing_ok=True)
    return counts


def _with_paths(line: dict, folder: Path) -> dict:
    """Saves the images of a line and puts their paths in their places."""
    if "images" in line:
        names = save_images(line["images"], folder)
        return line | dict(images=[f"{folder.name}/{name}" for name in names])
    (name,) = save_images([line["image"]], folder)
    return line | dict(image=f"{folder.name}/{name}")


def write_images(records: Iterable[dict], out: Path, limit: float) -> Counter:
    """Writes every image of the records and nothing else of them. Counts as `write_questions`."""
    counts = Counter()
    for record in records:
        try:
            if not (images := images_of(record.get("images"))):
                raise LeftOut("no image")
            for image in images:
                save_images([image], out / "images")
            counts[""] += 1
        except LeftOut as error:
            counts[str(error)] += 1
        if counts[""] >= limit:
            break
    return counts

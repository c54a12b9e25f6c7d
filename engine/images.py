"""Images: from what the user points at to readable RGB pictures, with a reason for each file that is left out.

Image collections hold everything: transparency, palettes, CMYK, 16-bit greys, animations, photographs stored lying on
their side, files cut off in the middle, text named .png. Headers are checked when a run starts, pixels when an image is
used; a file that fails either is skipped and counted, never fatal.
"""

import json
import os
import random
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from engine.shards import Ranks

# What Pillow itself decodes; not EPS, for which it starts Ghostscript.
Image.init()
KNOWN = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
FORMATS = tuple(name for name in KNOWN if name in Image.OPEN)
MAX_RATIO = 200  # width / height and height / width that the image processor of Qwen2.5-VL accepts
MAX_PIXELS = 89_478_485  # a larger image is taken for a decompression bomb (Pillow's own limit)


class ImageError(ValueError):
    """An image cannot be used; the message says why."""


@dataclass(frozen=True)
class Picture:
    """An image and the path it came from."""

    path: str
    image: Image.Image


@dataclass(frozen=True)
class Found:
    """The images found, and (path, reason) for each that was skipped."""

    paths: list[str]
    skipped: list[tuple[str, str]]


def find_images(where: str) -> Found:
    """The images in a folder (with its subfolders), matching a glob, or listed in a .txt or .jsonl file.

    A .jsonl line is a path in quotes or an object with an "image" or "path". Listed paths may be relative to the list.
    Raises ValueError, with a sentence for the user, if `where` does not exist or a list cannot be read.
    """
    place = Path(where).expanduser()
    if not where.strip():
        raise ValueError("--images: the name of a folder, file or glob is empty")
    if place.is_dir():
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
        paths = sorted(str(p) for p in place.rglob("*") if p.suffix.lower() in suffixes)
    elif place.is_file() and place.suffix.lower() in (".txt", ".jsonl"):
        paths = _read_list(place)
    elif place.is_file():
        paths = [str(place)]
    else:
        paths = sorted(
            map(str, Path(place.anchor).glob(str(place.relative_to(place.anchor))))
        )  # follows no links: no loops
        if not paths:
            raise ValueError(f"--images: there is no folder, file or match of {where}")
    good, skipped = [], []
    for path in paths:
        try:
            with _open(path):
                good.append(path)
        except ImageError as error:
            skipped.append((path, str(error)))
    return Found(good, skipped)


def _read_list(place: Path) -> list[str]:
    paths = []
    try:
        for line in place.read_text(encoding="utf-8").splitlines():
            if line.strip():
                entry = json.loads(line) if place.suffix.lower() == ".jsonl" else line.strip()
                paths.append(entry if isinstance(entry, str) else entry.get("image") or entry["path"])
        return [str(p if Path(p).exists() else place.parent / p) for p in paths]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--images: {place} is not a list of image paths ({error!r})") from error


def _open(path: str) -> Image.Image:
    """Opens an image and checks its header; the pixels are not read yet."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would be waited for
            raise ImageError("not a file")
        image = Image.open(path, formats=FORMATS)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("more than twice 89 million pixels") from error
    except (
        Exception
    ) as error:  # Pillow's readers raise many kinds on broken files, struct.error and SyntaxError among them
        raise ImageError(f"not a readable image: {_reason(error)}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than 89 million pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{width} x {height} is more than {MAX_RATIO} times as long as wide")
    return image


def _reason(error: Exception) -> str:
    """What went wrong, on one line and without the path, which Pillow repeats."""
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    text = (getattr(error, "strerror", None) or str(error)).splitlines()
    return f"{type(error).__name__} {text[0][:100] if text else ''}".removeprefix("OSError ").strip()


def load_image(path: str) -> Image.Image:
    """Reads an image as RGB: the right way up, the first frame of an animation, what is transparent in white.

    Raises ImageError for a file that cannot be read to its end.
    """
    try:  # a file can be cut off anywhere behind its header
        with _open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                low, high = image.getextrema()
                scale = 255 / (65535 if image.mode != "F" and high > 255 else max(high, 1))
                image = image.convert("F").point(lambda value: value * scale).convert("L")
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"cannot be read to its end: {_reason(error)}") from error


@dataclass
class Pictures:
    """The images in random order, over and over.

    Each pass over the paths is a permutation that depends on `seed` and the number of the pass alone, so `position`, how
    many places have been passed, is all that an interrupted run has to remember.
    """

    found: Found
    seed: str
    position: int = 0

    def take(self, count: int, ranks: Ranks) -> list[Picture]:
        """The next `count` pictures, of several ranks this one's share of them.

        A file that turns out unreadable is added to `found.skipped`, on all ranks, and the next one takes its place.
        Raises ImageError when no file is readable.
        """
        pictures, missing = [], count
        while missing:
            good, bad = [], []
            for path in ranks.share(self._next_paths(missing)):
                try:
                    good.append(Picture(path, load_image(path)))
                except ImageError as error:
                    bad.append((path, str(error)))
            bad = [tuple(b) for b in ranks.gather(bad)]
            self.found.skipped.extend(dict.fromkeys(bad))
            pictures, missing = pictures + good, len(bad)
        return pictures

    def _next_paths(self, count: int) -> list[str]:
        """The next `count` paths that are not known to be unreadable."""
        left_out, paths, passed = {path for path, _ in self.found.skipped}, [], 0
        while len(paths) < count:
            if passed == 2 * len(self.found.paths):  # a whole pass, wherever this began
                raise ImageError("none of the images can be read")
            path, self.position, passed = self._path(self.position), self.position + 1, passed + 1
            if path not in left_out:
                paths.append(path)
                passed = 0
        return paths

    def _path(self, position: int) -> str:
        number, place = divmod(position, len(self.found.paths))
        return self.found.paths[_permutation(len(self.found.paths), f"{self.seed} {number}")[place]]


@lru_cache(maxsize=2)
def _permutation(length: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(length), length)

"""Finds the user's images and reads them as RGB pictures, with a reason for each file that is left out.

    --images WHERE --find_images--> Found --Pictures--> paths in random order --load_image--> RGB

Headers are checked when a run starts, pixels when an image is used; a file that fails either is skipped and
counted, never fatal. What is passed over, as a hidden folder, is listed, too.
"""

import json
import os
import random
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from model.prompt import Picture
from training.distributed import Ranks
from training.photographs import Photographs
from training.pixels import (  # noqa: F401  load_image stays importable from here
    SUFFIXES,
    UNREAD,
    ImageError,
    load_image,
    open_image,
)
from training.settings import printable, shorten

# How image files of any other name begin: IMG_0001, photo.jpg_large.
SIGNATURE = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0{4}|II\*\0|MM\0\*|8BPS|qoif|DDS |P[1-7]\s+[#\d]|"
    rb"\0\0\0\x0c(?:jP|JXL) |\xff\x4f\xff\x51|....ftyp(?:avi|hei|hev|mif)",
    re.DOTALL,
)
HIDDEN = "a hidden folder: name it in --images to use it"
LONGEST_NAME = 300  # characters of a path that are shown; data: URIs have many more


@dataclass(frozen=True)
class Found:
    """The images that were found."""

    paths: list[str]
    skipped: list[tuple[str, str]]  # (path, reason) of those that cannot be used


def find_images(where: str) -> Found:
    """Finds the images in a folder and its subfolders, matching a glob, or listed in a .txt or .jsonl file.

    A .jsonl line is a path in quotes or an object with an "image" or "path", or with several "images". Listed
    paths may be relative to the list.
    Raises ValueError, with a sentence for the user, if `where` does not exist or a list cannot be read.
    """
    place = Path(os.path.expanduser(where))
    if not where.strip():
        raise ValueError("--images: the name of a folder, file or glob is empty")
    good, skipped = [], []
    if place.is_dir():
        paths = [path for path in _glob(place, "**/*", skipped) if _may_be_image(path)]
    elif place.is_file() and place.suffix.lower() in (".txt", ".jsonl"):
        paths = _read_list(place)
    elif place.is_file():
        paths = [str(place)]
    else:
        paths = _match(where, place, skipped)
    for path in paths:
        try:
            with open_image(path):
                good.append(path)
        except ImageError as error:
            skipped.append((shorten(path, LONGEST_NAME), str(error)))
    return Found(good, skipped)


def _may_be_image(path: str) -> bool:
    """Returns true for what is called an image or begins like one, and for what cannot be opened."""
    if Path(path).suffix.lower() in SUFFIXES | UNREAD:
        return True
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return SIGNATURE.match(file.read(32)) is not None
    except OSError:
        return True


def _match(where: str, place: Path, skipped: list) -> list[str]:
    """Returns the paths that match a glob. Raises ValueError."""
    try:
        paths = _glob(Path(place.anchor), str(place.relative_to(place.anchor)), skipped)
    except ValueError as error:
        raise ValueError(f"--images {where}: {error}") from error
    if not paths and not skipped:
        raise ValueError(f"--images: there is no folder, file or match of {where}")
    return paths


def _glob(folder: Path, pattern: str, skipped: list) -> list[str]:
    """Returns the sorted paths below a folder that match a pattern; ** also enters linked folders.

    Hidden folders that the pattern does not name are added to `skipped`. Raises ValueError.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        matches = folder.glob(pattern)
    else:
        deep = parts.index("**")
        tops = filter(Path.is_dir, folder.glob("/".join(parts[:deep]))) if deep else [folder]
        rest = "/".join(parts[deep + 1 :]) or "*"
        places = [place for top in tops for place in _walk(top, skipped)]
        matches = [path for place in places for path in place.glob(rest)]
    # A shell's * passes over names with a dot in front, too.
    names_hidden = any(part.startswith(".") for part in parts)
    paths = []
    for path in matches:
        above = path.relative_to(folder).parts[:-1]
        if names_hidden or not any(part.startswith(".") for part in above):
            paths.append(str(path))
        else:
            skipped.append((str(path), HIDDEN))
    return sorted(paths)


def _walk(top: Path, skipped: list) -> Iterator[Path]:
    """Yields a folder and all below it, linked ones last, and each once: links may lead in a circle.

    Hidden folders, and those that cannot be listed, are added to `skipped`.
    """

    def note(error: OSError) -> None:
        why = f"a folder that cannot be listed: {error.strerror}"
        skipped.append((str(error.filename), why))

    seen = set()
    starts = [top]
    for start in starts:
        for folder, names, _ in os.walk(start, onerror=note):
            inside = sorted(names)
            names.clear()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            yield Path(folder)
            for name in inside:
                path = Path(folder, name)
                if name.startswith("."):
                    skipped.append((str(path), HIDDEN))
                elif path.is_symlink():
                    starts.append(path)
                else:
                    names.append(name)


def _read_list(place: Path) -> list[str]:
    """Returns the paths in a list, absolute. Raises ValueError.

    Only a line feed ends a line: a name may hold U+2028 or U+0085.
    """
    names = []
    try:
        data = place.read_bytes()
        if b"\0" in data:
            raise ValueError("it is in UTF-16 or no text; save it as UTF-8")
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for number, line in enumerate(lines, start=1):
            names += _parse_line(number, line, place.suffix.lower())
    except (OSError, ValueError) as error:
        raise ValueError(f"--images: {place} is not a list of image paths: {error}") from error
    # What lies beside the list comes before what lies in the current folder.
    folder = place.absolute().parent
    paths = []
    for name in names:
        path = Path(os.path.expanduser(name))
        beside = folder / path
        is_here = os.path.exists(path) and not os.path.exists(beside)
        paths.append(str(path.absolute() if is_here else beside))
    return paths


def _parse_line(number: int, line: bytes, suffix: str) -> list[str]:
    """Reads the paths on a line, none on an empty one. Raises ValueError with the line's number."""
    try:
        text = line.decode("utf-8").strip(" \t\r")
        if not text or suffix == ".txt":
            return [text] if text else []
        entry = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not JSON") from error
    paths = [entry]
    if isinstance(entry, dict):
        one = entry.get("image") or entry.get("path")
        paths = entry.get("images") if one is None else [one]
    are_paths = isinstance(paths, list) and all(isinstance(p, str) and p.strip() for p in paths)
    if not are_paths or not paths:
        raise ValueError(
            f'line {number} is no path and no object with the path as its "image" or "path"'
        )
    return paths


def say_why_none(found: Found) -> str:
    """Says that there is no image, and why the last one cannot be used."""
    if not found.skipped:
        return "there is no image"
    path, why = found.skipped[-1]
    return (
        f"none of the {len(found.skipped)} images can be read, the last is {printable(path)}: {why}"
    )


@dataclass
class Pictures:
    """The images in random order, over and over.

        pass 0    C A B D
        pass 1    B D A C    at position 5 D is next

    Each pass is a permutation of the paths, which depends on `seed` and the number of the pass alone. So the
    position is all that an interrupted run has to remember.
    """

    found: Found
    seed: str
    position: int = 0
    photographs: Photographs = field(default_factory=Photographs)  # decodes them

    def load_next(self, count: int, ranks: Ranks) -> list[Picture]:
        """Loads the next `count` pictures; of several ranks each loads its part of them.

        A file that turns out unreadable is added to `found.skipped`, on all ranks, and the next one takes
        its place. Raises ImageError when no file is readable.
        """
        pictures = []
        missing = count
        while missing:
            paths = ranks.shard(self._next_paths(missing))
            bad = []
            for path, image in zip(paths, self.photographs.load(paths)):
                if isinstance(image, ImageError):
                    bad.append((path, str(image)))
                else:
                    pictures.append(Picture(path, image))
            everywhere = ranks.all_gather(bad)
            self.found.skipped.extend(dict.fromkeys(map(tuple, everywhere)))
            missing = len(everywhere)
        # The next step asks for as many: they are decoded while this one runs.
        position = self.position
        self.photographs.expect(ranks.shard(self._next_paths(count)))
        self.position = position
        return pictures

    def _next_paths(self, count: int) -> list[str]:
        """Returns the next `count` paths that are not known to be unreadable. Raises ImageError."""
        skipped = {path for path, _ in self.found.skipped}
        paths = []
        passed = 0  # unreadable ones in a row
        while len(paths) < count:
            if passed == 2 * len(self.found.paths):  # a whole pass, wherever this began
                raise ImageError(say_why_none(self.found))
            number, place = divmod(self.position, len(self.found.paths))
            permutation = _permute(len(self.found.paths), f"{self.seed} {number}")
            path = self.found.paths[permutation[place]]
            self.position += 1
            if path in skipped:
                passed += 1
            else:
                paths.append(path)
                passed = 0
        return paths


@lru_cache(maxsize=2)
def _permute(length: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(length), length)

"""Images: from what the user points at to readable RGB pictures, with a reason for each file left out.

Image collections hold everything: transparency, palettes, CMYK, 16-bit greys, animations, photographs
stored lying on their side, files cut off in the middle, text named .png. Headers are checked when a run
starts, pixels when an image is used; a file that fails either is skipped and counted, never fatal.
"""

import io
import json
import math
import os
import random
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from model.prompt import Picture
from training.distributed import Ranks
from training.settings import printable

# What Pillow itself decodes; not EPS, for which it starts Ghostscript.
Image.init()
KNOWN = "PNG JPEG MPO WEBP GIF BMP DIB TIFF PPM TGA ICO JPEG2000 AVIF PSD PCX SGI QOI DDS".split()
FORMATS = tuple(name for name in KNOWN if name in Image.OPEN)
# Images by their names that Pillow cannot read, or of which it reads a thumbnail: listed, not passed over.
RAW = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srf"
    " .srw .x3f".split()
)
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
UNREAD = (
    RAW
    | frozenset(Image.registered_extensions())
    | frozenset(
        ".heic .heif .heics .hif .jxl .jxr .avif .avifs .svg .svgz .ai .psb .xcf .exr .hdr .bpg .djvu".split()
    )
)
UNREAD -= SUFFIXES | frozenset(".pdf .mpg .mpeg .h5 .hdf .grib .bufr .iim".split())  # films, documents, data
MAX_RATIO = 200  # width / height and height / width that the image processor of Qwen2.5-VL accepts
MAX_PIXELS = 89_478_485  # a larger image is taken for a decompression bomb (Pillow's own limit)
HEADROOM = 2  # times the pixels that the model takes: it scales such an image as it would the whole one
# Sets upright what an EXIF orientation of 2, 3, ... 8 describes.
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file starts


class ImageError(ValueError):
    """An image cannot be used; the message says why."""


@dataclass(frozen=True)
class Found:
    """The images found, and (path, reason) for each that was skipped."""

    paths: list[str]
    skipped: list[tuple[str, str]]


def find_images(where: str) -> Found:
    """The images in a folder (with its subfolders), matching a glob, or listed in a .txt or .jsonl file.

    A .jsonl line is a path in quotes or an object with an "image" or "path", or with several "images". Listed
    paths may be relative to the list.
    Raises ValueError, with a sentence for the user, if `where` does not exist or a list cannot be read.
    """
    place = Path(where).expanduser()
    if not where.strip():
        raise ValueError("--images: the name of a folder, file or glob is empty")
    if place.is_dir():
        paths = sorted(str(p) for p in place.rglob("*") if p.suffix.lower() in SUFFIXES | UNREAD)
    elif place.is_file() and place.suffix.lower() in (".txt", ".jsonl"):
        paths = _read_list(place)
    elif place.is_file():
        paths = [str(place)]
    else:  # follows no links: no loops
        pattern = str(place.relative_to(place.anchor))
        pattern += "/*" if place.name == "**" else ""  # by itself it matches folders, before Python 3.13
        try:
            paths = sorted(map(str, Path(place.anchor).glob(pattern)))
        except ValueError as error:
            raise ValueError(f"--images {where}: {error}") from error
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
    """The paths in a list, absolute. Only a line feed ends a line: a name may hold U+2028 or U+0085."""
    try:
        data = place.read_bytes()
        if b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it is in UTF-16 or no text; save it as UTF-8")
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        named = []
        for number, line in enumerate(lines, start=1):
            named += _listed(number, line, place.suffix.lower())
    except (OSError, ValueError) as error:
        raise ValueError(f"--images: {place} is not a list of image paths: {error}") from error
    paths = [Path(os.path.expanduser(name)) for name in named]
    beside = [place.absolute().parent / path for path in paths]  # the list's neighbours come first
    return [
        str(b if os.path.exists(b) or not os.path.exists(p) else p.absolute()) for p, b in zip(paths, beside)
    ]


def _listed(number: int, line: bytes, suffix: str) -> list[str]:
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
        several = entry.get("images")
        paths = [entry.get("image") or entry.get("path")]
        if paths == [None] and isinstance(several, list) and several:
            paths = several
    for path in paths:
        if not isinstance(path, str) or not path.strip():
            raise ValueError(f'line {number} is no path and no object with the path as its "image" or "path"')
    return paths


def _open(path: str) -> Image.Image:
    """Opens an image and checks its header; the pixels are not read yet."""
    suffix = Path(path).suffix.lower()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would be waited for
            raise ImageError("not a file")
        # Camera raws are TIFF files whose first image is a thumbnail.
        formats = [name for name in FORMATS if name != "TIFF" or suffix not in RAW]
        try:
            image = Image.open(path, formats=formats)
        except Image.DecompressionBombError:
            raise
        except Exception as error:
            if getattr(error, "errno", None) or (image := _bare(path)) is None:
                raise
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("more than twice 89 million pixels") from error
    # Pillow's readers raise many kinds on broken files, struct.error and SyntaxError among them.
    except Exception as error:
        if isinstance(error, UnidentifiedImageError) and suffix in UNREAD:
            kind = "a camera raw" if suffix in RAW else suffix[1:].upper()
            raise ImageError(f"{kind} ({suffix}) cannot be read here; convert it to PNG or JPEG") from error
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
    if said := getattr(error, "strerror", None):
        return said
    text = str(error).splitlines()
    return f"{type(error).__name__} {text[0][:100] if text else ''}".removeprefix("OSError ").strip()


def _bare(path: str) -> Image.Image | None:
    """A PNG or JPEG image read with nothing but what its pixels need; None if it is broken all the same."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if not start.startswith((PNG, b"\xff\xd8")):
                return None
            return Image.open(io.BytesIO(_without_metadata(start + file.read())), formats=("PNG", "JPEG"))
    except Exception:
        return None


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file with nothing in it but what its pixels need."""
    if data.startswith(PNG):
        kept, at = [data[:8]], 8
        while at < len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(data[at:end])
            at = end
    else:
        kept, at = [data[:2]], 2
        while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:  # until the pixels start
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if data[at + 1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE):  # APP14 says what the colours mean
                kept.append(data[at:end])
            at = end
    return b"".join(kept) + data[at:]


def load_image(path: str, max_pixels: int | None = None, token_side: int = 28) -> Image.Image:
    """Reads an image as RGB: the right way up, the first frame of an animation, what is transparent in white.

    max_pixels: how many pixels a model takes. An image of more than HEADROOM times as many is scaled down to
    that, so that many photographs fit into memory; a smaller one is left as it is, for the model to scale.
    token_side: pixels along one side of the model's image token, below which the shorter side is not scaled.
    Raises ImageError for a file that cannot be read to its end.
    """
    most = None if max_pixels is None else HEADROOM * max_pixels
    try:  # a file can be cut off anywhere behind its header
        with _open(path) as image:
            try:
                return _rgb(image, most, token_side)
            except ImageError:
                raise
            except Exception:  # without its metadata the image may be whole
                if (bare := _bare(path)) is None:
                    raise
                return _rgb(bare, most, token_side)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"cannot be read to its end: {_reason(error)}") from error


def _rgb(image: Image.Image, most: int | None, token_side: int) -> Image.Image:
    """The pixels of an opened image, `most` at most, upright, on white."""
    size = _scaled_down(image.size, most, token_side)
    if size != image.size:  # a JPEG is read at a half, a quarter or an eighth, if that is still twice as wide
        image.draft(None, (2 * size[0], 2 * size[1]))
    raw = str(image.tile[0].args) if image.tile else ""  # how the file packs them, known until they are read
    image.load()
    turned = _numbers(image) if image.mode.startswith("I") or image.mode == "F" else _on_white(image, raw)
    if size != turned.size:
        turned = turned.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    try:
        turn = image.getexif().get(0x0112)
    except Exception:  # broken metadata; the pixels are there
        turn = None
    if isinstance(turn, int) and 2 <= turn <= 8:
        turned = turned.transpose(Image.Transpose[TURNS[turn - 2]])
    return turned.convert("RGB")


def _scaled_down(size: tuple[int, int], most: int | None, token_side: int = 28) -> tuple[int, int]:
    """The same shape with about `most` pixels, or the size itself if it has not more."""
    if most is None or size[0] * size[1] <= most:
        return size
    shorter = min(size)  # it stays as long as one image token, and the shape becomes no longer: MAX_RATIO
    scale = min(1.0, max(math.sqrt(most / (size[0] * size[1])), token_side / shorter))
    width, height = (math.ceil(side * scale) if side == shorter else int(side * scale) for side in size)
    return width, height


def _on_white(image: Image.Image, raw: str) -> Image.Image:
    """An image of 8 bits, what is transparent in white."""
    key = image.info.get("transparency")
    if isinstance(key, int) and image.format == "PNG" and image.mode != "P":  # packed in 1, 2 or 4 bits
        image.info["transparency"] = key * {"1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)
    if isinstance(key, tuple) and max(key) > 255:  # 16 bits a channel, of which Pillow keeps 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _numbers(image: Image.Image) -> Image.Image:
    """An image of 16-bit, 32-bit or float values as 8 bits, what is transparent in white."""
    values, tags, white = np.asarray(image), getattr(image, "tag_v2", {}), None
    if image.mode.startswith("I;16"):
        white = 2.0 ** tags.get(258, (16,))[0] - 1  # a TIFF file may have 12 bits
    elif image.mode == "I" and image.format == "PPM":
        white = 65535.0
    elif image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow has signed ones only
    grey, key = _grey(values, white), image.info.get("transparency")
    if isinstance(key, int):  # one of the values, before they were scaled
        grey[values == key] = 255
    return Image.fromarray(grey)


def _grey(values: np.ndarray, white: float | None) -> np.ndarray:
    """Any numbers as 8 bits: from 0 to `white`, or else from their least to their largest. NaN is black."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        raise ImageError("none of its values is a finite number")
    low, high = (0.0, white) if white else (finite.min(), finite.max())
    if low == high:  # one value: a share of 1, of 8 bits or of 16, as it may be
        scales = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
        low, high = 0.0, next((scale for scale in scales if high <= scale), high)
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((values - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)


def say_why_none(found: Found) -> str:
    """That there is no image, and why the last one cannot be used."""
    if not found.skipped:
        return "there is no image"
    path, why = found.skipped[-1]
    return f"none of the {len(found.skipped)} images can be read, the last is {printable(path)}: {why}"


@dataclass
class Pictures:
    """The images in random order, over and over.

    Each pass over the paths is a permutation that depends on `seed` and the number of the pass alone, so
    `position`, how many places have been passed, is all that an interrupted run has to remember.
    `max_pixels` and `token_side`: what the model takes of an image (see `load_image`).
    """

    found: Found
    seed: str
    position: int = 0
    max_pixels: int | None = None
    token_side: int = 28

    def take(self, count: int, ranks: Ranks) -> list[Picture]:
        """The next `count` pictures, of several ranks this one's share of them.

        A file that turns out unreadable is added to `found.skipped`, on all ranks, and the next one takes
        its place. Raises ImageError when no file is readable.
        """
        pictures, missing = [], count
        while missing:
            good, bad = [], []
            for path in ranks.shard(self._next_paths(missing)):
                try:
                    good.append(Picture(path, load_image(path, self.max_pixels, self.token_side)))
                except ImageError as error:
                    bad.append((path, str(error)))
            bad = [tuple(b) for b in ranks.all_gather(bad)]
            self.found.skipped.extend(dict.fromkeys(bad))
            pictures, missing = pictures + good, len(bad)
        return pictures

    def _next_paths(self, count: int) -> list[str]:
        """The next `count` paths that are not known to be unreadable."""
        left_out, paths, passed = {path for path, _ in self.found.skipped}, [], 0
        while len(paths) < count:
            if passed == 2 * len(self.found.paths):  # a whole pass, wherever this began
                raise ImageError(say_why_none(self.found))
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


def images_in(folder: Path, pictures: list[Picture]) -> list[Picture]:
    """The pictures, with paths inside the folder relative to it, so that the folder can be moved."""
    inside, places = folder.absolute(), [Path(picture.path).absolute() for picture in pictures]
    return [
        Picture(place.relative_to(inside).as_posix(), p.image) if place.is_relative_to(inside) else p
        for p, place in zip(pictures, places)
    ]

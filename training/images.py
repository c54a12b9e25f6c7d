"""Finds the user's images and reads them as RGB pictures, with a reason for each file that is left out.

    --images WHERE --find_images--> Found --Pictures--> paths in random order --load_image--> RGB

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
OTHERS = frozenset(
    ".heic .heif .heics .hif .jxl .jxr .avif .avifs .svg .svgz .ai .psb .xcf .exr .hdr .bpg .djvu".split()
)
NO_IMAGES = frozenset(".pdf .mpg .mpeg .h5 .hdf .grib .bufr .iim".split())  # films, documents, data
UNREAD = (RAW | OTHERS | frozenset(Image.registered_extensions())) - SUFFIXES - NO_IMAGES
MAX_RATIO = 200  # width / height and height / width that the image processor of Qwen2.5-VL accepts
MAX_PIXELS = 89_478_485  # a larger image is taken for a decompression bomb (Pillow's own limit)
HEADROOM = (
    2  # times the pixels that the model takes: it scales such an image as it would the whole one
)
ORIENTATION = 0x0112  # the tag in EXIF
# Sets upright what an orientation of 2, 3, ... 8 describes. ImageOps.exif_transpose would have to come before
# values are scaled to 8 bits, and loses the tags that say how.
TURNS = (
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
)
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file starts
JPEG = b"\xff\xd8"


class ImageError(ValueError):
    """An image cannot be used; the message says why."""


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
    place = Path(where).expanduser()
    if not where.strip():
        raise ValueError("--images: the name of a folder, file or glob is empty")
    if place.is_dir():
        paths = sorted(str(p) for p in place.rglob("*") if p.suffix.lower() in SUFFIXES | UNREAD)
    elif place.is_file() and place.suffix.lower() in (".txt", ".jsonl"):
        paths = _read_list(place)
    elif place.is_file():
        paths = [str(place)]
    else:
        paths = _match(where, place)
    good, skipped = [], []
    for path in paths:
        try:
            with _open(path):
                good.append(path)
        except ImageError as error:
            skipped.append((path, str(error)))
    return Found(good, skipped)


def _match(where: str, place: Path) -> list[str]:
    """Returns the paths that match a glob. Follows no links: no loops. Raises ValueError."""
    pattern = str(place.relative_to(place.anchor))
    if place.name == "**":
        pattern += "/*"  # by itself it matches folders, before Python 3.13
    try:
        paths = sorted(map(str, Path(place.anchor).glob(pattern)))
    except ValueError as error:
        raise ValueError(f"--images {where}: {error}") from error
    if not paths:
        raise ValueError(f"--images: there is no folder, file or match of {where}")
    return paths


def _read_list(place: Path) -> list[str]:
    """Returns the paths in a list, absolute. Raises ValueError.

    Only a line feed ends a line: a name may hold U+2028 or U+0085.
    """
    names = []
    try:
        data = place.read_bytes()
        if b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff")):
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
        several = entry.get("images")
        use_several = one is None and isinstance(several, list) and several
        paths = several if use_several else [one]
    for path in paths:
        if not isinstance(path, str) or not path.strip():
            raise ValueError(
                f'line {number} is no path and no object with the path as its "image" or "path"'
            )
    return paths


def _open(path: str) -> Image.Image:
    """Opens an image and checks its header; the pixels are not read yet. Raises ImageError."""
    suffix = Path(path).suffix.lower()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would be waited for
            raise ImageError("not a file")
        image = _open_known(path, suffix)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("more than twice 89 million pixels") from error
    # Pillow's readers raise many kinds on broken files, struct.error and SyntaxError among them.
    except Exception as error:
        if isinstance(error, UnidentifiedImageError) and suffix in UNREAD:
            kind = "a camera raw" if suffix in RAW else suffix[1:].upper()
            raise ImageError(
                f"{kind} ({suffix}) cannot be read here; convert it to PNG or JPEG"
            ) from error
        raise ImageError(f"not a readable image: {_reason(error)}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than 89 million pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{width} x {height} is more than {MAX_RATIO} times as long as wide")
    return image


def _open_known(path: str, suffix: str) -> Image.Image:
    """Opens a file of one of FORMATS; if its metadata are broken, without them. Raises Pillow's errors."""
    # Camera raws are TIFF files whose first image is a thumbnail.
    formats = [name for name in FORMATS if name != "TIFF" or suffix not in RAW]
    try:
        return Image.open(path, formats=formats)
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        from_disk = getattr(error, "errno", None)
        bare = None if from_disk else _open_bare(path)
        if bare is None:
            raise
        return bare


def _reason(error: Exception) -> str:
    """Says what went wrong, on one line and without the path, which Pillow repeats."""
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    said = getattr(error, "strerror", None)
    if said:
        return said
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__} {lines[0][:100]}".removeprefix("OSError ").strip()


def _open_bare(path: str) -> Image.Image | None:
    """Opens a PNG or JPEG image with nothing but what its pixels need; None if it is broken all the same."""
    try:
        data = Path(path).read_bytes()
        if data.startswith(PNG):
            bare = _strip_png(data)
        elif data.startswith(JPEG):
            bare = _strip_jpeg(data)
        else:
            return None
        return Image.open(io.BytesIO(bare), formats=("PNG", "JPEG"))
    except Exception:
        return None


def _strip_png(data: bytes) -> bytes:
    """Drops the chunks of a PNG file that its pixels do not need.

        signature (8 bytes), then chunks: length (4), name (4), content (length), checksum (4)

    Raises what it may if the file is broken.
    """
    kept = [PNG]
    start = len(PNG)
    while start < len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        end = start + 12 + length
        if data[start + 4 : start + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _strip_jpeg(data: bytes) -> bytes:
    """Drops the segments of a JPEG file that its pixels do not need.

        FF D8, then segments: FF, kind (1 byte), length of itself and the content (2), content

    The pixels begin with the segment of kind DA. Raises what it may if the file is broken.
    """
    kept = [JPEG]
    start = len(JPEG)
    while data[start : start + 1] == b"\xff" and data[start + 1] != 0xDA:
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        end = start + 2 + length
        is_metadata = data[start + 1] in (
            *range(0xE1, 0xEE),
            0xEF,
            0xFE,
        )  # APP14 tells what colours mean
        if not is_metadata:
            kept.append(data[start:end])
        start = end
    return b"".join(kept) + data[start:]


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
                bare = _open_bare(path)
                if bare is None:
                    raise
                return _rgb(bare, most, token_side)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"cannot be read to its end: {_reason(error)}") from error


def _rgb(image: Image.Image, most: int | None, token_side: int) -> Image.Image:
    """Reads the pixels of an opened image, `most` at most, upright, on white."""
    size = _scaled_down(image.size, most, token_side)
    if (
        size != image.size
    ):  # a JPEG is read at a half, a quarter or an eighth, if that is still twice as wide
        image.draft(None, (2 * size[0], 2 * size[1]))
    packing = str(image.tile[0].args) if image.tile else ""  # known until the pixels are read
    image.load()
    has_numbers = image.mode.startswith("I") or image.mode == "F"
    result = _numbers_to_grey(image) if has_numbers else _on_white(image, packing)
    if size != result.size:
        result = result.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # broken metadata; the pixels are there
        orientation = None
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        result = result.transpose(Image.Transpose[TURNS[orientation - 2]])
    return result.convert("RGB")


def _scaled_down(size: tuple[int, int], most: int | None, token_side: int = 28) -> tuple[int, int]:
    """Returns a size of the same shape with about `most` pixels, or the size itself if it has not more.

    The shorter side stays as long as one image token, so that the shape becomes no longer (see MAX_RATIO).
    """
    width, height = size
    if most is None or width * height <= most:
        return size
    shorter = min(size)
    scale = min(1.0, max(math.sqrt(most / (width * height)), token_side / shorter))
    scaled = [math.ceil(side * scale) if side == shorter else int(side * scale) for side in size]
    return scaled[0], scaled[1]


def _on_white(image: Image.Image, packing: str) -> Image.Image:
    """Lays an image of 8 bits on white, if it is transparent. packing: how the file packs pixels."""
    key = image.info.get("transparency")
    if (
        isinstance(key, int) and image.format == "PNG" and image.mode != "P"
    ):  # packed in 1, 2 or 4 bits
        image.info["transparency"] = key * {"1": 255, "L;2": 85, "L;4": 17}.get(packing, 1)
    if isinstance(key, tuple) and max(key) > 255:  # 16 bits a channel, of which Pillow keeps 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _numbers_to_grey(image: Image.Image) -> Image.Image:
    """Converts an image of 16-bit, 32-bit or float values to 8 bits, with what is transparent in white."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    # The value of white, where the format says it; unsigned values, of which Pillow knows only signed ones.
    white = None
    if image.mode.startswith("I;16"):
        bits = tags.get(258, (16,))[0]  # a TIFF file may have 12
        white = 2.0**bits - 1
    elif image.mode == "I" and image.format == "PPM":
        white = 65535.0
    elif image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
        values = values.view(np.uint32)
    grey = _scale_to_grey(values, white)
    key = image.info.get("transparency")
    if isinstance(key, int):  # one of the values, before they were scaled
        grey[values == key] = 255
    return Image.fromarray(grey)


def _scale_to_grey(values: np.ndarray, white: float | None) -> np.ndarray:
    """Scales numbers to 0 .. 255: from 0 to `white`, else from their least to their largest. NaN is black."""
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        raise ImageError("none of its values is a finite number")
    low = 0.0 if white else finite.min()
    high = white or finite.max()
    if low == high:  # one value: a part of 1, of 8 bits or of 16, as it may be
        scales = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
        low = 0.0
        high = next((scale for scale in scales if high <= scale), high)
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    scaled = (values - low) / (high - low) * 255
    return scaled.clip(0, 255).round().astype(np.uint8)


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
    max_pixels: int | None = None  # that the model takes of an image (see `load_image`)
    token_side: int = 28

    def load_next(self, count: int, ranks: Ranks) -> list[Picture]:
        """Loads the next `count` pictures; of several ranks each loads its part of them.

        A file that turns out unreadable is added to `found.skipped`, on all ranks, and the next one takes
        its place. Raises ImageError when no file is readable.
        """
        pictures = []
        missing = count
        while missing:
            bad = []
            for path in ranks.shard(self._next_paths(missing)):
                try:
                    pictures.append(
                        Picture(path, load_image(path, self.max_pixels, self.token_side))
                    )
                except ImageError as error:
                    bad.append((path, str(error)))
            bad = [(path, why) for path, why in ranks.all_gather(bad)]
            self.found.skipped.extend(dict.fromkeys(bad))
            missing = len(bad)
        return pictures

    def _next_paths(self, count: int) -> list[str]:
        """Returns the next `count` paths that are not known to be unreadable. Raises ImageError."""
        skipped = {path for path, _ in self.found.skipped}
        paths = []
        passed = 0  # unreadable ones in a row
        while len(paths) < count:
            if passed == 2 * len(self.found.paths):  # a whole pass, wherever this began
                raise ImageError(say_why_none(self.found))
            path = self._path(self.position)
            self.position += 1
            if path in skipped:
                passed += 1
            else:
                paths.append(path)
                passed = 0
        return paths

    def _path(self, position: int) -> str:
        """Returns the path at a position of the random order."""
        number, place = divmod(position, len(self.found.paths))
        permutation = _permute(len(self.found.paths), f"{self.seed} {number}")
        return self.found.paths[permutation[place]]


@lru_cache(maxsize=2)
def _permute(length: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(length), length)


def make_relative(folder: Path, pictures: list[Picture]) -> list[Picture]:
    """Makes paths inside the folder relative to it, so that the folder can be moved; others stay."""
    folder = folder.absolute()
    relative = []
    for picture in pictures:
        path = Path(picture.path).absolute()
        if path.is_relative_to(folder):
            picture = Picture(path.relative_to(folder).as_posix(), picture.image)
        relative.append(picture)
    return relative

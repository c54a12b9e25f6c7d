"""Reads an image file as an RGB picture, whatever is in it.

Image collections hold everything: transparency, palettes, CMYK, 16-bit greys, animations, photographs
stored lying on their side, files cut off in the middle, text named .png.
"""

import io
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow itself decodes; not EPS, for which it starts Ghostscript.
Image.init()
KNOWN = "PNG JPEG MPO WEBP GIF BMP DIB TIFF PPM TGA ICO JPEG2000 AVIF PSD PCX SGI QOI DDS".split()
FORMATS = tuple(name for name in KNOWN if name in Image.OPEN)
# Images by their names that Pillow cannot read, or of which it reads a thumbnail: listed, not passed over.
RAW = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .gpr .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw"
    " .rw2 .rwl .sr2 .srf .srw .x3f".split()
)
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
OTHERS = frozenset(
    ".heic .heif .heics .hif .jxl .jxr .avif .avifs .svg .svgz .ai .psb .xcf .exr .hdr .bpg .djvu".split()
)
NO_IMAGES = frozenset(".pdf .mpg .mpeg .h5 .hdf .grib .bufr .iim".split())  # films, documents, data
UNREAD = (RAW | OTHERS | frozenset(Image.registered_extensions())) - SUFFIXES - NO_IMAGES
# Words at the start of a path that is none.
ADDRESS = re.compile(r"(?:^|[/\\])(data|https?|file|s3|gs|hf):", re.IGNORECASE)
MAX_RATIO = 200  # width / height and height / width that the image processor of Qwen2.5-VL accepts
MAX_PIXELS = 89_478_485  # a larger image is taken for a decompression bomb (Pillow's own limit)
# Times the pixels that the model takes: it scales such an image as it would the whole one.
HEADROOM = 2
ORIENTATION = 0x0112  # the tag in EXIF
PHOTOMETRIC = 262  # the tag of TIFF that says which values are white
# Formats in which the byte of the alpha is often there, and 0, where there is no transparency.
SPARE_ALPHA = ("TGA", "BMP", "DIB", "ICO", "DDS")
TRANSPARENT = ("RGBA", "LA")  # the modes with alpha that Pillow scales
STRIP = 1 << 20  # numbers that are converted at a time
# Sets upright what an orientation of 2, 3, ... 8 describes. ImageOps.exif_transpose would have to come before
# values are scaled to 8 bits, and loses the tags that say how.
TURNS = (
    "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
)
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file starts
JPEG = b"\xff\xd8"


class ImageError(ValueError):
    """An image cannot be used; the message says why."""


def open_image(path: str) -> Image.Image:
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
        if found := ADDRESS.search(path):
            raise ImageError(f"{found[1]}: is an address; write the image to a file") from error
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
        is_of_the_disk = getattr(error, "errno", None) is not None
        bare = None if is_of_the_disk else _open_bare(path)
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
        # APP1 to APP15 and comments, but not APP14 (EE), which tells what colours mean.
        if data[start + 1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE):
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
        with open_image(path) as image:
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
    if size != image.size:
        # A JPEG is read at a half, a quarter or an eighth, if that is still twice as wide.
        image.draft(None, (2 * size[0], 2 * size[1]))
    packing = str(image.tile[0].args) if image.tile else ""  # known until the pixels are read
    has_alpha = image.format != "TGA" or _tga_alpha_bits(image) > 0
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        result = _numbers_to_grey(image)
    else:
        result = _to_eight_bits(image, packing, has_alpha)
    if size != result.size:  # a colour counts by its alpha
        result = result.resize(size, Image.Resampling.BICUBIC)
    if result.mode in TRANSPARENT:
        white = Image.new("RGBA", size, "white")
        result = Image.alpha_composite(white, result.convert("RGBA"))
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


def _tga_alpha_bits(image: Image.Image) -> int:
    """Returns how many bits of a pixel are its alpha, which only the header of a TGA file says."""
    image.fp.seek(17)
    return image.fp.read(1)[0] & 15


def _to_eight_bits(image: Image.Image, packing: str, has_alpha: bool) -> Image.Image:
    """Returns the image in one of TRANSPARENT, else as RGB. packing: how the file packs pixels."""
    key = image.info.get("transparency")
    if isinstance(key, int) and image.format == "PNG" and image.mode != "P":
        # A value of 1, 2 or 4 bits, which Pillow has made one of 8.
        image.info["transparency"] = key * {"1": 255, "L;2": 85, "L;4": 17}.get(packing, 1)
    if isinstance(key, tuple) and max(key) > 255:  # 16 bits a channel, of which Pillow keeps 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not has_alpha or not image.has_transparency_data:
        return image.convert("RGB")
    shown = image if image.mode in TRANSPARENT else image.convert("RGBA")
    is_spare = image.format in SPARE_ALPHA and shown.getextrema()[-1] == (0, 0)
    return shown.convert("RGB") if is_spare else shown


def _numbers_to_grey(image: Image.Image) -> Image.Image:
    """Converts an image of 16-bit, 32-bit or float values to 8 bits, with what is transparent in white."""
    # From black to white: as the format says it, else from the least to the largest value.
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    if image.mode.startswith("I;16"):
        bits = tags.get(258, (16,))[0]  # a TIFF file may have 12
        low, high = 0.0, 2.0**bits - 1
    elif image.mode == "I" and image.format == "PPM":
        low, high = 0.0, 65535.0
    else:
        low, high = _find_range(image)
    # A strip at a time, as 64-bit numbers take much memory. NaN is black.
    key = image.info.get("transparency")  # one of the values
    grey = np.empty((image.height, image.width), np.uint8)
    for rows, values in _strips(image):
        numbers = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        scaled = (numbers - low) / (high - low) * 255
        grey[rows] = scaled.clip(0, 255).round()
        if isinstance(key, int):
            grey[rows][values == key] = 255
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white
        grey = ~grey
    return Image.fromarray(grey)


def _strips(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields some rows of an image of numbers at a time, and their values.

    An image of 300,000 x 8 pixels comes in strips of 3 rows: 0:3, 3:6, 6:8.
    """
    tags = getattr(image, "tag_v2", {})
    is_unsigned = image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,)
    count = max(1, STRIP // image.width)
    for top in range(0, image.height, count):
        rows = slice(top, min(top + count, image.height))
        values = np.asarray(image.crop((0, rows.start, image.width, rows.stop)))
        # Pillow knows only signed 32-bit numbers.
        yield rows, values.view(np.uint32) if is_unsigned else values


def _find_range(image: Image.Image) -> tuple[float, float]:
    """Returns the least and the largest finite value. Raises ImageError if there is none.

    A single value is a part of 1, of 8 bits or of 16 bits, the smallest that holds it.
    """
    ends = []  # the least and the largest value of each strip
    for _, values in _strips(image):
        finite = values[np.isfinite(values)]
        if finite.size:
            ends += [float(finite.min()), float(finite.max())]
    if not ends:
        raise ImageError("none of its values is a finite number")
    low = min(ends)
    high = max(ends)
    if low < high:
        return low, high
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return 0.0, next((scale for scale in scales if high <= scale), high)

"""Finding and reading images: every mode, and files that are no images."""

import json
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from checkpoints import noise_image
from PIL import Image, ImageOps

from training.distributed import Ranks
from training.images import Found, ImageError, Pictures, find_images, load_image, say_why_none


def test_every_mode_becomes_rgb(tmp_path):
    base = noise_image(40, 30)
    for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr", "I;16", "I", "F"):
        suffix = {"CMYK": "jpg", "YCbCr": "jpg", "I": "tiff", "F": "tiff"}.get(mode, "png")
        image = (
            Image.fromarray(np.full((30, 40), 40_000, np.uint16))
            if mode == "I;16"
            else base.convert(mode)
        )
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        image.save(path)
        loaded = load_image(str(path))
        assert loaded.mode == "RGB" and loaded.size == (40, 30), mode
        if mode == "I;16":
            assert abs(loaded.getpixel((0, 0))[0] - 40_000 * 255 / 65535) <= 1.5, (
                "16 bits are scaled, not clipped"
            )


def test_transparency_is_white_and_photos_stand_upright(tmp_path):
    clear = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    palette = Image.new("P", (30, 30), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert load_image(str(tmp_path / "clear.png")).getpixel((3, 3)) == (255, 255, 255)
    assert load_image(str(tmp_path / "palette.png")).getpixel((3, 3)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (50, 30)).save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(str(tmp_path / "photo.jpg")).size == (30, 50)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(str(tmp_path / "a.gif")).getpixel((1, 1)) == (255, 0, 0)


def bad_folder(folder):
    folder.mkdir(exist_ok=True)
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "dir.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere")
    Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    return folder


def test_folders_globs_and_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    good = [tmp_path / "a.png", tmp_path / "sub" / "b.JPG"]
    for path in good:
        noise_image(40, 40).save(path, format="png")
    (tmp_path / "notes.md").write_text("not an image, and not named like one")
    assert find_images(str(tmp_path)).paths == [str(p) for p in good]
    assert find_images(str(tmp_path / "**" / "*.JPG")).paths == [str(good[1])]
    assert find_images(str(tmp_path / "**")).paths == [str(p) for p in good]
    assert find_images(str(good[0])).paths == [str(good[0])]
    with pytest.raises(ValueError, match=r"--images .*\*\*x"):
        find_images(str(tmp_path / "**x"))
    (tmp_path / "list.txt").write_text(f"a.png\n\n{good[1]}\nmissing.png\n")
    found = find_images(str(tmp_path / "list.txt"))
    assert found.paths == [str(p) for p in good] and [p for p, _ in found.skipped] == [
        str(tmp_path / "missing.png")
    ]
    lines = [
        '"a.png"',
        json.dumps({"image": "a.png", "question": "?"}),
        json.dumps({"path": "sub/b.JPG"}),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert find_images(str(tmp_path / "list.jsonl")).paths == [str(good[0])] * 2 + [str(good[1])]
    for wrong in ('{"x": 1}', "[1", "3"):
        (tmp_path / "bad.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match="not a list"):
            find_images(str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match="no folder"):
        find_images(str(tmp_path / "nowhere"))


def test_what_is_no_image_is_skipped_with_a_reason(tmp_path):
    found = find_images(str(bad_folder(tmp_path / "bad")))
    assert found.paths == []
    reasons = {path.rsplit("/", 1)[1]: reason for path, reason in found.skipped}
    assert set(reasons) == {"text.png", "empty.jpg", "dir.png", "gone.png", "thin.png", "bomb.png"}
    assert "200 times" in reasons["thin.png"] and "million" in reasons["bomb.png"]


def test_a_truncated_image_is_skipped_when_it_is_read(tmp_path):
    noise_image(64, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    found = find_images(str(tmp_path))
    assert len(found.paths) == 2, "its header is fine"
    with pytest.raises(ImageError, match="to its end"):
        load_image(str(tmp_path / "cut.png"))
    assert {p.path for p in Pictures(found, "0").load_next(6, Ranks())} == {
        str(tmp_path / "whole.png")
    }
    assert [path for path, _ in found.skipped] == [str(tmp_path / "cut.png")], (
        "once, however often it comes round"
    )
    with pytest.raises(
        ImageError, match="none of the 1 images can be read, the last is .*cut.png: .*to its end"
    ):
        Pictures(Found([str(tmp_path / "cut.png")], []), "0").load_next(1, Ranks())
    said = say_why_none(Found([], [("a\x1b[31m\nb.png", "of no known format")]))
    assert said.isprintable() and "of no known format" in said


def test_pictures_go_round_in_an_order_that_the_seed_gives(tmp_path):
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.png"))
        noise_image(30, 30, i).save(paths[-1])
    draws = [
        [p.path for p in Pictures(Found(paths, []), seed).load_next(8, Ranks())]
        for seed in ("1", "1", "2")
    ]
    assert draws[0] == draws[1] != draws[2]
    assert (
        sorted(draws[0][:4]) == paths
        and sorted(draws[0][4:]) == paths
        and draws[0][:4] != draws[0][4:]
    )
    later = Pictures(Found(paths, []), "1", position=3)
    assert [p.path for p in later.load_next(2, Ranks()) + later.load_next(3, Ranks())] == draws[0][
        3:
    ], "the position is all that has to be known"


# ---- Names -------------------------------------------------------------------------------------------------

HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"
UNREADABLE = "a.HEIC b.heif c.jxl d.svg e.eps f.CR2 g.nef h.dng i.arw j.psd k.avif l.raf m.exr n.webp".split()
UNREADABLE += "o.cr3 p.xpm q.icns".split()


def test_whatever_is_an_image_by_its_name_is_listed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in UNREADABLE:
        (tmp_path / "sub" / name).write_bytes(
            HEIC if name < "d" else b"%!PS-Adobe-3.0 EPSF or anything else"
        )
    for name in ("notes.md", "film.mpg", "paper.pdf", "data.h5", "code.py"):
        (tmp_path / name).write_text("x")
    (tmp_path / "list.txt").write_text("\n".join(f"sub/{name}" for name in UNREADABLE))
    for where in (".", "sub/*", "list.txt"):
        found = find_images(str(tmp_path / where))
        assert found.paths == [] and {Path(p).name for p, _ in found.skipped} == set(UNREADABLE), (
            where
        )
        reasons = {Path(path).suffix.lower(): why for path, why in found.skipped}
        assert "HEIC" in reasons[".heic"] and "convert" in reasons[".heic"]
        assert all(
            "camera raw" in reasons[s] for s in (".cr2", ".nef", ".dng", ".arw", ".raf", ".cr3")
        )
        assert all("\n" not in why and why for why in reasons.values())


def test_what_can_be_read_is_used_whatever_its_name(tmp_path):
    """A photograph exported as .heic that is a JPEG inside; but not the thumbnail inside a camera raw."""
    noise_image(40, 30).save(tmp_path / "jpeg.heic", "jpeg")
    noise_image(40, 30).save(tmp_path / "png.jpg", "png")
    noise_image(40, 30).save(tmp_path / "thumbnail.NEF", "tiff")
    for name in ("a.qoi", "b.pcx", "c.sgi", "d.dds", "e.dib", "f.avif", "g.jfif", "h.tga", "i.pbm"):
        noise_image(40, 30).convert("1" if name == "i.pbm" else "RGB").save(tmp_path / name)
    found = find_images(str(tmp_path))
    assert [Path(path).name for path, _ in found.skipped] == ["thumbnail.NEF"]
    assert len(found.paths) == 11 and all(load_image(path).size == (40, 30) for path in found.paths)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_nothing_is_passed_over_in_silence(tmp_path):
    """Linked folders are entered once, whatever their circles; files of other names are looked into."""
    here, away = tmp_path / "here", tmp_path / "away"
    used = "sub/a.png IMG_0001 b.jpg_large c.jpeg~ d.JPG.1 album/e.png album/deep/f.png a".split()
    for name in used:
        path = away / name.removeprefix("album/") if name.startswith("album") else here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(40, 40).save(path, "jpeg" if "j" in name.lower() else "png")
    noise_image(40, 40).save(here / "bmp", "bmp")
    noise_image(40, 40).save(here / "tiff.", "tiff")
    link(here / "album", away)
    link(here / "sub" / "up", here)
    link(away / "deep" / "back", here / "sub")
    link(away / "again", away)
    for name in (".ipynb_checkpoints/a-checkpoint.png", ".Trash-1000/files/b.png", ".b/c"):
        (here / name).parent.mkdir(parents=True)
        noise_image(40, 40).save(here / name, "png")
    link(here / "lost", tmp_path / "gone")
    (here / "heic").write_bytes(HEIC)
    (here / "cut").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, text in {
        "notes.txt": "BMW",
        "data.json": "{}",
        "list": "P1 or P2?",
        "empty": "",
    }.items():
        (here / name).write_text(text)
    os.mkfifo(here / "pipe")

    found = find_images(str(here))
    names = {str(Path(path).relative_to(here)) for path in found.paths}
    assert names == {*used, "bmp", "tiff."} and len(found.paths) == len(names)
    reasons = {str(Path(path).relative_to(here)): why for path, why in found.skipped}
    hidden = {".ipynb_checkpoints", ".Trash-1000", ".b"}
    assert set(reasons) == {*hidden, "lost", "heic", "cut"} and len(reasons) == len(found.skipped)
    assert all("hidden folder" in reasons[name] for name in hidden)

    found = find_images(str(here / "**" / "*.png"))
    assert [Path(path).name for path in found.paths] == ["f.png", "e.png", "a.png"]
    assert {Path(path).name for path, _ in found.skipped} == hidden
    found = find_images(str(here / "*" / "*.png"))
    assert [Path(path).name for path in found.paths] == ["e.png", "a.png"]
    assert "hidden" in found.skipped[0][1]
    for named in (here / ".b", here / ".*" / "*", here / ".b" / "**"):
        assert str(here / ".b" / "c") in find_images(str(named)).paths, named


@pytest.mark.parametrize("where", ["", "**/*.png"])
def test_a_folder_that_may_not_be_read_is_listed(tmp_path, monkeypatch, where):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        noise_image(40, 40).save(tmp_path / name / "x.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_images(str(tmp_path / where))
    assert [Path(path).parent.name for path in found.paths] == ["a", "c"]
    ((path, why),) = found.skipped
    assert path == str(tmp_path / "b") and "Permission denied" in why


def test_what_is_no_path(tmp_path):
    """Addresses, images written out as text, and users that are not there: a short reason each."""
    text = "data:image/png;base64," + "iVBORw0KGgo/" * 9000
    names = [text, "https://x.org/a.png", "s3://bucket/a.png", "~nosuchuser/a.png", text[22:]]
    (tmp_path / "list.txt").write_text("\n".join(names))
    found = find_images(str(tmp_path / "list.txt"))
    assert found.paths == [] and len(found.skipped) == 5
    assert all(len(path) < 400 and len(why) < 100 for path, why in found.skipped)
    whys = [why for _, why in found.skipped]
    assert [why.split()[0] for why in whys[:3]] == ["data:", "https:", "s3:"]
    assert "too long" in whys[4]
    for where in ("~nosuchuser/images", "~nosuchuser/*.png"):
        with pytest.raises(ValueError, match="there is no folder, file or match of ~nosuchuser"):
            find_images(where)


# ---- Values ------------------------------------------------------------------------------------------------


def tiff(path, values, bits, kind, more=(), photometric=1):
    """A grey TIFF file of any byte order and type. kind: 1 unsigned, 2 signed, 3 float."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (277, 3, 1),
    ]
    tags += [(278, 3, height), (279, 4, values.nbytes), (339, 3, kind), *more]
    tags = sorted([*tags, (273, 4, 8 + 2 + 12 * (len(tags) + 1) + 4)])
    entry = {3: "HHIHxx", 4: "HHII"}
    table = b"".join(struct.pack(order + entry[t], tag, t, 1, value) for tag, t, value in tags)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    path.write_bytes(start + table + bytes(4) + values.tobytes())


def read(path):
    return np.asarray(load_image(str(path))).astype(float)


@pytest.mark.parametrize("order", "<>")
def test_the_type_says_what_white_is(tmp_path, order):
    """16 bits are divided by 257, whatever values are there; 32-bit ones go from the least to the largest."""
    for value in (0, 257, 10_000, 40_000, 65_535):
        tiff(tmp_path / "a.tif", np.full((30, 40), value, order + "u2"), 16, 1)
        assert abs(read(tmp_path / "a.tif") - value / 257).max() <= 0.51, value
    ramp = np.linspace(0, 1, 1200).reshape(30, 40)
    for low, high, dtype, bits, kind in [
        (-32768, 32767, "i2", 16, 2),
        (-900, -100, "i2", 16, 2),
        (-(2**31), 2**31 - 1, "i4", 32, 2),
        (0, 1000, "i4", 32, 2),
        (-5.0, 5.0, "f4", 32, 3),
        (0.0, 1e-6, "f4", 32, 3),
        (1e6, 1.001e6, "f4", 32, 3),
        (-3e38, 3e38, "f4", 32, 3),
        *([(0, 2**32 - 1, "u4", 32, 1)] if order == "<" else []),  # Pillow reads no big-endian ones
    ]:
        tiff(tmp_path / "a.tif", (low + ramp * (high - low)).astype(order + dtype), bits, kind)
        got = read(tmp_path / "a.tif")
        assert abs(got[..., 0] - ramp * 255).max() < 2.5, (low, high, dtype)


@pytest.mark.parametrize(
    "bits, dtype, kind", [(8, "u1", 1), (16, "<u2", 1), (32, "<f4", 3), (32, ">f4", 3)]
)
def test_tiff_files_where_0_is_white(tmp_path, bits, dtype, kind):
    ramp = np.linspace(0, 1, 1200).reshape(30, 40)
    most = {1: 2**bits - 1, 3: 1.0}[kind]
    got = {}
    for photometric in (0, 1):
        path = tmp_path / f"{photometric}.tif"
        tiff(path, (ramp * most).astype(dtype), bits, kind, photometric=photometric)
        got[photometric] = read(path)[..., 0]
    assert abs(got[0] - (1 - ramp) * 255).max() < 2 and abs(got[1] - ramp * 255).max() < 2
    held = load_image(str(tmp_path / "0.tif"), 300)
    assert held.size[0] < 40 and np.asarray(held)[0, 0, 0] > np.asarray(held)[-1, -1, 0]


def tga(path, depth, kind, pixel, flags, palette=b""):
    """A TGA file of 8 x 4 equal pixels. flags: the lower four bits count those of the alpha."""
    colours = (1, kind, 0, len(palette) // 4, 32) if palette else (0, kind, 0, 0, 0)
    header = struct.pack("<BBBHHBHHHHBB", 0, *colours, 0, 0, 8, 4, depth, 32 | flags)
    path.write_bytes(header + palette + pixel * 32)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_tga_files_say_if_they_have_alpha(tmp_path, alpha):
    """Without bits of alpha the fourth byte is spare; one that is 0 everywhere is so, too."""
    colour = bytes([40, 30, 200, alpha])
    red = lambda: read(tmp_path / "a.tga")[0, 0].tolist()  # noqa: E731
    shown = {0: [200, 30, 40], 128: [227, 142, 147], 255: [200, 30, 40]}
    for flags in (0, 8):
        want = shown[alpha if flags else 0]
        tga(tmp_path / "a.tga", 32, 2, colour, flags)
        assert red() == want
        tga(tmp_path / "a.tga", 8, 1, b"\0", flags, colour * 4)
        assert red() == want
        tga(tmp_path / "a.tga", 16, 3, bytes([90, alpha]), flags)
        assert red() == [90 if not flags or alpha != 128 else 172] * 3
    tga(tmp_path / "a.tga", 16, 2, struct.pack("<H", 25 << 10 | (alpha > 0) << 15), 0)
    assert red() == [205, 0, 0]


def test_other_files_of_16_bits_and_floats(tmp_path):
    ramp = np.linspace(0, 1, 1200).reshape(30, 40)
    (tmp_path / "a.pgm").write_bytes(b"P5 40 30 65535\n" + (ramp * 30_000).astype(">u2").tobytes())
    (tmp_path / "b.pgm").write_bytes(b"P5 40 30 4095\n" + (ramp * 4095).astype(">u2").tobytes())
    (tmp_path / "c.pfm").write_bytes(b"Pf\n40 30\n-1.0\n" + ramp[::-1].astype("<f4").tobytes())
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "d.png")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "e.jp2")
    for name, top in (
        ("a.pgm", 30_000 / 257),
        ("b.pgm", 255),
        ("c.pfm", 255),
        ("d.png", 255),
        ("e.jp2", 255),
    ):
        got = read(tmp_path / name)
        assert abs(got[..., 0] - ramp * top).max() < 2.5, name


def test_values_that_are_no_numbers_and_constant_images(tmp_path):
    ramp = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    for bad in (np.nan, np.inf, -np.inf):
        values = ramp.copy()
        values[:2, :3] = bad
        Image.fromarray(values).save(tmp_path / "a.tif")
        got = read(tmp_path / "a.tif")
        assert abs(got[5:, :, 0] - ramp[5:] * 255).max() < 10 and got[0, 0, 0] == (
            255 if bad == np.inf else 0
        )
    for value, want in (
        (0.0, 0),
        (0.5, 128),
        (1.0, 255),
        (200.0, 200),
        (40_000.0, 156),
        (1e9, 255),
        (-4.0, 0),
    ):
        Image.fromarray(np.full((30, 40), value, np.float32)).save(tmp_path / "a.tif")
        assert (read(tmp_path / "a.tif") == want).all(), value
    Image.fromarray(np.full((30, 40), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="finite"):
        load_image(str(tmp_path / "a.tif"))


# ---- Transparency and metadata -----------------------------------------------------------------------------


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path, depth, colours, rows, *more):
    """A PNG file written by hand; more: chunks before the pixels."""
    width = 8 * len(rows[0]) // (depth * {0: 1, 2: 3, 4: 2}[colours])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colours, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + data + chunk(b"IEND", b""))


def test_the_transparent_value_is_looked_up_before_scaling(tmp_path):
    """A PNG file names it in the file's own units: 1 of 1, 2, 4, 8 or 16 bits, one or three of them."""
    key = lambda *values: chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))  # noqa: E731
    cases = {1: b"\x80", 2: b"\x40", 4: b"\x10", 8: b"\x01", 16: b"\x00\x01"}
    for (
        depth,
        first,
    ) in cases.items():  # the first pixel is 1, the others 0; 1 is transparent, or 0 is
        rows = [(first + bytes(2 * depth)) for _ in range(10)]
        png(tmp_path / "a.png", depth, 0, rows, key(1))
        assert read(tmp_path / "a.png")[0, :, 0].tolist()[:2] == [255, 0], depth
        png(tmp_path / "a.png", depth, 0, rows, key(0))
        assert read(tmp_path / "a.png")[0, 1, 0] == 255 and (
            depth == 1 or read(tmp_path / "a.png")[0, 0, 0] < 90
        )
    for depth, wide in ((8, ">3B"), (16, ">3H")):
        clear = (300, 40_000, 5) if depth == 16 else (30, 200, 5)
        rows = [struct.pack(wide, *clear) + bytes(9 * depth // 8) for _ in range(4)]
        png(tmp_path / "a.png", depth, 2, rows, key(*clear))
        assert read(tmp_path / "a.png")[0, :2].tolist() == [[255] * 3, [0] * 3]
    rows = [struct.pack(">4H", 7, 0, 20_000, 65_535) for _ in range(2)]
    png(tmp_path / "a.png", 16, 4, rows)
    assert read(tmp_path / "a.png")[0, :, 0].tolist() == [255, 78]


def test_every_mode_that_can_be_transparent(tmp_path):
    for case in ("LA a.png", "LA a.tif", "RGBA a.png", "RGBA a.webp", "PA a.tif"):
        mode, name = case.split()
        image = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
        image.paste((0, 0, 0, 255), (0, 0, 4, 8))
        image.convert(mode).save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
        assert read(tmp_path / name)[0, :, 0].tolist() == [0] * 4 + [255] * 4, case
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert abs(read(tmp_path / "a.png") - 127).max() <= 1, "half transparent"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_broken_metadata_loses_no_image(tmp_path, kind):
    base, exif = noise_image(60, 40), Image.Exif()
    exif[0x010F] = "maker"
    more = {"lossless": True} if kind == "WEBP" else {"exif": exif} if kind == "TIFF" else {}
    base.save(tmp_path / "a", kind, **{"exif": exif.tobytes(), "icc_profile": b"x" * 3000} | more)
    want, data = read(tmp_path / "a"), (tmp_path / "a").read_bytes()
    marks = {"PNG": (b"eXIf", b"iCCP"), "WEBP": (b"maker", b"x" * 9), "JPEG": (b"Exif", b"ICC_")}
    for seed, mark in ((s, m) for s in range(40) for m in marks.get(kind, (b"x" * 9, b"maker"))):
        rng, broken = random.Random(seed), bytearray(data)
        at = data.index(mark) + 4
        for _ in range(5):
            broken[at + rng.randrange(min(30, len(data) - at))] = rng.randrange(256)
        (tmp_path / "b").write_bytes(broken)
        got = read(tmp_path / "b")  # an orientation may come out of it by chance
        assert got.size == want.size and abs(got.mean() - want.mean()) < 0.1


def test_texts_and_orientations_that_nobody_needs(tmp_path):
    rows = [bytes(8) for _ in range(8)]
    bomb = b"k\0\1\0\0\0" + zlib.compress(b"a" * 3 * 2**20)
    for before in (
        chunk(b"iTXt", bomb),
        chunk(b"zTXt", b"k\0\x07" + b"x"),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 3 * 2**20)),
        chunk(b"iCCP", b"x\0\x07y"),
        chunk(b"pHYs", b"1"),
        chunk(b"sRGB", b""),
        chunk(b"tEXt", b"k\0v")[:-1] + b"?",
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz\n"),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    ):
        png(tmp_path / "a.png", 8, 0, rows, before)
        assert find_images(str(tmp_path)).skipped == [] and load_image(
            str(tmp_path / "a.png")
        ).size == (8, 8)
        data = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").write_bytes(
            data.replace(before, b"")[:-12] + before + data[-12:]
        )  # behind them
        assert load_image(str(tmp_path / "a.png")).size == (8, 8)
    for turn in (0, 9, 77, 65535):
        tiff(
            tmp_path / "a.tif",
            np.zeros((30, 40), "<u2"),
            16,
            1,
            [(274, 3, turn), (34665, 4, 10**8)],
        )
        assert load_image(str(tmp_path / "a.tif")).size == (40, 30)
    for turn in range(1, 9):  # as Pillow sets them upright
        exif, base = Image.Exif(), noise_image(60, 40)
        exif[0x0112] = turn
        base.save(tmp_path / "a.webp", exif=exif, lossless=True)
        want = ImageOps.exif_transpose(Image.open(tmp_path / "a.webp"))
        assert load_image(str(tmp_path / "a.webp")).tobytes() == want.convert("RGB").tobytes(), turn

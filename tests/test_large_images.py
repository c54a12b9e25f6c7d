"""Photographs much larger than a model takes them are held scaled down, and give the same patches."""

import subprocess
import sys

import numpy as np
import pytest
from checkpoints import noise_image
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from training.images import Found, Pictures, load_image
from training.photographs import Photographs
from training.pixels import _scaled_down
from training.policy import Ranks


def photograph(width, height):
    """Something smooth, as photographs are."""
    y, x = np.mgrid[0:height, 0:width]
    values = [128 + 100 * np.sin(x / width * 5 + y / height * k) for k in (3, 5, 8)]
    return Image.fromarray(np.stack(values, axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_large_photograph_is_held_no_larger_than_a_model_takes_it(tmp_path, suffix):
    """It looks the same, and the model makes the same patches of it."""
    path, limit = str(tmp_path / f"a.{suffix}"), 28 * 28 * 60
    photograph(1600, 1100).save(path)
    whole, held = load_image(path), load_image(path, limit)
    assert whole.size == (1600, 1100) and limit < held.width * held.height <= 2.02 * limit
    height, width = smart_resize(1100, 1600, max_pixels=limit)
    assert (height, width) == smart_resize(held.height, held.width, max_pixels=limit)
    a, b = (
        np.asarray(i.resize((width, height), Image.Resampling.BICUBIC), float)
        for i in (whole, held)
    )
    assert abs(a - b).mean() < 1 and abs(a - b).max() < 12
    (picture,) = Pictures(Found([path], []), "0", photographs=Photographs(limit)).load_next(
        1, Ranks()
    )
    assert picture.image.tobytes() == held.tobytes()


@pytest.mark.parametrize("mode", ["P", "1", "RGBA", "I;16", "CMYK"])
def test_every_mode_and_orientation_is_scaled_down_as_it_looks(tmp_path, mode):
    base = photograph(800, 500)
    image = (
        Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else base
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    path = str(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    (image if mode == "I;16" else base.convert(mode)).save(path, exif=exif)
    whole, held = load_image(path), load_image(path, 10_000)
    assert whole.size == (500, 800) and held.size == (112, 178) and held.mode == "RGB"
    assert abs(np.asarray(whole.resize(held.size), float) - np.asarray(held)).mean() < 6


def test_images_that_are_small_enough_are_not_touched(tmp_path):
    for name in ("a.jpg", "b.png"):
        noise_image(300, 200).save(tmp_path / name)
        whole = load_image(str(tmp_path / name)).tobytes()
        for limit in (30_000, 60_000, 10**9):
            assert load_image(str(tmp_path / name), limit).tobytes() == whole
        assert load_image(str(tmp_path / name), 29_900).size != (300, 200)


@settings(deadline=None)
@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([784, 3136, 50_000, 802_816])
)
def test_scaling_down_keeps_what_the_image_processor_accepts(width, height, limit):
    """No longer shape, no less than an image token, hardly more pixels, and (almost) the same patches."""
    if max(width, height) <= 200 * min(width, height):
        w, h = _scaled_down((width, height), 2 * limit)
        assert w <= width and h <= height and max(w, h) <= 200 * min(w, h)
        assert min(w, h) >= min(28, width, height)
        assert w * h <= max(2 * limit, 28 * max(w, h)) + 2 * max(w, h)
        sides = [smart_resize(*size, 28, 784, limit) for size in ((height, width), (h, w))]
        assert all(abs(a - b) <= max(28, a / 50) for a, b in zip(*sides))


MEASURE = """
import sys
from training.images import load_image
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
print(*load_image(sys.argv[1], 802_816).size, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_photograph_of_16_bits_takes_little_memory(tmp_path):
    """So one of 81 million pixels takes some 0.3 GiB; 64-bit numbers of all at a time were 3.1 GiB."""
    rows = np.arange(5000, dtype=np.uint16)
    Image.fromarray(np.add.outer(3 * rows, 4 * rows)).save(tmp_path / "a.tif")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.tif")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    width, height, more = map(int, told.split())
    assert (width, height) == (1268, 1268) and more * 1024 < 6 * 5000**2, "bytes a pixel"

"""Finding and reading images: every mode, and files that are no images."""

import json

import numpy as np
import pytest
from checkpoints import noise_image
from PIL import Image

from engine.images import Found, ImageError, Pictures, find_images, load_image
from engine.shards import Ranks


def test_every_mode_becomes_rgb(tmp_path):
    base = noise_image(40, 30)
    for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr", "I;16", "I", "F"):
        suffix = {"CMYK": "jpg", "YCbCr": "jpg", "I": "tiff", "F": "tiff"}.get(mode, "png")
        image = (
            Image.fromarray(np.full((30, 40), 40_000, np.uint16)) if mode == "I;16" else base.convert(mode)
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
    assert find_images(str(good[0])).paths == [str(good[0])]
    (tmp_path / "list.txt").write_text(f"a.png\n\n{good[1]}\nmissing.png\n")
    found = find_images(str(tmp_path / "list.txt"))
    assert found.paths == [str(p) for p in good] and [p for p, _ in found.skipped] == [
        str(tmp_path / "missing.png")
    ]
    lines = ['"a.png"', json.dumps({"image": "a.png", "question": "?"}), json.dumps({"path": "sub/b.JPG"})]
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
    assert {p.path for p in Pictures(found, "0").take(6, Ranks())} == {str(tmp_path / "whole.png")}
    assert [path for path, _ in found.skipped] == [str(tmp_path / "cut.png")], (
        "once, however often it comes round"
    )
    with pytest.raises(ImageError, match="none of the images"):
        Pictures(Found([str(tmp_path / "cut.png")], []), "0").take(1, Ranks())


def test_pictures_go_round_in_an_order_that_the_seed_gives(tmp_path):
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.png"))
        noise_image(30, 30, i).save(paths[-1])
    draws = [[p.path for p in Pictures(Found(paths, []), seed).take(8, Ranks())] for seed in ("1", "1", "2")]
    assert draws[0] == draws[1] != draws[2]
    assert sorted(draws[0][:4]) == paths and sorted(draws[0][4:]) == paths and draws[0][:4] != draws[0][4:]
    later = Pictures(Found(paths, []), "1", position=3)
    assert [p.path for p in later.take(2, Ranks()) + later.take(3, Ranks())] == draws[0][3:], (
        "the position is all that has to be known"
    )

"""Files that call themselves images: each is used or skipped with a reason, and a run completes."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from checkpoints import noise_image
from conftest import ROOT
from PIL import Image

import evaluate
import loop
from training.distributed import join
from training.images import ImageError, find_images, load_image

USABLE = {
    "rgba.png",
    "la.png",
    "clear-palette.png",
    "cmyk.jpg",
    "one-bit.png",
    "sixteen-bit.png",
    "animated.gif",
    "animated.webp",
}
USABLE |= {
    "lying.jpg",
    "one-pixel.png",
    "long.JPEG",
    "good-1.png",
    "good-2.jpg",
    "good-3.webp",
    "b\udcffd.png",
    "two\nlines.png",
}
USABLE |= {"n" * 250 + ".png", "inside.png"}
SKIPPED = {
    "thin.png": "200 times",
    "bomb.png": "million",
    "large.png": "million",
    "text.png": "no known format",
    "empty.jpg": "no known",
}
SKIPPED |= {
    "nowhere.png": "No such file",
    "loop.png": "symbolic links",
    "pipe.png": "not a file",
    "dir.jpg": "not a file",
}
SKIPPED |= {f"bytes-{i}.png": "not a readable image" for i in range(4)}
CUT = ("png", "jpg", "gif", "webp", "bmp", "tiff")
SKIPPED |= {f"cut-{tenths}.{suffix}": "" for suffix in CUT for tenths in range(10)}


def hostile_folder(folder: Path) -> Path:
    """Three good images and everything that has ever stood in a folder of them."""
    base, frames = noise_image(70, 50), [noise_image(40, 40, i) for i in range(3)]
    (folder / "dir.jpg").mkdir(parents=True)
    for i, suffix in enumerate(("png", "jpg", "webp"), start=1):
        noise_image(60 + i, 60, i).save(folder / f"good-{i}.{suffix}")
    base.convert("RGBA").save(folder / "rgba.png")
    base.convert("LA").save(folder / "la.png")
    base.convert("P").save(folder / "clear-palette.png", transparency=0)
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("1").save(folder / "one-bit.png")
    Image.fromarray(np.arange(3500, dtype=np.uint16).reshape(50, 70) * 18).save(
        folder / "sixteen-bit.png"
    )
    for suffix in ("gif", "webp"):
        frames[0].save(folder / f"animated.{suffix}", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 8
    base.save(folder / "lying.jpg", exif=exif)
    noise_image(1, 1).save(folder / "one-pixel.png")
    noise_image(3, 500).save(folder / "long.JPEG")
    for name in ("two\nlines.png", "n" * 250 + ".png", "b\udcffd.png", "dir.jpg/inside.png"):
        base.save(folder / name)

    noise_image(1, 5000).save(folder / "thin.png")
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(folder / "large.png")
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "nowhere.png").symlink_to(folder / "gone")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "up").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    magic = [b"", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"GIF89a"]
    for i, start in enumerate(magic):
        (folder / f"bytes-{i}.png").write_bytes(start + random.Random(i).randbytes(3000))
    for suffix in CUT:
        base.save(folder / f"whole.{suffix}")
        data = (folder / f"whole.{suffix}").read_bytes()
        for tenths in range(10):
            (folder / f"cut-{tenths}.{suffix}").write_bytes(data[: len(data) * tenths // 10])
        (folder / f"whole.{suffix}").unlink()
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return hostile_folder(tmp_path_factory.mktemp("hostile") / "images")


def examine(paths):
    """Name -> None if the image can be used, else why not."""
    reasons = {}
    for path in paths:
        try:
            image = load_image(path)
            assert image.mode == "RGB"
            reasons[Path(path).name] = None
        except ImageError as error:
            reasons[Path(path).name] = str(error)
    return reasons


@pytest.mark.parametrize("pattern", ["", "**/*"])
def test_each_file_is_used_or_skipped_with_its_reason(hostile, pattern):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find_images(str(hostile / pattern))
        reasons = examine(found.paths) | {Path(path).name: why for path, why in found.skipped}
    if pattern:  # a glob takes what it matches, whatever it is called
        assert "not a file" in reasons.pop("up")
    assert {name for name, why in reasons.items() if why is None} == USABLE
    assert set(reasons) == USABLE | set(SKIPPED)
    for name, part in SKIPPED.items():
        assert (
            part in reasons[name]
            and "\n" not in reasons[name]
            and str(hostile) not in reasons[name]
        ), reasons[name]


def test_a_file_that_may_not_be_read(tmp_path_factory):
    path = tmp_path_factory.mktemp("locked") / "locked.png"
    noise_image(40, 40).save(path)
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything: become nobody for a moment
        for folder in path.parents:
            if folder.name.startswith(("locked", "popen-", "pytest-")):
                folder.chmod(0o755)
        os.seteuid(65534)
    try:
        found = find_images(str(path.parent))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
    assert found.paths == [] and "Permission denied" in found.skipped[0][1]


def test_a_run_on_the_hostile_folder_completes_and_lists_what_it_skipped(
    hostile, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    args = (
        "--iterations 1 --questioner-steps 2 --reasoner-steps 1 --images-per-step 40 --group-size 2"
    )
    args += " --answers 2 --candidates 8 --device cpu"
    assert (
        loop.main(
            [
                *args.split(),
                "--tau-low",
                "0",
                "--tau-high",
                "1",
                "--images",
                str(hostile),
                "--name",
                "x",
            ]
        )
        == 0
    )
    listed = (tmp_path / "runs" / "x" / "skipped.txt").read_text().splitlines()
    reasons = {Path(line.split("\t")[0]).name: line.split("\t")[1] for line in listed}
    assert set(reasons) == set(SKIPPED) and len(listed) == len(SKIPPED)
    assert all(part in reasons[name] for name, part in SKIPPED.items())
    err = capsys.readouterr().err
    assert (
        all(f"/{name}: " in err for name in SKIPPED)
        and "Traceback" not in err
        and "Warning" not in err
    )


# ---- Places that are not as they should be ----

NOBODY = """
import os, pwd
def nobody(number):
    raise KeyError(number)
pwd.getpwuid = nobody
os.environ.pop("HOME", None)
assert os.path.expanduser("~/x") == "~/x"
import rewards
print(rewards.bleu_similarity("How many red rings are there?", "How many red discs are there?"))
"""


@pytest.mark.skipif(os.name != "posix", reason="asks for a user's entry")
def test_without_a_home_and_a_user(monkeypatch):
    """As in many containers: nltk looks for a folder for its data when it is imported."""
    monkeypatch.delenv("NLTK_DATA", raising=False)
    done = subprocess.run([sys.executable, "-c", NOBODY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 0.2 < float(done.stdout) < 0.3, done.stderr


@pytest.mark.parametrize(
    "runs", ["link to nothing", "file", "link to a file", "x is a link to nothing"]
)
def test_a_folder_of_runs_that_is_none(tmp_path, monkeypatch, capsys, runs):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs"
    if runs.startswith("x"):
        place.mkdir()
        place /= "x"
    if "link" in runs:
        place.symlink_to(tmp_path / "gone")
    if "file" in runs:
        place.resolve().write_text("no folder")
    assert loop.main(["--name", "x", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "runs/x cannot be made: " in told and told.count("\n") == 1
    assert ("but a link to " in told) == ("link" in runs)


def test_the_number_of_processes(monkeypatch):
    for said in (None, "", "1", "0"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if said is not None:
            monkeypatch.setenv("WORLD_SIZE", said)
        assert join().size == 1
    for said in ("two", "-1", "1.5", " "):
        monkeypatch.setenv("WORLD_SIZE", said)
        with pytest.raises(ValueError, match="WORLD_SIZE"):
            join()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a named pipe")
def test_a_pipe_is_not_opened_twice(tmp_path, monkeypatch):
    """--json >(gzip > x): its reader ends with the first writer."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "open", None)
    evaluate.prove_writable(tmp_path / "pipe")

"""Photographs in threads: the same patches in the same order, made once, ahead and bounded."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from checkpoints import noise_image, publish
from PIL import Image

from model.vlm import VLM
from training import dry_run
from training import photographs as module
from training.distributed import Ranks
from training.dry_run import free_in_containers
from training.images import Found, ImageError, Pictures, load_image
from training.photographs import Photographs
from training.settings import Settings


@pytest.fixture
def paths(tmp_path):
    for i in range(9):
        Image.new("RGB", (40 + i, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:60])
    return [str(tmp_path / f"{i}.png") for i in range(9)]


def test_images_come_in_order_each_decoded_once(paths, monkeypatch):
    reads, load_image, gate = [], module.load_image, threading.Event()

    def load(path, *args):
        reads.append(path)
        gate.wait(5)
        return load_image(path, *args)

    monkeypatch.setattr(module, "load_image", load)
    photographs = Photographs()
    photographs.expect(paths[:3])
    began = time.monotonic()
    photographs.expect(paths[2:5])  # what was expected before is forgotten, nothing is waited for
    assert time.monotonic() - began < 4
    gate.set()
    three, error, again, eight = photographs.load([paths[3], paths[4], paths[3], paths[8]])
    assert three.size == again.size == (43, 40) and eight.size == (48, 40) and three is not again
    assert isinstance(error, ImageError) and "end" in str(error)
    assert reads.count(paths[3]) == 1 and [*photographs.expected] == [paths[2]]


def test_what_is_expected_changes_nothing(paths, monkeypatch):
    """The same pictures, skips and positions as one after the other, from any position."""

    def taken(ahead):
        found = Found([*paths], [])
        pictures = Pictures(found, "7", 3)
        if not ahead:
            monkeypatch.setattr(pictures.photographs, "expect", lambda paths: None)
        steps = [[(p.path, p.image.size) for p in pictures.load_next(4, Ranks())] for _ in range(6)]
        return steps, pictures.position, found.skipped, len(pictures.photographs.expected)

    *ahead, kept = taken(True)
    *plain, none = taken(False)
    assert ahead == plain and len(ahead[2]) == 1 and all(len(step) == 4 for step in ahead[0])
    assert none == 0 and kept <= 4, "no more than a step's are kept"


@pytest.mark.parametrize("style", ["qwen", "qwen3"])
def test_patches_are_made_ahead_in_threads_and_are_the_same(style, tmp_path, paths):
    """The main thread makes none; each picture has an object of its own, also of a path that comes twice."""
    vlm = VLM.load(publish(tmp_path, style), "cpu", torch.float32)
    for i, path in enumerate(paths):
        noise_image(30 + 40 * i, 200, seed=i).save(path)
    makers = set()

    def patches(image):
        makers.add(threading.current_thread())
        return vlm.patches(image)

    photographs = Photographs(vlm.image_size["longest_edge"], vlm.token_side)
    photographs.patches = patches
    pictures = Pictures(Found([*paths], []), "7", photographs=photographs)
    taken = [picture for _ in range(3) for picture in pictures.load_next(11, Ranks())]
    assert threading.main_thread() not in makers and len({picture.path for picture in taken}) == 9
    assert len({id(picture.image) for picture in taken}) == len(taken) == 33
    for picture in taken:
        image = load_image(picture.path, vlm.image_size["longest_edge"], vlm.token_side)
        alone = vlm.patches(image)
        assert torch.equal(picture.image.pixels, alone.pixels)
        assert torch.equal(picture.image.grid, alone.grid)


@pytest.mark.parametrize("side, merge, ranks", [(14, 2, 1), (16, 2, 3)])
def test_the_plan_counts_the_patches_of_two_steps(side, merge, ranks):
    vision = SimpleNamespace(
        in_channels=3, temporal_patch_size=2, patch_size=side, spatial_merge_size=merge
    )
    config = SimpleNamespace(vision_config=vision)
    run = SimpleNamespace(
        settings=Settings(images="x", images_per_step=10, max_pixels=5 * 10 * 10),
        ranks=SimpleNamespace(size=ranks),
        checkpoint=SimpleNamespace(config=config, token_side=10),
    )
    pixels = torch.zeros(5 * merge**2, 3 * 2 * side * side)
    assert dry_run.photograph_bytes(run) == 2 * -(-10 // ranks) * pixels.nbytes


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MB = 1 << 20
LIMITED = (("limit", "7"), ("usage", "3"))


@pytest.mark.parametrize(
    "own, files, free",
    [
        ("0::/a/b\n", {"a/b/memory.max": f"{9 * MB}", "a/b/memory.current": f"{2 * MB}"}, [7 * MB]),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "100", "memory.max": "90"}, [100, 90]),
        ("0::/\n", {"memory.max": f"{2 * MB}\n", "memory.current": f"{3 * MB}\n"}, [0]),
        ("0::/gone\n", {"memory.max": "50"}, [50]),
        ("1:cpu:/x\n5:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "70"}, [70]),
        ("3:a,memory:/\n", {f"memory/memory.{k}_in_bytes": v for k, v in LIMITED}, [4]),
        ("0::/a:b\n", {"a:b/memory.max": "8"}, [8]),
        ("0::/\n", {}, []),
        ("", {"memory.max": "8"}, []),
    ],
)  # fmt: skip
def test_a_containers_limits_are_seen(tmp_path, own, files, free):
    write(tmp_path / "cgroup", files)
    write(tmp_path, {"own": own})
    assert free_in_containers(tmp_path / "cgroup", tmp_path / "own") == free


def test_the_smallest_counts(monkeypatch):
    from training import dry_run

    monkeypatch.setattr(dry_run, "free_in_containers", lambda: [5 * MB, 3 * MB])
    assert dry_run.available_memory() == 3 * MB
    monkeypatch.setattr(dry_run, "free_in_containers", lambda: [1 << 60])
    there = dry_run.available_memory()
    assert there is not None and there < 1 << 60


def test_a_dry_run_estimates_the_time_for_a_gpu(tmp_path, monkeypatch, capsys):
    import loop
    from training import dry_run, estimate
    from training.settings import GPUS

    assert {*GPUS} == estimate.CARDS.keys()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "rehearse", None)
    monkeypatch.setattr("training.command.rehearse", lambda *a: (_ for _ in ()).throw(OSError("-")))
    assert loop.main(["--dry-run", "--for", "h100", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "an estimate for one H100, not measured: a Questioner step takes about" in said
    assert loop.main(["--dry-run", "--device", "cpu"]) == 0
    assert "estimate" not in capsys.readouterr().out
    assert loop.main(["--dry-run", "--for", "h1000"]) == 2
    assert "argument --for: invalid choice: 'h1000'" in capsys.readouterr().err

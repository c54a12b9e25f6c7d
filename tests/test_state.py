"""The state on disk: whole or passed over, whatever moment a write is cut off at and whatever happens to a
file later."""

import errno
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from training import state as state_module
from training.folder import replace_folder, replace_text
from training.state import State, entry, lock, read_tensors, recover, write_state, write_tensors


class Killed(BaseException):
    pass


def save(folder, number):
    """A state like a run's: two files of its own, one that it shares with the state before."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    files = {
        "reasoner": write_tensors(
            folder, f"{number:06}-reasoner-0", {"w": torch.full((50,), float(number))}
        )
    }
    files["moments"] = write_tensors(
        folder, f"{number:06}-moments-0", {"w:step": torch.tensor(float(number))}
    )
    if not (folder / "curated.jsonl").exists():
        (folder / "curated.jsonl").write_text("{}\n")
    files["curated"] = [entry(folder, folder / "curated.jsonl")]
    write_state(
        folder,
        number,
        State(
            iteration=1,
            phase="reasoner",
            step=number,
            skipped=[("a\udcff.png", "why")],
            files=files,
        ),
    )


def check(folder, *numbers):
    number, state, complaints = recover(folder)
    assert number in numbers and state.step == number
    assert dict(read_tensors(folder, state.files["reasoner"]))["w"].tolist() == [float(number)] * 50
    return complaints


def test_a_state_comes_back_and_old_ones_go(tmp_path):
    assert recover(tmp_path) == (0, State(), [])
    for number in (1, 2, 3):
        save(tmp_path, number)
    assert check(tmp_path, 3) == []
    assert recover(tmp_path)[1].skipped == [["a\udcff.png", "why"]]
    assert len(list((tmp_path / "state").iterdir())) == 2 * 3, (
        "two states, each with two files of its own"
    )
    (tmp_path / "state" / "000003.json").unlink()
    check(tmp_path, 2)


@pytest.mark.parametrize("call", range(1, 40))
def test_a_kill_at_any_step_of_a_write(tmp_path, monkeypatch, call):
    """The nth thing done to the disk does not happen any more, nor does any after it."""
    save(tmp_path, 1), save(tmp_path, 2)
    calls = []

    def counted(function):
        def step(*args, **named):
            calls.append(1)
            if len(calls) >= call:
                raise Killed
            return function(*args, **named)

        return step

    with monkeypatch.context() as patch:
        for module, name in (
            (os, "replace"),
            (os, "fsync"),
            (state_module.Path, "unlink"),
            (state_module, "save_file"),
        ):
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            save(tmp_path, 3)
        except Killed:
            pass
    check(tmp_path, 2, 3)
    save(tmp_path, 4)
    check(tmp_path, 4)
    assert len(list((tmp_path / "state").glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "nonsense"])
def test_a_damaged_state_is_passed_over(tmp_path, damage):
    for victim in (
        "000002.json",
        "000002-reasoner-0-0.safetensors",
        "000002-moments-0-0.safetensors",
    ):
        folder = tmp_path / victim
        save(folder, 1), save(folder, 2)
        path = folder / "state" / victim
        data = bytearray(path.read_bytes())
        for position in range(0, len(data), max(1, len(data) // 10)) if damage == "flip" else (0,):
            changed = data.copy()
            changed[position] ^= 1 << position % 8
            contents = {"cut": data[: len(data) // 2], "flip": changed, "nonsense": b"[1, 2]"}
            path.unlink() if damage == "gone" else path.write_bytes(contents[damage])
            number, state, complaints = recover(folder)
            if victim.endswith(".json") and damage == "gone":
                assert (number, complaints) == (1, [])
            elif damage == "flip" and number == 2:
                assert (
                    victim.endswith(".json")
                    and json.loads(path.read_text())["state"] == json.loads(data)["state"]
                ), "only layout"
            else:
                assert number == 1 and state.step == 1 and len(complaints) == 1
            save(folder, 2)


def test_without_any_whole_state_nothing_is_deleted(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "curated.jsonl").write_text("changed")
    with pytest.raises(ValueError, match="no state of .* is whole: .*curated.jsonl is damaged"):
        recover(tmp_path)
    assert (tmp_path / "state" / "000001.json").exists()


def test_a_file_of_a_state_has_about_a_gib(tmp_path, monkeypatch):
    """safetensors copies all of a file from the GPU at once; one tensor that is larger has its own."""
    monkeypatch.setattr(state_module, "PART_BYTES", 100)
    (tmp_path / "state").mkdir()
    lengths = {"a": 10, "b": 15, "c": 1, "large": 90, "d": 20, "e": 5}
    tensors = {name: torch.arange(float(n)) for name, n in lengths.items()}
    parts = write_tensors(tmp_path, "000001-reasoner-0", tensors)
    held = [[name for name, _ in read_tensors(tmp_path, [part])] for part in parts]
    assert held == [["a", "b"], ["c"], ["large"], ["d", "e"]]
    read = dict(read_tensors(tmp_path, parts))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert len(write_tensors(tmp_path, "000001-empty-0", {})) == 1, "a rank may own nothing"


# ---- Where files live ----


def failing(error, only=lambda *arguments: True):
    """A function that raises an OSError with this number where `only` says so, else does its work."""

    def wrap(function):
        def call(*arguments, **named):
            if only(*arguments):
                raise OSError(error, os.strerror(error))
            return function(*arguments, **named)

        return call

    return wrap


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what a descriptor is")
@pytest.mark.parametrize("error", ["EINVAL", "ENOTSUP", "ENOSYS", "EIO", "EBADF"])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, error):
    number = getattr(errno, error)
    monkeypatch.setattr(os, "fsync", failing(number, is_folder)(os.fsync))
    replace_text(tmp_path / "a", "old")
    save(tmp_path, 1)
    assert (tmp_path / "a").read_text() == "old" and recover(tmp_path)[0] == 1
    monkeypatch.setattr(os, "fsync", failing(errno.EIO)(os.fsync))
    with pytest.raises(OSError):  # of a file it is the disk
        replace_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "ENOTSUP"])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, error):
    fcntl = pytest.importorskip("fcntl")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing(getattr(errno, error))(fcntl.flock))
        assert lock(tmp_path) is None
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and told.count("\n") == 1
    held = lock(tmp_path)
    with pytest.raises(ValueError, match="another process"):
        lock(tmp_path)
    held.release()
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO)(fcntl.flock))
    with pytest.raises(OSError):
        lock(tmp_path)


def write_files(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("error", [None, "EXDEV", "EBUSY", "EPERM", "ENOTSUP"])
def test_a_folder_that_cannot_be_renamed(tmp_path, monkeypatch, error):
    """As one on an overlay that came with a container's image: its files are replaced, one by one."""
    path, replace = tmp_path / "reasoner", os.replace
    replace_folder(path, lambda new: write_files(new, weights="1", config="1", index="1"))
    seen = []

    def reading(source, target):
        """What a reader finds after each step."""
        is_old = os.path.isdir(source) and os.fspath(source) == str(path)
        if error and is_old:
            raise OSError(getattr(errno, error), "no")
        replace(source, target)
        if path.exists():
            seen.append({file.name: file.read_text() for file in path.iterdir()})

    monkeypatch.setattr(os, "replace", reading)
    replace_folder(path, lambda new: write_files(new, weights="2", config="2", more="2"))
    assert {file.name: file.read_text() for file in path.iterdir()} == dict(
        weights="2", config="2", more="2"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["reasoner"]
    assert all({"weights", "config"} <= files.keys() for files in seen)
    assert len(seen) == (3 if error else 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts an overlay")
def test_an_overlay(tmp_path):
    """The lower folder is the container's image, with a run in it."""
    lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
    for folder in (lower / "x", upper, work, merged):
        folder.mkdir(parents=True)
    write_files(lower / "x" / "reasoner", weights="1")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    if subprocess.run(["mount", "-t", "overlay", "o", "-o", options, merged]).returncode:
        pytest.skip("no overlay can be mounted here")
    try:
        with pytest.raises(OSError):
            os.replace(merged / "x" / "reasoner", merged / "x" / "y")
        for text in "23":
            replace_folder(merged / "x" / "reasoner", partial(write_files, weights=text))
            assert (merged / "x" / "reasoner" / "weights").read_text() == text
        save(merged / "x", 1)
        assert recover(merged / "x")[0] == 1 and len(list((merged / "x").glob("*.new"))) == 0
    finally:
        subprocess.run(["umount", merged], check=True)

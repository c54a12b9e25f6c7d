"""The command that writes benchmarks and the paper's images, on records of a `datasets` that is not there."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT
from test_benchmarks_data import IMAGE, MMMU, OFFICIAL, OTHER, RECORDS, file_of

import benchmarks
import evaluate
from training.images import find_images


def datasets_with(**splits):
    """A module like `datasets`, whose every repository holds these records."""
    module, asked = types.ModuleType("datasets"), []

    class Records(list):
        def decode(self, enable):
            assert enable is False
            return self

    def load_dataset(source, config, split, streaming):
        asked.append((source, config, split))
        made = {name: Records(records) for name, records in splits.items()}
        return made if split is None else made[split]

    module.load_dataset, module.asked = load_dataset, asked
    return module


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    second = RECORDS["mmmu"] | dict(image_1=OTHER, answer="Ann")
    several, hidden = MMMU | dict(image_2=OTHER), MMMU | dict(answer="?")
    broken = MMMU | dict(image_1={"bytes": b"not an image", "path": None})
    module = datasets_with(validation=[MMMU, several, second, hidden, several, MMMU, broken])
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert benchmarks.main(["mmmu", str(tmp_path / "out")]) == 0
    assert module.asked == [("lmms-lab-encoder/MMMU", None, "validation")]
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("questions.jsonl: 5") and said[1] == "records left out: 2 of 7"
    assert [line.split(maxsplit=1) for line in said[2:]] == [
        ["1", "its answer is not published"], ["1", "its image is of no known kind"],
    ]  # fmt: skip
    items, skipped = evaluate.read_items(tmp_path / "out" / "questions.jsonl")
    assert len(items) == 5 and not skipped and items[0].images == items[4].images
    assert len([*(tmp_path / "out" / "images").iterdir()]) == 2, "each image is written once"
    assert items[2].image.endswith(".jpg") and evaluate.right("A", items[2])
    assert items[1].images == (items[0].image, items[2].image) == items[3].images
    fields = [
        json.loads(text) for text in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()
    ]
    assert [isinstance(f.get("images"), list) for f in fields] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert all(("image" in f) != ("images" in f) for f in fields)


def test_of_a_record_that_is_left_out_no_image_is_written(tmp_path, monkeypatch, capsys):
    broken = MMMU | dict(image_2=OTHER, image_3={"bytes": b"not an image", "path": None})
    monkeypatch.setitem(sys.modules, "datasets", datasets_with(validation=[broken, MMMU]))
    assert benchmarks.main(["mmmu", str(tmp_path / "out")]) == 0
    assert "1  its image is of no known kind" in capsys.readouterr().out
    (path,) = (tmp_path / "out" / "images").iterdir()
    assert path.read_bytes() == IMAGE["bytes"]


def test_a_limit_boxes_and_other_sources(tmp_path, monkeypatch, capsys):
    module = datasets_with(test=[OFFICIAL] * 3)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert benchmarks.main(["zli12321/mmstar", str(tmp_path / "a"), "--limit", "2"]) == 0
    assert len((tmp_path / "a" / "questions.jsonl").read_text().splitlines()) == 2
    args = ["mmstar", str(tmp_path / "b"), "--source", "me/mirror", "--split", "test", "--boxed"]
    assert benchmarks.main(args) == 2 and "me/mirror has no record" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert module.asked == [("zli12321/mmstar", None, None), ("me/mirror", None, "test")]
    monkeypatch.setitem(sys.modules, "datasets", datasets_with(train=[], test=[]))
    assert benchmarks.main(["a/b", str(tmp_path / "c")]) == 2
    assert "choose one with --split" in capsys.readouterr().err


def test_the_images_of_the_paper(tmp_path, monkeypatch, capsys):
    """Records of Vision-SR1-47K have the columns problem, answer and images; every image is written."""
    rows = [
        OFFICIAL,
        OFFICIAL | dict(images=[IMAGE, OTHER]),
        OFFICIAL | dict(images=file_of("green")),
    ]
    rows += [OFFICIAL | dict(images=None), OFFICIAL | dict(images=["x.png"])]
    monkeypatch.setitem(sys.modules, "datasets", datasets_with(train=rows))
    assert benchmarks.main(["vision-sr1-47k", str(tmp_path)]) == 0
    assert (
        len(find_images(str(tmp_path / "images")).paths) == 3
        and "1  no image" in capsys.readouterr().out
    )
    assert not (tmp_path / "questions.jsonl").exists()


def test_the_images_of_a_parquet_file(tmp_path):
    """With the real package, where it is installed: images as structs in a list, and as bare bytes."""
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, images in (("structs", [IMAGE]), ("bytes", file_of("green"))):
        source, out = tmp_path / name, tmp_path / f"{name}-out"
        source.mkdir()
        rows = [OFFICIAL | dict(images=images), OFFICIAL | dict(images=images)]
        parquet.write_table(arrow.Table.from_pylist(rows), source / "train-00000-of-00001.parquet")
        assert benchmarks.main(["vision-sr1-47k", str(out), "--source", str(source)]) == 0
        (path,) = find_images(str(out / "images")).paths
        assert Path(path).read_bytes() == (images if name == "bytes" else IMAGE["bytes"])
        assert benchmarks.main(["some/set", str(out), "--source", str(source)]) == 0
        assert len(evaluate.read_items(out / "questions.jsonl")[0]) == 2


def test_a_failure_of_the_hub_is_a_sentence(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no\x1b route\nto the hub")

    def broken_off():
        yield RECORDS["mmstar"]
        raise ConnectionError("gone")

    module = datasets_with()
    monkeypatch.setitem(sys.modules, "datasets", module)
    stream = types.SimpleNamespace(decode=lambda enable: broken_off())
    for load, said in ((fail, "no route"), (lambda *a, **k: stream, "gone")):
        module.load_dataset = load
        assert benchmarks.main(["mmstar", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"error: Lin-Chen/MMStar cannot be read: {said}\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["images"]


def test_wrong_arguments_get_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.jsonl").write_text("")
    for args in (["mmmmu", "x"], ["mmmu"], ["mmmu", "x", "--limit", "0"], ["mmmu", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            benchmarks.main(args)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert benchmarks.main(["mmmu", str(tmp_path / "out")]) == 2
    assert "pip install datasets" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_imports_nothing_heavy():
    code = "import sys, benchmarks; print([*{'torch', 'datasets', 'transformers', 'PIL'} & {*sys.modules}])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []

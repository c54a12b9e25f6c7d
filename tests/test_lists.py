"""Lists of images as editors write them, and a sentence with the line's number for what is none."""

import json
import os

import pytest
from checkpoints import noise_image

from training.images import find_images


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_lists_as_editors_write_them(tmp_path, suffix):
    names = [
        "a.png",
        "two words.png",
        "x\u2028y.png",
        "x\u0085y.png",
        "x\x0cy.png",
        "é.png",
        "图.png",
    ]
    for name in names:
        noise_image(30, 30).save(tmp_path / name)
    lines = [json.dumps(name) if suffix == "jsonl" else name for name in names]
    written = [
        json.dumps({"image": n}, ensure_ascii=False) if suffix == "jsonl" else n for n in names
    ]
    for text in (
        "\n".join(lines),
        "\r\n".join(lines) + "\r\n",
        "\n\n \n" + "\n\r\n".join(lines),
        "\n".join(written),
    ):
        for start in (b"", b"\xef\xbb\xbf"):
            (tmp_path / f"list.{suffix}").write_bytes(start + text.encode())
            assert find_images(str(tmp_path / f"list.{suffix}")).paths == [
                str(tmp_path / n) for n in names
            ]


@pytest.mark.parametrize(
    "line",
    [
        '{"x": 1}',
        "[1",
        "3",
        "null",
        "[]",
        '["a.png"]',
        '{"image": ["a.png"]}',
        '{"image": {"bytes": ""}}',
        '""',
    ]
    + [
        '{"images": []}',
        '{"images": "a.png"}',
        '{"images": ["a.png", 3]}',
        '{"images": ["a.png", " "]}',
    ]
    + [
        '{"image": null}',
        '{"image": 5}',
        "a.png",
        '{"path": ""}',
        "true",
        "NaN",
        "[" * 100_000,
        '"a',
    ],
)
def test_a_line_that_is_no_path_is_named(tmp_path, line):
    (tmp_path / "list.jsonl").write_text(f'"a.png"\n\n{line}\n"b.png"\n')
    with pytest.raises(ValueError, match="is not a list of image paths: line 3 ") as error:
        find_images(str(tmp_path / "list.jsonl"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_line_of_a_question_about_several_images_lists_them_all(tmp_path):
    for name in "abc":
        noise_image(30, 30).save(tmp_path / name, "PNG")
    lines = [dict(images=["a", "b"], question="?"), dict(image="c"), dict(images=["a"], path="b")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = find_images(str(tmp_path / "questions.jsonl"))
    assert found.paths == [str(tmp_path / name) for name in "abcb"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_list_that_is_not_utf_8_gets_a_sentence(tmp_path, encoding):
    for name in ("list.txt", "list.jsonl"):
        (tmp_path / name).write_bytes('"é.png"\n"b.png"\n'.encode(encoding))
        with pytest.raises(ValueError, match="UTF-8") as error:
            find_images(str(tmp_path / name))
        assert ("line 1 " in str(error.value)) == (encoding == "latin-1")


def test_a_lists_neighbours_come_first_and_paths_are_absolute(tmp_path, monkeypatch):
    for place in ("lists", "here"):
        (tmp_path / place).mkdir()
        noise_image(30, 30).save(tmp_path / place / "a.png")
    noise_image(30, 30).save(tmp_path / "here" / "b.png")
    monkeypatch.chdir(tmp_path / "here")
    names = ["a.png", "b.png", "c.png", "n" * 400 + ".png", "x\0y.png"]
    (tmp_path / "lists" / "list.jsonl").write_text("\n".join(map(json.dumps, names)))
    found = find_images("../lists/list.jsonl")
    assert [os.path.realpath(path) for path in found.paths] == [
        str(tmp_path / "lists" / "a.png"),
        str(tmp_path / "here" / "b.png"),
    ]
    assert all(os.path.isabs(path) for path in found.paths) and len(found.skipped) == 3

"""The report of runs whose files hold odd things: each is shown or left out, and hides nothing else."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from test_report import QUESTIONS, change, check_page, curves, make_run, write_records, written

import report
from curate import VotedQuestion


def lines_of(path, *more):
    """Adds lines to a file as they are."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(
            "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in more)
        )


@pytest.mark.parametrize("confidence", [None, float("nan"), float("inf"), "0.5", [], -3, 7e300])
def test_a_question_with_a_confidence_that_is_none_is_left_out(tmp_path, confidence):
    """The others are in the histogram."""
    folder = make_run(tmp_path / "run", iterations=1)
    for kind in ("candidates", "curated"):
        path = folder / kind / "iteration-1.jsonl"
        change(
            path, lambda e: replace(e, confidence=confidence) if e.question == QUESTIONS[0] else e
        )
    text = written(folder)
    check_page(text)
    assert "different questions: 6, kept: 3" in curves(text, "Difficulty, iteration 1")[1]
    assert "confidence 0.50 · kept" in text and "confidence unknown" not in text
    for kind in ("candidates", "curated"):
        change(folder / kind / "iteration-1.jsonl", lambda e: replace(e, confidence=confidence))
    text = written(folder)
    check_page(text)
    assert "Difficulty, iteration 1" not in text and "questions have been curated" in text


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("kind", ["curated", "both", "broken"])
def test_a_missing_iteration_hides_no_other(tmp_path, missing, kind):
    folder = make_run(tmp_path / "run", iterations=3)
    (folder / "curated" / f"iteration-{missing}.jsonl").unlink()
    if kind == "both":
        (folder / "candidates" / f"iteration-{missing}.jsonl").unlink()
    elif kind == "broken":
        (folder / "curated" / f"iteration-{missing}.jsonl").write_text('{"image')
    text = written(folder)
    check_page(text)
    shown = {int(k) for k in re.findall(r"<h3>Iteration (\d)</h3>", text)}
    assert shown == {1, 2, 3} - {missing}
    assert text.count("<figcaption>Difficulty, iteration") == 2


def test_records_that_are_none_hide_no_others(tmp_path):
    """A line cut off in the middle of the file, others of every kind, numbers that are not finite."""
    folder = make_run(tmp_path / "run")
    records = report.read_records(folder)
    before = written(folder)
    odd = [
        '{"iteration": 1, "phase": "quest',
        "3",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        '"x"',
        "\x1b\x00",
    ]
    odd += [{"iteration": None, "phase": "measure"}, {"phase": "warning"}, {"iteration": "2"}]
    with open(folder / "metrics.jsonl", "w") as file:
        file.write(
            "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in odd)
        )
    lines_of(folder / "metrics.jsonl", *records)
    assert written(folder) == before
    strange = [dict(r, kl=float("nan"), reward=float("inf"), seconds="many") for r in records]
    write_records(folder, [*strange, dict(iteration=1, phase="warning")])
    text = written(folder)
    check_page(text)
    assert ">nan<" not in text and 'points="nan' not in text and "Valid outputs" in text


ODD = dict(image="x.png", question="?", kind="numerical", label="1", confidence=0.5, answers=["1"])


@pytest.mark.parametrize(
    "fields",
    [
        dict(image=None), dict(image=[1]), dict(question=None), dict(question=3), dict(label=5),
        dict(answers=None), dict(answers="1"), dict(answers=[1]), dict(answers={}), dict(answers=[]),
        dict(answers=[["1"]]),
    ],
)  # fmt: skip
def test_questions_of_the_wrong_types_are_left_out(tmp_path, fields):
    folder = make_run(tmp_path / "run", iterations=1)
    before = written(folder)
    lines_of(folder / "candidates" / "iteration-1.jsonl", ODD | fields)
    assert written(folder) == before


@pytest.mark.parametrize("image", ["", "/", "\\", "a/../..", "\ud800.png", "\x1b[2J.png", "\0"])
def test_odd_names_of_images(tmp_path, image):
    folder = make_run(tmp_path / "run", iterations=1)
    lines_of(folder / "candidates" / "iteration-1.jsonl", ODD | dict(image=image))
    text = written(folder)
    check_page(text)
    assert text.isascii() or all(c in "\n\t" or ord(c) > 31 for c in text)
    assert "can no longer be read" in text


def test_control_characters_and_halves_of_characters_are_spelled_out(tmp_path, capsys):
    evil = "\x1b[2J\ud83d\x00\x9b"
    folder = make_run(tmp_path / "run\x1b[2J", iterations=1)
    for kind in ("candidates", "curated"):
        changes = dict(question=evil, label=evil, answers=[evil, "図\u3000👩\u200d🚀", None])
        lines_of(folder / kind / "iteration-1.jsonl", ODD | changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(model=evil)))
    lines_of(
        folder / "metrics.jsonl", dict(iteration=1, phase="warning", signature=evil, message=evil)
    )
    (folder / "skipped.txt").write_text(f"{evil[:4]}\t{evil[:4]}\n")
    text = written(folder)
    check_page(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert text.count(r"\x1b[2J\ud83d\x00\x9b") >= 5 and "図\u3000👩\u200d🚀" in text, (
        "nothing else is"
    )
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"run\x1b[2J" in printed
    shutil.rmtree(folder)
    assert report.main([str(folder)]) == 2 and "\x1b" not in capsys.readouterr().err


def test_an_answer_that_reads_no_answer_is_told_from_none():
    answers = ["no answer", None, "no answer", "No answer.", None]
    assert report.count_votes(answers) == [("no answer", 3), (None, 2)]
    card = report.question_card(
        VotedQuestion("x", "?", "numerical", "no answer", 0.6, answers), True, None
    )
    assert card.count('class="vote"') == 2 and card.count("<i>no answer</i>") == 1
    assert card.count("bar label") == 1 and "silver label no answer" in card

"""Evaluation: what was found wrong by a review, each kind with its neighbours."""

import ast
import errno
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from checkpoints import edit, noise_image
from conftest import ROOT
from safetensors.torch import load_file, save_file

import benchmarks
import evaluate
from evaluate import Item, table
from measure import outcomes as outcomes_module
from measure.outcomes import Outcome
from measure.scores import bootstrap, compare, full_report, judge_scores


def outcomes_of(values, images):
    """Right or wrong once greedily and once at random, each about an image."""
    answers = ("1" if value else "2" for value in values)
    return [Outcome(Item(image, "?", ("1",)), a, [a]) for a, image in zip(answers, images)]


# ---- Intervals ---------------------------------------------------------------------------------------------


def test_questions_about_one_image_are_drawn_together():
    """Of 40 images with 10 questions each, all right or all wrong, the interval is that of 40 questions."""
    per_image = [1.0] * 20 + [0.0] * 20
    images = [f"{i}.png" for i in range(40)]
    alone = bootstrap(per_image)
    together = bootstrap(np.repeat(per_image, 10).tolist(), np.repeat(images, 10).tolist())
    assert together == pytest.approx(alone) and together[1] - together[0] > 0.25
    low, high = bootstrap(np.repeat(per_image, 10).tolist())
    assert high - low < 0.12, "drawn one by one they would seem to be 400"
    assert bootstrap(per_image, images) == alone, "one question an image: nothing changes"
    values = [0.0, 1.0, 1.0]
    assert bootstrap(values, ["x"] * 3) == bootstrap(values), "of one image nothing is known"


def test_images_with_more_questions_weigh_more():
    """The interval is that of the mean over questions, so it lies around it."""
    values, images = [1.0] * 90 + [0.0] * 10, ["a"] * 45 + ["b"] * 45 + [f"c{i}" for i in range(10)]
    low, high = bootstrap(values, images)
    assert low < 0.9 < high < 1


def test_scores_and_comparisons_use_the_images():
    values, images = [1, 0] * 30, [f"{i // 6}.png" for i in range(60)]
    same_each = [value for i in range(10) for value in [i % 2] * 6]
    report = full_report(outcomes_of(same_each, images))["scores"]["all"]
    assert report["intervals"]["greedy_accuracy"] == bootstrap(map_float(same_each), images)
    change = compare(outcomes_of(values, images), outcomes_of([1] * 60, images))
    assert change["greedy_accuracy"]["interval"] == (0.5, 0.5), "each image gains the same"


def map_float(values):
    return [float(value) for value in values]


# ---- The judge ---------------------------------------------------------------------------------------------


def judged(greedy, verdict, **fields):
    return Outcome(Item("x", "?", ("1",), **fields), greedy, ["1"], verdict)


def test_what_was_not_answered_is_wrong_for_the_judge_too():
    one = [judged("1", True)] + [judged(None, None)] * 99
    assert judge_scores(one) == dict(judged=0.01, judged_right=0.01, judge_disagreement=0.0)
    none = [judged(None, None)] * 4
    assert judge_scores(none) == dict(judged=0.0, judged_right=0.0)
    choices = [judged(None, None, choices=("1", "2"))] * 3
    assert judge_scores(choices) == dict(judged=0.0), "the judge is not asked about choices"
    mixed = [
        judged("1", True),
        judged("2", True),
        judged("3", None),
        judged(None, None),
        *choices[:1],
    ]
    scores = judge_scores(mixed)
    assert scores == dict(judged=2 / 5, judged_right=2 / 3, judge_disagreement=1 / 2)


# ---- Before the first answer -------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    noise_image(60, 60).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(
        '{"image": "a.png", "question": "How many?", "answer": "2"}\n'
    )
    return tmp_path / "data.jsonl"


def broken(folder, how):
    """A copy of the toy in which one thing is missing or wrong."""
    shutil.copytree(ROOT / "toy", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    if how == "config":
        (folder / "config.json").write_text("{")
    elif how == "template":
        for name in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
            if (folder / name).exists() and name.endswith("json"):
                edit(folder, name, chat_template="{{ messages[0].role }}")
            elif (folder / name).exists():
                (folder / name).write_text("{{ messages[0].role }}")
    elif how == "weights":
        (folder / "model.safetensors").unlink()
    elif how == "cut":
        (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:5000]
        )
    else:
        (folder / how).unlink()
    return str(folder)


@pytest.mark.parametrize("flag", ["--model", "--judge"])
@pytest.mark.parametrize(
    "how", ["config", "template", "weights", "cut", "tokenizer.json", "preprocessor_config.json"]
)
def test_every_checkpoint_is_looked_at_before_the_first_one_answers(
    data, tmp_path, flag, how, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate.VLM, "load", None)  # not reached
    wrong = broken(tmp_path / "wrong", how)
    args = ["--model", str(ROOT / "toy"), flag, wrong, "--data", str(data), "--device", "cpu"]
    assert evaluate.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "wrong" in err


@pytest.mark.parametrize(
    "args",
    [
        ["--temperature", "nan"], ["--temperature", "0"], ["--temperature", "1e-7"], ["--temperature", "inf"],
        ["--temperature", "-1"], ["--top-p", "nan"], ["--top-p", "0"], ["--top-p", "1.01"],
        ["--seed", "-1"], ["--seed", str(2**63)], ["--answers", "-3"],
    ],
)  # fmt: skip
def test_numbers_out_of_range(data, args, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_items", None)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", str(ROOT / "toy"), "--data", str(data), *args])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_a_gpu_that_is_too_small_is_no_wrong_argument(data, monkeypatch, capsys):
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "answer_items", full)
    assert evaluate.main(["--model", str(ROOT / "toy"), "--data", str(data)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the GPU has too little memory") and err.count("\n") == 1


# ---- Nothing that was worked out is lost -----------------------------------------------------------------


def spoilt(folder, value=float("nan")):
    """A copy of the toy whose last weights cannot be used, which is seen when it is loaded."""
    shutil.copytree(ROOT / "toy", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight" if "model.norm.weight" in weights else max(weights)][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def run_evaluate(data, *models, judge=()):
    out = data.parent / "out.json"
    args = f"--data {data} --json {out} --answers 2 --max-new-tokens 2 --device cpu".split()
    for model in models:
        args += ["--model", str(model)]
    return evaluate.main([*args, *judge]), out


@pytest.mark.parametrize("role", ["model", "judge"])
def test_a_second_model_that_is_broken_leaves_the_first_ones_answers(data, tmp_path, capsys, role):
    wrong = spoilt(tmp_path / "spoilt")
    if role == "model":
        code, out = run_evaluate(data, ROOT / "toy", wrong)
    else:
        code, out = run_evaluate(data, ROOT / "toy", judge=["--judge", wrong])
    printed = capsys.readouterr()
    assert code == 2 and "not finite" in printed.err and printed.err.count("error: ") == 1
    content = json.loads(out.read_text())
    assert [*content["answers"]] == [*content["reports"]] == [str(ROOT / "toy")]
    assert "confidence" in printed.out, "its table is printed"


@pytest.mark.parametrize(
    "error, code, word",
    [
        (KeyboardInterrupt(), 1, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "too little memory"),
        (RuntimeError("a kernel failed\nat"), 2, "a kernel failed"),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error"),
    ],
)
def test_whatever_stops_the_second_model(data, monkeypatch, capsys, error, code, word):
    answer_all, calls = evaluate.answer_all, []

    def stopping(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return answer_all(*arguments, **named)

    monkeypatch.setattr(evaluate, "answer_all", stopping)
    shutil.copytree(ROOT / "toy", data.parent / "toy")
    found, out = run_evaluate(data, ROOT / "toy", data.parent / "toy")
    printed = capsys.readouterr()
    assert found == code and word in printed.err and printed.err.count("\n") == 1
    assert len(json.loads(out.read_text())["answers"]) == 1 and "confidence" in printed.out


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_table_that_cannot_be_printed(data, monkeypatch, capsys, number):
    """The file is there; without one a full disk is an error, and a reader who has left is none."""

    class Failing(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Failing())
    code, out = run_evaluate(data, ROOT / "toy")
    assert code == 0 and json.loads(out.read_text())["answers"]
    monkeypatch.setattr(sys, "stdout", Failing())
    args = f"--model {ROOT}/toy --data {data} --answers 2 --max-new-tokens 2 --device cpu"
    assert evaluate.main(args.split()) == (1 if number == errno.ENOSPC else 0)


def test_a_table_in_latin_1(data, monkeypatch):
    """Kinds are the user's words."""
    line = dict(image="a.png", question="?", answer="2", kind="数")
    data.write_text(json.dumps(line))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    code, out = run_evaluate(data, ROOT / "toy")
    assert code == 0 and rb"\u6570" in shown.getvalue()
    assert "数" in json.loads(out.read_text())["reports"][str(ROOT / "toy")]["scores"]


def test_a_file_that_cannot_be_written_in_the_end(data, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "replace_text", full)
    code, out = run_evaluate(data, ROOT / "toy")
    printed = capsys.readouterr()
    assert (
        code == 2 and "confidence" in printed.out and "cannot be written: No space" in printed.err
    )


def test_one_photograph_asked_about_many_times_is_read_once(data, monkeypatch, capsys):
    line = data.read_text()
    data.write_text(line * 70)
    reads = []
    load = outcomes_module.load_image
    monkeypatch.setattr(outcomes_module, "load_image", lambda *a: reads.append(a[0]) or load(*a))
    assert run_evaluate(data, ROOT / "toy")[0] == 0
    assert len(reads) == 2, "once to see that it can be read, once for the model"


def test_an_image_that_was_written_out_as_text(data, capsys):
    text = "data:image/png;base64," + "iVBORw0KGgo/" * 9000
    lines = [data.read_text()]
    for image in (text, text[22:], "https://x.org/a.png", "~nosuchuser/a.png"):
        lines.append(json.dumps(dict(image=image, question="?", answer="2")) + "\n")
    data.write_text("".join(lines))
    assert run_evaluate(data, ROOT / "toy")[0] == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and all(len(line) < 600 for line in told)
    assert "data: is an address; write the image to a file" in told[0]
    assert "https: is an address" in told[2]


# ---- What reaches the terminal -----------------------------------------------------------------------------

NASTY = "a\x1b[2J\udcff\n\x07b"


def is_clean(text):
    text.encode("utf-8")
    return all(c == "\n" or c.isprintable() for c in text)


def test_names_and_kinds_are_printed_as_they_can_be_read():
    report = full_report([Outcome(Item("x", "?", ("1",), kind=NASTY), "1", ["1"])])
    report["against_first"] = compare(*[outcomes_of([1, 0], ["x", "y"])] * 2)
    text = table({NASTY: report})
    assert is_clean(text) and r"\x1b[2J\udcff\n\x07b" in text
    assert len(text.splitlines()) == len(table({"x": report}).splitlines())


def test_images_questions_and_answers_do_not_reach_the_terminal_raw(data, tmp_path, capsys):
    name = "\x1b]0;x\x07.png"
    lines = [
        dict(image=name, question="?", answer="1"),
        dict(image="\udcff.png", question="?", answer="1"),
    ]
    lines += [
        dict(image="a.png", question=NASTY.replace("\udcff", ""), answer="\x1b[1m", kind="\x1b[31m")
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = [
        "--model",
        str(ROOT / "toy"),
        "--data",
        str(data),
        "--answers",
        "1",
        "--max-new-tokens",
        "2",
    ]
    assert evaluate.main([*args, "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr()
    assert is_clean(printed.out) and is_clean(printed.err) and r"\x1b]0;x\x07.png" in printed.err
    assert r"\x1b[31m" in printed.out and json.loads((tmp_path / "out.json").read_text())
    data.write_text(json.dumps(dict(image="a.png", question="?", answer="\x1b", choices=["x"])))
    assert evaluate.main([*args, "--device", "cpu"]) == 2 and is_clean(capsys.readouterr().err)
    for wrong in (
        ["--model", NASTY],
        ["--judge", NASTY],
        ["--json", f"{NASTY}/x"],
        ["--device", NASTY],
    ):
        try:
            assert evaluate.main([*args, *wrong]) == 2
        except SystemExit as stop:
            assert stop.code == 2
        err = capsys.readouterr().err
        assert is_clean(err) and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "main, argv, said",
    [
        (
            evaluate.main,
            ["--model", "x", "--data", "y", "--tempreature", "1"],
            "did you mean --temperature?",
        ),
        (evaluate.main, ["--modle", "x", "--data", "y"], "did you mean --model?"),
        (benchmarks.main, ["mathvista", "x", "--limt", "3"], "did you mean --limit?"),
        (benchmarks.main, ["mathvista", "x", "more"], "unrecognized arguments: more"),
    ],
)
def test_a_mistyped_flag_is_told_which_one_is_meant(main, argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["loop", "evaluate", "benchmarks", "report"])
def test_a_command_runs_after_all_that_it_calls(name):
    """As a script, a function below the call of main would not be there yet."""
    *_, last = ast.parse((ROOT / f"{name}.py").read_text()).body
    assert isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)

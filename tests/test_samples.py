"""What a run keeps of what its models wrote, and what it says went wrong."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from test_loop import SMALL, records, workplace  # noqa: F401 (a fixture)
from test_report import EVIL, check_page, make_run, written

import grpo
import loop
import report
import rewards
from questioner import parse_question, read_question
from training import command
from training.scenes import write_scenes
from training.settings import Settings
from training.troubles import find_troubles

IMAGES = [
    *SMALL,
    *"--images images --tau-low 0 --tau-high 1 --samples 2 --save-every 1 --name".split(),
]


def kept(folder):
    """Path below samples/ -> its bytes."""
    paths = sorted((folder / "samples").rglob("*.jsonl"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_each_step_keeps_examples_and_a_repeated_step_its_own(workplace, monkeypatch):  # noqa: F811
    write_scenes(workplace / "images", 6, 0)
    assert loop.main([*IMAGES, "whole"]) == 0
    whole = kept(workplace / "runs" / "whole")
    place = "samples/iteration-1/{}-000{}.jsonl"
    assert [*whole] == [place.format(r, i) for r in ("questioner", "reasoner") for i in (1, 2)]

    # Killed when the examples of a step are there, but not its state: it is made again.
    write = loop.samples.write_questions

    def killed(s, run, step, *rest):
        write(s, run, step, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.samples, "write_questions", killed)
        assert loop.main([*IMAGES, "cut"]) == 1
    assert kept(workplace / "runs" / "cut") == {k: whole[k] for k in [*whole][:1]}
    assert loop.main([*IMAGES, "cut", "--samples", "2"]) == 0
    assert kept(workplace / "runs" / "cut") == whole

    # What stands there is what was trained on.
    for name, text in whole.items():
        step = int(name[-7])
        lines = [json.loads(line) for line in text.splitlines()]
        assert len(lines) == 2 and {len(line["outputs"]) for line in lines} == {4}
        record = [r for r in records(workplace / "runs" / "whole") if r.get("step") == step]
        (record,) = [r for r in record if r["phase"] in name]
        outputs = [output for line in lines for output in line["outputs"]]
        mean = sum(output["reward"] for output in outputs) / 8
        assert mean == pytest.approx(record["reward"], abs=1e-5), "two of two images"
        for line in lines:
            check_example(line)


def check_example(line):
    """Its rewards follow from its votes, its advantages from its rewards, its questions from its texts."""
    given = [output["reward"] for output in line["outputs"]]
    advantages = grpo.group_advantages(torch.tensor([given]))[0].tolist()
    assert [o["advantage"] for o in line["outputs"]] == pytest.approx(advantages, abs=1e-3)
    if "label" in line:
        for output in line["outputs"]:
            assert output["reward"] == rewards.answer_reward(output["answer"], line["label"])
        return
    questions, confidences = [], []
    for output in line["outputs"]:
        read = parse_question(output["text"])
        assert (read is None) == (output["invalid"] is not None)
        questions.append(read and read.text)
        confidences.append(output.get("confidence", 0.0))
        if read:
            assert output["question"] == read.text
            assert (output["label"], output["confidence"]) == rewards.confidence(output["answers"])
    assert given == pytest.approx(rewards.questioner_rewards(questions, confidences), abs=1e-5)
    for answer in line["answers"]:
        assert f"\\boxed{{{answer['answer']}}}" in answer["text"] or answer["answer"] is None


BLOCKS = "<type>numerical</type><question>How many?</question><answer>3</answer>"


@pytest.mark.parametrize(
    "text, fault",
    [
        (BLOCKS, ""),
        (f"<think>so</think>{BLOCKS}", ""),
        ("", "no <type> block"),
        ("How many?", "no <type> block"),
        (f"Sure! {BLOCKS}", "text before <type>"),
        (f"{BLOCKS} Enjoy.", "text behind the blocks"),
        (BLOCKS.replace("</question>", ""), "no <question> block"),
        (BLOCKS + BLOCKS, "more than one <type> block"),
        (BLOCKS.replace("numerical", "riddle"), "an unknown type"),
        (BLOCKS.replace("3", " "), "an empty block"),
        (f"a</think>b</think>{BLOCKS}", "more than one thought"),
        (f"{BLOCKS}<think>", "a thought without an end"),
        (BLOCKS.replace("How", "<answer> How"), "a tag in the question"),
    ],
)
def test_an_invalid_output_says_why(text, fault):
    question, why = read_question(text)
    assert why == fault and (question is None) == bool(fault) and parse_question(text) == question


# ---- What went wrong ---------------------------------------------------------------------------------------

SETTINGS = dict(max_new_tokens=9, images_per_step=2)
ASKED = dict(phase="questioner", validity=1.0, truncated=0.0, outputs=16, answered=1.0)
ANSWERED = dict(phase="reasoner", validity=1.0, truncated=0.0, outputs=16)
CURATED = dict(phase="curation", validity=1.0, curated=2)


@pytest.mark.parametrize(
    "record, words",
    [
        (ASKED, []),
        (ANSWERED, []),
        (CURATED, []),
        (ASKED | dict(truncated=0.2, validity=0.6), []),
        (ASKED | dict(truncated=1.0), ["all 32 outputs", "--max-new-tokens 9: raise it"]),
        (ANSWERED | dict(truncated=0.5), ["50% of 32 outputs were cut off"]),
        (
            ASKED | dict(validity=0.25, invalid={"no <type> block": 9, "an unknown type": 3}),
            ["75% of 32", "no <type> block 75%, an unknown type 25%", "--questioner-prompt"],
        ),
        (
            ASKED | dict(validity=0.0, truncated=1.0, invalid={"cut off": 16}),
            ["all 32 outputs", "cut off 100%", "--max-new-tokens 9: raise it"],
        ),
        (ANSWERED | dict(validity=0.5), ["50% of 32 outputs had no answer", "--reasoner-prompt"]),
        (ASKED | dict(answered=0.1), ["90% of the Reasoner's votes had no answer"]),
        (ASKED | dict(equal_groups=1.0), ["all rewards were equal", "--group-size"]),
        (ASKED | dict(skipped=1.0), ["skipped 2 of 2 steps", "--lr"]),
        (CURATED | dict(curated=1), ["kept: 1", "fewer than --images-per-step 2", "--candidates"]),
        (
            CURATED | dict(curated=0, validity=0.0),
            ["not one question was valid", "--questioner-prompt"],
        ),
        (
            CURATED | dict(curated=0, left_out={"above tau_high": 9, "below tau_low": 2}),
            ["9 above tau_high, 2 below tau_low", "too sure", "--tau-high"],
        ),
        (CURATED | dict(curated=0, left_out={"below tau_low": 2}), ["too unsure", "--tau-low"]),
        (CURATED | dict(curated=0, left_out={"no answer": 2}), ["--reasoner-prompt"]),
        (CURATED | dict(curated=0, left_out={"own rule": 2}), ["your own rule"]),
        (dict(phase="warning", signature="x", message="y"), ["x: y"]),
        # Records of earlier versions, and such as no run writes.
        (dict(phase="questioner"), []),
        (dict(phase="curation", curated=0, validity=1.0, left_out=[1]), ["candidates/"]),
        (ASKED | dict(validity="all", truncated=None, outputs=[], invalid={"x": "y"}), []),
        (ASKED | dict(validity=0.0, invalid={"x": 1, "y": "z"}, outputs="?"), ["all outputs"]),
        (dict(phase=["questioner"]), []),
    ],
)
def test_what_went_wrong_is_a_sentence_with_the_flag_to_turn(record, words):
    steps = 1 if record["phase"] in ("curation", "warning") else 2
    told = find_troubles([dict(iteration=1) | record] * steps, SETTINGS)
    assert len(told) == bool(words) and all(word in told[0] for word in words), told


@pytest.mark.parametrize(
    "records, first",
    [
        ([ASKED], "done: metrics"),
        ([ASKED, dict(phase="warning", signature="x", message="y")], "done, with warnings:"),
        ([ASKED | dict(truncated=1.0)], "The run is over, and not all went well:"),
    ],
)
def test_the_last_lines_of_a_run_say_how_it_went(records, first):
    run = SimpleNamespace(folder="runs/X y", settings=Settings(), records=[])
    run.records = [dict(iteration=1) | record for record in records]
    *_, last = lines = command.tell_end(run).splitlines()
    assert lines[0].startswith(first) and last.endswith("report.py 'runs/X y'")


def test_a_report_begins_with_what_went_wrong(tmp_path):
    text = written(make_run(tmp_path / "run"))
    box = text.split('<section class="trouble">')[1].split("</section>")[0]
    assert (
        box.count("<li>") == 3
        and "images that could not be used: 1" in box
        and "leave them out of --images" in box
        and "&lt;" in box
    )
    assert text.index("What went wrong") < text.index("Curves") and "http-equiv" not in text
    assert " yet" not in text.partition("<body>")[2]


@pytest.mark.parametrize(
    "lines, place",
    [
        (0, "iterations complete: 0 of 9 · at the start of iteration 1"),
        (1, "iterations complete: 0 of 9 · at the start of iteration 1"),
        (3, "iterations complete: 0 of 9 · iteration 1: Questioner step 2 of 3"),
        (5, "iterations complete: 0 of 9 · iteration 1: curation is done"),
        (8, "iterations complete: 0 of 9 · iteration 1: Reasoner step 2 of 2"),
        (9, "iterations complete: 1 of 9 · at the start of iteration 2"),
        (11, "iterations complete: 1 of 9 · iteration 2: Questioner step 2 of 3"),
    ],
)
def test_a_run_that_goes_on_says_where_it_is_and_its_page_reloads(tmp_path, lines, place):
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config |= dict(iterations=9, questioner_steps=3, reasoner_steps=2)
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(whole[:lines]))
    text = written(folder)
    assert place in text and '<meta http-equiv="refresh"' in text and "reloads itself" in text


def test_following_writes_the_page_until_the_run_is_over(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    pages = []

    def sleep(seconds):
        pages.append((folder / "report.html").read_text())
        (folder / "metrics.jsonl").write_text("".join(lines[: len(lines) // (3 - len(pages))]))

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert report.main([str(folder), "--follow"]) == 0
    assert len(pages) == 2 and all("http-equiv" in page for page in pages)
    assert "iterations complete: 2 of 2" in (folder / "report.html").read_text()


def test_the_last_page_has_the_end_of_a_run_that_ends_while_a_page_is_made(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole[: len(whole) // 2])
    make_page = report.page

    def page(folder):
        text = make_page(folder)
        (folder / "metrics.jsonl").write_text(whole)
        return text

    monkeypatch.setattr(report, "page", page)
    monkeypatch.setattr(report.time, "sleep", lambda seconds: None)
    assert report.main([str(folder), "--follow"]) == 0
    assert "iterations complete: 2 of 2" in (folder / "report.html").read_text()


# ---- Samples in the report ---------------------------------------------------------------------------------


def sample(text, **more):
    output = dict(
        text=text, invalid=text, reward=0.5, advantage=1.0, answers=[text, None], label=text
    )
    return dict(image="x.png", outputs=[output], answers=[dict(text=text, answer=text)]) | more


def with_samples(folder, *lines):
    make_run(folder, iterations=1)
    place = folder / "samples" / "iteration-1"
    place.mkdir(parents=True)
    written_out = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (place / "questioner-0001.jsonl").write_text("\n".join(written_out) + "\n")
    return folder


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain text", "plain text"),
        (EVIL, "&lt;script&gt;"),
        ("</pre></details></script><img src=x onerror=alert(1)>", "&lt;img src=x"),
        ("abc\u202edef\u2066", "abc\\u202edef\\u2066"),
        ("half \ud83d", "half \\ud83d"),
        ("\x1b[2J\x00\x9b\r", "\\x1b[2J\\x00\\x9b"),
        ("{name}{0}%s&#0;", "{name}{0}%s&amp;#0;"),
        ("a" * 1_000_000 + "end", "characters left out ...]"),
        ("<" * 100_000, "characters left out ...]"),
        ("日本 عربي 👩\u200d🚀\n\u2028x", "日本 عربي 👩\u200d🚀"),
    ],
)
def test_what_models_write_is_text_in_the_report_and_on_the_terminal(tmp_path, capsys, text, shown):
    folder = with_samples(tmp_path / "run", *[sample(text)] * 3)
    page = written(folder)
    check_page(page)
    block = page.split("What the models wrote")[1]
    assert (
        "<details><summary>Iteration 1, Questioner, step 1 · mean reward of these 0.50</summary>"
        in block
        and shown in block
    )
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", block
    )
    assert len(block) < 300_000
    capsys.readouterr()
    assert report.main([str(folder), "--samples", "3"]) == 0
    told = capsys.readouterr().out
    assert "iteration 1, questioner, step 1" in told and "reward 0.50" in told
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", told
    )


@pytest.mark.parametrize(
    "line",
    [
        "", "no", "3", "[]", "{}", "[" * 10_000, '{"image"', {"outputs": 3}, {"outputs": {}},
        {"outputs": [3, None, []]}, sample(None), sample(3), sample(["x"]), sample({"a": 1}),
        sample("x", image=None), sample("x", image=["y"]), sample("x", answers=3), sample("x", answers=[3]),
        sample("x", question=[1], confidence="y", label=3), {"outputs": [dict(reward="1", advantage=None)]},
        sample("x", image="\0"), sample("x", image="/" * 9), {"outputs": [dict(answers=[1, {}])]},
    ],
)  # fmt: skip
def test_samples_of_any_kind_hide_no_others(tmp_path, capsys, line):
    folder = with_samples(tmp_path / "run", sample("before"), line)
    text = written(folder)
    check_page(text)
    assert "<pre>before</pre>" in text
    assert report.main([str(folder), "--samples", "1"]) == 0 and "before" in capsys.readouterr().out


def test_a_long_run_shows_steps_from_its_beginning_to_its_end(tmp_path, capsys):
    folder = with_samples(tmp_path / "run", sample("x"))
    place = folder / "samples" / "iteration-1"
    for step in range(2, 302):
        (place / f"questioner-{step:04}.jsonl").write_text(json.dumps(sample(f"of step {step}")))
    (place / "questioner-x.jsonl").write_text(json.dumps(sample("of no step")))
    text = written(folder)
    steps = [
        int(step) for step in re.findall(r"<summary>Iteration 1, Questioner, step (\d+)", text)
    ]
    assert len(steps) == 60 and steps == sorted(steps) and (steps[0], steps[-1]) == (1, 301)
    assert report.main([str(folder), "--samples", "3"]) == 0
    assert re.findall(r"==== .* step (\d+)", capsys.readouterr().out) == ["1", "151", "301"]
    with pytest.raises(SystemExit):
        report.main([str(folder), "--samples", "0"])

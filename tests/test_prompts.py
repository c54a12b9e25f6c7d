"""Prompts of one's own, and what config.json says of the prompts and the code that made a run."""

import json

import pytest
import torch
from test_compare import HELD_OUT
from test_loop import SMALL, workplace  # noqa: F401 (a fixture)

import loop
import questioner
import reasoner
from model.vlm import VLM
from training import command, versions
from training.run import Stopped
from training.scenes import write_scenes


def config(name="x"):
    with open(f"runs/{name}/config.json") as file:
        return json.load(file)


def test_every_prompt_of_a_run_is_the_one_of_its_file(workplace, monkeypatch, capsys):  # noqa: F811
    """In all phases, on the fixed questions and on those of --measure."""
    write_scenes(workplace / "images", 4, 0)
    (workplace / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in HELD_OUT[:2]))
    (workplace / "ask.txt").write_text("\ufeffAsk <type> <question> <answer> é\n\n")
    (workplace / "answer.txt").write_text("Be brief.\n")
    seen, really = set(), VLM.prompt

    def prompt(self, text, image, system=None):
        mine = text == "Ask <type> <question> <answer> é" or text.endswith("?\nBe brief.")
        seen.add(mine or text)
        return really(self, questioner.INSTRUCTION if text[:3] == "Ask" else text, image)

    monkeypatch.setattr(VLM, "prompt", prompt)
    flags = (
        "--images images --measure q.jsonl --questioner-prompt ask.txt --reasoner-prompt answer.txt"
    )
    assert (
        loop.main([*SMALL, *flags.split(), "--name", "x", "--tau-low", "0", "--tau-high", "1"]) == 0
    )
    assert seen == {True} and "other prompts" in capsys.readouterr().err
    said = config()
    assert said["questioner_prompt"] == "Ask <type> <question> <answer> é"
    assert said["reasoner_prompt"] == "\nBe brief."
    # The run goes on with its own prompts, whatever has become of the files or of the code.
    (workplace / "ask.txt").unlink()
    monkeypatch.setattr(reasoner, "INSTRUCTION", "\nother")
    seen.clear()
    assert loop.main(["--resume", "runs/x", "--iterations", "2"]) == 0 and seen == {True}


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["--questioner-prompt", "--reasoner-prompt"])
def test_a_prompt_that_cannot_be_read_is_a_sentence(workplace, capsys, name, content):  # noqa: F811
    if content is not None:
        (workplace / "p").write_bytes(content)
    assert loop.main([*SMALL, name, "p", "--name", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {name} p") and err.count("\n") == 1
    assert not (workplace / "runs").exists()


IMAGES = [*SMALL, "--images", "images", "--name", "x"]


def stopped(s, run):
    run.warn_of_prompts()
    raise Stopped


def test_a_run_says_which_code_made_it_and_when_it_is_other_code(workplace, monkeypatch, capsys):  # noqa: F811
    write_scenes(workplace / "images", 2, 0)
    code = dict(commit="a" * 40, changes="", torch=torch.__version__)
    monkeypatch.setattr(command, "describe_code", lambda: code)
    assert command.main(stopped, "", IMAGES) == 1
    assert config()["questioner_prompt"] == questioner.INSTRUCTION and config()["code"] == [code]
    assert command.main(stopped, "", ["--resume", "runs/x"]) == 1
    assert "warning" not in capsys.readouterr().err
    other = code | dict(commit="b" * 40, changes="c")
    monkeypatch.setattr(command, "describe_code", lambda: other)
    assert command.main(stopped, "", ["--resume", "runs/x"]) == 1
    told = "other code (commit aaaaaaaaaaaa -> bbbbbbbbbbbb, other changes that are not committed)"
    assert told in capsys.readouterr().err and config()["code"] == [code, other]
    assert command.main(stopped, "", ["--resume", "runs/x"]) == 1
    assert "warning" not in capsys.readouterr().err and config()["code"] == [code, other]
    # A run of an earlier version says neither.
    old = {
        k: v
        for k, v in config().items()
        if k not in ("code", "questioner_prompt", "reasoner_prompt")
    }
    (workplace / "runs" / "x" / "config.json").write_text(json.dumps(old))
    for args in (["--resume", "runs/x"], IMAGES):
        assert command.main(stopped, "", args) == 1, capsys.readouterr().err


def test_other_prompts_are_another_run(workplace, capsys):  # noqa: F811
    write_scenes(workplace / "images", 2, 0)
    assert command.main(stopped, "", IMAGES) == 1
    (workplace / "p").write_text("a new prompt\n" * 99)
    capsys.readouterr()
    assert command.main(stopped, "", [*IMAGES, "--questioner-prompt", "p"]) == 2
    err = capsys.readouterr().err
    assert "was started with --questioner-prompt" in err and len(err) < 400 and err.count("\n") == 1
    assert command.main(stopped, "", [*IMAGES[:-1], "y", "--questioner-prompt", "p"]) == 1
    assert "does not name <question>" in capsys.readouterr().err


def test_code_is_described_with_git_and_without(monkeypatch):
    described = versions.describe_code()
    assert described["torch"] == torch.__version__ and {"commit", "changes"} <= described.keys()
    assert versions.compare_code(described, described) == ""
    assert versions.compare_code({}, dict(torch="2")) == "torch None -> 2"
    monkeypatch.setattr(versions, "ROOT", versions.ROOT / "nowhere")
    assert versions.describe_code()["commit"] is versions.describe_code()["changes"] is None
    monkeypatch.setenv("PATH", "")
    assert versions.describe_code()["commit"] is None

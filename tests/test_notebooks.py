"""Every notebook runs, also alone, and is committed as it ran; the experiments run at their smallest."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from curate import VotedQuestion
from training.settings import Settings

LESSONS = ROOT / "notebooks"
sys.path.insert(0, str(LESSONS))
from experiments import EXPERIMENTS, clear_majority, is_done, settings, share_of_votes  # noqa: E402
from figures import RUNG_COLOURS  # noqa: E402

NOTEBOOKS = sorted(LESSONS.glob("*.ipynb"))
TITLES = "01_rewards 02_grpo 03_generation 04_packed_groups 05_visplay 06_experiments"
WIDTH = 95  # characters of a line that Jupyter shows, as in notebooks/ruff.toml

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_lessons_are_there():
    assert [path.stem for path in NOTEBOOKS] == TITLES.split()


@each_notebook
def test_a_notebook_runs(path):
    """An error in a cell raises; afterwards it has shown as many figures as the committed one."""
    committed, ran = nbformat.read(path, 4), nbformat.read(path, 4)
    where = {"metadata": {"path": str(LESSONS)}}
    NotebookClient(ran, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [[o for cell in nb.cells for o in cell.get("outputs", ())] for nb in (committed, ran)]
    figures = [sum("image/png" in o.get("data", {}) for o in all_of_it) for all_of_it in outputs]
    assert figures[0] == figures[1] > 0


@each_notebook
def test_a_notebook_is_committed_as_it_ran(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    numbers = [cell.execution_count for cell in code]
    assert numbers == list(range(1, len(code) + 1)), "run once, from top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert path.stat().st_size < 600_000
    for part in ("## Exercises", "<details><summary>Answers</summary>", "</details>"):
        assert part in notebook.cells[-1].source


@each_notebook
def test_no_line_of_code_is_cut_off(path):
    """In cells and in the code blocks of the text."""
    for cell in nbformat.read(path, 4).cells:
        blocks = re.findall(r"^```.*?^```", cell.source, re.M | re.S)
        for block in [cell.source] if cell.cell_type == "code" else blocks:
            assert max(map(len, block.splitlines())) <= WIDTH, block


@each_notebook
def test_each_prediction_is_answered(path):
    """Below the question and above the next one; each notebook asks for several."""
    text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    text = text.partition("## Exercises")[0]
    marks = re.findall(r"\*\*Predict:\*\*|<summary>Answer</summary>", text)
    assert marks == ["**Predict:**", "<summary>Answer</summary>"] * (len(marks) // 2)
    assert len(marks) >= 8 and text.count("<details>") == text.count("</details>")
    answers = re.findall(r"<summary>Answer</summary>(.*?)</details>", text, re.S)
    assert all(len(answer.split()) > 1 for answer in answers), "an answer is a sentence"


# ---- A notebook alone: the first cell ----


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """Runs the first cell in an empty folder; returns the ROOT that it has found."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [])
    sources = {first_code(nbformat.read(path, 4)) for path in NOTEBOOKS}
    assert len(sources) == 1, "the first cells are the same"

    def run(address=""):
        monkeypatch.setenv("VISPLAY_REPOSITORY", str(address))
        names = {}
        exec(*sources, names)
        return names["ROOT"]

    return run


def first_code(notebook):
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def make_repository(folder, requirements=""):
    """A git repository that looks like this one to the first cell."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "grpo.py").touch()
    (folder / "notebooks" / "requirements.txt").write_text(requirements)
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    return folder


def test_a_notebook_alone_fetches_the_project(first_cell, tmp_path):
    """Once: the second time it is there, for a new kernel, too."""
    root = first_cell(make_repository(tmp_path / "origin"))
    assert root == tmp_path / "empty" / "visplay" and (root / "notebooks").is_dir()
    assert sys.path[:3] == [str(root), str(root / "notebooks"), str(root / "bench")]
    assert first_cell("nowhere") == root
    sys.path.clear()
    assert first_cell("nowhere") == root and str(root) in sys.path


def test_a_notebook_alone_says_what_to_fill_in(first_cell):
    with pytest.raises(ValueError, match="fill in REPOSITORY"):
        first_cell()


def test_what_git_and_pip_say_is_shown(first_cell, tmp_path):
    with pytest.raises(RuntimeError, match="nowhere"):
        first_cell(tmp_path / "nowhere")
    origin = make_repository(tmp_path / "origin", "no such name, torch>=99")
    for _ in range(2):  # what could not be installed is asked for again
        with pytest.raises(RuntimeError, match="torch>=99"):
            first_cell(origin)


@pytest.mark.parametrize("below", ["", "notebooks", "elsewhere"])
def test_a_notebook_beside_the_project_fetches_nothing(first_cell, tmp_path, monkeypatch, below):
    """In the project, in a folder of it, and where the project has been imported from before."""
    root = make_repository(tmp_path / "origin")
    (tmp_path / "elsewhere").mkdir()
    if below == "elsewhere":
        sys.path.append(str(root))
    monkeypatch.chdir(tmp_path / "elsewhere" if below == "elsewhere" else root / below)
    assert first_cell("nowhere") == root


def test_a_rung_has_a_colour_of_its_own():
    assert list(RUNG_COLOURS) == ["1-2", "3-4", "5-6", "7-9"]
    assert len(set(RUNG_COLOURS.values())) == 4
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in RUNG_COLOURS.values())


# ---- The experiments ----


def experiments(*flags):
    command = [sys.executable, str(LESSONS / "experiments.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


SETTINGS_ALONE = {  # what these change runs no code of its own, or that of another
    *("one long iteration", "no thresholds", "tau 0.4 to 0.6", "tau 0.1 to 0.9", "lambda 0"),
    *("more votes", "Questioner twice as fast", "steep base", "anchor .01", "anchor .1"),
    *("anchor .03, LoRA", "ten iterations", "ten iterations, anchor .03"),
    *(name for name in EXPERIMENTS if name.startswith("five iterations")),
}


def test_the_experiments_run_at_their_smallest(tmp_path):
    """All that run code of their own; a short run is not done again, and never counts for a long one."""
    out, names = tmp_path / "results.jsonl", set(EXPERIMENTS) - SETTINGS_ALONE
    assert all(settings(name, 0, short=True) for name in SETTINGS_ALONE)
    flags = ["--short", "--seeds", "1", "--jobs", "2", "--out", str(out), "--only", *sorted(names)]
    done = experiments(*flags)
    assert done.returncode == 0, done.stderr
    ran = results(out)
    assert sorted(r["experiment"] for r in ran) == sorted(names)
    assert all(r["records"][-1]["phase"] == "measure" and r["commit"] for r in ran)
    again = experiments(*flags)
    assert again.returncode == 0 and "0 runs to do" in again.stdout
    assert results(out) == ran
    assert not any(is_done(r["experiment"], 0, short=False, results=ran) for r in ran)


def test_a_run_of_other_settings_is_not_done():
    of_today = dict(
        experiment="default", seed=3, short=False, settings=settings("default", 3, False)
    )
    assert is_done("default", 3, False, [of_today])
    assert not is_done("default", 2, False, [of_today])
    assert not is_done("margin", 3, False, [of_today])
    assert not is_done(
        "default", 3, False, [of_today | {"settings": of_today["settings"] | {"lr": 1.0}}]
    )
    before = {name: value for name, value in of_today["settings"].items() if name != "lora_rank"}
    assert is_done("default", 3, False, [of_today | {"settings": before}]), "the flag came later"


def test_what_is_kept_and_paid_in_place_of_the_default():
    s = Settings()
    votes = ["3"] * 5 + ["4"] * 3 + [None] * 2
    clear = VotedQuestion("a.png", "How many?", "numerical", "3", 0.5, votes)
    assert clear_majority(clear, s)
    assert not clear_majority(replace(clear, answers=["3"] * 5 + ["4"] * 4 + [None]), s)
    assert not clear_majority(replace(clear, confidence=0.9), s)
    assert [share_of_votes(answer, clear) for answer in ("3", "4.0", "5", None)] == [0.5, 0.3, 0, 0]


def test_the_committed_results_are_of_whole_runs():
    """No short one, none twice of a commit, each as long as it says. Seeds 10, 11 chose a weight."""
    committed = results(LESSONS / "experiments.jsonl")
    assert not any(r["short"] for r in committed)
    assert len({(r["experiment"], r["seed"], r["commit"]) for r in committed}) == len(committed)
    assert {r["experiment"] for r in committed} <= set(EXPERIMENTS)
    chosen_on = {r["experiment"] for r in committed if r["seed"] > 7}
    assert all(name.startswith("anchor") for name in chosen_on)
    for r in committed:
        s, phases = r["settings"], [record["phase"] for record in r["records"]]
        assert phases.count("questioner") == s["iterations"] * s["questioner_steps"]
        assert phases.count("measure") == s["iterations"] + 1

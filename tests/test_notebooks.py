"""Every notebook runs and is committed with its outputs; the experiments' script runs at its smallest."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

LESSONS = ROOT / "notebooks"
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
    assert path.stat().st_size < 600_000 and "Exercises" in notebook.cells[-1].source


@each_notebook
def test_no_line_of_code_is_cut_off(path):
    """In cells and in the code blocks of the text."""
    for cell in nbformat.read(path, 4).cells:
        blocks = re.findall(r"^```.*?^```", cell.source, re.M | re.S)
        for block in [cell.source] if cell.cell_type == "code" else blocks:
            assert max(map(len, block.splitlines())) <= WIDTH, block


def test_the_experiments_run_at_their_smallest(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [sys.executable, str(LESSONS / "experiments.py"), "--short"]
    command += ["--seeds", "1", "--jobs", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ran = {r["experiment"]: r["records"][-1]["phase"] for r in results(out)}
    committed = {r["experiment"] for r in results(LESSONS / "experiments.jsonl")}
    assert ran == {name: "oracle" if name == "oracle" else "measure" for name in committed}
    again = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert again.returncode == 0 and len(results(out)) == len(ran), "what is done is not done again"


def test_the_committed_results_are_of_whole_runs():
    """Three seeds of each experiment, none of them a short one, each as long as its settings say."""
    committed = results(LESSONS / "experiments.jsonl")
    assert not any(r["short"] for r in committed)
    assert len({(r["experiment"], r["seed"]) for r in committed}) == 30
    for r in committed:
        asked = sum(record["phase"] == "questioner" for record in r["records"])
        assert asked == (0 if r["experiment"] == "oracle" else 60)

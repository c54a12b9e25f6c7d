"""Every notebook runs from top to bottom and is committed with its outputs; the experiments' script runs at its smallest."""

import json
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_all_lessons_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_rewards",
        "02_grpo",
        "03_generation",
        "04_packed_groups",
        "05_visplay",
        "06_experiments",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    """An error in a cell raises; afterwards it has shown as many figures as the committed one."""
    committed = nbformat.read(path, 4)
    ran = nbformat.read(path, 4)
    NotebookClient(
        ran, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    figures = [
        sum("image/png" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", ()))
        for nb in (committed, ran)
    ]
    assert figures[0] == figures[1] > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
        "run once, from top to bottom"
    )
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert path.stat().st_size < 600_000 and "Exercises" in notebook.cells[-1].source


def test_the_experiments_run_at_their_smallest(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [
        sys.executable,
        str(ROOT / "notebooks" / "experiments.py"),
        "--short",
        "--seeds",
        "1",
        "--out",
        str(out),
        "--jobs",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = {r["experiment"]: r["records"] for r in map(json.loads, out.read_text().splitlines())}
    committed = {
        json.loads(line)["experiment"]
        for line in (ROOT / "notebooks" / "experiments.jsonl").read_text().splitlines()
    }
    assert set(results) == committed and len(committed) == 10
    assert all(
        records[-1]["phase"] == ("oracle" if name == "oracle" else "measure")
        for name, records in results.items()
    )
    again = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert again.returncode == 0 and len(out.read_text().splitlines()) == 10, "what is done is not done again"


def test_the_committed_results_are_of_whole_runs():
    """Three seeds of each experiment, none of them a short one, each as long as its settings say."""
    results = [
        json.loads(line) for line in (ROOT / "notebooks" / "experiments.jsonl").read_text().splitlines()
    ]
    assert not any(r["short"] for r in results) and len({(r["experiment"], r["seed"]) for r in results}) == 30
    for r in results:
        asked = sum(record["phase"] == "questioner" for record in r["records"])
        assert asked == (0 if r["experiment"] == "oracle" else 60)

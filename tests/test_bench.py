"""Every benchmark runs at its smallest size and says what it should; how fast anything is, no test asks."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT

SMALLEST = {
    "rollout": ["--size", "tiny", "--prompt-tokens", "60", "--group-size", "2", "--new-tokens", "4", "--prompts", "2", "--repeats", "1"],
    "update": ["--size", "tiny", "--prompt-tokens", "60", "--group-size", "2", "--new-tokens", "4", "--prompts", "2", "--repeats", "1"],
    "iteration": ["--size", "tiny", "--prompt-tokens", "60", "--group-size", "2", "--new-tokens", "4", "--prompts", "2", "--answers", "2"],
    "scaling": ["--size", "tiny", "--prompt-tokens", "60", "--group-size", "2", "--new-tokens", "4", "--prompts", "1", "--repeats", "1"],
    "tricks": ["--size", "tiny", "--prompt-tokens", "60", "--group-size", "2", "--new-tokens", "4", "--prompts", "2", "--repeats", "1", "--vocab-size", "600"],
    "rewards": ["--questions", "20", "--repeats", "1"],
}


def run(name: str, *extra: str) -> str:
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *SMALLEST[name], *extra]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SMALLEST)
def test_benchmarks(name):
    printed = json.loads(run(name, "--json"))
    results = printed["results"]
    assert printed["benchmark"] == name and {"date", "device", "torch", "transformers"} <= printed["machine"].keys()
    assert all(value >= 0 for value in results.values())
    if name in ("rollout", "update", "rewards"):
        assert results["ratio"] == pytest.approx(results["theirs_s"] / results["ours_s"])
    if name == "update":
        assert results["loss_difference"] < 1e-5 and results["gradient_difference"] < 1e-4
    if name == "rewards":
        assert results["largest_difference"] < 1e-12
    if name == "iteration":
        parts = {"encode images", "prefill", "decode", "sampling", "log-probabilities", "backward", "optimizer", "rewards", "other"}
        assert all(results[f"{part} (s)"] > 0 for part in parts)
        assert sum(results[f"{part} (s)"] for part in parts) == pytest.approx(results["total_s"], rel=0.02)


def test_a_table_for_people():
    printed = run("rewards")
    assert "ratio" in printed and "questions=20" in printed and not printed.startswith("{")


@pytest.mark.parametrize("wrong", [["--group-size", "0"], ["--dtype", "int8"], ["--prompt-tokens", "5"], ["--repeats", "x"]])
def test_wrong_arguments_get_a_sentence(wrong):
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "rollout.py"), *wrong], capture_output=True, text=True)
    assert done.returncode == 2 and wrong[0] in done.stderr and "Traceback" not in done.stderr

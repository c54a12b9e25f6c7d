"""Every benchmark runs at its smallest size and says what it should; how fast anything is, no test asks."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

SMALLEST = {
    "rollout": [
        "--size",
        "tiny",
        "--prompt-tokens",
        "60",
        "--group-size",
        "2",
        "--new-tokens",
        "4",
        "--prompts",
        "2",
        "--repeats",
        "1",
    ],
    "update": [
        "--size",
        "tiny",
        "--prompt-tokens",
        "60",
        "--group-size",
        "2",
        "--new-tokens",
        "4",
        "--prompts",
        "2",
        "--repeats",
        "1",
    ],
    "iteration": [
        "--size",
        "tiny",
        "--prompt-tokens",
        "60",
        "--group-size",
        "2",
        "--new-tokens",
        "4",
        "--prompts",
        "2",
        "--answers",
        "2",
    ],
    "scaling": [
        "--size",
        "tiny",
        "--prompt-tokens",
        "60",
        "--group-size",
        "2",
        "--new-tokens",
        "4",
        "--prompts",
        "1",
        "--repeats",
        "1",
    ],
    "tricks": [
        "--size",
        "tiny",
        "--prompt-tokens",
        "60",
        "--group-size",
        "2",
        "--new-tokens",
        "4",
        "--prompts",
        "2",
        "--repeats",
        "1",
        "--vocab-size",
        "600",
    ],
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
    assert (
        printed["benchmark"] == name
        and {"date", "device", "torch", "transformers"} <= printed["machine"].keys()
    )
    assert all(value >= 0 for value in results.values())
    if name in ("rollout", "update", "rewards"):
        assert results["ratio"] == pytest.approx(results["theirs_s"] / results["ours_s"])
    if name == "update":
        assert results["loss_difference"] < 1e-5 and results["gradient_difference"] < 1e-4
    if name == "rewards":
        assert results["largest_difference"] < 1e-12
    if name == "iteration":
        parts = {
            "encode images",
            "prefill",
            "decode",
            "sampling",
            "log-probabilities",
            "backward",
            "optimizer",
            "rewards",
            "other",
        }
        assert all(results[f"{part} (s)"] > 0 for part in parts)
        assert sum(results[f"{part} (s)"] for part in parts) == pytest.approx(results["total_s"], rel=0.02)


@pytest.mark.parametrize("part", ["bandwidth", "decode", "memory"])
def test_parts_of_the_gpu_benchmark(part):
    """At its tiny CPU sizes; the parts that are other benchmarks are tested as those."""
    command = [
        sys.executable,
        str(ROOT / "bench" / "gpu.py"),
        "--part",
        part,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--size",
        "tiny",
        "--json",
    ]
    small = ["--prompt-tokens", "60", "--group-size", "2", "--new-tokens", "8", "--prompts", "2"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert results and all(value > 0 for value in results.values())
    if part == "decode":
        assert results["share_of_bound"] == pytest.approx(results["bound_ms"] / results["step_ms"])


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    monkeypatch.setattr(gpu, "LIMITS", dict(rollout=0.01, tests=9, bandwidth=60))
    monkeypatch.setattr(sys, "argv", "gpu.py --device cpu --dtype float32 --size tiny --json".split())
    monkeypatch.setattr(gpu, "OTHERS", ("rollout", "tests"))  # there is no bench/tests.py
    gpu.main()
    results = json.loads(capsys.readouterr().out)["results"]
    assert (
        "took longer than 0.01 s" in results["rollout: FAILED"] and "No such file" in results["tests: FAILED"]
    )
    assert results["bandwidth: copy_gb_per_s"] > 0


def test_a_table_for_people():
    printed = run("rewards")
    assert "ratio" in printed and "questions=20" in printed and not printed.startswith("{")


@pytest.mark.parametrize(
    "wrong", [["--group-size", "0"], ["--dtype", "int8"], ["--prompt-tokens", "5"], ["--repeats", "x"]]
)
def test_wrong_arguments_get_a_sentence(wrong):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "rollout.py"), *wrong], capture_output=True, text=True
    )
    assert done.returncode == 2 and wrong[0] in done.stderr and "Traceback" not in done.stderr

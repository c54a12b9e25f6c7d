"""Every benchmark runs at its smallest size and says what it should; how fast anything is, no test asks."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL = "--size tiny --prompt-tokens 60 --group-size 2 --new-tokens 4"
SMALLEST = {
    "encoder": "--size tiny --image-tokens 64 --prompts 1 --repeats 1",
    "rollout": f"{SMALL} --prompts 2 --repeats 1",
    "update": f"{SMALL} --prompts 2 --repeats 1",
    "iteration": f"{SMALL} --prompts 2 --answers 2",
    "scaling": f"{SMALL} --prompts 1 --repeats 1",
    "tricks": f"{SMALL} --prompts 2 --repeats 1 --vocab-size 600",
    "rewards": "--questions 20 --repeats 1",
}
PARTS = (
    "encode images",
    "prefill",
    "decode",
    "sampling",
    "log-probabilities",
    "backward",
    "optimizer",
)


def run(name: str, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SMALLEST)
def test_benchmarks(name):
    printed = json.loads(run(name, *SMALLEST[name].split(), "--json"))
    results = printed["results"]
    assert printed["benchmark"] == name
    assert {"date", "device", "torch", "transformers"} <= printed["machine"].keys()
    assert all(value >= 0 for value in results.values())
    if name in ("rollout", "update", "rewards"):
        assert results["ratio"] == pytest.approx(results["theirs_s"] / results["ours_s"])
    if name == "update":
        assert results["loss_difference"] < 1e-5 and results["gradient_difference"] < 1e-4
    if name == "rewards":
        assert results["largest_difference"] < 1e-12
    if name == "iteration":
        spent = [results[f"{part} (s)"] for part in (*PARTS, "rewards", "other")]
        assert min(spent) > 0 and sum(spent) == pytest.approx(results["total_s"], rel=0.02)


@pytest.mark.parametrize("part", ["bandwidth", "decode", "memory"])
def test_parts_of_the_gpu_benchmark(part):
    """At its tiny CPU sizes; the parts that are other benchmarks are tested as those."""
    flags = (
        "--device cpu --dtype float32 --size tiny --prompt-tokens 60 --group-size 2 --new-tokens 8"
    )
    printed = json.loads(run("gpu", "--part", part, *flags.split(), "--prompts", "2", "--json"))
    results = printed["results"]
    assert results and all(value > 0 for value in results.values())
    if part == "decode":
        assert results["share_of_bound"] == pytest.approx(results["bound_ms"] / results["step_ms"])


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    monkeypatch.setattr(gpu, "SECONDS", dict(rollout=0.01, tests=9, bandwidth=60))
    monkeypatch.setattr(
        sys, "argv", "gpu.py --device cpu --dtype float32 --size tiny --json".split()
    )
    monkeypatch.setattr(gpu, "OTHERS", ("rollout", "tests"))  # there is no bench/tests.py
    gpu.main()
    results = json.loads(capsys.readouterr().out)["results"]
    assert "took longer than 0.01 s" in results["rollout: FAILED"]
    assert "No such file" in results["tests: FAILED"]
    assert results["bandwidth: copy_gb_per_s"] > 0


def test_a_table_for_people():
    printed = run("rewards", *SMALLEST["rewards"].split())
    assert "ratio" in printed and "questions=20" in printed and not printed.startswith("{")


INSTALLED = {package.name for package in importlib.metadata.distributions()}  # not bench/trl.py


@pytest.mark.skipif("trl" not in INSTALLED, reason="TRL is in bench/requirements-trl.txt")
@pytest.mark.parametrize("rows", ["", "--trl-rows 4"])
def test_trl_and_ours_make_the_same_step(rows):
    """Given TRL's completions and rewards; TRL adds up the gradients of two batches, or has one."""
    flags = f"{SMALL} --prompts 2 --repeats 1 --device cpu --dtype float32 {rows}"
    results = json.loads(run("trl", *flags.split(), "--json"))["results"]
    assert max(results[f"gradient{what}_difference"] for what in ("", "_norm")) < 1e-5
    assert results["weights_difference"] < 1e-6 and results["step_difference"] < 1e-2
    for part in ("rollout", "reference", "update", "step"):
        theirs, ours = (results[f"{part}: {side}_s"] for side in ("theirs", "ours"))
        assert 0 < ours and results[f"{part}: ratio"] == pytest.approx(theirs / ours)


def test_without_trl_its_benchmark_says_what_to_install():
    path = str(ROOT / "bench" / "trl.py")
    lines = ["import runpy, sys", "sys.modules['trl'] = None  # as if it were not installed"]
    lines += ["sys.path.insert(0, 'bench')", "sys.argv = ['trl.py']"]
    lines += [f"runpy.run_path({path!r}, run_name='__main__')"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = "bench/trl.py needs TRL: pip install -r bench/requirements-trl.txt"
    assert done.returncode == 1 and done.stderr.strip() == said and not done.stdout


WRONG = ["--group-size 0", "--dtype int8", "--prompt-tokens 5", "--repeats x"]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_get_a_sentence(wrong):
    command = [sys.executable, str(ROOT / "bench" / "rollout.py"), *wrong.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2 and wrong.split()[0] in done.stderr and "Traceback" not in done.stderr
    )

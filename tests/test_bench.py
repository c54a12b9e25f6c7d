"""Every benchmark runs at its smallest size and says what it should; how fast anything is, no test asks."""

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import noise_image
from conftest import ROOT

from model import logprobs
from model.families import encode_images

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
VOTE = f"{SMALL} --prompts 2 --questions 2 --repeats 1"
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


@pytest.mark.parametrize("name, flags", [*SMALLEST.items(), ("rollout", VOTE)])
def test_benchmarks(name, flags):
    printed = json.loads(run(name, *flags.split(), "--json"))
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


@pytest.fixture
def gpu(monkeypatch):
    """bench/gpu.py; its folder stands at the end, as it has a rewards.py of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "bench")])
    return importlib.import_module("gpu")


def found_by(gpu, monkeypatch, tmp_path, flags=""):
    """What gpu.py writes: (part, name) -> value."""
    tiny = f"{SMALL} --new-tokens 9 --prompts 3 --device cpu --out {tmp_path / 'found'}"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *tiny.split(), *flags.split()])
    gpu.main()
    lines = (tmp_path / "found").read_text().splitlines()
    return {(line["part"], line["name"]): line["value"] for line in map(json.loads, lines)}


def test_parts_of_the_gpu_benchmark(gpu, monkeypatch, tmp_path, capsys):
    """At a tiny size on the CPU; those that run tests and the toy are tested as those."""
    parts = "machine attention rollout update gap lora estimate"
    found = found_by(gpu, monkeypatch, tmp_path, f"--part {parts}")
    assert {part for part, _ in found} == set(parts.split())
    assert not [name for _, name in found if name == "FAILED"]
    for enabled in ("on", "off"):
        assert found["attention", f"cuDNN {enabled}"].startswith("finite")
    for part, before in (("update", ""), ("lora", "update: ")):
        assert found[part, f"{before}T % 128"] == 64 and found[part, f"{before}skipped"] == 0
        assert found[part, f"{before}gradient's norm"] > 0
    spent = [found["update", f"{name} (s)"] for name in ("backward", "optimizer", "refresh")]
    assert min(spent) > 0 and sum(spent) < found["update", "in all (s)"]
    # 8 steps write what follows the first token, and the estimate's counts are those of the rollout.
    step = found["rollout", "a step (ms)"] / 1e3
    assert 0 < 8 * step < found["rollout", "decode (s)"]
    estimated = found["estimate", "rollout, decode: estimated (s)"]
    ratio = found["estimate", "rollout, decode: found / estimated"]
    assert ratio == pytest.approx(found["rollout", "decode (s)"] / estimated)
    # What an earlier run has found is not compared.
    (tmp_path / "found").write_text("")
    gpu.report(gpu.parse_arguments(), "update", "in all (s)", 1.0)
    again = found_by(gpu, monkeypatch, tmp_path, "--part machine estimate")
    assert ("estimate", "update, in all: estimated (s)") in again
    assert ("estimate", "update, in all: found / estimated") not in again
    assert "skipped" in capsys.readouterr().out


def test_what_the_gpu_benchmark_must_see(gpu, monkeypatch, tmp_path):
    """NaN gradients; and rows whose completions see one another, where decoding and packing are apart."""
    right = found_by(gpu, monkeypatch, tmp_path, "--dtype float32 --part gap")
    assert right["gap", "largest gap"] < 1e-4 and right["gap", "mean log-probability"] < -1
    true_mask = logprobs.packed_mask
    monkeypatch.setattr(logprobs, "packed_mask", lambda segment: true_mask(segment.clamp(max=1)))
    true = gpu.scaled_dot_product_attention
    monkeypatch.setattr(
        gpu, "scaled_dot_product_attention", lambda *x, **how: true(*x, **how) * torch.nan
    )
    wrong = found_by(gpu, monkeypatch, tmp_path, "--dtype float32 --part gap attention")
    assert wrong["gap", "largest gap"] > 1e-3
    assert wrong["attention", "cuDNN off"].startswith("NaN")


def test_a_part_that_fails_or_hangs_costs_only_itself(gpu, monkeypatch, tmp_path):
    """And what it has started ends with it."""
    script = tmp_path / "parts.py"
    lines = ["import subprocess, sys, time", "part = sys.argv[-1]", "if part == 'tests':"]
    lines += [
        "    sys.exit(3)",
        "if part == 'rollout':",
        "    p = subprocess.Popen(['sleep', '99'])",
    ]
    lines += ["    open(sys.argv[0] + '.pid', 'w').write(str(p.pid))", "    time.sleep(99)"]
    script.write_text("\n".join(lines))
    parts = {gpu.tests: 9, gpu.rollout: 1, gpu.machine: 9}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "__file__", str(script))
    found = found_by(gpu, monkeypatch, tmp_path)
    assert found["tests", "FAILED"] == "exit code 3"
    assert found["rollout", "FAILED"] == "took longer than 1 s"
    assert ("machine", "FAILED") not in found and found["machine", "seconds"] < 9
    state = Path("/proc", Path(f"{script}.pid").read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


def test_an_error_in_a_part_is_written_and_the_next_runs(gpu, monkeypatch, tmp_path):
    def machine(args):
        yield "first", 1
        raise ValueError("broken")

    parts = {machine: 1, gpu.estimate: 1}
    monkeypatch.setattr(gpu, "PARTS", parts)
    found = found_by(gpu, monkeypatch, tmp_path, "--part machine estimate")
    assert found["machine", "first"] == 1 and found["machine", "FAILED"] == "ValueError: broken"
    assert ("estimate", "update, in all: estimated (s)") in found


def test_the_gpu_benchmark_fits_into_eight_minutes_and_starts_itself(gpu, monkeypatch, tmp_path):
    assert sum(gpu.PARTS.values()) <= 480
    monkeypatch.setattr(gpu, "PARTS", {gpu.machine: 60})
    found = found_by(gpu, monkeypatch, tmp_path)
    assert found["machine", "torch"] == torch.__version__ and found["machine", "copy (GB/s)"] > 0


@pytest.mark.parametrize("size", ["tiny", "qwen3-tiny"])
def test_random_models_read_what_their_image_processor_cuts(gpu, size):
    vlm = gpu.random_vlm(size, "cpu", "float32")
    patches = vlm.patches(noise_image(100, 70))
    assert patches.pixels.shape[1] == vlm.model.model.visual.patch_embed.proj.weight[0].numel()
    assert encode_images(vlm.model.model.visual, patches.pixels, patches.grid)[0].isfinite().all()


def test_a_table_for_people():
    printed = run("rewards", *SMALLEST["rewards"].split())
    assert "ratio" in printed and "questions=20" in printed and not printed.startswith("{")


INSTALLED = {package.name for package in importlib.metadata.distributions()}  # not bench/trl.py


@pytest.mark.skipif("trl" not in INSTALLED, reason="TRL is in bench/requirements-trl.txt")
@pytest.mark.parametrize("flags", ["", "--trl-rows 4 --size qwen3-tiny", "--dtype bfloat16"])
def test_trl_and_ours_make_the_same_step(flags):
    """Given TRL's completions and rewards; TRL adds up the gradients of two batches, or has one.

    In bfloat16, ours is sharded and has float32 masters.
    """
    flags = f"{SMALL} --prompts 2 --repeats 1 --device cpu --dtype float32 {flags}"
    results = json.loads(run("trl", *flags.split(), "--json"))["results"]
    is_half = flags.endswith("bfloat16")
    near = 0.05 if is_half else 1e-5
    assert max(results[f"gradient{what}_difference"] for what in ("", "_norm")) < near
    if not is_half:
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


def test_the_questions_of_a_vote_share_one_image(gpu):
    """The same object, or nothing would be shared; the same words before it, others behind it."""
    rollout, shapes = importlib.import_module("rollout"), importlib.import_module("shapes")
    vlm = shapes.random_vlm("tiny", "cpu", "float32")
    prompts = rollout.ask_about(vlm, 0, SimpleNamespace(prompt_tokens=300, questions=3))
    first, *others = prompts
    behind = int(first.places[-1]) + 2
    assert len(first) == 300 and len(first) - behind == rollout.QUESTION
    for other in others:
        assert other.images[0] is first.images[0]
        assert torch.equal(other.ids[:behind], first.ids[:behind])
    assert len({tuple(prompt.ids.tolist()) for prompt in prompts}) == 3


WRONG = ["--device mps", "--group-size 0", "--dtype int8", "--prompt-tokens 5", "--repeats x"]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_get_a_sentence(gpu, wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rollout.py", *wrong.split()])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("rollout").main()
    assert stopped.value.code == 2 and wrong.split()[0] in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "machine", *wrong.split()])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2

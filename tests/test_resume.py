"""A run survives: kills at random moments, polite stops, full disks, a second process, other settings, lost
ranks.

Every run here is the toy on a folder of images. By default 4 kills, with `--thorough` 40.
"""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import noise_image
from conftest import ROOT, THOROUGH
from test_ranks import FORKS

import loop
from model import logprobs as logprobs_module
from model.vlm import VLM
from training import command
from training import run as run_module
from training import state as state_module
from training.settings import Settings

ARGS = "--images images --iterations 2 --questioner-steps 3 --reasoner-steps 3 --images-per-step 2".split()
ARGS += "--group-size 4 --answers 4 --candidates 12 --tau-low 0 --tau-high 1 --save-every 2".split()
ARGS += "--device cpu --name".split()
KILLS = 40 if THOROUGH else 4
ROLES = ("questioner", "reasoner")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "images").mkdir()
    for i in range(3):
        noise_image(60 + 30 * i, 90, i).save(folder / "images" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def child(folder, args):
    os.chdir(folder)
    torch.set_num_threads(1)
    with (
        open(folder / "err", "a") as err,
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(err),
    ):
        code = loop.main(args)
    sys.exit(code)


def launch(folder, *args):
    process = FORKS.Process(target=child, args=(folder, list(args)))
    process.start()
    return process


def outcome(folder):
    """All that a run has to give: records without timings, curated questions, weights, and what is left lying
    about."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in lines
    ]
    curated = [path.read_text() for path in sorted((folder / "curated").iterdir())]
    weights = [(folder / role / "model.safetensors").read_bytes() for role in ROLES]
    return records, curated, weights, sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(workplace):
    """A run that nothing disturbed, and the seconds it took."""
    launch(workplace, "--help").join()  # the first one waits for the imports
    start = time.time()
    process = launch(workplace, *ARGS, "whole")
    process.join()
    assert process.exitcode == 0, (workplace / "err").read_text()
    return outcome(workplace / "runs" / "whole"), time.time() - start


def place(folder):
    """The phase that the newest state is in."""
    states = sorted((folder / "state").glob("*.json")) if (folder / "state").exists() else []
    return json.loads(states[-1].read_text())["state"]["phase"] if states else "start"


def test_kills_at_random_moments(workplace, whole):
    """Killed again and again, the run goes on each time and ends as if nothing had happened; then the next
    run, until enough."""
    expected, seconds = whole
    rng, kills, phases, number = random.Random(0), 0, set(), 0
    while kills < KILLS:
        number += 1
        folder = workplace / "runs" / f"killed-{number}"
        while True:
            process = launch(workplace, *ARGS, folder.name)
            process.join(rng.uniform(0.2, 0.9) * seconds if kills < KILLS else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                phases.add(place(folder))
                continue
            assert process.exitcode == 0, (workplace / "err").read_text()
            break
        assert outcome(folder) == expected
    assert not THOROUGH or phases >= set(run_module.PHASES), phases


def test_kill_in_each_phase_with_lora(workplace):
    """kill -9 in all four phases, one after the other: adapters and all else end as if nothing had been."""
    args, results = ["--lora-rank", "4", "--lr", "1e-3", *ARGS], []
    for name, phases in (("lora", ()), ("lora-killed", run_module.PHASES)):
        folder = workplace / "runs" / name
        for phase in phases:
            process = launch(workplace, *args, name)
            while process.is_alive() and place(folder) != phase:
                time.sleep(0.01)
            assert process.is_alive(), f"it was over before {phase}"
            process.kill()
            process.join()
            assert place(folder) == phase
        process = launch(workplace, *args, name)
        process.join()
        assert process.exitcode == 0, (workplace / "err").read_text()
        adapters = [(folder / f"{role}-adapter" / "adapter_model.safetensors") for role in ROLES]
        results.append((outcome(folder), [path.read_bytes() for path in adapters]))
    assert results[0] == results[1]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_finishes_the_step_and_says_how_to_go_on(workplace, whole, signum):
    expected, seconds = whole
    name = f"stopped-{signum}"
    process = launch(workplace, *ARGS, name)
    while not (workplace / "runs" / name / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.kill(process.pid, signum)
    process.join()
    err = (workplace / "err").read_text()
    assert (
        process.exitcode == 1 and f"loop.py --resume runs/{name}" in err and "Traceback" not in err
    )
    process = launch(workplace, "--resume", f"runs/{name}")
    process.join()
    assert process.exitcode == 0 and outcome(workplace / "runs" / name) == expected


def test_a_second_process_is_refused(workplace, capsys):
    process = launch(workplace, *ARGS, "twice")
    while not (workplace / "runs" / "twice" / "metrics.jsonl").exists():
        time.sleep(0.05)
    assert (
        loop.main(["--resume", "runs/twice"]) == 2 and "another process" in capsys.readouterr().err
    )
    process.kill()
    process.join()


def test_a_config_of_other_types_is_refused(workplace, whole, capsys):
    folder = workplace / "runs" / "odd"
    folder.mkdir(parents=True)
    config = json.loads((workplace / "runs" / "whole" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"iterations": "two"}))
    assert loop.main(["--resume", "runs/odd", "--iterations", "3"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "its config.json cannot be read" in err


def test_a_notebook_resumes_with_the_settings_of_the_run(workplace, whole):
    run = command.prepare_run(Settings(resume="runs/whole"))
    assert run.settings.group_size == 4 and run.state.iteration == 3
    run.unlock()


def test_other_settings_are_refused(workplace, whole, capsys):
    assert loop.main([*ARGS, "whole", "--lr", "0.5"]) == 2
    err = capsys.readouterr().err
    assert "--lr 6e-05, not 0.5" in err and err.count("\n") == 1
    assert loop.main([*ARGS, "whole"]) == 0 and "is complete" in capsys.readouterr().out
    assert loop.main(["--resume", "runs/whole"]) == 0
    assert outcome(workplace / "runs" / "whole") == whole[0]


@pytest.mark.parametrize("write", range(1, 30, 4))
def test_a_full_disk_stops_the_run_and_leaves_it_usable(
    workplace, whole, monkeypatch, capsys, write
):
    """The nth write finds the disk full."""
    writes, name = [], f"full-{write}"

    def limited(function):
        def wrapped(*args, **named):
            writes.append(1)
            if len(writes) == write:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **named)

        return wrapped

    with monkeypatch.context() as patch:
        for module, function in ((state_module, "save_file"), (os, "fsync"), (VLM, "save")):
            patch.setattr(module, function, limited(getattr(module, function)))
        code = loop.main([*ARGS, name])
    err = capsys.readouterr().err
    assert code in (1, 2) and "No space left" in err and "Traceback" not in err
    process = launch(workplace, *ARGS, name)
    process.join()
    assert process.exitcode == 0 and outcome(workplace / "runs" / name) == whole[0]


def test_gradients_that_are_not_finite_stop_the_run(workplace, monkeypatch, capsys):
    logprobs = logprobs_module.token_logprobs
    monkeypatch.setattr(logprobs_module, "token_logprobs", lambda *a: logprobs(*a) * float("nan"))
    assert loop.main([*ARGS, "nan", "--questioner-steps", "9"]) == 1
    err = capsys.readouterr().err
    assert err.count("not finite; skipped") == 1 and "--lr" in err and "Traceback" not in err


def test_out_of_memory_is_survived_or_said(workplace, monkeypatch, capsys):
    """Rollouts and updates have their own tests; here the whole run goes on, or says what to do."""
    loss, calls = loop.grpo.grpo_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) in fails:
            raise torch.OutOfMemoryError("out of memory")
        return loss(*args)

    monkeypatch.setattr(loop.grpo, "grpo_loss", failing)
    fails = (2, 5)
    assert loop.main([*ARGS, "oom"]) == 0
    steps = (workplace / "runs" / "oom" / "metrics.jsonl").read_text()
    assert steps.count('"skipped": 0.0') == 12, "no step is lost"
    calls.clear()
    fails = range(1000)
    assert loop.main([*ARGS, "oom-always"]) == 1
    err = capsys.readouterr().err
    assert "--gradient-checkpointing" in err and "Traceback" not in err


def torchrun(workplace, ranks, name, *extra):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(ROOT / "loop.py"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *ARGS, name, *extra],
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def test_two_ranks_lose_one_and_one_goes_on(workplace):
    """Kill -9 of a rank ends the other with an error; its state goes on with one process, and ends."""
    process = torchrun(workplace, 2, "ranks", "--save-every", "1")
    folder = workplace / "runs" / "ranks"
    while process.poll() is None and place(folder) != "curation":
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "loop.py"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "SIGKILL" in output, output
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if r["phase"] == "questioner"][:2] == [1, 2]
    process = launch(workplace, "--resume", "runs/ranks")
    process.join()
    assert process.exitcode == 0, (workplace / "err").read_text()
    assert len(outcome(folder)[1]) == 2

"""The loop and its command line: whole iterations on real files, wrong input, and who may see the truth."""

import ast
import contextlib
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import noise_image, plain_inputs
from conftest import ROOT
from PIL import Image
from transformers import AutoModelForImageTextToText

import grpo
import loop
import questioner
from measure import truth as measure
from measure import watch
from model import checkpoint, forward
from model import generate as generate_module
from model import logprobs as logprobs_module
from model.vlm import VLM
from training import command, dry_run
from training import log as console
from training import run as run_module
from training.folder import read_examples
from training.settings import Settings, flag, parse_arguments

SMALL = "--iterations 1 --questioner-steps 2 --reasoner-steps 2 --images-per-step 2 --group-size 4".split()
SMALL += "--answers 4 --candidates 8 --device cpu".split()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in, and less to measure, which takes most of a tiny run's time."""
    monkeypatch.setattr(watch, "HELD_OUT_QUESTIONS", 64)
    monkeypatch.setattr(watch, "TYPICAL", 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(folder, phase=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if phase in (None, r["phase"])]


def image_folder(folder):
    """Real files of different sizes and modes, in a subfolder too, with some that cannot be used."""
    (folder / "sub").mkdir(parents=True)
    noise_image(100, 60).save(folder / "a.jpg")
    noise_image(33, 210, 1).convert("RGBA").save(folder / "sub" / "b.png")
    noise_image(300, 200, 2).convert("P").save(folder / "c.gif")
    noise_image(64, 64, 3).convert("L").save(folder / "d.webp")
    noise_image(20, 20, 4).convert("CMYK").save(folder / "e.tiff")
    (folder / "broken.jpg").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "sub" / "b.png").read_bytes()[:2000])
    return folder


# ---- A published layout, end to end ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen", "mimo", "qwen3", "qwen3-untied"])
def taught(request, tmp_path_factory):
    folder = checkpoints.publish(tmp_path_factory.mktemp("taught"), request.param)
    checkpoints.teach(folder, request.param)
    return folder


def test_a_published_checkpoint_on_a_folder_of_images(taught, workplace, capsys):
    images = image_folder(workplace / "images")
    args = [
        "--model",
        str(taught),
        "--images",
        str(images),
        "--name",
        "x",
        "--lr",
        "1e-3",
        "--max-new-tokens",
        "110",
        *SMALL,
        "--candidates",
        "16",
    ]
    assert loop.main(args) == 0
    run, err = workplace / "runs" / "x", capsys.readouterr().err
    assert "broken.jpg" in err and "Traceback" not in err

    steps = records(run, "questioner") + records(run, "reasoner")
    assert len(steps) == 4 and all(s["skipped"] == 0 and s["kl"] >= 0 for s in steps)
    wanted = {
        "reward",
        "kl",
        "clip_share",
        "grad_norm",
        "length",
        "tokens_per_second",
        "seconds",
        "validity",
        "confidence",
    }
    assert all(wanted <= s.keys() for s in steps)
    assert all({"r_unc", "r_div", "clusters"} <= s.keys() for s in records(run, "questioner"))
    assert records(run, "questioner")[0]["validity"] > 0, "a leading <think> block is allowed"

    curated = read_examples(run / "curated" / "iteration-1.jsonl")
    assert curated and all(
        0.25 <= e.confidence <= 0.75 and len(e.answers) in (4, 8) for e in curated
    )
    assert all(
        e.confidence == max(map(e.answers.count, e.answers)) / len(e.answers)
        and e.label in ("1", "2")
        for e in curated
    )
    assert all("broken" not in e.image and "cut" not in e.image for e in curated)

    for role in ("questioner", "reasoner"):
        vlm = VLM.load(run / role, "cpu", torch.float32)
        plain = AutoModelForImageTextToText.from_pretrained(run / role, dtype=torch.float32)
        inputs = plain_inputs(vlm.prompt("How many?", noise_image(90, 60)))
        with torch.no_grad():
            assert torch.equal(plain(**inputs).logits, vlm.model(**inputs).logits)
        base = VLM.load(taught, "cpu", torch.float32)
        assert any(
            not torch.equal(a, b) for a, b in zip(vlm.model.parameters(), base.model.parameters())
        ), "it was trained"


# ---- The toy -----------------------------------------------------------------------------------------------


def test_a_run_is_reproducible_and_resumes(workplace, capsys, monkeypatch):
    args = [a if a != "1" else "2" for a in SMALL] + ["--name"]
    assert loop.main([*args, "whole"]) == 0
    whole = capsys.readouterr().out
    assert "base" in whole and "checkpoints are in runs/whole" in whole and "\r" not in whole
    header, *rows = [
        line for line in whole.splitlines() if line.startswith((" ", "iteration greedy"))
    ][-4:]
    names = header.replace("|", " ").split()
    for line, measured in zip(rows, records(workplace / "runs" / "whole", "measure"), strict=True):
        ladder = line.replace("|", " ").split()[names.index("1-2") : names.index("7-9") + 1]
        assert ladder == [f"{share:.2f}" for share in measured["sampled_by_objects"].values()], line

    curate, calls = loop.curate_questions, []

    def interrupted(*rest):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return curate(*rest)

    monkeypatch.setattr(loop, "curate_questions", interrupted)
    assert loop.main([*args, "cut"]) == 1, "in the middle of the second iteration"
    assert "--resume runs/cut" in capsys.readouterr().err
    assert loop.main(["--resume", "runs/cut"]) == 0
    assert loop.main(["--resume", "runs/cut"]) == 0, "a complete run has nothing left to do"

    def timeless(folder):
        return [
            {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")}
            for r in records(folder)
        ]

    runs = workplace / "runs"
    assert timeless(runs / "whole") == timeless(runs / "cut")
    for role in ("questioner", "reasoner"):
        weights = [
            (runs / name / role / "model.safetensors").read_bytes() for name in ("whole", "cut")
        ]
        assert weights[0] == weights[1]


def test_the_anchor_holds_the_questioner_to_the_base(workplace, monkeypatch):
    """With --anchor-beta the KL of each Questioner phase is taken to the base, also of one that goes on after
    a stop; the Reasoner's to the start of its phase, as ever."""
    seen, add, update = [], grpo.add_reference, grpo.update

    def distance(reference):
        pairs = zip(reference.model.parameters(), base.model.parameters(), strict=True)
        return sum((a - b).abs().sum().item() for a, b in pairs)

    def add_reference(groups, reference, temperature):
        nonlocal base
        base = base or reference.copy()  # iteration 1 begins with it
        seen.append([distance(reference)])
        add(groups, reference, temperature)
        if stop and len(seen) == 6:
            raise KeyboardInterrupt

    def noted(policy, optimizer, groups, clip, beta, temperature):
        seen[-1].append(beta)
        return update(policy, optimizer, groups, clip, beta, temperature)

    monkeypatch.setattr(dry_run, "SCENES", 16)
    monkeypatch.setattr(watch, "HELD_OUT_QUESTIONS", 16)
    monkeypatch.setattr(watch, "PROBES", 2)
    monkeypatch.setattr(grpo, "add_reference", add_reference)
    monkeypatch.setattr(grpo, "update", noted)
    args = [*SMALL, "--iterations", "2", "--tau-low", "0", "--tau-high", "1", "--lr", "1e-3"]
    args += ["--save-every", "1", "--anchor-beta", "0.5", "--name"]
    # Stopped in the second step of the Questioner's second phase.
    base, stop = None, True
    assert loop.main([*args, "x"]) == 1
    stop = False
    del seen[5:]
    assert loop.main(["--resume", "runs/x"]) == 0
    # Two steps of each phase: Questioner, Reasoner, Questioner, Reasoner.
    assert [beta for _, beta in seen] == [0.5, 0.5, 0.01, 0.01] * 2
    distances = [distance for distance, _ in seen]
    assert distances[:6] == [0.0] * 6 and min(distances[6:]) > 0


def test_saving_memory_changes_no_number(workplace):
    """Checkpointed activations are the same numbers computed twice, offloaded masters the same numbers
    elsewhere."""
    for name, flags in (("plain", []), ("small", ["--gradient-checkpointing", "--offload"])):
        assert loop.main([*SMALL, "--name", name, *flags]) == 0
    timings = ("seconds", "tokens_per_second")
    plain, small = (
        [{k: v for k, v in r.items() if k not in timings} for r in records(workplace / "runs" / n)]
        for n in ("plain", "small")
    )
    assert plain == small
    for role in ("questioner", "reasoner"):
        a, b = (
            VLM.load(workplace / "runs" / n / role, "cpu", torch.float32).model.state_dict()
            for n in ("plain", "small")
        )
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_model_works_while_it_is_parked(workplace, monkeypatch, dtype):
    """On a GPU a model that does not work at the moment is on the CPU: each use must be while it is
    present."""
    roles, used, embed, park = [], set(), forward.embed, VLM.offload

    def parked(self):
        roles.append(self)
        park(self)

    def watched(model, *args):
        owner = [role for role in roles if role.model is model]
        assert not any(role.offloaded for role in owner)
        used.update(map(id, owner))
        return embed(model, *args)

    monkeypatch.setattr(VLM, "offload", parked)
    monkeypatch.setattr(logprobs_module, "embed", watched)
    monkeypatch.setattr(generate_module, "embed", watched)
    assert loop.main([*SMALL, "--name", "x", "--iterations", "2", "--dtype", dtype]) == 0
    assert len(used) >= 4 and all(role.offloaded for role in roles), (
        "two roles and their references"
    )


def test_training_never_sees_the_truth(workplace, monkeypatch):
    """Two runs alike but for the answerer, which in one knows only nonsense: everything but the measurements
    is equal."""
    import toy.answerer

    assert loop.main([*SMALL, "--name", "true"]) == 0
    understand = toy.answerer.understand

    def nonsense(question, scene):
        fact = understand(question, scene)
        return fact and dataclasses.replace(fact, answer="nonsense")

    monkeypatch.setattr(measure, "understand", nonsense)
    monkeypatch.setattr(toy.answerer, "understand", nonsense)
    truth, readers = measure.read_truth, []
    monkeypatch.setattr(
        measure, "read_truth", lambda folder: readers.append(folder) or truth(folder)
    )
    assert loop.main([*SMALL, "--name", "false"]) == 0
    assert readers, "the truth is read, by measure.truth alone"
    runs = workplace / "runs"
    assert (
        records(runs / "true", "measure")[-1]["sampled_accuracy"]
        > 0
        == records(runs / "false", "measure")[-1]["sampled_accuracy"]
    )
    for file in ("questioner/model.safetensors", "reasoner/model.safetensors"):
        assert (runs / "true" / file).read_bytes() == (runs / "false" / file).read_bytes()
    texts = [
        (runs / name / "curated" / "iteration-1.jsonl").read_text().replace("/true/", "/false/")
        for name in ("true", "false")
    ]
    assert texts[0] == texts[1]


def test_training_never_imports_the_answerer(workplace):
    """In a fresh process where importing it fails, a whole run on unlabelled images goes through."""
    image_folder(workplace / "images")
    code = "import sys; sys.modules['toy.answerer'] = sys.modules['measure.truth'] = None; import loop; "
    code += "sys.exit(loop.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--images", "images", *SMALL]
    done = subprocess.run(
        command,
        cwd=workplace,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    importers = {
        file.name
        for file in ROOT.glob("**/*.py")
        if ".venv" not in file.parts and "answerer" in _imports(file)
    }
    assert importers - {"test_loop.py", "test_toy.py"} == {
        "truth.py",
        "build.py",
        "experiments.py",
        "report.py",
    }


def _imports(file):
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            names |= {part for part in (node.module or "").split(".")} | {
                alias.name for alias in node.names
            }
    return names


# ---- What must be survived ---------------------------------------------------------------------------------


def test_failure_signatures_are_printed_and_written(workplace, monkeypatch, capsys):
    """Each phase is judged by the records it is about; here all are made to fire."""
    image_folder(workplace / "images")
    seen = {}

    def stagnant(r_unc):
        seen.setdefault("r_unc", r_unc)
        return "too easy"

    def collapse(first, now):
        seen.update(first=first, now=now)
        return "all alike"

    def language(*given):
        seen.setdefault("language", given)
        return "odd words"

    monkeypatch.setattr(watch.signatures, "stagnant_difficulty", stagnant)
    monkeypatch.setattr(watch.signatures, "question_collapse", collapse)
    monkeypatch.setattr(watch.signatures, "language_drift", language)
    args = [*SMALL, *"--iterations 2 --images images --tau-low 0 --tau-high 1 --name".split()]
    assert loop.main([*args, "x"]) == 0
    run, err = workplace / "runs" / "x", capsys.readouterr().err
    warnings = [(r["iteration"], r["signature"]) for r in records(run, "warning")]
    each = ["stagnant difficulty", "question collapse", "language drift"]
    assert warnings == [(k, signature) for k in (1, 2) for signature in each]
    assert "warning, language drift: odd words" in err
    asked = records(run, "questioner")
    assert seen["r_unc"] == [r["r_unc"] for r in asked[:2] if r["validity"]]
    assert (seen["first"], seen["now"]) == (asked[0], asked[-1])
    curation = records(run, "curation")[0]
    assert seen["language"] == (curation["atypical"], curation["curated"])
    assert 0 <= curation["atypical"] <= 1
    # How often majorities are the base's, by the files that a run leaves.
    base, now = (
        {(e.image, e.question): e.label for e in read_examples(run / "probes" / f"{name}.jsonl")}
        for name in ("base", "iteration-2")
    )
    same = [base[place] == label for place, label in now.items()]
    measured = records(run, "measure")[2]
    assert measured["base_agreement"] == pytest.approx(sum(same) / len(same), abs=1e-6)
    monkeypatch.undo(), monkeypatch.chdir(workplace)
    assert loop.main([*args, "y"]) == 0, "judged for real, without a truth"


def test_a_loop_of_ones_own_may_skip_the_first_measurement(workplace):
    s = parse_arguments("", [*SMALL, "--name", "x"])
    torch.set_num_threads(2)
    run = command.prepare_run(s)
    assert torch.get_num_threads() == 1, "the toy's numbers do not depend on the cores of a machine"
    run.state.phase, run.state.iteration = "questioner", 1
    loop.train_questioner(run.settings, run, 1, loop.Rules())
    loop.curate_questions(run.settings, run, 1, loop.Rules())
    assert records(run.folder, "curation")[0]["atypical"] is None


def test_settings_are_resolved_into_new_ones_and_the_checkpoint_is_opened_once(
    workplace, monkeypatch
):
    opened, really = [], command.open_checkpoint
    monkeypatch.setattr(
        command, "open_checkpoint", lambda name: opened.append(name) or really(name)
    )
    monkeypatch.setattr("model.vlm.open_checkpoint", None)
    s = parse_arguments("", [*SMALL, "--name", "x", "--max-pixels", "999999"])
    before = dataclasses.asdict(s)
    run = command.prepare_run(s)
    assert dataclasses.asdict(s) == before and len(opened) == 1
    changed = {
        name for name, value in dataclasses.asdict(run.settings).items() if value != before[name]
    }
    assert (
        changed <= {"dtype", "max_pixels", "questioner_prompt", "reasoner_prompt"}
        and run.settings.max_pixels < 999_999
    )
    assert run.settings.dtype == "float32" and run.questioner.image_size["longest_edge"] < 999_999


def test_the_base_agrees_with_itself(workplace):
    """A Reasoner that learns nothing gives the base's majorities again, but for the luck of the draw."""
    s = parse_arguments(
        "",
        [
            *SMALL,
            "--iterations",
            "1",
            "--candidates",
            "60",
            "--answers",
            "30",
            "--lr",
            "0",
            "--name",
            "x",
        ],
    )
    run = command.prepare_run(s)
    loop.visplay(s, run)
    assert records(run.folder, "measure")[-1]["base_agreement"] > 0.75


def test_invalid_questions_and_an_empty_curated_set(published, workplace, capsys):
    """A random model never writes a valid question: no reward, nothing to curate, and no harm."""
    image_folder(workplace / "images")
    args = [
        "--model",
        str(published),
        "--images",
        "images",
        "--name",
        "x",
        "--max-new-tokens",
        "8",
        *SMALL,
    ]
    assert loop.main(args) == 0
    out, err = capsys.readouterr()
    told = "step 1: all 8 outputs were no valid question (cut off "
    assert err.count("no valid question") == err.count(told) == 1 and "not trained" in err, err
    *_, first, second, third, last = out.splitlines()
    assert first == "The run is over, and not all went well:" and "done" not in last
    assert "all 16 outputs were no valid question" in second and "not one question was" in third
    run = workplace / "runs" / "x"
    assert [s["validity"] for s in records(run, "questioner")] == [0, 0] and records(
        run, "reasoner"
    ) == []
    assert all(s["equal_groups"] == 1 for s in records(run, "questioner"))
    assert read_examples(run / "curated" / "iteration-1.jsonl") == []
    vlm = VLM.load(run / "questioner", "cpu", torch.float32)
    assert all(torch.isfinite(p).all() for p in vlm.model.parameters())


def test_a_reward_that_is_no_number_names_its_function(workplace):
    def my_reward(voted, s):
        return [None] * len(voted)

    run = command.prepare_run(parse_arguments("", [*SMALL, "--name", "x"]))
    run.is_done = lambda k, phase: phase == "measure"
    with pytest.raises(ValueError, match="^my_reward returns the reward None: "):
        loop.visplay(run.settings, run, loop.Rules(question_reward=my_reward))


def test_equal_rewards_and_a_gradient_that_is_not_finite(workplace, monkeypatch, capsys):
    """Every answer gets the same reward, then every log-probability is NaN: the Reasoner ends with finite
    weights."""
    s = parse_arguments("", [*SMALL, "--name", "x"])
    run = command.prepare_run(s)
    before = [p.clone() for p in run.reasoner.model.parameters()]
    loop.visplay(s, run, loop.Rules(answer_reward=lambda answer, question: np.bool_(True)))
    steps = records(run.folder, "reasoner")
    assert steps and all(r["equal_groups"] == 1 and r["policy_loss"] == 0 for r in steps)

    logprobs = logprobs_module.token_logprobs
    monkeypatch.setattr(logprobs_module, "token_logprobs", lambda *a: logprobs(*a) * float("nan"))
    # One step each: three in a row would stop the run.
    s = dataclasses.replace(s, name="y", questioner_steps=1, reasoner_steps=1)
    run = command.prepare_run(s)
    loop.visplay(s, run)
    assert all(
        r["skipped"] == 1
        for r in records(run.folder, "reasoner") + records(run.folder, "questioner")
    )
    assert all(torch.equal(a, b) for a, b in zip(before, run.reasoner.model.parameters()))
    assert "not finite" in capsys.readouterr().err


def test_lost_images_are_left_out_and_never_end_a_run(workplace, capsys):
    """An image that is gone by the time it is needed again, as a probe or as a curated question, is
    listed."""
    image_folder(workplace / "images")
    flags = (
        "--images images --tau-low 0 --tau-high 1 --save-every 1 --name x --iterations 2".split()
    )
    curate_questions, gone = loop.curate_questions, workplace / "images" / "a.jpg"

    def loses(*rest):
        curate_questions(*rest)
        gone.unlink(missing_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "curate_questions", loses)
        assert loop.main([*SMALL, *flags]) == 0
    run = workplace / "runs" / "x"
    assert "a.jpg" in (run / "skipped.txt").read_text() and "a.jpg" in capsys.readouterr().err
    assert [r["iteration"] for r in records(run, "measure")] == [0, 1, 2]


def test_a_run_folder_can_move(workplace, monkeypatch):
    """Stopped in the Reasoner's phase, moved, and resumed from another folder: it ends as if nothing had
    happened."""
    assert loop.main([*SMALL, "--name", "whole"]) == 0
    train, stopped = loop.train_reasoner, []

    def stop(s, run, *rest):
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        train(s, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_reasoner", stop)
        assert loop.main([*SMALL, "--name", "cut"]) == 1
    (workplace / "elsewhere").mkdir()
    (workplace / "runs" / "cut").rename(workplace / "elsewhere" / "renamed")
    monkeypatch.chdir(workplace / "elsewhere")
    assert loop.main(["--resume", "renamed"]) == 0
    files = [workplace / "runs" / "whole", workplace / "elsewhere" / "renamed"]
    for name in ("reasoner/model.safetensors", "curated/iteration-1.jsonl"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_a_finished_run_goes_on_for_more_iterations(workplace, capsys):
    assert loop.main([*SMALL, "--name", "x"]) == 0
    more = [a if a != "1" else "2" for a in SMALL]
    assert loop.main([*more, "--name", "x"]) == 0, "the same name"
    assert loop.main(["--resume", "runs/x", "--iterations", "3"]) == 0
    assert [r["iteration"] for r in records(workplace / "runs" / "x", "measure")] == [0, 1, 2, 3]
    config = Path("runs/x/config.json").read_text()
    for fewer in ([*SMALL, "--name", "x"], ["--resume", "runs/x", "--iterations", "1"]):
        assert loop.main(fewer) == 2, "but not for fewer"
        assert (
            "--iterations" in capsys.readouterr().err
            and Path("runs/x/config.json").read_text() == config
        )


def test_what_a_researcher_changes(workplace):
    """The three functions are asked for every reward and for every candidate, and nothing else decides."""
    s = parse_arguments("", [*SMALL, "--name", "x"])
    run, seen = command.prepare_run(s), []

    def longest(votes, s):
        return [float(len(vote.question)) if vote else 0.0 for vote in votes]

    def how_many(example, s):
        return example.label is not None and example.question.startswith("How many")

    def soft(answer, example):
        seen.append(answer)
        return example.answers.count(answer) / len(example.answers)

    loop.visplay(s, run, loop.Rules(longest, how_many, soft))
    assert records(run.folder, "questioner")[0]["reward"] > 10 and seen
    candidates = read_examples(run.folder / "candidates" / "iteration-1.jsonl")
    curated = read_examples(run.folder / "curated" / "iteration-1.jsonl")
    assert len(curated) == sum(e.question.startswith("How many") for e in candidates) > 0


def test_changed_instructions_are_warned_of(workplace, monkeypatch, capsys):
    """When a run begins: this is all that is run of it here."""
    monkeypatch.setattr(loop, "measure", stop_here)
    assert loop.main([*SMALL, "--name", "x"]) == 1
    assert "other prompts" not in capsys.readouterr().err
    monkeypatch.setattr(loop.reasoner, "INSTRUCTION", loop.reasoner.INSTRUCTION + " Be brief.")
    assert loop.main([*SMALL, "--name", "y"]) == 1
    assert "other prompts" in capsys.readouterr().err


def stop_here(*_):
    raise KeyboardInterrupt


def test_a_toy_takes_the_settings_that_lie_beside_it(workplace):
    default = parse_arguments("", [])
    assert default == dataclasses.replace(
        parse_arguments("", ["--model", str(ROOT / "toy")]), model=None
    )
    assert default.max_new_tokens == 32 and parse_arguments("", ["--lr", "0.5"]).lr == 0.5
    shutil.copytree(
        ROOT / "toy", workplace / "mine", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    (workplace / "mine" / "visplay.json").write_text('{"settings": {"answers": 7}}')
    assert parse_arguments("", ["--model", "mine"]).answers == 7
    (workplace / "mine" / "visplay.json").write_text("no")
    with pytest.raises(SystemExit) as stop:
        parse_arguments("", ["--model", "mine"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "said",
    [
        "[1]",
        "null",
        '{"settings": null}',
        '{"settings": [1]}',
        '{"instructions": 5}',
        '{"settings": {"group_size": 8.5}}',
        '{"settings": {"answers": "7"}}',
        '{"settings": {"offload": 1}}',
        '{"settings": {"iterations": true}}',
        '{"settings": {"images": 3}}',
        '{"settings": {"colour": 3}}',
    ],
)
def test_what_lies_beside_a_checkpoint_may_be_anything(said, workplace, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(workplace))
    (workplace / "mine").mkdir()
    (workplace / "mine" / "visplay.json").write_text(said)
    for name in ("mine", "~/mine"):
        with pytest.raises(SystemExit) as stop:
            parse_arguments("", ["--model", name])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "args, said",
    [
        (["--answers", "1"], "--answers must be"),
        (
            ["--answers", "3", "--tau-low", "0.4", "--tau-high", "0.6"],
            "no share of 3 --answers lies between",
        ),
        (["--answers", "9" * 22], "--answers must be at most"),
        (["--max-new-tokens", "9" * 12], "--max-new-tokens must be at most"),
        (["--lora-rank", "100000"], "--lora-rank must be at most"),
    ],
)
def test_settings_with_which_nothing_can_be_learnt(args, said, workplace, capsys):
    with contextlib.suppress(SystemExit):
        assert loop.main([*SMALL, "--name", "x", *args]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not Path("runs").exists()


def test_too_little_memory_in_the_computer_is_a_sentence(workplace, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        )

    monkeypatch.setattr(command, "load_roles", full)
    assert loop.main([*SMALL, "--name", "x"]) == 1
    assert "error: the computer has too little memory" in capsys.readouterr().err
    assert loop.main([*SMALL, "--name", "x", "--dry-run"]) == 0
    assert "time     not measured: [enforce fail]" in capsys.readouterr().out
    monkeypatch.setattr(command, "load_roles", lambda *_: {}["a mistake"])
    for flags in ([], ["--dry-run"]):
        with pytest.raises(KeyError):
            loop.main([*SMALL, "--name", "x", *flags])


def test_a_run_of_something_that_is_no_plain_function_goes_on_with_its_program(
    workplace, monkeypatch, capsys
):
    mine = functools.partial(loop.visplay, rules=loop.Rules(keep=lambda question, s: True))
    monkeypatch.setattr(sys, "argv", ["somewhere/idea.py"])
    assert command.main(mine, "", [*SMALL, "--name", "x"]) == 0
    assert json.loads(Path("runs/x/config.json").read_text())["program"] == "idea.py"
    assert loop.main(["--resume", "runs/x", "--iterations", "2"]) == 2
    assert "was started by idea.py" in capsys.readouterr().err
    assert command.main(mine, "", ["--resume", "runs/x"]) == 0
    config = json.loads(Path("runs/x/config.json").read_text())
    del config["program"]  # as earlier versions wrote it
    Path("runs/x/config.json").write_text(json.dumps(config | {"answers": 1}))
    assert loop.main(["--resume", "runs/x"]) == 0


def test_a_lora_at_the_paper_s_learning_rate_is_told(workplace, capsys):
    for lr, told in (("1e-6", True), ("2e-5", False)):
        assert loop.main([*SMALL, "--name", "x", "--dry-run", "--lora-rank", "4", "--lr", lr]) == 0
        assert ("hardly moves" in capsys.readouterr().out) == told


def test_a_run_whose_state_is_gone_is_not_begun_again(workplace, capsys):
    assert loop.main([*SMALL, "--name", "x"]) == 0
    run = workplace / "runs" / "x"
    shutil.rmtree(run / "state")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for args in (
        ["--resume", "runs/x"],
        ["--resume", "runs/x", "--iterations", "2"],
        [*SMALL, "--name", "x"],
    ):
        assert loop.main(args) == 2
        assert "its state/ is gone" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_a_stop_in_the_last_moment_is_no_stop(workplace, monkeypatch, capsys):
    finish = run_module.Run.finish_iteration

    def stopped(self, k, probes):
        self.stopping = k == 1
        finish(self, k, probes)

    monkeypatch.setattr(run_module.Run, "finish_iteration", stopped)
    assert loop.main([*SMALL, "--name", "x"]) == 0
    assert "both checkpoints are in" in capsys.readouterr().out


def test_the_program_of_docs_your_own_idea(workplace, monkeypatch, capsys):
    """It runs with loop.py's flags, and goes on with nothing but itself."""
    text = (ROOT / "docs" / "your-own-idea.md").read_text()
    code = compile(text.split("```python\n")[1].split("```")[0], "somewhere/my_idea.py", "exec")

    def idea(*args):
        monkeypatch.setattr(sys, "argv", ["my_idea.py", *args])
        with pytest.raises(SystemExit) as end:
            exec(code, {"__name__": "__main__"})
        return end.value.code

    assert idea(*SMALL, "--name", "x") == 0
    asked = records(Path("runs/x"), "questioner")
    assert asked and all(record["reward"] * 8 % 1 == 0 for record in asked), (
        "of 2 x 4 questions, each 0 or 1"
    )
    for args in (["--resume", "runs/x", "--iterations", "2"], [*SMALL, "--name", "x"]):
        assert loop.main(args) == 2
        assert "was started by my_idea.py, not by loop.py" in capsys.readouterr().err
    assert idea("--resume", "runs/x") == 0 and "is complete" in capsys.readouterr().out


def test_help_and_a_wrong_flag_answer_at_once(workplace):
    """Before torch is imported: here its import would fail."""
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'loop.py'; "
    code += f"runpy.run_path({str(ROOT / 'loop.py')!r}, run_name='__main__')"
    for args, words in (
        (["--help"], "the loop"),
        (["--qustioner-steps", "3"], "did you mean --questioner-steps"),
        (["--lr", "-1"], "error: --lr must be a number of at least 0"),
        (["--tau-low", "0.9"], "error: --tau-low"),
        (
            ["--resume", "runs/x", "--iterations", "0"],
            "error: --iterations must be a number of at least 1",
        ),
    ):
        env = {"PYTHONPATH": str(ROOT), "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", code, *args], env=env, capture_output=True, text=True
        )
        assert words in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (0 if args == ["--help"] else 2)


def test_it_is_never_silent_for_long(workplace, monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENCE", 0.5)
    assert loop.main([*SMALL, "--name", "x"]) == 0
    assert "... iteration" in capsys.readouterr().err


LAPTOP = """
import os, shutil, sys
sys.modules["fcntl"] = None  # Windows has none
shutil._use_fd_functions = False
real = os.open
def files_only(path, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real(path, *rest, **named)
os.open = files_only
import loop
sys.exit(loop.main(sys.argv[1:]))
"""


def test_a_run_on_a_laptop_without_posix(workplace):
    """No fcntl, and folders that cannot be opened, as on Windows: a run, and one that goes on."""
    image_folder(workplace / "images")
    for args in (
        [*SMALL, *"--images images --name x --save-every 1".split()],
        ["--resume", "runs/x"],
    ):
        command = [sys.executable, "-c", LAPTOP, *args]
        env = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout and not list((workplace / "runs").rglob("*.old"))


def test_export_is_proven_at_the_start(published, workplace, capsys):
    """A source whose template is gone by the end would lose a run: it is said before the first step."""
    shutil.copytree(published, workplace / "m")
    image_folder(workplace / "images")
    save = checkpoint.exported_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint,
            "exported_files",
            lambda vlm: {k: v for k, v in save(vlm).items() if "token" not in k},
        )
        assert loop.main(["--model", "m", "--images", "images", "--name", "x", *SMALL]) == 2
    err = capsys.readouterr().err
    assert (
        "saved" in err
        and "Traceback" not in err
        and not (workplace / "runs" / "x" / "metrics.jsonl").exists()
    )


# ---- The command line --------------------------------------------------------------------------------------


def nothing(folder):
    return []


def no_checkpoint(folder):
    (folder / "m").mkdir()
    return ["--model", "m"]


def pickle_only(folder):
    shutil.copytree(
        ROOT / "toy", folder / "m", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    (folder / "m" / "model.safetensors").rename(folder / "m" / "pytorch_model.bin")
    return ["--model", "m"]


def other_architecture(folder):
    (folder / "m").mkdir()
    (folder / "m" / "config.json").write_text('{"model_type": "llama"}')
    return ["--model", "m"]


def no_images(folder):
    (folder / "i").mkdir()
    (folder / "i" / "x.png").write_text("no image")
    return ["--images", "i"]


def name_taken(folder):
    (folder / "runs" / "taken").mkdir(parents=True)
    (folder / "runs" / "taken" / "letter.txt").write_text("not of a run")
    return ["--name", "taken"]


ALONE = [  # nothing has to be there for these
    "--model ./nowhere",
    "--images nowhere",
    "--group-size 1",
    "--tau-low 0.8 --tau-high 0.3",
    "--tau-high 1.5",
    "--questioner-steps 0",
    "--reasoner-steps -3",
    "--iterations 0",
    "--lr nan",
    "--lr inf",
    "--lr x",
    "--temperature 0",
    "--top-p 0",
    "--device abacus",
    "--dtype int8",
    "--no-such-flag",
    "--resume nowhere",
    "--resume x --lr 1",
    "--beta nan",
    "--tau-low nan",
    "--seed 1000000",
    "--for h100",
    "--for a100 --images-per-step 8",
]
WRONG = [(args, nothing) for args in ALONE] + [
    ("", setup) for setup in (no_checkpoint, pickle_only, other_architecture, no_images, name_taken)
]


@pytest.mark.parametrize("args, setup", WRONG)
def test_wrong_input_gets_one_sentence_and_exit_code_2(args, setup, workplace, capsys):
    arguments = [*args.split(), *setup(workplace)]
    before = sorted(workplace.rglob("*"))
    try:
        code = loop.main(arguments)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and err.startswith("error: ") and "\n" not in err and len(err) < 400, err
    assert sorted(workplace.rglob("*")) == before, "nothing is left behind"


def test_a_missing_hub_model_gets_one_sentence(workplace):
    """In a process of its own, offline as this test machine is."""
    command = [sys.executable, str(ROOT / "loop.py"), "--model", "nobody/no-such-model"]
    env = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(workplace)}
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, "nothing is asked"
    assert "no-such-model" in done.stderr and done.stderr.endswith("HF_HUB_OFFLINE is set\n")


def test_every_hyper_parameter_is_a_flag_with_help_and_default(capsys):
    assert loop.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Settings):
        assert flag(field.name) + " " in text
        assert field.default in (None, False) or f"(default: {field.default}" in text, field.name
    for symbol in (
        "S_Q",
        "S_R",
        "paper's G",
        "paper's m",
        "paper's N",
        "tau_low",
        "tau_high",
        "lambda",
        "beta",
        "epsilon",
    ):
        assert symbol in text, symbol


def test_the_papers_values_are_the_defaults_for_a_real_model():
    s = parse_arguments("", ["--model", "Qwen/Qwen2.5-VL-3B-Instruct"])
    assert (s.iterations, s.group_size, s.answers, s.questioner_steps, s.reasoner_steps) == (
        3,
        8,
        10,
        20,
        20,
    )
    assert (s.tau_low, s.tau_high, s.diversity_weight) == (0.25, 0.75, 1.0)
    assert (s.lr, s.weight_decay, s.beta, s.clip, s.temperature, s.top_p) == (
        1e-6,
        1e-2,
        1e-2,
        0.2,
        1.0,
        0.99,
    )


@pytest.mark.parametrize("published", ["qwen", "mimo"], indirect=True)
def test_dry_run_of_a_real_size(published, workplace, capsys):
    """The published 3B shape: its weights are not there, and not needed."""
    shape = dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        vocab_size=151936,
    )
    shutil.copytree(published, workplace / "3b", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((workplace / "3b" / "config.json").read_text())
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048
    )
    config |= shape | dict(
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vision_config=config["vision_config"] | vision,
    )
    (workplace / "3b" / "config.json").write_text(json.dumps(config))
    image_folder(workplace / "images")
    assert (
        loop.main(["--model", "3b", "--images", "images", "--dry-run", "--dtype", "bfloat16"]) == 0
    )
    out = capsys.readouterr().out
    assert "3,754,622,976 parameters" in out, "the number of the published 3B checkpoint"
    assert "6 to use, 1 skipped" in out and "broken.jpg" in out and "memory" in out
    for part in ("AdamW's moments 27.9", "float32 masters 13.9", "questioner 6.99"):
        assert part in out, out
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize("published", ["qwen", "mimo"], indirect=True)
def test_without_images_scenes_suit_the_model(published, workplace, capsys):
    assert loop.main(["--dry-run", "--images-per-step", "1"]) == 0
    assert "84 x 84 pixels, 9 tokens" in capsys.readouterr().out
    config = json.loads((published / "preprocessor_config.json").read_text())
    shutil.copytree(published, workplace / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (workplace / "m" / "preprocessor_config.json").write_text(
        json.dumps(config | {"max_pixels": 12845056})
    )
    assert (
        loop.main(["--model", "m", "--dry-run"]) == 0
        and "336 x 336 pixels, 144 tokens" in capsys.readouterr().out
    )


def test_instructions_are_the_same_for_every_model(toy, random_vlm):
    for vlm in (toy, random_vlm):
        prompt = vlm.prompt(questioner.INSTRUCTION, Image.new("RGB", (60, 60)))
        assert questioner.INSTRUCTION in vlm.tokenizer.decode(prompt.ids)


def test_the_readmes_commands_are_understood():
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [
        line.split("python loop.py", 1)[1]
        for line in lines
        if line.startswith(("python loop.py", "pip install")) and "python loop.py" in line
    ]
    assert len(commands) >= 3
    for line in commands:
        parse_arguments("", line.split())

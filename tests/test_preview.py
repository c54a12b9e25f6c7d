"""What is said before a run begins: batches that fit, flags that help, and how long it takes."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import noise_image
from conftest import ROOT
from test_loop import SMALL, workplace  # noqa: F401 (a fixture)

import grpo
import loop
from model import logprobs, packing
from model import logprobs as logprobs_module
from model.checkpoint import open_checkpoint
from model.prompt import Picture
from model.sampling import Sampling
from training import command, folder, state
from training import dry_run as preview
from training import dry_run as rehearsal
from training import memory_plan as plan
from training import run as run_module
from training.distributed import Ranks
from training.dry_run import Rehearsal, describe, extrapolate, format_duration, rehearse
from training.policy import Trained
from training.settings import parse_arguments

sys.path.append(str(ROOT / "bench"))
from shapes import peak_extra_bytes, random_completions, random_prompt, random_vlm, shape_config  # noqa: E402

GIB = 2**30
WORK = plan.Work(1024, 100, 1024, 8, 1024, 10)
PLAIN = dict(checkpointing=False, offload=False, ranks=1, lora_rank=0, freeze_vision=False)


# ---- Batches that fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_scale", [1.0, 0.25])
def test_smaller_batches_take_what_is_planned_for_them(batch_scale, monkeypatch):
    """An update of eight groups at a share of the budgets, against the peak of its tensors; 15% at most."""
    for name in ("ROW_TOKENS", "BATCH_TOKENS", "BATCH_IMAGE_TOKENS"):
        monkeypatch.setattr(packing, name, 1600), monkeypatch.setattr(plan, name, 1600)
    vlm = random_vlm("small", "cpu", "float32")
    vlm.fallbacks.batch_scale = batch_scale
    groups = []
    for seed in range(8):
        prompt, completions = random_prompt(vlm, 150, seed), random_completions(vlm, 4, 40, seed)
        groups.append(grpo.make_group(prompt, completions, [0.0, 1.0, 0.0, 1.0]))
    policy = Trained(vlm, 1e-6, 0.0)
    grpo.add_reference(groups, vlm)
    grpo.backward(policy, groups)
    measured = peak_extra_bytes(lambda: grpo.backward(policy, groups), "cpu")
    work = plan.Work(prompt.image_tokens, len(prompt) - prompt.image_tokens, 40, 4, 8, 1)
    config = vlm.model.config
    sizes = plan.parameter_sizes(config)
    case = plan.Case(config, torch.float32, work, sizes, False, "cpu", batch_scale=batch_scale)
    planned = max(plan.batch_moments(case).values())
    assert planned == pytest.approx(measured, rel=0.15)
    assert planned <= max(plan.activation_moments(case).values())


def test_less_memory_means_smaller_batches():
    """3B with LoRA and without checkpointing: by the plan 43.8 GiB, less with smaller batches."""
    what, flags, shares = (shape_config("3b"), torch.bfloat16, WORK), PLAIN | dict(lora_rank=16), []
    for gib in (50, 40, 30, 20, 12):
        shares.append(plan.fit_batches(gib * GIB, *what, **flags))
        moments = plan.memory_plan(*what[:2], gib * GIB, WORK, **flags, batch_scale=shares[-1])
        fits = max(moment.total for moment in moments) <= 0.95 * gib * GIB
        assert fits == (gib > 12), gib
    assert shares == [1, 0.5, 0.5, 0.25, 1 / 64]
    assert plan.fit_batches(None, *what, **PLAIN) == 1


def test_all_token_budgets_shrink_together(monkeypatch):
    """Rows, batches, prefills and logits: fewer tokens at a time, and the same numbers."""
    vlm, sizes = random_vlm("small", "cpu", "float32"), []
    prompt, completions = random_prompt(vlm, 150, 0), random_completions(vlm, 4, 40, 0)
    whole = vlm.logprobs(prompt, completions)
    vlm.fallbacks.batch_scale = 1 / 64
    made = logprobs_module.TargetLogprobs.apply
    monkeypatch.setattr(
        logprobs_module.TargetLogprobs, "apply", lambda *a: (sizes.append(a[-1]), made(*a))[1]
    )
    for a, b in zip(whole, vlm.logprobs(prompt, completions)):
        assert torch.allclose(a, b, atol=1e-5)
    assert len(sizes) == 4, "each completion in a row of its own"
    assert max(sizes) <= logprobs.LOGITS["cpu"] / 64 / vlm.model.config.text_config.vocab_size


# ---- Flags that help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, gib, flags, says, proposes",
    [
        ("3b", 139, {}, "this fits", []),
        ("3b", 30, dict(lora_rank=16), "of 0.5 of the usual size", []),
        ("3b", 78, {}, "not even", ["--gradient-checkpointing", "--offload", "--lora-rank"]),
        ("3b", 22, {}, "not even", ["--gradient-checkpointing --offload", "--lora-rank"]),
        ("3b", 22, dict(checkpointing=True, offload=True), "this fits", []),
        ("7b", 22, {}, "not even", ["--gradient-checkpointing --offload"]),
        ("7b", 4, {}, "not even", []),
    ],
)
def test_advice(size, gib, flags, says, proposes):
    what, flags = (shape_config(size), torch.bfloat16, WORK), PLAIN | flags
    batch_scale = plan.fit_batches(gib * GIB, *what, **flags)
    config, dtype, work = what
    arguments = dict(config=config, dtype=dtype, work=work) | flags
    sentence = preview.advise(gib * GIB, batch_scale, arguments)
    assert says in sentence and all(p in sentence for p in proposes), sentence
    assert ("use" in sentence.split(":")[1].replace("usual", "")) == bool(proposes), sentence


# ---- How long ----------------------------------------------------------------------------------------------


def test_seconds_by_hand():
    s = parse_arguments("", ["--model", "x", "--images-per-step", "16", "--candidates", "100"])
    measured = Rehearsal(images=4, asking=2.0, answering=30.0, updating=8.0, valid=20)
    assert extrapolate(s, measured) == pytest.approx(
        dict(
            # 40 seconds for 4 images, 16 of them.
            questioner_step=160.0,
            # 32 / 4 seconds for the 8 questions of an image, 100 of them.
            curation=100.0,
            # 1.5 s for the 10 answers to a question, so 1.2 s for 8 of them, and 2 s of update; 16 questions.
            reasoner_step=51.2,
            iteration=20 * 160 + 100 + 20 * 51.2,
        )
    )
    text = describe(s, measured, 2)
    assert (
        "Questioner step takes about 80 s" in text
        and "an iteration 36 min, all 3 of them 108 min" in text
    )
    assert [format_duration(x) for x in (0.123, 3, 119, 121, 7300, 300_000)] == [
        *("0.1 s", "3 s", "119 s", "2 min", "2 h", "3 days")
    ]


def test_a_rehearsal_changes_nothing_and_doubles_its_images(toy, monkeypatch):
    s = parse_arguments("", ["--group-size", "2", "--answers", "2", "--max-new-tokens", "32"])
    run = SimpleNamespace(
        settings=s,
        questioner=toy.copy(),
        reasoner=toy.copy(),
        ranks=Ranks(),
        device=toy.device,
        sampling=Sampling(32),
        seeded=lambda place: None,
    )
    counts, step = [], rehearsal.time_step
    before = [p.clone() for p in run.questioner.model.parameters()]
    monkeypatch.setattr(rehearsal, "time_step", lambda *a: (counts.append(len(a[1])), step(*a))[1])
    monkeypatch.setattr(rehearsal, "ENOUGH", float("inf"))
    pictures = [Picture(str(i), noise_image(60, 60, i)) for i in range(3)]
    result = rehearse(run, pictures)
    assert counts == [1, 1, 2, 3] and result.images == 3
    assert min(result.asking, result.answering, result.updating) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.questioner.model.parameters()))
    counts.clear()
    monkeypatch.setattr(rehearsal, "ENOUGH", 0.0)
    assert rehearse(run, pictures).images == 1 and counts == [1, 1]


def test_a_dry_run_says_how_long(published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--images-per-step 2 --group-size 2 --answers 2 --max-new-tokens 32".split()
    assert loop.main(["--dry-run", *small]) == 0
    out = capsys.readouterr().out
    assert "time     from a step on 2 images: a Questioner step takes about" in out, out
    shutil.copytree(published, "m")
    for file in (tmp_path / "m").glob("*.safetensors*"):
        file.unlink()
    noise_image(60, 60).save("a.png")
    assert loop.main(["--dry-run", "--model", "m", "--images", "*.png", *small]) == 0
    assert "not measured: the weights are not on this machine yet" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"m", "a.png"}


# ---- The disk ----------------------------------------------------------------------------------------------


CASES = [("1", []), ("1", ["--lora-rank", "4"]), ("1", ["--freeze-vision", "--dtype", "bfloat16"])]


@pytest.mark.parametrize("every, more", [*CASES, ("9", [])])
def test_the_disk_is_planned_as_it_is_used(every, more, workplace, monkeypatch):  # noqa: F811
    """The most that states and exports ever take, looked at when a state is written and none deleted yet.

    Where less than two states are saved within a phase, the plan has room for one that Ctrl-C saves.
    """
    sizes, write, replace = [], state.write_state, folder.replace_folder

    def size() -> None:
        files = [f for f in Path("runs/x").rglob("*.safetensors") if f.is_file()]
        sizes.append(sum(f.stat().st_size for f in files))

    def replaced(path, writer) -> None:
        replace(path, lambda new: (writer(new), size()))

    monkeypatch.setattr(run_module, "write_state", lambda *a: (size(), write(*a)))
    monkeypatch.setattr(run_module, "replace_folder", replaced)
    flags = (
        SMALL
        + f"--iterations 2 --questioner-steps 4 --reasoner-steps 4 --save-every {every} --name x".split()
    )
    assert loop.main(flags + more) == 0
    s = parse_arguments("", flags + more)
    planned = preview.disk_plan(s, open_checkpoint(s.base_model).config)
    assert max(sizes) < 1.02 * planned.total, "2% for names and adapters"
    assert planned.total < (1.25 if every == "1" else 1.6) * max(sizes)


@pytest.mark.parametrize("more", [[], ["--lora-rank", "4"]])
def test_a_disk_that_is_too_small_is_known_at_the_start(more, workplace, monkeypatch, capsys):  # noqa: F811
    free = [1_000_000]
    usage = lambda path: shutil._ntuple_diskusage(10**9, 0, free[0])  # noqa: E731
    monkeypatch.setattr(preview.shutil, "disk_usage", usage)
    assert loop.main([*SMALL, "--name", "x", *more]) == 2
    error = capsys.readouterr().err
    assert "runs/x: the run takes up to 0.0" in error and "the disk has room for 0.0" in error
    assert "--lora-rank 16 or a higher --save-every may take less" in error
    assert not Path("runs").exists()
    assert loop.main([*SMALL, "--name", "x", "--dry-run", *more]) == 0
    assert "too LITTLE" in capsys.readouterr().out
    free[0] = 10**9
    assert loop.main([*SMALL, "--name", "x", *more]) == 0
    free[0] = 0  # what is planned is for a new run; one that goes on has most of it already
    assert loop.main(["--resume", "runs/x", "--iterations", "2"]) == 0


def test_the_disk_is_that_of_the_folder_itself(tmp_path, monkeypatch):
    asked = []
    usage = lambda path: (asked.append(path), shutil._ntuple_diskusage(0, 0, 0))[1]  # noqa: E731
    monkeypatch.setattr(preview.shutil, "disk_usage", usage)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    assert preview.free_disk(tmp_path / "x") == float("inf"), "a drive of size 0 says nothing"
    preview.free_disk(tmp_path / "not" / "there")
    assert asked == [tmp_path / "x", tmp_path]


# ---- The computer's memory ---------------------------------------------------------------------------------


def test_no_model_is_loaded_that_is_larger_than_the_memory(workplace, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(preview, "available_memory", lambda: 10_000_000)
    monkeypatch.setattr(command, "load_roles", None)
    assert loop.main([*SMALL, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "MORE than the 0.0 that are available" in said.partition("time     not measured: ")[2]
    monkeypatch.setattr(preview, "available_memory", lambda: None)
    monkeypatch.setattr(command, "rehearse", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(command, "load_roles", lambda *_: None)
    assert loop.main([*SMALL, "--dry-run"]) == 0
    assert "not measured: interrupted" in capsys.readouterr().out


def test_the_available_memory_is_between_what_is_free_and_what_there_is():
    free, there = (
        os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
    )
    assert 0.5 * free < preview.available_memory() < there

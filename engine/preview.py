"""What a run will do, printed before it begins: images, steps, and the memory of each moment on this machine.

Memory comes from the plan (plan.py). A GPU that is too small for the usual batches gets smaller ones, the
`budget`; one that is still too small is told which flags would help.
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from engine import plan
from engine.records import printable
from engine.run import Run
from engine.settings import MOST, Settings

SCENES = 512  # built-in scenes, if there are no other images
TEXT_TOKENS = 100  # of an instruction and a question, about
SLOW = 0.25  # below this share of the usual batches a step has many small forward passes
HELP = {  # flags that need less memory, those that change nothing else first
    "--gradient-checkpointing": dict(checkpointing=True),
    "--gradient-checkpointing --offload": dict(checkpointing=True, offload=True),
    "--gradient-checkpointing --lora-rank 16 --lr 2e-5": dict(checkpointing=True, lora_rank=16),
}


def budget(s: Settings, run: Run, config: PreTrainedConfig, device: torch.device) -> float:
    """The share of the token budgets that fits into the memory that is free (see `plan.fitting_budget`)."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return plan.fitting_budget(free, *of_plan(s, run, config), **memory_flags(s, run))


def of_plan(s: Settings, run: Run, config: PreTrainedConfig) -> tuple:
    """What the plan wants to know first: the model, what it computes in, and the work of a step."""
    questions = s.images_per_step * s.group_size
    tokens = image_tokens(s, run)
    work = plan.Work(tokens, TEXT_TOKENS, s.max_new_tokens, s.group_size, questions, s.answers)
    return config, getattr(torch, s.dtype), work


def memory_flags(s: Settings, run: Run) -> dict:
    """What the plan wants to know besides."""
    return dict(
        checkpointing=s.gradient_checkpointing,
        offload=s.offload,
        ranks=run.ranks.size,
        lora_rank=s.lora_rank,
        freeze_vision=s.freeze_vision,
    )


def image_tokens(s: Settings, run: Run) -> int:
    """Tokens of the largest image."""
    if s.images is None:
        return (run.scene_size // run.token_side) ** 2
    return s.max_pixels // run.token_side**2


def show(s: Settings, run: Run, config: PreTrainedConfig, device: torch.device, budget: float) -> None:
    """Prints it all. budget: the share of the token budgets that is used."""
    tokens = image_tokens(s, run)
    if s.images is None:
        size = run.scene_size
        print(f"images   {SCENES} built-in scenes of {size} x {size} pixels, {tokens} tokens each")
    else:
        found = run.images
        counts = f"{len(found.paths)} to use, {len(found.skipped)} skipped"
        print(f"images   {counts}, up to about {tokens} tokens each")
        for path, reason in found.skipped if s.dry_run else ():  # else the run names them when it starts
            print(f"         skipped {printable(path)}: {reason}")
    questions, size = s.images_per_step * s.group_size, sum(plan.parameter_sizes(config).values())
    where = f"torch.{s.dtype}, on {run.ranks.size} x {device}"
    print(f"model    {s.model or 'the toy'}: {size:,} parameters, {where}")
    phases = f"{s.questioner_steps} Questioner and {s.reasoner_steps} Reasoner steps"
    print(f"steps    {s.iterations} iterations of {phases}")
    print(f"         a Questioner step samples {questions} questions and {questions * s.answers} answers,")
    print(f"         a curation {s.candidates} questions and {s.candidates * s.answers} answers,")
    print(f"         and a Reasoner step up to {questions} answers")
    if s.lora_rank and s.lr < 1e-5:
        print(f"         --lr {s.lr:g} hardly moves the few weights of --lora-rank; 2e-5 is common")
    show_memory(s, run, config, device, budget)
    there, needed = room(run.folder), disk_plan(s, config)
    free = "" if there is None else f"; {there / 2**30:.2f} are free"
    verdict = ", too LITTLE" if there is not None and there < needed.total else ""
    print(f"disk     a new run takes at most {disk_sentence(needed)}{free}{verdict}")


def check_disk(s: Settings, run: Run, config: PreTrainedConfig) -> None:
    """Raises ValueError if a new run would fill the disk that its folder is on."""
    needed, there = disk_plan(s, config), room(run.folder)
    if run.ranks.any(run.number == 0 and there is not None and needed.total > there):
        why = f"the run takes up to {disk_sentence(needed)}, and the disk has room for {there / 2**30:.1f}"
        others = {"a higher --save-every": replace(s, save_every=MOST)}
        lower = {"a lower --lora-rank": replace(s, lora_rank=1)}
        others |= lower if s.lora_rank else {"--lora-rank 16": replace(s, lora_rank=16)}
        less = [name for name, other in others.items() if disk_plan(other, config).total < needed.total]
        raise ValueError(f"{run.folder}: {why}" + f"; {' or '.join(less)} takes less" * bool(less))


def disk_plan(s: Settings, config: PreTrainedConfig) -> plan.Moment:
    """What the run folder takes at most (see plan.py)."""
    stored = config.dtype or config.text_config.dtype or getattr(torch, s.dtype)
    saves = (max(s.questioner_steps, s.reasoner_steps) - 1) // s.save_every  # the last step ends the phase
    return plan.disk_plan(config, stored, saves, s.lora_rank, s.freeze_vision)


def disk_sentence(needed: plan.Moment) -> str:
    """Its size and its parts."""
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in needed.parts.items())
    return f"{needed.total / 2**30:.2f} GiB ({parts})"


def room(folder: Path) -> int | None:
    """Bytes that are free on the disk of a run's folder; None if nobody says, as on some network drives."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return None
    return usage.free if usage.total else None


def show_memory(s: Settings, run: Run, config: PreTrainedConfig, device: torch.device, budget: float) -> None:
    """Prints the memory of each moment, and on a GPU what to do about it."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    flags = memory_flags(s, run)
    first, dtype, work = of_plan(s, run, config)
    checkpointing, offload = flags.pop("checkpointing"), flags.pop("offload")
    moments = plan.memory_plan(first, dtype, total, work, checkpointing, offload, budget=budget, **flags)
    for moment in moments if s.dry_run else [max(moments, key=lambda moment: moment.total)]:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in moment.parts.items() if size)
        too_much = total is not None and moment.total >= total
        verdict = f"; MORE than the {total / 2**30:.0f} GiB of {device}" if too_much else ""
        print(f"memory   {moment.name}: {moment.total / 2**30:.2f} GiB ({parts}){verdict}")
    print(f"memory   {in_the_computer(s, run, config, device, budget)[1]}")
    if total is None:
        return
    free = torch.cuda.mem_get_info(device)[0]
    print(f"memory   {advice(free, budget, of_plan(s, run, config), memory_flags(s, run))}")


def in_the_computer(
    s: Settings, run: Run, config: PreTrainedConfig, device: torch.device, budget: float
) -> tuple[bool, str]:
    """Whether the computer has the memory that its processes of this run take, and a sentence about it."""
    (first, dtype, work), flags = of_plan(s, run, config), memory_flags(s, run)
    if device.type == "cuda":  # what waits there for the GPU
        needed = plan.host_plan(
            first, dtype, **{k: v for k, v in flags.items() if k != "checkpointing"}
        ).total
    else:
        needed = max(m.total for m in plan.memory_plan(first, dtype, None, work, **flags, budget=budget))
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun started here
    there = available_memory()
    sentence = f"in the computer: {needed / 2**30:.2f} GiB"
    if there is None:
        return True, sentence
    verdict = ", MORE than the" if needed > there else "; there are"
    return needed <= there, f"{sentence}{verdict} {there / 2**30:.1f} that are available"


def available_memory() -> int | None:
    """Bytes that processes can still have, by Linux; None where nothing says so."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def advice(free: int, budget: float, what: tuple, flags: dict) -> str:
    """Whether these flags suit a GPU with `free` bytes, and which suit it better.

    budget: the share of the token budgets that is used; what, flags: see `of_plan` and `memory_flags`.
    """

    def fits(flags: dict, budget: float) -> bool:
        moments = plan.memory_plan(*what[:2], free, what[2], **flags, budget=budget)
        return max(moment.total for moment in moments) <= plan.USABLE * free

    fitting = fits(flags, budget)
    if fitting and budget == 1:
        return f"{free / 2**30:.1f} GiB are free on the GPU: this fits"
    smaller = (
        f"with batches of {budget:g} of the usual size" if fitting else "not even with the smallest batches"
    )
    sentence = f"{free / 2**30:.1f} GiB are free on the GPU: this fits {smaller}"
    if fitting and budget >= SLOW:
        return sentence
    better = [text for text, more in HELP.items() if fits(flags | more, SLOW)]
    return sentence + (f"; use {' or '.join(better)}" if better else "")

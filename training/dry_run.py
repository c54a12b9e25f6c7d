"""The dry run: what would run, how much memory and disk it takes, and how long, measured on a few images."""

import gc
import math
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

import grpo
import questioner
import reasoner
from model.prompt import Picture
from training import estimate
from training import memory_plan as plan
from training.memory_plan import GIB
from training.policy import Trained
from training.run import Run
from training.settings import Settings, printable

SCENES = 512  # built-in scenes, if there are no other images
TEXT_TOKENS = 100  # of an instruction and a question, about
SLOW = 0.25  # with less than this fraction of the usual batch size a step has many small forward passes
ENOUGH = 10.0  # seconds: a step that takes longer is not tried with more images
HELP = {  # flags that need less memory, those that change nothing else first
    "--gradient-checkpointing": dict(checkpointing=True),
    "--gradient-checkpointing --offload": dict(checkpointing=True, offload=True),
    "--gradient-checkpointing --lora-rank 16 --lr 2e-5": dict(checkpointing=True, lora_rank=16),
}


def count_image_tokens(run: Run) -> int:
    """Counts the tokens of the largest image."""
    if run.settings.images is None:
        return (run.scene_size // run.checkpoint.token_side) ** 2
    return run.settings.max_pixels // run.checkpoint.token_side**2


def plan_arguments(run: Run) -> dict:
    """Returns what the functions of the plan take: the model, the work of a step, and flags."""
    s = run.settings
    work = plan.Work(
        image_tokens=count_image_tokens(run),
        text_tokens=TEXT_TOKENS,
        new_tokens=s.max_new_tokens,
        group_size=s.group_size,
        questions=s.images_per_step * s.group_size,
        answers=s.answers,
    )
    return dict(
        config=run.checkpoint.config,
        dtype=getattr(torch, s.dtype),
        work=work,
        checkpointing=s.gradient_checkpointing,
        offload=s.offload,
        ranks=run.ranks.size,
        lora_rank=s.lora_rank,
        freeze_vision=s.freeze_vision,
    )


def free_gpu_memory(device: torch.device) -> int | None:
    """Returns the bytes that are free on the GPU; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def fit_batches(run: Run) -> float:
    """Returns the fraction of the usual batch size that fits into the free memory, 1 on a CPU."""
    return plan.fit_batches(free_gpu_memory(run.device), **plan_arguments(run))


def show(run: Run) -> None:
    """Prints, on rank 0, what would run, and how much memory and disk it takes."""
    if not run.ranks.is_main:
        return
    show_images(run)
    # The model, and the steps of an iteration.
    s = run.settings
    size = sum(plan.parameter_sizes(run.checkpoint.config).values())
    questions = s.images_per_step * s.group_size
    where = f"torch.{s.dtype}, on {run.ranks.size} x {run.device}"
    print(f"model    {s.model or 'the toy'}: {size:,} parameters, {where}")
    phases = f"{s.questioner_steps} Questioner and {s.reasoner_steps} Reasoner steps"
    print(f"steps    {s.iterations} iterations of {phases}")
    print(
        f"         a Questioner step samples {questions} questions and {questions * s.answers} answers,"
    )
    print(f"         a curation {s.candidates} questions and {s.candidates * s.answers} answers,")
    print(f"         and a Reasoner step up to {questions} answers")
    if s.lora_rank and s.lr < 1e-5:
        print(f"         --lr {s.lr:g} hardly moves the few weights of --lora-rank; 2e-5 is common")
    show_memory(run)
    # The disk.
    needed = disk_plan(s, run.checkpoint.config)
    there = free_disk(run.folder)
    text = f"disk     a new run takes at most {needed}"
    if there < math.inf:
        text += f"; {there / GIB:.2f} are free"
        if there < needed.total:
            text += ", too LITTLE"
    print(text)


def show_images(run: Run) -> None:
    """Prints how many images there are, and, in a dry run, which are skipped."""
    tokens = count_image_tokens(run)
    if run.settings.images is None:
        size = f"{run.scene_size} x {run.scene_size} pixels"
        print(f"images   {SCENES} built-in scenes of {size}, {tokens} tokens each")
        return
    counts = f"{len(run.images.paths)} to use, {len(run.images.skipped)} skipped"
    print(f"images   {counts}, up to about {tokens} tokens each")
    if run.settings.model is None:
        print("         the toy asks about discs, rings and crosses, whatever they show")
    if run.settings.dry_run:  # else the run names them when it starts
        for path, reason in run.images.skipped:
            print(f"         skipped {printable(path)}: {reason}")


# ---- The disk ----------------------------------------------------------------------------------------------


def check_disk(run: Run) -> None:
    """Raises ValueError, on all ranks, if a new run would fill the disk that its folder is on."""
    needed = disk_plan(run.settings, run.checkpoint.config)
    there = min(run.ranks.all_gather([free_disk(run.folder)]))  # the least that a rank sees
    if run.number > 0 or needed.total <= there:
        return
    why = f"the run takes up to {needed}, and the disk has room for {there / GIB:.1f}"
    raise ValueError(f"{run.folder}: {why}; --lora-rank 16 or a higher --save-every may take less")


def disk_plan(s: Settings, config: PreTrainedConfig) -> plan.Moment:
    """Returns what the run folder takes at most, in bytes (see `memory_plan.disk_plan`)."""
    stored = config.dtype or config.text_config.dtype or getattr(torch, s.dtype)
    steps = max(s.questioner_steps, s.reasoner_steps)
    saves = (steps - 1) // s.save_every  # the last step ends the phase
    return plan.disk_plan(config, stored, saves, s.lora_rank, s.freeze_vision)


def free_disk(folder: Path) -> float:
    """Returns the bytes that are free on a folder's disk; infinity if nobody says, as on network drives."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


# ---- Memory ------------------------------------------------------------------------------------------------


def show_memory(run: Run) -> None:
    """Prints the memory of each moment (only the largest if this is no dry run), and what to do about it."""
    total = None
    if run.device.type == "cuda":
        total = torch.cuda.get_device_properties(run.device).total_memory
    arguments = plan_arguments(run)
    moments = plan.memory_plan(device_bytes=total, **arguments, batch_scale=run.batch_scale)
    if not run.settings.dry_run:
        moments = [max(moments, key=lambda moment: moment.total)]
    for moment in moments:
        text = f"memory   {moment.name}: {moment}"
        if total is not None and moment.total >= total:
            text += f"; MORE than the {total / GIB:.0f} GiB of {run.device}"
        print(text)
    print(f"memory   {check_host_memory(run)[1]}")
    free = free_gpu_memory(run.device)
    if free is not None:
        print(f"memory   {advise(free, run.batch_scale, arguments)}")


def check_host_memory(run: Run) -> tuple[bool, str]:
    """Returns true if the computer has the memory that its processes of this run take, and a sentence."""
    arguments = plan_arguments(run)
    if run.device.type == "cuda":  # what waits there for the GPU
        del arguments["work"], arguments["checkpointing"]
        needed = plan.host_plan(**arguments).total
    else:
        moments = plan.memory_plan(device_bytes=None, **arguments)
        needed = max(moment.total for moment in moments)
    needed += photograph_bytes(run)
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # processes that torchrun started here
    text = f"in the computer: {needed / GIB:.2f} GiB"
    there = available_memory()
    if there is None:
        return True, text
    verdict = ", MORE than the" if needed > there else "; there are"
    return needed <= there, f"{text}{verdict} {there / GIB:.1f} that are available"


def photograph_bytes(run: Run) -> int:
    """Returns the bytes of two steps of images of a process: the next one's are made meanwhile."""
    images = 2 * math.ceil(run.settings.images_per_step / run.ranks.size)
    return images * plan.patches_bytes(run.checkpoint.config, count_image_tokens(run))


def available_memory() -> int | None:
    """Returns the bytes that processes can still have, by Linux; None where nothing says so.

    A container has limits of its own, of which the kernel's MemAvailable knows nothing.
    """
    there = free_in_containers()
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        text = ""
    if found := re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE):
        there.append(int(found[1]) * 1024)
    return min(there, default=None)


def free_in_containers(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Returns what the memory limits of this process's control groups leave, in bytes, by cgroup v1 or v2.

    own: a line for each hierarchy, "0::/a/b" of v2 and "5:memory:/a/b" of v1. The limits of /a/b, /a and /
    all count. Inside a container they are often mounted as if /a/b were /.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        mount = groups / "memory" if kinds else groups
        names = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            limit, used = (_read_number(mount / folder / f"memory.{name}") for name in names)
            if limit is not None:
                free.append(max(0, limit - (used or 0)))
    return free


def _read_number(path: Path) -> int | None:
    """Reads the number in a file; None if there is none, or the word "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def advise(free: int, batch_scale: float, arguments: dict) -> str:
    """Says if these flags suit a GPU with `free` bytes, and which suit it better.

    batch_scale: fraction of the usual batch size; arguments: see `plan_arguments`.
    """
    text = f"{free / GIB:.1f} GiB are free on the GPU: this fits"
    fits = plan.fits(free, **arguments, batch_scale=batch_scale)
    if not fits:
        text += " not even with the smallest batches"
    elif batch_scale < 1:
        text += f" with batches of {batch_scale:g} of the usual size"
    if fits and batch_scale >= SLOW:
        return text
    better = [
        words
        for words, more in HELP.items()
        if plan.fits(free, **arguments | more, batch_scale=SLOW)
    ]
    return f"{text}; use {' or '.join(better)}" if better else text


# ---- Time --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsal:
    """A Questioner step on a few images, timed: its parts in seconds, and how many questions were valid."""

    images: int
    asking: float
    answering: float
    updating: float
    valid: int


def extrapolate(s: Settings, rehearsal: Rehearsal) -> dict[str, float]:
    """Returns the seconds of the steps of a run and of an iteration, without what is measured at its end.

    A curation asks one question an image. A Reasoner step samples G answers to a question; m were timed.
    """
    asking = rehearsal.asking / rehearsal.images
    answering = rehearsal.answering / rehearsal.images
    updating = rehearsal.updating / rehearsal.images
    questioner_step = (asking + answering + updating) * s.images_per_step
    curation = (asking + answering) / s.group_size * s.candidates
    a_vote = rehearsal.answering / max(1, rehearsal.valid)
    reasoner_step = (a_vote * s.group_size / s.answers + updating) * s.images_per_step
    steps = s.questioner_steps * questioner_step + s.reasoner_steps * reasoner_step
    return dict(
        questioner_step=questioner_step,
        curation=curation,
        reasoner_step=reasoner_step,
        iteration=steps + curation,
    )


def rehearse(run: Run, pictures: list[Picture]) -> Rehearsal:
    """Doubles the images until a step takes ENOUGH seconds, or all pictures of a rank are used."""
    time_step(run, pictures[:1])  # kernels are loaded, CUDA graphs captured
    count = 1
    while True:
        rehearsal = time_step(run, pictures[:count])
        seconds = rehearsal.asking + rehearsal.answering + rehearsal.updating
        if run.ranks.any(seconds >= ENOUGH or count >= len(pictures)):
            return rehearsal
        count *= 2


def time_step(run: Run, pictures: list[Picture]) -> Rehearsal:
    """Times a Questioner step; both roles are left as before."""
    s = run.settings
    run.generator = run.seeded("rehearsal")
    # Asking and answering.
    start = read_clock(run.device)
    asked = questioner.ask(
        run.questioner, pictures, s.group_size, run.sampling, s.questioner_prompt
    )
    asked_at = read_clock(run.device)
    votes = reasoner.vote(run.reasoner, asked, s.answers, run.sampling, s.reasoner_prompt)
    answered_at = read_clock(run.device)
    # An update, of rewards that differ, so that there is a gradient.
    rewards = [float(i % 2) for i in range(s.group_size)]
    groups = [each.completions for each in asked]
    grpo.set_rewards(groups, [rewards] * len(groups))
    policy = Trained(
        run.questioner.copy(),
        s.lr,
        s.weight_decay,
        s.offload,
        s.gradient_checkpointing,
        run.ranks,
    )
    ready_at = read_clock(run.device)  # what came before is done once a phase, not in each step
    grpo.add_reference(groups, run.reasoner, s.temperature)
    grpo.update(policy, policy.optimizer, groups, s.clip, s.beta, s.temperature)
    updated_at = read_clock(run.device)
    del policy
    gc.collect()  # the masters go, whose modules refer to one another
    return Rehearsal(
        images=len(pictures),
        asking=asked_at - start,
        answering=answered_at - asked_at,
        updating=updated_at - ready_at,
        valid=sum(vote is not None for group in votes for vote in group),
    )


def read_clock(device: torch.device) -> float:
    """Returns seconds, when the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def describe(s: Settings, rehearsal: Rehearsal, ranks: int) -> str:
    """Says how long the steps of a run on `ranks` processes take, and the whole run."""
    seconds = {name: value / ranks for name, value in extrapolate(s, rehearsal).items()}
    told = f"from a step on {rehearsal.images} images: {describe_seconds(s, seconds)}"
    left_out = "measuring" if rehearsal.valid else "measuring and answers (no question was valid)"
    return f"{told}, {left_out} not counted"


def describe_seconds(s: Settings, seconds: dict[str, float]) -> str:
    """Says how long steps, an iteration and the whole run take. seconds: as of `extrapolate`."""
    whole = seconds["iteration"] * s.iterations
    times = {name: format_duration(value) for name, value in seconds.items()}
    return (
        f"a Questioner step takes about {times['questioner_step']}, a curation {times['curation']}, "
        f"a Reasoner step {times['reasoner_step']}; an iteration {times['iteration']}, "
        f"all {s.iterations} of them {format_duration(whole)}"
    )


def show_estimate(run: Run) -> None:
    """Prints how long steps would take on the GPU of --for."""
    s = run.settings
    if s.for_ is None or not run.ranks.is_main:
        return
    work = plan_arguments(run)["work"]
    case = estimate.Case(run.checkpoint.config, s, work, estimate.CARDS[s.for_])
    told = describe_seconds(s, estimate.estimate(case)["seconds"])
    print(f"time     an estimate for one {s.for_.upper()}, not measured: {told}")


def format_duration(seconds: float) -> str:
    """Writes seconds in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"

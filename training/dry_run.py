"""The dry run: what would run, how much memory and disk it takes, and how long, measured on a few images."""

import gc
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

import grpo
import questioner
import reasoner
from model.checkpoint import Checkpoint
from model.prompt import Picture
from model.sampling import Sampling
from model.vlm import VLM
from training import estimate
from training import memory_plan as plan
from training.distributed import Ranks
from training.memory_plan import GIB
from training.policy import Trained
from training.run import Run
from training.settings import MOST, Settings, printable

SCENES = 512  # built-in scenes, if there are no other images
TEXT_TOKENS = 100  # of an instruction and a question, about
SLOW = 0.25  # with less than this fraction of the usual batch size a step has many small forward passes
ENOUGH = 10.0  # seconds: a step that takes longer is not tried with more images
HELP = {  # flags that need less memory, those that change nothing else first
    "--gradient-checkpointing": dict(checkpointing=True),
    "--gradient-checkpointing --offload": dict(checkpointing=True, offload=True),
    "--gradient-checkpointing --lora-rank 16 --lr 2e-5": dict(checkpointing=True, lora_rank=16),
}


@dataclass(frozen=True)
class Setup:
    """A run that is checked and may begin: with which model, where, and in batches of which size."""

    run: Run
    checkpoint: Checkpoint
    device: torch.device
    batch_scale: float = 1.0  # fraction of the usual batch size

    @property
    def image_tokens(self) -> int:
        """Counts the tokens of the largest image."""
        run = self.run
        if run.settings.images is None:
            return (run.scene_size // run.token_side) ** 2
        return run.settings.max_pixels // run.token_side**2

    @property
    def plan_inputs(self) -> tuple[PreTrainedConfig, torch.dtype, plan.Work]:
        """Returns the model, what it computes in, and the work of a step, for the functions of the plan."""
        s = self.run.settings
        work = plan.Work(
            image_tokens=self.image_tokens,
            text_tokens=TEXT_TOKENS,
            new_tokens=s.max_new_tokens,
            group_size=s.group_size,
            questions=s.images_per_step * s.group_size,
            answers=s.answers,
        )
        return self.checkpoint.config, getattr(torch, s.dtype), work

    @property
    def plan_flags(self) -> dict:
        """Returns the flags that the functions of the plan take besides."""
        s = self.run.settings
        return dict(
            checkpointing=s.gradient_checkpointing,
            offload=s.offload,
            ranks=self.run.ranks.size,
            lora_rank=s.lora_rank,
            freeze_vision=s.freeze_vision,
        )

    @property
    def free_gpu_memory(self) -> int | None:
        """Returns the bytes that are free on the GPU; None on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None


def fit_batches(setup: Setup) -> float:
    """Returns the fraction of the usual batch size that fits into the free memory, 1 on a CPU."""
    return plan.fit_batches(setup.free_gpu_memory, *setup.plan_inputs, **setup.plan_flags)


def show(setup: Setup) -> None:
    """Prints, on rank 0, what would run, and how much memory and disk it takes."""
    run = setup.run
    if not run.ranks.is_main:
        return
    show_images(setup)
    # The model, and the steps of an iteration.
    s = run.settings
    size = sum(plan.parameter_sizes(setup.checkpoint.config).values())
    questions = s.images_per_step * s.group_size
    where = f"torch.{s.dtype}, on {run.ranks.size} x {setup.device}"
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
    show_memory(setup)
    # The disk.
    needed = disk_plan(s, setup.checkpoint.config)
    there = free_disk(run.folder)
    text = f"disk     a new run takes at most {needed}"
    if there is not None:
        text += f"; {there / GIB:.2f} are free"
        if there < needed.total:
            text += ", too LITTLE"
    print(text)


def show_images(setup: Setup) -> None:
    """Prints how many images there are, and, in a dry run, which are skipped."""
    run = setup.run
    if run.settings.images is None:
        size = f"{run.scene_size} x {run.scene_size} pixels"
        print(f"images   {SCENES} built-in scenes of {size}, {setup.image_tokens} tokens each")
        return
    counts = f"{len(run.images.paths)} to use, {len(run.images.skipped)} skipped"
    print(f"images   {counts}, up to about {setup.image_tokens} tokens each")
    if run.settings.model is None:
        print("         the toy asks about discs, rings and crosses, whatever they show")
    if run.settings.dry_run:  # else the run names them when it starts
        for path, reason in run.images.skipped:
            print(f"         skipped {printable(path)}: {reason}")


# ---- The disk ----------------------------------------------------------------------------------------------


def check_disk(setup: Setup) -> None:
    """Raises ValueError, on all ranks, if a new run would fill the disk that its folder is on."""
    run = setup.run
    s = run.settings
    needed = disk_plan(s, setup.checkpoint.config)
    # The least that a rank sees; a network drive may not say.
    seen = [free for free in run.ranks.all_gather([free_disk(run.folder)]) if free is not None]
    if run.number > 0 or not seen or needed.total <= min(seen):
        return
    there = min(seen)
    # Settings with which it takes less.
    others = {"a higher --save-every": replace(s, save_every=MOST)}
    if s.lora_rank:
        others["a lower --lora-rank"] = replace(s, lora_rank=1)
    else:
        others["--lora-rank 16"] = replace(s, lora_rank=16)
    sizes = {name: disk_plan(each, setup.checkpoint.config).total for name, each in others.items()}
    less = [name for name, size in sizes.items() if size < needed.total]
    why = f"the run takes up to {needed}, and the disk has room for {there / GIB:.1f}"
    if less:
        why += f"; {' or '.join(less)} takes less"
    raise ValueError(f"{run.folder}: {why}")


def disk_plan(s: Settings, config: PreTrainedConfig) -> plan.Moment:
    """Returns what the run folder takes at most, in bytes (see `memory_plan.disk_plan`)."""
    stored = config.dtype or config.text_config.dtype or getattr(torch, s.dtype)
    steps = max(s.questioner_steps, s.reasoner_steps)
    saves = (steps - 1) // s.save_every  # the last step ends the phase
    return plan.disk_plan(config, stored, saves, s.lora_rank, s.freeze_vision)


def free_disk(folder: Path) -> int | None:
    """Returns the bytes that are free on a folder's disk; None if nobody says, as on some network drives."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return None
    return usage.free if usage.total else None


# ---- Memory ------------------------------------------------------------------------------------------------


def show_memory(setup: Setup) -> None:
    """Prints the memory of each moment (only the largest if this is no dry run), and what to do about it."""
    total = None
    if setup.device.type == "cuda":
        total = torch.cuda.get_device_properties(setup.device).total_memory
    config, dtype, work = setup.plan_inputs
    moments = plan.memory_plan(
        config, dtype, total, work, **setup.plan_flags, batch_scale=setup.batch_scale
    )
    if not setup.run.settings.dry_run:
        moments = [max(moments, key=lambda moment: moment.total)]
    for moment in moments:
        text = f"memory   {moment.name}: {moment}"
        if total is not None and moment.total >= total:
            text += f"; MORE than the {total / GIB:.0f} GiB of {setup.device}"
        print(text)
    print(f"memory   {check_host_memory(setup)[1]}")
    free = setup.free_gpu_memory
    if free is not None:
        print(f"memory   {advise(free, setup.batch_scale, setup.plan_inputs, setup.plan_flags)}")


def check_host_memory(setup: Setup) -> tuple[bool, str]:
    """Returns true if the computer has the memory that its processes of this run take, and a sentence."""
    config, dtype, work = setup.plan_inputs
    flags = setup.plan_flags
    if setup.device.type == "cuda":  # what waits there for the GPU
        del flags["checkpointing"]
        needed = plan.host_plan(config, dtype, **flags).total
    else:
        moments = plan.memory_plan(
            config, dtype, None, work, **flags, batch_scale=setup.batch_scale
        )
        needed = max(moment.total for moment in moments)
    needed += photograph_bytes(setup)
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # processes that torchrun started here
    text = f"in the computer: {needed / GIB:.2f} GiB"
    there = available_memory()
    if there is None:
        return True, text
    verdict = ", MORE than the" if needed > there else "; there are"
    return needed <= there, f"{text}{verdict} {there / GIB:.1f} that are available"


def photograph_bytes(setup: Setup) -> int:
    """Returns the bytes of two steps of images of a process: the next one's are made meanwhile."""
    images = 2 * math.ceil(setup.run.settings.images_per_step / setup.run.ranks.size)
    return images * plan.patches_bytes(setup.checkpoint.config, setup.image_tokens)


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


def advise(free: int, batch_scale: float, inputs: tuple, flags: dict) -> str:
    """Says if these flags suit a GPU with `free` bytes, and which suit it better.

    batch_scale: fraction of the usual batch size; inputs, flags: see `Setup`.
    """

    def fits(flags: dict, batch_scale: float) -> bool:
        return plan.fits(free, *inputs, **flags, batch_scale=batch_scale)

    text = f"{free / GIB:.1f} GiB are free on the GPU: this fits"
    if not fits(flags, batch_scale):
        text += " not even with the smallest batches"
    elif batch_scale >= 1:
        return text
    else:
        text += f" with batches of {batch_scale:g} of the usual size"
        if batch_scale >= SLOW:
            return text
    better = [words for words, more in HELP.items() if fits(flags | more, SLOW)]
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

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.asking + self.answering + self.updating

    def questioner_step(self, s: Settings) -> float:
        """Seconds of a Questioner step."""
        return self.total * s.images_per_step / self.images

    def curation(self, s: Settings) -> float:
        """Seconds of a curation: a question an image."""
        return (self.asking + self.answering) / s.group_size * s.candidates / self.images

    def reasoner_step(self, s: Settings) -> float:
        """Seconds of a Reasoner step: G answers to each of its questions, of which m were timed."""
        answering = self.answering / max(1, self.valid) * s.group_size / s.answers
        return (answering + self.updating / self.images) * s.images_per_step

    def iteration(self, s: Settings) -> float:
        """Seconds of an iteration, without what is measured at its end."""
        steps = s.questioner_steps * self.questioner_step(s)
        steps += s.reasoner_steps * self.reasoner_step(s)
        return steps + self.curation(s)


def rehearse(
    s: Settings, roles: tuple[VLM, VLM], pictures: list[Picture], ranks: Ranks
) -> Rehearsal:
    """Doubles the images until a step takes ENOUGH seconds, or all pictures of a rank are used."""
    time_step(s, roles, pictures[:1], ranks)  # kernels are loaded, CUDA graphs captured
    count = 1
    while True:
        rehearsal = time_step(s, roles, pictures[:count], ranks)
        if ranks.any(rehearsal.total >= ENOUGH or count >= len(pictures)):
            return rehearsal
        count *= 2


def time_step(
    s: Settings, roles: tuple[VLM, VLM], pictures: list[Picture], ranks: Ranks
) -> Rehearsal:
    """Times a Questioner step; both roles are left as before."""
    device = roles[0].device
    sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p)
    generator = torch.Generator(device).manual_seed(s.seed)
    # Asking and answering.
    times = [read_clock(device)]
    asked = questioner.ask(roles[0], pictures, s.group_size, sampling, generator)
    times.append(read_clock(device))
    votes = reasoner.vote(roles[1], asked, s.answers, sampling, generator)
    times.append(read_clock(device))
    # An update, of rewards that differ, so that there is a gradient.
    rewards = [float(i % 2) for i in range(s.group_size)]
    groups = [each.completions for each in asked]
    grpo.set_rewards(groups, [rewards] * len(groups))
    trained = Trained(
        roles[0].copy(), s.lr, s.weight_decay, s.offload, s.gradient_checkpointing, ranks
    )
    times.append(read_clock(device))  # what came before is done once a phase, not in each step
    grpo.add_reference(groups, roles[1], s.temperature)
    grpo.update(trained, trained.optimizer, groups, s.clip, s.beta, s.temperature)
    times.append(read_clock(device))
    del trained
    gc.collect()  # the masters go, whose modules refer to one another
    valid = sum(vote is not None for group in votes for vote in group)
    return Rehearsal(
        images=len(pictures),
        asking=times[1] - times[0],
        answering=times[2] - times[1],
        updating=times[4] - times[3],
        valid=valid,
    )


def read_clock(device: torch.device) -> float:
    """Returns seconds, when the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def describe(s: Settings, rehearsal: Rehearsal, ranks: int) -> str:
    """Says how long the steps of a run on `ranks` processes take, and the whole run."""
    steps = [rehearsal.questioner_step(s), rehearsal.curation(s), rehearsal.reasoner_step(s)]
    one, two, three = (format_duration(seconds / ranks) for seconds in steps)
    text = f"from a step on {rehearsal.images} images: a Questioner step takes about {one}, a curation {two}"
    if not rehearsal.valid:
        return f"{text}; no question was valid, so that how long answers take is not known"
    whole = rehearsal.iteration(s) / ranks
    text += f", a Reasoner step {three}; an iteration {format_duration(whole)}, all {s.iterations} of them"
    return f"{text} {format_duration(whole * s.iterations)}, measuring not counted"


def show_estimate(setup: Setup) -> None:
    """Prints how long steps would take on the GPU of --for, or on the one here if it is a known one."""
    s = setup.run.settings
    here = torch.cuda.get_device_name(setup.device).lower() if setup.device.type == "cuda" else ""
    card = s.for_ or next((name for name in estimate.CARDS if name in here), None)
    if card is None or not setup.run.ranks.is_main:
        return
    config, _, work = setup.plan_inputs
    found = estimate.estimate(estimate.Case(config, s, work, estimate.CARDS[card]))["seconds"]
    names = ("questioner_step", "curation", "reasoner_step", "iteration")
    one, two, three, whole = (format_duration(found[name]) for name in names)
    print(
        f"time     an estimate for one {card.upper()}, not measured: a Questioner step takes about {one}, a "
        f"curation {two}, a Reasoner step {three}; an iteration {whole}, all {s.iterations} of them "
        f"{format_duration(found['iteration'] * s.iterations)}"
    )


def format_duration(seconds: float) -> str:
    """Writes seconds in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"

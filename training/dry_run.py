"""The dry run: what would run, how much memory and disk it takes, and how long, measured on a few images."""

import gc
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
from model.prompt import Picture
from model.sampling import Sampling
from model.vlm import VLM
from training import memory_plan as plan
from training.distributed import Ranks
from training.folder import printable
from training.policy import Trained
from training.run import Run
from training.settings import MOST, Settings

SCENES = 512  # built-in scenes, if there are no other images


TEXT_TOKENS = 100  # of an instruction and a question, about


SLOW = 0.25  # below this share of the usual batches a step has many small forward passes


HELP = {  # flags that need less memory, those that change nothing else first
    "--gradient-checkpointing": dict(checkpointing=True),
    "--gradient-checkpointing --offload": dict(checkpointing=True, offload=True),
    "--gradient-checkpointing --lora-rank 16 --lr 2e-5": dict(checkpointing=True, lora_rank=16),
}


def batch_scale(s: Settings, run: Run, config: PreTrainedConfig, device: torch.device) -> float:
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


def show(s: Settings, run: Run, config: PreTrainedConfig, device: torch.device, batch_scale: float) -> None:
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
    show_memory(s, run, config, device, batch_scale)
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


def show_memory(
    s: Settings, run: Run, config: PreTrainedConfig, device: torch.device, batch_scale: float
) -> None:
    """Prints the memory of each moment, and on a GPU what to do about it."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    flags = memory_flags(s, run)
    first, dtype, work = of_plan(s, run, config)
    checkpointing, offload = flags.pop("checkpointing"), flags.pop("offload")
    moments = plan.memory_plan(
        first, dtype, total, work, checkpointing, offload, batch_scale=batch_scale, **flags
    )
    for moment in moments if s.dry_run else [max(moments, key=lambda moment: moment.total)]:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in moment.parts.items() if size)
        too_much = total is not None and moment.total >= total
        verdict = f"; MORE than the {total / 2**30:.0f} GiB of {device}" if too_much else ""
        print(f"memory   {moment.name}: {moment.total / 2**30:.2f} GiB ({parts}){verdict}")
    print(f"memory   {in_the_computer(s, run, config, device, batch_scale)[1]}")
    if total is None:
        return
    free = torch.cuda.mem_get_info(device)[0]
    print(f"memory   {advice(free, batch_scale, of_plan(s, run, config), memory_flags(s, run))}")


def in_the_computer(
    s: Settings, run: Run, config: PreTrainedConfig, device: torch.device, batch_scale: float
) -> tuple[bool, str]:
    """Whether the computer has the memory that its processes of this run take, and a sentence about it."""
    (first, dtype, work), flags = of_plan(s, run, config), memory_flags(s, run)
    if device.type == "cuda":  # what waits there for the GPU
        needed = plan.host_plan(
            first, dtype, **{k: v for k, v in flags.items() if k != "checkpointing"}
        ).total
    else:
        needed = max(
            m.total for m in plan.memory_plan(first, dtype, None, work, **flags, batch_scale=batch_scale)
        )
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


def advice(free: int, batch_scale: float, what: tuple, flags: dict) -> str:
    """Whether these flags suit a GPU with `free` bytes, and which suit it better.

    budget: the share of the token budgets that is used; what, flags: see `of_plan` and `memory_flags`.
    """

    def fits(flags: dict, batch_scale: float) -> bool:
        moments = plan.memory_plan(*what[:2], free, what[2], **flags, batch_scale=batch_scale)
        return max(moment.total for moment in moments) <= plan.USABLE * free

    fitting = fits(flags, batch_scale)
    if fitting and batch_scale == 1:
        return f"{free / 2**30:.1f} GiB are free on the GPU: this fits"
    smaller = (
        f"with batches of {batch_scale:g} of the usual size"
        if fitting
        else "not even with the smallest batches"
    )
    sentence = f"{free / 2**30:.1f} GiB are free on the GPU: this fits {smaller}"
    if fitting and batch_scale >= SLOW:
        return sentence
    better = [text for text, more in HELP.items() if fits(flags | more, SLOW)]
    return sentence + (f"; use {' or '.join(better)}" if better else "")


ENOUGH = 10.0  # seconds: a step that takes longer is not tried with more images


@dataclass(frozen=True)
class Rehearsal:
    """The seconds of a Questioner step on so many images, and how many of its questions were valid."""

    images: int
    asking: float
    answering: float
    updating: float
    valid: int

    def questioner_step(self, s: Settings) -> float:
        """Seconds of a Questioner step."""
        return (self.asking + self.answering + self.updating) * s.images_per_step / self.images

    def curation(self, s: Settings) -> float:
        """Seconds of a curation: a question an image."""
        return (self.asking + self.answering) / s.group_size * s.candidates / self.images

    def reasoner_step(self, s: Settings) -> float:
        """Seconds of a Reasoner step: G answers to each of its questions, of which m were timed."""
        answering = self.answering / max(1, self.valid) * s.group_size / s.answers
        return (answering + self.updating / self.images) * s.images_per_step

    def iteration(self, s: Settings) -> float:
        """Seconds of an iteration, without what is measured at its end."""
        steps = s.questioner_steps * self.questioner_step(s) + s.reasoner_steps * self.reasoner_step(s)
        return steps + self.curation(s)


def rehearse(s: Settings, roles: tuple[VLM, VLM], pictures: list[Picture], ranks: Ranks) -> Rehearsal:
    """Doubles the images until a step takes ENOUGH seconds, or all pictures of a rank are used."""
    step_on(s, roles, pictures[:1], ranks)  # kernels are loaded, decoding is recorded
    count = 1
    while True:
        rehearsal = step_on(s, roles, pictures[:count], ranks)
        enough = rehearsal.asking + rehearsal.answering + rehearsal.updating >= ENOUGH
        if ranks.any(enough or count >= len(pictures)):
            return rehearsal
        count *= 2


def step_on(s: Settings, roles: tuple[VLM, VLM], pictures: list[Picture], ranks: Ranks) -> Rehearsal:
    """A Questioner step, timed; both roles are as before."""
    device = roles[0].device
    sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p)
    generator = torch.Generator(device).manual_seed(s.seed)
    times = [now(device)]
    asked = questioner.ask(roles[0], pictures, s.group_size, sampling, generator)
    times.append(now(device))
    votes = reasoner.vote(roles[1], asked, s.answers, sampling, generator)
    times.append(now(device))
    # Rewards that differ, so that there is a gradient.
    rewards = [float(i % 2) for i in range(s.group_size)]
    groups = [each.completions for each in asked]
    grpo.set_rewards(groups, [rewards] * len(groups))
    memory = (s.offload, s.gradient_checkpointing, ranks)
    trained = Trained(roles[0].copy(), s.lr, s.weight_decay, *memory)
    start = now(device)  # a phase begins once, not in each step
    grpo.add_reference(groups, roles[1], s.temperature)
    grpo.update(trained, trained.optimizer, groups, s.clip, s.beta, s.temperature)
    times.append(now(device) - start)
    del trained
    gc.collect()  # the masters go, whose modules refer to one another
    valid = sum(vote is not None for group in votes for vote in group)
    return Rehearsal(len(pictures), times[1] - times[0], times[2] - times[1], times[3], valid)


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def sentence(s: Settings, rehearsal: Rehearsal, ranks: int) -> str:
    """What it says of a run on `ranks` processes, in words."""
    steps = [rehearsal.questioner_step(s), rehearsal.curation(s), rehearsal.reasoner_step(s)]
    one, two, three = (duration(seconds / ranks) for seconds in steps)
    whole = rehearsal.iteration(s) / ranks
    text = f"from a step on {rehearsal.images} images: a Questioner step takes about {one}, a curation {two}"
    if not rehearsal.valid:
        return f"{text}; no question was valid, so that how long answers take is not known"
    text += f", a Reasoner step {three}; an iteration {duration(whole)}, "
    return text + f"all {s.iterations} of them {duration(whole * s.iterations)}, measuring not counted"


def duration(seconds: float) -> str:
    """Seconds in the largest unit of which there are two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"

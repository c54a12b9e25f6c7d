"""`python loop.py`: checks everything, says what will run, and turns what can stop a run into a sentence and
a code.

Exit codes: 0 done, 2 a wrong argument or input, 1 anything else.
"""

import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from model import checkpoint, lora
from model.checkpoint import load_config, load_processors
from model.prompt import Picture
from model.vlm import VLM
from training import dry_run as preview
from training.distributed import Ranks, is_lost, join, leave
from training.dry_run import rehearse, sentence
from training.images import Found, ImageError, find_images, nothing_of
from training.log import Console
from training.run import Run, RunError, Stopped
from training.settings import MAY_CHANGE, TOY, Settings, flag, parse_arguments

TOO_LITTLE_MEMORY = (
    "the GPU has too little memory: run again with the same --name and --gradient-checkpointing, --offload "
    "or both, which goes on where this stopped; or begin anew with a lower --max-new-tokens, --max-pixels or "
    "--group-size"
)
NO_MEMORY = "can't allocate memory"  # what torch says of the computer's; of a GPU's it is an OutOfMemoryError
Loop = Callable[[Settings, Run], None]


def main(loop: Loop, description: str, argv: list[str] | None = None) -> int:
    """Runs `loop` as the command line says; returns the exit code."""
    # A mistyped model is our sentence, not the hub's retries; a strange image is used, or skipped and listed.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    s = parse_arguments(description, argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a run need not be UTF-8
    try:
        ranks = join()
        console = Console(ranks.is_main)
        with console.alive():
            code = start(loop, s, ranks, console)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RuntimeError as error:
        if NO_MEMORY in str(error):
            less = "--images-per-step, --max-new-tokens, --max-pixels or --group-size"
            print(
                f"error: the computer has too little memory: begin anew with a lower {less}", file=sys.stderr
            )
            return 1
        if "WORLD_SIZE" not in os.environ or not is_lost(error):
            raise
        why = f"another process of this run has ended or cannot be reached ({str(error).splitlines()[0]})"
        print(f"error: {why}; start them again to go on", file=sys.stderr)
        return 1
    if code == 0:
        leave()
    return code


def start(loop: Loop, s: Settings, ranks: Ranks, console: Console) -> int:
    """Checks everything, then runs; returns the exit code."""
    try:
        check_program(s, program_of(loop))
        if s.resume is not None:
            s, run = resume(s, ranks)
        else:
            run = prepare(s, ranks)
        run.console = console
        if run.state.iteration > s.iterations:
            if ranks.is_main:
                print(f"{run.folder} is complete: all of its {s.iterations} iterations are done")
            return 0
        config, batch_scale = load_config(model_of(s)), token_budget(s, run)
        if ranks.is_main:
            preview.show(s, run, config, device_of(s), batch_scale)
        if s.dry_run:
            show_time(s, run, batch_scale)
            return 0
        preview.check_disk(s, run, config)
        console.now("loading the model")
        roles = load_roles(s, batch_scale)
        preview.check_disk(s, run, config)  # again, as weights may have been downloaded
        start_run(s, run, program_of(loop))
        if ranks.is_main:  # what a run needs at its end is proven at its start
            checkpoint.prove_export(roles[0], run.folder)
    except (ValueError, OSError) as error:  # CheckpointError and ImageError are ValueErrors
        sys.stderr.write(f"error: {error}\n")  # in one piece: several processes may say so at once
        return 2
    except torch.OutOfMemoryError:
        print(f"error: {TOO_LITTLE_MEMORY}", file=sys.stderr)
        return 1
    return carry_out(loop, s, run, roles)


def carry_out(loop: Loop, s: Settings, run: Run, roles: tuple[VLM, VLM]) -> int:
    """Runs the loop; returns the exit code."""

    def stop(signum, frame):
        run.stopping = True
        run.console.say("stopping after this step (Ctrl-C again: at once)")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, stop)
    go_on = f"continue with: python {program_of(loop)} --resume {shlex.quote(str(run.folder))}"
    try:
        run.load_roles(*roles)
        loop(s, run)
    except ImageError as error:
        print(f"error: {error}; when they are back, {go_on}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as reason:
        if run.ranks.is_main:
            how = "stopped, its state is saved" if isinstance(reason, Stopped) else "interrupted"
            print(f"{how}; {go_on}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk
        print(f"error: {error}; when that is mended, {go_on}", file=sys.stderr)
        return 1
    except (RunError, torch.OutOfMemoryError) as error:
        print(f"error: {error if isinstance(error, RunError) else TOO_LITTLE_MEMORY}", file=sys.stderr)
        return 1
    finally:
        run.unlock()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if run.ranks.is_main:
        print(f"done: metrics, curated questions and both checkpoints are in {run.folder}")
    return 0


def ready(s: Settings, ranks: Ranks | None = None) -> Run:
    """A run that the loop can go on with, for notebooks and experiments. Raises ValueError and OSError."""
    run = prepare(s, ranks or Ranks())
    roles = load_roles(s, token_budget(s, run))
    start_run(s, run)
    run.load_roles(*roles)
    return run


# ---- A new run ---------------------------------------------------------------------------------------------


def prepare(s: Settings, ranks: Ranks) -> Run:
    """Checks the settings and finds the images; writes nothing. Raises ValueError for the user."""
    s.check()
    check_device(s.device, ranks)
    if s.images is not None:
        s.images = os.path.abspath(os.path.expanduser(s.images))  # so that a run can be resumed from anywhere
    if s.model is not None and Path(s.model).expanduser().is_dir():
        s.model = os.path.abspath(os.path.expanduser(s.model))
    dtype = checkpoint.check_dtype(s.dtype, device_of(s))
    s.dtype = str(dtype).removeprefix("torch.")  # a resumed run has the same, on whatever device
    config = load_config(model_of(s))
    width = config.text_config.hidden_size
    if s.lora_rank > width:
        raise ValueError(f"--lora-rank must be at most {width}, the model's width, not {s.lora_rank}")
    _, image_processor, _ = load_processors(model_of(s))
    token_side = checkpoint.token_side(config)
    checkpoint.check_max_pixels(s.max_pixels, token_side)
    name = s.name or f"{Path(model_of(s)).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / ranks.broadcast(name)  # the first rank's clock counts
    limits = checkpoint.pixel_limits(image_processor, s.max_pixels)
    s.max_pixels = limits["longest_edge"]
    scene_size = checkpoint.scene_side(limits, token_side)
    exists = ranks.any((folder / "config.json").exists())  # asked before any rank makes it
    if exists and not s.dry_run:
        return reopened(s, folder, check_same_settings(s, folder), ranks)
    begun = ("state", "lock", "images.json")  # all there is of a run that was killed before it was there
    if folder.exists() and not s.dry_run:
        if any(p.name not in begun and p.suffix != ".new" for p in folder.iterdir()):
            raise ValueError(f"{folder} exists already and is not the folder of a run; choose another --name")
    return Run(folder, find(s), scene_size, token_side, s, ranks)


def check_device(name: str | None, ranks: Ranks) -> None:
    """Raises ValueError if torch has no such device here, or if all ranks would be on one GPU."""
    if ranks.size > 1 and (name or "").startswith("cuda:"):
        why = "under torchrun each process takes its own GPU; say --device cuda, or nothing"
        raise ValueError(f"--device {name}: {why}")
    if checkpoint.check_device(name).type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: cpu and cuda are known here")


def find(s: Settings) -> Found:
    """The user's images; nothing for the built-in scenes, which are rendered when the run starts."""
    if s.images is None:
        return Found([], [])
    found = find_images(s.images)
    if not found.paths:
        raise ValueError(f"--images {s.images}: {nothing_of(found)}")
    return found


def model_of(s: Settings) -> str:
    """The folder or hub id of the base model."""
    return str(TOY) if s.model is None else s.model


def device_of(s: Settings) -> torch.device:
    """Where it computes."""
    return checkpoint.check_device(s.device)


def token_budget(s: Settings, run: Run) -> float:
    """The share of the token budgets that fits, the same for all ranks (see `plan.fitting_budget`)."""
    batch_scale = preview.batch_scale(s, run, load_config(model_of(s)), device_of(s))
    return min(run.ranks.all_gather([batch_scale]))


def load_roles(s: Settings, batch_scale: float) -> tuple[VLM, VLM]:
    """Both roles, as copies of the base model. budget: see `token_budget`."""
    device = device_of(s)
    if device.index is not None:
        torch.cuda.set_device(device)
    base = VLM.load(model_of(s), device, s.dtype, s.max_pixels)
    base.fallbacks.batch_scale = batch_scale
    if s.lora_rank:
        lora.add_lora(base.model, s.lora_rank, s.seed)
    if s.freeze_vision:
        base.model.model.visual.requires_grad_(False)
    base.offload()
    return base, base.copy()


def show_time(s: Settings, run: Run, batch_scale: float) -> None:
    """Prints how long an iteration takes, measured with the weights and a few images, or why it does not."""
    say = print if run.ranks.is_main else lambda _: None
    if not checkpoint.has_weights(model_of(s)):
        say("time     not measured: the weights are not on this machine yet")
        return
    fits, needed = preview.in_the_computer(s, run, load_config(model_of(s)), device_of(s), batch_scale)
    if run.ranks.any(not fits):
        say(f"time     not measured: {needed}")
        return
    run.console.now("measuring how long a step takes")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that Ctrl-C takes the folder away
    try:
        with tempfile.TemporaryDirectory() as folder:
            rehearsal = rehearse(s, load_roles(s, batch_scale), few_pictures(s, run, Path(folder)), run.ranks)
        if run.ranks.is_main:  # another one may have no image
            print(f"time     {sentence(s, rehearsal, run.ranks.size)}")
    except KeyboardInterrupt:
        say("time     not measured: interrupted")
    except (ValueError, OSError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError) or NO_MEMORY in str(error)
        if isinstance(error, RuntimeError) and not full:
            raise
        say(f"time     not measured: {checkpoint.first_line(error)}")


def few_pictures(s: Settings, run: Run, folder: Path) -> list[Picture]:
    """The first images of a step, of the run's own, or of scenes that are drawn in `folder`."""
    if s.images is None:
        from training.scenes import write_scenes

        scenes = write_scenes(folder, s.images_per_step, s.seed, run.scene_size)
        run.images.paths[:] = map(str, scenes)
    return run.next_images(s.images_per_step)


def start_run(s: Settings, run: Run, program: str | None = None) -> None:
    """Makes the run folder if it is new, and renders the built-in scenes if there are no other images.

    program: see `program_of`.
    """
    if run.number == 0:
        run.create(dataclasses.asdict(s) | {"scene_size": run.scene_size, "program": program})
    if s.images is not None:
        return
    from training.scenes import write_scenes  # draws; what the answers are, only toy/answerer.py knows

    drawn = []
    if run.ranks.is_main:
        drawn = write_scenes(run.folder / "images", preview.SCENES, s.seed, run.scene_size)
    run.images.paths[:] = run.ranks.broadcast([str(path) for path in drawn])
    if run.number == 0 and run.ranks.is_main:
        print(f"no --images given: built-in scenes are in {run.folder / 'images'}")


# ---- A run that goes on ------------------------------------------------------------------------------------


def resume(given: Settings, ranks: Ranks) -> tuple[Settings, Run]:
    """The settings and the run in the folder `given.resume`; what may change is as given, where it is given.

    Raises ValueError with a sentence for the user.
    """
    folder = Path(given.resume)
    s, more = saved_settings(folder)
    if "iterations" in given.given and given.iterations < s.iterations:
        raise ValueError(f"--iterations must be at least the {s.iterations} that {folder} was started with")
    for name in given.given:
        if name != "resume":
            setattr(s, name, getattr(given, name))
    s.check()
    check_device(s.device, ranks)
    return s, reopened(s, folder, more, ranks)


def saved_settings(folder: Path) -> tuple[Settings, dict]:
    """The settings of the run in `folder`, and what its config.json says besides: `scene_size`, its scenes'
    width, and `program`, which started it. Raises ValueError for the user."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        more = dict(scene_size=config.pop("scene_size"), program=config.pop("program", None))
        return Settings(**config), more
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not the folder of a run: its config.json cannot be read") from error


def program_of(loop: Loop) -> str:
    """The name of the file that a loop is written in: of loop.py, or of somebody's own.

    Of what is no plain function (functools.partial), the file that was started.
    """
    code = getattr(loop, "__code__", None)
    return Path(code.co_filename if code else sys.argv[0]).name


def check_program(s: Settings, program: str) -> None:
    """Raises ValueError if the run that goes on was started by another program, with rewards of its own."""
    folder = Path(s.resume) if s.resume is not None else Path("runs") / (s.name or "")
    if s.dry_run or not (folder / "config.json").is_file():
        return
    started = saved_settings(folder)[1]["program"]
    if started not in (None, program):  # None: by a notebook, or an earlier version
        raise ValueError(f"{folder} was started by {started}, not by {program}, and only goes on with that")


def check_same_settings(s: Settings, folder: Path) -> dict:
    """Raises ValueError naming the first setting that is not what the run in `folder` was started with.

    Returns what its config.json says besides.

    What only decides where and in how much memory the same numbers are computed may change, and a run may
    go on for more iterations.
    """
    before, more = saved_settings(folder)
    for field in dataclasses.fields(Settings):
        was, now = getattr(before, field.name), getattr(s, field.name)
        further = field.name == "iterations" and now > was  # a run may go on for longer
        if field.name not in MAY_CHANGE and was != now and not further:
            raise ValueError(
                f"{folder} was started with {flag(field.name)} {was}, not {now}; "
                f"--resume {folder} goes on with its own settings, another --name starts a new run"
            )
    return more


def reopened(s: Settings, folder: Path, more: dict, ranks: Ranks) -> Run:
    """A run that goes on with the images that it began with. more: see `saved_settings`."""
    try:
        found = json.loads((folder / "images.json").read_text())
        images = Found(found["paths"], [(path, why) for path, why in found["skipped"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/images.json, the list of the run's images, cannot be read") from error
    token_side = checkpoint.token_side(load_config(model_of(s)))
    run = Run(folder, images, more["scene_size"], token_side, s, ranks)
    run.reopen(dataclasses.asdict(s) | more)
    return run

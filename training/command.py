"""`python loop.py`: checks everything, says what will run, and runs it.

    main        reads the command line; turns whatever stops a run into a sentence and an exit code
    open_run    checks the settings, the model and the images, and finds the run's folder
    begin_run   loads both roles and makes the folder
    train       runs the loop

Exit codes: 0 done, 2 a wrong argument or input, 1 anything else.
"""

import dataclasses
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import questioner
import reasoner
from model import lora
from model.checkpoint import (
    Checkpoint,
    find_device,
    find_dtype,
    first_line,
    open_checkpoint,
    prove_export,
)
from model.prompt import Picture
from model.vlm import VLM
from training import dry_run
from training.distributed import Ranks, is_lost, join, leave
from training.dry_run import describe, rehearse
from training.images import Found, ImageError, find_images, say_why_none
from training.log import Console, quiet_libraries
from training.run import Run, RunError, Stopped
from training.scenes import write_scenes
from training.settings import (
    TOY,
    Settings,
    check_same_settings,
    continue_settings,
    parse_arguments,
    printable,
    split_seeds,
)
from training.terminal import prepare_output
from training.troubles import find_troubles
from training.versions import compare_code, describe_code

TOO_LITTLE_MEMORY = (
    "the GPU has too little memory: run again with the same --name and --gradient-checkpointing, --offload "
    "or both, which goes on where this stopped; or begin anew with a lower --max-new-tokens, --max-pixels or "
    "--group-size"
)
TOO_LITTLE_HOST_MEMORY = (
    "the computer has too little memory: begin anew with a lower --images-per-step, --max-new-tokens, "
    "--max-pixels or --group-size"
)
# Torch's words when the computer has none; a GPU's is OutOfMemoryError.
NO_MEMORY = "can't allocate memory"
REPORT = Path(__file__).parent.parent / "report.py"
TROUBLES_TOLD = 6  # at the end of a run; the report has all
Loop = Callable[[Settings, Run], None]


def main(
    loop: Loop,
    description: str,
    argv: list[str] | None = None,
    check: Callable[[Settings], None] = lambda settings: None,
) -> int:
    """Runs `loop` as the command line says, once for each of --seeds; returns the exit code.

    check: raises ValueError for a setting that `loop` cannot use, before anything is loaded or written.
    """
    prepare_output()
    quiet_libraries()
    try:
        settings = parse_arguments(description, argv)
        ranks = join()
    except SystemExit as stop:  # --help or a wrong flag; a notebook would end at it
        return stop.code or 0
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    again = shlex.join(sys.argv[1:] if argv is None else argv) if settings.seeds else None
    folders = []
    for one in split_seeds(settings):
        exit_code = run_once(loop, one, ranks, again, check)
        if exit_code:
            return exit_code
        folders.append(shlex.quote(f"runs/{one.name}"))
    if settings.seeds and not settings.dry_run and ranks.is_main:
        print(f"compare them: python {path_from_here(REPORT)} {' '.join(folders)}")
    leave()
    return 0


def run_once(
    loop: Loop,
    settings: Settings,
    ranks: Ranks,
    again: str | None,
    check: Callable[[Settings], None],
) -> int:
    """Runs `loop` with these settings; returns the exit code.

    again: see `tell_how_to_go_on`. check: see `main`.
    """
    program = name_program(loop)
    go_on = None  # how to continue, once there is something to continue
    try:
        console = Console(ranks.is_main)
        with console.break_silence():
            run = open_run(settings, ranks, program.name)
            run.console = console
            check(run.settings)
            if run.state.iteration > run.settings.iterations:
                if ranks.is_main:
                    count = run.settings.iterations
                    more = "a larger number goes on, another --name starts a new run"
                    print(f"{run.folder} is complete, with --iterations {count}: {more}")
            else:
                dry_run.show(run)
                if settings.dry_run:
                    show_time(run)
                else:
                    begin_run(run)
                    go_on = tell_how_to_go_on(program, run.folder, ranks, again)
                    train(loop, run)
    except (Exception, KeyboardInterrupt) as error:
        told = explain(error, go_on)
        if told is None:
            raise
        sentence, exit_code = told
        if ranks.is_main or not isinstance(error, (Stopped, KeyboardInterrupt)):
            sys.stderr.write(f"{sentence}\n")  # in one piece: several processes may say so at once
        return exit_code
    return 0


def tell_how_to_go_on(program: Path, folder: Path, ranks: Ranks, again: str | None) -> str:
    """Returns the command that continues a run, from the folder in which the user stands.

    again: the arguments of a command line that runs several seeds.
    """
    start = "python"
    if ranks.size > 1:
        start = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', ranks.size)}"
    arguments = again or f"--resume {shlex.quote(str(folder))}"
    return f"continue with: {start} {path_from_here(program)} {arguments}"


def path_from_here(path: Path) -> str:
    """Returns a path as it is typed in the current folder: relative if it lies in it."""
    path = Path(os.path.abspath(path))
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def explain(error: BaseException, go_on: str | None) -> tuple[str, int] | None:
    """Returns what to tell the user about what has stopped the command, and the exit code.

    None for a mistake in the program. go_on: how to continue the run; None if there is nothing to continue.
    """
    if go_on is not None:
        if isinstance(error, Stopped):
            return f"stopped, its state is saved; {go_on}", 1
        if isinstance(error, KeyboardInterrupt):
            return f"interrupted; {go_on}", 1
        if isinstance(error, ImageError):
            return f"error: {error}; when they are back, {go_on}", 2
        if isinstance(error, OSError):  # a full disk
            return f"error: {error}; when that is mended, {go_on}", 1
    if isinstance(error, RunError):
        return f"error: {error}", 1
    if isinstance(error, torch.OutOfMemoryError):
        return f"error: {TOO_LITTLE_MEMORY}", 1
    if is_out_of_memory(error):
        return f"error: {TOO_LITTLE_HOST_MEMORY}", 1
    if isinstance(error, RuntimeError) and "WORLD_SIZE" in os.environ and is_lost(error):
        why = f"another process of this run has ended or cannot be reached ({first_line(error)})"
        return f"error: {why}; start them again to go on", 1
    if isinstance(error, (ValueError, OSError)):
        return f"error: {error}", 2
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns true if the GPU or the computer has too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY in str(error)


def name_program(loop: Loop) -> Path:
    """Returns the file that a loop is written in: loop.py, or somebody's own.

    Of what is no plain function (functools.partial), it is the file that was started.
    """
    code = getattr(loop, "__code__", None)
    return Path(code.co_filename if code else sys.argv[0])


# ---- Opening a run -----------------------------------------------------------------------------------------


def open_run(settings: Settings, ranks: Ranks, program: str | None = None) -> Run:
    """Checks the settings, the model and the images, and returns the run: a new one, or one that goes on.

    Writes nothing for a new run. program: see `name_program`; None in a notebook. Raises ValueError and
    OSError for the user.
    """
    saved = None  # of a run that goes on: what its config.json says besides the settings
    if settings.resume is not None:
        folder = Path(settings.resume)
        settings, saved = continue_settings(settings)
    settings.check()
    device = find_training_device(settings.device, ranks)
    checkpoint = open_checkpoint(settings.base_model)
    # A run of this name may be there already, and then goes on.
    if saved is None:
        settings = resolve(settings, checkpoint, device)
        default = f"{Path(settings.base_model).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path("runs") / ranks.broadcast(settings.name or default)
        exists = ranks.any((folder / "config.json").exists())  # asked before any rank makes it
        if exists and not settings.dry_run:
            saved = check_same_settings(settings, folder)
    if saved is None:
        check_new_folder(folder, settings.dry_run)
        images = find_run_images(settings.images)
        scene_size = checkpoint.scene_side(settings.max_pixels)
        origin = dict(scene_size=scene_size, program=program, code=[])
        run = Run(folder, images, origin, checkpoint, device, settings, ranks)
    else:
        check_program(folder, saved["program"], program)
        images = read_run_images(folder)
        run = Run(folder, images, saved, checkpoint, device, settings, ranks)
        run.reopen()
    # Batches that fit into the memory, of the same size on all ranks.
    run.batch_scale = min(ranks.all_gather([dry_run.fit_batches(run)]))
    return run


def find_training_device(name: str | None, ranks: Ranks) -> torch.device:
    """Returns the device. Raises ValueError if torch has none of this name, or all ranks would share it."""
    if ranks.size > 1 and (name or "").startswith("cuda:"):
        why = "under torchrun each process takes its own GPU; say --device cuda, or nothing"
        raise ValueError(f"--device {name}: {why}")
    device = find_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: cpu and cuda are known here")
    return device


def resolve(settings: Settings, checkpoint: Checkpoint, device: torch.device) -> Settings:
    """Returns the settings of a new run, with what the model, the device and the current folder decide.

    A run goes on with the same, from any folder and on any device. Raises ValueError for the user.
    """
    width = checkpoint.config.text_config.hidden_size
    if settings.lora_rank > width:
        raise ValueError(
            f"--lora-rank must be at most {width}, the model's width, not {settings.lora_rank}"
        )
    checkpoint.check_max_pixels(settings.max_pixels)
    dtype = find_dtype(settings.dtype, device)
    # Folders and files by their absolute paths; a hub id stays.
    paths = {}
    for name in ("model", "images", "measure"):
        path = os.path.expanduser(getattr(settings, name) or "")
        if path and (name != "model" or os.path.isdir(path)):
            paths[name] = os.path.abspath(path)
    if os.path.realpath(settings.base_model) == os.path.realpath(TOY):
        paths["model"] = None  # wherever this project is
    return dataclasses.replace(
        settings,
        **paths,
        questioner_prompt=settings.questioner_prompt or questioner.INSTRUCTION,
        reasoner_prompt=settings.reasoner_prompt or reasoner.INSTRUCTION,
        dtype=str(dtype).removeprefix("torch."),
        max_pixels=checkpoint.pixel_limits(settings.max_pixels)["longest_edge"],
    )


def check_new_folder(folder: Path, dry_run: bool) -> None:
    """Raises ValueError if a new run cannot have this folder, or it is something else's."""
    # All there is of a run that was killed before it was there.
    begun = ("state", "lock", "images.json")
    if folder.exists() and not dry_run:
        if any(path.name not in begun and path.suffix != ".new" for path in folder.iterdir()):
            raise ValueError(
                f"{folder} exists already and is not the folder of a run; choose another --name"
            )
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not place.is_dir():
        link = f", but a link to {os.readlink(place)}" if place.is_symlink() else ""
        raise ValueError(f"{folder} cannot be made: {place} is no folder{link}")


def find_run_images(where: str | None) -> Found:
    """Returns the images of a new run; none for built-in scenes, which are drawn when it begins.

    Raises ValueError if there are none in `where`.
    """
    if where is None:
        return Found([], [])
    images = find_images(where)
    if not images.paths:
        raise ValueError(f"--images {where}: {say_why_none(images)}")
    return images


def check_program(folder: Path, started: str | None, program: str | None) -> None:
    """Raises ValueError if another program started the run in `folder`, with rewards of its own.

    started: the program that did; None if it was a notebook, or an earlier version.
    """
    if None not in (started, program) and started != program:
        raise ValueError(
            f"{folder} was started by {started}, not by {program}, and only goes on with that"
        )


def read_run_images(folder: Path) -> Found:
    """Returns the images that the run in `folder` began with. Raises ValueError if its list is damaged."""
    try:
        found = json.loads((folder / "images.json").read_text())
        return Found(found["paths"], [(path, why) for path, why in found["skipped"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/images.json, the list of the run's images, cannot be read"
        ) from error


# ---- Beginning ---------------------------------------------------------------------------------------------


def prepare_run(settings: Settings) -> Run:
    """Returns a run that the loop can go on with, for notebooks and experiments.

    Its `settings` are the ones given, resolved. Raises ValueError and OSError.
    """
    run = open_run(settings, Ranks())
    begin_run(run)
    run.restore_roles()
    return run


def begin_run(run: Run) -> None:
    """Loads both roles and makes the run's folder, with the built-in scenes if there are no other images.

    Raises ValueError and OSError.
    """
    dry_run.check_disk(run)
    run.console.begin("loading the model")
    load_roles(run)
    dry_run.check_disk(run)  # again, as weights may have been downloaded
    note_code(run)
    run.create()
    # Rank 0 draws the scenes for all. What the answers are, only toy/answerer.py knows.
    if run.settings.images is None:
        drawn = []
        if run.ranks.is_main:
            drawn = write_scenes(
                run.folder / "images", dry_run.SCENES, run.settings.seed, run.scene_size
            )
            if run.number == 0:
                print(f"no --images given: built-in scenes are in {run.folder / 'images'}")
        run.images.paths[:] = run.ranks.broadcast([f"images/{path.name}" for path in drawn])
    # What a run needs at its end is proven at its start.
    if run.ranks.is_main:
        prove_export(run.questioner, run.folder)


def note_code(run: Run) -> None:
    """Adds today's code to the run's config.json if it is new, and says if it differs from the run's last."""
    now = describe_code()
    codes = run.origin["code"]
    differences = compare_code(codes[-1], now) if codes else ""
    if differences:
        run.console.say(
            f"warning: {run.folder} goes on with other code ({differences}); its prompts stay"
        )
    if differences or not codes:
        codes.append(now)


def load_roles(run: Run) -> None:
    """Loads the base model, and makes both roles copies of it."""
    settings = run.settings
    if settings.model is None:  # the toy: its matrices are too small for more threads
        torch.set_num_threads(1)  # so that a run repeats byte for byte with any number of cores
    if run.device.index is not None:
        torch.cuda.set_device(run.device)
    base = VLM.load(run.checkpoint, run.device, settings.dtype, settings.max_pixels)
    base.fallbacks.batch_scale = run.batch_scale
    if settings.lora_rank:
        lora.add_lora(base.model, settings.lora_rank, settings.seed)
    if settings.freeze_vision:
        base.model.model.visual.requires_grad_(False)
    base.offload()
    run.questioner = base
    run.reasoner = base.copy()


def show_time(run: Run) -> None:
    """Prints how long an iteration takes: an estimate, and what was measured."""
    dry_run.show_estimate(run)
    told = measure_time(run)
    if run.ranks.is_main:
        print(f"time     {told}")


def measure_time(run: Run) -> str:
    """Says how long an iteration takes, measured with the weights and a few images, or why it does not."""
    if not any(run.checkpoint.folder.glob("*.safetensors")):
        return "not measured: the weights are not on this machine yet"
    fits, needed = dry_run.check_host_memory(run)
    if run.ranks.any(not fits):
        return f"not measured: {needed}"
    run.console.begin("measuring how long a step takes")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that Ctrl-C takes the folder away
    try:
        with tempfile.TemporaryDirectory() as folder:
            load_roles(run)
            rehearsal = rehearse(run, few_pictures(run, Path(folder)))
    except KeyboardInterrupt:
        return "not measured: interrupted"
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        return f"not measured: {first_line(error)}"
    # Another rank may have no image.
    return describe(run.settings, rehearsal, run.ranks.size) if run.ranks.is_main else ""


def few_pictures(run: Run, folder: Path) -> list[Picture]:
    """Returns the first images of a step: the run's own, or scenes that are drawn in `folder`."""
    count = run.settings.images_per_step
    if run.settings.images is None:
        scenes = write_scenes(folder, count, run.settings.seed, run.scene_size)
        run.images.paths[:] = [str(path) for path in scenes]
    return run.next_images(count)


# ---- Running -----------------------------------------------------------------------------------------------


def train(loop: Loop, run: Run) -> None:
    """Runs the loop to its end. Ctrl-C, or a polite kill, stops it after the step; a second one at once.

    Raises Stopped and KeyboardInterrupt, RunError, ImageError, OSError and OutOfMemoryError (see `explain`).
    """

    def stop(signum, frame):
        run.stopping = True
        run.console.say("stopping after this step (Ctrl-C again: at once)")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, stop)
    try:
        run.restore_roles()
        loop(run.settings, run)
    finally:
        run.unlock()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if run.ranks.is_main:
        print(tell_end(run))


def tell_end(run: Run) -> str:
    """Returns the last lines of a run: where its results are, and what went wrong."""
    page = f"make a page of it: python {path_from_here(REPORT)} {shlex.quote(str(run.folder))}"
    where = f"metrics, curated questions and both checkpoints are in {run.folder}; {page}"
    settings = dataclasses.asdict(run.settings)
    troubles = find_troubles(run.records, settings)
    if not troubles:
        return f"done: {where}"
    # A warning alone is no failure.
    steps = [record for record in run.records if record["phase"] != "warning"]
    failed = find_troubles(steps, settings)
    lines = ["The run is over, and not all went well:" if failed else "done, with warnings:"]
    lines += [f"- {printable(trouble)}" for trouble in troubles[:TROUBLES_TOLD]]
    if troubles[TROUBLES_TOLD:]:
        lines.append(f"- and {len(troubles) - TROUBLES_TOLD} more")
    return "\n".join([*lines, f"The {where}"])

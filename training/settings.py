"""Every setting of a run: one field and one flag each, with the paper's symbol and value.

This file imports nothing that takes long, so that --help and a wrong flag are answered at once.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

TOY = Path(__file__).parent.parent / "toy"
BESIDE = (
    "visplay.json"  # beside a checkpoint: settings that fit it, and the instructions that it knows
)
HELD_OUT_QUESTIONS = 512
HELD_OUT_SEED = 1_000_000  # of the scenes that they are about; no run's seed is that large
MOST = 1_000_000  # completions, answers, tokens of one: a larger number is a slip
MAY_CHANGE = (
    "name",
    "resume",
    "dry_run",
    "device",
    "gradient_checkpointing",
    "offload",
    "save_every",
    "samples",
)

PROMPTS = {"questioner_prompt", "reasoner_prompt"}  # a flag names a file, a setting is its text


def setting(
    default,
    help: str,
    group: str,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
):
    """Makes a field of `Settings`: its flag's help text and group, and what its value may be.

    least, most: the limits of a number, inclusive. choices: the words of which it is one.
    """
    more = dict(help=help, group=group, least=least, most=most, choices=choices)
    return dataclasses.field(default=default, metadata=more)


GPUS = ("a100", "h100", "h200", "l40s", "4090")  # see training/estimate.py

# The groups of `python loop.py --help`.
RUN = "what runs"
LOOP = "the loop"
GRPO = "GRPO"
SAMPLING = "prompts and sampling"
MEMORY = "memory"


@dataclass
class Settings:
    """Every setting of a run: one flag each, the paper's values as defaults."""

    model: str | None = setting(
        None,
        "folder or hub id of a Qwen2.5-VL, MiMo-VL or Qwen3-VL checkpoint (default: toy, the one here)",
        RUN,
    )
    images: str | None = setting(
        None,
        "folder (with subfolders), glob, or .txt/.jsonl list of images (default: built-in scenes)",
        RUN,
    )
    measure: str | None = setting(
        None,
        "labelled questions (.jsonl, as for evaluate.py) on which each iteration measures both roles; for "
        "images of your own",
        RUN,
    )
    name: str | None = setting(
        None, "the run's folder under runs/ (default: the model's name and the time)", RUN
    )
    resume: str | None = setting(
        None,
        "continue the run in this folder where it was stopped or killed, also with more --iterations",
        RUN,
    )
    # From HELD_OUT_SEED on it would draw the held-out scenes.
    seed: int = setting(0, "seed of everything random", RUN, least=0, most=HELD_OUT_SEED - 1)
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: cuda if there is one)", RUN)
    dtype: str | None = setting(
        None,
        "float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)",
        RUN,
        choices=("float32", "bfloat16"),
    )
    iterations: int = setting(3, "iterations of the loop, the paper's K", LOOP, least=1)
    questioner_steps: int = setting(
        20,
        "GRPO steps of a Questioner phase, the paper's S_Q (20 for 3B, 10 for 7B)",
        LOOP,
        least=1,
    )
    reasoner_steps: int = setting(
        20, "GRPO steps of a Reasoner phase, the paper's S_R (20 for 3B, 10 for 7B)", LOOP, least=1
    )
    images_per_step: int = setting(
        128, "images (Questioner) or curated questions (Reasoner) in a step", LOOP, least=1
    )
    group_size: int = setting(
        8, "completions of one prompt that GRPO compares, the paper's G", LOOP, least=2, most=MOST
    )
    answers: int = setting(
        10, "answers the Reasoner votes with on a question, the paper's m", LOOP, least=1, most=MOST
    )
    candidates: int = setting(1000, "questions proposed for curation, the paper's N", LOOP, least=1)
    tau_low: float = setting(
        0.25,
        "lowest confidence of a curated question, the paper's tau_low, inclusive",
        LOOP,
        least=0.0,
    )
    tau_high: float = setting(
        0.75, "highest confidence of a curated question, the paper's tau_high, inclusive", LOOP
    )
    diversity_weight: float = setting(
        1.0, "weight of the diversity penalty, the paper's lambda", LOOP, least=0.0
    )
    lr: float = setting(1e-6, "learning rate of AdamW in both phases", GRPO, least=0.0)
    weight_decay: float = setting(1e-2, "weight decay of AdamW", GRPO, least=0.0)
    beta: float = setting(
        1e-2,
        "weight of the KL to the role at the start of its phase, the paper's beta",
        GRPO,
        least=0.0,
    )
    anchor_beta: float = setting(
        0.0,
        "weight of the KL to the base in the Questioner's phases, where it replaces --beta and keeps its "
        "language (0: the paper's KL, to the start of the phase)",
        GRPO,
        least=0.0,
    )
    clip: float = setting(
        0.2,
        "clipping range of the ratio, the paper's epsilon; idle with one update a rollout, as here",
        GRPO,
    )
    temperature: float = setting(
        1.0,
        "sampling temperature; divides the logits in training too",
        SAMPLING,
        least=1e-3,  # GRPO compares random samples
    )
    top_p: float = setting(
        0.99, "nucleus sampling: the smallest set of tokens with this probability", SAMPLING
    )
    max_new_tokens: int = setting(
        1024, "longest completion, in tokens", SAMPLING, least=1, most=MOST
    )
    questioner_prompt: str | None = setting(
        None, "file with the Questioner's prompt (default: INSTRUCTION in questioner.py)", SAMPLING
    )
    reasoner_prompt: str | None = setting(
        None,
        "file with what the Reasoner is told behind a question (default: INSTRUCTION in reasoner.py)",
        SAMPLING,
    )
    max_pixels: int = setting(
        802_816,
        "larger images are scaled down to this: 1024 tokens of 28 x 28 pixels (Qwen2.5-VL, MiMo-VL), 784 of "
        "32 x 32 (Qwen3-VL)",
        SAMPLING,
        least=1,
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time", MEMORY
    )
    offload: bool = setting(
        False,
        "keep float32 master weights and AdamW's moments in CPU memory, for a GPU that is too small",
        MEMORY,
    )
    lora_rank: int = setting(
        0,
        "train only a low-rank change of the text model, R; needs a higher --lr, as 2e-5 (0: all weights)",
        GRPO,
        least=0,
    )
    freeze_vision: bool = setting(
        False, "leave the image encoder as it is; --lora-rank always does", GRPO
    )
    save_every: int = setting(
        5,
        "steps between two saved states of a run; a state is also saved when a phase ends",
        RUN,
        least=1,
    )
    samples: int = setting(
        1,
        "whole examples of what the models wrote that each step keeps in samples/, for the report (0: none)",
        RUN,
        least=0,
        most=100,
    )
    dry_run: bool = setting(
        False,
        "print what would run, how much memory and disk it takes, and, with the weights here, how long "
        "(measured); then stop",
        RUN,
    )
    for_: str | None = setting(
        None,
        f"with --dry-run: a GPU to estimate the time for, one of {', '.join(GPUS)}",
        RUN,
        choices=GPUS,
    )

    @property
    def base_model(self) -> str:
        """Returns the folder or hub id of the model that both roles start from."""
        return find_model(self.model or "toy")

    def check(self) -> None:
        """Raises ValueError, with a sentence for the user, for a value out of range or of another type."""
        for field in dataclasses.fields(self):
            self._check_field(field)
        if not self.tau_low <= self.tau_high <= 1:
            raise ValueError(
                f"--tau-low ({self.tau_low}) must not be above --tau-high ({self.tau_high}), nor that above 1"
            )
        if not 0 < self.top_p <= 1 or not 0 < self.clip < 1:
            raise ValueError("--top-p must be above 0 and at most 1, and --clip between 0 and 1")
        for name in ("model", "images", "measure"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ValueError(f"{flag(name)} is empty")
        if self.name is not None and (
            not self.name.strip(". ") or Path(self.name).name != self.name
        ):
            raise ValueError(f"--name {self.name!r} is not the name of a folder")

    def _check_field(self, field: dataclasses.Field) -> None:
        """Raises ValueError for a value of another type, or outside its field's limits."""
        value = getattr(self, field.name)
        # A flag has its type, but a file may hold anything.
        kind = float | int if field.type is float else field.type
        if not isinstance(value, kind) or isinstance(value, bool) != (field.type is bool):
            raise ValueError(f"{flag(field.name)} cannot be {value!r}")
        least = field.metadata["least"]
        most = field.metadata["most"]
        if least is not None and not least <= value < math.inf:  # a NaN is not, either
            raise ValueError(
                f"{flag(field.name)} must be a number of at least {least}, not {value}"
            )
        if most is not None and value > most:
            raise ValueError(f"{flag(field.name)} must be at most {most}, not {value}")

    def check_useful(self) -> None:
        """Raises ValueError for settings of a new run that do nothing, or teach nothing."""
        if self.for_ is not None and not self.dry_run:
            raise ValueError(f"--for {self.for_} estimates the time of a dry run: add --dry-run")
        if self.measure is not None and self.images is None:
            raise ValueError(
                "--measure is for images of your own (--images): built-in scenes have questions of their own"
            )
        m = self.answers
        if m < 2:
            raise ValueError(
                f"--answers must be at least 2, not {m}: a single one is always the majority"
            )
        if not any(self.tau_low <= votes / m <= self.tau_high for votes in range(1, m + 1)):
            band = f"between --tau-low ({self.tau_low}) and --tau-high ({self.tau_high})"
            raise ValueError(
                f"no share of {m} --answers lies {band}, so that no question would be kept"
            )


def find_model(name: str) -> str:
    """Returns the folder or hub id of a model; "toy" is this project's, unless a folder here is called so."""
    is_the_toy = name == TOY.name and not Path(name).is_dir()
    return str(TOY) if is_the_toy else name


def flag(name: str) -> str:
    """Returns a field's name as it is written on the command line."""
    return "--" + name.strip("_").replace("_", "-")


def printable(text: str) -> str:
    """Spells out line ends, control characters and bytes that are not UTF-8, so that a text is one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, most: int) -> str:
    """Returns a text of at most about so many characters: a longer one loses its middle, and says so."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"


# ---- Beside a checkpoint, and in the folder of a run -------------------------------------------------------


def read_beside(model: str | Path) -> dict:
    """Reads what lies beside a checkpoint for this program: {"settings": {..}, "instructions": [..]}.

    Each may be missing. Raises ValueError for the user.
    """
    file = Path(os.path.expanduser(model)) / BESIDE
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if isinstance(said, dict):
        settings, instructions = said.get("settings", {}), said.get("instructions", [])
        if isinstance(settings, dict) and isinstance(instructions, list):
            return said
    raise ValueError(f"{file} is not an object of settings (an object) and instructions (a list)")


UNKNOWN_INSTRUCTIONS = (
    "warning: this checkpoint was built for other prompts than those of this run, and will understand little "
    "(python -m toy.build builds a toy for the prompts in questioner.py and reasoner.py)"
)


def knows(model: str | Path, instructions: Iterable[str]) -> bool:
    """Returns true if a checkpoint lists these among the instructions that it knows, or lists none."""
    known = read_beside(model).get("instructions")
    return known is None or all(text in known for text in instructions)


# The paper's hyper-parameters fit models of billions of parameters; these fit the toy.
TOY_DEFAULTS = read_beside(TOY)["settings"]


def read_saved(folder: Path) -> tuple[Settings, dict]:
    """Reads a run's config.json: its settings, and what else is there.

    That is `scene_size`, the width of its scenes, `program`, which started it, and `code`, each version that
    worked on it (see training/versions.py). Raises ValueError for the user.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        more = dict(
            scene_size=config.pop("scene_size"),
            program=config.pop("program", None),
            code=config.pop("code", []),
        )
        settings = Settings(**config)
        settings.check()
        return settings, more
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is not the folder of a run: its config.json cannot be read: {error}"
        ) from error


# ---- The command line --------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Is argparse's parser, but says in one sentence what is wrong."""

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parses as argparse does, but tells a mistyped or shortened flag which one is meant."""
        words = sys.argv[1:] if argv is None else argv
        # A mistyped flag comes before one that is missing, which may be the one that is meant.
        for word in takewhile(lambda word: word != "--", words):
            name = word.split("=")[0]
            is_flag = name.startswith("--") and " " not in name
            if is_flag and name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                self.error(f"{name} is no flag of this{meant}")
        return super().parse_args(words)

    def error(self, message: str):
        """Exits with code 2 and the message on one line."""
        self.exit(2, f"error: {printable(message)}\n")


def parse_arguments(description: str, argv: list[str] | None = None) -> Settings:
    """Returns the settings of a command line; exits with code 2 and one sentence if it is wrong.

    Settings that are not given are those beside the checkpoint, else the defaults. With --resume they are the
    run's (see `continue_settings`). `given` lists the names of those that are given, `seeds` the --seeds.
    """
    parser = OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a flag that is not given leaves no trace
    )
    # A flag for each field, in the groups of the help.
    titles = (RUN, LOOP, GRPO, SAMPLING, MEMORY)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in dataclasses.fields(Settings):
        _add_flag(groups[field.metadata["group"]], field)
    groups[RUN].add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="one run a seed, one after the other, in NAME-seed0, NAME-seed1, ...; report.py compares them",
    )
    given = vars(parser.parse_args(argv))
    seeds = given.pop("seeds", [])
    others = given.keys() & {"seed", "resume"}
    if seeds and ("name" not in given or others or len(set(seeds)) < len(seeds)):
        parser.error(
            "--seeds takes different seeds and a --name, and no --seed or --resume: the same command goes on"
        )
    # A run that goes on keeps its settings, but for a few.
    if "resume" in given:
        allowed = {*MAY_CHANGE, "iterations"} - {"name", "dry_run"}
        for name in given:
            if name not in allowed:
                parser.error(
                    f"--resume goes on with the run's own settings: leave {flag(name)} out"
                )
    try:
        beside = {}
        if "resume" not in given:
            beside = read_beside(find_model(given.get("model", "toy"))).get("settings", {})
        for name in PROMPTS & given.keys():
            given[name] = read_prompt(given[name], name)
        settings = Settings(**(beside | given))
        settings.given = tuple(given)  # a value that happens to be the default is given, too
        settings.seeds = tuple(seeds)
        for each in split_seeds(settings):
            each.check()
        if "resume" not in given:
            settings.check_useful()
        return settings
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def split_seeds(settings: Settings) -> list[Settings]:
    """Returns the settings of each run of a command line: one, or with --seeds one a seed.

    --dry-run shows the first.
    """
    runs = [
        dataclasses.replace(settings, seed=seed, name=f"{settings.name}-seed{seed}")
        for seed in settings.seeds
    ]
    runs = runs or [settings]
    return runs[:1] if settings.dry_run else runs


def read_prompt(path: str, name: str) -> str:
    """Reads the prompt of --questioner-prompt or --reasoner-prompt; the latter begins on a new line.

    Raises ValueError for the user.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag(name)} {path} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"{flag(name)} {path} is empty")
    return f"\n{text}" if name == "reasoner_prompt" else text


def continue_settings(given: Settings) -> tuple[Settings, dict]:
    """Returns the settings of the run in the folder `given.resume`, with those that are given, and the rest.

    The rest: see `read_saved`. Raises ValueError with a sentence for the user.
    """
    folder = Path(given.resume)
    saved, more = read_saved(folder)
    names = getattr(given, "given", ())  # of a command line; elsewhere the run's own settings stay
    changed = {name: getattr(given, name) for name in names if name != "resume"}
    if changed.get("iterations", math.inf) < saved.iterations:
        raise ValueError(
            f"--iterations must be at least the {saved.iterations} that {folder} was started with"
        )
    return dataclasses.replace(saved, **changed), more


def check_same_settings(settings: Settings, folder: Path) -> dict:
    """Raises ValueError naming the first setting that is not what the run in `folder` was started with.

    What only decides where and in how much memory the same numbers are computed may change, and a run may
    go on for more iterations. Returns what config.json says besides.
    """
    before, saved = read_saved(folder)
    for name, now in vars(settings).items():
        was = getattr(before, name)
        further = name == "iterations" and now > was
        unknown = name in PROMPTS and was is None  # in runs of earlier versions
        if was != now and name not in MAY_CHANGE and not further and not unknown:
            started, asked = (printable(shorten(str(value), 60)) for value in (was, now))
            raise ValueError(
                f"{folder} was started with {flag(name)} {started}, not {asked}; "
                f"--resume {folder} goes on with its own settings, another --name starts a new run"
            )
    return saved


def _add_flag(group, field: dataclasses.Field) -> None:
    """Adds a field's flag to its group of the help."""
    text = field.metadata["help"].replace("%", "%%")
    if field.type is bool:
        group.add_argument(flag(field.name), action="store_true", help=text)
        return
    if field.default is not None:
        toy = f"; the toy's {TOY_DEFAULTS[field.name]}" if field.name in TOY_DEFAULTS else ""
        text += f" (default: {field.default}{toy})"
    group.add_argument(
        flag(field.name),
        dest=field.name,
        type=field.type if field.type in (int, float) else str,
        choices=field.metadata["choices"],
        metavar=field.name.strip("_").upper(),
        help=text,
    )

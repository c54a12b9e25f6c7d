"""Every setting of a run: one field and one flag each, with the paper's symbol and value."""

import argparse
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

TOY = Path(__file__).parent.parent / "toy"
BESIDE = "visplay.json"  # beside a checkpoint: settings that fit it, and the instructions that it knows
HELD_OUT_QUESTIONS, HELD_OUT_SEED = 512, 1_000_000  # about scenes of this seed; no run's seed is that large
MOST = 1_000_000  # completions, answers, tokens of one: a larger number is a slip
MAY_CHANGE = ("name", "resume", "dry_run", "device", "gradient_checkpointing", "offload", "save_every")


def setting(default, help: str):
    """A field of `Settings`, with the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Every setting of a run: one flag each, the paper's values as defaults."""

    model: str | None = setting(
        None, "folder or hub id of a Qwen2.5-VL, MiMo-VL or Qwen3-VL checkpoint (default: the toy here)"
    )
    images: str | None = setting(
        None, "folder (with subfolders), glob, or .txt/.jsonl list of images (default: built-in scenes)"
    )
    name: str | None = setting(None, "the run's folder under runs/ (default: the model's name and the time)")
    resume: str | None = setting(
        None, "continue the run in this folder where it was stopped or killed, also with more --iterations"
    )
    seed: int = setting(0, "seed of everything random")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    dtype: str | None = setting(None, "float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")
    iterations: int = setting(3, "iterations of the loop, the paper's K")
    questioner_steps: int = setting(
        20, "GRPO steps of a Questioner phase, the paper's S_Q (20 for 3B, 10 for 7B)"
    )
    reasoner_steps: int = setting(
        20, "GRPO steps of a Reasoner phase, the paper's S_R (20 for 3B, 10 for 7B)"
    )
    images_per_step: int = setting(128, "images (Questioner) or curated questions (Reasoner) in a step")
    group_size: int = setting(8, "completions of one prompt that GRPO compares, the paper's G")
    answers: int = setting(10, "answers the Reasoner votes with on a question, the paper's m")
    candidates: int = setting(1000, "questions proposed for curation, the paper's N")
    tau_low: float = setting(0.25, "lowest confidence of a curated question, the paper's tau_low, inclusive")
    tau_high: float = setting(
        0.75, "highest confidence of a curated question, the paper's tau_high, inclusive"
    )
    diversity_weight: float = setting(1.0, "weight of the diversity penalty, the paper's lambda")
    lr: float = setting(1e-6, "learning rate of AdamW in both phases")
    weight_decay: float = setting(1e-2, "weight decay of AdamW")
    beta: float = setting(1e-2, "weight of the KL to the role at the start of its phase, the paper's beta")
    clip: float = setting(
        0.2, "clipping range of the ratio, the paper's epsilon; idle with one update a rollout, as here"
    )
    temperature: float = setting(1.0, "sampling temperature; divides the logits in training too")
    top_p: float = setting(0.99, "nucleus sampling: the smallest set of tokens with this probability")
    max_new_tokens: int = setting(1024, "longest completion, in tokens")
    max_pixels: int = setting(
        802_816,
        "larger images are scaled down to this: 1024 tokens of 28 x 28 pixels (Qwen2.5-VL, MiMo-VL), 784 of "
        "32 x 32 (Qwen3-VL)",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    offload: bool = setting(
        False, "keep float32 master weights and AdamW's moments in CPU memory, for a GPU that is too small"
    )
    lora_rank: int = setting(
        0, "train only a low-rank change of the text model, R; needs a higher --lr, as 2e-5 (0: all weights)"
    )
    freeze_vision: bool = setting(False, "leave the image encoder as it is; --lora-rank always does")
    save_every: int = setting(
        5, "steps between two saved states of a run; a state is also saved when a phase ends"
    )
    dry_run: bool = setting(
        False, "print what would run, how much memory it takes and how long (measured), then stop"
    )

    def check(self) -> None:
        """Raises ValueError, with a sentence for the user, for a value out of range or of another type."""
        for field in dataclasses.fields(self):  # flags have their types; files may hold anything
            value, kind = getattr(self, field.name), {float: float | int}.get(field.type, field.type)
            if not isinstance(value, kind) or isinstance(value, bool) != (field.type is bool):
                raise ValueError(f"{flag(field.name)} cannot be {value!r}")
        least = dict(
            iterations=1, questioner_steps=1, reasoner_steps=1, images_per_step=1, group_size=2, answers=1
        )
        least |= dict(candidates=1, max_new_tokens=1, max_pixels=1, seed=0, lr=0.0, weight_decay=0.0)
        least |= dict(beta=0.0, diversity_weight=0.0, tau_low=0.0, save_every=1, lora_rank=0)
        for name, value in least.items():
            if not getattr(self, name) >= value or math.isinf(getattr(self, name)):
                raise ValueError(
                    f"{flag(name)} must be a number of at least {value}, not {getattr(self, name)}"
                )
        for name, most in dict(max_new_tokens=MOST, group_size=MOST, answers=MOST).items():
            if getattr(self, name) > most:
                raise ValueError(f"{flag(name)} must be at most {most}, not {getattr(self, name)}")
        if not self.tau_low <= self.tau_high <= 1:
            raise ValueError(
                f"--tau-low ({self.tau_low}) must not be above --tau-high ({self.tau_high}), nor that above 1"
            )
        if not 1e-3 <= self.temperature < math.inf:
            raise ValueError(
                f"--temperature must be at least 0.001, not {self.temperature}: GRPO compares random samples"
            )
        if not 0 < self.top_p <= 1 or not 0 < self.clip < 1:
            raise ValueError("--top-p must be above 0 and at most 1, and --clip between 0 and 1")
        for name in ("model", "images"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"{flag(name)} is empty")
        if self.name is not None and (not self.name.strip(". ") or Path(self.name).name != self.name):
            raise ValueError(f"--name {self.name!r} is not the name of a folder")
        if self.seed >= HELD_OUT_SEED:
            raise ValueError(f"--seed must be below {HELD_OUT_SEED}, the seed of the held-out scenes")

    def check_useful(self) -> None:
        """Raises ValueError for settings of a new run with which nothing can be learnt."""
        m = self.answers
        if m < 2:
            raise ValueError(f"--answers must be at least 2, not {m}: a single one is always the majority")
        if not any(self.tau_low <= votes / m <= self.tau_high for votes in range(1, m + 1)):
            band = f"between --tau-low ({self.tau_low}) and --tau-high ({self.tau_high})"
            raise ValueError(f"no share of {m} --answers lies {band}, so that no question would be kept")


def beside(model: str | Path) -> dict:
    """What a local checkpoint's folder says for this program: {"settings": {..}, "instructions": [..]}.

    Each may be missing. Raises ValueError for the user.
    """
    file = Path(model).expanduser() / BESIDE
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    parts = dict(settings=dict, instructions=list)
    if not isinstance(said, dict) or any(type(said[n]) is not kind for n, kind in parts.items() if n in said):
        raise ValueError(f"{file} is not an object of settings (an object) and instructions (a list)")
    return said


UNKNOWN_INSTRUCTIONS = (
    "warning: this checkpoint knows other instructions than those in questioner.py and reasoner.py, and will "
    "understand little (for the toy: python -m toy.build makes one that knows them)"
)


def knows(model: str | Path, instructions: Iterable[str]) -> bool:
    """Whether a checkpoint that lists the instructions it knows lists these; True if it lists none."""
    known = beside(model).get("instructions")
    return known is None or all(text in known for text in instructions)


# The paper's hyper-parameters fit models of billions of parameters; these fit the toy.
TOY_DEFAULTS = beside(TOY)["settings"]


def flag(name: str) -> str:
    """A field's name as it is written on the command line."""
    return "--" + name.replace("_", "-")


GROUPS = {
    "what runs": ("model", "images", "name", "resume", "seed", "device", "dtype", "dry_run", "save_every"),
    "the loop": (
        *("iterations", "questioner_steps", "reasoner_steps", "images_per_step", "group_size", "answers"),
        *("candidates", "tau_low", "tau_high", "diversity_weight"),
    ),
    "GRPO": ("lr", "weight_decay", "beta", "clip", "lora_rank", "freeze_vision"),
    "prompts and sampling": ("temperature", "top_p", "max_new_tokens", "max_pixels"),
    "memory": ("gradient_checkpointing", "offload"),
}


class OneLineParser(argparse.ArgumentParser):
    """Says in one sentence what is wrong."""

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """As argparse's, but a mistyped flag is told which one is meant."""
        words = sys.argv[1:] if argv is None else argv
        names = [word.split("=")[0] for word in takewhile(lambda word: word != "--", words)]
        for name in (name for name in names if name.startswith("--") and " " not in name):
            if not any(known.startswith(name) for known in self._option_string_actions):
                self.no_flag(name)  # before one that is missing, which may be the one that is meant
        given, unknown = self.parse_known_args(words)
        unknown = [word for word in unknown if word != "--"]
        if unknown and not unknown[0].startswith("-"):
            self.error(f"{unknown[0]} is one argument too many")
        if unknown:
            self.no_flag(unknown[0].split("=")[0])
        return given

    def no_flag(self, name: str):
        """Exits with 2, and names the flag that is nearest."""
        near = difflib.get_close_matches(name, self._option_string_actions, 1)
        self.error(f"{name} is no flag of this" + (f"; did you mean {near[0]}?" if near else ""))

    def error(self, message: str):
        """Exits with 2."""
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        self.exit(2, f"error: {''.join(shown)}\n")


def parse_arguments(description: str, argv: list[str] | None = None) -> Settings:
    """The settings of a command line; exits with 2 and one sentence if it is wrong.

    With --resume all other settings are those of the run, but for what may change (see `command.resume`).
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=description, formatter_class=form, allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, fields[name])
    given = vars(parser.parse_args(argv))
    given = {name: value for name, value in given.items() if value is not None}
    if "resume" in given:
        allowed = {*MAY_CHANGE, "iterations"} - {"name", "dry_run"}
        if wrong := [name for name in given if name not in allowed]:
            parser.error(f"--resume takes the settings of the run it continues, not {flag(wrong[0])}")
    try:
        fitting = {} if "resume" in given else beside(given.get("model", TOY)).get("settings", {})
        settings = Settings(**(fitting | given))
        settings.given = tuple(given)  # a value that happens to be the default is given, too
        settings.check()
        if "resume" not in given:
            settings.check_useful()
        return settings
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def _add_flag(group, field: dataclasses.Field) -> None:
    text = field.metadata["help"].replace("%", "%%")
    if field.type is bool:
        group.add_argument(flag(field.name), action="store_true", default=None, help=text)
        return
    if field.default is not None:
        toy = f"; the toy's {TOY_DEFAULTS[field.name]}" if field.name in TOY_DEFAULTS else ""
        text += f" (default: {field.default}{toy})"
    kind = field.type if field.type in (int, float) else str
    choices = ("float32", "bfloat16") if field.name == "dtype" else None
    name = field.name.upper()
    group.add_argument(flag(field.name), type=kind, choices=choices, metavar=name, help=text)

"""Labelled questions: what a line of evaluation data says, checked before anything is asked."""

import json
import math
import re
import string
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """A question about an image with its true answer: all of `answer` count as right."""

    image: str
    question: str
    answer: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""
    question_id: str = ""
    figure_id: str = ""


def read_lines(path: Path) -> list[tuple[int, Item]]:
    """The items of a JSONL file, each with the number of its line. Raises ValueError with a sentence."""
    items = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may stand in a text
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line := line.strip(" \t\r\ufeff"):
            try:
                items.append((number, _item(json.loads(line), path.parent)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"--data {path}, line {number}: {error}") from error
    return items


def _item(fields: object, folder: Path) -> Item:
    """The item that a line stands for; raises ValueError with a sentence."""
    if not isinstance(fields, dict):
        raise ValueError('it is not an object {"image": ..., "question": ..., "answer": ...}')
    image, question, answer, choices = (
        fields.get(name) for name in ("image", "question", "answer", "choices")
    )
    for name, value in (("image", image), ("question", question)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is not text but {_short(value)}")
    choices = None if choices == "" else choices
    if isinstance(choices, dict) and [*choices] == [*string.ascii_uppercase[: len(choices)]]:
        choices = [*choices.values()]
    if choices is not None and not isinstance(choices, list):
        raise ValueError(f"choices is not a list but {_short(choices)}")
    names = [name for name in ("kind", "question_id", "figure_id") if fields.get(name) not in (None, "")]
    return Item(
        str(folder / image),
        *_texts([question], "question"),
        _texts(answer if isinstance(answer, list) else [answer], "answer"),
        _texts(choices, "choices") if choices else (),
        **{name: _texts([fields[name]], name)[0] for name in names},
    )


def _texts(values: list, name: str) -> tuple[str, ...]:
    """Texts and numbers as texts; raises ValueError if there are none, or others among them."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise ValueError(f"{name} is not text or a number but {_short(value)}")
        is_odd_number = isinstance(value, float) and not math.isfinite(value)
        if is_odd_number or re.search("[\ud800-\udfff]", str(value)):
            raise ValueError(f"{name} is no readable text or number: {_short(value)}")
    if not values:
        raise ValueError(f"{name} is empty")
    return tuple(map(str, values))


def _short(value: object) -> str:
    return repr(value)[:100]

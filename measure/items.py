"""Labelled questions: what a line of evaluation data says, checked before anything is asked, and which
answers to it are right."""

import json
import math
import re
import string
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from answers import canonical, extract_answer, same_answer, without_thinking
from measure.choices import options_in, read_choice, read_yes_no


@dataclass(frozen=True)
class Item:
    """A question about one image or several, with its true answer: all of `answer` count as right.

    image: the path of the first. ending: the prompt's last words, "" for the Reasoner's own, which ask for a
    box. precision: how many decimals of a number count. images: the paths of all; without them there is one.
    placed: true if the texts place even a single image (see `marks`).
    """

    image: str
    question: str
    answer: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""
    question_id: str = ""
    figure_id: str = ""
    ending: str = ""
    precision: int | None = None
    images: tuple[str, ...] = ()
    placed: bool = False

    def __post_init__(self):
        """Makes `image` and `images` agree."""
        images = self.images or (self.image,)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "image", images[0])

    @property
    def marks(self) -> list[str]:
        """Lists the marks that place the images in a prompt: <image 1>, <image 2>, ...

        Empty for a single image that no text moves: it stands first.
        """
        if len(self.images) == 1 and not self.placed:
            return []
        return [f"<image {number}>" for number in range(1, len(self.images) + 1)]

    @property
    def image_set(self) -> tuple[str, ...]:
        """Identifies the images, in whatever order. Questions about the same ones are not independent.

        Questions that share some of their images, and not all, count as independent.
        """
        return tuple(sorted(set(self.images)))


# ---- Lines ----


def read_lines(path: Path) -> list[Item]:
    """The items of a JSONL file. Raises ValueError with a sentence, which names the line."""
    items = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 may stand in a text
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line := line.strip(" \t\r\ufeff"):
            try:
                items.append(item_of(json.loads(line), path.parent))
            except json.JSONDecodeError as error:
                raise ValueError(f"--data {path}, line {number} is not JSON: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"--data {path}, line {number}: {error}") from error
    return items


def item_of(fields: object, folder: Path) -> Item:
    """The item that a line stands for. Raises ValueError with a sentence."""
    if not isinstance(fields, dict):
        raise ValueError('it is not an object {"image": ..., "question": ..., "answer": ...}')
    images = _images(fields)
    question, answer, choices = (fields.get(name) for name in ("question", "answer", "choices"))
    if not _is_text(question):
        raise ValueError(f"question is not text but {_short(question)}")
    choices = None if choices == "" else choices
    if isinstance(choices, dict) and [*choices] == [*string.ascii_uppercase[: len(choices)]]:
        choices = [*choices.values()]
    if choices is not None and not isinstance(choices, list):
        raise ValueError(f"choices is not a list but {_short(choices)}")
    names = [n for n in ("kind", "question_id", "figure_id", "ending") if fields.get(n) not in (None, "")]
    item = Item(
        str(folder / images[0]),
        *_texts([question], "question"),
        _texts(answer if isinstance(answer, list) else [answer], "answer"),
        _texts(choices, "choices") if choices else (),
        **{name: _texts([fields[name]], name)[0] for name in names},
        precision=fields.get("precision"),
        images=tuple(str(folder / image) for image in images),
        placed=fields.get("images") is not None,
    )
    _check(item)
    return item


def _images(fields: dict) -> list[str]:
    """Reads the paths in "image" or "images". Raises ValueError with a sentence."""
    image, images = fields.get("image"), fields.get("images")
    if image is not None and images is not None:
        raise ValueError("there are both image and images")
    if image is None and images is None:
        raise ValueError("there is neither image nor images")
    if images is None:
        if not _is_text(image):
            raise ValueError(f"image is not text but {_short(image)}")
        return [image]
    if not isinstance(images, list):
        raise ValueError(f"images is not a list but {_short(images)}")
    if not images:
        raise ValueError("images is empty")
    for path in images:
        if not _is_text(path):
            raise ValueError(f"images holds what is not text but {_short(path)}")
    return images


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check(item: Item) -> None:
    """Raises ValueError with a sentence if the fields of an item do not fit each other."""
    choices, precision = item.choices, item.precision
    if len(choices) > 26:
        raise ValueError("there are more than 26 choices")
    if choices and not any(read_choice(truth, choices) for truth in item.answer):
        raise ValueError(f"the answer {' or '.join(item.answer)!r} is none of the choices")
    if item.kind == "all":
        raise ValueError('the kind "all" is the name of the overall scores')
    is_whole = isinstance(precision, int) and not isinstance(precision, bool) and 0 <= precision <= 20
    if precision is not None and not is_whole:
        raise ValueError(f"precision is not a whole number from 0 to 20 but {_short(precision)}")


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


# ---- Which answer is right ----


def choices_of(item: Item) -> tuple[str, ...]:
    """The choices of an item: its own, or those in its question's text if its answer is the letter of one."""
    if item.choices:
        return item.choices
    choices = options_in(item.question)
    letters = string.ascii_uppercase[: len(choices)]
    is_lettered = choices and all(len(a) == 1 and a.upper() in letters for a in item.answer)
    return choices if is_lettered else ()


def read_answer(text: str, item: Item) -> str | None:
    """The answer in what a model wrote.

    With choices it is the letter, if the true answer is yes or no that word, both also where there is no box;
    else the content of the last box. An item's own ending may ask for no box: where there is none, it is what
    stands behind the last "answer:" or "answer is", else the last line.
    """
    if item.choices:
        return read_choice(text, item.choices)
    boxed = extract_answer(text)
    if choices := choices_of(item):
        return read_choice(text, choices) or boxed
    if boxed is None and item.ending:
        boxed = _last_words(without_thinking(text))
    if {canonical(answer) for answer in item.answer} <= {"yes", "no"}:
        verdict = read_yes_no(text)
        return boxed if verdict is None else ("no", "yes")[verdict]
    return boxed


_ANSWER = re.compile(r"\banswer(?: is ?:?| ?:)\s*", re.IGNORECASE)


def _last_words(text: str) -> str | None:
    """What stands behind the last "answer:" on its line, else the last line; None if there is nothing."""
    ends = [found.end() for found in _ANSWER.finditer(text)]
    said = text[ends[-1] :].partition("\n")[0].strip() if ends else ""
    lines = text.strip().rsplit("\n", 1)
    return said or lines[-1].strip() or None


def right(answer: str | None, item: Item) -> bool:
    """Whether an answer, as `read_answer` gives it, is right.

    Of a question without choices: equal to one of the true answers by `same_answer`, or the same number after
    rounding to two decimals (MMMU's rule for open questions). With a precision, numbers count to that many
    decimals and units do not (MathVista's rule). Of "this <AND> that" both must stand in it (MM-Vet's).
    """
    if answer is None:
        return False
    if choices := choices_of(item):
        return any(answer == read_choice(truth, choices) for truth in item.answer)
    if item.precision is not None:
        return any(_same_to(answer, truth, item.precision) for truth in item.answer)
    return any(
        same_answer(answer, truth) or _same_rounded(answer, truth) or _has_all(answer, truth)
        for truth in item.answer
    )


_PERCENT = re.compile(r"[%％]|per ?cent", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+/\d+|\d*\.?\d+)")


def _same_rounded(a: str, b: str) -> bool:
    """Of plain numbers only: in hundredths, a percentage would be rounded to a whole one."""
    if _PERCENT.search(a) or _PERCENT.search(b):
        return False
    values = [canonical(a), canonical(b)]
    return not any(isinstance(value, str) for value in values) and round(values[0], 2) == round(values[1], 2)


def _same_to(a: str, b: str, precision: int) -> bool:
    """The same numbers after rounding; with precision 0 what stands behind the point is cut off instead."""
    values = [_number(a), _number(b)]
    if None in values:
        return same_answer(a, b)
    first, second = (round(value, precision) if precision else int(value) for value in values)
    return first == second


def _number(text: str) -> Fraction | None:
    """The first number behind the last "=", as it is written: 5 of "x = 5 cm", 50 of "50%"."""
    value = canonical(text)
    if isinstance(value, Fraction):
        return value * 100 if _PERCENT.search(text) else value
    found = _NUMBER.search(value.rpartition("=")[2][:400])
    try:
        return Fraction(found[0]) if found else None
    except ZeroDivisionError:
        return None


def _has_all(answer: str, truth: str) -> bool:
    """Whether each of the texts that <AND> joins stands in the answer, as whole words."""
    parts = [part.lower().split() for part in truth.split("<AND>")]
    words = " ".join(re.sub(r"[.,;:!?](?=\s|$)", " ", answer.lower()).split())
    return len(parts) > 1 and all(parts) and all(f" {' '.join(part)} " in f" {words} " for part in parts)

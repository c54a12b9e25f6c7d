"""Labelled questions: lines of evaluation data, checked before anything is asked, and their right answers."""

import json
import math
import re
import string
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from answers import (
    CHANGES_NUMBER,
    agrees,
    canonical,
    extract_answer,
    plain_characters,
    read_parts,
    without_thinking,
)
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


def read_lines(path: Path, flag: str = "--data") -> list[Item]:
    """Reads the items of a JSONL file. Raises ValueError with a sentence, which names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}") from error
    items = []
    # Not splitlines: U+2028 may stand in a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.strip(" \t\r\ufeff"):
            try:
                items.append(parse_item(json.loads(line), path.parent))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{flag} {path}, line {number} is not JSON: {error.msg}"
                ) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{flag} {path}, line {number}: {error}") from error
    return items


def parse_item(fields: object, folder: Path) -> Item:
    """Returns the item that a line's fields describe, its images in `folder`.

    Raises ValueError with a sentence if a field is missing or wrong.
    """
    if not isinstance(fields, dict):
        raise ValueError('it is not an object {"image": ..., "question": ..., "answer": ...}')
    images = [str(folder / path) for path in _read_image_paths(fields)]
    question = _read_text(fields.get("question"), "question")
    answers = fields.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers:
        raise ValueError("answer is empty")
    item = Item(
        images[0],
        _to_text(question, "question"),
        tuple(_to_text(answer, "answer") for answer in answers),
        tuple(_to_text(choice, "choices") for choice in _read_choices(fields.get("choices"))),
        *(_optional_text(fields, name) for name in ("kind", "question_id", "figure_id", "ending")),
        precision=fields.get("precision"),
        images=tuple(images),
        placed=fields.get("images") is not None,
    )
    _check_item(item)
    return item


def _read_image_paths(fields: dict) -> list[str]:
    """Returns the paths in "image" or "images". Raises ValueError with a sentence."""
    image = fields.get("image")
    images = fields.get("images")
    if (image is None) == (images is None):
        raise ValueError("there must be an image or images, and not both")
    if images is None:
        return [_read_text(image, "image")]
    if not isinstance(images, list) or not images:
        raise ValueError(f"images is not a list of paths but {_shorten(images)}")
    places = enumerate(images, start=1)
    return [_read_text(path, f"image {number} of images") for number, path in places]


def _read_text(value: object, name: str) -> str:
    """Returns a text that is not empty. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is not text but {_shorten(value)}")
    return value


def _read_choices(choices: object) -> list:
    """Returns the choices as a list, also those of {"A": ..., "B": ...}. Raises ValueError for others."""
    if choices is None or choices == "":
        return []
    if isinstance(choices, dict) and [*choices] == [*string.ascii_uppercase[: len(choices)]]:
        return [*choices.values()]
    if not isinstance(choices, list):
        raise ValueError(f"choices is not a list but {_shorten(choices)}")
    return choices


def _optional_text(fields: dict, name: str) -> str:
    """Returns the text of a field, "" without one. Raises ValueError if it is neither text nor a number."""
    value = fields.get(name)
    return "" if value is None or value == "" else _to_text(value, name)


def _check_item(item: Item) -> None:
    """Raises ValueError with a sentence if the fields of an item do not fit each other."""
    choices = item.choices
    if len(choices) > 26:
        raise ValueError("there are more than 26 choices")
    if choices and not any(read_choice(truth, choices) for truth in item.answer):
        raise ValueError(f"the answer is none of the choices but {' or '.join(item.answer)!r}")
    if item.kind == "all":
        raise ValueError('the kind "all" is the name of the overall scores')
    # type() and not isinstance(): True is no number
    precision = item.precision
    if precision is not None and (type(precision) is not int or not 0 <= precision <= 20):
        raise ValueError(f"precision is not a whole number from 0 to 20 but {_shorten(precision)}")


def _to_text(value: object, name: str) -> str:
    """Returns a text or a number as text. Raises ValueError for anything else."""
    text = str(value)
    if type(value) not in (str, int, float) or not text.strip():
        raise ValueError(f"{name} is not text or a number but {_shorten(value)}")
    is_odd_number = isinstance(value, float) and not math.isfinite(value)
    if is_odd_number or re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name} is no readable text or number: {_shorten(value)}")
    return text


def _shorten(value: object) -> str:
    return repr(value)[:100]


# ---- Right answers ----


def find_choices(item: Item) -> tuple[str, ...]:
    """Returns the choices of an item: its own, or those in its question's text if its answer is a letter."""
    if item.choices:
        return item.choices
    choices = options_in(item.question)
    letters = string.ascii_uppercase[: len(choices)]
    is_lettered = all(len(truth) == 1 and truth.upper() in letters for truth in item.answer)
    return choices if is_lettered else ()


def read_answer(text: str, item: Item) -> str | None:
    """Returns the answer in what a model wrote, None if there is none.

    With choices it is the letter, if the true answer is yes or no that word, both also where there is no box.
    Else it is the content of the last box. An item's own ending may ask for no box: where there is none, the
    answer is what stands behind the last "answer:" or "answer is", else the last line.
    """
    if item.choices:
        return read_choice(text, item.choices)
    boxed = extract_answer(text)
    if choices := find_choices(item):
        return read_choice(text, choices) or boxed
    if boxed is None and item.ending:
        boxed = _last_words(without_thinking(text))
    if {canonical(truth) for truth in item.answer} <= {"yes", "no"}:
        verdict = read_yes_no(text)
        if verdict is not None:
            return "yes" if verdict else "no"
    return boxed


_ANSWER = re.compile(r"\banswer(?: is ?:?| ?:)\s*", re.IGNORECASE)


def _last_words(text: str) -> str | None:
    """Returns what stands behind the last "answer:" on its line, else the last line; None without either."""
    said = ""
    for found in _ANSWER.finditer(text):
        said = text[found.end() :].partition("\n")[0].strip()
    return said or text.strip().rpartition("\n")[2].strip() or None


def right(answer: str | None, item: Item) -> bool:
    """Returns whether an answer, as `read_answer` gives it, is right.

    A letter is compared with the letter of the true choice. Without choices an answer is right

    * if it agrees with one of the true answers: a unit, sign or name that one of them leaves out is not
      compared (see `answers.agrees`);
    * if it is the same number after rounding to two decimals (MMMU's rule for open questions);
    * if all parts of "this <AND> that" stand in it (MM-Vet's rule).

    With a precision, numbers count to that many decimals and units do not (MathVista's rule).
    """
    if answer is None:
        return False
    if choices := find_choices(item):
        return any(answer == read_choice(truth, choices) for truth in item.answer)
    if item.precision is not None:
        return any(_same_to_precision(answer, truth, item.precision) for truth in item.answer)
    return any(
        agrees(answer, truth) or _same_rounded(answer, truth) or _has_all_parts(answer, truth)
        for truth in item.answer
    )


def _same_rounded(a: str, b: str) -> bool:
    """Returns whether two plain numbers are the same to two decimals.

    Percentages are no plain numbers: in hundredths they would be rounded to whole ones.
    """
    first = read_parts(a)
    second = read_parts(b)
    if any(isinstance(parts.value, str) or parts.unit for parts in (first, second)):
        return False
    rounded = [parts._replace(value=round(parts.value, 2)) for parts in (first, second)]
    return rounded[0].fits(rounded[1])


def _same_to_precision(a: str, b: str, precision: int) -> bool:
    """Returns whether two numbers are the same to so many decimals; with precision 0 these are cut off."""
    first = _read_number(a)
    second = _read_number(b)
    if first is None or second is None:
        return agrees(a, b)
    if precision == 0:
        return int(first) == int(second)
    return round(first, precision) == round(second, precision)


_NUMBER = re.compile(r"(?<![^\s=~≈])[+-]?[$€£¥]?[+-]?\.?\d")  # begins here
_POWER = re.compile(r"(-?\d+(?:/\d+)?)×10\^(-?\d{1,3})")


def _read_number(text: str) -> Fraction | None:
    """Returns the number that a text states, None without one.

    5 of "x = 5 cm", 50 of "50%", 1500 of "1.5e3", 1200 of "about 1,200 m", 293 of "256+37 = 293".
    None of an expression, as 2π, 10^3 and 5 million, of several numbers, and of none.
    """
    value = read_parts(text).value
    if isinstance(value, str) and not _POWER.fullmatch(value):
        # The first number behind the last "=", with all that follows it
        said = value.rpartition("=")[2]
        found = _NUMBER.search(said)
        before = said[: found.start()].split() if found else []
        if not found or any(map(CHANGES_NUMBER.fullmatch, before)):
            return None
        value = read_parts(said[found.start() :]).value
    if isinstance(value, str) and (power := _POWER.fullmatch(value)):
        return Fraction(power[1]) * Fraction(10) ** int(power[2])
    return value if isinstance(value, Fraction) else None


def _has_all_parts(answer: str, truth: str) -> bool:
    """Returns whether each of the texts that <AND> joins stands in the answer, as whole words."""
    parts = [" ".join(plain_characters(part).split()) for part in truth.split("<AND>")]
    plain = re.sub(r"[.,;:!?](?=\s|$)", " ", plain_characters(answer))
    words = f" {' '.join(plain.split())} "
    return len(parts) > 1 and all(part and f" {part} " in words for part in parts)

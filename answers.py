r"""Answers: which one an output gives, and when two of them say the same.

One rule serves the votes, the Reasoner's reward and evaluation alike.
"""

import re
import string
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

# ---- Which answer an output gives ----


_TOKEN = re.compile(r"\\boxed\s{0,8}\{|\\[{}]|[{}]")


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed and not empty, or None.

    Braces may nest (\boxed{\frac{1}{2}}); of a box in a box the inner one counts. One pass over the text with a stack
    of open braces, so unbalanced or endless braces cost no more than their length.
    """
    open_braces, best_start, best = [], -1, None
    for token in _TOKEN.finditer(text):
        if token[0].startswith(r"\boxed"):
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > best_start and (content := text[start : token.start()].strip()):
                best_start, best = start, content
    return best


def without_thinking(text: str) -> str:
    """The text after one leading <think>...</think>; unchanged if there is none."""
    text = text.lstrip()
    if not text.startswith("<think>"):
        return text
    _, closed, rest = text.partition("</think>")
    return rest if closed else text


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer means, or None: "B", "(b)", "B. a cat", "a cat", "the answer is (B)".

    The rules of MMMU, but that it draws a letter at random where it finds none, and that here the clearest sign decides: a
    letter and nothing else, the text of a choice and nothing else, a letter in brackets or before a mark, a letter on its own,
    the text of a choice somewhere. Of several of one sort the last counts.
    """
    letters, text = string.ascii_uppercase[: len(choices)], text.strip()
    whole = canonical(text)
    if isinstance(whole, str) and len(whole) == 1 and whole.upper() in letters:
        return whole.upper()
    for letter, choice in zip(letters, choices):
        if same_answer(text, choice):
            return letter
    alone = rf"\b([{letters[1:] or 'A'}])\b"  # not A, which may be the article, but at the end
    for pattern in (rf"\(([{letters}])\)", rf"\b([{letters}])[.:)]", alone, r"\b(A)\s*$"):
        if found := re.findall(pattern, text):
            return found[-1]
    places = {
        letter: text.lower().rfind(choice.strip().lower())
        for letter, choice in zip(letters, choices)
        if choice.strip()
    }
    last = max(places, key=lambda letter: (places[letter], len(choices[letters.index(letter)])), default=None)
    return last if last is not None and places[last] >= 0 else None


# ---- When two answers say the same ----

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\s?\{([^{}]{0,200})\}")
_LAYOUT = re.compile(r"\\left|\\right|\\[()\[\]$]|[$*]")  # marks of LaTeX and Markdown that say nothing
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}")
_NUMBER = re.compile(r"([+-]?)((?:\d{1,3}(?:,\d{3}){1,9}|\d{1,30})(?:\.\d{0,30})?|\.\d{1,30})")
_LONGEST = 400  # characters; a longer answer is compared as it stands


def same_answer(a: str, b: str) -> bool:
    r"""Whether two answers say the same: 0.5 = 1/2 = \frac{1}{2} = 50\%, (B) = B. = b, 1,000 = 1000, \text{cat} = cat.

    Two answers are equal when their canonical forms are, so this is an equivalence relation, as counting votes needs
    (a numerical tolerance would not be one). Nothing is evaluated: numbers are matched by a pattern of bounded length.
    """
    return canonical(a) == canonical(b)


def canonical(answer: str) -> Fraction | str:
    """The value of an answer that is a number, a fraction or a percentage; else its words, stripped and lower-cased."""
    if len(answer) > _LONGEST:
        return answer.strip()
    text = "".join(map(_plain, answer)).replace("\u2212", "-").replace("\u2044", "/")
    text = _LAYOUT.sub("", text.replace(r"\%", "%"))
    text = _FRACTION.sub(r"\1/\2", _WRAPPER.sub(r"\1", _WRAPPER.sub(r"\1", text)))
    text = " ".join(text.lower().split()).rstrip(" .,;:!?")
    inner = text.removeprefix("(").removesuffix(")").strip()
    if not set("()") & set(inner) and (
        _value(inner) is not None or "," not in inner
    ):  # (B), B) and (1,000), not (1,2)
        text = inner
    value = _value(text)
    return text if value is None else value


def _plain(character: str) -> str:
    """A character in its plainest form, so that full-width and italic digits are digits, but 5² is not 52."""
    kind = unicodedata.decomposition(character).split(" ")[0]
    mark = {"<super>": "^", "<fraction>": " "}.get(kind, "")
    return mark + unicodedata.normalize("NFKC", character)


def _value(text: str) -> Fraction | None:
    percent = text.endswith("%")
    parts = text.removesuffix("%").strip().split("/")
    numbers = [_number(part.strip()) for part in parts]
    if len(parts) > 2 or None in numbers or (len(parts) == 2 and numbers[1] == 0):
        return None
    value = numbers[0] / numbers[1] if len(parts) == 2 else numbers[0]
    return value / 100 if percent else value


def _number(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    return Fraction(match[1] + match[2].replace(",", "")) if match and match[2].isascii() else None

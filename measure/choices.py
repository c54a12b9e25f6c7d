"""The choice that an output means, as its letter: letters, texts of choices, yes and no.

"B", "(b)", "B. a cat", "a cat", "The answer is B.", "B is correct", "Not A, it is B"      B
"""

import re
import string
from collections.abc import Sequence

from answers import (
    NEXT_LETTER,
    canonical,
    compose,
    extract_answer,
    plain_character,
    says_something,
    without_thinking,
)

# ---- Patterns ----

_EDGE = "0-9A-Za-z_\u00c0-\u052f"  # what makes a word longer; Chinese beside a letter does not
_DENIED = re.compile(  # their letters are not meant
    r"(?i:\b(?:(?:can)?not|nor|neither|never|rather than|instead of|except|ruled? out|excludes?|eliminates?)"
    r"(?: be)? (?:the )?(?:option |choice |answer )?|n't (?:be )?)\(?[A-Z]\b\)?"  # not B, isn't B
    r"|\(?\b[A-Z]\b\)? (?:is|are|looks|seems)(?:n't| not| (?:also |clearly )?(?:wrong|incorrect|tempting))"
    r"|\(?\b[A-Z]\b\)? (?:can't|cannot)"
    r"|(?:不是|不选|排除|并非|而非) ?\(?[A-Z]\b\)?|[A-Z]\)? ?(?:选项)?是?(?:不对|不正确|错)"
)
_STATED = re.compile(  # the answer is, answer:, the answer to it must be; no, it's; I choose; 答案是, 选
    r"(?i:\banswer\b[^.:=\n]{0,40}?(?:\b(?:is|be|was)\b(?! not)|[:=\n])\s{0,2}:?\s{0,2}"
    r"|\b(?:option|choice)(?: is\b| should be\b|:) ?"
    r"|\b(?:no|wait|actually|sorry), (?:it is |it's )?|\bi (?:would )?(?:choose|pick|select|go with) )"
    r"|答案(?:应该|应)?(?:是|为|选)? ?:? ?(?:选项?)? ?|选[择项]? ?:? ?"
)
_FILLER = re.compile(  # what may stand between "the answer is" and the answer
    r"(?i:(?:option|choice|letter|most likely|probably|clearly|simply|the) ){0,2}[\"'(\[]{0,2} ?"
)
_NO_WORD = re.compile(  # behind a letter: it is no word of a sentence
    r" ?(?:$|[^\w\s]|\n|[^\x00-\x7f])| (?:because|since|as|due|for|given|is|which)\b"
)
_CALLED_RIGHT = re.compile(
    rf"(?<![{_EDGE}])([A-Z])\)? (?:is|was|must be|would be|seems|looks) (?:the |most |best |clearly ){{0,3}}"
    r"(?:correct|right|true|best|answer|appropriate)|([A-Z])\)? ?(?:选项)?是?(?:正确|对的)"
)
_PART_OF_NAME = re.compile(  # no choices: 5 A, 2-D, 30 °C, vitamin C, angle B, Ph.D., N/A, C++
    r"\d[ -]?[A-Z]\b(?![):])|°\s?[A-Z]\b|(?i:\b(?:degrees?|deg|celsius)) [A-Z]\b"
    r"|(?i:\b(?:vitamins?|hepatitis|influenza|plan|types?|grade|class|appendix|malcolm"
    r"|angle|vertex|side|gate|terminal|platform|room|zone))[ -][A-Z]\b"
    r"|\b(?:[A-Z][a-z]?\.){1,5}[A-Z]\b\.?|\b[A-Z](?:[/&][A-Z])+\b"
    r"|\b[A-Z](?:[+#]{1,2}(?!\w)|-(?:[a-z]+|\d+))|\b[A-Z](?= (?:major|minor|flat|sharp)\b)"
)
_UNDECIDED = re.compile(  # no answer is not no
    r"(?i:\b(?:yes (?:or|and|nor) no|no (?:or|and|nor) yes|yes ?/ ?no|no ?/ ?yes)\b"
    r"|\bno (?:answer|idea|clue|information|comment|response|doubt|question|telling|way of knowing)\b"
    r"|\bno (?:way|means) (?:\w+ )?to (?:tell|know|say|see|determine|decide|be sure|answer)\b"
    r"|\bno ?one (?:knows|can)\b|\b(?:could|may|might) be (?:yes|no)\b"
    r"|(?:\b(?:can ?not|can't|couldn't|don't know|unable|unclear|unsure|(?:impossible|hard|difficult) to)"
    r"|\bnot (?:possible|able|enough|clear|sure|certain|sufficient))\b[^.,;:!?\n]{0,200})"
)


# ---- What an output means ----


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the letter of the choice that an output means, or None.

    The clearest sign decides, first in the last box, then in the text around it:

    1. what is stated: "the answer is B", "B is correct";
    2. a letter or the text of a choice and nothing else;
    3. what the text begins with: "Yes, it is";
    4. letters in brackets, before a mark, on their own ("I" and "A" are words);
    5. the text of a choice somewhere: whole words only, the longest first.

    Of several of one sort the last counts. What is denied ("not B") does not count.
    """
    choices = choices[:26]
    menu = _Menu(choices, string.ascii_uppercase[: len(choices)])
    return _find_letter(text, menu, _DENIED)


def read_yes_no(text: str) -> bool | None:
    """Returns what an output says to a question of yes or no: "Yes, the left" is True. None if unclear.

    "No idea", "I cannot say no" and "yes or no" are unclear.
    """
    letter = _find_letter(text, _Menu(("yes", "no"), letters=""), _UNDECIDED, _DENIED)
    return None if letter is None else letter == "A"


class _Menu:
    """The choices, and a pattern that finds their texts: whole words and numbers, the longest first."""

    def __init__(self, choices: Sequence[str], letters: str):
        self.letters = letters  # that stand for the choices in an output; "" for none
        self.texts = [_make_readable(choice).strip(" .\n").lower() for choice in choices]
        longest_first = sorted(filter(None, self.texts), key=len, reverse=True)
        patterns = [self._whole_words(text) for text in longest_first]
        self.pattern = re.compile("|".join(patterns) or "(?!)", re.IGNORECASE)

    @staticmethod
    def _whole_words(text: str) -> str:
        before = f"(?<![{_EDGE}])" if re.match(f"[{_EDGE}]", text[0]) else ""
        after = f"(?![{_EDGE}])" if re.match(f"[{_EDGE}]", text[-1]) else ""
        # 5 is found in neither -5, 1.5 nor 5.0
        if text[0].isdigit():
            before += r"(?<!\d[.,])(?<!-)"
        if text[-1].isdigit():
            after += r"(?![.,]?\d)"
        # Blanks part words; beside a sign, and between a number and its unit, they say nothing: 30°C, 30 °C
        pattern = ""
        for piece in re.finditer(r"(\s*)(\d+(?:[.,]\d+)*|[^\W\d_]+|\S)", text):
            two_words = piece[1] and text[piece.start() - 1].isalpha() and piece[2].isalpha()
            blank = r"\s+" if two_words else r"\s*"
            pattern += blank * bool(pattern) + re.escape(piece[2])
        return before + pattern + after

    def find_letter(self, mention: str) -> str | None:
        """Returns the letter of the choice with this text, None if there is none."""
        words = mention.lower().split()
        for glue in (" ", ""):
            for letter, text in zip(string.ascii_uppercase, self.texts):
                if glue.join(text.split()) == glue.join(words):
                    return letter
        return None

    def mask(self, text: str) -> str:
        """Replaces texts of choices, units and names by lines: the letter of "vitamin C" is no choice."""
        text = self.pattern.sub(lambda name: name[0] if len(name[0]) == 1 else _line(name), text)
        return _PART_OF_NAME.sub(_line, text)


def _line(found: re.Match) -> str:
    return "_" * len(found[0])


def _find_letter(text: str, menu: _Menu, *unmeant: re.Pattern) -> str | None:
    """Returns the letter that the clearest sign in a text gives, None without any sign.

    unmeant: patterns of what does not count.
    """
    box = extract_answer(text) or ""
    text = without_thinking(text)
    around = _make_readable(text.replace("{" + box + "}", " ") if box else text)
    box = _make_readable(box)
    box_meant = box
    around_meant = around
    for pattern in unmeant:
        box_meant = pattern.sub(" ", box_meant)
        around_meant = pattern.sub(" ", around_meant)
    box_masked = menu.mask(box_meant)
    around_masked = menu.mask(around_meant)
    signs = [
        (_find_stated, box_meant, box_masked),
        (_match_whole, box),
        (_match_beginning, box_meant, box_masked),
        (_find_text, box_meant),
        (_find_stated, around_meant, around_masked),
        (_match_whole, around),
        (_match_beginning, around_meant, around_masked),
        (_find_lone_letter, around_masked),
        (_find_text, around_meant),
    ]
    if not set("\\=") & set(box):  # the E of \Delta E is no choice
        signs.append((_find_lone_letter, box_masked))
    for find, *where in signs:
        if letter := find(menu, *where):
            return letter
    return None


def _make_readable(text: str) -> str:
    """Returns the ends of a text in plain characters, without fonts and formulas, with single blanks.

    Lines stay.
    """
    text = "".join(map(plain_character, _keep_ends(text)))
    text = compose(_keep_ends(text))
    text = re.sub(r"\\(?:text|math)[a-z]{0,8}(?= ?\{)|\*\*|[{}$`]|\\[()\[\],;!]", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r" ?\n\s*", "\n", text).strip()


def _keep_ends(text: str) -> str:
    """Returns the beginning and the end of a long text, where answers are given."""
    return text if len(text) <= 1500 else text[:500] + "\n" + text[-1000:]


# ---- The signs; `masked` is the text as `menu.mask` returns it ----


def _find_stated(menu: _Menu, text: str, masked: str) -> str | None:
    """Returns the last letter, or text of a choice, that is called the answer."""
    last_start = -1
    last = None
    # "the answer is B"
    for found in _STATED.finditer(text):
        start = _FILLER.match(text, found.end()).end()
        mention = menu.pattern.match(text, start)
        if mention and mention[0].upper() not in menu.letters:
            letter = menu.find_letter(mention[0])
        else:
            letter = _read_letter(masked, start, menu)
        if letter:
            last_start = start
            last = letter
    # "B is correct"
    for found in _CALLED_RIGHT.finditer(masked):
        letter = found[1] or found[2]
        if letter in menu.letters and found.start() > last_start:
            last_start = found.start()
            last = letter
    return last


def _read_letter(text: str, start: int, menu: _Menu) -> str | None:
    """Returns the letter that stands at `start`; a small one, A and I only if they are no words."""
    letter = text[start : start + 1]
    after = text[start + 1 : start + 2]
    if not letter or letter.upper() not in menu.letters or re.match(f"[{_EDGE}']", after):
        return None
    may_be_word = letter.islower() or letter in "AI"
    return None if may_be_word and not _NO_WORD.match(text, start + 1) else letter.upper()


def _match_whole(menu: _Menu, text: str) -> str | None:
    """Returns the letter of a text that is a letter, the text of a choice, or both, and nothing else."""
    plain = text.strip(" .\n*").lower()
    if len(plain) == 1 and plain.upper() in menu.letters:
        return plain.upper()
    menu_lines = list(zip(string.ascii_uppercase, menu.texts))
    for letter, choice in menu_lines:
        if plain and plain in (choice, f"{letter.lower()} {choice}"):
            return letter
    # "Option B", and 0.5 for the choice 1/2
    form = canonical(text)
    if isinstance(form, str) and len(form) == 1 and form.upper() in menu.letters:
        return form.upper()
    same = [letter for letter, choice in menu_lines if canonical(choice) == form]
    return same[0] if same and says_something(text) else None


def _match_beginning(menu: _Menu, text: str, masked: str) -> str | None:
    """Returns the letter of what a text begins with, if a mark follows.

    It is the text of a choice, but not the 1. of a list, or a letter, but not the first of several.
    """
    mention = menu.pattern.match(text)
    if mention and not mention[0].isdigit():
        after = text[mention.end() : mention.end() + 2]
        if re.match(r" ?(?:[.,;:!\n]|$)", after):
            return menu.find_letter(mention[0])
    letter = re.match(r"\(?([A-Z])(?:[:)\n]|\.(?=\s))", masked)
    if letter and letter[1] in menu.letters and not NEXT_LETTER.search(text, letter.end()):
        return letter[1]
    return None


def _find_lone_letter(menu: _Menu, masked: str) -> str | None:
    """Returns the last letter in brackets; without one, the last before a mark; else the last on its own."""
    some = f"[{menu.letters or '.'}]"
    for pattern in (
        rf"\(({some})\)",
        rf"(?<![{_EDGE}])({some})(?:[:)]|(?<!I)\.(?=\s|$))",
        rf"(?<![{_EDGE}'])(?![AI])({some})(?![{_EDGE}'])|(?<![{_EDGE}'])(A)(?= ?(?:[^\w\s']|\n|$))",
    ):
        letters = [found[found.lastindex] for found in re.finditer(pattern, masked)]
        if letters:
            return letters[-1] if letters[-1] in menu.letters else None
    return None


def _find_text(menu: _Menu, text: str) -> str | None:
    """Returns the letter of the last text of a choice that stands somewhere without a "not" before it."""
    for found in reversed([*menu.pattern.finditer(text)]):
        before = text[max(0, found.start() - 12) : found.start()].lower()
        if not re.search(r"(?:\bnot|n't|\bnor|\bneither|不是|并非)\s?(?:an? |the )?$", before):
            return menu.find_letter(found[0])
    return None


# ---- Choices in the text of a question ----

_LABEL = re.compile(r"\b(?:choices|options?)\s{0,4}:\s{0,4}", re.IGNORECASE)
_MARKS = (
    # (a) 0.5 (b) 1, but not f(a)
    re.compile(r"(?<![A-Za-z\u00c0-\u052f])[(（]([A-Ja-j])[)）]\s{0,4}"),
    # A. Left, A: Left, 哪个？A、红, but not U.S.A., a.m., A.D.
    re.compile(
        r"(?:^|(?<=[\s,;:?!\u2000-\uffff]))([A-Ja-j])[.:)、．：](?!(?<=\.)(?:[A-Za-z]\.|[Mm]\b))\s{0,4}"
    ),
)


def options_in(question: str) -> tuple[str, ...]:
    """Returns the choices in a question's text, () if it has none.

    "Which? Options: A: Haiti, B: Cuba" has ("Haiti", "Cuba").
    """
    _, choices = split_choices(question)
    return tuple(choice.partition("\n")[0].strip(" ,;(") for choice in choices)


def split_choices(text: str) -> tuple[str, list[str]]:
    """Splits off the choices at the end of a text; the whole and [] if it has none.

    "Where? A. Left B. Right" gives "Where?" and ["Left", "Right"].
    """
    labels = list(_LABEL.finditer(text))
    label = labels[-1] if labels else None
    for pattern in _MARKS:
        marks: list[re.Match] = []
        for mark in pattern.finditer(text, label.end() if label else 0):
            is_smaller = mark[1] == "a" and marks and marks[0][1] == "A"
            if mark[1] in "Aa" and len(marks) < 2 and not is_smaller:
                marks = [mark]
            elif marks and ord(mark[1]) == ord(marks[-1][1]) + 1:  # B behind A, b behind a
                marks.append(mark)
        choices = [choice.strip(" \t\r\n,;，；") for choice in split_behind(text, marks)]
        if len(choices) > 1 and all(map(says_something, choices)):
            start = label or marks[0]
            return text[: start.start()].rstrip(), choices
    return text, []


def split_behind(text: str, marks: Sequence[re.Match]) -> list[str]:
    """Returns what stands behind each mark, up to the next one: "A. left B. right" gives "left ", "right"."""
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end() : end] for mark, end in zip(marks, ends)]

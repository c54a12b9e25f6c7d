"""Which option an output chooses: letters, texts of options, yes and no."""

import re
import string
import unicodedata
from collections.abc import Sequence

from answers import _ALIKE, _NEXT_LETTER, canonical, extract_answer, says_something, without_thinking

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


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an output means, or None: "(b)", "B. a cat", "a cat", "the answer is B".

    The clearest sign decides, first in the last box, then in the text around it: what is stated ("the answer
    is B", "B is correct"); a letter or the text of a choice and nothing else; what the text begins with
    ("Yes, it is"); letters in brackets, before a mark, on their own ("I" and "A" are words); the text of a
    choice somewhere, whole words only and the longest first. Of several of one sort the last counts; what is
    denied ("not B") does not.
    """
    choices = choices[:26]
    return _clearest(text, _Menu(choices, string.ascii_uppercase[: len(choices)]))


def _clearest(text: str, menu: "_Menu") -> str | None:
    """The letter that the first of the signs gives, from the clearest on."""
    box, text = extract_answer(text) or "", without_thinking(text)
    box, around = _readable(box), _readable(text.replace("{" + box + "}", " ") if box else text)
    box_meant, around_meant = _DENIED.sub(" ", box), _DENIED.sub(" ", around)
    signs = [(_stated, box_meant), (_whole, box), (_begun, box_meant), (_mentioned, box_meant)]
    signs += [(_stated, around_meant), (_whole, around), (_begun, around_meant)]
    signs += [(_lettered, around_meant), (_mentioned, around_meant)]
    signs += [] if set("\\=") & set(box) else [(_lettered, box_meant)]  # the E of \Delta E is no choice
    return next((letter for read, where in signs if (letter := read(where, menu))), None)


def read_yes_no(text: str) -> bool | None:
    """What an output says to a question of yes or no: "Yes, the left" is yes. None if it is not clear."""
    return {"A": True, "B": False}.get(_clearest(text, _Menu(("yes", "no"), letters="")))


class _Menu:
    """The choices: the letters that stand for them, their texts, and a pattern that finds the texts.

    The pattern finds whole words and whole numbers, the longest first.
    """

    def __init__(self, choices: Sequence[str], letters: str):
        self.letters = letters
        self.texts = [_readable(choice).strip(" .\n").lower() for choice in choices]
        longest_first = sorted(filter(None, self.texts), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(self._whole_words, longest_first)) or "(?!)", re.IGNORECASE)

    @staticmethod
    def _whole_words(text: str) -> str:
        before = f"(?<![{_EDGE}])" if re.match(f"[{_EDGE}]", text[0]) else ""
        after = f"(?![{_EDGE}])" if re.match(f"[{_EDGE}]", text[-1]) else ""
        before += r"(?<!\d[.,])(?<!-)" if text[0].isdigit() else ""
        after += r"(?![.,]?\d)" if text[-1].isdigit() else ""
        return before + r"\s+".join(map(re.escape, text.split())) + after

    def letter(self, mention: str) -> str | None:
        """The letter of a choice, given by its text."""
        words = mention.lower().split()
        return next((a for a, text in zip(string.ascii_uppercase, self.texts) if text.split() == words), None)


def _ends(text: str) -> str:
    """Where an answer is given in a long text: at its beginning or its end."""
    return text if len(text) <= 1500 else text[:500] + "\n" + text[-1000:]


_PLAIN_MARKS = str.maketrans(_ALIKE)


def _readable(text: str) -> str:
    """The ends of a text in plain characters, without fonts and formulas, with single blanks; lines stay."""
    text = _ends(unicodedata.normalize("NFKC", _ends(text))).translate(_PLAIN_MARKS)
    text = re.sub(r"\\(?:text|math)[a-z]{0,8}(?= ?\{)|\*\*|[{}$`]|\\[()\[\],;!]", " ", text)
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def _whole(text: str, menu: _Menu) -> str | None:
    """The text is a letter, the text of a choice, or both, and nothing else."""
    plain, form = text.strip(" .\n*").lower(), canonical(text)
    if len(plain) == 1 and plain.upper() in menu.letters:
        return plain.upper()
    for letter, choice in zip(string.ascii_uppercase, menu.texts):
        if plain and plain in (choice, f"{letter.lower()} {choice}"):
            return letter
    if isinstance(form, str) and len(form) == 1 and form.upper() in menu.letters:
        return form.upper()
    same = [letter for letter, choice in zip(string.ascii_uppercase, menu.texts) if canonical(choice) == form]
    return same[0] if same and says_something(text) else None


def _stated(text: str, menu: _Menu) -> str | None:
    """The last letter, or text of a choice, that is called the answer."""
    last = (-1, None)
    for found in _STATED.finditer(text):
        start = _FILLER.match(text, found.end()).end()
        mention = menu.pattern.match(text, start)
        is_text = mention and mention[0].upper() not in menu.letters
        if letter := menu.letter(mention[0]) if is_text else _letter_at(text, start, menu):
            last = (start, letter)
    for found in _CALLED_RIGHT.finditer(text):
        if (letter := found[1] or found[2]) in menu.letters and found.start() > last[0]:
            last = (found.start(), letter)
    return last[1]


def _letter_at(text: str, start: int, menu: _Menu) -> str | None:
    """The letter that stands there; a small one, and A and I, only if they are no words of the sentence."""
    letter, after = text[start : start + 1], text[start + 1 : start + 2]
    if not letter or letter.upper() not in menu.letters or re.match(f"[{_EDGE}']", after):
        return None
    may_be_word = letter.islower() or letter in "AI"
    return None if may_be_word and not _NO_WORD.match(text, start + 1) else letter.upper()


def _begun(text: str, menu: _Menu) -> str | None:
    """What the text begins with, if a mark follows: the text of a choice (no 1. of a list), or a letter."""
    mention = menu.pattern.match(text)
    if (
        mention
        and not mention[0].isdigit()
        and re.match(r" ?(?:[.,;:!\n]|$)", text[mention.end() : mention.end() + 2])
    ):
        return menu.letter(mention[0])
    letter = re.match(r"\(?([A-Z])(?:[:)\n]|\.(?=\s))", text)
    if letter and letter[1] in menu.letters and not _NEXT_LETTER.search(text, letter.end()):
        return letter[1]
    return None


def _lettered(text: str, menu: _Menu) -> str | None:
    """The last letter in brackets; without one, the last before a mark; without one, the last on its own."""
    some = f"[{menu.letters or '.'}]"
    for pattern in (
        rf"\(({some})\)",
        rf"(?<![{_EDGE}])({some})(?:[:)]|(?<!I)\.(?=\s|$))",
        rf"(?<![{_EDGE}'])(?![AI])({some})(?![{_EDGE}'])|(?<![{_EDGE}'])(A)(?= ?(?:[^\w\s']|\n|$))",
    ):
        if found := [match[match.lastindex] for match in re.finditer(pattern, text)]:
            return found[-1] if found[-1] in menu.letters else None
    return None


def _mentioned(text: str, menu: _Menu) -> str | None:
    """The last text of a choice that stands somewhere without a "not" before it."""
    for found in reversed([*menu.pattern.finditer(text)]):
        before = text[max(0, found.start() - 12) : found.start()].lower()
        if not re.search(r"(?:\bnot|n't|\bnor|\bneither|不是|并非)\s?(?:an? |the )?$", before):
            return menu.letter(found[0])
    return None


_OPTION = re.compile(r"(?:^|(?<=[\s(,;]))([a-jA-J])[.:)]\s{0,4}")


def options_in(question: str) -> tuple[str, ...]:
    """The choices in the text of a question, as in "Which? Options: A: Haiti, B: Cuba"; () if it has none."""
    marks: list[re.Match] = []
    for mark in _OPTION.finditer(question):
        if mark[1] in "Aa":
            marks = [mark]
        elif marks and mark[1] == chr(ord(marks[-1][1]) + 1):
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    texts = [question[mark.end() : end].partition("\n")[0].strip(" ,;(") for mark, end in zip(marks, ends)]
    return tuple(texts) if len(texts) > 1 else ()

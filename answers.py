r"""Answers: which one an output gives, and when two of them say the same.

One rule serves the votes, the Reasoner's reward, the judge and evaluation:

    extract_answer      the last \boxed{...} behind the thoughts
    canonical           an answer in one spelling; same_answer compares these
    read_choice         the letter that an output chooses, in a box or in words

Equality of spellings is an equivalence relation, as counting votes needs (a tolerance would not be one).
Nothing is evaluated, and all work is linear in the text. Matters of taste, decided once:

* What is written counts. 5 cm is neither 5 nor 5 mm, 90° is not 90, $5 is not 5, 50% is 0.5 and not 50, x = 5
  is not 5: if units and names fell away, 5 cm would equal 5 mm, and x = 5 would equal y = 5.
* A letter from A to J with its text is the letter: B. cat = (B) cat = Option B = B. So J. Smith is J and
  C. elegans is C; but "A cat", "I think", "a.m.", "a:b" and the list "a: 5, b: 6" are no letters.
* Capitals and marks at the end say nothing, but 5! is not 5. Blanks count between words and nowhere else.
* Digits in groups of three are one number, 1,000 = 1{,}000 = 1\,000; but (10,200) is a pair, 1 000 two
  numbers.
* No algebra and no dictionary: x + 1 is not 1 + x, \sqrt{4} is not 2, two is not 2.
"""

import re
import string
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from engine import latex

# ---- Which answer an output gives ----

_BOX_TOKEN = re.compile(r"\\boxed\s{0,8}\{|\\[{}]|[{}]")


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} behind the thoughts that is closed and not empty, or None.

    Braces may nest (\boxed{\frac{1}{2}}); of a box in a box the inner one counts. One pass over the text with
    a stack of open braces, so unbalanced or endless braces cost no more than their length.
    """
    text = without_thinking(text)
    open_braces, best_start, best = [], -1, None
    for token in _BOX_TOKEN.finditer(text):
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
    """What stands behind the last </think> and before a <think> that is left open.

    The template may have written the <think> itself; what was cut off in its thoughts says nothing yet.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


# ---- When two answers say the same ----

_LONGEST = 400  # characters; a longer answer is compared word by word


def same_answer(a: str, b: str) -> bool:
    r"""Whether two answers say the same: 0.5 = \frac{1}{2} = 50\%, (B) = B. cat, 1,000 = 1000."""
    return canonical(a) == canonical(b)


def says_something(answer: str) -> bool:
    """Whether an answer is more than punctuation and blanks: "..." and "?" are no votes."""
    form = _form(answer)
    return isinstance(form, Fraction) or any(unicodedata.category(c)[0] in "LNS" for c in form)


def canonical(answer: str) -> Fraction | str:
    """An answer in one spelling: the value of a number, a fraction or a percentage, else its words."""
    form = _form(answer)
    return answer.strip() if form == "" else form  # nothing is left of "?" and "!", and they are not the same


@lru_cache(maxsize=10_000)  # votes repeat
def _form(answer: str) -> Fraction | str:
    """`canonical`, but "" where only marks stand."""
    text = answer.strip()
    if len(text) <= _LONGEST:
        text = "".join(map(_plain, _RAISED.sub(_braced, text))).lower()
    if len(text) > _LONGEST:
        return " ".join(text.lower().split())
    text = _EMPHASIS.sub(r"\2", latex.plain(text))
    text = _unwrapped(_THOUSANDS.sub(lambda number: number[0].replace(",", ""), text))
    if preface := _PREFACE.match(text):
        text = _unwrapped(text[preface.end() :])
    return _letter(text) or _valued(_spaced(text))


# -- Characters

_ALIKE = (
    dict.fromkeys("‐‑‒–—−﹣－", "-")
    | dict.fromkeys("“”„‟«»「」『』《》〝〞", '"')
    | dict.fromkeys("‘’‚‛′", "'")
    | {"º": "°", "˚": "°", "。": ".", "∶": ":", "【": "[", "】": "]"}
    | dict.fromkeys("\u2009\u202f", r"\,")  # thin blanks part thousands
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\xad", "")  # have no width
)
_RAISED = re.compile("[⁰¹²³ⁱ⁴-⁾ⁿ]+|[₀-₎]+")


def _braced(raised: re.Match) -> str:
    """10⁻³ as 10^{-3}, 10₂ as 10_{2}."""
    return f"{'_' if '₀' <= raised[0] <= '₎' else '^'}{{{unicodedata.normalize('NFKC', raised[0])}}}"


def _plain(character: str) -> str:
    """A character in its plainest form: full-width and italic digits are digits, but 1½ is 1 1/2."""
    if character in _ALIKE:
        return _ALIKE[character]
    kind = unicodedata.decomposition(character).split(" ")[0]
    blank = " " if kind in ("<fraction>", "<circle>", "<super>") else ""
    return blank + unicodedata.normalize("NFKC", character).replace("⁄", "/").replace("−", "-") + blank


# -- What stands around an answer

_EMPHASIS = re.compile(  # Markdown's stars around a word, but not 2*3 or 2**3
    r"(?<![^\s(])(\*{1,3})(?=[^\s*])([^*]+)(?<=\S)\1(?![\w*])"
)
_THOUSANDS = re.compile(  # 1,000 anywhere, but in brackets only what cannot be two numbers: (1,050)
    r"(?<![\d.,(\[{])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<=[(\[{])[1-9]\d{0,2}(?:,0\d\d)+(?![\d,])", re.ASCII
)
_LETTER = re.compile(  # "b", "b. cat", "(b) cat", "option b: cat"; but not (a)(b), (a) + 1 or a : b
    r"(?:option|choice|选项)? ?:? ?"
    r"(?:[(\[] ?([a-j]) ?[)\]](?! ?[=(]|[+*/^-]| [+*/^-] )"
    r"|([a-j])(?: ?[.)、](?= |[^\x00-\x7f])| ?:(?= \S\S| ?[^\x00-\x7f])|[.:](?=[a-z]{2})|\)|$))"
)
_NEXT_LETTER = re.compile(r"(?<![\w.'(])(?:\( ?[a-j] ?\)|[a-j] ?(?:[.:)](?= \S)|\)$))", re.IGNORECASE)
_PREFACE = re.compile(r"(?:the )?(?:correct |final )?answer(?: is ?:?| ?[:=])|答案(?:是|为)? ?:?")


def _unwrapped(text: str) -> str:
    """Without the marks at the end, and without quotes and brackets around the whole."""
    for _ in range(3):
        text = " ".join(text.split()).rstrip(" .,;:?、")
        calm = text.rstrip(" !")
        if not calm or re.search(r"[^\W\d_]{2}$|[^\W\d_a-z]$", calm):  # of a word, but not of 5! and n!
            text = calm
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" and text[0] not in text[1:-1]:
            text = text[1:-1].strip()
        bare = text.removeprefix("(").removesuffix(")").strip()
        if bare != text and not set("(),") & set(bare):  # (3) and B), but not (1,2)
            text = bare
    return text


def _letter(text: str) -> str | None:
    """The letter of "b. cat"; None if there is none, or several: "a: 5, b: 6"."""
    found = _LETTER.match(text)
    if not found or _NEXT_LETTER.search(text, found.end()):
        return None
    return found[1] or found[2]


# -- Blanks and numbers

_NUMBER = r"(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_QUANTITY = re.compile(  # 1.5, 1/2, (-1)/2, 1 1/2, with or without a sign
    rf"([+-]?)(?:(\d{{1,400}}) (?=\d+/\d))?({_NUMBER}|\([+-]?{_NUMBER}\))"
    rf"(?:/([+-]?{_NUMBER}|\([+-]?{_NUMBER}\)))?",
    re.ASCII,
)


def _spaced(text: str) -> str:
    """Blanks only between words, and one between a number and its unit; degrees and percent as signs."""
    text = re.sub(r"(?<=\d)(?=[^\W\d_])", " ", " ".join(text.split()))
    text = re.sub(r"(?<=\d) deg(?:rees?)?\b", "°", text.replace("、", ","))
    text = re.sub(r"(?<=\d) per ?cent\b", "%", text)
    text = re.sub(r" ?([^\w\s.]|_) ?", r"\1", text)  # a full stop keeps its blanks: 3. 5 is not 3.5
    return text.replace("^°", "°")


def _valued(text: str) -> Fraction | str:
    """The value of a number; of a number with a unit the value and the unit; other text as it is."""
    found = _QUANTITY.match(text)
    if not found:
        return text
    sign, whole, above, below = found.groups()
    above, below = Fraction(above.strip("()")), Fraction((below or "1").strip("()"))
    rest = text[found.end() :]
    is_mixed = not whole or 0 < above < below
    if below == 0 or not is_mixed or rest and not re.match(r"%|[°'\"]| [^\W\d_]", rest):
        return text
    value = int(whole or 0) + above / below
    value = -value if sign == "-" else value
    if rest in ("", "%"):
        return value / 100 if rest else value
    return f"{value}{rest}"


# ---- Which choice an output means ----

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


# ---- Choices that stand in the text of a question ----

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

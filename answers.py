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
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import answers as latex

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


# ---- Choices that stand in the text of a question ----


DEEPEST = 50  # a text with more braces is left as it is


_TOKEN = re.compile(r"\\sqrt\s{0,4}\[\w{1,3}\]|\\[a-z]+\s{0,4}|\\.|[\^_]\s{0,4}\{|.", re.DOTALL)


_PARTS_THOUSANDS = re.compile(r",\s{0,4}\\!\s{0,4}|(?<=\d)\\,(?=\d{3}(?!\d))")  # 1,\!000 and 1\,000


_IS_BLANK = re.compile(r"(?<=\S)~(?=[\\a-z])")  # 5~cm; but ~5 is about 5, and 5~6 a range


_LAYOUT = set(
    "text textrm textbf textit textsf texttt textsc textup textnormal rm bf it sf tt mathrm mathbf mathit"
    " mathsf mathtt mathcal mathbb mathnormal boldsymbol bm operatorname mbox hbox fbox boxed emph underline"
    " ensuremath left right middle big bigl bigr bigg biggl biggr displaystyle textstyle limits nolimits"
    " quad qquad enspace thinspace medspace thickspace space nobreakspace newline".split()
)


_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa mu nu xi pi rho sigma tau upsilon phi chi psi"
    " omega"
)


_OTHERS = (
    "lambda λ,varepsilon ε,vartheta θ,varphi φ,times ×,cdot ·,div ÷,pm ±,le ≤,leq ≤,ge ≥,geq ≥,ne ≠,neq ≠,"
    "lt <,gt >,approx ≈,sim ~,infty ∞,circ °,degree °,textdegree °,to →,rightarrow →,leftarrow ←,in ∈,"
    "cup ∪,cap ∩,angle ∠,triangle △,perp ⊥,parallel ∥,ldots ...,dots ...,cdots ...,lbrace {,rbrace },mid |,"
    "colon :,prime '"
)


_SYMBOLS = {name: unicodedata.lookup(f"greek small letter {name}") for name in _GREEK.split()}


_SYMBOLS |= dict(pair.split() for pair in _OTHERS.split(","))


def plain(text: str) -> str:
    r"""A text in small letters, without its LaTeX. Pairs of $ fall away; of an odd number each is kept: it is
    money."""
    if text.count("{") > DEEPEST:
        return text
    tokens = _TOKEN.findall(_IS_BLANK.sub(" ", _PARTS_THOUSANDS.sub(",", text)))
    if tokens.count("$") % 2 == 0:
        tokens = [" " if token == "$" else token for token in tokens]
    text = re.sub(r"``([^`']*)''", r'"\1"', _group(iter(tokens), to_the_end=True))
    text = re.sub(r"\bsqrt ?\(", "√(", text)
    return re.sub(r"√\((\d+|[^\W\d_])\)", r"√\1 ", text)


def _group(tokens: Iterator[str], to_the_end: bool = False) -> str:
    """The tokens to the closing brace, or to the end, as plain text."""
    parts = []
    for token in tokens:
        if token == "}" and not to_the_end:
            break
        parts.append(_piece(token, tokens) if token != "}" else " ")
    return "".join(parts)


def _piece(token: str, tokens: Iterator[str]) -> str:
    """One token, with its arguments if it takes some, as plain text."""
    if token == "{":  # 3{4} is not 34, while 1{,}000 is 1,000
        inside = _group(tokens)
        is_mark = inside.strip() and not any(map(str.isalnum, inside))
        return inside if is_mark else f" {inside} "
    if token[0] in "^_" and token[-1] == "{":
        return f"{token[0]}{_operand(_group(tokens), signed=True)} "
    if token[0] != "\\" or len(token) == 1:
        return token
    name = token[1:].strip()
    if name in ("frac", "dfrac", "tfrac", "cfrac"):
        above, below = _argument(tokens), _argument(tokens)
        return f" {_operand(above, product=True)}/{_operand(below)} "
    if name.startswith("sqrt"):  # sqrt, or sqrt[3]
        return f" √{name[4:].strip()}{_operand(_argument(tokens))} "
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if name and name in "%${}#&_":
        return name
    if name in _LAYOUT or not name.isalnum():  # \text, and \; and \(
        return " "
    return f" {name} "


def _argument(tokens: Iterator[str]) -> str:
    r"""The next group, command or single character: of \frac12 first the 1, then the 2."""
    token = next((token for token in tokens if token.strip()), "")
    return _piece(token, tokens) if token else ""


def _operand(text: str, product: bool = False, signed: bool = False) -> str:
    """In brackets, unless it needs none: a number, a word, a bracket; above a line 2π, in an exponent -1."""
    text = text.strip()
    simple = r"√?[\d.]*[^\W\d_]*" if product else r"√?(\d+(\.\d+)?|[^\W\d_]+)|°"
    bare = re.fullmatch(simple + r"|\([^()]*\)", text.lstrip("+-") if signed else text)
    return text if bare and text else f"({text})"

r"""Answers: the one that an output gives, and the test whether two of them say the same.

One rule serves the votes, the Reasoner's reward, the judge and evaluation:

    extract_answer      the last \boxed{...} behind the thoughts
    same_answer         compares the canonical forms of two answers
    canonical           the value of a number, else the answer in one spelling

    \frac{1}{2}, 0.5, .50, 50\%           1/2               (B), B., Option B, B. cat        b
    1,000, 1{,}000, 1\,000                1000              5cm, 5 cm, 5\,\text{cm}          5 cm

Equality of canonical forms is an equivalence relation, as counting votes needs. A tolerance would not be one.
Nothing is evaluated, and all work is linear in the text. Matters of taste, decided once:

* What is written counts. 5 cm is neither 5 nor 5 mm, 90° is not 90, $5 is not 5, 50% is 0.5 and not 50, x = 5
  is not 5. If units and names fell away, 5 cm would equal 5 mm, and x = 5 would equal y = 5.
* A letter from A to J with its text is the letter: B. cat = (B) cat = Option B = B. So J. Smith is J and
  C. elegans is C. But "A cat", "I think", "a.m.", "a:b" and the list "a: 5, b: 6" are no letters.
* Capitals and marks at the end say nothing, but 5! is not 5. Blanks count between words and nowhere else.
* Digits in groups of three are one number: 1,000 = 1{,}000 = 1\,000. But (10,200) is a pair, and 1 000 is two
  numbers.
* No algebra and no dictionary: x + 1 is not 1 + x, \sqrt{4} is not 2, two is not 2.
"""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

# ---- The answer that an output gives ----

_BOX_TOKEN = re.compile(r"\\boxed\s{0,8}\{|\\[{}]|[{}]")


def extract_answer(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} behind the thoughts that is closed and not empty, or None.

    Braces may nest, as in \boxed{\frac{1}{2}}. Of a box in a box the inner one counts. One pass over the text
    with a stack of open braces: unbalanced or endless braces cost no more than their length.
    """
    text = without_thinking(text)
    # For each open brace: where its box's content starts, -1 if it opens no box
    open_braces = []
    best = None
    best_start = -1
    for token in _BOX_TOKEN.finditer(text):
        if token[0].startswith(r"\boxed"):
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(-1)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            content = text[start : token.start()].strip() if start > best_start else ""
            if content:
                best = content
                best_start = start
    return best


def without_thinking(text: str) -> str:
    """Returns what stands behind the last </think> and before a <think> that is left open.

    The template may have written the <think> itself. Thoughts that were cut off say nothing yet.
    """
    return text.rpartition("</think>")[2].partition("<think>")[0]


# ---- When two answers say the same ----

_LONGEST = 400  # characters; a longer answer is compared word by word


def same_answer(a: str, b: str) -> bool:
    r"""Returns whether two answers say the same: 0.5 = \frac{1}{2} = 50\%, (B) = B. cat, 1,000 = 1000."""
    return canonical(a) == canonical(b)


def says_something(answer: str) -> bool:
    """Returns whether an answer is more than punctuation and blanks: "..." and "?" are no votes."""
    form = _canonical_form(answer)
    return isinstance(form, Fraction) or any(unicodedata.category(c)[0] in "LNS" for c in form)


def canonical(answer: str) -> Fraction | str:
    """Returns the value of a number, a fraction or a percentage, and the words of any other answer.

    Marks alone stay as they are: "?" and "!" are not the same.
    """
    form = _canonical_form(answer)
    return answer.strip() if form == "" else form


@lru_cache(maxsize=10_000)  # votes repeat
def _canonical_form(answer: str) -> Fraction | str:
    """Returns what `canonical` does, but "" for an answer that is nothing but marks."""
    text = answer.strip()
    # Plain characters, unless the answer is long, or becomes long by it
    if len(text) <= _LONGEST:
        text = _RAISED.sub(_mark_raised, text)
        text = "".join(map(_plain_character, text)).lower()
    if len(text) > _LONGEST:
        return " ".join(text.lower().split())
    # Without LaTeX, Markdown, the commas of thousands, and what stands around the answer
    text = _EMPHASIS.sub(r"\2", _remove_latex(text))
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _unwrap(text)
    if preface := _PREFACE.match(text):
        text = _unwrap(text[preface.end() :])
    return _read_letter(text) or _read_value(_normalize_blanks(text))


# -- Characters

PLAIN_CHARACTERS = (
    dict.fromkeys("‐‑‒–—−﹣－", "-")
    | dict.fromkeys("“”„‟«»「」『』《》〝〞", '"')
    | dict.fromkeys("‘’‚‛′", "'")
    | {"º": "°", "˚": "°", "。": ".", "∶": ":", "【": "[", "】": "]"}
    | dict.fromkeys("\u2009\u202f", r"\,")  # thin blanks part thousands
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\xad", "")  # have no width
)
_RAISED = re.compile("[⁰¹²³ⁱ⁴-⁾ⁿ]+|[₀-₎]+")


def _mark_raised(raised: re.Match) -> str:
    """Writes raised and lowered digits as LaTeX does: 10⁻³ as 10^{-3}, 10₂ as 10_{2}."""
    mark = "_" if "₀" <= raised[0] <= "₎" else "^"
    digits = unicodedata.normalize("NFKC", raised[0])
    return f"{mark}{{{digits}}}"


def _plain_character(character: str) -> str:
    """Returns a character in its plainest form: full-width and italic digits are digits, ½ is " 1/2 "."""
    if character in PLAIN_CHARACTERS:
        return PLAIN_CHARACTERS[character]
    plain = unicodedata.normalize("NFKC", character).replace("⁄", "/").replace("−", "-")
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return f" {plain} " if kind in ("<fraction>", "<circle>", "<super>") else plain


# -- What stands around an answer

_EMPHASIS = re.compile(  # Markdown's stars around a word, but not 2*3 or 2**3
    r"(?<![^\s(])(\*{1,3})(?=[^\s*])([^*]+)(?<=\S)\1(?![\w*])"
)
_THOUSANDS = re.compile(  # 1,000 anywhere, but in brackets only what cannot be two numbers: (1,050)
    r"(?<![\d.,(\[{])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|(?<=[(\[{])[1-9]\d{0,2}(?:,0\d\d)+(?![\d,])",
    re.ASCII,
)
_LETTER = re.compile(  # "b", "b. cat", "(b) cat", "option b: cat"; but not (a)(b), (a) + 1 or a : b
    r"(?:option|choice|选项)? ?:? ?"
    r"(?:[(\[] ?([a-j]) ?[)\]](?! ?[=(]|[+*/^-]| [+*/^-] )"
    r"|([a-j])(?: ?[.)、](?= |[^\x00-\x7f])| ?:(?= \S\S| ?[^\x00-\x7f])|[.:](?=[a-z]{2})|\)|$))"
)
NEXT_LETTER = re.compile(
    r"(?<![\w.'(])(?:\( ?[a-j] ?\)|[a-j] ?(?:[.:)](?= \S)|\)$))", re.IGNORECASE
)
_PREFACE = re.compile(r"(?:the )?(?:correct |final )?answer(?: is ?:?| ?[:=])|答案(?:是|为)? ?:?")


def _unwrap(text: str) -> str:
    """Removes the marks at the end, and quotes and brackets around the whole, up to three layers of them."""
    for _ in range(3):
        text = " ".join(text.split()).rstrip(" .,;:?、")
        # The exclamation mark of a word, but not of 5! and n!
        calm = text.rstrip(" !")
        if not calm or re.search(r"[^\W\d_]{2}$|[^\W\d_a-z]$", calm):
            text = calm
        # Quotes
        inside = text[1:-1]
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`" and text[0] not in inside:
            text = inside.strip()
        # Brackets of (3) and B), but not of (1,2)
        bare = text.removeprefix("(").removesuffix(")").strip()
        if not set("(),") & set(bare):
            text = bare
    return text


def _read_letter(text: str) -> str | None:
    """Returns the letter of "b. cat"; None if there is none, or several: "a: 5, b: 6"."""
    found = _LETTER.match(text)
    if not found or NEXT_LETTER.search(text, found.end()):
        return None
    return found[1] or found[2]


# -- Blanks and numbers

_NUMBER = r"(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_QUANTITY = re.compile(  # 1.5, 1/2, (-1)/2, 1 1/2, with or without a sign
    rf"([+-]?)(?:(\d{{1,400}}) (?=\d+/\d))?({_NUMBER}|\([+-]?{_NUMBER}\))"
    rf"(?:/([+-]?{_NUMBER}|\([+-]?{_NUMBER}\)))?",
    re.ASCII,
)


def _normalize_blanks(text: str) -> str:
    """Leaves blanks between words, and between a number and its unit; writes degrees and percent as signs."""
    text = " ".join(text.split()).replace("、", ",")
    text = re.sub(r"(?<=\d)(?=[^\W\d_])", " ", text)
    text = re.sub(r"(?<=\d) deg(?:rees?)?\b", "°", text)
    text = re.sub(r"(?<=\d) per ?cent\b", "%", text)
    text = re.sub(r" ?([^\w\s.]|_) ?", r"\1", text)  # a full stop keeps its blanks: 3. 5 is not 3.5
    return text.replace("^°", "°")


def _read_value(text: str) -> Fraction | str:
    """Returns the value of a number, the value and the unit of a quantity, and other text as it is."""
    found = _QUANTITY.match(text)
    if not found:
        return text
    sign, whole, above, below = found.groups()
    above = Fraction(above.strip("()"))
    below = Fraction((below or "1").strip("()"))
    unit = text[found.end() :]
    # No number: 1/0, 1 3/2, 1/2 + x
    if below == 0 or whole and not 0 < above < below:
        return text
    if unit and not re.match(r"%|[°'\"]| [^\W\d_]", unit):
        return text
    value = int(whole or 0) + above / below
    if sign == "-":
        value = -value
    if unit == "%":
        return value / 100
    return f"{value}{unit}" if unit else value


# ---- LaTeX as plain text ----

_MOST_BRACES = 50  # a text with more braces is left as it is
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


def _remove_latex(text: str) -> str:
    r"""Returns a text in small letters in plain characters: \frac{1}{2} as 1/2, \sqrt{x} as √x.

    Pairs of $ fall away. Of an odd number each is kept: it is money.
    """
    if text.count("{") > _MOST_BRACES:
        return text
    text = _PARTS_THOUSANDS.sub(",", text)
    tokens = _TOKEN.findall(_IS_BLANK.sub(" ", text))
    if tokens.count("$") % 2 == 0:
        tokens = [" " if token == "$" else token for token in tokens]
    text = _read_group(iter(tokens), to_the_end=True)
    text = re.sub(r"``([^`']*)''", r'"\1"', text)
    text = re.sub(r"\bsqrt ?\(", "√(", text)
    return re.sub(r"√\((\d+|[^\W\d_])\)", r"√\1 ", text)


def _read_group(tokens: Iterator[str], to_the_end: bool = False) -> str:
    """Consumes the tokens to the closing brace, or to the end, and returns them as plain text."""
    parts = []
    for token in tokens:
        if token != "}":
            parts.append(_read_token(token, tokens))
        elif to_the_end:
            parts.append(" ")
        else:
            break
    return "".join(parts)


def _read_token(token: str, tokens: Iterator[str]) -> str:
    """Returns a token as plain text; consumes its arguments, if it takes some, from `tokens`."""
    if token == "{":  # 3{4} is not 34, while 1{,}000 is 1,000
        inside = _read_group(tokens)
        is_mark = inside.strip() and not any(map(str.isalnum, inside))
        return inside if is_mark else f" {inside} "
    if token[0] in "^_" and token[-1] == "{":
        return f"{token[0]}{_bracket(_read_group(tokens), signed=True)} "
    if token[0] != "\\" or len(token) == 1:
        return token
    # A command
    name = token[1:].strip()
    if name in ("frac", "dfrac", "tfrac", "cfrac"):
        above = _bracket(_read_argument(tokens), product=True)
        below = _bracket(_read_argument(tokens))
        return f" {above}/{below} "
    if name.startswith("sqrt"):  # sqrt, or sqrt[3]
        return f" √{name[4:].strip()}{_bracket(_read_argument(tokens))} "
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if name and name in "%${}#&_":
        return name
    if name in _LAYOUT or not name.isalnum():  # \text, and \; and \(
        return " "
    return f" {name} "


def _read_argument(tokens: Iterator[str]) -> str:
    r"""Consumes the next group, command or single character: of \frac12 first the 1, then the 2."""
    token = next(filter(str.strip, tokens), "")
    return _read_token(token, tokens) if token else ""


def _bracket(text: str, product: bool = False, signed: bool = False) -> str:
    """Puts a text in brackets, unless it needs none: a number, a word, a bracket.

    product: above a fraction's line 2π needs none either. signed: nor does -1 in an exponent.
    """
    text = text.strip()
    bare = text.lstrip("+-") if signed else text
    simple = r"√?[\d.]*[^\W\d_]*" if product else r"√?(\d+(\.\d+)?|[^\W\d_]+)|°"
    needs_none = text and re.fullmatch(simple + r"|\([^()]*\)", bare)
    return text if needs_none else f"({text})"

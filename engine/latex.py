r"""LaTeX as plain text, for comparing answers: \frac{x+1}{2} becomes (x+1)/2, \sqrt2 is √2, x^{2} is x^2.

What only sets type (fonts, spaces, the size of brackets) becomes a blank, so that what stood on its two sides
is never joined. A command that is not known becomes its name. Nothing is evaluated; it is one pass over the
tokens.
"""

import re
import unicodedata
from collections.abc import Iterator

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

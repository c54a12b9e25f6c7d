r"""Answers: the one that an output gives, and the tests whether two of them say the same.

    extract_answer      the last \boxed{...} behind the thoughts
    read_parts          an answer as value, unit and name: "x = 5 cm" is 5, "cm", "x"
    same_answer         an equivalence: equal parts. Votes for one answer are counted by it
    agrees              equal parts, but for what one of the two leaves out. Rewards and evaluation use it

    \frac{1}{2}, 0.5, .50, 50\%           1/2               (B), B., Option B, B. cat        b
    1,000, 1{,}000, 1\,000                1000              5cm, 5 cm, 5\,\text{cm}          5 cm
    (1, 9/2), (1,4.5)                     (1,9/2)           1.50\times10^{3}, 1.5e3          3/2×10^3

Equality of parts is an equivalence relation, as counting votes needs. A tolerance would not be one, nor is
`agrees`: 5 agrees with 5 cm and with 5 mm. rewards.py says when votes that leave something out are counted
with others. Nothing is evaluated, and all work is linear in the text. Matters of taste, decided once:

* What is written counts. 5 cm is neither 5 nor 5 mm, 90° is not 90, $5 is not 5, 50% is 0.5 and not 50, x = 5
  is not 5.
* A letter from A to J with its text is the letter: B. cat = (B) cat = Option B = B. So J. Smith is J and
  C. elegans is C. But "A cat", "I think", "a.m.", "a:b" and the list "a: 5, b: 6" are no letters.
* Capitals and marks at the end say nothing. But 5! is not 5, and 5M is 5 million. Blanks count between words
  and nowhere else.
* Digits in groups of three are one number: 1,000 = 1{,}000 = 1\,000. But (10,200) is a pair, and 1 000 is two
  numbers. Digits of other scripts are digits: ٥ is 5. Number words and 五 are not.
* No algebra: x + 1 is not 1 + x, \sqrt{4} is not 2, 1e3 is not 1000.
* No dictionary: two is not 2, 5 centimeters are not 5 cm, dollars are not $. But 50 percent is 50%, and 90
  degrees are 90°.
"""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from html.entities import html5
from typing import NamedTuple

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
    """Returns what stands behind the last thought, and before a <think> that is left open.

        "<think>a</think>b</think>"  ->  "b"

    The template may have written the first <think> itself. A thought that was cut off says nothing yet. A
    </think> at the end that closes no thought is passed over.
    """
    first, *others = text.split("</think>")
    for part in reversed(others or [first]):
        said = part.partition("<think>")[0]
        if said.strip():
            return said
    return ""


# ---- When two answers say the same ----

_LONGEST = 400  # characters; a longer answer is compared word by word
AS_NUMBER = "=%"  # the unit of 50% where it is read as 0.5


class Parts(NamedTuple):
    """An answer taken apart: "x = 5 cm" is 5, " cm", "x". "" stands for a unit or name that is left out."""

    value: Fraction | str
    unit: str = ""
    name: str = ""

    def as_number(self) -> "Parts":
        """Returns 50% as 0.5; other parts as they are."""
        if self.unit == "%" and isinstance(self.value, Fraction):
            return Parts(self.value / 100, AS_NUMBER, self.name)
        return self

    def fits(self, other: "Parts") -> bool:
        """Returns whether the values are equal, and units and names where both state them."""
        is_same_unit = self.unit == other.unit or not self.unit or not other.unit
        is_same_name = self.name == other.name or not self.name or not other.name
        return self.value == other.value and is_same_unit and is_same_name


def same_answer(a: str, b: str) -> bool:
    r"""Returns whether two answers say the same: 0.5 = \frac{1}{2} = 50\%, (B) = B. cat, 1,000 = 1000."""
    return canonical(a) == canonical(b)


def agrees(a: str, b: str) -> bool:
    """Returns whether two answers say the same, but for a unit, sign or name that one of them leaves out.

    5 agrees with 5 cm, $5, 5% and x = 5. But 5 cm does not agree with 5 mm, nor x = 5 with y = 5. 50% agrees
    with 50 and with 0.5.
    """
    if not says_something(a) or not says_something(b):
        return same_answer(a, b)
    first = read_parts(a)
    second = read_parts(b)
    return first.fits(second) or first.as_number().fits(second.as_number())


def says_something(answer: str) -> bool:
    """Returns whether an answer is more than punctuation and blanks: "..." and "?" are no votes."""
    form = "".join(map(str, read_parts(answer)))
    return bool(_categories(form) & set("LNS"))


def canonical(answer: str) -> Fraction | str:
    """Returns the value of a number, a fraction or a percentage, and the words of any other answer.

    Marks alone stay as they are: "?" and "!" are not the same.
    """
    value, unit, name = read_parts(answer).as_number()
    form = value if unit in ("", AS_NUMBER) else f"{value}{unit}"
    if name:
        form = f"{name}={form}"
    return answer.strip() if form == "" else form


@lru_cache(maxsize=10_000)  # votes repeat
def read_parts(answer: str) -> Parts:
    r"""Takes an answer apart, in the steps below. An answer of marks alone has the value "".

    "**The answer is** $x = \frac{10}{2}\,\text{cm}$."        Parts(Fraction(5), " cm", "x")
    """
    # Long answers, and those that become long: words in one spelling, nothing else
    text = answer.strip()
    if len(text) <= _LONGEST:
        text = plain_characters(_MILLIONS.sub(r"\1 million", text))
    if len(text) > _LONGEST:
        return Parts(" ".join(compose(text).casefold().split()))
    # LaTeX as plain text                     \frac{10}{2}\,\text{cm}     10/2  cm
    text = _remove_latex(text)
    # Markdown's emphasis, commas of thousands                **red** 1,000       red 1000
    text = _EMPHASIS.sub(r"\2", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    # What stands around the answer                           the answer is "(5)."      5
    text = _unwrap(text)
    if preface := _PREFACE.match(text):
        text = _unwrap(text[preface.end() :])
    # The letter of a choice                                  (B) cat                   b
    if letter := _read_letter(text):
        return Parts(letter)
    # Blanks only between words, each sign in one spelling    x  >= 5 degrees           x≥5°
    text = _normalize_signs(_normalize_blanks(text))
    # A name, a value and a unit                              x=5.0 cm                  x, 5, cm
    name, text = _split_name(text)
    value, unit = _read_quantity(text)
    # Numbers in tuples, lists, sets and matrices             (1,4.5)                   (1,9/2)
    if isinstance(value, str):
        value = "".join(map(_normalize_element, _SEPARATOR.split(value)))
    return Parts(value, unit, name)


# -- Characters

_LOOK_ALIKES = (  # the first of a group stands for the others; Arabic ones by number
    "-‐‑‒–—−﹣－ \"“”„‟«»「」『』《》〝〞 '‘’‚‛′ °º˚ ≥⩾≧ ≤⩽≦ ·⋅ |∣ :∶ [【 ]】"
    " .。։।॥།༎။።᙮᠃។៕\u066b\u06d4\u0701\u0702 ,՝၊፣᠂\u060c\u066c\u07f8 ;፤\u061b ?՞፧\u061f !՜\u07f9 %\u066a"
)
PLAIN_CHARACTERS = (
    {"∼": r"\sim "}
    | dict.fromkeys("\u2009\u202f", r"\,")  # thin blanks part thousands
    | dict.fromkeys("\u2062\u2063\u2064", " ")  # invisible times, comma and plus
    | dict.fromkeys("¿¡\u115f\u1160\u3164\uffa0\u2800\ufe0e\ufe0f\u034f", "")  # most show nothing
)
for plain, *others in _LOOK_ALIKES.split():
    PLAIN_CHARACTERS |= dict.fromkeys(others, plain)
_PIECE = re.compile(rf"\S{{1,{_LONGEST}}}")
_MILLIONS = re.compile(r"\b(\d[\d.,]*)M\b")  # 5M, but 5m and 5 M are meters
_RAISED = re.compile("[⁰¹²³ⁱ⁴-⁾ⁿ]+|[₀-₎]+")


def plain_characters(text: str) -> str:
    """Writes a text in small letters and plain characters: "Ｃａｆé１٥۔" as "café15."."""
    text = _RAISED.sub(_mark_raised, text)
    return compose("".join(map(plain_character, text)).casefold())


def compose(text: str) -> str:
    """Writes e and its accent as é. In pieces: many accents on one letter take quadratic time."""
    return _PIECE.sub(lambda piece: unicodedata.normalize("NFC", piece[0]), text)


def _categories(text: str) -> set[str]:
    """Returns the kinds of characters in a text: L letters, M accents, N numbers, P marks, S signs."""
    return {unicodedata.category(character)[0] for character in text}


def _mark_raised(raised: re.Match) -> str:
    """Writes raised and lowered digits as LaTeX does: 10⁻³ as 10^{-3}, 10₂ as 10_{2}."""
    mark = "_" if "₀" <= raised[0] <= "₎" else "^"
    digits = unicodedata.normalize("NFKC", raised[0])
    return f"{mark}{{{digits}}}"


@lru_cache(maxsize=10_000)
def plain_character(character: str) -> str:
    """Returns a character in its plainest form: １, 𝟏 and ١ are 1, ؟ is ?, ½ is " 1/2 ". Invisible: ""."""
    if character.isascii() and character.isprintable():
        return character
    if character in PLAIN_CHARACTERS:
        return PLAIN_CHARACTERS[character]
    category = unicodedata.category(character)
    if category in ("Cc", "Cf") and not character.isspace():
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
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
    r"(?:option|choice|选[项择]?)? ?:? ?"
    r"(?:[(\[] ?([a-j]) ?[)\]](?! ?[=(]|[+*/^-]| [+*/^-] )"
    r"|([a-j])(?: ?[.)、](?= |[^\x00-\x7f])| ?:(?= \S\S| \d| ?[^\x00-\x7f])|[.:](?=[a-z]{2})|\)|$))"
)
NEXT_LETTER = re.compile(
    r"(?<![\w.'(])(?:\( ?[a-j] ?\)|[a-j] ?(?:[.:)、](?= \S|[^\x00-\x7f])|\)$))", re.IGNORECASE
)
_PREFACE = re.compile(r"(?:the )?(?:correct |final )?answer(?: is ?:?| ?[:=])|答案[是为选]? ?:?")


def _unwrap(text: str) -> str:
    """Removes up to three layers of marks at the end, and of quotes and brackets around the whole."""
    for _ in range(3):
        text = " ".join(text.split()).rstrip(" .,;:?、")
        # The exclamation mark of a word, but not of 5! and n!
        calm = text.rstrip(" !")
        if not calm or re.search(r"[^\W\d_]{2}$|[^\x00-\x7f]$", calm):
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


# -- Blanks and signs


def _normalize_blanks(text: str) -> str:
    """Leaves blanks between words, and between a number and its unit: "( 1 , 2 )" is "(1,2)"."""
    text = re.sub(r"(?<=\d)(?=[^\W\d_])", " ", text)
    text = re.sub(r" !=", "≠", text)  # but 5!=120
    text = " ".join(text.split())
    return re.sub(r"(?<=(.)) (?=(.))", _read_blank, text)


def _read_blank(blank: re.Match) -> str:
    """Removes a blank beside a sign. A full stop keeps it: 3. 5 is not 3.5."""
    beside = (blank[1] + blank[2]).replace(".", "")
    return "" if _categories(beside) & {"P", "S"} else " "


def _normalize_signs(text: str) -> str:
    """Writes each sign in one way: >= as ≥, -(1/2) as -1/2, 5 degrees as 5°, 5 p.m. as 5 pm."""
    text = text.replace("、", ",").replace(">=", "≥").replace("<=", "≤").replace("¬=", "≠")
    text = re.sub(r"(?<=\d) deg(?:rees?)?\b ?", "°", text)
    text = re.sub(r"(?<=\d) per ?cent\b", "%", text)
    text = re.sub(r"(?<=\d) ?([ap])\. ?m\b\.?", r" \1m", text)
    text = _SIGNED_BRACKET.sub(r"\1\2", text)
    return text.replace("^°", "°")


# -- Names, numbers and units

_EQUATION = re.compile(  # x=5, f(2)=5, area of abc=5, =5; but not 2x=5, x=1 or x=5, a=b=5
    r"(?:(?!\d|[^=(]*\b(?:and|or|not)\b)([^=()]{1,40})(?:\([^()=]{0,20}\))?)?=(?=[^=<>≤≥≠≈≅]+$)"
)
_MONEY = r"(?:(?:us|hk|[acs])?\$|[¢£¥฿\u20a0-\u20cf])"
_NUMBER = r"(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_SIGNED_BRACKET = re.compile(rf"^([+-])\(({_NUMBER}/{_NUMBER})\)(?=$|[ %°])", re.ASCII)
_QUANTITY = re.compile(  # 1.5, 1/2, (-1)/2, 1 1/2, $5, 1.5×10^3, 1.5 e3, with or without a sign
    rf"([+-]?)({_MONEY})?([+-]?)(?:(\d{{1,400}}) (?=\d+/\d))?({_NUMBER}|\([+-]?{_NUMBER}\))"
    rf"(?:/([+-]?{_NUMBER}|\([+-]?{_NUMBER}\)))?"
    r"(?:(?: ?[×·*]| x ?)10\^\(?([+-]?\d{1,9})\)?(?![\d.])| e([+-]?\d{1,9})(?![\w.]))?",
    re.ASCII,
)
_EXPRESSION = re.compile(r"[-+$]?[\d√π.(][\d√π.()+*/^·×±: -]{0,400}(?<=[\dπ)])(?=[ °%'\"])")
_SEPARATOR = re.compile(r"([()\[\]{},;&])")


def _split_name(text: str) -> tuple[str, str]:
    """Splits a name off an equation: "x=5" is "x", "5", and so f(-1)=, ∠abc= and area of abc=.

    The name is "" if there is none, as in x+1=5 and a=b=5.
    """
    found = _EQUATION.match(text)
    if not found:
        return "", text
    letters = re.sub("[ _'∠△]", "", found[1] or "")
    if not _categories(letters) <= set("LMN"):
        return "", text
    return text[: found.end() - 1], text[found.end() :]


def _read_quantity(text: str) -> tuple[Fraction | str, str]:
    """Returns the value and the unit of a number or an expression; of other text itself, without a unit.

    5.0 cm    5, " cm"        $5    5, "$"        6 π cm    "6 π", " cm"        2.0 x    "2 x", ""
    """
    found = _QUANTITY.match(text)
    rest = text[found.end() :] if found else text
    value = _read_value(found) if found else None
    # A number, but not 1/0, 1 3/2 and 1/2 + x
    is_number = value is not None and re.match(rf"$|%|[°'\"]| [^\W\d_]|{_MONEY}$", rest)
    if is_number:
        money = found[2] or ""
        unit = money + rest
        if not unit or not (money and rest) and _is_unit(unit):
            return value, unit
        text = f"{money}{value}{rest}"
    # An expression with a unit
    found = _EXPRESSION.match(text)
    if found and _is_unit(text[found.end() :]):
        return found[0], text[found.end() :]
    return text, ""


def _read_value(found: re.Match) -> Fraction | str | None:
    """Returns the value of a match of _QUANTITY: 3/2, or "3/2×10^3". None of 1/0 and 1 3/2."""
    sign, _, other_sign, whole, above, below, power, exponent = found.groups()
    above = Fraction(above.strip("()"))
    below = Fraction((below or "1").strip("()"))
    if below == 0 or whole and not 0 < above < below or sign and other_sign:
        return None
    value = int(whole or 0) + above / below
    if "-" in (sign, other_sign):
        value = -value
    power = power or exponent
    return f"{value}×10^{int(power)}" if power else value


def _normalize_element(element: str) -> str:
    """Writes an element of a tuple as its value: 4.5 and 9/2 as 9/2, 50% as 1/2."""
    value, unit, _ = Parts(*_read_quantity(element)).as_number()
    return f"{value}{unit.removeprefix(AS_NUMBER)}"


_SHORT_UNITS = set(  # of one or two letters; 5x, 5i and 5π have none
    "m g s l h v w cm mm km dm nm μm kg mg μg ms μs ml dl cl kl ft in yd mi lb oz hr am pm ha pa hz kw mw"
    " mv kv ma mj kj kn ω kω kb mb gb tb db st nd rd th sq ev px wk".split()
)
_SMALL_WORDS = set("of in on at a an by".split())  # behind others: 5 cups of tea
CHANGES_NUMBER = re.compile(  # 5 million, 5 mrd, 5 or 6, 5 squared, 5 sin x, 5万; but not 5千克
    r"and|or|to|plus|minus|but|not|than|choose|mod|sin|cos|tan|log|ln|exp|root|factorial|squared|cubed"
    r"|(?:hundred|thousand|[mbtr]+illion|mill?iard|dozen|lakh|crore|hal[fv]|third|quarter|fourth|fifth|sixth"
    r"|seventh|eighth|ninth|tenth|mil(?:l?[oó]n|h[oõã]|ion|yon)|tausend|млн|млрд|тыс|милли(?:он|ард))\w*"
    r"|mil|mln|mio|mrd|bln|tsd|lac|grand|nghìn|triệu|tỷ|ribu|juta|लाख|करोड.*|हज.*ार|مليون|مليار|ألف|آلاف"
    r"|(?:ล้าน|แสน|หมื่น|พัน).*"
    r"|(?!千[克米瓦卡])[十百千万萬亿億兆半만억천백].*"
)


def _is_unit(text: str) -> bool:
    """Returns whether a text behind a number is a unit, or what is counted: "°c", " cm^2", " red apples"."""
    if re.fullmatch(rf"[%'\"]|°[cfk]?|{_MONEY}", text):
        return True
    plain = re.sub(r"\^\(?-?[1-4]\)?", "", text.removeprefix("°"))
    first, *others = re.split(r"[ /·*-]", plain.strip())
    return (
        _is_unit_word(first)
        and len(others) <= 4
        and all(_is_unit_word(word) or word in _SMALL_WORDS for word in others)
    )


def _is_unit_word(word: str) -> bool:
    """Returns whether a word may be part of a unit. Short ones are mostly variables: 5 x, 5 π."""
    word = word.rstrip(".")
    is_word = _categories(word.replace("'", "")) <= set("LM")
    if not word or not is_word or CHANGES_NUMBER.fullmatch(word):
        return False
    return len(word) > 2 or word[0] > "\u03ff" or word in _SHORT_UNITS


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
_FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac", "nicefrac", "sfrac", "flatfrac")
_OTHERS = (
    "cdot ·,neq ≠,infty ∞,circ °,degree °,textdegree °,to →,triangle △,ldots ...,dots ...,cdots ...,prime ',"
    "exists ∃,neg ¬,lnot ¬,land ∧,lor ∨,partial ∂,lvert |,rvert |,pounds £"
)
_IN_HTML = {  # nearly all symbols have the same names there: \le is &le; but \Pr and \it are no symbols
    name.removesuffix(";"): plain_characters(sign)
    for name, sign in html5.items()
    if name.islower() and name not in ("pr;", "it;", "sc;")
}
_SYMBOLS = {name: sign for name, sign in _IN_HTML.items() if len(sign) == 1}
_SYMBOLS |= dict(pair.split() for pair in _OTHERS.split(","))
_UNSEEN = re.compile(  # \textcolor{red}{5}, \hspace{1cm}, the columns of a table
    r"\\(?:(?:text|page)?color|colorbox|[hv]space\*?|[hv]?phantom|label)\s{0,4}"
    r"(?:\[[^\[\]]{0,40}\])?\s{0,4}\{[^{}]{0,40}\}|(?<=\{array\})\s{0,4}\{[lcr| ]{0,40}\}"
)
_ROW = re.compile(r"\\\\\*?(?:\[[\d.]{1,5}[a-z]{2}\])?|\\cr(?![a-z])")  # ends a row of a matrix


def _remove_latex(text: str) -> str:
    r"""Returns a text in small letters in plain characters: \frac{1}{2} as 1/2, \sqrt{x} as √x.

    Pairs of $ fall away. Of an odd number each is kept: it is money. Rows of a matrix keep their borders:
    \begin{pmatrix}1&2\\3&4\end{pmatrix} as pmatrix(1&2;3&4).
    """
    if text.count("{") > _MOST_BRACES:
        return text
    text = _PARTS_THOUSANDS.sub(",", _UNSEEN.sub(" ", text))
    if r"\begin" in text:
        text = re.sub(r";\s{0,40}(?=\\end)", "", _ROW.sub(";", text))
    tokens = _TOKEN.findall(_IS_BLANK.sub(" ", text))
    if tokens.count("$") % 2 == 0:
        tokens = [" " if token == "$" else token for token in tokens]
    text = _read_group(iter(tokens), to_the_end=True)
    text = re.sub(r"``([^`']*)''", r'"\1"', text)
    text = re.sub(r"\bsqrt ?\(", "√(", text)
    return re.sub(r"√\((\d+|[^\W\d_])\)", r"√\1 ", text)


def _read_group(tokens: Iterator[str], to_the_end: bool = False) -> str:
    r"""Consumes the tokens to the closing brace, or to the end, and returns them as plain text.

    With \over in it the group is a fraction.
    """
    parts = []
    above = None
    for token in tokens:
        if token.rstrip() == r"\over" and above is None:
            above = _bracket("".join(parts), product=True)
            parts = []
        elif token != "}":
            parts.append(_read_token(token, tokens))
        elif to_the_end:
            parts.append(" ")
        else:
            break
    text = "".join(parts)
    return text if above is None else f" {above}/{_bracket(text)} "


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
    if name in _FRACTIONS:
        above = _bracket(_read_argument(tokens), product=True)
        below = _bracket(_read_argument(tokens))
        return f" {above}/{below} "
    if name.startswith("sqrt"):  # sqrt, or sqrt[3]
        return f" √{name[4:].strip()}{_bracket(_read_argument(tokens))} "
    if name == "begin":
        return f" {_read_argument(tokens).strip()}("
    if name == "end":
        _read_argument(tokens)
        return ")"
    if name and name in "%${}#&_":
        return name
    if name in _LAYOUT or not name.isalnum():  # \text, and \; and \(
        return " "
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    return f" {name} "


def _read_argument(tokens: Iterator[str]) -> str:
    r"""Consumes the next group, command or single character: of \frac12 first the 1, then the 2."""
    token = next(filter(str.strip, tokens), "")
    return _read_token(token, tokens) if token else ""


def _bracket(text: str, product: bool = False, signed: bool = False) -> str:
    """Puts a text in brackets, unless it needs none: a number, a word, a bracket.

    product: above a fraction's line 2π needs none either. signed: nor do -1 and + in an exponent.
    """
    text = text.strip()
    bare = text.lstrip("+-") if signed else text
    simple = r"√?[\d.]*[^\W\d_]*" if product else r"√?(\d+(\.\d+)?|[^\W\d_]+)|°"
    needs_none = text and re.fullmatch(simple + r"|\([^()]*\)|", bare)
    return text if needs_none else f"({text})"

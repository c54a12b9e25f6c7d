"""Answers as people and machines write them, by kind: what joins, what parts. Inputs beyond cases2.py."""

import unicodedata

import pytest

from answers import agrees, extract_answer, read_parts, same_answer
from evaluate import Item, read_answer, right
from measure.choices import options_in, read_choice, read_yes_no
from questioner import parse_question
from rewards import answer_reward, bleu_similarity, cluster_questions, confidence

SAME = {
    "composed": [
        ("naïve", unicodedata.normalize("NFD", "naïve")), ("Å", "A\u030a"),
        ("Ångström", "A\u030angstro\u0308m"),
        ("ệ", "e\u0323\u0302"), ("ệ", "e\u0302\u0323"), ("서울", unicodedata.normalize("NFD", "서울")),
        ("が", "か\u3099"), ("СТРАНА Й", "страна и\u0306"), ("STRASSE", "straße"),
    ],
    "invisible": [
        ("\ufeff5", "5"), ("5\u200d", "5"), ("re\u00add", "red"), ("\u202a5 cm\u202c", "5cm"),
        ("\u20665\u2069", "5"),
        ("red\x00", "red"), ("5\u2060", "5"), ("☀\ufe0f", "☀"), ("\u061cأحمر", "أحمر"), ("5\u3164", "5"),
        ("x\u2062y", "x y"),
    ],
    "marks of other scripts": [
        ("سرخ۔", "سرخ"), ("ቀይ።", "ቀይ"), ("կարմիր։", "կարմիր"), ("লাল।", "লাল"), ("लाल॥", "लाल"),
        ("¡Sí!", "sí"),
        ("красный…", "красный"), ("ក្រហម។", "ក្រហម"), ("赤い！", "赤い"), ("أحمر، أزرق", "أحمر,أزرق"),
        ("नहीं!", "नहीं"),
    ],
    "digits of other scripts": [
        ("۵", "5"), ("৫", "5"), ("๕", "5"), ("٣٫٥", "3.5"), ("١٬٠٠٠", "1000"), ("𝟓", "5"),
        ("५ cm", "5 cm"),
        ("٥٠٪", "0.5"), ("१/२", "0.5"),
    ],
    "relations": [
        (r"x\leqslant 5", "x≤5"), ("x<=5", r"x \le 5"), ("x⩾5", "x≥5"), (r"x \neq 5", "x≠5"),
        ("x != 5", "x ≠ 5"),
        ("x≧5", "x >= 5"), (r"x\not=3", "x≠3"), (r"x\sim y", "x∼y"), (r"x\geq 5", "x⩾5"),
    ],
    "symbols": [
        (r"A\subseteq B", "A⊆B"), (r"\forall x", "∀x"), (r"\notin", "∉"), (r"a\equiv b", "a≡b"),
        (r"a\propto b", "a∝b"),
        (r"\mathbb{R}\setminus\{0\}", r"R∖\{0\}"), (r"\therefore", "∴"), (r"\sum", "∑"), (r"\hbar", "ℏ"),
        (r"\ell", "ℓ"),
        (r"\varphi", "φ"), (r"\lfloor x\rfloor", "⌊x⌋"), (r"\pounds 5", "£5"), (r"\Omega", "Ω"),
        (r"\exists", "∃"),
    ],
    "fractions and colours": [
        (r"1 \over 2", "0.5"), (r"{x+1 \over 2}", r"\frac{x+1}{2}"), (r"\sfrac{3}{4}", "0.75"),
        ("+(3/4)", "3/4"),
        ("-(3/4)", r"-\frac34"), (r"\color{blue}5", "5"), (r"\color{blue}{5}", "5"),
        (r"\colorbox{yellow}{5}", "5"),
        (r"\textcolor[rgb]{1,0,0}{red}", "red"), (r"5\hspace{2mm}\text{cm}", "5 cm"),
        (r"\frac{1 \over 2}{2}", r"\frac{1/2}{2}"),
    ],
    "money": [
        ("$ 5.50", "$5.5"), ("€5", "5 €"), ("5,00€".replace(",", "."), "€5"), ("-$5", "$-5"),
        (r"\$5", "$5.00"),
        ("£1,000", "£1000"), ("¥500", "￥500"), ("₹५", "₹5"), ("$\\$5$", "$5"),
    ],
    "powers of ten": [
        (r"1.5\cdot10^3", "1.5e3"), ("1.5×10³", "1.5E3"), ("2x10^5", "2×10^5"),
        ("6.02 x 10^{23}", r"6.020\times 10^{23}"),
        ("3*10^-2", r"3\times10^{-2}"), ("-1e-5", "-1.0 × 10^{-5}"), ("1e03", "1e+3"),
        (r"5\times 10^3\,\text{m}", "5e3 m"),
    ],
    "a.m.": [
        ("5 a.m.", "5AM"), ("5:30 P.M.", "5:30pm"), ("10 a. m.", "10 am"), ("at 5 p.m.", "at 5 pm"),
        ("12:00 p.m", "12:00 PM"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}"),
        (r"\begin{bmatrix}0.5&1\end{bmatrix}", r"\begin{bmatrix}\frac12 & 1\end{bmatrix}"),
        (r"\begin{array}{cc}1&2\end{array}", r"\begin{array}{lr}1 & 2\end{array}"),
        (r"\begin{pmatrix}1\\[2pt]2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\left[\begin{matrix}1\cr 2\end{matrix}\right]", r"[\begin{matrix}1\\2\end{matrix}]"),
    ],
    "a letter called the choice": [
        ("选B", "B"), ("选 (B)", "B"), ("选择B。", "B"), ("答案选C", "C"), ("答案：选B", "B"),
        ("A: 5 cm", "A"), ("A: 5", "A. 7"), ("(C): 1/2", "C"),
    ],
    "capital millions": [
        ("5.7M", "5.7 million"), ("$5M", "$5.0 million"), ("1,200M", "1200 million"), (".5M", "0.5M"),
        ("5MM", "5 mm"), ("5 M", "5 m"), ("AB5M", "ab5m"),
    ],
    "a charge": [("Na^+", "Na⁺"), (r"\text{Cl}^-", "Cl^{-}"), (r"\mathbb{R}^+", r"\mathbb{R}^{+}"),
        ("x^{-1}", "x^-1")],
    "calm": [("👍!", "👍"), ("90°!", "90°"), ("naïv!", "naïv"), ("是b!", "是b"), ("∞!", "∞"), ("π!", "π")],
    "numbers in tuples": [
        ("(1, 9/2)", "(1, 4.5)"), ("[0.50, 1)", r"[\frac12, 1)"), (r"\{1.0, 2.0\}", r"\{1,2\}"),
        ("1.0, 2.50", "1, 5/2"),
        (r"(-\infty, 0.5]", r"\left(-\infty,\frac{1}{2}\right]"), ("(50%, 0.5)", "(0.5, 1/2)"),
        ("(+1, -2.0)", "(1,-2)"),
        ("((1,2.0),(3,4))", "((1,2),(3,4))"), ("1; 2.0", "1;2"), ("x = 1, 2.0", "x=1,2"),
        (r"(\$5.00, 1)", r"(\$5,1)"),
    ],
}  # fmt: skip
DIFFERENT = {
    "composed": [("résumé", "resume"), ("か", "が"), ("й", "и"), ("한국", "한굳"), ("i", "ı"),
    ("ñ", "n")],
    "invisible": [("👍🏻", "👍🏿"), ("5\u200e", "6"), ("5\t6", "56"), ("5\u20636", "56"), ("❤", "💔")],
    "marks of other scripts": [("؟", "!"), ("लाल", "नीला"), ("5!", "5¡6"), ("n!", "n"),
    ("गाड़ी है", "गाड़ीहै")],
    "digits of other scripts": [("٥", "۶"), ("五", "5"), ("Ⅴ", "5"), ("१२", "21"), ("٥٠", "5")],
    "relations": [("x<=5", "x<5"), ("x!=5", "x=5"), ("5!=120", "5≠120"), ("≥5", "≤5"),
    (r"x\ngeq 5", r"x\geq 5")],
    "symbols": [(r"\subset", r"\subseteq"), (r"\in", r"\notin"), (r"\cup", r"\cap"), (r"\sum", r"\prod"),
    (r"\alpha", "a")],
    "fractions and colours": [
        (r"{1 \over 2}3", "1/23"), ("-(1/2)^2", "-1/2^2"), (r"\textcolor{red}{5}", "red5"),
        (r"{12 \over 3}", "1 2/3"),
        (r"1\textcolor{red}{2}", "12"), ("-(1/2)", "(1/2)"), (r"x\over 2", "x2"),
    ],
    "money": [("$5", "£5"), ("$5", "5%"), ("$5", "$5 million"), ("$5.50", "$550"), ("$5", "-$5"),
    ("5¢", "5$")],
    "powers of ten": [
        ("1.5e3", "1.5e4"), ("10^3", "103"), ("1.5×10^3", "1.5×10"), ("1e3", "1000"), ("2e", "2"),
        ("1.5×10^3", "15×10^2"),
    ],
    "a.m.": [("10:30 a.m.", "10:30 p.m."), ("5 am", "5 a"), ("a.m.", "p.m."), ("5 a.m.", "5 m"),
    ("I am", "I a.m. m")],
    "matrices": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"),
        (r"\begin{pmatrix}12\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{vmatrix}1&2\end{vmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}1-2\end{pmatrix}"),
    ],
    "a letter called the choice": [
        ("a: 5, b: 6", "a"), ("a:5", "a"), ("A：红，B：绿", "A"), ("A、红, B、绿", "A"),
        ("选", "选B"), ("A: B", "A"), ("3: 5", "3"),
    ],
    "capital millions": [("5M", "5m"), ("5M", "5 m"), ("5M", "5"), ("5MHz", "5M"), ("M", "million")],
    "numbers in tuples": [("(1,2.5)", "(1,2)"), ("[1,2]", "(1,2)"), ("(1,2)", "(2,1)"),
    ("(1/2)^2", "1/2^2"), ("1,5", "1.5")],
}  # fmt: skip


def pairs(table):
    return [
        pytest.param(a, b, id=f"{kind} {i}")
        for kind, all_ in table.items()
        for i, (a, b) in enumerate(all_)
    ]


@pytest.mark.parametrize("a, b", pairs(SAME))
def test_what_says_the_same(a, b):
    assert same_answer(a, b) and same_answer(b, a), (read_parts(a), read_parts(b))
    assert agrees(a, b) and confidence([a, b])[1] == 1.0


@pytest.mark.parametrize("a, b", pairs(DIFFERENT))
def test_what_does_not(a, b):
    assert not same_answer(a, b) and not same_answer(b, a), (read_parts(a), read_parts(b))


LEFT_OUT = [  # one vote each: all are one answer
    ["5 cm", "5"], ["5", r"5\,\text{cm}", "5cm"], ["x = 5", "5"], ["x=5", "5", "x = 5.0"], ["50%", "50"],
    ["$5", "5"],
    ["90^\\circ", "90", "90 degrees"], [r"\text{5 apples}", "5"], ["25°C", "25"], ["5 m/s", "5"],
    ["5 m/s^2", "5"],
    ["12 cm²", "12"], ["€5.00", "5"], ["5 USD", "5"], ["3 km/h", "3"], ["5 €", "5"], ["x = 5 cm", "5"],
    ["x = 5 cm", "5 cm", "x = 5", "5"], ["f(2) = 7", "7"], [r"\angle ABC = 90^\circ", "90"],
    ["AB = 5", "5"],
    ["y = 2x + 1", "2x+1"], ["x_1 = 5", "5"], ["5个", "5"], ["5 см", "5"], ["1.5×10^3 m", "1.5e3"],
    [r"6\pi\text{ cm}", r"6\pi"],
    [r"2\sqrt{3}\text{ cm}", r"2\sqrt3"], ["10:30 a.m.", "10:30"], ["5 people", "5"],
    ["5 red apples", "5"],
    ["1/2 cup", "0.5"], ["1 1/2 cups", "3/2"], ["12.5%", "12.5"], ["-5°", "-5"], ["5 o'clock", "5"],
    ["area = 5", "5"],
    ["5'", "5"], ["21st", "21"], ["5-6 hours", "5–6"], ["5 किलो", "5"], ["5千克", "5"], ["= 5", "5"],
    ["US$5.00", "US$5", "5"], ["5 sq. units", "5"], ["P(A∪B) = 1/3", "1/3"], ["P(A or B) = 1/3", "1/3"],
    ["5 kg", "5", None],
    ["5 miles", "5"], ["5 milk bottles", "5"], ["5 millilitres", "5"], ["5 миллиметров", "5"], ["5 eV", "5"],
    ["800 px", "800"], ["Größe = 5", "5"], ["Länge AB = 5", "5"], ["ऊँचाई = 5", "5"],
    ["٥ cm", "5"], ["x = (1, 4.5)", "(1, 9/2)"], ["5 cups of tea", "5"], ["5 N m".replace("N", "kN"),
    "5"],
]  # fmt: skip
APART = [  # one vote each: all are different answers
    ["5 cm", "5 mm", "5"], ["x = 5", "y = 5", "5"], ["$5", "€5", "5"], ["50%", "50 cm", "50"],
    ["90°", "90 cm", "90"],
    ["2x", "2"], ["2\\pi", "2"], ["5i", "5"], ["3a", "3"], ["5 million", "5"],
    ["5 thousand dollars", "5"], ["5 or 6", "5"],
    ["5M", "5 m"], ["$5M", "$5"], ["5 mln", "5"], ["5 Mrd.", "5"], ["5 mil", "5"], ["5 grand", "5"],
    ["5 millones", "5"], ["5 milhões", "5"], ["5 тысяч", "5"], ["5 млн", "5"], ["5 миллионов", "5"],
    ["5 करोड़", "5"], ["5 हज़ार", "5"], ["5 مليون", "5"], ["5 ล้านบาท", "5"], ["5 triệu", "5"], ["5 juta", "5"],
    ["x and y = 5", "5"], ["not x = 5", "5"], ["2x = 5", "5"], ["x = 5 or y = 5", "5"],
    ["5 apples and 3 pears", "5"], ["5 to 6", "5"], ["5!", "5"], ["5^2", "5"], ["2 sin x", "2"],
    ["5万", "5"],
    ["5 squared", "5"], ["5 tenths", "5"], ["5 dozen eggs", "5"], ["x + 1 = 5", "5"], [r"x\not=5", "5"],
    ["x is not = 5", "5"], ["x ∉ A = 5", "5"], ["US$5", "$5", "5"], ["2x = 5", "5"],
    ["x > 5", "5"],
    ["x = 5 or x = 3", "5"], ["256+37 = 293", "37"], ["x^2 = 5", "5"], ["5 cm", "50"], ["-5 cm", "5"],
    ["xy", "x"],
    ["5 hundred", "5"], ["5k", "5"], ["2n", "2"], ["5 billion", "5"], ["5'10\"", "5"], ["2αβ", "2"],
    ["5 halves", "5"],
    ["A cat", "A"], ["5 out of 10", "5"], ["1:2", "1"], ["√5", "5"], ["|x| = 5", "5"], ["5 mod 7", "5"],
    ["5억", "5"],
    ["0.5%", "50%"], ["50%", "0.5 cm"], ["$5 million", "$5"], ["5 x 10", "5"], ["x ≠ 5", "5"],
    ["5 quarters", "5"],
    ["5, 6 cm", "5"], ["5 m 3", "5"], ["-x = 5", "5"], ["5 plus 3", "5"], ["red", "x"], ["5 cubed", "5"],
]  # fmt: skip


@pytest.mark.parametrize("votes", LEFT_OUT, ids=str)
def test_votes_that_leave_something_out_join(votes):
    label, c = confidence(votes)
    assert c == sum(vote is not None for vote in votes) / len(votes), [
        read_parts(v) for v in votes if v
    ]
    assert all(answer_reward(vote, label) for vote in votes if vote)


@pytest.mark.parametrize("votes", APART, ids=str)
def test_votes_that_say_something_else_stay_alone(votes):
    assert confidence(votes)[1] == 1 / len(votes), [read_parts(vote) for vote in votes]


READ = {
    "letters of units and names": [
        ("The answer: 25 °C.", ("20 °C", "25 °C", "30 °C"), "B"),
        ("It draws 3 A.", ("red", "green", "blue"), None),
        ("Vitamin D is made by the sun.", ("vitamin C", "vitamin D"), "B"),
        ("It was built in the U.S.A.", ("France", "Spain"), None),
        ("A T-shirt", ("a hat", "a T-shirt"), "B"), ("The language is C++.", ("Java", "Rust", "C++"),
        "C"),
        ("It is in C major.", ("red", "green", "blue"), None), ("Type B", ("Type A", "Type C", "Type B"),
        "C"),
        ("The team is Group B.", ("Group A", "Group C", "Group B"), "C"), ("R&D", ("sales", "R&D"), "B"),
        ("He lives in Washington, D.C.", ("Boston", "Miami", "Rome", "Oslo"), None),
        ("30 degrees C", ("20 °C", "x", "y"), None),
        ("The answer is D.C.", ("Boston", "Miami", "Rome", "D.C."), "D"),
        ("It is 5 A. So B.", ("4 A", "5 A"), "B"),
        ("Plan B is the best.", ("Plan B", "Plan A"), "A"), ("It got a grade of A+.", ("A+", "B+", "C+"),
        "A"),
        ("27°C", ("30 °C", "20 °C", "25 °C"), None), ("w/ B", ("red", "green"), "B"),
        ("5 B", ("4 B", "5 B"), "B"),
        ("\\boxed{B}, that is 30 °C", ("20 °C", "30 °C"), "B"),
        ("B: vitamin C", ("vitamin A", "vitamin C"), "B"),
        ("It is 30°C.", ("20 °C", "30 °C"), "B"), ("It is 30 °C.", ("20°C", "30°C"), "B"),
        ("It draws 5A.", ("1 A", "5 A"), "B"), ("So x=5 here", ("x = 4", "x = 5"), "B"),
        ("It costs $ 5.", ("$4", "$5"), "B"),
        ("There are 1 2", ("12", "13"), None), ("a blackcat", ("a black cat", "dog"), None),
        ("(B) 5 A", ("1 A", "5 A", "7 A"), "B"), ("B, vitamin A", ("vitamin C", "vitamin A"), "B"),
        ("*B*", ("red", "green"), "B"),
        ("The answer is B-positive.", ("A-positive", "B-positive"), "B"), ("B) 30 °C", ("20 °C", "30 °C"),
        "B"),
        ("\u200eB\u200e", ("red", "green"), "B"), ("Ｂ", ("red", "green"), "B"),
        ("It's hepatitis B.", ("hepatitis B", "hepatitis A"), "A"),
        ("Point C is highest", ("red", "green", "blue"), "C"),
        ("Angle B measures 90°.", ("30°", "60°", "90°"), "C"),
        ("Vertex C has 30°", ("30°", "60°", "90°"), "A"),
        ("He has a Ph.D.", ("w", "x", "y", "z"), None), ("Vitamin-C", ("x", "y", "z"), None),
        ("2-D", ("w", "x", "y", "z"), None), ("B-12", ("x", "y"), None),
        ("Gate B", ("Gate C", "Gate B"), "B"),
        ("2 - D", ("w", "x", "y", "z"), "D"), ("No. 2 (B)", ("x", "y"), "B"),
        ("<think>A</think>The answer is B</think>\n", ("x", "y"), "B"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("text, choices, letter", READ["letters of units and names"])
def test_a_letter_inside_a_unit_or_a_name_is_no_choice(text, choices, letter):
    assert read_choice(text, choices) == letter


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("No answer", None), ("I have no idea", None), ("no clue", None), ("yes/no", None),
        ("Yes and no.", None),
        ("No information is given.", None), ("There is no way to know.", None),
        ("I cannot say yes", None),
        ("It's impossible to say no", None), ("\\boxed{No idea}", None), ("Nobody knows", None),
        ("No one knows", None),
        ("It could be yes", None), ("I can’t say yes or no", None), ("It is unclear if yes", None),
        ("", None), ("neither yes nor no", None),
        ("No.", False), ("No way!", False), ("no, I can't see it", False),
        ("There is no dog, so no.", False), ("No cat.", False),
        ("No doubt: yes", True), ("I can't see all of it, but yes.", True), ("Yes, no doubt.", True),
        ("Yes, I'm not sure why", True),
        ("It is hard to see, but no", False), ("Yes!", True), ("The answer is no.", False),
        ("There are no people.", False),
    ],
)  # fmt: skip
def test_no_answer_is_not_no(text, verdict):
    assert read_yes_no(text) is verdict


@pytest.mark.parametrize(
    "answer, gold, precision, is_right",
    [
        ("2^{10}", "2", 0, False), ("3\\times 10^2", "3", 0, False), ("3\\times 10^2", "300", 0, True),
        ("\\sqrt[3]{8}", "3", 0, False),
        ("5x", "5", 0, False), ("3 \\pm 0.1", "3", 0, False), ("5 million", "5", 0, False),
        ("5 or 6", "5", 0, False),
        ("5:30", "5", 0, False), ("(3, 4)", "3", 0, False), ("10/3", "3.33", 2, True),
        ("\\frac{10}{3}", "3", 0, True),
        ("about 5", "5", 0, True), ("≈ 3.14", "3.14", 2, True), ("approximately 12.5%", "12.5", 1, True),
        ("-3.5 m", "-3.5", 1, True),
        ("y = -2", "-2", 0, True), ("5 apples", "5", 0, True), ("3 + 4 = 7 apples", "7", 0, True),
        ("$1,234.56", "1234.56", 2, True),
        ("1 1/2", "1.5", 1, True), ("roughly 1{,}200", "1200", 0, True), ("1e-1", "0.1", 1, True),
        ("5.0", "5", 0, True),
        ("x \\times 10^3", "3", 0, False), ("10^{999}", "1", 0, False), ("1e-999", "0", 0, True),
        ("3 4", "3", 0, False),
        ("2 \\times 3", "2", 0, False), ("2\\cdot 3 = 6", "6", 0, True), ("7!", "7", 0, False),
        ("٥", "5", 0, True),
        ("\\log 5", "5", 0, False), ("5 kg", "5", 0, True), ("x = 3 or x = 5", "5", 0, True),
        ("10^{-2}", "10", 0, False), ("it costs 5€", "5", 0, True),
    ],
)  # fmt: skip
def test_a_number_of_an_expression_is_not_its_value(answer, gold, precision, is_right):
    item = Item("x", "?", (gold,), precision=precision)
    assert right(read_answer("\\boxed{" + answer + "}", item), item) == is_right


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"<think>a</think>\boxed{5}</think></think>", "5"), (r"a</think>\boxed{5}</think> ", "5"),
        (r"\boxed{5}</think>", None),
        (r"<think>a</think><think>\boxed{5}</think>", None),
        (r"<think>a</think>\boxed{5}<think>\boxed{6}</think>", "5"),
        ("</think>" * 3, None), (r"<think>x</think>\boxed{3}</think> so", None),
        (r"</think>\boxed{5}", "5"),
        (r"<think>x</think>\boxed{\text{a}}</think>" + "\n\n", r"\text{a}"),
    ],
)  # fmt: skip
def test_a_stray_end_of_a_thought(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "question, options",
    [
        ("When? A. 5 a.m. B. 6 p.m.", ("5 a.m.", "6 p.m.")),
        ("When? a) 5 a.m. b) 6 a.m.", ("5 a.m.", "6 a.m.")),
        ("哪个？A．红 B．绿 C．蓝", ("红", "绿", "蓝")), ("哪个？A.红B.绿", ("红", "绿")),
        ("哪个？（A）红（B）绿", ("红", "绿")), ("选择：A：红，B：绿", ("红", "绿")),
        ("When? A. A.D. 5 B. B.C. 5", ("A.D. 5", "B.C. 5")), ("Which? A)x B)y", ("x", "y")),
        ("If f(a) = 1, what is f(b)? (a) 1 (b) 2", ("1", "2")), ("Is P(A) > P(B)?", ()),
        ("Who? A) J. F. Kennedy B) F. D. Roosevelt", ("J. F. Kennedy", "F. D. Roosevelt")),
        ("Which is larger, (a) or (b)?", ()),
        ("Which?\nA: vitamin A\nB: vitamin B", ("vitamin A", "vitamin B")),
        ("Where? A. Washington, D.C. B. St. Louis", ("Washington, D.C.", "St. Louis")),
        ("At 5 a.m. or b.?", ()),
        ("Choices: (A) 10 °C (B) 20 °C (C) 30 °C", ("10 °C", "20 °C", "30 °C")),
        ("Options: A: yes, B: no", ("yes", "no")),
        ("Who wrote it? (A) A. Miller (B) B. Brecht", ("A. Miller", "B. Brecht")),
        ("Qui ? A: été ; B: hiver", ("été", "hiver")),
    ],
)  # fmt: skip
def test_options_as_people_write_them(question, options):
    assert options_in(question) == options


BLOCKS = "<type>{}</type>\n<question>{}</question>\n<answer>{}</answer>"


@pytest.mark.parametrize(
    "kind, question, answer, is_valid",
    [
        ("multiple_choice", "Why?", "1", True), ("Multiple_Choice", "Why?", "1", True),
        ("MULTIPLE CHOICE", "Why?", "1", True),
        ("multiple - choice", "Why?", "1", True), ("**numerical**", "Why?", "1", True),
        ("numerical.", "Why?", "1", True),
        ("multiple answers", "Why?", "1", False), ("multiplechoice", "Why?", "1", False),
        ("numerical choice", "Why?", "1", False),
        ("multiple", "Why?", "1", False), ("", "Why?", "1", False),
        ("numerical, regression", "Why?", "1", False),
        ("numerical", "?", "1", False), ("numerical", "???", "1", False),
        ("numerical", "\u200b\u200b", "1", False), ("numerical", "...", "1", False),
        ("numerical", "？", "1", False), ("numerical", "为什么？", "1", True),
        ("numerical", "5+5=?", "1", True), ("numerical", "क्या?", "1", True),
        ("numerical", "Why?", "\\boxed{ }", False), ("numerical", "Why?", "\\boxed{\u200b}", False),
        ("numerical", "Why?", "?", False),
        ("numerical", "Why?", "\\boxed {}", False), ("numerical", "Why?", "\\boxed{\\text{}}", False),
        ("numerical", "Why?", "5!", True),
    ],
)  # fmt: skip
def test_questions_that_say_something(kind, question, answer, is_valid):
    assert (parse_question(BLOCKS.format(kind, question, answer)) is not None) == is_valid


def test_questions_in_other_forms_of_unicode_are_one():
    composed = ["Où est le café ?", "빨간 차는 몇 대입니까?", "Đường này dài bao nhiêu?"]
    for question in composed:
        other = unicodedata.normalize("NFD", question)
        assert other != question and bleu_similarity(question, other) == 1.0
        assert cluster_questions([question, "Who is on the left?", other]) == [0, 1, 0]


def test_parts_of_an_answer_in_another_form_of_unicode():
    item = Item("x", "?", ("café<AND>5 €",))
    assert right(unicodedata.normalize("NFD", "A CAFÉ; it costs ５ €."), item) and not right(
        "cafe, 5 €", item
    )

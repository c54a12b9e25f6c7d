"""Rewards against hand-worked numbers, nltk and scikit-learn."""

import random
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from sklearn.cluster import AgglomerativeClustering

import rewards
from curate import VotedQuestion, curate, keep, pool
from grpo import group_advantages
from rewards import confidence
from training.folder import read_examples, write_examples
from training.log import all_equal

EQUAL = [
    ("0.5", "1/2"), ("1/2", r"\frac{1}{2}"), (r"\dfrac{1}{2}", "50%"), (r"50\%", ".5"), ("(B)", "B."),
    ("B", "b"),
    ("1,000", "1000"), ("1,234,567.50", "1234567.5"), ("Yes.", "yes"), (r"\text{cat}", "cat"),
    ("$7$", "7"),
    (" two  words ", "Two words"), ("-3", "\u22123"), ("+4", "4.0"), ("(3)", "3"), ("0", "-0"),
    ("½", "0.5"),
    (r"\(2\)", "2"), ("B)", "b"), ("**B**", "B"), ("(1,000)", "1000"), (r"\text{\textbf{cat}}", "cat"),
]  # fmt: skip
UNEQUAL = [
    ("1", "2"), ("yes", "no"), ("50%", "50"), ("1/0", "0"), ("1/2/2", "1/4"), ("12,34", "1234"),
    ("cat", "cats"),
    ("1e3", "1000"), ("2**3", "8"), ("__import__('os')", "os"), ("(1,2)", "1,2"), ("", "0"), ("A", "B"),
    ("1.5", "15"),
    ("5²", "52"), ("1½", "11/2"), ("3½", "31/2"), ("10²", "102"),
]  # fmt: skip


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal_answers(a, b):
    assert rewards.same_answer(a, b) and rewards.same_answer(b, a)


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_unequal_answers(a, b):
    assert not rewards.same_answer(a, b) and not rewards.same_answer(b, a)


@given(st.fractions(), st.integers(0, 6))
def test_numbers_are_compared_exactly(value, digits):
    text = f"{value.numerator}/{value.denominator}"
    assert rewards.same_answer(text, f"\\frac{{{value.numerator}}}{{{value.denominator}}}")
    decimal = f"{value.numerator / 10**digits:.{digits}f}" if abs(value.numerator) < 10**9 else "0"
    assert rewards.same_answer(decimal, decimal + ("0" if "." in decimal else ".0"))


@given(st.text(max_size=200))
def test_any_text_equals_itself(text):
    assert rewards.same_answer(text, text)


def test_comparing_never_computes_or_hangs():
    many = ("9" * 100_000, "{" * 100_000, "\\frac{" * 20_000, "\\text{" * 20_000, "1," * 50_000)
    for whole in ("9**9**9", "1e999999", *many):
        for text in (
            whole,
            whole[:400],
            whole[:399] + "%",
        ):  # longer than what is read as LaTeX, and not
            assert rewards.same_answer(text, text) and not rewards.same_answer(text, "1")


def test_confidence_by_hand():
    assert rewards.confidence(["2", "3", "2.0", None, "2"]) == ("2", 3 / 5)
    assert rewards.confidence(["b", "(B)", "a", "A."]) == ("b", 0.5), "a tie goes to the first"
    assert rewards.confidence(["a", "b", "b", "a"]) == ("a", 0.5)
    assert rewards.confidence([None, None]) == (None, 0.0)
    assert rewards.confidence([]) == (None, 0.0)
    assert rewards.confidence([None] * 9 + ["x"]) == ("x", 0.1), (
        "what cannot be parsed counts but never wins"
    )


@given(st.lists(st.sampled_from(["1", "1.0", "2", "2/1", "yes", "Yes.", "no", None]), max_size=12))
def test_confidence_against_counting(answers):
    label, c = rewards.confidence(answers)
    shares = [
        sum(b is not None and rewards.same_answer(a, b) for b in answers)
        for a in answers
        if a is not None
    ]
    assert c == (max(shares) / len(answers) if shares else 0.0)
    if shares:
        given_ones = [a for a in answers if a is not None]
        assert label == given_ones[shares.index(max(shares))]


def test_uncertainty_is_a_tent():
    assert [rewards.uncertainty_reward(c) for c in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]


def test_answer_reward():
    assert rewards.answer_reward("1/2", "0.5") == 1.0
    assert rewards.answer_reward("1", "0.5") == 0.0
    assert rewards.answer_reward(None, "0.5") == 0.0


def my_reward():
    """A function of a researcher's own; `to_floats` only asks its name."""


@pytest.mark.parametrize(
    "given",
    [
        [1, 0.5, True], np.array([1, 0.5, 1], dtype=np.float32), torch.tensor([1.0, 0.5, 1.0]),
        [np.float16(1), np.bool_(True), np.int64(0)], [Fraction(1, 2), Decimal("0.5"), torch.tensor(1)],
        (value for value in (1, 2, 3)), [torch.tensor(1.0, dtype=torch.bfloat16), np.array(0.5), False],
    ],
)  # fmt: skip
def test_rewards_may_be_numbers_of_any_kind(given):
    numbers = rewards.to_floats(given, 3, my_reward)
    assert len(numbers) == 3 and all(type(number) is float for number in numbers)
    assert torch.isfinite(group_advantages(torch.tensor([numbers]))).all()


@pytest.mark.parametrize(
    "given",
    [
        [None, 1, 1], [float("nan"), 1, 1], [1, 1, float("inf")], [np.array([1.0]), 1, 1],
        [np.zeros((2, 2)), 1, 1],
        [torch.zeros(3), 1, 1], ["0.5", 1, 1], [1j, 1, 1], [[1.0], 1, 1],
        [torch.tensor(float("nan")), 1, 1],
        0.5, None, [1, 1], [1] * 4, torch.tensor(1.0), [10**400, 1, 1], "abc",
    ],
)  # fmt: skip
def test_what_is_no_reward_is_one_sentence_that_names_the_function(given):
    with pytest.raises(ValueError, match="^my_reward returns ") as error:
        rewards.to_floats(given, 3, my_reward)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


WORDS = st.lists(
    st.sampled_from("how many red blue discs rings are there in it ?".split()), max_size=9
).map(" ".join)


def nltk_similarity(a: str, b: str) -> float:
    smooth = SmoothingFunction().method1
    both = [
        sentence_bleu([x.split()], y.split(), smoothing_function=smooth)
        for x, y in ((a, b), (b, a))
    ]
    return sum(both) / 2


@settings(deadline=None)
@given(WORDS, WORDS)
def test_bleu_against_nltk(a, b):
    ours = rewards.bleu_similarity(a, b)
    assert ours == rewards.bleu_similarity(b, a) and 0 <= ours <= 1 + 1e-12
    assert ours == pytest.approx(
        1.0 if a.split() == b.split() else nltk_similarity(a, b), abs=1e-12
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("How many  red\ndiscs?", ["How", "many", "red", "discs?"]),
        ("图中有车？", ["图", "中", "有", "车", "？"]),
        ("図に Red 車", ["図", "に", "Red", "車"]),
        ("カメラ、3台", ["カ", "メ", "ラ", "、", "3", "台"]),
        ("มีรถ กี่คัน", list("มีรถ") + list("กี่คัน")),
        ("차가 몇 대", ["차가", "몇", "대"]),
        ("Это ¿qué naïve?", ["Это", "¿qué", "naïve?"]),
        ("全角\u3000ＡＢ", ["全", "角", "Ａ", "Ｂ"]),
        ("", []),
    ],
)
def test_words(text, words):
    """Scripts without spaces are split into characters, as by sacreBLEU's zh; all others at white space."""
    assert rewards.words(text) == words


@given(st.text(st.characters(max_codepoint=0x2FF)))
def test_words_of_latin_text_stand_between_white_space(text):
    assert rewards.words(text) == text.split()


@pytest.mark.parametrize(
    "a, b, other",
    [
        ("图中有几辆红色的车？", "图中有几辆红色的车", "左边的狗在做什么？"),
        ("写真に赤い車は何台ありますか。", "写真に赤い車は何台ありますか", "犬はどこにいますか。"),
        ("มีรถสีแดงกี่คันในภาพ", "มีรถสีแดงกี่คันในภาพนี้", "สุนัขอยู่ที่ไหน"),
    ],
)
def test_clusters_of_scripts_without_spaces(a, b, other):
    assert rewards.cluster_questions([a, other, b]) == [0, 1, 0]
    assert rewards.bleu_similarity(a, b) == pytest.approx(
        nltk_similarity(" ".join(a), " ".join(b)), abs=1e-12
    )


@settings(deadline=None)
@given(
    st.lists(WORDS, min_size=2, max_size=10, unique_by=lambda q: tuple(q.split())),
    st.sampled_from([0.3, 0.5, 0.7, 0.9]),
)
def test_clusters_against_scikit_learn(questions, threshold):
    distance = np.array([[1 - rewards.bleu_similarity(a, b) for b in questions] for a in questions])
    near = np.sort(distance[np.triu_indices(len(questions), 1)])
    if (np.diff(near) < 1e-9).any() or (abs(near - threshold) < 1e-9).any():
        return  # ties: scikit-learn breaks them by the order of the rows
    model = AgglomerativeClustering(
        None, metric="precomputed", linkage="average", distance_threshold=threshold
    )
    theirs = model.fit_predict(distance)
    ours = rewards.cluster_questions(questions, threshold)
    assert all(
        (ours[i] == ours[j]) == (theirs[i] == theirs[j])
        for i in range(len(ours))
        for j in range(len(ours))
    )


def test_clusters_against_scikit_learn_on_random_distances():
    """Without ties, so that each of 200 cases counts; merging is tested apart from BLEU."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(2, 14))
        points = generator.random((n, 2))
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
        model = AgglomerativeClustering(
            None, metric="precomputed", linkage="average", distance_threshold=0.35
        )
        theirs = model.fit_predict(distance)
        clusters = rewards._average_linkage(distance + np.diag(np.full(n, np.inf)), 0.35)
        assert sorted(map(sorted, clusters)) == sorted(
            sorted(np.flatnonzero(theirs == k)) for k in set(theirs)
        )


@settings(deadline=None)
@given(st.lists(WORDS, max_size=8), st.randoms(use_true_random=False))
def test_clusters_do_not_depend_on_order(questions, rng):
    labels = rewards.cluster_questions(questions)
    assert list(dict.fromkeys(labels)) == list(range(len(set(labels)))), (
        "numbered by first appearance"
    )
    order = list(range(len(questions)))
    rng.shuffle(order)
    again = rewards.cluster_questions([questions[i] for i in order])
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert (again[i] == again[j]) == (labels[a] == labels[b])


def test_questioner_rewards_by_hand():
    same, other = "How many red discs are there?", "Is the large dog on the left asleep or awake?"
    assert rewards.diversity_penalty([same, other, same]) == [2 / 3, 1 / 3, 2 / 3]
    got = rewards.questioner_rewards([same, None, other, same], [0.5, 0.5, 0.75, 1.0])
    # two of four are the same: r_div 0.5; the other alone: 0.25; the last is sure and repeated: below 0, so 0
    assert got == [1 - 0.5, 0.0, 0.5 - 0.25, 0.0]
    assert rewards.questioner_rewards([same, same], [0.5, 0.5], weight=0.0) == [1.0, 1.0]
    assert rewards.questioner_rewards([None, None], [0.5, 0.5]) == [0.0, 0.0]
    assert rewards.questioner_rewards([], []) == []


@given(
    st.lists(st.tuples(st.one_of(st.none(), WORDS), st.floats(0, 1)), max_size=8), st.floats(0, 2)
)
@settings(deadline=None)
def test_questioner_rewards_are_within_bounds(group, weight):
    got = rewards.questioner_rewards([q for q, _ in group], [c for _, c in group], weight)
    for (question, c), r in zip(group, got):
        assert 0 <= r <= rewards.uncertainty_reward(c) and (question is not None or r == 0)


def test_curation(tmp_path):
    assert [keep(c) for c in (0.24, 0.25, 0.5, 0.75, 0.76)] == [False, True, True, True, False]
    rng = random.Random(0)
    made = [
        VotedQuestion(
            f"a/{i}\udcff.png",
            f"q{i}\u2028 ünï",
            "numerical",
            None,
            0.0,
            [rng.choice(["1", "1", "1", "2", "3", "4", "5", None]) for _ in range(6)],
        )
        for i in range(40)
    ]
    kept = curate(made, lambda e: e.label is not None and keep(e.confidence))
    votes = [confidence(e.answers) for e in made]
    wanted = [e for e, (label, c) in zip(made, votes) if label is not None and keep(c)]
    assert [e.image for e in kept] == [e.image for e in wanted] and 0 < len(kept) < 40
    assert [(e.label, e.confidence) for e in kept] == [
        v for v in votes if v[0] is not None and keep(v[1])
    ]
    write_examples(tmp_path / "sub" / "x.jsonl", kept)
    assert read_examples(tmp_path / "sub" / "x.jsonl") == kept


def test_a_question_that_is_proposed_again_is_kept_once_with_all_votes():
    """Two labels for one question about one image would contradict each other; another image is another
    question."""
    first = VotedQuestion("a.png", "How many?", "numerical", "1", 2 / 3, ["1", "1", "2"])
    again = VotedQuestion("a.png", "How many?", "numerical", "2", 1.0, ["2", "2", "2"])
    other = VotedQuestion("b.png", "How many?", "numerical", "1", 1.0, ["1", "1", "1"])
    pooled = pool([first, other, again])
    assert [(e.image, e.label, e.confidence, len(e.answers)) for e in pooled] == [
        ("a.png", "2", 4 / 6, 6),
        ("b.png", "1", 1.0, 3),
    ]
    assert pool(pooled) == pooled


def test_a_question_without_a_label_is_never_curated():
    unanswered = VotedQuestion("a.png", "how many?", "numerical", None, 0.0, [None, None])
    answered = VotedQuestion("a.png", "which?", "numerical", "red", 1.0, ["red", "red"])
    assert curate([unanswered, answered], lambda example: True) == [answered]


def test_groups_that_teach_nothing_are_counted_as_grpo_sees_them():
    """0.3 and 0.7 of the votes are rewarded alike, but for the last digit."""
    unlike = ["how many cats?", "where is the red door"]
    first, second = pair = rewards.questioner_rewards(unlike, [0.3, 0.7])
    assert first != second and not group_advantages(torch.tensor([pair])).any()
    assert all_equal(pair) and all_equal([0.5] * 8)
    assert not all_equal([0.1, 0.2]) and not all_equal([])

"""Votes counted over the set: against an oracle that reads made votes, in any order, and in linear time."""

import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answers import agrees, same_answer
from curate import VotedQuestion, pool
from measure.items import Item, right
from rewards import answer_reward, confidence, count_votes

# ---- Votes whose value, unit and name are known, as the test has made them ----

VALUES = {
    Fraction(5): ["5", "5.0", "10/2", r"\frac{10}{2}"],
    Fraction(1, 2): ["0.5", "1/2", r"\frac12"],
}
VALUES |= {
    Fraction(50): ["50", "50.0"],
    Fraction(1, 20): ["0.05", "1/20"],
    "(1,9/2)": ["(1, 9/2)", "(1,4.5)"],
}
UNITS = {"": ["{}"], "cm": ["{} cm", r"{}\,\text{{cm}}"], "mm": ["{} mm", r"{}~\mathrm{{mm}}"]}
UNITS |= {"%": ["{}%", r"{}\%", "{} percent"], "$": ["${}", r"\${}"], "°": [r"{}^\circ", "{}°"]}
UNITS |= {"apples": [r"\text{{{} apples}}", "{} apples"]}
NAMES = {"": ["{}"], "x": ["x = {}", "$x={}$"], "y": ["y={}", r"\(y = {}\)"]}


@st.composite
def made_votes(draw):
    """A spelling, and what it states: (text, value, unit, name)."""
    value = draw(st.sampled_from([*VALUES]))
    unit = draw(st.sampled_from([*UNITS] if isinstance(value, Fraction) else [""]))
    name = draw(st.sampled_from([*NAMES]))
    text = draw(st.sampled_from(VALUES[value]))
    if unit == "$" and name or "frac" in text and unit == "apples":
        unit = ""  # $x=$5$ and \text{\frac12} are other things
    text = draw(st.sampled_from(UNITS[unit])).format(text)
    return draw(st.sampled_from(NAMES[name])).format(text), value, unit, name


def candidates_by_hand(votes):
    """The sets of votes that are one answer: pairs are compared, as no linear rule would."""
    said = {value for _, value, unit, _ in votes if not unit}

    def meant(vote):
        _, value, unit, name = vote
        is_half = unit == "%" and value / 100 in said
        return (value / 100, "of 1", name) if is_half else (value, unit, name)

    stated = {(value, unit) for _, value, unit, _ in votes} | {meant(vote)[:2] for vote in votes}
    names = {(meant(vote)[0], vote[3]) for vote in votes} | {
        (value, name) for _, value, _, name in votes
    }
    sets = Counter()
    for vote in votes:
        value, unit, name = meant(vote)
        units = {u for v, u in stated if v == value and u}
        if not unit and "of 1" in units:
            unit = "of 1"
        elif not unit and len(units) == 1:
            (unit,) = units
        others = {n for v, n in names if v == value and n}
        if not name and len(others) == 1:
            (name,) = others
        sets[value, unit, name] += 1
    return sets


VOTES = st.lists(made_votes(), max_size=9)


@settings(max_examples=150, deadline=None)
@given(VOTES, st.randoms(use_true_random=False))
def test_candidates_against_an_oracle_in_any_order(votes, rng):
    texts = [vote[0] for vote in votes]
    wanted = sorted(candidates_by_hand(votes).values())
    assert sorted(candidate.votes for candidate in count_votes(texts)) == wanted, texts
    label, c = confidence(texts)
    assert c == (max(wanted) / len(texts) if texts else 0.0)
    # The order decides nothing but ties
    shuffled = rng.sample(texts, len(texts))
    other, c_other = confidence(shuffled)
    assert c_other == c
    by_votes = {frozenset(found.spellings.items()): found.label for found in count_votes(texts)}
    for found in count_votes(shuffled):
        assert same_answer(found.label, by_votes[frozenset(found.spellings.items())])
    if wanted and wanted.count(wanted[-1]) == 1:
        assert same_answer(label, other)


@settings(max_examples=150, deadline=None)
@given(VOTES)
def test_merging_never_joins_what_is_stated_differently(votes):
    stated = {text: (value, unit, name) for text, value, unit, name in votes}
    for candidate in count_votes([*stated]):
        members = [stated[text] for text in candidate.spellings]
        assert len({name for _, _, name in members} - {""}) <= 1
        values = {value / 100 if unit == "%" else value for value, unit, _ in members}
        assert len({unit for _, unit, _ in members} - {""}) <= 1 and len(values) <= 2
        # All that vote for it are paid for its label, and what it states parts others
        assert all(answer_reward(text, candidate.label) for text in candidate.spellings)


@settings(max_examples=150, deadline=None)
@given(VOTES)
def test_what_says_the_same_is_counted_together_and_agreeing_is_symmetric(votes):
    place = {}
    for number, candidate in enumerate(count_votes([vote[0] for vote in votes])):
        place |= dict.fromkeys(candidate.spellings, number)
    for a, value, unit, name in votes:
        for b, other, other_unit, other_name in votes:
            number = value / 100 if unit == "%" else value
            other_number = other / 100 if other_unit == "%" else other
            units = {unit, other_unit} - {""}
            same = name == other_name and (
                (value, unit) == (other, other_unit) or number == other_number and units == {"%"}
            )
            assert same_answer(a, b) == same, (a, b)
            assert not same or place[a] == place[b]
            near = value == other and len(units) <= 1 or number == other_number and units == {"%"}
            near = near and len({name, other_name} - {""}) <= 1
            assert agrees(a, b) == agrees(b, a) == near, (a, b)


PIECES = (
    "5 0.5 50 9/2 4.5 % \\% cm mm apples $ € x = y= ( ) , ; [ ] { } ° ^\\circ \\frac12 1 2 and or . ! ? - +"
    " e3 ×10^3 \\text{ \\, a.m. pm B. (B) π √ \\over ٥ e\u0301 \u200e । ¿ >= != million"
    " \\begin{pmatrix} & \\\\ \\end{pmatrix}"
).split() + [" "]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=3, max_size=5))
def test_of_any_texts_it_is_an_equivalence_that_votes_keep(texts):
    for a in texts:
        assert same_answer(a, a)
        for b in texts:
            assert same_answer(a, b) == same_answer(b, a) and agrees(a, b) == agrees(b, a)
            assert agrees(a, b) or not same_answer(a, b)
            for c in texts:
                assert same_answer(a, c) or not (same_answer(a, b) and same_answer(b, c))
    place = {}
    for number, candidate in enumerate(count_votes(texts)):
        place |= dict.fromkeys(candidate.spellings, number)
        assert all(agrees(text, candidate.label) for text in candidate.spellings)
    for a in place:
        assert all(place[a] == place[b] for b in place if same_answer(a, b))
    assert confidence(texts)[1] == confidence(texts[::-1])[1]


@pytest.mark.parametrize(
    "votes, label, share",
    [
        (["5 cm"] * 6 + ["5"] * 4, "5 cm", 1.0), (["5"] * 9 + ["5 cm"], "5 cm", 1.0),
        (["5", "5 cm", "5 mm"], "5", 1 / 3),
        (["5", "5", "5 cm", "5 mm"], "5", 0.5), (["5 mm", "5 cm", "5 cm", "5"], "5 cm", 0.5),
        (["50", "50%"], "50%", 1.0),
        (["50", "50%", "0.5"], "0.5", 2 / 3), (["50%", "0.5"], "0.5", 1.0), (["50%", "1/2", "0.5 cm"],
        "1/2", 2 / 3),
        (["50", "50%", "50 cm"], "50", 1 / 3), (["5", "x = 5", "5 cm"], "5 cm", 1.0),
        (["x = 5", "x = 5 cm", "5"], "x = 5 cm", 1.0),
        (["5", "x = 5", "y = 5"], "5", 1 / 3), (["x=5", "y=5 cm", "5 cm", "5"], "5 cm", 0.5),
        ([None, "5", "5 cm", "..."], "5 cm", 0.5),
        (["3", "5", "5 cm", "3"], "3", 0.5), (["5 cm", "3", "3", "5"], "5 cm", 0.5),
        (["5000%", "50", "50%"], "50", 2 / 3),
        (["0.5", "50%", "0.5%"], "0.5", 2 / 3), (["5.0 cm", "5cm", "5"], "5.0 cm", 1.0),
        (["B", "(B) cat", "A"], "B", 2 / 3),
    ],
)  # fmt: skip
def test_confidence_of_votes_that_leave_something_out(votes, label, share):
    assert confidence(votes) == (label, share)


@pytest.mark.parametrize(
    "answer, label, reward",
    [
        ("5", "5 cm", 1), ("5 cm", "5", 1), ("5 mm", "5 cm", 0), ("5", "x = 5", 1), ("y = 5", "x = 5", 0),
        ("x = 5", "5 cm", 1),
        ("50", "50%", 1), ("0.5", "50%", 1), ("50", "0.5", 0), ("50%", "0.5", 1), ("5%", "0.5", 0),
        ("$5", "5", 1), ("€5", "$5", 0),
        ("50%", "0.5 cm", 0), ("50%", "0.5%", 0), ("6 cm", "5 cm", 0), ("?", "!", 0), ("...", "5", 0),
        (None, "5", 0), ("5x", "5", 0),
        ("(1, 4.5)", "(1, 9/2)", 1), ("90", r"90^\circ", 1), ("5 pm", "5 am", 0), ("5 o'clock", "5", 1),
        ("x = 5 cm", "x = 5 mm", 0),
    ],
)  # fmt: skip
def test_a_reward_does_not_compare_what_one_side_leaves_out(answer, label, reward):
    assert answer_reward(answer, label) == reward
    if answer:
        assert right(answer, Item("x", "?", (label,))) == bool(reward)


def test_votes_of_two_proposals_are_pooled_as_one_set():
    first = VotedQuestion("a.png", "How long?", "numerical", "5", 1.0, ["5", "5"])
    again = VotedQuestion("a.png", "How long?", "numerical", "5 cm", 0.5, ["5 cm", "5 mm"])
    (pooled,) = pool([first, again])
    assert (pooled.label, pooled.confidence) == ("5", 0.5)


def test_counting_takes_linear_time():
    """Ten times the votes, all different, take less than twenty times as long."""

    def seconds(n):
        votes = [f"{i} cm" if i % 2 else f"n{n} = {i - 1}" for i in range(n)]
        start = time.process_time()
        confidence(votes)
        return time.process_time() - start

    small = min(seconds(299), seconds(301), seconds(303))
    assert min(seconds(3000), seconds(3001), seconds(3002)) < 20 * small + 0.05

"""Parsing what the two roles write: by hand, and on arbitrary text."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from questioner import KINDS, Question, parse_question
from reasoner import extract_answer

GOOD = "<type>numerical</type>\n<question>How many?</question>\n<answer>\\boxed{3}</answer>"


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"So \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"Write \boxed{}: it is \boxed{7}", "7"),
        (r"\boxed{7} \boxed{}", "7"),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed{2} and then \boxed{3", "2"),
        (r"\boxed{3", None),
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"} } \boxed{8} }", "8"),
        (r"{ { \boxed{9}", "9"),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_a_valid_question():
    assert parse_question(GOOD) == Question("numerical", "How many?", "3")
    assert parse_question("<think>hm, <b>two</b>?</think>\n\n" + GOOD + "\n") == Question("numerical", "How many?", "3")
    assert parse_question(GOOD.replace("numerical", " Multiple-Choice ")).kind == "multiple choice"
    assert all(parse_question(GOOD.replace("numerical", kind)).kind == kind for kind in KINDS)


@pytest.mark.parametrize(
    "text",
    [
        GOOD + " More.",
        "Sure! " + GOOD,
        GOOD + GOOD,
        GOOD.replace("numerical", "essay"),
        GOOD.replace("How many?", "  "),
        GOOD.replace("\\boxed{3}", "3"),
        GOOD.replace("\\boxed{3}", "\\boxed{}"),
        GOOD.replace("</answer>", ""),
        GOOD.replace("<type>numerical</type>", ""),
        GOOD.replace("How many?", "How <answer>many?"),
        GOOD.replace("How many?", "How <question>many?"),
        "<think>never closed " + GOOD,
        "<think>a</think><think>b</think>" + GOOD,
        "<question>How many?</question><type>numerical</type><answer>\\boxed{3}</answer>",
        "",
    ],
)
def test_an_invalid_question(text):
    assert parse_question(text) is None


PIECES = st.lists(st.sampled_from(["<type>", "</type>", "<question>", "</question>", "<answer>", "</answer>", "<think>",
                                   "</think>", "numerical", "\\boxed{", "{", "}", "\\{", "3", " ", "\n", "\x00"]))  # fmt: skip


@given(st.one_of(st.text(), PIECES.map("".join)))
@example("<type>" * 50)
def test_any_output_is_parsed_or_refused(text):
    question = parse_question(text)
    if question is not None:
        assert question.kind in KINDS and question.text.strip() and question.answer.strip()
        blocks = f"<type>{question.kind}</type><question>{question.text}</question><answer>\\boxed{{{question.answer}}}</answer>"
        assert parse_question(blocks) == question
    answer = extract_answer(text)
    assert answer is None or (answer.strip() and answer in text)


@pytest.mark.parametrize("piece", ["\\boxed{", "{", "}", "<think>", "<type>", "<type></type>", "\\", "\\boxed"])
def test_parsing_takes_linear_time(piece):
    """A quadratic parser would take minutes on a megabyte."""
    text, start = piece * (1_000_000 // len(piece)), time.process_time()
    assert parse_question(text) is None and parse_question("<type>numerical</type><question>" + text) is None
    assert extract_answer(text) is None
    assert time.process_time() - start < 3

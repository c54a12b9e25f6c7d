"""Parsing what the two roles write: by hand, and on arbitrary text."""

import random
import time

import pytest
import torch
from checkpoints import CONTROL, noise_image
from conftest import THOROUGH
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import reasoner
from model.vlm import VLM
from questioner import INSTRUCTION, KINDS, Question, parse_question, question_logps
from reasoner import extract_answer
from rewards import same_answer
from training.images import load_image
from training.scenes import draw_scenes, sample_scene

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
    question = Question("numerical", "How many?", "3")
    assert parse_question("<think>hm, <b>two</b>?</think>\n\n" + GOOD + "\n") == question
    assert parse_question("I look.\n</think>\n\n" + GOOD) == question, (
        "the template opened the thought"
    )
    assert parse_question(GOOD.replace("\\boxed{3}", "3")) == question, "a box is not demanded"
    assert parse_question(GOOD.replace("\\boxed{3}", "It is \\boxed{3}.")) == question
    assert parse_question(GOOD.replace("\\boxed{3}", "\nthree cats ")).answer == "three cats"
    assert parse_question(GOOD.replace("How many?", "有几辆？")).text == "有几辆？"
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
        GOOD.replace("\\boxed{3}", " "),
        GOOD.replace("\\boxed{3}", "\\boxed{}"),
        "I look. <think>" + GOOD,
        "I look. </think> Now <think> again " + GOOD,
        "a</think>b</think>" + GOOD,
        GOOD + "</think>",
        GOOD + "<think>",
        GOOD + " <think> and much more, <question>another one",
        GOOD.replace("</question>", "</question> <think>"),
        GOOD.replace("</answer>", ""),
        GOOD.replace("<type>numerical</type>", ""),
        GOOD.replace("How many?", "How <answer>many?"),
        GOOD.replace("How many?", "How <question>many?"),
        GOOD.replace("How many?", "How </answer> many?"),
        GOOD.replace("How many?", "How <type>many?"),
        GOOD.replace("How many?", "How <think>many?"),
        "<think>never closed " + GOOD,
        "<think>a</think><think>b</think>" + GOOD,
        "<question>How many?</question><type>numerical</type><answer>\\boxed{3}</answer>",
        "",
    ],
)
def test_an_invalid_question(text):
    assert parse_question(text) is None


TAGS = [
    "<type>",
    "</type>",
    "<question>",
    "</question>",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "numerical",
]
BRACES = ["\\boxed{", "\\boxed", "\\", "{", "}", "\\{", "\\}", "\\frac{", "\\text{", "\\left", "$"]
NUMBERS = [
    "1e999999",
    "9**9**9",
    "1,",
    "0.",
    "/",
    "%",
    "-",
    "1" * 30,
    "½",
    "²",
    "\uff11",
    "()",
    "__import__('os')",
]
OTHERS = [
    " ",
    "\n",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\ufdfa",
    "a" * 30 + "!",
    "(a+)+$",
    "<|im_start|>",
    "<|image_pad|>",
]
PIECE = st.one_of(st.sampled_from(TAGS + BRACES + NUMBERS + OTHERS), st.text(max_size=20))
RUNS = st.lists(st.tuples(PIECE, st.one_of(st.integers(1, 4), st.integers(1, 10_000))), max_size=8)
LONGEST = 10_000
# 5 ms on two quiet cores; other machines are slower, and a quadratic parser takes seconds
AT_MOST = 0.015
TEXTS = st.one_of(
    st.text(),
    RUNS.map(lambda runs: "".join((piece * times)[:LONGEST] for piece, times in runs)[:LONGEST]),
)


def quickest(function, *args):
    """What it returns, and the seconds of the quickest of up to five calls: other processes disturb some."""
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        result = function(*args)
        best = min(best, time.process_time() - start)
        if best < AT_MOST:
            break
    return result, best


@settings(
    max_examples=10_000 if THOROUGH else 500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(TEXTS, st.sampled_from(["", "<type>numerical</type><question>", "\\boxed{"]), TEXTS)
@example("<type>" * 50, "", "")
def test_any_output_is_parsed_or_refused_at_once(text, before, other):
    """No exception, no evaluation, and within milliseconds for 10,000 characters."""
    text = (before + text)[:LONGEST]
    question, seconds = quickest(parse_question, text)
    assert seconds < AT_MOST
    if question is not None:
        assert question.kind in KINDS and question.text.strip() and question.answer.strip()
        blocks = (
            f"<type>{question.kind}</type><question>{question.text}</question><answer>3</answer>"
        )
        assert parse_question(blocks) == Question(question.kind, question.text, "3")
    answer, seconds = quickest(extract_answer, text)
    assert seconds < AT_MOST and (answer is None or (answer.strip() and answer in text))
    for a, b in (
        (text, other),
        (text[:400], other[:400]),
    ):  # longer answers are compared as they stand
        same, seconds = quickest(same_answer, a, b)
        assert seconds < 2 * AT_MOST, "two texts are read"
        assert same == same_answer(b, a) and same_answer(a, a)


@pytest.mark.parametrize("piece", TAGS + BRACES + NUMBERS + OTHERS + ["<type></type>"])
def test_parsing_takes_linear_time(piece):
    """A quadratic parser would take minutes on a megabyte."""
    text, start = piece * (1_000_000 // len(piece)), time.process_time()
    assert (
        parse_question(text) is None
        and parse_question("<type>numerical</type><question>" + text) is None
    )
    assert extract_answer(text) is None and not same_answer(text, "1") and same_answer(text, text)
    assert extract_answer("\\boxed{" + text[:100_000]) is None or "}" in piece
    assert time.process_time() - start < 3


CONTROL_PIECE = st.sampled_from(
    [
        *CONTROL,
        "<|im_",
        "start|>",
        "<|",
        "|>",
        "\n",
        "assistant",
        "user",
        "\x01user text\x01",
        "How many?",
    ]
)


@settings(deadline=None)
@given(st.lists(CONTROL_PIECE, max_size=12).map("".join))
def test_a_question_cannot_forge_a_turn_or_an_image(random_vlm, text):
    """Whatever a question says, a Reasoner's prompt has the control tokens of its template and no others."""
    image = random_vlm.patches(noise_image(60, 60))
    control = set(random_vlm.tokenizer.convert_tokens_to_ids(CONTROL))
    prompts = [reasoner.answer_prompt(random_vlm, image, question) for question in (text, "x")]
    forged, harmless = ([i for i in prompt.ids.tolist() if i in control] for prompt in prompts)
    assert forged == harmless
    start = int(prompts[1].places[0])
    first = prompts[1].ids.tolist().index(random_vlm.tokenizer("x")["input_ids"][0], start)
    assert torch.equal(prompts[0].ids[:first], prompts[1].ids[:first]), (
        "what stands before the question is untouched"
    )
    assert text in random_vlm.tokenizer.decode(prompts[0].ids), (
        "and nothing of the question is lost"
    )


# ---- How likely a question is ------------------------------------------------------------------------------


def test_the_log_probabilities_of_a_question_are_those_of_its_text(published):
    """Against `logprobs` of the whole output, cut by hand where encoding the parts gives the same tokens."""
    vlm = VLM.load(published, "cpu", torch.float32)
    image = noise_image(56, 56)
    asked = [
        (image, "numerical", text) for text in ("How many cats?", "多少只猫？", "a", "?<|im_end|>")
    ]
    found = question_logps(vlm, asked)
    for (_, kind, text), logps in zip(asked, found):
        start, ids = f"<type>{kind}</type><question>", {}
        for name, part in dict(
            start=start, both=start + text, all=f"{start}{text}</question>"
        ).items():
            encoded = vlm.tokenizer(part, add_special_tokens=False, split_special_tokens=True)
            ids[name] = encoded["input_ids"]
        (whole,) = vlm.logprobs(vlm.prompt(INSTRUCTION, image), [ids["all"]])
        common = [a == b for a, b in zip(ids["start"], ids["all"])]
        first = common.index(False) if False in common else len(common)
        assert 1 <= len(logps) <= len(ids["all"]) - first + 1
        if ids["all"][: len(ids["both"])] == ids["both"] and first == len(ids["start"]):
            torch.testing.assert_close(logps, whole[first : len(ids["both"])], atol=1e-5, rtol=1e-5)
    assert not set(vlm.end_ids) & set(
        vlm.tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]
    ), "a control token in a text is plain characters"


def test_a_question_that_the_base_never_asks_is_unlikely(toy, tmp_path):
    """The toy's base asks of six kinds; a broken sentence has one token that it would not write."""
    rng = random.Random(0)
    [path] = draw_scenes(tmp_path, [sample_scene(rng, held_out=False)], rng, 84)
    image = load_image(str(path))
    texts = ["How many red discs are there?", "How many shapes are there?", "How shapes are there?"]
    usual, general, broken = (
        float(logps.sort().values[:2].mean())
        for logps in question_logps(toy, [(image, "numerical", text) for text in texts])
    )
    assert broken < min(usual, general) - 2

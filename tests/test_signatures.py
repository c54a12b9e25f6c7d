"""The failure signatures: numbers by hand, and that each fires on its own failure and on nothing else."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from measure import signatures


def test_distinct_n_by_hand():
    assert signatures.distinct_n(["a b c", "a b d"]) == 3 / 4, "ab, bc, ab, bd"
    assert signatures.distinct_n(["a b c", "a b d"], 1) == 4 / 6
    assert signatures.distinct_n(["a", ""]) == 0.0 and signatures.distinct_n([]) == 0.0
    assert signatures.distinct_n(["红车", "红车。"]) == 2 / 3, (
        "红车 twice, 车。; characters, as there are no spaces"
    )
    assert signatures.distinct_n(["赤い車"] * 4) == 2 / 8


def test_entropy_by_hand():
    assert (
        signatures.entropy(["a", "b"]) == 1.0
        and signatures.entropy(["a"] * 9) == 0.0
        and signatures.entropy([]) == 0.0
    )
    assert signatures.entropy(["a", "a", "b", "c"]) == 1.5


@given(st.lists(st.sampled_from("abcd"), min_size=1))
def test_entropy_is_between_none_and_uniform(labels):
    assert 0 <= signatures.entropy(labels) <= math.log2(len(set(labels))) + 1e-12


def test_variety_by_hand():
    same, other = "How many red discs are there in it ?", "What stands left of the old house ?"
    found = signatures.variety([same, same, same, other], ["numerical"] * 3 + ["regression"])
    assert (found["all_clusters"], found["largest_cluster"]) == (2, 0.75)
    assert (
        found["kind_entropy"] == pytest.approx(0.8113, abs=1e-4) and found["distinct_2"] == 15 / 31
    )
    assert signatures.variety([], []) == dict(
        variety_of=0, distinct_2=0.0, all_clusters=0, largest_cluster=0.0, kind_entropy=0.0
    )


def test_collapse_shows_in_scripts_without_spaces():
    varied = ["图中有几辆红色的车？", "左边的狗在做什么？", "天空是什么颜色？", "谁站在门口等人？"]
    first = signatures.variety(varied, ["numerical"] * 4)
    now = signatures.variety([varied[0], varied[0][:-1]] * 2, ["numerical"] * 4)
    assert (first["all_clusters"], now["all_clusters"]) == (4, 1)
    assert "one cluster holds 1.00" in signatures.question_collapse(first, now)


def test_many_questions_are_thinned_evenly():
    questions, kinds = [f"q{i} w{i}" for i in range(1000)], ["numerical"] * 1000
    assert signatures.variety(questions, kinds)["all_clusters"] == signatures.SAMPLE
    half = ["one two three four five"] * 500 + ["six seven eight nine ten"] * 500
    assert signatures.variety(half, kinds)["largest_cluster"] == 0.5


def test_more_questions_of_the_same_kind_are_no_less_varied():
    """distinct_2 of all falls with their number; so it is of a sample, and only equal samples are
    compared."""
    rng = random.Random(0)
    ask = lambda: f"How many {rng.choice('abcdefgh')} {rng.choice('stuvwxyz')} are there?"  # noqa: E731
    questions = [ask() for _ in range(640)]
    found = [signatures.variety(questions[:n], ["numerical"] * n) for n in (10, 64, 640)]
    assert found[2]["distinct_2"] > 0.7 * found[1]["distinct_2"]
    assert found[1]["distinct_2"] < 0.5 * found[0]["distinct_2"], (
        "of different numbers they are not the same"
    )
    assert all(signatures.question_collapse(found[0], now) is None for now in found)
    nothing = signatures.variety([], [])
    assert signatures.question_collapse(nothing, nothing) is None, (
        "no question at all is no repetition"
    )


FIRST = dict(variety_of=64, distinct_2=0.4, kind_entropy=1.2, largest_cluster=0.2)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, None),
        (dict(distinct_2=0.21, kind_entropy=0.25, largest_cluster=0.5), None),
        (dict(distinct_2=0.19), "distinct_2 is 0.19, at first 0.40"),
        (dict(kind_entropy=0.2), "kind_entropy is 0.20"),
        (dict(largest_cluster=0.7), "one cluster holds 0.70"),
    ],
)
def test_question_collapse(changed, said):
    message = signatures.question_collapse(FIRST, FIRST | changed)
    assert message is None if said is None else said in message and "--diversity-weight" in message


def test_a_collapse_is_seen_although_some_outputs_were_invalid():
    """Samples of 64 outputs, some of them not valid, hardly differ in size."""
    collapsed = FIRST | dict(distinct_2=0.01, kind_entropy=0.0, largest_cluster=1.0)
    for first, now in ((64, 63), (63, 64), (50, 64)):
        message = signatures.question_collapse(
            FIRST | dict(variety_of=first), collapsed | dict(variety_of=now)
        )
        assert message and message.count(";") == 2
    for first, now in ((64, 20), (20, 64), (0, 64), (64, 0)):
        assert (
            signatures.question_collapse(
                FIRST | dict(variety_of=first), collapsed | dict(variety_of=now)
            )
            is None
        )


def test_a_cluster_that_was_always_large_is_no_collapse():
    assert (
        signatures.question_collapse(
            FIRST | dict(largest_cluster=0.45), FIRST | dict(largest_cluster=0.8)
        )
        is None
    )


def test_stagnant_difficulty():
    assert "0.500 -> 0.500" in signatures.stagnant_difficulty([0.5] * 6)
    assert "--questioner-steps" in signatures.stagnant_difficulty([0.6, 0.6, 0.9, 0.9, 0.5, 0.5])
    assert signatures.stagnant_difficulty([0.5, 0.5, 0.1, 0.1, 0.6, 0.58]) is None
    # By hand: thirds 0.5 -+ 0.1 and 0.6 -+ 0.1, each 0.02 / 1 of variance: an error of 0.1414.
    told = signatures.stagnant_difficulty([0.4, 0.6, 0, 0, 0.5, 0.7])
    assert "0.500 -> 0.600 over the phase, no rise beyond chance" in told, "0.1 is 0.7 errors"
    assert signatures.stagnant_difficulty([0.4, 0.6, 0, 0, 0.62, 0.82]) is None, "0.22 is 1.56"
    assert signatures.stagnant_difficulty([0.9, 0.5, 0.4, 0.1, 0.1]) is None, "too few steps to say"


def test_language_drift():
    assert signatures.language_drift(None, 50) is signatures.language_drift(0.3, 50) is None
    assert signatures.language_drift(1.0, 9) is None, "too few to say"
    assert "0.51 of the curated questions" in signatures.language_drift(0.51, 50)

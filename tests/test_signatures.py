"""The failure signatures: numbers by hand, and that each fires on its own failure and on nothing else."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import signatures


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
    assert found["kind_entropy"] == pytest.approx(0.8113, abs=1e-4) and found["distinct_2"] == 15 / 31
    assert signatures.variety([], []) == dict(
        distinct_2=0.0, all_clusters=0, largest_cluster=0.0, kind_entropy=0.0
    )


def test_collapse_shows_in_scripts_without_spaces():
    varied = ["图中有几辆红色的车？", "左边的狗在做什么？", "天空是什么颜色？", "谁站在门口等人？"]
    first = signatures.variety(varied, ["numerical"] * 4)
    now = signatures.variety([varied[0], varied[0][:-1]] * 10, ["numerical"] * 20)
    assert (first["all_clusters"], now["all_clusters"]) == (4, 1)
    assert "one cluster holds 1.00" in signatures.question_collapse(first, now)


def test_many_questions_are_thinned_evenly():
    questions = [f"q{i} w{i}" for i in range(1000)]
    assert signatures.variety(questions, [])["all_clusters"] == signatures.CLUSTERED
    half = ["one two three four five"] * 500 + ["six seven eight nine ten"] * 500
    assert signatures.variety(half, [])["largest_cluster"] == 0.5


FIRST = dict(distinct_2=0.4, kind_entropy=1.2, largest_cluster=0.2)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, None),
        (dict(distinct_2=0.21, kind_entropy=0.61, largest_cluster=0.5), None),
        (dict(distinct_2=0.19), "distinct_2 is 0.19, at first 0.40"),
        (dict(kind_entropy=0.5), "kind_entropy is 0.50"),
        (dict(largest_cluster=0.7), "one cluster holds 0.70"),
    ],
)
def test_question_collapse(changed, said):
    message = signatures.question_collapse(FIRST, FIRST | changed)
    assert message is None if said is None else said in message and "--diversity-weight" in message


def test_a_cluster_that_was_always_large_is_no_collapse():
    assert (
        signatures.question_collapse(FIRST | dict(largest_cluster=0.45), FIRST | dict(largest_cluster=0.8))
        is None
    )


def record(confidence, silver, agreement=None):
    return dict(confidence=confidence, silver_accuracy=silver, base_agreement=agreement)


@pytest.mark.parametrize(
    "before, now, said",
    [
        (record(0.6, 0.9), record(0.7, 0.8), "right in 0.80, before in 0.90, with confidence 0.60 -> 0.70"),
        (record(0.6, 0.9), record(0.7, 0.86), None),
        (record(0.6, 0.9), record(0.5, 0.7), None),  # less sure as well: honest
        (record(0.6, 0.9, 0.9), record(0.7, 0.9, 0.1), None),  # the truth is known and decides
        (record(0.6, None, 0.9), record(0.7, None, 0.5), "the base's answer to 0.50"),
        (record(0.6, None, 0.9), record(0.7, None, 0.7), None),
        (record(0.6, None, None), record(0.7, None, None), None),
        (record(0.6, 0.9, 0.9), record(0.7, None, 0.5), "the base's answer"),
        (
            dict(confidence=0.6, base_agreement=0.9),
            dict(confidence=0.6, base_agreement=0.5),
            "the base's answer",
        ),  # your own images
    ],
)
def test_label_drift(before, now, said):
    message = signatures.label_drift(before, now)
    assert message is None if said is None else said in message and "--answers" in message


def test_stagnant_difficulty():
    assert "0.500 -> 0.500" in signatures.stagnant_difficulty([0.5] * 6)
    assert "--questioner-steps" in signatures.stagnant_difficulty([0.6, 0.6, 0.9, 0.9, 0.5, 0.5])
    assert signatures.stagnant_difficulty([0.5, 0.5, 0.1, 0.1, 0.6, 0.5]) is None
    assert signatures.stagnant_difficulty([0.9, 0.5, 0.4, 0.1, 0.1]) is None, "too few steps to say"

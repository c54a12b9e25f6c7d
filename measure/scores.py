"""Scores of outcomes: means, calibration, intervals, paired tests, and the metrics of single benchmarks."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from measure.items import Item, find_choices
from measure.outcomes import MEANS, Outcome

BINS = 10


def mean_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The means of MEANS, and `ece`."""
    means = {name: sum(o.values[name] for o in outcomes) / len(outcomes) for name in MEANS}
    bins = reliability(outcomes)
    return means | {"ece": sum(b["share"] * abs(b["right"] - b["confidence"]) for b in bins)}


def reliability(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Per bin of confidence that is not empty: its bounds (the upper one belongs to it), the share of
    questions in it, their mean confidence, and how many of their majorities are right."""
    bins: dict[int, list[dict]] = {}
    for values in (outcome.values for outcome in outcomes):
        bins.setdefault(max(0, math.ceil(round(values["confidence"] * BINS, 9)) - 1), []).append(values)
    table = []
    for number, members in sorted(bins.items()):
        sure, right = (
            sum(v[name] for v in members) / len(members) for name in ("confidence", "majority_accuracy")
        )
        bounds = dict(above=number / BINS, upto=(number + 1) / BINS)
        table.append(bounds | dict(share=len(members) / len(outcomes), confidence=sure, right=right))
    return table


def compare(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, dict]:
    """How much better the second model is than the first on the same questions: the difference of each mean
    with its interval, and for right-or-wrong answers McNemar's p."""
    result, images = {}, [outcome.item.image_set for outcome in first]
    for name in MEANS:
        a, b = ([outcome.values[name] for outcome in outcomes] for outcomes in (first, second))
        difference = [y - x for x, y in zip(a, b)]
        mean, interval = sum(difference) / len(difference), bootstrap(difference, images)
        result[name] = dict(difference=mean, interval=interval)
        if name in ("greedy_accuracy", "majority_accuracy"):
            result[name]["p"] = mcnemar([bool(x) for x in b], [bool(x) for x in a])
    return result


def pair_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """HallusionBench's scores of greedy answers (arXiv 2310.14566): aAcc of all questions; qAcc of questions
    that are right for each of their figures; fAcc of figures all of whose questions are right. {} without all
    ids."""
    if not outcomes or not all(o.item.question_id and o.item.figure_id for o in outcomes):
        return {}

    def all_right(key: Callable[[Item], str]) -> float:
        groups: dict[str, bool] = {}
        for o in outcomes:
            groups[key(o.item)] = groups.get(key(o.item), True) and o.greedy_right
        return sum(groups.values()) / len(groups)

    a_acc = sum(o.greedy_right for o in outcomes) / len(outcomes)
    q_acc, f_acc = all_right(lambda item: item.question_id), all_right(lambda item: item.figure_id)
    return dict(aAcc=a_acc, qAcc=q_acc, fAcc=f_acc)


def we_math(groups: Sequence[tuple[Sequence[bool], bool]]) -> dict[str, float]:
    """We-Math's metric (arXiv 2407.01284). A group: which of a problem's steps are right, and whether the
    whole problem is.

    Shares of the groups: IK (insufficient knowledge: a step and the whole are wrong), IG (inadequate
    generalisation: every step is right, the whole wrong), CM (complete mastery: all right), RM (rote memory:
    the whole is right without the steps). Strictly one wrong step makes it RM, loosely only all steps wrong.
    RM_rate is RM / (CM + RM), score is 1 - IG / 2 - IK - RM. {} without a group.
    """
    result = {}
    for how, known in (("strict", all), ("loose", any)) if groups else ():
        ways = [
            ("CM" if known(steps) else "RM") if whole else ("IG" if all(steps) else "IK")
            for steps, whole in groups
        ]
        share = {way: ways.count(way) / len(groups) for way in ("IK", "IG", "CM", "RM")}
        solved = share["CM"] + share["RM"]
        share["RM_rate"] = share["RM"] / solved if solved else 0.0
        share["score"] = 1 - share["IG"] / 2 - share["IK"] - share["RM"]
        result |= {f"{way} {how}": value for way, value in share.items()}
    return result


def we_math_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """`we_math` of greedy answers, where each kind is We-Math's key ("2steps_1", "2steps_multi") and each
    question_id names the problem. Problems without all their parts are left out. {} of other data."""
    problems: dict[tuple[str, str], dict[str, bool]] = {}
    for o in outcomes:
        key = re.fullmatch(r"([23])steps_([123]|multi)", o.item.kind)
        if not key or not o.item.question_id:
            return {}
        problems.setdefault((key[1], o.item.question_id), {})[key[2]] = o.greedy_right
    whole = [p for (steps, _), p in problems.items() if "multi" in p and len(p) == int(steps) + 1]
    return we_math([([right for part, right in p.items() if part != "multi"], p["multi"]) for p in whole])


def judge_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of the free-form questions with a clear verdict: their share of all, and how often it disagrees with
    the rules. Of these and those without an answer, which are wrong: how many the judge calls right."""
    judged = [o for o in outcomes if o.judged is not None]
    unanswered = [o for o in outcomes if o.greedy is None and not find_choices(o.item)]
    result = dict(judged=len(judged) / len(outcomes))
    if judged or unanswered:
        result["judged_right"] = sum(o.judged for o in judged) / len(judged + unanswered)
    if judged:
        result["judge_disagreement"] = sum(o.judged != o.greedy_right for o in judged) / len(judged)
    return result


def full_report(outcomes: Sequence[Outcome]) -> dict:
    """All scores, overall and per kind, with intervals."""
    report = {}
    for kind in ["all", *sorted({o.item.kind for o in outcomes} - {""})]:
        some = [o for o in outcomes if kind in ("all", o.item.kind)]
        images = [o.item.image_set for o in some]
        intervals = {name: bootstrap([o.values[name] for o in some], images) for name in MEANS}
        report[kind] = dict(questions=len(some), **mean_scores(some), intervals=intervals)
    return dict(
        scores=report, reliability=reliability(outcomes), **pair_scores(outcomes), **we_math_scores(outcomes)
    )


RESAMPLES = 2000  # of the bootstrap


def bootstrap(values: Sequence[float], images: Sequence[str] = (), seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean: images are drawn anew, with replacement and with all their questions,
    RESAMPLES times.

    images: that of each value; by default, and if all are about one image, each value is drawn by itself.
    Questions about one image are not independent: drawn one by one, they make the interval too narrow.
    """
    number: dict = {}
    keys = images if len(set(images)) > 1 else range(len(values))
    groups = [number.setdefault(key, len(number)) for key in keys]
    sums, sizes = np.bincount(groups, values), np.bincount(groups)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(RESAMPLES))
    low, high = np.quantile([sums[i].sum() / sizes[i].sum() for i in draws], [0.025, 0.975])
    return float(low), float(high)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """McNemar's exact test (two-sided p): of the questions that only one model gets right, is it a fair coin
    which?"""
    only_ours = sum(a and not b for a, b in zip(ours, theirs))
    only_theirs = sum(b and not a for a, b in zip(ours, theirs))
    n, k = only_ours + only_theirs, min(only_ours, only_theirs)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)

"""Scores of outcomes: means, calibration, intervals, paired tests, and the metrics of single benchmarks."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from measure.items import find_choices
from measure.outcomes import MEANS, Outcome

BINS = 10  # of confidence
RESAMPLES = 2000  # of the bootstrap


def full_report(outcomes: Sequence[Outcome]) -> dict:
    """Returns all scores, overall and per kind, with 95% intervals."""
    kinds = {outcome.item.kind for outcome in outcomes} - {""}
    scores = {"all": _score(outcomes)}
    for kind in sorted(kinds):
        scores[kind] = _score([outcome for outcome in outcomes if outcome.item.kind == kind])
    report = dict(scores=scores, reliability=reliability(outcomes))
    return report | pair_scores(outcomes) | we_math_scores(outcomes)


def _score(outcomes: Sequence[Outcome]) -> dict:
    """Returns the number of questions, their mean scores, and the intervals of the means."""
    images = [outcome.item.image_set for outcome in outcomes]
    scores = dict(questions=len(outcomes)) | mean_scores(outcomes)
    scores["intervals"] = {}
    for name in MEANS:
        values = [outcome.values[name] for outcome in outcomes]
        scores["intervals"][name] = bootstrap(values, images)
    return scores


def mean_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Returns the means of MEANS, and `ece`: sum_b n_b / N |right_b - confidence_b| over the bins b."""
    scores = {name: fmean(o.values[name] for o in outcomes) for name in MEANS}
    scores["ece"] = 0.0
    for row in reliability(outcomes):
        scores["ece"] += row["share"] * abs(row["right"] - row["confidence"])
    return scores


def reliability(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Returns a row for each bin of confidence that is not empty.

        dict(above=0.7, upto=0.8, share=0.25, confidence=0.78, right=0.6)

    The upper bound belongs to the bin, and 0 to the first one. share: of all questions. confidence: the mean
    in the bin. right: the share of its majorities that are right.
    """
    bins = defaultdict(list)
    for outcome in outcomes:
        place = round(outcome.values["confidence"] * BINS, 9)  # 0.7 * 10 is 7.000000000000001
        upper = max(1, math.ceil(place))
        bins[upper].append(outcome.values)
    rows = []
    for upper, members in sorted(bins.items()):
        row = dict(
            above=(upper - 1) / BINS,
            upto=upper / BINS,
            share=len(members) / len(outcomes),
            confidence=fmean(values["confidence"] for values in members),
            right=fmean(values["majority_accuracy"] for values in members),
        )
        rows.append(row)
    return rows


def judge_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Returns the shares that describe the judge's verdicts on free-form questions.

    judged: questions with a clear verdict, of all. judged_right: how many of these and of those without an
    answer, which are wrong, it calls right. judge_disagreement: how many verdicts differ from the rules.
    """
    judged = [o for o in outcomes if o.judged is not None]
    unanswered = [o for o in outcomes if o.greedy is None and not find_choices(o.item)]
    scores = dict(judged=len(judged) / len(outcomes))
    if judged or unanswered:
        scores["judged_right"] = sum(o.judged for o in judged) / len(judged + unanswered)
    if judged:
        scores["judge_disagreement"] = fmean(o.judged != o.greedy_right for o in judged)
    return scores


# ---- Two models, and chance ----


def compare(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, dict]:
    """Compares a second model with a first one on the same questions.

    Returns for each of MEANS the difference, positive if the second is better, with its 95% interval, and for
    answers that are right or wrong McNemar's p.
    """
    images = [outcome.item.image_set for outcome in first]
    result = {}
    for name in MEANS:
        differences = [b.values[name] - a.values[name] for a, b in zip(first, second)]
        interval = bootstrap(differences, images)
        result[name] = dict(difference=fmean(differences), interval=interval)
        if name in ("greedy_accuracy", "majority_accuracy"):
            result[name]["p"] = mcnemar(differences)
    return result


def bootstrap(values: Sequence[float], images: Sequence[str] = ()) -> tuple[float, float]:
    """Returns the 95% interval of the mean, by the bootstrap over images.

    Images are drawn anew RESAMPLES times, with replacement and with all their questions: questions about one
    image are not independent, and drawn one by one they would make the interval too narrow.

    images: that of each value. By default, and if all are about one image, each value is drawn by itself.
    """
    keys = images if len(set(images)) > 1 else range(len(values))
    numbers: dict = {}  # of the images, in order of appearance
    groups = [numbers.setdefault(key, len(numbers)) for key in keys]
    sums = np.bincount(groups, values)
    sizes = np.bincount(groups)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(differences: Sequence[float]) -> float:
    """Returns the two-sided p of McNemar's exact test.

    differences: of each question 1 if only our model is right, -1 if only the other one is, else 0.

    Of the n questions that only one model gets right, k are the rarer model's. If a fair coin decided which:

        p = 2 sum_{i <= k} C(n, i) / 2^n
    """
    only_ours = sum(difference > 0 for difference in differences)
    only_theirs = sum(difference < 0 for difference in differences)
    n = only_ours + only_theirs
    k = min(only_ours, only_theirs)
    as_extreme = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * as_extreme / 2**n)


# ---- Single benchmarks ----


def pair_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Returns HallusionBench's scores of greedy answers (arXiv 2310.14566), {} unless all have both ids.

    aAcc: share of right answers. qAcc: share of questions that are right for each of their figures. fAcc:
    share of figures all of whose questions are right.
    """
    by_question = defaultdict(list)
    by_figure = defaultdict(list)
    for outcome in outcomes:
        item = outcome.item
        if not item.question_id or not item.figure_id:
            return {}
        by_question[item.question_id].append(outcome.greedy_right)
        by_figure[item.figure_id].append(outcome.greedy_right)
    if not outcomes:
        return {}
    return dict(
        aAcc=fmean(o.greedy_right for o in outcomes),
        qAcc=fmean(map(all, by_question.values())),
        fAcc=fmean(map(all, by_figure.values())),
    )


def we_math_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Returns `we_math` of greedy answers, {} of other data.

    Each kind is We-Math's key ("2steps_1", "2steps_multi"), each question_id names the problem. Problems
    without all their parts are left out.
    """
    problems = defaultdict(dict)
    for outcome in outcomes:
        key = re.fullmatch(r"([23])steps_([123]|multi)", outcome.item.kind)
        if not key or not outcome.item.question_id:
            return {}
        steps, part = key.groups()
        problems[steps, outcome.item.question_id][part] = outcome.greedy_right
    groups = []
    for (steps, _), parts in problems.items():
        if "multi" in parts and len(parts) == int(steps) + 1:
            whole = parts.pop("multi")
            groups.append((list(parts.values()), whole))
    return we_math(groups)


def we_math(groups: Sequence[tuple[Sequence[bool], bool]]) -> dict[str, float]:
    """Returns We-Math's metric (arXiv 2407.01284), strict and loose; {} without a group.

    A group: which of a problem's steps are right, and whether the whole problem is. Shares of the groups:

        IK   insufficient knowledge        a step and the whole are wrong
        IG   inadequate generalisation     every step is right, the whole wrong
        CM   complete mastery              all right
        RM   rote memory                   the whole is right without the steps

    Strictly one wrong step makes it RM, loosely only all steps wrong. RM_rate is RM / (CM + RM), score is
    1 - IG / 2 - IK - RM.
    """
    if not groups:
        return {}
    result = {}
    for how, known in (("strict", all), ("loose", any)):
        ways = Counter()
        for steps, whole in groups:
            if whole:
                ways["CM" if known(steps) else "RM"] += 1
            else:
                ways["IG" if all(steps) else "IK"] += 1
        ik, ig, cm, rm = (ways[way] / len(groups) for way in ("IK", "IG", "CM", "RM"))
        result |= {
            f"IK {how}": ik,
            f"IG {how}": ig,
            f"CM {how}": cm,
            f"RM {how}": rm,
            f"RM_rate {how}": rm / (cm + rm) if cm + rm else 0.0,
            f"score {how}": 1 - ig / 2 - ik - rm,
        }
    return result

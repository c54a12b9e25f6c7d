"""The paper's failure signatures (VisPlay, section 5), watched in a run: self-play that only looks well.

    question collapse       the Questioner repeats what is rewarded: few different n-grams, one large BLEU
                            cluster, one kind
    pseudo-label drift      the Reasoner grows surer while its majority is right less often: it learns its own
                            mistakes
    stagnant difficulty     r_unc does not rise by more than chance over a Questioner phase: the Questioner no
                            longer follows the Reasoner

The first functions measure, the last three judge, and each of those gives a sentence with the number, what it
means and the flag to turn, or None. The paper gives no limits: these were set on runs of the toy, where it
is known what had really happened (notebook 06, section g, counts hits and false alarms).
"""

import math
from collections import Counter
from collections.abc import Sequence

from nltk.util import ngrams

from rewards import cluster_questions, words

SAMPLE = 64  # so many questions at most are looked at: the numbers depend on how many they are of
FELL = dict(distinct_2=0.5, kind_entropy=0.2)  # of its first value: how far variety may fall
LARGEST = 0.5  # share of all questions that one cluster may have, and twice what it had at first
RISE = 1.5  # standard errors that r_unc has to rise by in a phase


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """The share of different n-grams among all n-grams of all texts (distinct-n, arXiv 1510.03055), or 0."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def entropy(labels: Sequence[str]) -> float:
    """The entropy of the labels' distribution, in bits; 0 if all are the same, or none."""
    counts = Counter(labels).values()
    return -sum(count / len(labels) * math.log2(count / len(labels)) for count in counts) + 0.0


def variety(questions: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """How different questions are, over all images, in a sample of `variety_of` of them, at most SAMPLE.

    distinct_2, the number of BLEU clusters, the share of the largest one, and the entropy of the kinds in
    bits. The sample is spread evenly.
    """
    size = min(SAMPLE, len(questions))
    chosen = [i * len(questions) // size for i in range(size)]
    some, sizes = [questions[i] for i in chosen], Counter()
    if some:
        sizes = Counter(cluster_questions(some))
    return dict(
        variety_of=size,
        distinct_2=distinct_n(some),
        all_clusters=len(sizes),
        largest_cluster=max(sizes.values(), default=0) / max(1, size),
        kind_entropy=entropy([kinds[i] for i in chosen]),
    )


def question_collapse(first: dict, now: dict) -> str | None:
    """first, now: `variety` at the first Questioner step of the run and at the last one so far.

    Silent if their samples differ by more than a quarter in size, on which these numbers depend.
    """
    signs, (fewer, more) = [], sorted((first["variety_of"], now["variety_of"]))
    if fewer < 0.75 * more or not more:
        return None
    for name, share in FELL.items():
        if now[name] < share * first[name]:
            signs.append(f"{name} is {now[name]:.2f}, at first {first[name]:.2f}")
    if now["largest_cluster"] > max(LARGEST, 2 * first["largest_cluster"]):
        share, was = now["largest_cluster"], first["largest_cluster"]
        signs.append(f"one cluster holds {share:.2f} of the questions, at first {was:.2f}")
    if not signs:
        return None
    advice = "try a higher --diversity-weight or fewer --questioner-steps"
    return f"{'; '.join(signs)}. The Questioner repeats what is rewarded: {advice}"


def label_drift(before: Sequence[float], now: Sequence[float], surer: bool, what: str) -> str | None:
    """On fixed questions, one by one: how good the majorities were, and are.

    before, now: where the truth is known 1 for a right majority, after the iteration before and after this
    one; elsewhere 1 for the base's own majority, of the base asked a second time and of the Reasoner now.
    surer: whether its majorities are as large as before. Drift is a fall whose 95% interval excludes 0.
    """
    differences = [b - a for a, b in zip(before, now, strict=True)]
    if len(differences) < 10 or not surer:
        return None
    fell = sum(differences) / len(differences)
    error = math.sqrt(sum((d - fell) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
    if fell + 1.96 * error >= 0:
        return None
    numbers = (
        f"{what} {sum(before) / len(before):.2f} -> {sum(now) / len(now):.2f} on {len(now)} fixed questions"
    )
    advice = "try a narrower band (--tau-low, --tau-high), more --answers or fewer --reasoner-steps"
    return f"{numbers}, as sure as before. The Reasoner learns its own mistakes: {advice}"


def stagnant_difficulty(r_unc: Sequence[float]) -> str | None:
    """r_unc: of each step of a phase. Compares the means of its first and last third, of 6 steps or more.

    The standard error of their difference is that of the steps within each third.
    """
    third = len(r_unc) // 3
    if third < 2:
        return None
    start, end = sum(r_unc[:third]) / third, sum(r_unc[-third:]) / third
    around = [(r - start) ** 2 for r in r_unc[:third]] + [(r - end) ** 2 for r in r_unc[-third:]]
    error = math.sqrt(sum(around) / (third - 1) / third)
    if end - start > max(RISE * error, 1e-9):
        return None
    advice = "try more --questioner-steps or a lower --beta"
    return f"r_unc {start:.3f} -> {end:.3f} over the phase. The Questioner finds nothing harder: {advice}"

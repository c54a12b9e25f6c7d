"""The paper's failure signatures (VisPlay, section 5) and one more: self-play that only looks well.

    question collapse       the Questioner repeats what is rewarded: few different n-grams, one large BLEU
                            cluster, one kind
    language drift          the base model would hardly ask the curated questions; they may have no answer
    stagnant difficulty     r_unc does not rise by more than chance over a Questioner phase: the Questioner no
                            longer follows the Reasoner

The first functions measure. The last three judge: each returns a sentence with the number, its meaning and
the flag to turn, or None. The paper gives no limits. These were set on runs of the toy, where it is known
what had really happened (notebook 06, section g, counts hits and false alarms).

The paper's third signature, pseudo-label drift, is a curve in the report and no warning: on the toy its rule
told nothing that chance would not (the same section).
"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, variance

from rewards import cluster_questions, ngrams, words

SAMPLE = 64  # the most questions that are looked at: the numbers depend on how many there are
FELL = dict(distinct_2=0.5, kind_entropy=0.2)  # of its first value: how far variety may fall
LARGEST = 0.5  # share of all questions that one cluster may have, and twice what it had at first
ATYPICAL = 0.3  # share of the curated questions that the base may find unlikely
RISE = 1.5  # standard errors that r_unc has to rise by in a phase


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Returns the share of different n-grams among all n-grams of all texts (distinct-n, arXiv 1510.03055).

    Without any n-gram it is 0.
    """
    grams = []
    for text in texts:
        grams += ngrams(words(text), n)
    return len(set(grams)) / len(grams) if grams else 0.0


def entropy(labels: Sequence[str]) -> float:
    """Returns the entropy of the labels' distribution, in bits: 0 if all are the same, or none."""
    bits = 0.0
    for count in Counter(labels).values():
        share = count / len(labels)
        bits -= share * math.log2(share)
    return bits


def variety(questions: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """Measures how different questions are, over all images.

    It looks at a sample of `variety_of` questions, at most SAMPLE, spread evenly. Returns distinct_2, the
    number of BLEU clusters, the share of the largest one, and the entropy of the kinds in bits.
    """
    size = min(SAMPLE, len(questions))
    chosen = [i * len(questions) // size for i in range(size)]
    sample = [questions[i] for i in chosen]
    clusters = Counter(cluster_questions(sample)) if sample else Counter()
    return dict(
        variety_of=size,
        distinct_2=distinct_n(sample),
        all_clusters=len(clusters),
        largest_cluster=max(clusters.values(), default=0) / max(1, size),
        kind_entropy=entropy([kinds[i] for i in chosen]),
    )


def split_thirds(values: Sequence) -> tuple[Sequence, Sequence]:
    """Returns the first and the last third of a phase's values: single steps may fall where the phase rises.

        0.4 0.5 | 0.3 0.6 0.5 | 0.6 0.7     gives     0.4 0.5     and     0.6 0.7

    A third has at least one value.
    """
    size = max(1, len(values) // 3)
    return values[:size], values[-size:]


def question_collapse(first: dict, now: dict) -> str | None:
    """Warns of questions that have become alike. Returns a sentence, or None.

    first, now: `variety` at the first Questioner step of the run and at the last one so far. It is silent if
    their samples differ by more than a quarter in size, on which these numbers depend.
    """
    fewer, more = sorted((first["variety_of"], now["variety_of"]))
    if fewer < 0.75 * more or not more:
        return None
    signs = []
    for name, share in FELL.items():
        if now[name] < share * first[name]:
            signs.append(f"{name} is {now[name]:.2f}, at first {first[name]:.2f}")
    was = first["largest_cluster"]
    share = now["largest_cluster"]
    if share > max(LARGEST, 2 * was):
        signs.append(f"one cluster holds {share:.2f} of the questions, at first {was:.2f}")
    if not signs:
        return None
    advice = "try a higher --diversity-weight or fewer --questioner-steps"
    return f"{'; '.join(signs)}. The Questioner repeats what is rewarded: {advice}"


def language_drift(atypical: float | None, count: int) -> str | None:
    """Warns of questions that the base model would hardly ask. Returns a sentence, or None.

    atypical: the share of the curated questions that the base finds less likely than 98% of its own; None if
        it was not measured.
    count: of the curated questions; of fewer than 10 nothing is said.
    """
    if atypical is None or atypical <= ATYPICAL or count < 10:
        return None
    advice = "read curated/, and try --anchor-beta 0.03 or fewer --questioner-steps"
    numbers = f"{atypical:.2f} of the curated questions are ones that the base would hardly ask"
    return f"{numbers}. They may have no answer: {advice}"


def stagnant_difficulty(r_unc: Sequence[float]) -> str | None:
    """Warns of a phase over which r_unc does not rise. Returns a sentence, or None.

    It compares the means of the first and the last third of at least 6 steps. The standard error of their
    difference comes from the steps within each third. r_unc: of each step of a phase.
    """
    first, last = split_thirds(r_unc)
    if len(first) < 2:
        return None
    start = fmean(first)
    end = fmean(last)
    error = math.sqrt((variance(first) + variance(last)) / len(first))
    if end - start > max(RISE * error, 1e-9):
        return None
    advice = "try more --questioner-steps or a lower --beta"
    numbers = f"r_unc {start:.3f} -> {end:.3f} over the phase, no rise beyond chance"
    return f"{numbers}. The Questioner finds nothing harder: {advice}"

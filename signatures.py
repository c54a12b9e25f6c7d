"""The paper's failure signatures (VisPlay, section 5), watched in a run: self-play that only looks well.

    question collapse       the Questioner repeats what is rewarded: few different n-grams, one large BLEU
                            cluster, one kind
    pseudo-label drift      the Reasoner grows surer while its majority is right less often: it learns its own
                            mistakes
    stagnant difficulty     r_unc does not rise over a Questioner phase: the Questioner no longer follows the
                            Reasoner

The first functions measure, the last three judge, and each of those gives a sentence with the number, what it
means and the flag to turn, or None. The limits are ours; the paper names the signatures and gives none.
"""

import math
from collections import Counter
from collections.abc import Sequence

from nltk.util import ngrams

from rewards import cluster_questions, words

CLUSTERED = 256  # so many questions at most are clustered: the work grows with their square
FELL = 0.5  # of its first value: how far variety may fall
LARGEST = 0.5  # share of all questions that one cluster may have
DRIFT = 0.05  # fall of the share of true labels from one iteration to the next
AGREEMENT = 0.6  # least share of questions on which the Reasoner's majority is still that of the base


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """The share of different n-grams among all n-grams of all texts (distinct-n, arXiv 1510.03055), or 0."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def entropy(labels: Sequence[str]) -> float:
    """The entropy of the labels' distribution, in bits; 0 if all are the same, or none."""
    counts = Counter(labels).values()
    return -sum(count / len(labels) * math.log2(count / len(labels)) for count in counts) + 0.0


def variety(questions: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """How different questions are, over all images: distinct_2, the number of BLEU clusters, the share of the
    largest one, and the entropy of their kinds in bits. Of more than CLUSTERED questions as many are
    clustered, evenly spread."""
    some = (
        [questions[i * len(questions) // CLUSTERED] for i in range(CLUSTERED)]
        if len(questions) > CLUSTERED
        else questions
    )
    sizes = Counter(cluster_questions(some)).values()
    largest = max(sizes) / len(some) if some else 0.0
    return dict(
        distinct_2=distinct_n(some),
        all_clusters=len(sizes),
        largest_cluster=largest,
        kind_entropy=entropy(kinds),
    )


def question_collapse(first: dict, now: dict) -> str | None:
    """first, now: `variety` at the first Questioner step of the run and at the last one so far."""
    signs = []
    for name in ("distinct_2", "kind_entropy"):
        if now[name] < FELL * first[name]:
            signs.append(f"{name} is {now[name]:.2f}, at first {first[name]:.2f}")
    if now["largest_cluster"] > max(LARGEST, first["largest_cluster"] / FELL):
        share, was = now["largest_cluster"], first["largest_cluster"]
        signs.append(f"one cluster holds {share:.2f} of the questions, at first {was:.2f}")
    if not signs:
        return None
    advice = "try a higher --diversity-weight or fewer --questioner-steps"
    return f"{'; '.join(signs)}. The Questioner repeats what is rewarded: {advice}"


def label_drift(before: dict, now: dict) -> str | None:
    """before, now: of two iterations `confidence` of the candidates, `base_agreement`, and `silver_accuracy`
    where the truth is known. There it decides; elsewhere, whether the Reasoner still agrees with the base.
    """
    was_right, is_right = before.get("silver_accuracy"), now.get("silver_accuracy")
    surer = now["confidence"] >= before["confidence"]
    advice = (
        "The Reasoner learns its own mistakes: try a narrower band (--tau-low, --tau-high), more --answers or"
        " fewer --reasoner-steps"
    )
    if was_right is not None and is_right is not None:
        if surer and is_right < was_right - DRIFT:
            numbers = f"silver labels are right in {is_right:.2f}, before in {was_right:.2f}"
            return (
                f"{numbers}, with confidence {before['confidence']:.2f} -> {now['confidence']:.2f}. {advice}"
            )
    elif surer and now["base_agreement"] is not None and now["base_agreement"] < AGREEMENT:
        share = f"{now['base_agreement']:.2f} of the base's questions"
        return f"the Reasoner gives the base's answer to {share}, as sure as before. {advice}"
    return None


def stagnant_difficulty(r_unc: Sequence[float]) -> str | None:
    """r_unc: of each step of a phase. Compares the means of its first and last third, of 6 steps or more."""
    third = len(r_unc) // 3
    if third < 2:
        return None
    start, end = sum(r_unc[:third]) / third, sum(r_unc[-third:]) / third
    if end > start:
        return None
    advice = "try more --questioner-steps or a lower --beta"
    return f"r_unc {start:.3f} -> {end:.3f} over the phase. The Questioner finds nothing harder: {advice}"

"""Curation: which questions become the Reasoner's training set (VisPlay, section 3.3).

    D = { (image, x, y~) :  tau_low <= c <= tau_high }        tau_low = 0.25, tau_high = 0.75, inclusive

A question of high confidence teaches nothing new, one of low confidence has a label that is probably wrong.
The official code uses 0.3 and 0.8 instead of the paper's thresholds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rewards import confidence


@dataclass(frozen=True)
class VotedQuestion:
    """A question that the Reasoner has answered m times, in any phase.

    If it is kept it becomes a line of `curated/iteration-K.jsonl`.
    """

    image: str  # path of the image file
    question: str
    kind: str  # multiple choice, numerical or regression
    label: str | None  # the majority answer: the silver label
    confidence: float  # its share of the m answers
    answers: list[str | None]  # all m, None where nothing could be parsed


Votes = list[
    list[VotedQuestion | None]
]  # [images][G]; None for an output that is no valid question


def keep(confidence: float, low: float = 0.25, high: float = 0.75) -> bool:
    """Tells if a question of this confidence is kept; low, high: tau_low and tau_high, inclusive."""
    return low <= confidence <= high


def pool(candidates: Iterable[VotedQuestion]) -> list[VotedQuestion]:
    """Merges what was proposed several times: each question about an image once, with all its votes."""
    pooled: dict[tuple[str, str], VotedQuestion] = {}
    for candidate in candidates:
        place = (candidate.image, candidate.question)
        before = pooled.get(place)
        if before is None:
            answers = candidate.answers
        else:
            answers = before.answers + candidate.answers
        label, c = confidence(answers)
        pooled[place] = replace(before or candidate, label=label, confidence=c, answers=answers)
    return list(pooled.values())


def curate(
    candidates: Iterable[VotedQuestion], is_kept: Callable[[VotedQuestion], bool]
) -> list[VotedQuestion]:
    """Returns the training set D: each question once, if it has a label and is kept."""
    return [
        question
        for question in pool(candidates)
        if question.label is not None and is_kept(question)
    ]

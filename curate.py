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
    """One question that the Reasoner has answered m times, in any phase; if it is kept it is a line of
    `curated/iteration-K.jsonl`."""

    image: str  # path of the image file
    question: str
    kind: str  # multiple choice, numerical or regression
    label: str | None  # the majority answer: the silver label
    confidence: float  # its share of the m answers
    answers: list[str | None]  # all m, None where nothing could be parsed


def keep(confidence: float, low: float = 0.25, high: float = 0.75) -> bool:
    """Whether a question of this confidence is kept; low, high: tau_low and tau_high, inclusive."""
    return low <= confidence <= high


def pool(candidates: Iterable[VotedQuestion]) -> list[VotedQuestion]:
    """Each question about an image once: what was proposed several times has the votes of all times."""
    pooled: dict[tuple[str, str], VotedQuestion] = {}
    for example in candidates:
        before = pooled.get(place := (example.image, example.question))
        answers = (before.answers if before else []) + example.answers
        label, share = confidence(answers)
        pooled[place] = replace(before or example, label=label, confidence=share, answers=answers)
    return list(pooled.values())


def curate(
    candidates: Iterable[VotedQuestion], wanted: Callable[[VotedQuestion], bool]
) -> list[VotedQuestion]:
    """The training set D: the questions that have a label and are wanted, each once."""
    return [example for example in pool(candidates) if example.label is not None and wanted(example)]

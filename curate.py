"""Curation: which questions become the Reasoner's training set (VisPlay, section 3.3).

    D = { (image, x, y~) :  tau_low <= c <= tau_high }        tau_low = 0.25, tau_high = 0.75, inclusive

A question of high confidence teaches nothing new, one of low confidence has a label that is probably wrong.
The official code uses 0.3 and 0.8 instead of the paper's thresholds.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One question that the Reasoner has answered m times; curated, it is one line of
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


def curate(candidates: Iterable[Example], low: float = 0.25, high: float = 0.75) -> list[Example]:
    """The training set D: the candidates of middling confidence that have a label at all."""
    return [
        example for example in candidates if example.label is not None and keep(example.confidence, low, high)
    ]


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Writes examples as JSON lines; the bytes of a path that are not UTF-8 are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(e), ensure_ascii=False) + "\n" for e in examples]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def read_examples(path: Path) -> list[Example]:
    """Reads what `write_examples` wrote."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return [Example(**json.loads(line)) for line in text.split("\n") if line]

"""Evaluation: how often is the Reasoner right? The only place where true labels are known, and none of them leaves it.

For the built-in scenes the truth is known exactly (`toy/answerer.py`), so three things can be measured that a run on
unlabelled images can only hope for:

    sampled accuracy   the share of sampled answers that are right
    greedy accuracy    the share of questions whose most likely answer, token by token, is right
    silver-label accuracy   the share of curated questions whose majority answer is right (the paper's figure 4)
"""

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import reasoner
from curate import Example
from images import load_image
from rewards import answer_reward
from toy.answerer import ask, understand
from toy.scenes import read_truth, write_scenes
from vlm import VLM


@dataclass(frozen=True)
class Labelled:
    """A question about an image with its true answer."""

    image: str
    question: str
    answer: str
    kind: str


def held_out_questions(folder: Path, count: int, seed: int, size: int) -> list[Labelled]:
    """`count` questions about scenes that training never sees, four a scene, written to `folder` with their images."""
    paths, rng, labelled = write_scenes(folder, -(-count // 4), seed, size), random.Random(f"questions {seed}"), []
    truth = read_truth(folder)
    for i in range(count):
        path = paths[i // 4]
        question = ask(truth[path.name], rng)
        fact = understand(question, truth[path.name])
        labelled.append(Labelled(str(path), question, fact.answer, fact.kind))
    (folder / "questions.jsonl").write_text("".join(json.dumps(asdict(q)) + "\n" for q in labelled))
    return labelled


def accuracy(vlm: VLM, questions: list[Labelled], samples: int, **sampling) -> dict[str, float]:
    """Greedy and sampled accuracy of the Reasoner, in [0, 1]; `sampling` goes to `generate.generate`.

    Each question is answered once greedily and `samples` times at random.
    """
    prompts = [reasoner.answer_prompt(vlm, load_image(q.image), q.question) for q in questions]
    results = {}
    for name, n, changed in (("greedy", 1, {"temperature": 0.0}), ("sampled", samples, {})):
        groups = reasoner.answer(vlm, prompts, n, **sampling | changed)
        right = [answer_reward(a.answer, q.answer) for q, group in zip(questions, groups) for a in group]
        results[f"{name}_accuracy"] = sum(right) / len(right)
    return results


def silver_label_accuracy(examples: list[Example], folder: Path) -> dict:
    """How many silver labels are true, for curated questions about the scenes in `folder`.

    Returns silver_accuracy (over the questions the answerer understands; None if there is none), understood (their
    share) and question_kinds (how many of each kind of the world).
    """
    truth, right, kinds = read_truth(folder), [], Counter()
    for example in examples:
        if fact := understand(example.question, truth[Path(example.image).name]):
            right.append(answer_reward(example.label, fact.answer))
            kinds[fact.kind] += 1
    return {
        "silver_accuracy": sum(right) / len(right) if right else None,
        "understood": len(right) / len(examples) if examples else None,
        "question_kinds": dict(kinds),
    }

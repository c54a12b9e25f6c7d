"""What only the toy world can tell: held-out questions, their answers, and whether silver labels are true.

The only place in a run where the truth is known; none of it leaves but the numbers. Results are told apart by
the rungs of a ladder: how many objects one must list to answer a question.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from curate import VotedQuestion
from measure.items import Item
from measure.outcomes import Outcome
from rewards import answer_reward
from toy.answerer import Fact, ask, understand
from training.scenes import RUNGS, draw_scenes, read_truth, sample_scene

QUESTIONS_A_SCENE = 4  # at most, of the held-out ones


def rung(objects: int) -> str | None:
    """The rung of a question about so many objects; None of one about no object at all."""
    return next((name for name, numbers in RUNGS.items() if objects in numbers), None)


def held_out_questions(folder: Path, count: int, seed: int, size: int) -> list[Item]:
    """`count` questions about held-out scenes, a quarter on each rung, written to `folder` with their images.

    Questions about no object at all ("How many crosses are there?" where there is none) are not among them.
    """
    rng, scenes, asked = random.Random(f"held out {seed}"), [], []
    wanted = {name: count // len(RUNGS) + (i < count % len(RUNGS)) for i, name in enumerate(RUNGS)}
    while any(wanted.values()):
        scene, new = sample_scene(rng, held_out=True), {}
        for question in [ask(scene, rng) for _ in range(QUESTIONS_A_SCENE)]:
            fact = understand(question, scene)
            name = rung(len(fact.things))
            if question not in new and wanted.get(name, 0):
                wanted[name] -= 1
                new[question] = fact
        if new:
            scenes.append(scene)
            asked.append(new)
    paths = draw_scenes(folder, scenes, rng, size)
    facts = [(path, question, fact) for path, new in zip(paths, asked) for question, fact in new.items()]
    lines = [
        dict(image=path.name, question=text, answer=fact.answer, kind=fact.kind, objects=len(fact.things))
        for path, text, fact in facts
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [Item(str(path), text, (fact.answer,), kind=fact.kind) for path, text, fact in facts]


def measure(outcomes: list[Outcome], curated: list[VotedQuestion], held_out: Path, images: Path) -> dict:
    """All that the truth tells of an iteration; `held_out` and `images` are the folders of the scenes."""
    return accuracy_by_objects(outcomes, held_out) | silver_label_accuracy(curated, images)


def accuracy_by_objects(outcomes: list[Outcome], folder: Path) -> dict:
    """sampled_by_objects and greedy_by_objects: accuracy on each rung of the questions in `folder`."""
    facts = _facts(((o.item.image, o.item.question) for o in outcomes), folder)
    sampled, greedy = [], []
    for outcome, fact in zip(outcomes, facts):
        objects = len(fact.things)
        sampled.append((objects, outcome.values["sampled_accuracy"]))
        greedy.append((objects, float(outcome.greedy_right)))
    return {"sampled_by_objects": _by_rung(sampled), "greedy_by_objects": _by_rung(greedy)}


def silver_label_accuracy(examples: list[VotedQuestion], folder: Path) -> dict:
    """How many silver labels are true, for curated questions about scenes in `folder`, and how hard they are.

    A label of a question that has no answer is not true; `understood` is the share of the others. Of these:
    silver_by_objects, the share of true labels by rung; objects, how many one must list on average;
    question_kinds, how many there are of each kind. None where there is nothing to count.
    """
    facts, right = _facts(((e.image, e.question) for e in examples), folder), majority_right(examples, folder)
    known = [(len(fact.things), hit) for fact, hit in zip(facts, right) if fact]
    return {
        "silver_accuracy": _mean(right),
        "silver_by_objects": _by_rung(known),
        "objects": _mean([objects for objects, _ in known]),
        "understood": _mean([float(fact is not None) for fact in facts]),
        "question_kinds": dict(Counter(fact.kind for fact in facts if fact)),
    }


def majority_right(examples: list[VotedQuestion], folder: Path) -> list[float]:
    """Of each question 1 if its majority is the true answer, else 0."""
    facts = _facts(((e.image, e.question) for e in examples), folder)
    return [
        answer_reward(e.label, fact.answer) if fact and e.label else 0.0 for e, fact in zip(examples, facts)
    ]


def _facts(asked: Iterable[tuple[str, str]], folder: Path) -> list[Fact | None]:
    """What there is to know of questions about images of scenes in `folder`."""
    asked = list(asked)
    truth = read_truth(folder) if asked else {}
    return [understand(question, truth[Path(image).name]) for image, question in asked]


def _by_rung(values: list[tuple[int, float]]) -> dict[str, float | None]:
    """The mean on each rung of values given as (objects, value)."""
    return {
        name: _mean([v for objects, v in values if objects in numbers]) for name, numbers in RUNGS.items()
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

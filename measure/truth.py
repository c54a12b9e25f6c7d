"""The truth about the toy world: held-out questions, their answers, and whether silver labels are true.

The only place in a run where the truth is known; none of it leaves but the numbers. Results are told apart by
the rungs of a ladder: how many objects one must list to answer a question.
"""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from curate import VotedQuestion
from measure.items import Item, read_lines
from measure.outcomes import Outcome
from rewards import answer_reward
from toy.answerer import Fact, ask, understand
from training.folder import write_json_lines
from training.scenes import RUNGS, Scene, draw_scenes, read_truth, sample_scene

QUESTIONS_A_SCENE = 4  # at most, of the held-out ones


def rung(objects: int) -> str | None:
    """Returns the rung of a question about so many objects; None of one about no object at all."""
    for name, numbers in RUNGS.items():
        if objects in numbers:
            return name
    return None


def held_out_questions(folder: Path, count: int, seed: int, size: int) -> list[Item]:
    """Writes questions about held-out scenes to `folder`, with their images, and returns them.

    Of `count` questions a quarter is on each rung. Questions about no object at all ("How many crosses are
    there?" where there is none) are not among them. size: of the images, in pixels.
    """
    rng = random.Random(f"held out {seed}")
    # Scenes and questions about them, until every rung is full
    wanted = Counter(itertools.islice(itertools.cycle(RUNGS), count))  # 6: 2, 2, 1, 1
    scenes: list[Scene] = []
    asked: list[dict[str, Fact]] = []  # of each scene
    while any(wanted.values()):
        scene = sample_scene(rng, held_out=True)
        facts = {}
        for question in [ask(scene, rng) for _ in range(QUESTIONS_A_SCENE)]:
            fact = understand(question, scene)
            name = rung(len(fact.things))
            if question not in facts and wanted[name]:
                wanted[name] -= 1
                facts[question] = fact
        if facts:
            scenes.append(scene)
            asked.append(facts)
    # The images, and a line a question
    paths = draw_scenes(folder, scenes, rng, size)
    lines = []
    for path, facts in zip(paths, asked):
        for question, fact in facts.items():
            line = dict(
                image=path.name,
                question=question,
                answer=fact.answer,
                kind=fact.kind,
                objects=len(fact.things),
            )
            lines.append(line)
    file = folder / "questions.jsonl"
    write_json_lines(file, lines)
    return read_lines(file)


def accuracy_by_objects(outcomes: list[Outcome], folder: Path) -> dict:
    """Returns sampled_by_objects and greedy_by_objects: accuracies by rung of the questions in `folder`."""
    facts = _read_facts([o.item for o in outcomes], folder)
    objects = [len(fact.things) for fact in facts]
    sampled = [o.values["sampled_accuracy"] for o in outcomes]
    greedy = [o.greedy_right for o in outcomes]
    return {
        "sampled_by_objects": _mean_by_rung(objects, sampled),
        "greedy_by_objects": _mean_by_rung(objects, greedy),
    }


def silver_label_accuracy(curated: list[VotedQuestion], folder: Path) -> dict:
    """Measures how many silver labels are true, and how hard their questions are.

    curated: questions about scenes in `folder`. A label of a question that has no answer is not true.
    Returns, None where there is nothing to count:

    silver_accuracy: the share of true labels. understood: the share of questions that have an answer. Of
    these: silver_by_objects, the share of true labels by rung; objects, how many one must list on average;
    question_kinds, how many there are of each kind.
    """
    facts = _read_facts(curated, folder)
    right = majority_right(curated, folder)
    known = [fact for fact in facts if fact]
    objects = [len(fact.things) for fact in known]
    right_of_known = [hit for fact, hit in zip(facts, right) if fact]
    return {
        "silver_accuracy": _mean(right),
        "silver_by_objects": _mean_by_rung(objects, right_of_known),
        "objects": _mean(objects),
        "understood": _mean([fact is not None for fact in facts]),
        "question_kinds": dict(Counter(fact.kind for fact in known)),
    }


def majority_right(questions: list[VotedQuestion], folder: Path) -> list[float]:
    """Returns for each question 1 if its majority is the true answer, else 0."""
    asked = zip(questions, _read_facts(questions, folder))
    return [answer_reward(voted.label, fact.answer) if fact else 0.0 for voted, fact in asked]


def _read_facts(asked: Sequence[Item | VotedQuestion], folder: Path) -> list[Fact | None]:
    """Returns the fact behind each question about a scene in `folder`, None for one that has no answer."""
    truth = read_truth(folder) if asked else {}
    scenes = [truth[Path(question.image).name] for question in asked]
    return [understand(each.question, scene) for each, scene in zip(asked, scenes)]


def _mean_by_rung(objects: list[int], values: list[float]) -> dict[str, float | None]:
    """Returns the mean of the values on each rung; objects: how many each value's question is about."""
    means = {}
    for name, numbers in RUNGS.items():
        on_rung = [value for number, value in zip(objects, values) if number in numbers]
        means[name] = _mean(on_rung)
    return means


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None

"""What only the toy world can tell: held-out questions with their true answers, and how many silver labels are true.

The only place in a run where the truth is known; none of it leaves but the numbers.
"""

import json
import random
from collections import Counter
from pathlib import Path

from curate import Example
from evaluate import Item
from rewards import answer_reward
from toy.answerer import ask, understand
from toy.scenes import read_truth, write_scenes


def held_out_questions(folder: Path, count: int, seed: int, size: int) -> list[Item]:
    """`count` questions about scenes that training never sees, four a scene, written to `folder` with their images."""
    paths, rng, items = (
        write_scenes(folder, -(-count // 4), seed, size),
        random.Random(f"questions {seed}"),
        [],
    )
    truth = read_truth(folder)
    for i in range(count):
        path = paths[i // 4]
        question = ask(truth[path.name], rng)
        fact = understand(question, truth[path.name])
        items.append(Item(str(path), question, (fact.answer,), kind=fact.kind))
    lines = [
        json.dumps(dict(image=Path(e.image).name, question=e.question, answer=e.answer[0], kind=e.kind))
        for e in items
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return items


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

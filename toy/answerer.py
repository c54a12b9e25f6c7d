"""The exact answerer: it knows the true answer to a question about a toy scene.

It understands the six kinds of question below and nothing else. Only `measure/`, `report.py` and
`toy/build.py`, which teaches the base checkpoint, import it. Self-play never does, and `tests/test_loop.py`
proves it.
"""

import random
import re
from dataclasses import dataclass

from training.scenes import COLOURS, PLURALS, SHAPES, Scene, Thing

_colour = f"({'|'.join(COLOURS)})"
_shape = f"({'|'.join(SHAPES)})"
_shapes = f"({'|'.join(PLURALS.values())})"
_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
PATTERNS = {
    "count colour shape": re.compile(rf"How many {_colour} {_shapes} are there\?"),
    "count colour": re.compile(rf"How many {_colour} shapes are there\?"),
    "count shape": re.compile(rf"How many {_shapes} are there\?"),
    "count all": re.compile(r"How many shapes are there\?"),
    "exists": re.compile(rf"Does it show a {_colour} {_shape}, yes or no\?"),
    "more": re.compile(rf"Does it show more {_colour} than {_colour} shapes, yes or no\?"),
}
# How often each kind is asked. "How many shapes are there?" is hard and needs no look: a Questioner that
# wants hard questions would ask nothing else. Half of the answers to "more" are right by chance, which blurs
# the ladder.
WEIGHTS = dict.fromkeys(PATTERNS, 1.0) | {"count all": 0.4, "more": 0.4}


@dataclass(frozen=True)
class Fact:
    """A question understood: its kind, the objects one must list to answer it, and the answer."""

    kind: str
    things: tuple[Thing, ...]
    answer: str


def understand(question: str, scene: Scene) -> Fact | None:
    """Returns the true answer to `question` about `scene`, or None if it is not one of the six kinds."""
    for kind, pattern in PATTERNS.items():
        match = pattern.fullmatch(question.strip())
        if match and not (kind == "more" and match[1] == match[2]):
            return _answer(kind, match.groups(), scene)
    return None


def _answer(kind: str, words: tuple[str, ...], scene: Scene) -> Fact:
    # The things that have one of the colours and one of the shapes, where any is named
    colours = [word for word in words if word in COLOURS] or COLOURS
    shapes = [_SINGULAR.get(word, word) for word in words if word not in COLOURS] or SHAPES
    things = tuple(thing for thing in scene if thing.colour in colours and thing.shape in shapes)
    if kind == "exists":
        first = things[:1]  # decides
        return Fact(kind, first, "yes" if first else "no")
    if kind == "more":
        found = [thing.colour for thing in things]
        return Fact(kind, things, "yes" if found.count(words[0]) > found.count(words[1]) else "no")
    return Fact(kind, things, str(len(things)))


def ask(scene: Scene, rng: random.Random) -> str:
    """Draws a question about a scene, mostly about something that is there."""
    (kind,) = rng.choices(list(WEIGHTS), WEIGHTS.values())
    seen = rng.choice(scene)
    colour = seen.colour if rng.random() < 0.8 else rng.choice(list(COLOURS))
    shape = seen.shape if rng.random() < 0.8 else rng.choice(SHAPES)
    if kind == "count colour shape":
        return f"How many {colour} {PLURALS[shape]} are there?"
    if kind == "count colour":
        return f"How many {colour} shapes are there?"
    if kind == "count shape":
        return f"How many {PLURALS[shape]} are there?"
    if kind == "count all":
        return "How many shapes are there?"
    if kind == "exists":
        return f"Does it show a {colour} {shape}, yes or no?"
    other = rng.choice([another for another in COLOURS if another != colour])
    first, second = rng.sample([colour, other], 2)
    return f"Does it show more {first} than {second} shapes, yes or no?"

"""The exact answerer: what the true answer to a question about a toy scene is.

It understands the six kinds of question below and nothing else. Only what measures and `toy/build.py` (which
teaches the base checkpoint) import it; self-play never does, and `tests/test_loop.py` proves it.
"""

import random
import re
from dataclasses import dataclass

from training.scenes import COLOURS, PLURALS, SHAPES, Scene, Thing

_colour, _shape, _shapes = (f"({'|'.join(words)})" for words in (COLOURS, SHAPES, PLURALS.values()))
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
    """The true answer to `question` about `scene`, or None if it is not one of the six kinds."""
    for kind, pattern in PATTERNS.items():
        if match := pattern.fullmatch(question.strip()):
            words = tuple(_SINGULAR.get(word, word) for word in match.groups())
            if kind == "more" and words[0] == words[1]:
                return None
            return _answer(kind, words, scene)
    return None


def _answer(kind: str, words: tuple[str, ...], scene: Scene) -> Fact:
    colours, shapes = [w for w in words if w in COLOURS], [w for w in words if w in SHAPES]
    things = tuple(
        t for t in scene if (not colours or t.colour in colours) and (not shapes or t.shape in shapes)
    )
    if kind == "exists":
        things, answer = things[:1], "yes" if things else "no"  # the first one decides
    elif kind == "more":
        first, second = (sum(t.colour == colour for t in things) for colour in words)
        answer = "yes" if first > second else "no"
    else:
        answer = str(len(things))
    return Fact(kind, things, answer)


def ask(scene: Scene, rng: random.Random) -> str:
    """A random question about a scene, mostly about something that is there."""
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
    other = rng.choice([c for c in COLOURS if c != colour])
    first, second = rng.sample([colour, other], 2)
    return f"Does it show more {first} than {second} shapes, yes or no?"

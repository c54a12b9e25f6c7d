"""The toy world: scenes of coloured shapes, drawn to PNG files.

A scene is a 3 x 3 board of cells; 2 to 9 of them hold an object, one of 4 colours x {disc, ring, cross}. Half
of the scenes have a leading colour and half a leading shape, which most of their objects share: so there are
questions about many objects ("How many red shapes are there?" may be 8), not only about one or two.

At the toy's size of 84 x 84 pixels a cell is 28 x 28, exactly one visual token of the Qwen2.5-VL image
encoder (2 x 2 merged patches of 14 pixels), which is what lets a 0.6M-parameter model read it. The same
scenes can be drawn larger for a real model.

One scene in sixteen, by a checksum of what is on it, is held out: it is drawn for measuring and never for
lessons or self-play, whatever the seeds.

This file knows nothing of answers: training sees the PNG files and nothing else. What was drawn is written
beside them, in `scenes.jsonl`, for measuring alone (measure/truth.py).
"""

import json
import random
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 66),
    "blue": (38, 84, 214),
    "yellow": (240, 196, 25),
}
SHAPES = ("disc", "ring", "cross")
PLURALS = {"disc": "discs", "ring": "rings", "cross": "crosses"}
BOARD = 3  # cells along one side
LED = 0.5  # fraction of scenes with a leading colour (or shape)
LEAD = 0.7  # probability that an object follows it
BACKGROUND = (250, 250, 247)
# The ladder of questions: how many objects one asks to list.
RUNGS = {"1-2": (1, 2), "3-4": (3, 4), "5-6": (5, 6), "7-9": (7, 8, 9)}
TRUTH_FILE = "scenes.jsonl"


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    cell: int  # 0 to 8, row by row
    colour: str
    shape: str


Scene = tuple[Thing, ...]  # in reading order


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Draws a random scene of 2 to 9 objects: one of those held out, or one of the others."""
    cells = BOARD * BOARD
    while True:
        count = rng.randint(2, cells)
        places = sorted(rng.sample(range(cells), count))
        colours = _draw_words(rng, tuple(COLOURS), count)
        shapes = _draw_words(rng, SHAPES, count)
        scene = tuple(map(Thing, places, colours, shapes))
        if is_held_out(scene) == held_out:
            return scene


def _draw_words(rng: random.Random, words: tuple[str, ...], count: int) -> list[str]:
    """Draws `count` random words; in some scenes most of them are the same one."""
    leader = rng.choice(words) if rng.random() < LED else None
    drawn = []
    for _ in range(count):
        follows = leader is not None and rng.random() < LEAD
        drawn.append(leader if follows else rng.choice(words))
    return drawn


def is_held_out(scene: Scene) -> bool:
    """Returns true if a scene is kept for measuring: one in sixteen, by its checksum."""
    drawn = " ".join(f"{thing.cell} {thing.colour} {thing.shape}" for thing in scene)
    return zlib.crc32(drawn.encode()) % 16 == 0


def render(scene: Scene, rng: random.Random, size: int = 84) -> Image.Image:
    """Draws a scene as an RGB image of `size` x `size` pixels; `rng` shifts objects by 1/28 of a cell.

    The numbers of its cells:

        0 1 2
        3 4 5
        6 7 8
    """
    cell = size // BOARD
    unit = cell / 28  # the toy's pixel
    image = Image.new("RGB", (size, size), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(thing.cell, BOARD)
        x = (column + 0.5) * cell + rng.randint(-1, 1) * unit
        y = (row + 0.5) * cell + rng.randint(-1, 1) * unit
        colour = COLOURS[thing.colour]
        long = 9 * unit  # a radius, or half the length of a bar of a cross
        short = 2.5 * unit  # half its width
        if thing.shape == "disc":
            draw.circle((x, y), long, fill=colour)
        elif thing.shape == "ring":
            draw.circle((x, y), long, outline=colour, width=max(1, round(4 * unit)))
        else:
            draw.rectangle((x - long, y - short, x + long, y + short), fill=colour)
            draw.rectangle((x - short, y - long, x + short, y + long), fill=colour)
    return image


def write_scenes(folder: Path, count: int, seed: int, size: int = 84) -> list[Path]:
    """Renders `count` random scenes into `folder`; the same seed, count and size give the same files."""
    rng = random.Random(f"scenes {seed}")
    return draw_scenes(folder, [sample_scene(rng) for _ in range(count)], rng, size)


def draw_scenes(
    folder: Path, scenes: Iterable[Scene], rng: random.Random, size: int = 84
) -> list[Path]:
    """Renders scenes into `folder` as PNG files, with the truth beside them; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    lines = []
    for i, scene in enumerate(scenes):
        path = folder / f"scene-{i:05d}.png"
        render(scene, rng, size).save(path)
        record = {"image": path.name, "things": [asdict(thing) for thing in scene]}
        paths.append(path)
        lines.append(json.dumps(record) + "\n")
    (folder / TRUTH_FILE).write_text("".join(lines))
    return paths


def read_truth(folder: Path) -> dict[str, Scene]:
    """Reads what was drawn in each image of a folder: file name -> scene. For measuring only."""
    scenes = {}
    for line in (folder / TRUTH_FILE).read_text().splitlines():
        record = json.loads(line)
        scenes[record["image"]] = tuple(Thing(**thing) for thing in record["things"])
    return scenes

"""The toy world: scenes of coloured shapes, drawn to PNG files.

A scene is a 3 x 3 board of cells; 2 to 9 of them hold an object, one of 4 colours x {disc, ring, cross}. Half
of the scenes have a leading colour and half a leading shape, which most of their objects share: so there are
questions about many objects ("How many red shapes are there?" may be 8), not only about one or two.

At the toy's size of 84 x 84 pixels a cell is 28 x 28, exactly one visual token of the Qwen2.5-VL image
encoder (2 x 2 merged patches of 14 pixels), which is what lets a 0.6M-parameter model read it. The same
scenes can be drawn larger for a real model.

One scene in sixteen, by a checksum of what is on it, is held out: it is drawn for measuring and never for
lessons or self-play, whatever the seeds.

This file knows nothing of questions or answers: training sees the PNG files and nothing else. What was drawn
is written beside them, in `scenes.jsonl`, for `toy/measure.py` alone.
"""

import json
import random
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (214, 40, 40), "green": (42, 157, 66), "blue": (38, 84, 214), "yellow": (240, 196, 25)}
SHAPES = ("disc", "ring", "cross")
PLURALS = {"disc": "discs", "ring": "rings", "cross": "crosses"}
BOARD = 3
LED = 0.5  # share of scenes with a leading colour (or shape)
LEAD = 0.7  # how likely an object is to follow it
TRUTH_FILE = "scenes.jsonl"


@dataclass(frozen=True)
class Thing:
    """One object: the cell it stands in (0 to 8, row by row), its colour and its shape."""

    cell: int
    colour: str
    shape: str


Scene = tuple[Thing, ...]  # in reading order


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene of 2 to 9 objects: one of those held out, or one of the others."""
    while True:
        cells = sorted(rng.sample(range(BOARD * BOARD), rng.randint(2, BOARD * BOARD)))
        colours, shapes = (_draw(rng, words, len(cells)) for words in (tuple(COLOURS), SHAPES))
        scene = tuple(Thing(*thing) for thing in zip(cells, colours, shapes))
        if is_held_out(scene) == held_out:
            return scene


def _draw(rng: random.Random, words: tuple[str, ...], count: int) -> list[str]:
    """`count` random words; in some scenes most of them are the same one."""
    leader = rng.choice(words) if rng.random() < LED else None
    return [leader if leader and rng.random() < LEAD else rng.choice(words) for _ in range(count)]


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept for measuring."""
    drawn = " ".join(f"{thing.cell} {thing.colour} {thing.shape}" for thing in scene)
    return zlib.crc32(drawn.encode()) % 16 == 0


def render(scene: Scene, rng: random.Random, size: int = 84) -> Image.Image:
    """Draws a scene as an RGB image of `size` x `size` pixels; `rng` shifts objects by 1/28 of a cell."""
    cell = size // BOARD
    unit = cell / 28
    image = Image.new("RGB", (size, size), (250, 250, 247))
    draw = ImageDraw.Draw(image)
    for thing in scene:
        x = (thing.cell % BOARD + 0.5) * cell + rng.randint(-1, 1) * unit
        y = (thing.cell // BOARD + 0.5) * cell + rng.randint(-1, 1) * unit
        r, colour = 9 * unit, COLOURS[thing.colour]
        if thing.shape == "disc":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif thing.shape == "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=max(1, round(4 * unit)))
        else:
            draw.rectangle((x - r, y - 2.5 * unit, x + r, y + 2.5 * unit), fill=colour)
            draw.rectangle((x - 2.5 * unit, y - r, x + 2.5 * unit, y + r), fill=colour)
    return image


def write_scenes(folder: Path, count: int, seed: int, size: int = 84) -> list[Path]:
    """Renders `count` random scenes into `folder`; the same seed, count and size give the same files."""
    rng = random.Random(f"scenes {seed}")
    return draw_scenes(folder, [sample_scene(rng) for _ in range(count)], rng, size)


def draw_scenes(folder: Path, scenes: Iterable[Scene], rng: random.Random, size: int = 84) -> list[Path]:
    """Renders scenes into `folder` as PNG files, with the truth beside them; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, records = [], []
    for i, scene in enumerate(scenes):
        paths.append(folder / f"scene-{i:05d}.png")
        render(scene, rng, size).save(paths[-1])
        records.append({"image": paths[-1].name, "things": [asdict(thing) for thing in scene]})
    (folder / TRUTH_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return paths


def read_truth(folder: Path) -> dict[str, Scene]:
    """What was drawn in each image of a folder of scenes: file name -> scene. For measuring only."""
    lines = (folder / TRUTH_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["image"]: tuple(Thing(**thing) for thing in r["things"]) for r in records}

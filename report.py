"""A report of a run, for people to look at: `python report.py runs/NAME` writes runs/NAME/report.html.

One page without network or scripts: what ran, its curves, the ladder of the built-in world, and images with
their questions and votes, iteration beside iteration. It reads plain files of that folder and no others: the
run may still be going on, and its folder may come from another machine.
"""

import signal

if __name__ == "__main__":  # Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import base64
import html
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from answers import canonical, same_answer
from curate import VotedQuestion
from measure.charts import (
    CHARTS,
    Proposed,
    draw_chart,
    draw_histogram,
    draw_ladder,
    escape,
    finite,
    number,
)
from measure.page import LADDER, PAGE, STYLE
from toy.answerer import Fact, understand
from training.folder import read_examples
from training.images import ImageError, load_image
from training.scenes import Scene, read_truth
from training.settings import OneLineParser, printable

GALLERY = 12  # images
QUESTIONS = 2  # of an image and iteration
THUMBNAIL = 168  # pixels


# ---- Reading a run -----------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict:
    """Reads the run's settings. Raises ValueError, with a sentence, if the folder is not a run's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config | {"iterations": int(config["iterations"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not the folder of a run: it has no readable config.json"
        ) from error


def read_records(folder: Path) -> list[dict]:
    """Reads the records of metrics.jsonl; leaves out a line that is being written, or is no record."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("iteration")) is int:
            records.append(record)
    return records


def read_questions(folder: Path, iterations: int) -> dict[int, list[Proposed]]:
    """Reads the questions that each iteration proposed, and whether each stands in curated/.

    One that was proposed several times about an image is there once, with the votes it was kept with. Older
    runs have only what was kept. An iteration that is not curated yet is not there.
    """
    questions = {}
    for k in range(1, iterations + 1):
        kept = read_well_formed(folder / "curated" / f"iteration-{k}.jsonl")
        if kept is None:
            continue
        candidates = read_well_formed(folder / "candidates" / f"iteration-{k}.jsonl")
        asked = {(e.image, e.question): (e, False) for e in candidates or ()}
        for example in kept:
            asked[example.image, example.question] = (example, True)
        questions[k] = list(asked.values())
    return questions


def read_well_formed(path: Path) -> list[VotedQuestion] | None:
    """Reads the questions that can be shown; None from a file that is not there yet, or being written."""
    try:
        return [example for example in read_examples(path) if is_well_formed(example)]
    except (OSError, ValueError, TypeError):
        return None


def is_well_formed(example: VotedQuestion) -> bool:
    """Returns whether a question can be shown; its confidence may be unknown."""
    if not isinstance(example.image, str) or not isinstance(example.question, str):
        return False
    if not isinstance(example.answers, list) or not example.answers:
        return False
    return all(
        answer is None or isinstance(answer, str) for answer in [example.label, *example.answers]
    )


def read_scenes(folder: Path) -> dict[str, Scene]:
    """Reads the scenes of built-in images, by file name; {} for other images, or a damaged file."""
    try:
        return read_truth(folder / "images")
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def split_path(path: str) -> list[str]:
    """Returns the parts of a path, of this system or another one; [""] of no path."""
    return [part for part in re.split(r"[/\\]", path) if part] or [""]


def find_picture(folder: Path, recorded: str) -> str:
    """Returns where an image is now.

    For runs/x/images/a.png it is the first that exists of FOLDER/runs/x/images/a.png, FOLDER/x/images/a.png
    and FOLDER/images/a.png, else where it was.
    """
    parts = split_path(recorded)
    for i in range(len(parts) - 1):
        place = str(folder.joinpath(*parts[i:]))
        if os.path.isfile(place):
            return place
    return recorded


# ---- The gallery -------------------------------------------------------------------------------------------


def thumbnail(path: str) -> str | None:
    """Returns a small JPEG of an image as a data: URI, None if it cannot be read."""
    try:
        image = load_image(path, 4 * THUMBNAIL**2)
    except ImageError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def count_votes(answers: list[str | None]) -> list[tuple[str | None, int]]:
    """Returns each different answer and how often it was given, the most frequent first.

    None stands for answers that could not be parsed.
    """
    votes = Counter()
    written = {}  # as the answer was written first
    for answer in answers:
        key = None if answer is None else canonical(answer)
        votes[key] += 1
        written.setdefault(key, answer)
    return [(written[key], count) for key, count in votes.most_common()]


def question_card(example: VotedQuestion, kept: bool, fact: Fact | None) -> str:
    """Shows a question, its votes as bars, its label, and whether that is true, where the fact is known."""
    label = example.label
    # A bar for each answer
    bars = ""
    for answer, count in count_votes(example.answers):
        name = "no answer" if answer is None else escape(answer)
        word = f"<i>{name}</i>" if answer is None else name  # an answer may read so
        kind = "bar label" if answer is not None and answer == label else "bar"
        width = 100 * count / len(example.answers)
        bar = f'<div class="{kind}" style="width: {width:.0f}%"></div>'
        bars += (
            f'<div class="vote"><span title="{name}">{word}</span>{bar}<span>{count}</span></div>'
        )
    # A line of facts
    confidence = finite(example.confidence)
    told = [
        f"silver label {'none' if label is None else escape(label[:80])}",
        f"confidence {'unknown' if confidence is None else format(confidence, '.2f')}",
        "kept" if kept else "not kept",
    ]
    if fact is not None:
        told.insert(0, f"{len(fact.things)} to list")
    if fact is not None and label is not None:
        if same_answer(label, fact.answer):
            told.append('<span class="good">✓ right</span>')
        else:
            told.append(f'<span class="bad">✗ wrong, it is {escape(fact.answer)}</span>')
    line = f'<div class="soft">{" · ".join(told)}</div>'
    return f'<div class="question"><div>{escape(example.question)}</div>{bars}{line}</div>'


def image_card(
    path: str, questions: dict[int, list[Proposed]], folder: Path, scene: Scene | None
) -> str:
    """Shows an image, with the questions of each iteration side by side."""
    name = escape(split_path(path)[-1] or "?")
    source = thumbnail(find_picture(folder, path))
    if source:
        picture = f'<img src="{source}" alt="{name}, an image of the run"><br>{name}'
    else:
        picture = f"{name} can no longer be read."
    turns = ""
    for k, asked in questions.items():
        about = [(e, kept) for e, kept in asked if e.image == path]
        cards = ""
        for example, kept in about[:QUESTIONS]:
            fact = understand(example.question, scene) if scene else None
            cards += question_card(example, kept, fact)
        turns += f"<div><h3>Iteration {k}</h3>{cards or 'Nothing was asked about it.'}</div>"
    picture = f'<div class="soft">{picture}</div>'
    return f'<div class="image">{picture}<div class="turns">{turns}</div></div>'


def gallery(questions: dict[int, list[Proposed]], folder: Path) -> str:
    """Shows the images that most iterations asked about."""
    iterations = Counter()  # image -> in how many it was asked about
    for asked in questions.values():
        images = dict.fromkeys(example.image for example, _ in asked)
        iterations.update(list(images))
    scenes = read_scenes(folder)
    cards = ""
    for path, _ in iterations.most_common(GALLERY):
        scene = scenes.get(split_path(path)[-1])
        cards += image_card(path, questions, folder, scene)
    return cards or '<p class="soft">No questions have been curated yet.</p>'


# ---- The page ----------------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """Returns the whole report. Raises ValueError, with a sentence, if the folder is not a run's."""
    config = read_config(folder)
    records = read_records(folder)
    questions = read_questions(folder, config["iterations"])
    # What ran
    done = max((r["iteration"] for r in records if r.get("phase") == "measure"), default=0)
    minutes = sum(number(record, "seconds") or 0 for record in records) / 60
    state = (
        f"{done} of {config['iterations']} iterations complete · {minutes:.1f} minutes of work"
        f" · model: {config.get('model') or 'the toy of this repository'}"
        f" · images: {config.get('images') or 'built-in scenes'}"
    )
    # What it warned of, and what it skipped
    warnings = ""
    for record in records:
        if record.get("phase") == "warning":
            warning = f"iteration {record['iteration']}, {record.get('signature')}: {record.get('message')}"
            warnings += f'<p class="warning">{escape(warning)}</p>'
    skips = folder / "skipped.txt"
    skipped = skips.read_text(encoding="utf-8", errors="replace") if skips.exists() else ""
    # The figures
    ladder = draw_ladder(records)
    charts = "".join(draw_chart(records, chart) for chart in CHARTS)
    charts = charts or '<p class="soft">Nothing to draw yet.</p>'
    for k, asked in questions.items():
        charts += draw_histogram(f"Difficulty, iteration {k}", asked)
    return PAGE.format(
        name=escape(folder.resolve().name),
        style=STYLE,
        state=escape(state),
        warnings=warnings,
        settings=html.escape(json.dumps(config, indent=1)),
        skips=len(skipped.splitlines()),
        skipped=escape(skipped[:20_000]),
        ladder=ladder and LADDER.format(charts=ladder),
        charts=charts,
        gallery=gallery(questions, folder),
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 2: a wrong argument."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME")
    parser.add_argument(
        "--out", type=Path, help="where the page goes (default: report.html in that folder)"
    )
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    if out.is_file() and out.suffix != ".html" and out.resolve().is_relative_to(args.run.resolve()):
        parser.error(f"--out {printable(str(out))} is a file of the run itself")
    try:
        out.write_text(page(args.run), encoding="utf-8", errors="backslashreplace")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2
    print(f"wrote {printable(str(out))} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from collections.abc import Callable
from pathlib import Path

from curate import VotedQuestion
from measure.charts import CHARTS, Proposed, chart, finite, histogram, ladder, number, shown
from measure.page import LADDER, PAGE, STYLE
from rewards import same_answer
from toy.answerer import understand
from training.folder import read_examples
from training.images import ImageError, load_image
from training.scenes import read_truth
from training.settings import OneLineParser, printable

GALLERY = 12  # images
QUESTIONS = 2  # of an image and iteration
THUMBNAIL = 168  # pixels


# ---- Reading a run -----------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict:
    """The run's settings. Raises ValueError, with a sentence for the user, if the folder is not a run's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config | {"iterations": int(config["iterations"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not the folder of a run: it has no readable config.json") from error


def read_records(folder: Path) -> list[dict]:
    """The records of metrics.jsonl; a line that is being written, or is none, is left out."""
    path, records = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [r for r in records if isinstance(r, dict) and type(r.get("iteration")) is int]


def read_questions(folder: Path, iterations: int) -> dict[int, list[Proposed]]:
    """Iteration -> the questions that were proposed, and whether each stands in curated/.

    One that was proposed several times about an image is there once, with the votes it was kept with. Older
    runs have only what was kept.
    """

    def read(kind: str, k: int) -> list[VotedQuestion] | None:
        try:
            return [e for e in read_examples(folder / kind / f"iteration-{k}.jsonl") if well_formed(e)]
        except (OSError, ValueError, TypeError):
            return None  # not there yet, or being written

    questions = {}
    for k in range(1, iterations + 1):
        if (kept := read("curated", k)) is not None:
            asked = {(e.image, e.question): (e, False) for e in read("candidates", k) or ()}
            asked |= {(e.image, e.question): (e, True) for e in kept}
            questions[k] = list(asked.values())
    return questions


def well_formed(example: VotedQuestion) -> bool:
    """Whether a question can be shown; its confidence may be unknown."""
    texts = [example.image, example.question, "" if example.label is None else example.label]
    votes = example.answers if isinstance(example.answers, list) and example.answers else [0]
    return all(isinstance(t, str) for t in texts) and all(v is None or isinstance(v, str) for v in votes)


def parts_of(path: str) -> list[str]:
    """The parts of a path, of this system or another one."""
    return [part for part in re.split(r"[/\\]", path) if part]


def find_picture(folder: Path, recorded: str) -> str:
    """Where an image is now: for runs/x/images/a.png FOLDER/images/a.png if it exists, else where it was."""
    parts = parts_of(recorded)
    places = [folder.joinpath(*parts[i:]) for i in range(len(parts) - 1)]
    return next((str(place) for place in places if os.path.isfile(place)), recorded)


def known_truth(folder: Path) -> Callable:
    """A function that tells the fact a question is about, in built-in scenes; elsewhere nobody knows."""
    try:
        scenes = read_truth(folder / "images")
    except (OSError, ValueError, KeyError, TypeError):  # own images, or a damaged file
        scenes = {}
    return lambda e: (
        understand(e.question, scene) if (scene := scenes.get((parts_of(e.image) or [""])[-1])) else None
    )


# ---- Charts ------------------------------------------------------------------------------------------------


# ---- The gallery -------------------------------------------------------------------------------------------


def thumbnail(path: str) -> str | None:
    """A small JPEG of an image as a data: URI, None if it cannot be read."""
    try:
        image = load_image(path, 4 * THUMBNAIL**2)
    except ImageError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def count_votes(answers: list[str | None]) -> list[tuple[str | None, int]]:
    """Each different answer and how often it was given, the most frequent first; None could not be parsed."""
    votes: dict[str | None, int] = {}
    for answer in answers:
        alike = (a for a in votes if a == answer or None not in (a, answer) and same_answer(a, answer))
        known = next(alike, answer)
        votes[known] = votes.get(known, 0) + 1
    return sorted(votes.items(), key=lambda vote: -vote[1])


def question_card(example: VotedQuestion, kept: bool, fact) -> str:
    """A question, its votes as bars, its label, and whether that is true (fact: a toy.answerer.Fact)."""
    bars, label = "", example.label
    for answer, count in count_votes(example.answers):
        name = "no answer" if answer is None else shown(answer)
        word = f"<i>{name}</i>" if answer is None else name  # an answer may read so
        kind = "bar label" if answer is not None and answer == label else "bar"
        bar = f'<div class="{kind}" style="width: {100 * count / len(example.answers):.0f}%"></div>'
        bars += f'<div class="vote"><span title="{name}">{word}</span>{bar}<span>{count}</span></div>'
    told = [] if fact is None else [f"{len(fact.things)} to list"]
    told += [f"silver label {'none' if label is None else shown(label[:80])}"]
    confidence = finite(example.confidence)
    told += [f"confidence {'unknown' if confidence is None else format(confidence, '.2f')}"]
    told += ["kept" if kept else "not kept"]
    if fact is not None and label is not None:
        right = same_answer(label, fact.answer)
        verdict = "✓ right" if right else f"✗ wrong, it is {shown(fact.answer)}"
        told.append(f'<span class="{"good" if right else "bad"}">{verdict}</span>')
    question, told = shown(example.question), " · ".join(told)
    return f'<div class="question"><div>{question}</div>{bars}<div class="soft">{told}</div></div>'


def gallery(questions: dict[int, list[Proposed]], folder: Path) -> str:
    """The images that most iterations asked about, with the questions of each iteration side by side."""
    asked_in = Counter(path for asked in questions.values() for path in {e.image: 0 for e, _ in asked})
    cards, truth = "", known_truth(folder)
    for path, _ in asked_in.most_common(GALLERY):
        source, name = thumbnail(find_picture(folder, path)), shown((parts_of(path) or ["?"])[-1])
        image = f'<img src="{source}" alt="{name}, an image of the run"><br>{name}'
        turns = ""
        for k, asked in questions.items():
            about = [(e, kept) for e, kept in asked if e.image == path][:QUESTIONS]
            cards_of_k = "".join(question_card(e, kept, truth(e)) for e, kept in about)
            turns += f"<div><h3>Iteration {k}</h3>{cards_of_k or 'Nothing was asked about it.'}</div>"
        picture = f'<div class="soft">{image if source else f"{name} can no longer be read."}</div>'
        cards += f'<div class="image">{picture}<div class="turns">{turns}</div></div>'
    return cards or '<p class="soft">No questions have been curated yet.</p>'


# ---- The page ----------------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """The whole report. Raises ValueError, with a sentence for the user, if the folder is not a run's."""
    config, records = read_config(folder), read_records(folder)
    questions, climb = read_questions(folder, config["iterations"]), ladder(records)
    done = max((r["iteration"] for r in records if r.get("phase") == "measure"), default=0)
    minutes = sum(number(r, "seconds") or 0 for r in records) / 60
    state = f"{done} of {config['iterations']} iterations complete · {minutes:.1f} minutes of work"
    state += f" · model: {config.get('model') or 'the toy of this repository'}"
    state += f" · images: {config.get('images') or 'built-in scenes'}"
    warned = [r for r in records if r.get("phase") == "warning"]
    warnings = [f"iteration {r['iteration']}, {r.get('signature')}: {r.get('message')}" for r in warned]
    skips = folder / "skipped.txt"
    skipped = skips.read_text(encoding="utf-8", errors="replace") if skips.exists() else ""
    curves = "".join(chart(records, *what) for what in CHARTS) or '<p class="soft">Nothing to draw yet.</p>'
    for k, asked in questions.items():
        curves += histogram(f"Difficulty, iteration {k}", asked) if asked else ""
    return PAGE.format(
        name=shown(folder.resolve().name),
        style=STYLE,
        state=shown(state),
        warnings="".join(f'<p class="warning">{shown(warning)}</p>' for warning in warnings),
        settings=html.escape(json.dumps(config, indent=1)),
        skips=len(skipped.splitlines()),
        skipped=shown(skipped[:20_000]),
        ladder=climb and LADDER.format(charts=climb),
        charts=curves,
        gallery=gallery(questions, folder),
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 2: a wrong argument."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME")
    parser.add_argument("--out", type=Path, help="where the page goes (default: report.html in that folder)")
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

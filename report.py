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
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from curate import Example
from engine.images import ImageError, load_image
from engine.page import LADDER, PAGE, STYLE
from engine.records import printable, read_examples
from engine.settings import OneLineParser
from rewards import same_answer
from toy.answerer import understand
from toy.scenes import read_truth

GALLERY = 12  # images
QUESTIONS = 2  # of an image and iteration
THUMBNAIL = 168  # pixels
Asked = tuple[Example, bool]  # a question with its votes, and whether it was kept
Points = list[tuple[int, float]]  # (step or iteration, value)


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


def read_questions(folder: Path, iterations: int) -> dict[int, list[Asked]]:
    """Iteration -> the questions that were proposed, and whether each stands in curated/.

    One that was proposed several times about an image is there once, with the votes it was kept with. Older
    runs have only what was kept.
    """

    def read(kind: str, k: int) -> list[Example] | None:
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


def well_formed(example: Example) -> bool:
    """Whether a question can be shown; its confidence may be unknown."""
    texts = [example.image, example.question, "" if example.label is None else example.label]
    votes = example.answers if isinstance(example.answers, list) and example.answers else [0]
    return all(isinstance(t, str) for t in texts) and all(v is None or isinstance(v, str) for v in votes)


def shown(value: object) -> str:
    """Anything as HTML: control characters and halves of characters are spelled out."""
    odd = "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return html.escape(re.sub(odd, lambda c: c[0].encode("unicode_escape").decode(), str(value)))


def finite(value: object) -> float | None:
    """A number that can be drawn, None for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


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

ACCURACIES = {"greedy": "greedy_accuracy", "sampled": "sampled_accuracy", "silver labels": "silver_accuracy"}
AGREEMENT = {"agreement": "base_agreement", "confidence": "probe_confidence"}
CHARTS = (  # title, phase, the curves and what each shows, whether these are shares
    ("Share that is right", "measure", ACCURACIES, True),
    ("Difficulty r_unc, first and last third of a phase", "questioner", {"r_unc": "r_unc"}, False),
    ("Questioner's reward", "questioner", {"reward": "reward", "penalty r_div": "r_div"}, False),
    ("Reasoner's reward", "reasoner", {"reward": "reward", "confidence": "confidence"}, False),
    ("Valid outputs", "questioner", {"valid questions": "validity"}, True),
    ("Distance from the start of the phase (KL)", "questioner", {"KL": "kl"}, False),
    ("The Reasoner's KL", "reasoner", {"KL": "kl"}, False),
    ("Different questions about an image", "questioner", {"clusters": "clusters"}, False),
    ("Largest cluster over all images", "questioner", {"share of all questions": "largest_cluster"}, True),
    ("Kinds of questions (entropy in bits)", "questioner", {"entropy": "kind_entropy"}, False),
    ("Agreement with the base", "measure", AGREEMENT, True),
    ("Curated questions", "curation", {"kept": "curated"}, False),
)


def number(record: dict, name: str) -> float | None:
    """The number under a name, "a/b" for record["a"]["b"]; None if there is none."""
    value = record
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return finite(value)


def phases(points: Points, starts: list[int]) -> list[Points]:
    """The points of each phase."""
    return [list(p) for _, p in groupby(points, key=lambda point: sum(point[0] >= start for start in starts))]


def thirds(points: Points, starts: list[int]) -> Points:
    """The means of each phase's first and last third, at its ends; single steps may fall where it rises."""
    ends = {}
    for phase in phases(points, starts):
        steps, values = zip(*phase)
        third = max(1, len(values) // 3)
        ends |= {steps[0]: sum(values[:third]) / third, steps[-1]: sum(values[-third:]) / third}
    return list(ends.items())


def chart(records: list[dict], title: str, phase: str, names: dict[str, str], share: bool, bands=None) -> str:
    """A curve for each name, over all steps of a training phase or over iterations; "" without any number."""
    mine, training = [r for r in records if r.get("phase") == phase], phase in ("questioner", "reasoner")
    places = [step if training else r["iteration"] for step, r in enumerate(mine, start=1)]
    starts = [i for i, r, before in zip(places[1:], mine[1:], mine) if r["iteration"] != before["iteration"]]
    curves = {}
    for label, name in names.items():
        points = [(i, number(r, name)) for i, r in zip(places, mine) if number(r, name) is not None]
        curves[label] = thirds(points, starts) if name == "r_unc" else points
    below = f"{phase.capitalize()} step" if training else "iteration"
    return plot(title, curves, below, starts if training else [], share, bands or {})


def plot(title: str, curves: dict[str, Points], below: str, starts: list, share: bool, bands: dict) -> str:
    """Curves that begin anew at `starts`, after a dashed line; shares from 0 to 1; named bands."""
    points = [point for points in curves.values() for point in points]
    if not points:
        return ""
    places, values = [place for place, _ in points], [value for _, value in points]
    values += [0, 1] if share else [edge for band in bands.values() for edge in band]
    x, y, drawn = scale(places, 62, 342), scale(values, 150, 10), ""
    for i, (bottom, top) in enumerate(bands.values()):
        area = f"M52 {y(bottom):.1f}H350V{y(top):.1f}H52"
        drawn += f'<path class="band" style="fill: var(--c{i % 4})" d="{area}"/>'
    for place in starts:
        drawn += f'<path class="dashed" d="M{x(place - 0.5):.1f} 10V150"/>'
    for i, points in enumerate(curves.values()):
        for phase in phases(points, starts):
            spots = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in phase)
            drawn += f'<polyline class="curve" style="stroke: var(--c{i % 4})" points="{spots}"/>'
        for place, value in points if len(points) < 4 * (len(starts) + 3) else ():
            drawn += f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3" style="fill: var(--c{i % 4})"/>'
    first, last, low, high = min(places), max(places), min(values), max(values)
    xs = {str(i): x(i) for i in (range(first, last + 1) if last - first < 9 else (first, last))}
    ys = {f"{value:.3g}": y(value) for value in (low, (low + high) / 2, high)}
    ys = {name: y(sum(band) / 2) for name, band in bands.items()} or ys
    told = [f"{name} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for name, p in curves.items() if p]
    keys = {name: f"c{i % 4}" for i, name in enumerate(curves)}
    return figure(title, xs, ys, below, drawn, keys if len(keys) > 1 else {}, "; ".join(told))


def scale(values: Iterable[float], start: float, end: float) -> Callable[[float], float]:
    """From the range of these values to the pixels start..end."""
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def figure(title: str, xs: dict, ys: dict, below: str, drawn: str, keys: dict[str, str], told: str) -> str:
    """A drawing in 52..350 by 10..150, with words along its axes, its colours' names, and itself in words."""
    words = [(x, 166, "middle", word) for word, x in xs.items()] + [(201, 184, "middle", below)]
    words += [(48, y + 4, "end", word) for word, y in ys.items()]
    drawn = '<path class="axis" d="M52 10V150H350M52 80H350"/>' + drawn
    for x, y, anchor, word in words:
        drawn += f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(word)}</text>'
    legend = ""
    for name, colour in keys.items():
        legend += f'<span class="key"><i style="background: var(--{colour})"></i>{html.escape(name)}</span> '
    caption, alt = html.escape(title), html.escape(f"{title}: {told}")
    picture = f'<svg viewBox="0 0 360 190" role="img" aria-label="{alt}">{drawn}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{picture}{legend}</figure>"


def histogram(title: str, asked: list[Asked]) -> str:
    """How often each confidence occurred, in tenths, and how many of these questions were kept."""
    known = [(e.confidence, kept) for e, kept in asked if finite(e.confidence) is not None]
    if not known:
        return ""
    tenths = [(min(10, max(0, int(10 * confidence + 0.5))), kept) for confidence, kept in known]
    everything, kept = Counter(i for i, _ in tenths), Counter(i for i, kept in tenths if kept)
    most, drawn = max(everything.values()), ""
    x, y = scale((0, 10), 70, 332), scale((0, most), 150, 10)
    for counts, colour in ((everything, "pale"), (kept, "c0")):  # what was kept, in front of all
        for i, count in sorted(counts.items()):
            place = f'x="{x(i) - 11:.1f}" y="{y(count):.1f}" width="22" height="{150 - y(count):.1f}"'
            drawn += f'<rect {place} style="fill: var(--{colour})"/>'
    xs, ys = {"0": x(0), "0.5": x(5), "1": x(10)}, {"0": y(0), str(most): y(most)}
    told = f"{sum(kept for _, kept in asked)} of {len(asked)} different questions are kept"
    return figure(title, xs, ys, "confidence", drawn, {"kept": "c0", "not kept": "pale"}, told)


def ladder(records: list[dict]) -> str:
    """Accuracy on each rung of the built-in world, and where curated questions stand; "" for other runs."""
    found = [r["sampled_by_objects"] for r in records if isinstance(r.get("sampled_by_objects"), dict)]
    rungs, drawn = {rung: re.findall(r"\d+", rung) for accuracies in found for rung in accuracies}, ""
    bands = {rung: (int(ends[0]) - 0.5, int(ends[-1]) + 0.5) for rung, ends in rungs.items() if ends}
    for title, kind in (("Accuracy by rung", "sampled"), ("Silver labels that are right, by rung", "silver")):
        names = {f"{rung} objects": f"{kind}_by_objects/{rung}" for rung in rungs}
        drawn += chart(records, title, "measure", names, True)
    objects = {"mean number of objects": "objects"}
    return drawn and drawn + chart(records, "Where curated questions stand", "measure", objects, False, bands)


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


def question_card(example: Example, kept: bool, fact) -> str:
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


def gallery(questions: dict[int, list[Asked]], folder: Path) -> str:
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

"""A report of a run that a person wants to look at: `python report.py runs/NAME` writes runs/NAME/report.html.

One page without network or scripts: what ran, the curves (drawn as SVG), and a gallery of images with their questions and votes,
side by side for the iterations. It reads the run's plain files and nothing else, so the run may still be going on.
"""

import argparse
import base64
import html
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from curate import Example, read_examples
from engine.images import ImageError, load_image
from engine.run import printable
from rewards import same_answer

GALLERY = 12  # images
QUESTIONS = 2  # of an image and iteration
THUMBNAIL = 168  # pixels
Truth = Callable[[Example], str | None]  # the true answer to a question, where it is known
Points = list[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark; --back: #fdfcf9; --ink: #22242a; --soft: #666a73; --line: #d9d6cd; --card: #ffffff;
  --c0: #1f6fb4; --c1: #c8571b; --c2: #2c8a57; --c3: #8a4fa3; --good: #1d7a46; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #17181c; --ink: #e9e7e1; --soft: #a4a7af; --line: #3a3c44; --card: #202228;
  --c0: #6fb3ee; --c1: #f09a5b; --c2: #6dcf9b; --c3: #cf9be6; --good: #6dcf9b; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } p, li { max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; } .warning { border-left: 4px solid var(--bad); padding: .2rem .8rem; margin: .5rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure, .image { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; margin: 0; min-width: 0; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke-width: 2; } .band { fill: var(--c2); opacity: .15; }
.key { display: inline-block; margin-right: .9rem; font-size: .85rem; color: var(--soft); } .key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .3rem; }
.image { margin: 1rem 0; display: grid; grid-template-columns: 168px 1fr; gap: 1rem; } @media (max-width: 45rem) { .image { grid-template-columns: 1fr; } }
.image img { width: 168px; max-width: 100%; border-radius: 4px; display: block; image-rendering: auto; }
.turns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 1rem; align-content: start; min-width: 0; }
.question { border-top: 1px solid var(--line); padding: .5rem 0; overflow-wrap: anywhere; } .turns h3 { margin: 0; font-size: .9rem; color: var(--soft); }
.vote { display: grid; grid-template-columns: 5.5rem 1fr 1.6rem; gap: .4rem; align-items: center; font-size: .85rem; }
.vote span:first-child { text-align: right; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar { height: .7rem; background: var(--line); border-radius: 2px; } .bar.label { background: var(--c0); }
.good { color: var(--good); } .bad { color: var(--bad); } details pre { overflow-x: auto; font-size: .8rem; }
"""


# ---- Reading a run -------------------------------------------------------------------------------------------------------


def read_records(folder: Path) -> list[dict]:
    """The records of metrics.jsonl; a last line that is being written is left out."""
    path, records = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def read_questions(folder: Path) -> dict[int, list[Example]]:
    """Iteration -> the questions that were proposed for curation; of an older run, those that were kept."""
    questions, number = {}, 1
    while True:
        for kind in ("candidates", "curated"):
            path = folder / kind / f"iteration-{number}.jsonl"
            try:
                questions[number] = read_examples(path)
                break
            except (OSError, ValueError, TypeError):
                continue  # not there yet, or being written
        else:
            return questions
        number += 1


def known_truth(folder: Path) -> Truth:
    """What the true answers are, for the built-in scenes; for other images nobody knows."""
    if not (folder / "images" / "scenes.jsonl").exists():
        return lambda example: None
    from toy.answerer import understand
    from toy.scenes import read_truth

    scenes = read_truth(folder / "images")

    def truth(example: Example) -> str | None:
        scene = scenes.get(Path(example.image).name)
        fact = understand(example.question, scene) if scene is not None else None
        return fact and fact.answer

    return truth


# ---- Charts --------------------------------------------------------------------------------------------------------------


def numbers(records: Sequence[dict], phase: str, name: str) -> Points:
    """(place among the records of the phase, value) of each that has the value."""
    mine = [r for r in records if r.get("phase") == phase]
    return [(i, float(r[name])) for i, r in enumerate(mine) if isinstance(r.get(name), int | float)]


def borders(records: Sequence[dict], phase: str) -> list[int]:
    """Where in a phase's records a new iteration begins."""
    iterations = [r["iteration"] for r in records if r.get("phase") == phase]
    return [i for i in range(1, len(iterations)) if iterations[i] != iterations[i - 1]]


def nice(value: float) -> str:
    return f"{value:.3g}"


def frame(title: str, keys: Sequence[str], body: str, alt: str) -> str:
    """A figure: its caption, its legend, its picture."""
    legend = "".join(
        f'<span class="key"><i style="background: var(--c{i})"></i>{html.escape(key)}</span>'
        for i, key in enumerate(keys)
    )
    picture = f'<svg viewBox="0 0 360 190" role="img" aria-label="{html.escape(alt)}">{body}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{picture}{legend if len(keys) > 1 else ''}</figure>"


def axes(low: float, high: float, left: str, right: str, below: str) -> str:
    """Two axes with their ends written beside them. The drawing area is 52..350 by 10..150."""
    texts = [
        (48, 14, "end", nice(high)),
        (48, 84, "end", nice((low + high) / 2)),
        (48, 150, "end", nice(low)),
    ]
    texts += [(52, 166, "start", left), (350, 166, "end", right), (201, 182, "middle", below)]
    marks = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for x, y, anchor, text in texts
    )
    return f'<path class="axis" d="M52 10 V150 H350 M52 80 H350" fill="none"/>{marks}'


def line_chart(
    title: str,
    curves: dict[str, Points],
    below: str,
    marked: Sequence[int] = (),
    first: int = 1,
    share: bool = False,
) -> str:
    """Curves over places 0, 1, ..., which are called first, first + 1, ...; `marked` places get a vertical line before them.

    share: the values are shares, so the axis goes from 0 to 1.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return f'<figure><figcaption>{html.escape(title)}</figcaption><p class="soft">Nothing to draw yet.</p></figure>'
    places, values = ([p[axis] for points in curves.values() for p in points] for axis in (0, 1))
    low, high, last = min(values), max(values), max(places)
    low, high = (0.0, 1.0) if share else (low, high) if high > low else (low - 0.5, high + 0.5)
    x = lambda place: 58 + 286 * place / max(1, last)  # noqa: E731
    y = lambda value: 150 - 140 * (value - low) / (high - low)  # noqa: E731
    body = axes(low, high, str(first), str(int(last) + first), below)
    body += "".join(
        f'<path class="axis" stroke-dasharray="3 3" d="M{x(m - 0.5):.1f} 10 V150"/>' for m in marked
    )
    for number, points in enumerate(curves.values()):
        path = " ".join(f"{'L' if i else 'M'}{x(p):.1f} {y(v):.1f}" for i, (p, v) in enumerate(points))
        body += f'<path class="curve" style="stroke: var(--c{number})" d="{path}"/>'
        for p, v in points if len(points) <= 12 else ():
            body += f'<circle cx="{x(p):.1f}" cy="{y(v):.1f}" r="3" style="fill: var(--c{number})"/>'
    told = "; ".join(
        f"{name} from {nice(points[0][1])} to {nice(points[-1][1])}" for name, points in curves.items()
    )
    return frame(title, list(curves), body, f"{title}: {told}")


def histogram(title: str, values: Sequence[float], low: float, high: float) -> str:
    """How often each confidence occurred, in tenths; the band that curation keeps is shaded."""
    counts = Counter(min(10, int(10 * value + 0.5)) for value in values)
    most = max(counts.values(), default=1)
    x = lambda value: 66 + 270 * value  # noqa: E731
    body = (
        axes(0, most, "", "", "confidence")
        + f'<rect class="band" x="{x(low):.1f}" y="10" width="{270 * (high - low):.1f}" height="140"/>'
    )
    body += "".join(f'<text x="{x(v):.0f}" y="166" text-anchor="middle">{v}</text>' for v in (0, 0.5, 1))
    for tenth, count in sorted(counts.items()):
        height = 140 * count / most
        body += f'<rect x="{x(tenth / 10) - 11:.1f}" y="{150 - height:.1f}" width="22" height="{height:.1f}" style="fill: var(--c0)"/>'
    inside = sum(low <= value <= high for value in values)
    return frame(
        title,
        [title],
        body,
        f"{title}: {inside} of {len(values)} questions are kept, with a confidence from {low} to {high}",
    )


def charts(records: Sequence[dict], questions: dict[int, list[Example]], config: dict) -> list[str]:
    """All figures of the page."""
    measured = {
        "greedy": "greedy_accuracy",
        "sampled": "sampled_accuracy",
        "silver labels": "silver_accuracy",
    }
    asked, answered = borders(records, "questioner"), borders(records, "reasoner")

    def of(phase: str, **names: str) -> dict[str, Points]:
        return {label.replace("_", " "): numbers(records, phase, name) for label, name in names.items()}

    shapes = {label: numbers(records, "measure", name) for label, name in measured.items()}
    made = (
        [line_chart("Share that is right", shapes, "iteration", first=0, share=True)]
        if any(shapes.values())
        else []
    )
    made += [
        line_chart(
            "Questioner's reward",
            of("questioner", reward="reward", difficulty_r_unc="r_unc", penalty_r_div="r_div"),
            "step",
            asked,
        ),
        line_chart(
            "Reasoner's reward", of("reasoner", reward="reward", confidence="confidence"), "step", answered
        ),
        line_chart(
            "Valid outputs",
            of("questioner", valid_questions="validity"),
            "Questioner step",
            asked,
            share=True,
        ),
        line_chart(
            "Distance from the start of the phase (KL)", of("questioner", KL="kl"), "Questioner step", asked
        ),
        line_chart("The Reasoner's KL", of("reasoner", KL="kl"), "Reasoner step", answered),
        line_chart(
            "Different questions about an image",
            of("questioner", clusters="clusters"),
            "Questioner step",
            asked,
        ),
        line_chart(
            "Variety over all images",
            of("questioner", largest_cluster="largest_cluster", kind_entropy="kind_entropy"),
            "Questioner step",
            asked,
        ),
        line_chart(
            "Agreement with the base",
            of("measure", agreement="base_agreement", confidence="probe_confidence"),
            "iteration",
            first=0,
            share=True,
        ),
        line_chart("Curated questions", of("curation", kept="curated"), "iteration"),
    ]
    band = float(config.get("tau_low", 0.25)), float(config.get("tau_high", 0.75))
    return made + [
        histogram(f"Difficulty, iteration {k}", [e.confidence for e in found], *band)
        for k, found in questions.items()
        if found
    ]


# ---- The gallery ---------------------------------------------------------------------------------------------------------


def thumbnail(path: str) -> str | None:
    """A small JPEG of an image as a data: URI, None if it cannot be read."""
    try:
        image = load_image(path)
    except ImageError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def chosen_images(questions: dict[int, list[Example]]) -> list[str]:
    """The images that most iterations asked about, in order of first appearance among these."""
    seen = Counter(image for found in questions.values() for image in {e.image: 0 for e in found})
    return sorted(seen, key=lambda image: -seen[image])[:GALLERY]


def question_card(example: Example, kept: bool, true_answer: str | None) -> str:
    """A question, its votes as bars, its label, its confidence, and whether the label is true where that is known."""
    votes: list[tuple[str, int]] = []
    for answer in example.answers:
        name = "no answer" if answer is None else answer
        place = next(
            (
                i
                for i, (other, _) in enumerate(votes)
                if answer is not None and other != "no answer" and same_answer(other, name) or other == name
            ),
            None,
        )
        votes = (
            [*votes, (name, 1)]
            if place is None
            else [(n, c + (i == place)) for i, (n, c) in enumerate(votes)]
        )
    lines = [f'<div class="question"><div>{html.escape(example.question)}</div>']
    for name, count in sorted(votes, key=lambda vote: -vote[1]):
        label = " label" if example.label is not None and name == example.label else ""
        bar = f'<div class="bar{label}" style="width: {100 * count / len(example.answers):.0f}%"></div>'
        lines.append(
            f'<div class="vote"><span title="{html.escape(name)}">{html.escape(name[:40])}</span>{bar}<span>{count}</span></div>'
        )
    verdict = ""
    if true_answer is not None and example.label is not None:
        good = same_answer(example.label, true_answer)
        verdict = f' · <span class="{"good" if good else "bad"}">{"✓ right" if good else f"✗ wrong, it is {html.escape(true_answer)}"}</span>'
    label = "none" if example.label is None else html.escape(example.label[:80])
    lines.append(
        f'<div class="soft">silver label {label} · confidence {example.confidence:.2f} · {"kept" if kept else "not kept"}{verdict}</div></div>'
    )
    return "".join(lines)


def gallery(questions: dict[int, list[Example]], config: dict, truth: Truth, folder: Path) -> str:
    """Images with the questions of each iteration side by side."""
    low, high, cards = float(config.get("tau_low", 0.25)), float(config.get("tau_high", 0.75)), []
    for path in chosen_images(questions):
        here = (
            path if Path(path).exists() else str(folder / "images" / Path(path).name)
        )  # a run's own scenes move with its folder
        source, name = thumbnail(here), html.escape(printable(Path(path).name))
        picture = (
            f'<img src="{source}" alt="{name}, an image of the run">'
            if source
            else '<p class="soft">The image can no longer be read.</p>'
        )
        turns = []
        for k, found in questions.items():
            about = [e for e in found if e.image == path][:QUESTIONS]
            shown = [
                question_card(e, e.label is not None and low <= e.confidence <= high, truth(e)) for e in about
            ]
            turns.append(
                f"<div><h3>Iteration {k}</h3>{''.join(shown) or '<p class=soft>Nothing was asked about it.</p>'}</div>"
            )
        cards.append(
            f'<div class="image"><div>{picture}<div class="soft">{name}</div></div><div class="turns">{"".join(turns)}</div></div>'
        )
    return "".join(cards) or '<p class="soft">No questions have been curated yet.</p>'


# ---- The page ------------------------------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """The whole report. Raises ValueError, with a sentence for the user, if the folder is not a run's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        iterations = int(config["iterations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not the folder of a run of loop.py (it has no readable config.json)"
        ) from error
    records, questions = read_records(folder), read_questions(folder)
    done = max((r["iteration"] for r in records if r.get("phase") == "measure"), default=0)
    state = (
        f"complete, {iterations} iterations"
        if done >= iterations
        else f"{done} of {iterations} iterations complete"
    )
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / "config.json").stat().st_mtime))
    model = "the toy of this repository" if config.get("model") is None else str(config["model"])
    images = "built-in scenes" if config.get("images") is None else str(config["images"])
    skipped = (
        (folder / "skipped.txt").read_text(encoding="utf-8", errors="replace")
        if (folder / "skipped.txt").exists()
        else ""
    )
    warnings = [
        f"iteration {r['iteration']}, {r['signature']}: {r['message']}"
        for r in records
        if r.get("phase") == "warning"
    ]
    minutes = sum(r.get("seconds") or 0 for r in records) / 60
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(printable(folder.name))}, a VisPlay run</title><style>{STYLE}</style></head><body>
<h1>{html.escape(printable(folder.resolve().name))}</h1>
<p>{state} · model: {html.escape(printable(model))} · images: {html.escape(printable(images))}</p>
<p class="soft">Settings of {began}; {minutes:.1f} minutes in steps and curation; {len(skipped.splitlines())} images skipped.</p>
{"".join(f'<p class="warning">{html.escape(w)}</p>' for w in warnings)}
<details><summary>All settings</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details>
{f"<details><summary>Skipped images</summary><pre>{html.escape(skipped[:20_000])}</pre></details>" if skipped else ""}
<h2>Curves</h2><p class="soft">Dashed lines: a new iteration. r_unc = 1 - |2c - 1| is largest where the Reasoner is torn; c is the share of its majority.
Shaded in the histograms: what curation keeps.</p>
<div class="charts">{"".join(charts(records, questions, config))}</div>
<h2>Questions and votes</h2><p class="soft">Each bar is an answer and how often the Reasoner gave it; the coloured one is the majority, the silver label. The
same image under each iteration: how the questions change, and how sure the Reasoner is.</p>
{gallery(questions, config, known_truth(folder), folder)}
</body></html>
"""


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 2: a wrong argument."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME")
    parser.add_argument("--out", type=Path, help="where the page goes (default: report.html in that folder)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    try:
        text = page(args.run)
        out.write_text(text, encoding="utf-8", errors="backslashreplace")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

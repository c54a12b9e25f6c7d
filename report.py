"""A report of a run, for people to look at: `python report.py runs/NAME` writes runs/NAME/report.html.

One page without network or scripts: what ran, what went wrong, its curves, the ladder of the built-in world,
images with their questions and votes, iteration beside iteration, and what the models wrote, step by step. It
reads plain files of that folder and no others: the run may still be going on, and its folder may come from
another machine. What models wrote is shown as text, whatever it is.
"""

import signal

if __name__ == "__main__":  # Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import html
import io
import json
import os
import re
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

import rewards
from answers import agrees, same_answer
from curate import VotedQuestion, pool
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
from measure.comparison import Compared, compare_runs
from measure.page import LADDER, PAGE, RELOAD, STYLE, draw_box
from toy.answerer import Fact, understand
from training.folder import read_examples
from training.images import ImageError, load_image
from training.scenes import Scene, read_truth
from training.settings import OneLineParser, printable, shorten
from training.terminal import prepare_output
from training.troubles import count_done, find_troubles, is_finished, mean_field

GALLERY = 12  # images
QUESTIONS = 2  # of an image and iteration
THUMBNAIL = 168  # pixels
SAMPLED_STEPS = 60  # whose samples are shown
SAMPLES_LENGTH = 1_500_000  # characters of the page: from here on no more samples are shown
SHOWN_EXAMPLES = 2  # of a step
SHOWN_OUTPUTS = 16  # of a sample
SHOWN_CHARACTERS = 2000  # of a text
FOLLOW_SECONDS = 20


# ---- Reading a run -----------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict:
    """Reads the run's settings. Raises ValueError, with a sentence, if the folder is not a run's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kinds = dict(iterations=int, tau_low=float, tau_high=float)
        return config | {name: kind(config[name]) for name, kind in kinds.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not the folder of a run: it has no readable config.json"
        ) from error


def read_records(folder: Path) -> list[dict]:
    """Reads the records of metrics.jsonl; leaves out a line that is being written, or is no record."""
    records = read_objects(folder / "metrics.jsonl")
    return [record for record in records if type(record.get("iteration")) is int]


def read_objects(path: Path) -> list[dict]:
    """Reads JSON lines; leaves out a line that is no object. The file may not be there."""
    objects = []
    for line in read_text(path).split("\n"):
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return only_dicts(objects)


def read_text(path: Path) -> str:
    """Reads a text file; "" if it is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def only_dicts(value: object) -> list[dict]:
    """Returns the dicts in a list; none if it is no list."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def read_questions(folder: Path, iterations: int) -> dict[int, list[Proposed]]:
    """Reads the questions that each iteration proposed, and whether each stands in curated/.

    One that was proposed several times about an image is there once, with all its votes. Older runs have only
    what was kept. An iteration that is not curated yet is not there.
    """
    questions = {}
    for k in range(1, iterations + 1):
        kept = read_well_formed(folder / "curated" / f"iteration-{k}.jsonl")
        if kept is None:
            continue
        candidates = read_well_formed(folder / "candidates" / f"iteration-{k}.jsonl") or []
        asked = {(e.image, e.question): (e, False) for e in pool(candidates)}
        asked |= {(e.image, e.question): (e, True) for e in kept}
        questions[k] = list(asked.values())
    return questions


def read_well_formed(path: Path) -> list[VotedQuestion] | None:
    """Reads the questions that can be shown; None from a file that is not there yet, or being written."""
    try:
        return [example for example in read_examples(path) if is_well_formed(example)]
    except (OSError, ValueError, TypeError):
        return None


def is_well_formed(example: VotedQuestion) -> bool:
    """Returns whether a question can be shown: a file may hold anything."""
    if not isinstance(example.image, str) or not isinstance(example.question, str):
        return False
    share = finite(example.confidence)
    if share is None or not 0 <= share <= 1:
        return False
    return bool(example.answers) and are_answers(example.answers) and are_answers([example.label])


def are_answers(value: object) -> bool:
    """Returns whether a value is a list of answers, None among them for what could not be parsed."""
    return isinstance(value, list) and all(a is None or isinstance(a, str) for a in value)


def read_samples(folder: Path) -> dict[tuple[int, str, int], list[dict]]:
    """Reads samples/: (iteration, phase, step) -> its examples, in the order of the run.

    `outputs` and `answers` of an example are lists of dicts. What is not, or is being written, is left out.
    """
    samples = {}
    for path in (folder / "samples").glob("iteration-*/*.jsonl"):
        place = re.search(r"iteration-(\d+)/(questioner|reasoner)-(\d+)\.jsonl$", path.as_posix())
        examples = []
        for line in read_objects(path):
            lists = {name: only_dicts(line.get(name)) for name in ("outputs", "answers")}
            if lists["outputs"]:
                examples.append(line | lists)
        if place and examples:
            samples[int(place[1]), place[2], int(place[3])] = examples
    return dict(sorted(samples.items()))


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
    label_of = {}
    for candidate in rewards.count_votes(answers):
        label_of |= dict.fromkeys(candidate.spellings, candidate.label)
    votes = Counter(label_of.get(answer, answer) for answer in answers)
    return votes.most_common()


def question_card(example: VotedQuestion, kept: bool, fact: Fact | None) -> str:
    """Shows a question, its votes as bars, its label, and whether that is true, where the fact is known."""
    label = example.label
    # A bar for each answer; a merged one names the spellings that leave something out: 5 cm = 5 (4)
    spellings = {each.label: each.spellings for each in rewards.count_votes(example.answers)}
    bars = ""
    for answer, count in count_votes(example.answers):
        written = spellings.get(answer, {})
        name = "no answer" if answer is None else escape(answer)
        for text, votes in written.items():
            if not same_answer(text, answer):
                name += escape(f" = {text} ({votes})")
        word = f"<i>{name}</i>" if answer is None else name  # an answer may read so
        kind = "bar label" if label in written else "bar"
        width = 100 * count / len(example.answers)
        bar = f'<div class="{kind}" style="width: {width:.0f}%"></div>'
        bars += (
            f'<div class="vote"><span title="{name}">{word}</span>{bar}<span>{count}</span></div>'
        )
    # A line of facts
    told = [escape(describe_label(label, example.confidence)), "kept" if kept else "not kept"]
    if fact is not None:
        told.insert(0, f"{len(fact.things)} to list")
        if label is not None and agrees(label, fact.answer):
            told.append('<span class="good">✓ right</span>')
        elif label is not None:
            told.append(f'<span class="bad">✗ wrong, it is {escape(fact.answer)}</span>')
    line = f'<div class="soft">{" · ".join(told)}</div>'
    return f'<div class="question"><div>{escape(example.question)}</div>{bars}{line}</div>'


def image_card(
    path: str, questions: dict[int, list[Proposed]], folder: Path, scene: Scene | None
) -> str:
    """Shows an image, with the questions of each iteration side by side, those that were kept first."""
    turns = ""
    for k, asked in questions.items():
        about = [(e, kept) for e, kept in asked if e.image == path]
        about.sort(key=lambda proposed: not proposed[1])
        cards = ""
        for example, kept in about[:QUESTIONS]:
            fact = understand(example.question, scene) if scene else None
            cards += question_card(example, kept, fact)
        turns += f"<div><h3>Iteration {k}</h3>{cards or 'Nothing was asked about it.'}</div>"
    return f'<div class="image">{small_picture(path, folder)}<div class="turns">{turns}</div></div>'


def small_picture(path: str, folder: Path) -> str:
    """Shows an image above its name."""
    name = escape(split_path(path)[-1][:200] or "?")
    source = thumbnail(find_picture(folder, path))
    shown = f"{name} can no longer be read."
    if source:
        shown = f'<img src="{source}" alt="{name}, an image of the run"><br>{name}'
    return f'<div class="soft">{shown}</div>'


def gallery(questions: dict[int, list[Proposed]], folder: Path) -> str:
    """Shows the images that most iterations asked about; "" without any."""
    iterations = Counter()  # image -> in how many it was asked about
    for asked in questions.values():
        images = dict.fromkeys(example.image for example, _ in asked)
        iterations.update(list(images))
    scenes = read_scenes(folder)
    cards = ""
    for path, _ in iterations.most_common(GALLERY):
        scene = scenes.get(split_path(path)[-1])
        cards += image_card(path, questions, folder, scene)
    return cards


# ---- What the models wrote ---------------------------------------------------------------------------------


def sample_list(samples: dict[tuple[int, str, int], list[dict]], folder: Path) -> str:
    """Shows the examples of steps, spread evenly over the run, each step to unfold; "" without any."""
    shown = ""
    for (k, phase, step), examples in spread(samples, SAMPLED_STEPS):
        name = f"Iteration {k}, {phase.capitalize()}, step {step}"
        examples = examples[:SHOWN_EXAMPLES]
        cards = "".join(sample_card(example, folder) for example in examples)
        outputs = chain.from_iterable(example["outputs"] for example in examples)
        reward = mean_field("reward", list(outputs))
        if reward is not None:
            name += f" · mean reward of these {reward:.2f}"
        shown += f"<details><summary>{name}</summary>{cards}</details>"
        if len(shown) > SAMPLES_LENGTH:
            shown += '<p class="soft">More are in samples/.</p>'
            break
    return shown


def spread(samples: dict, most: int) -> list:
    """Returns at most so many of the items, the first and the last among them, spread evenly."""
    items = list(samples.items())
    places = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[round(place)] for place in places]


def sample_card(example: dict, folder: Path) -> str:
    """Shows an example: its image, its outputs, and what each earned."""
    picture = small_picture(str(example.get("image")), folder)
    told = ""
    if "question" in example:
        told = f"<p>{escape(cut(example['question']))}</p>"
        told += f'<div class="soft">{escape(describe_vote(example))}</div>'
    told += "".join(map(output_text, example["outputs"][:SHOWN_OUTPUTS]))
    if example["answers"]:
        told += "<h3>The Reasoner, asked the first valid question</h3>"
        told += "".join(map(output_text, example["answers"][:SHOWN_EXAMPLES]))
    return f'<div class="sample">{picture}<div>{told}</div></div>'


def output_text(output: dict) -> str:
    """Shows an output as it was written, below a line of what became of it."""
    line = f'<div class="soft">{escape(describe_output(output))}</div>'
    return f'<div class="output">{line}<pre>{escape(cut(output.get("text")))}</pre></div>'


def describe_output(output: dict) -> str:
    """Says on a line what became of an output: whether it was valid, its votes, and what it earned."""
    told = []
    if output.get("invalid"):
        told.append(f"not valid: {cut(output['invalid'])}")
    if output.get("cut_off") is True:
        told.append("cut off at the length limit")
    if isinstance(output.get("answers"), list):
        told.append(describe_vote(output))
    if "answer" in output:
        answer = output["answer"]
        told.append("no answer" if answer is None else f"answer {cut(answer)}")
    for name in ("r_unc", "r_div", "reward", "advantage"):
        value = finite(output.get(name))
        if value is not None:
            told.append(f"{name} {value:.2f}")
    return " · ".join(told)


def describe_vote(voted: dict) -> str:
    """Says on a line how the Reasoner voted: the label, its confidence and the votes."""
    told = describe_label(voted.get("label"), voted.get("confidence"))
    answers = voted.get("answers")
    if answers and are_answers(answers):
        votes = [f"{'no answer' if a is None else cut(a)} x {n}" for a, n in count_votes(answers)]
        told += f" · votes: {', '.join(votes[:8])}"
    return told


def describe_label(label: object, confidence: object) -> str:
    """Says what the majority's answer is, and its share of the votes."""
    share = finite(confidence)
    told = f"silver label {'none' if label is None else cut(label)}"
    return f"{told} · confidence {'unknown' if share is None else format(share, '.2f')}"


def cut(value: object) -> str:
    """Returns a text for the page, without its middle if it is long."""
    return shorten(str(value), SHOWN_CHARACTERS)


def print_samples(folder: Path, count: int) -> None:
    """Prints examples of so many steps, spread evenly over the run."""
    samples = read_samples(folder)
    if not samples:
        print("no samples: the run has made no step, or had --samples 0")
    for (k, phase, step), examples in spread(samples, count):
        for example in examples:
            image = printable(str(example.get("image")))
            print(f"\n==== iteration {k}, {phase}, step {step}: {image}")
            if "question" in example:
                print(printable(f"{example['question']}   [{describe_vote(example)}]"))
            for output in example["outputs"] + example["answers"]:
                print_output(output)


def print_output(output: dict) -> None:
    """Prints an output as it was written, below a line of what became of it."""
    question = output.get("question") if "answer" in output else None
    asked = "" if question is None else f"the Reasoner, asked {cut(question)} · "
    print(printable(f"-- {asked}{describe_output(output)}"))
    for line in cut(output.get("text")).split("\n"):
        print(f"   {printable(line)}")


# ---- The page ----------------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """Returns the whole report. Raises ValueError, with a sentence, if the folder is not a run's."""
    config = read_config(folder)
    records = read_records(folder)
    questions = read_questions(folder, config["iterations"])
    finished = is_finished(records, config)
    # What ran
    minutes = sum(number(record, "seconds") or 0 for record in records) / 60
    state = (
        f"{tell_place(records, config)} · {minutes:.1f} minutes of work"
        f" · model: {config.get('model') or 'the toy of this repository'}"
        f" · images: {config.get('images') or 'built-in scenes'}"
        f"{'' if finished else ' · this page reloads itself'}"
    )
    skipped = read_text(folder / "skipped.txt")
    skips = len(skipped.splitlines())
    # The figures
    ladder = draw_ladder(records)
    charts = "".join(draw_chart(records, chart) for chart in CHARTS)
    charts = charts or say_none("Nothing to draw", finished)
    for k, asked in questions.items():
        title = f"Difficulty, iteration {k}"
        charts += draw_histogram(title, asked, config["tau_low"], config["tau_high"])
    return PAGE.format(
        name=escape(folder.resolve().name),
        style=STYLE,
        reload="" if finished else RELOAD,
        state=escape(state),
        troubles=draw_box("What went wrong", tell_troubles(records, config, skips)),
        settings=html.escape(json.dumps(config, indent=1)),
        skips=skips,
        skipped=escape(skipped[:20_000]),
        ladder=ladder and LADDER.format(charts=ladder),
        charts=charts,
        gallery=gallery(questions, folder) or say_none("No questions have been curated", finished),
        samples=sample_list(read_samples(folder), folder)
        or say_none("There are no samples", finished),
    )


def say_none(what: str, finished: bool) -> str:
    """Says that there is nothing: nothing yet, while the run goes on."""
    return f'<p class="soft">{what}{"" if finished else " yet"}.</p>'


def tell_place(records: list[dict], config: dict) -> str:
    """Says how far the run is: the iterations that are complete and, before the end, the last step."""
    done = count_done(records)
    told = f"iterations complete: {done} of {config['iterations']}"
    if is_finished(records, config):
        return told
    now = [record for record in records if record["iteration"] > done]
    steps = [r for r in now if r.get("phase") in ("questioner", "curation", "reasoner")]
    if not steps:
        return f"{told} · at the start of iteration {done + 1}"
    phase = steps[-1]["phase"]
    told += f" · iteration {steps[-1]['iteration']}"
    if phase == "curation":
        return f"{told}: curation is done"
    step = steps[-1].get("step")
    return f"{told}: {phase.capitalize()} step {step} of {config.get(f'{phase}_steps')}"


def tell_troubles(records: list[dict], config: dict, skipped: int) -> list[str]:
    """Says what went wrong: troubles of the records, images that were skipped, changes of the code."""
    troubles = find_troubles(records, config)
    if skipped:
        troubles.append(
            f"images that could not be used: {skipped}, listed below with the reasons: convert them to PNG "
            "or JPEG, or leave them out of --images"
        )
    codes = config.get("code")
    if isinstance(codes, list) and len(codes) > 1:
        troubles.append(f"{len(codes)} versions of the code made this run: see the settings")
    return troubles


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code. 0: done, 2: a wrong argument."""
    prepare_output()
    args = parse_arguments(argv)
    try:
        if args.samples:
            read_config(args.run[0])
            print_samples(args.run[0], args.samples)
            return 0
        if args.run[1:]:
            runs = [Compared(f.resolve().name, read_config(f), read_records(f)) for f in args.run]
            told, text = compare_runs(runs)
            print("\n".join(map(printable, told)))
        else:
            if args.follow:
                follow(args.run[0], args.out)
            text = page(args.run[0])
        args.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        return 2
    print(f"wrote {printable(str(args.out))} ({args.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the arguments; ends the program with code 2 and one sentence if one is wrong."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "run",
        type=Path,
        nargs="+",
        help="folder of a run, runs/NAME; several are compared: those that differ in the seed alone "
        "are one group",
    )
    add(
        "--out",
        type=Path,
        help="where the page goes (default: report.html in that folder, of several comparison.html beside "
        "the first)",
    )
    add(
        "--samples",
        type=int,
        metavar="N",
        help="print what the models wrote in N steps, and no page",
    )
    add(
        "--follow", action="store_true", help="write the page again and again until the run is over"
    )
    args = parser.parse_args(argv)
    if args.samples is not None and args.samples < 1:
        parser.error("--samples must be at least 1")
    if args.samples and (args.follow or args.out):
        parser.error("--samples prints, and writes no page: leave --follow and --out out")
    if args.run[1:] and (args.samples or args.follow):
        parser.error("--samples and --follow take one run")
    if args.out is None:
        several = args.run[0].parent / "comparison.html"
        args.out = several if args.run[1:] else args.run[0] / "report.html"
    inside = any(args.out.resolve().is_relative_to(run.resolve()) for run in args.run)
    if args.out.is_file() and args.out.suffix != ".html" and inside:
        parser.error(f"--out {args.out} is a file of the run itself")
    return args


def follow(folder: Path, out: Path) -> None:
    """Writes the page of a run again and again until the run is over. Raises ValueError and OSError."""
    out.write_text(page(folder), encoding="utf-8")
    print(f"writing {printable(str(out))} until the run is over", flush=True)
    while not is_finished(read_records(folder), read_config(folder)):
        time.sleep(FOLLOW_SECONDS)
        out.write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

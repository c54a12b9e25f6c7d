r"""Scores checkpoints on labelled visual questions: is the VLM better after self-play, and calibrated?

Each question is answered once greedily and m times at random. Of N questions, c_i samples of the i-th right:

    greedy_accuracy     share of greedy answers that are right      sampled_accuracy    mean of c_i / m
    majority_accuracy   share of majorities that are right          pass_at_m           share with c_i > 0
    confidence          mean share of the majority, the paper's c
    ece                 sum_b n_b / N |right_b - confidence_b|, over ten bins b of confidence

Every mean has a 95% interval by the bootstrap over images, as questions about one image (or about the same
set of images) are right or wrong together. Of several models each is compared with the first on the same
questions (a paired bootstrap, and McNemar's exact test, which takes questions as independent).

    python evaluate.py --model toy --model runs/x/reasoner --data runs/x/held-out/questions.jsonl

A line of the data is {"image": path, "question": text, "answer": text or list of texts that all count as
right}, and may have "choices" (a list; the answer is then a letter or the text of one), "kind" (scored
apart), and "question_id" and "figure_id" (see `pair_scores`). In place of "image" it may have "images", a
list of paths: the k-th stands where the question or its choices first say <image k>, else before the text.
How the paper's benchmarks become such lines is in docs/evaluation.md.
"""

import signal

from training.terminal import prepare_output

if __name__ == "__main__":  # during the imports, which take seconds, Ctrl-C leaves no traceback
    prepare_output()
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from measure.choices import read_choice
from measure.comparison import align_columns
from measure.items import Item, read_answer, right  # noqa: F401  other programs import them here
from measure.outcomes import Outcome, answer_all, judge_all, read_items
from measure.scores import compare, full_report, judge_scores
from model.checkpoint import find_device, find_weights, open_checkpoint
from model.vlm import VLM
from training.folder import replace_text
from training.log import quiet_libraries
from training.settings import OneLineParser, find_model, printable

chosen = read_choice  # its name in earlier versions


# ---- The scores ----


def score(outcomes: dict[str, list[Outcome]], with_judge: bool) -> dict[str, dict]:
    """Returns the report of each model, that of the second and later ones with a comparison to the first."""
    first = next(iter(outcomes.values()))
    reports = {}
    for name, answered in outcomes.items():
        reports[name] = full_report(answered)
        if with_judge:
            reports[name] |= judge_scores(answered)
        if answered is not first:
            reports[name]["against_first"] = compare(first, answered)
    return reports


Row = tuple[str, str, str]  # model; kind or name of a score; numbers


def table(reports: dict[str, dict]) -> str:
    """Returns as text the scores of all models, the comparisons with the first, and their calibration."""
    first = next(iter(reports))
    means = list(reports[first]["scores"]["all"]["intervals"])
    heads = [f"{name.removesuffix('_accuracy'):>18}" for name in means]
    rows: list[Row] = [("model", "kind", " ".join([f"{'n':>5}", *heads, f"{'ece':>6}"]))]
    for model, report in reports.items():
        rows += score_rows(model, report, means)
    for model, report in reports.items():
        rows += comparison_rows(model, report, first)
    for model, report in reports.items():
        rows += reliability_rows(model, report)
    # Names are not cut off: two might look the same then
    return "\n".join(align_columns([tuple(map(printable, row)) for row in rows]))


def comparison_rows(model: str, report: dict, first: str) -> list[Row]:
    """Returns a row for each mean: how it differs from that of the first model."""
    rows = []
    for name, change in report.get("against_first", {}).items():
        low, high = change["interval"]
        numbers = f"{change['difference']:>+8.3f} against {first} [{low:+.3f}, {high:+.3f}]"
        if "p" in change:
            p = change["p"]
            numbers += ", McNemar p < 0.0001" if p < 1e-4 else f", McNemar p = {p:.4f}"
        rows.append((model, name, numbers))
    return rows


def score_rows(model: str, report: dict, means: list[str]) -> list[Row]:
    """Returns a row for each kind, and for each score of a benchmark or the judge."""
    rows = []
    for kind, scores in report["scores"].items():
        cells = [f"{scores['questions']:>5}"]
        for name in means:
            low, high = scores["intervals"][name]
            cells.append(f"{scores[name]:.3f} [{low:.2f}, {high:.2f}]")
        cells.append(f"{scores['ece']:>6.3f}")
        rows.append((model, kind, " ".join(cells)))
    for name, value in report.items():
        if isinstance(value, float):
            rows.append((model, name, f"{value:>14.3f}"))
    return rows


def reliability_rows(model: str, report: dict) -> list[Row]:
    """Returns a row for each bin of confidence."""
    rows = []
    for row in report["reliability"]:
        name = f"confidence ({row['above']:.1f}, {row['upto']:.1f}]"
        found = f"mean {row['confidence']:.3f}, right {row['right']:.3f}"
        rows.append((model, name, f"{row['share']:>8.3f} of the questions, {found}"))
    return rows


# ---- The command line ----


def device(name: str) -> str:
    """Returns the name of a device that is there. Raises ArgumentTypeError for others."""
    try:
        known = find_device(name).type in ("cpu", "cuda")
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"there is no device {name} here, cpu and cuda are known")
    return name


def prove_writable(path: Path) -> None:
    """Raises OSError if a file cannot be written; leaves its content as it is."""
    path = path.resolve()  # of a link, which stays
    if path.is_fifo():  # opening a pipe would take its reader away
        return
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the arguments. Ends the program with code 2 and one sentence if one is wrong."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        help="folder or hub id, or toy; give it again to compare several",
    )
    add("--data", type=Path, required=True, help="labelled questions, JSON lines")
    add("--answers", type=int, default=10, help="sampled answers a question, m (default: 10)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (default: 1.0)")
    add("--top-p", type=float, default=0.99, help="nucleus sampling (default: 0.99)")
    add("--max-new-tokens", type=int, default=1024, help="longest answer in tokens (default: 1024)")
    add(
        "--max-pixels",
        type=int,
        default=802_816,
        help="larger images are scaled down (default: 802816)",
    )
    add("--seed", type=int, default=0, help="seed of the sampled answers (default: 0)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, float32 on cpu"
    )
    add(
        "--judge",
        help="checkpoint that judges, beside the rules, greedy answers to free-form questions",
    )
    add("--json", type=Path, help="write everything here, each answer too")
    args = parser.parse_args(argv)
    # Values; NaN fails these comparisons
    if args.answers < 1 or args.max_new_tokens < 1:
        parser.error("--answers and --max-new-tokens must be at least 1")
    if not 1e-6 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        parser.error("--temperature must be at least 0.000001, --top-p in (0, 1]")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be at least 0 and below 2^63")
    # The file that is written
    if args.json:
        if args.json.resolve() == args.data.resolve():
            parser.error("--json and --data are the same file")
        try:
            prove_writable(args.json)
        except OSError as error:
            parser.error(f"--json {args.json} cannot be written: {error.strerror}")
    return args


def answer_items(args: argparse.Namespace) -> Iterator[tuple[dict[str, list[Outcome]], bool]]:
    """Asks one model after the other, and the judge if there is one.

    Yields, after each, the outcomes so far, and if they are judged. Raises ValueError, OSError and
    RuntimeError.
    """
    items, skipped = read_items(args.data)
    for image, reason in skipped:
        print(f"skipped {printable(image)}: {printable(reason)}", file=sys.stderr)
    opened = {}
    for name in filter(None, [*args.model, args.judge]):  # before the first one answers for hours
        opened[name] = open_checkpoint(find_model(name))
        opened[name].check_max_pixels(args.max_pixels)
        find_weights(opened[name])
    outcomes = {}
    for name in dict.fromkeys(args.model):
        vlm = VLM.load(opened[name], args.device, args.dtype, args.max_pixels)
        outcomes[name] = answer_all(
            vlm,
            items,
            args.answers,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            generator=torch.Generator(vlm.device).manual_seed(args.seed),
        )
        del vlm  # before the next one is loaded
        yield outcomes, False
    if args.judge:
        judge = VLM.load(opened[args.judge], args.device, args.dtype, args.max_pixels)
        for answered in outcomes.values():
            judge_all(judge, answered, args.max_new_tokens)
        yield outcomes, True


def write_json(
    args: argparse.Namespace, outcomes: dict[str, list[Outcome]], reports: dict[str, dict]
) -> OSError | None:
    """Writes all there is into the file of --json, in one moment; returns the error if that fails."""
    answers = {}
    for name, answered in outcomes.items():
        answers[name] = [outcome.record() for outcome in answered]
    content = dict(settings=vars(args), reports=reports, answers=answers)
    text = json.dumps(content, default=str, indent=1) + "\n"
    path = args.json.resolve()  # of a link, which stays
    try:
        can_replace = path.is_file() and os.access(path.parent, os.W_OK)
        if can_replace or not path.exists():
            replace_text(path, text)
        else:  # a pipe, or a folder that is not the user's
            path.write_text(text)
    except OSError as error:
        return error
    return None


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code. What is answered by then is written and printed in any case.

    0: done, 1: interrupted, out of memory or nothing printed, 2: a wrong argument or input.
    """
    prepare_output()
    args = parse_arguments(argv)
    quiet_libraries()
    # Ask, and keep the answers of each model before the next one is asked.
    reports = {}
    failure = None  # of the file
    exit_code = 0
    told = ""
    try:
        for outcomes, is_judged in answer_items(args):
            reports = score(outcomes, is_judged)
            failure = write_json(args, outcomes, reports) if args.json else None
    except torch.OutOfMemoryError:
        less = "--max-new-tokens, --max-pixels or --answers"
        told = f"error: the GPU has too little memory: try a lower {less}\n"
        exit_code = 1
    except (ValueError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [repr(error)]
        told = f"error: {printable(lines[0])}\n"
        exit_code = 2
    except KeyboardInterrupt:
        told = f"interrupted; {'what was answered is kept' if reports else 'nothing is written'}\n"
        exit_code = 1
    # Print.
    if reports:
        print(table(reports))
    sys.stdout.flush()
    sys.stderr.write(told)
    if failure:  # a full disk: the table stands above
        sys.stderr.write(
            f"error: --json {printable(str(args.json))} cannot be written: {failure.strerror}\n"
        )
        return exit_code or 2
    unprinted = sys.stdout.failure
    if unprinted and not args.json:
        sys.stderr.write(f"error: the scores cannot be printed: {unprinted.strerror}\n")
        return exit_code or 1
    return exit_code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

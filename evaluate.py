r"""Scores checkpoints on labelled visual questions: is the VLM better after self-play, and rightly sure?

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

if __name__ == "__main__":  # during the imports, which take seconds, Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import math
import re
import string
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import reasoner
from answers import read_choice, read_yes_no
from engine.checkpoint import (
    check_max_pixels,
    check_weights,
    load_config,
    load_processors,
    resolve,
    token_side,
)
from engine.images import ImageError, load_image
from engine.intervals import bootstrap, mcnemar
from engine.item_prompts import batches, item_prompt, judge_prompt
from engine.items import Item, choices_of, read_answer, read_lines, right
from engine.records import printable
from engine.settings import OneLineParser
from engine.table import table
from generate import generate
from rewards import confidence
from vlm import VLM

chosen = read_choice  # its name in earlier versions
BINS = 10
LEAST_PIXELS = 28 * 28  # the smallest image token of any family; a checkpoint may want more
MEANS = ("greedy_accuracy", "sampled_accuracy", "majority_accuracy", "pass_at_m", "confidence")


@dataclass
class Outcome:
    """What a model answered to an item: once greedily, m times at random.

    judged: what the judge says of the greedy answer, None if it was not asked or not clear.
    """

    item: Item
    greedy: str | None
    samples: list[str | None]
    judged: bool | None = None

    @property
    def greedy_right(self) -> bool:
        """Whether the greedy answer is right."""
        return right(self.greedy, self.item)

    @cached_property
    def values(self) -> dict[str, float]:
        """What each of MEANS is the mean of."""
        label, share = confidence(self.samples)
        samples_right = [right(answer, self.item) for answer in self.samples]
        sampled = sum(samples_right) / len(samples_right)
        values = (self.greedy_right, sampled, right(label, self.item), any(samples_right), share)
        return dict(zip(MEANS, map(float, values)))

    def record(self) -> dict:
        """All of it, for --json."""
        return asdict(self) | {"greedy_right": self.greedy_right}


# ---- Asking ----


def question_text(item: Item) -> str:
    """The question, its choices as lettered lines, and its own ending or the Reasoner's instruction."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(string.ascii_uppercase, item.choices)]
    ending = f"\n{item.ending}" if item.ending else reasoner.INSTRUCTION
    return "\n".join([item.question, *lines]) + ending


def answer_all(vlm: VLM, items: Sequence[Item], samples: int, batch: int = 64, **sampling) -> list[Outcome]:
    """Asks every item once greedily and `samples` times at random; `sampling` goes to `generate.generate`.

    batch: the most images that are in memory at a time.
    """
    outcomes, parts = [], list(batches(items, batch))
    for part in tqdm(parts, desc="answering", leave=False, disable=None if len(parts) > 1 else True):
        some = items[part]
        prompts = [item_prompt(vlm, item, question_text(item)) for item in some]
        greedy = generate(vlm, prompts, 1, **sampling | {"temperature": 0.0})
        drawn = generate(vlm, prompts, samples, **sampling)
        for item, first, others in zip(some, greedy, drawn):
            answers = [read_answer(vlm.output_text(ids), item) for ids in first + others]
            outcomes.append(Outcome(item, answers[0], answers[1:]))
    return outcomes


def judge_all(judge: VLM, outcomes: Sequence[Outcome], max_new_tokens: int, batch: int = 64) -> None:
    """Asks a model whether the greedy answers to free-form questions are right, and sets `judged`."""
    free = [o for o in outcomes if not choices_of(o.item) and o.greedy is not None]
    for part in batches([o.item for o in free], batch):
        some = free[part]
        prompts = [judge_prompt(judge, o.item, o.greedy) for o in some]
        for outcome, (ids,) in zip(some, generate(judge, prompts, 1, max_new_tokens, temperature=0.0)):
            outcome.judged = read_yes_no(judge.output_text(ids))


# ---- Scores ----


def scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The means of MEANS, and `ece`."""
    means = {name: sum(o.values[name] for o in outcomes) / len(outcomes) for name in MEANS}
    bins = reliability(outcomes)
    return means | {"ece": sum(b["share"] * abs(b["right"] - b["confidence"]) for b in bins)}


def reliability(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Per bin of confidence that is not empty: its bounds (the upper one belongs to it), the share of
    questions in it, their mean confidence, and how many of their majorities are right."""
    bins: dict[int, list[dict]] = {}
    for values in (outcome.values for outcome in outcomes):
        bins.setdefault(max(0, math.ceil(round(values["confidence"] * BINS, 9)) - 1), []).append(values)
    table = []
    for number, members in sorted(bins.items()):
        sure, right = (
            sum(v[name] for v in members) / len(members) for name in ("confidence", "majority_accuracy")
        )
        bounds = dict(above=number / BINS, upto=(number + 1) / BINS)
        table.append(bounds | dict(share=len(members) / len(outcomes), confidence=sure, right=right))
    return table


def compare(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, dict]:
    """How much better the second model is than the first on the same questions: the difference of each mean
    with its interval, and for right-or-wrong answers McNemar's p."""
    result, images = {}, [outcome.item.image_set for outcome in first]
    for name in MEANS:
        a, b = ([outcome.values[name] for outcome in outcomes] for outcomes in (first, second))
        difference = [y - x for x, y in zip(a, b)]
        mean, interval = sum(difference) / len(difference), bootstrap(difference, images)
        result[name] = dict(difference=mean, interval=interval)
        if name in ("greedy_accuracy", "majority_accuracy"):
            result[name]["p"] = mcnemar([bool(x) for x in b], [bool(x) for x in a])
    return result


def pair_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """HallusionBench's scores of greedy answers (arXiv 2310.14566): aAcc of all questions; qAcc of questions
    that are right for each of their figures; fAcc of figures all of whose questions are right. {} without all
    ids."""
    if not outcomes or not all(o.item.question_id and o.item.figure_id for o in outcomes):
        return {}

    def all_right(key: Callable[[Item], str]) -> float:
        groups: dict[str, bool] = {}
        for o in outcomes:
            groups[key(o.item)] = groups.get(key(o.item), True) and o.greedy_right
        return sum(groups.values()) / len(groups)

    a_acc = sum(o.greedy_right for o in outcomes) / len(outcomes)
    q_acc, f_acc = all_right(lambda item: item.question_id), all_right(lambda item: item.figure_id)
    return dict(aAcc=a_acc, qAcc=q_acc, fAcc=f_acc)


def we_math(groups: Sequence[tuple[Sequence[bool], bool]]) -> dict[str, float]:
    """We-Math's metric (arXiv 2407.01284). A group: which of a problem's steps are right, and whether the
    whole problem is.

    Shares of the groups: IK (insufficient knowledge: a step and the whole are wrong), IG (inadequate
    generalisation: every step is right, the whole wrong), CM (complete mastery: all right), RM (rote memory:
    the whole is right without the steps). Strictly one wrong step makes it RM, loosely only all steps wrong.
    RM_rate is RM / (CM + RM), score is 1 - IG / 2 - IK - RM. {} without a group.
    """
    result = {}
    for how, known in (("strict", all), ("loose", any)) if groups else ():
        ways = [
            ("CM" if known(steps) else "RM") if whole else ("IG" if all(steps) else "IK")
            for steps, whole in groups
        ]
        share = {way: ways.count(way) / len(groups) for way in ("IK", "IG", "CM", "RM")}
        solved = share["CM"] + share["RM"]
        share["RM_rate"] = share["RM"] / solved if solved else 0.0
        share["score"] = 1 - share["IG"] / 2 - share["IK"] - share["RM"]
        result |= {f"{way} {how}": value for way, value in share.items()}
    return result


def we_math_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """`we_math` of greedy answers, where each kind is We-Math's key ("2steps_1", "2steps_multi") and each
    question_id names the problem. Problems without all their parts are left out. {} of other data."""
    problems: dict[tuple[str, str], dict[str, bool]] = {}
    for o in outcomes:
        key = re.fullmatch(r"([23])steps_([123]|multi)", o.item.kind)
        if not key or not o.item.question_id:
            return {}
        problems.setdefault((key[1], o.item.question_id), {})[key[2]] = o.greedy_right
    whole = [p for (steps, _), p in problems.items() if "multi" in p and len(p) == int(steps) + 1]
    return we_math([([right for part, right in p.items() if part != "multi"], p["multi"]) for p in whole])


def judge_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of the free-form questions with a clear verdict: their share of all, and how often it disagrees with
    the rules. Of these and those without an answer, which are wrong: how many the judge calls right."""
    judged = [o for o in outcomes if o.judged is not None]
    unanswered = [o for o in outcomes if o.greedy is None and not choices_of(o.item)]
    result = dict(judged=len(judged) / len(outcomes))
    if judged or unanswered:
        result["judged_right"] = sum(o.judged for o in judged) / len(judged + unanswered)
    if judged:
        result["judge_disagreement"] = sum(o.judged != o.greedy_right for o in judged) / len(judged)
    return result


def full_report(outcomes: Sequence[Outcome]) -> dict:
    """All scores, overall and per kind, with intervals."""
    report = {}
    for kind in ["all", *sorted({o.item.kind for o in outcomes} - {""})]:
        some = [o for o in outcomes if kind in ("all", o.item.kind)]
        images = [o.item.image_set for o in some]
        intervals = {name: bootstrap([o.values[name] for o in some], images) for name in MEANS}
        report[kind] = dict(questions=len(some), **scores(some), intervals=intervals)
    return dict(
        scores=report, reliability=reliability(outcomes), **pair_scores(outcomes), **we_math_scores(outcomes)
    )


# ---- The command line ----


def unreadable(item: Item) -> list[tuple[str, str]]:
    """Lists the first image of an item that cannot be read, with the reason; nothing if all can."""
    for image in item.images:
        try:
            load_image(image)
        except ImageError as error:
            return [(image, str(error))]
    return []


def read_items(path: Path) -> tuple[list[Item], list[tuple[str, str]]]:
    """Reads the items of a JSONL file, and (image, reason) for each with an image that cannot be read.

    Raises ValueError with a sentence, which names the line.
    """
    items, skipped = [], []
    for item in read_lines(path):
        bad = unreadable(item)
        skipped += bad
        if not bad:
            items.append(item)
    if not items:
        raise ValueError(f"--data {path} has no question whose image can be read")
    return items, skipped


def device(name: str) -> str:
    """The name of a device, if it is there; else raises ArgumentTypeError."""
    try:
        found = torch.device(name)
        known = found.type == "cpu" or found.type == "cuda" and (found.index or 0) < torch.cuda.device_count()
    except RuntimeError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"there is no device {name} here, cpu and cuda are known")
    return name


def prove_writable(path: Path) -> None:
    """Raises OSError if a file cannot be written; what is in it stays as it is."""
    path = path.resolve()  # of a link, which stays
    new = not path.exists()
    path.open("a").close()
    if new:
        path.unlink()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; ends the program with code 2 and one sentence if one is wrong."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--model", action="append", required=True, help="folder or hub id; give it again to compare several")
    add("--data", type=Path, required=True, help="labelled questions, JSON lines")
    add("--answers", type=int, default=10, help="sampled answers a question, m (default: 10)")
    add("--temperature", type=float, default=1.0, help="sampling temperature (default: 1.0)")
    add("--top-p", type=float, default=0.99, help="nucleus sampling (default: 0.99)")
    add("--max-new-tokens", type=int, default=1024, help="longest answer in tokens (default: 1024)")
    add("--max-pixels", type=int, default=802_816, help="larger images are scaled down (default: 802816)")
    add("--seed", type=int, default=0, help="seed of the sampled answers (default: 0)")
    add("--device", type=device, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, float32 on cpu")
    add("--judge", help="checkpoint that judges, beside the rules, greedy answers to free-form questions")
    add("--json", type=Path, help="write everything here, each answer too")
    args = parser.parse_args(argv)
    if args.answers < 1 or args.max_new_tokens < 1 or args.max_pixels < LEAST_PIXELS:
        parser.error(f"--answers and --max-new-tokens must be at least 1, --max-pixels {LEAST_PIXELS}")
    if not 1e-6 <= args.temperature < math.inf or not 0 < args.top_p <= 1:  # written so that NaN is wrong
        parser.error("--temperature must be at least 0.000001, --top-p in (0, 1]")
    if not 0 <= args.seed < 2**63:
        parser.error("--seed must be at least 0 and below 2^63")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: it must be a file in a folder that exists")
    if args.json and args.json.exists() and args.data.exists() and args.json.samefile(args.data):
        parser.error("--json and --data are the same file")
    if args.json:
        try:
            prove_writable(args.json)
        except OSError as error:
            parser.error(f"--json {args.json} cannot be written: {error.strerror}")
    return args


def answer_items(args: argparse.Namespace) -> dict[str, list[Outcome]]:
    """What each model answers, judged if there is a judge. Raises ValueError, OSError or RuntimeError."""
    items, skipped = read_items(args.data)
    for image, reason in skipped:
        print(f"skipped {printable(image)}: {printable(reason)}", file=sys.stderr)
    models = dict.fromkeys(args.model)
    for name in filter(None, [*models, args.judge]):  # before the first one answers for hours
        config, _ = load_config(name), load_processors(name)
        check_max_pixels(args.max_pixels, token_side(config))
        check_weights(resolve(name, weights=True), config.tie_word_embeddings)
    outcomes = {}
    for name in models:
        vlm = VLM.load(name, args.device, args.dtype, args.max_pixels)
        sampling = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
        generator = torch.Generator(vlm.device).manual_seed(args.seed)
        outcomes[name] = answer_all(vlm, items, args.answers, **sampling, generator=generator)
        del vlm  # before the next one is loaded
    if args.judge:
        judge = VLM.load(args.judge, args.device, args.dtype, args.max_pixels)
        for answered in outcomes.values():
            judge_all(judge, answered, args.max_new_tokens)
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 1: interrupted, 2: a wrong argument or input."""
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", module="PIL")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        outcomes = answer_items(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {printable((str(error).splitlines() or [repr(error)])[0])}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing is written\n")
        return 1
    reports, first = {}, next(iter(outcomes.values()))
    for name, answered in outcomes.items():
        reports[name] = full_report(answered) | (judge_scores(answered) if args.judge else {})
        if answered is not first:
            reports[name]["against_first"] = compare(first, answered)
    print(table(reports))
    if args.json:
        answers = {name: [outcome.record() for outcome in answered] for name, answered in outcomes.items()}
        content = dict(settings=vars(args), reports=reports, answers=answers)
        try:
            args.json.write_text(json.dumps(content, default=str, indent=1) + "\n")
        except OSError as error:  # a full disk: the table stands above
            sys.stderr.write(
                f"error: --json {printable(str(args.json))} cannot be written: {error.strerror}\n"
            )
            return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

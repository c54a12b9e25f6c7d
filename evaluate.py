r"""Scores checkpoints on labelled visual questions: is the VLM better after self-play, and is its confidence worth anything?

Each question is answered once greedily and m times at random. Over N questions, with c_i of the m samples of question i right,

    greedy_accuracy     share of greedy answers that are right              sampled_accuracy    mean of c_i / m
    majority_accuracy   share of majorities that are right                  pass_at_m           share of questions with c_i > 0
    confidence          mean share of the majority, the paper's c           ece                 sum_b n_b / N |right_b - confidence_b|

the last over ten bins b of confidence. Every mean has a 95% interval by the bootstrap over questions; of several models each is
compared with the first on the same questions (a paired bootstrap, and McNemar's exact test).

    python evaluate.py --model toy --model runs/x/reasoner --data runs/x/held-out/questions.jsonl --max-new-tokens 32

A line of the data is {"image": path, "question": text, "answer": text or list of texts that all count as right}, and may have
"choices" (a list; the answer is then a letter or the text of one), "kind" (scored apart), and "question_id" and "figure_id" (see
`pair_scores`). How the paper's benchmarks become such lines is in the README.
"""

import argparse
import json
import math
import string
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import reasoner
from answers import canonical, extract_answer, read_choice, same_answer, without_thinking
from engine.images import ImageError, load_image
from generate import generate
from rewards import confidence
from vlm import VLM

chosen = read_choice  # its name in earlier versions
RESAMPLES = 2000  # of the bootstrap
BINS = 10
MEANS = ("greedy_accuracy", "sampled_accuracy", "majority_accuracy", "pass_at_m", "confidence")
JUDGE = (
    "Question: {question}\nCorrect answer: {truth}\nGiven answer: {answer}\n"
    "Does the given answer say the same as the correct one? Answer with \\boxed{{yes}} or \\boxed{{no}}."
)


@dataclass(frozen=True)
class Item:
    """A question about an image with its true answer: all of `answer` count as right."""

    image: str
    question: str
    answer: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""
    question_id: str = ""
    figure_id: str = ""


@dataclass
class Outcome:
    """What a model answered to an item: once greedily, m times at random."""

    item: Item
    greedy: str | None
    samples: list[str | None]
    judged: bool | None = (
        None  # what the judge says of the greedy answer, None if it was not asked or not clear
    )

    @property
    def greedy_right(self) -> bool:
        return right(self.greedy, self.item)

    @property
    def samples_right(self) -> list[bool]:
        return [right(answer, self.item) for answer in self.samples]

    @property
    def majority(self) -> tuple[str | None, float]:
        return confidence(self.samples)

    def values(self) -> dict[str, float]:
        """What each of MEANS is the mean of."""
        label, share = self.majority
        of_samples = self.samples_right
        values = (
            self.greedy_right,
            sum(of_samples) / len(of_samples),
            right(label, self.item),
            any(of_samples),
            share,
        )
        return dict(zip(MEANS, map(float, values)))


# ---- Which answer is right -----------------------------------------------------------------------------------------------


def read_answer(text: str, item: Item) -> str | None:
    """The answer in what a model wrote: the content of its last box, of a multiple-choice question the letter."""
    answer = extract_answer(text)
    if not item.choices:
        return answer
    return read_choice(answer if answer is not None else without_thinking(text), item.choices)


def right(answer: str | None, item: Item) -> bool:
    """Whether an answer, as `read_answer` gives it, is right.

    Of a question without choices: equal to one of the true answers by `rewards.same_answer`, or the same number after rounding to
    two decimals (MMMU's rule for open questions).
    """
    if answer is None:
        return False
    if item.choices:
        return any(answer == read_choice(truth, item.choices) for truth in item.answer)
    return any(same_answer(answer, truth) or _same_rounded(answer, truth) for truth in item.answer)


def _same_rounded(a: str, b: str) -> bool:
    values = [canonical(a), canonical(b)]
    return not any(isinstance(value, str) for value in values) and round(values[0], 2) == round(values[1], 2)


# ---- Asking --------------------------------------------------------------------------------------------------------------


def question_text(item: Item) -> str:
    """The question, with its choices as lettered lines."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(string.ascii_uppercase, item.choices)]
    return "\n".join([item.question, *lines])


def answer_all(vlm: VLM, items: Sequence[Item], samples: int, batch: int = 64, **sampling) -> list[Outcome]:
    """Asks every item once greedily and `samples` times at random; `sampling` goes to `generate.generate`."""
    outcomes = []
    for start in tqdm(
        range(0, len(items), batch),
        desc="answering",
        leave=False,
        disable=None if len(items) > batch else True,
    ):
        some = items[start : start + batch]
        prompts = [reasoner.answer_prompt(vlm, load_image(item.image), question_text(item)) for item in some]
        greedy = generate(vlm, prompts, 1, **sampling | {"temperature": 0.0})
        drawn = generate(vlm, prompts, samples, **sampling)
        for item, (first,), group in zip(some, greedy, drawn):
            outcomes.append(
                Outcome(
                    item,
                    read_answer(vlm.decode(first), item),
                    [read_answer(vlm.decode(ids), item) for ids in group],
                )
            )
    return outcomes


def judge_all(judge: VLM, outcomes: Sequence[Outcome], max_new_tokens: int, batch: int = 64) -> None:
    """Lets a model decide whether the greedy answers to free-form questions are right; sets `judged` where its verdict is clear."""
    free = [o for o in outcomes if not o.item.choices and o.greedy is not None]
    for start in range(0, len(free), batch):
        some = free[start : start + batch]
        texts = [
            JUDGE.format(question=o.item.question, truth=" or ".join(o.item.answer), answer=o.greedy)
            for o in some
        ]
        prompts = [judge.prompt(text, load_image(o.item.image)) for text, o in zip(texts, some)]
        for outcome, (ids,) in zip(some, generate(judge, prompts, 1, max_new_tokens, temperature=0.0)):
            verdict = (extract_answer(judge.decode(ids)) or "").strip(" .").lower()
            outcome.judged = {"yes": True, "no": False}.get(verdict)


# ---- Scores --------------------------------------------------------------------------------------------------------------


def scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The means of MEANS, and `ece`."""
    values = [outcome.values() for outcome in outcomes]
    means = {name: sum(v[name] for v in values) / len(values) for name in MEANS}
    table = reliability(outcomes)
    return means | {"ece": sum(b["share"] * abs(b["right"] - b["confidence"]) for b in table)}


def reliability(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Per bin of confidence that is not empty: its bounds (upper one inclusive), the share of questions in it, their mean
    confidence, and how many of their majorities are right."""
    bins: dict[int, list[dict]] = {}
    for values in (outcome.values() for outcome in outcomes):
        bins.setdefault(max(0, math.ceil(round(values["confidence"] * BINS, 9)) - 1), []).append(values)
    table = []
    for number, members in sorted(bins.items()):
        mean = {
            name: sum(v[name] for v in members) / len(members) for name in ("confidence", "majority_accuracy")
        }
        bounds = dict(above=number / BINS, upto=(number + 1) / BINS)
        table.append(
            bounds
            | dict(
                share=len(members) / len(outcomes),
                confidence=mean["confidence"],
                right=mean["majority_accuracy"],
            )
        )
    return table


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean: the questions are drawn anew, with replacement, RESAMPLES times."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values, dtype=float)[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """McNemar's exact test (two-sided p): among the questions that only one of two models gets right, is it a fair coin which?"""
    only_ours, only_theirs = (
        sum(a and not b for a, b in zip(ours, theirs)),
        sum(b and not a for a, b in zip(ours, theirs)),
    )
    n, k = only_ours + only_theirs, min(only_ours, only_theirs)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def compare(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, dict]:
    """How much better the second model is than the first on the same questions: the difference of each mean with its interval,
    and for right-or-wrong answers McNemar's p."""
    result = {}
    for name in MEANS:
        a, b = ([outcome.values()[name] for outcome in outcomes] for outcomes in (first, second))
        difference = [y - x for x, y in zip(a, b)]
        result[name] = dict(difference=sum(difference) / len(difference), interval=bootstrap(difference))
        if name in ("greedy_accuracy", "majority_accuracy"):
            result[name]["p"] = mcnemar([bool(x) for x in b], [bool(x) for x in a])
    return result


def pair_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """HallusionBench's scores of greedy answers (arXiv 2310.14566): aAcc of all questions; qAcc of questions that are right for
    each of their figures; fAcc of figures all of whose questions are right. {} unless every item has both ids."""
    if not outcomes or not all(o.item.question_id and o.item.figure_id for o in outcomes):
        return {}

    def all_right(key: Callable[[Item], str]) -> float:
        groups: dict[str, bool] = {}
        for outcome in outcomes:
            groups[key(outcome.item)] = groups.get(key(outcome.item), True) and outcome.greedy_right
        return sum(groups.values()) / len(groups)

    a_acc = sum(o.greedy_right for o in outcomes) / len(outcomes)
    return dict(
        aAcc=a_acc, qAcc=all_right(lambda item: item.question_id), fAcc=all_right(lambda item: item.figure_id)
    )


def judge_scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Of the free-form questions that the judge gave a clear verdict on: their share of all, how many it calls right, and how
    often it disagrees with the rules."""
    judged = [o for o in outcomes if o.judged is not None]
    if not judged:
        return dict(judged=0.0)
    disagreement = sum(o.judged != o.greedy_right for o in judged) / len(judged)
    return dict(
        judged=len(judged) / len(outcomes),
        judged_right=sum(o.judged for o in judged) / len(judged),
        judge_disagreement=disagreement,
    )


def full_report(outcomes: Sequence[Outcome]) -> dict:
    """All scores, overall and per kind, with intervals."""
    kinds = {"all": list(outcomes)} | {
        kind: [o for o in outcomes if o.item.kind == kind]
        for kind in sorted({o.item.kind for o in outcomes} - {""})
    }
    report = {}
    for kind, some in kinds.items():
        intervals = {name: bootstrap([o.values()[name] for o in some]) for name in MEANS}
        report[kind] = dict(questions=len(some), **scores(some), intervals=intervals)
    return dict(scores=report, reliability=reliability(outcomes), **pair_scores(outcomes))


# ---- The command line ----------------------------------------------------------------------------------------------------


def read_items(path: Path) -> tuple[list[Item], list[tuple[str, str]]]:
    """The items of a JSONL file, and (image, reason) for each whose image cannot be read. Raises ValueError with a sentence."""
    items, skipped = [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--data {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line), path.parent)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--data {path}, line {number}: {error!r}; needed are image, question, answer"
            ) from error
        try:
            load_image(item.image)
            items.append(item)
        except ImageError as error:
            skipped.append((item.image, str(error)))
    if not items:
        raise ValueError(f"--data {path} has no question whose image can be read")
    return items, skipped


def _item(fields: dict, folder: Path) -> Item:
    answer, choices = fields["answer"], tuple(map(str, fields.get("choices") or ()))
    answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
    if len(choices) > 26 or (choices and not any(read_choice(a, choices) for a in answers)):
        raise ValueError(f"the answer {answer!r} is none of the choices")
    ids = {name: str(fields.get(name, "")) for name in ("kind", "question_id", "figure_id")}
    if ids["kind"] == "all":
        raise ValueError('the kind "all" is the name of the overall scores')
    return Item(str(folder / fields["image"]), str(fields["question"]), answers, choices, **ids)


def table(reports: dict[str, dict]) -> str:
    """The scores of all models side by side, as text."""
    lines = [
        f"{'model':<24} {'kind':<20} {'n':>5}"
        + "".join(f" {name.removesuffix('_accuracy'):>18}" for name in MEANS)
        + f" {'ece':>6}"
    ]
    for model, report in reports.items():
        for kind, s in report["scores"].items():
            cells = [
                f" {s[name]:.3f} [{s['intervals'][name][0]:.2f}, {s['intervals'][name][1]:.2f}]"
                for name in MEANS
            ]
            lines.append(
                f"{model[-24:]:<24} {kind[:20]:<20} {s['questions']:>5}"
                + "".join(cells)
                + f" {s['ece']:>6.3f}"
            )
        for name in ("aAcc", "qAcc", "fAcc", "judged", "judged_right", "judge_disagreement"):
            if name in report:
                lines.append(f"{model[-24:]:<24} {name:<20} {report[name]:>14.3f}")
        for b in report["reliability"]:
            where = f"confidence ({b['above']:.1f}, {b['upto']:.1f}]"
            lines.append(
                f"{model[-24:]:<24} {where:<20} {b['share']:>8.3f} of the questions, mean {b['confidence']:.3f}, right {b['right']:.3f}"
            )
        for name, c in report.get("against_first", {}).items():
            p = f", McNemar p = {c['p']:.4f}" if "p" in c else ""
            lines.append(
                f"{model[-24:]:<24} {name:<20} {c['difference']:>+8.3f} against the first [{c['interval'][0]:+.3f}, {c['interval'][1]:+.3f}]{p}"
            )
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        help="folder or hub id of a checkpoint; give it again to compare several",
    )
    parser.add_argument("--data", type=Path, required=True, help="labelled questions, JSON lines")
    parser.add_argument("--answers", type=int, default=10, help="sampled answers a question, m (default: 10)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default: 1.0)")
    parser.add_argument("--top-p", type=float, default=0.99, help="nucleus sampling (default: 0.99)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, help="longest answer in tokens (default: 1024)"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=802_816,
        help="larger images are scaled down to this (default: 802816)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled answers (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, float32 on cpu"
    )
    parser.add_argument(
        "--judge",
        help="checkpoint that judges the greedy answers to questions without choices, beside the rules",
    )
    parser.add_argument("--json", type=Path, help="write everything here, each answer too")
    args = parser.parse_args(argv)
    if (
        args.answers < 1
        or args.max_new_tokens < 1
        or args.max_pixels < 784
        or args.temperature <= 0
        or not 0 < args.top_p <= 1
    ):
        parser.error(
            "--answers and --max-new-tokens must be at least 1, --max-pixels 784, --temperature above 0, --top-p in (0, 1]"
        )
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json {args.json}: it must be a file in a folder that exists")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 1: interrupted, 2: a wrong argument or input."""
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", module="PIL")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        items, skipped = read_items(args.data)
        for image, reason in skipped:
            print(f"skipped {image}: {reason}", file=sys.stderr)
        outcomes = {}
        for name in dict.fromkeys(args.model):
            vlm = VLM.load(name, args.device, args.dtype, args.max_pixels)
            sampling = dict(
                max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
            )
            generator = torch.Generator(vlm.device).manual_seed(args.seed)
            outcomes[name] = answer_all(vlm, items, args.answers, **sampling, generator=generator)
            del vlm  # before the next one is loaded
        if args.judge:
            judge = VLM.load(args.judge, args.device, args.dtype, args.max_pixels)
            for answered in outcomes.values():
                judge_all(judge, answered, args.max_new_tokens)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch, of a device that is not there
        sys.stderr.write(f"error: {str(error).splitlines()[0]}\n")
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
        answers = {
            name: [asdict(o) | {"greedy_right": o.greedy_right} for o in answered]
            for name, answered in outcomes.items()
        }
        try:
            args.json.write_text(
                json.dumps(dict(settings=vars(args), reports=reports, answers=answers), default=str, indent=1)
                + "\n"
            )
        except OSError as error:  # a full disk: the table stands above
            sys.stderr.write(f"error: --json {args.json} cannot be written: {error}\n")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

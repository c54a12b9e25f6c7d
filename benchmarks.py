r"""Turns published benchmarks into questions for evaluate.py: `python benchmarks.py mathvista data/mv`.

OUT/questions.jsonl gets a line a question, in the format that evaluate.py describes, OUT/images/ the images.
One small function a benchmark reads a record, with its columns as published, or raises LeftOut with the
reason; what is left out is counted and said. Needs the package `datasets`, which nothing else here does.

NAME may also be a hub id of records with the columns problem, answer and images, as those of the official
evaluation (zli12321/...). vision-sr1-47k writes the paper's own images, for `loop.py --images OUT/images`.
docs/evaluation.md says what is left out of which benchmark, and how each is scored.
"""

import signal

if __name__ == "__main__":  # during the imports Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from answers import extract_answer
from measure.choices import read_choice
from measure.items import parse_item
from measure.published import LeftOut, list_images, load_records, write_images, write_questions
from training.settings import OneLineParser

# How the prompts of those end that do not leave room for steps.
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
LAST_LINE = (
    "Answer with the option letter from the given choices directly. The last line of your response should be "
    "of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options."
)
ONE_BOX = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple '
    'choice question, only one letter is allowed in the "\\boxed{}".'
)


# ---- Fields ----


def text_of(record: dict, name: str) -> str:
    """A field's text or number. Raises LeftOut if it has none."""
    value = record.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number and not (isinstance(value, str) and value.strip()):
        raise LeftOut(f"no {name}")
    return str(value).strip()


def optional(record: dict, name: str) -> str:
    """A field's text, "" if it has none."""
    try:
        return text_of(record, name)
    except LeftOut:
        return ""


_IMAGE = re.compile(r"<image ?(\d{0,3})>")


def without_marks(question: str) -> str:
    """A question without the places of its image: nothing at the ends of lines, "the image" elsewhere."""
    question = re.sub(r"[ \t]{0,3}<image ?\d?>[ \t]{0,3}(?=\n|$)", "", question.strip())
    question = re.sub(r"<image ?\d?>", "the image", re.sub(r"^<image ?\d?>", "", question)).strip()
    if not question:
        raise LeftOut("no question")
    return question


def list_of(record: dict, name: str) -> list[str]:
    """The texts in a field: a list, or the text of a Python list. Raises LeftOut for anything else."""
    values = record.get(name)
    if isinstance(values, str) and len(values) < 20_000:
        try:
            with warnings.catch_warnings():  # of backslashes, which formulas have
                warnings.simplefilter("ignore")
                values = ast.literal_eval(values.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise LeftOut(f"{name} is no list") from None
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, (str, int, float)) for v in values):
        raise LeftOut(f"{name} is no list")
    return [str(value).strip() for value in values]


def image_of(record: dict, name: str) -> object:
    """Returns the image in a field that should hold one. Raises LeftOut if there are several, or none."""
    images = list_images(record.get(name))
    if len(images) > 1:
        raise LeftOut("several images")
    return illustrated(images)["image"]


def illustrated(images: list) -> dict:
    """Returns the field `image` of a line, or `images` for several. Raises LeftOut if there is none."""
    if not images:
        raise LeftOut("no image")
    return dict(images=images) if len(images) > 1 else dict(image=images[0])


def with_marks(question: str, choices: list[str], numbers: Sequence[int]) -> tuple[str, list[str]]:
    """Renames the images in a question and its choices as a prompt does: <image 1>, <image 2>, ...

    numbers: those that the record gives its images. The n-th mark without a number is of the n-th image. A
    mark of no image becomes "the image". A single image needs no mark, as it stands first.
    """
    if len(numbers) == 1:
        return without_marks(question), choices
    if not re.sub(_IMAGE, "", question).strip():
        raise LeftOut("no question")
    names = {str(number): f"<image {place}>" for place, number in enumerate(numbers, start=1)}
    unnumbered = iter(names.values())

    def name(mark: re.Match) -> str:
        return names.get(mark[1], "the image") if mark[1] else next(unnumbered, "the image")

    question, *choices = (re.sub(_IMAGE, name, text) for text in (question, *choices))
    return question.strip(), choices


# ---- Choices that stand in a text ----

_LABEL = re.compile(r"\b(?:choices|options?)\s{0,4}:\s{0,4}", re.IGNORECASE)
_MARKS = (
    re.compile(r"(?<![^\W\d_])\(([A-Ja-j])\)\s{0,4}"),  # (a) 0.5 (b) 1, but not f(a)
    re.compile(r"(?:^|(?<=[\s,;:]))([A-Ja-j])[.:)]\s{0,4}"),  # A. Left, A: Left
)


def split_choices(text: str) -> tuple[str, list[str]]:
    """A text and the choices at its end: "Where? A. Left B. Right". The whole and [] if it has none."""
    labels = [*_LABEL.finditer(text)]
    for pattern in _MARKS:
        marks: list[re.Match] = []
        for mark in pattern.finditer(text, labels[-1].end() if labels else 0):
            is_smaller = mark[1] == "a" and marks and marks[0][1] == "A"
            if mark[1] in "Aa" and len(marks) < 2 and not is_smaller:
                marks = [mark]
            elif marks and mark[1] == chr(ord(marks[-1][1]) + 1):
                marks.append(mark)
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        choices = [text[mark.end() : end].strip(" \t\r\n,;") for mark, end in zip(marks, ends)]
        if len(choices) > 1 and all(choices):
            head = text[: labels[-1].start() if labels else marks[0].start()]
            return head.rstrip(), choices
    return text, []


def asked(question: str, answer: str) -> dict:
    """The fields question, answer and, if they can be split off and hold the answer, choices."""
    head, choices = split_choices(question)
    if head and choices and read_choice(answer, choices):
        return dict(question=head, answer=answer, choices=choices)
    return dict(question=question, answer=answer)


# ---- The benchmarks: a record in, a line out ----


def mmmu(record: dict) -> dict:
    """MMMU, and MMMU-Pro with 4 or 10 choices: one to seven images, which question and options name.

    Open questions have the text of a list of right answers.
    """
    found = [(n, image) for n in range(1, 8) for image in list_images(record.get(f"image_{n}"))]
    line = illustrated([image for _, image in found])
    question, answer = text_of(record, "question"), text_of(record, "answer")
    if answer == "?":
        raise LeftOut("its answer is not published")
    is_open = optional(record, "question_type") == "open"
    options = [] if is_open else list_of(record, "options")
    question, choices = with_marks(question, options, [n for n, _ in found])
    subject = re.fullmatch(r"[a-z]+_(\w+)_\d+", optional(record, "id"))
    kind = subject[1] if subject else optional(record, "subject") or optional(record, "subfield")
    line |= dict(question=question, answer=answer, kind=kind)
    if is_open:
        answers = list_of(record, "answer") if answer.startswith("[") else [answer]
        return line | dict(answer=answers, ending=WORD)
    return line | dict(choices=choices, ending=LETTER)


def mmmu_pro_vision(record: dict) -> dict:
    """MMMU-Pro, the question and its choices in the image."""
    answer = text_of(record, "answer")
    if not re.fullmatch("[A-J]", answer):
        raise LeftOut("the answer is no letter")
    question = "Answer the multiple-choice question in the image."
    line = dict(image=image_of(record, "image"), question=question, answer=answer, ending=LAST_LINE)
    return line | dict(kind=optional(record, "subject"))


def mathvista(record: dict) -> dict:
    """MathVista: `query` is the question behind a hint what kind of answer is wanted."""
    query, metadata = optional(record, "query") or text_of(record, "question"), record.get("metadata")
    kind = optional(metadata, "task") if isinstance(metadata, dict) else ""
    line = dict(image=image_of(record, "decoded_image"), question=query, answer=text_of(record, "answer"))
    line |= dict(kind=kind or optional(record, "question_type"))
    if record.get("choices"):
        return line | dict(question=query.partition("\nChoices:")[0], choices=list_of(record, "choices"))
    precision = optional(record, "precision")
    if optional(record, "answer_type") == "integer":
        line["precision"] = 0
    elif optional(record, "answer_type") == "float" and re.fullmatch(r"\d(\.0)?", precision):
        line["precision"] = int(precision[0])
    return line


def mathverse(record: dict) -> dict:
    """MathVerse: `query_cot` shows what a problem version may show, unlike `question_for_eval`."""
    query, answer = text_of(record, "query_cot"), text_of(record, "answer")
    is_choice = optional(record, "question_type") == "multi-choice"
    line = asked(query, answer) if is_choice else dict(question=query, answer=answer)
    return line | dict(image=image_of(record, "image"), kind=optional(record, "problem_version"))


def math_vision(record: dict) -> dict:
    """MATH-Vision; of some problems the choices stand in the image, and are then the bare letters."""
    question, answer = without_marks(text_of(record, "question")), text_of(record, "answer")
    choices = list_of(record, "options") if record.get("options") else []
    line = dict(question=question, answer=answer, choices=choices, ending=ONE_BOX)
    return line | dict(image=image_of(record, "decoded_image"), kind=optional(record, "subject"))


def we_math(record: dict) -> dict:
    """We-Math: `key` says which step of a problem this is, or the whole; `ID` which problem."""
    key, option = text_of(record, "key"), text_of(record, "option")
    if not re.fullmatch("[23]steps_(?:[123]|multi)", key):
        raise LeftOut("its key names no step")
    question = without_marks(text_of(record, "question")) + "\nOptions: " + option
    line = asked(question, text_of(record, "answer")) | dict(image=image_of(record, "image_path"))
    return line | dict(kind=key, question_id=text_of(record, "ID"))


def mmstar(record: dict) -> dict:
    """MMStar: the choices stand behind the question."""
    line = asked(without_marks(text_of(record, "question")), text_of(record, "answer"))
    return line | dict(image=image_of(record, "image"), kind=optional(record, "category"), ending=LETTER)


def hallusionbench(record: dict) -> dict:
    """HallusionBench, the questions with an image: the same question is asked of several figures."""
    if (truth := text_of(record, "gt_answer")) not in ("0", "1"):
        raise LeftOut("its gt_answer is neither 0 nor 1")
    image, question = image_of(record, "image"), text_of(record, "question")
    group = " ".join(text_of(record, name) for name in ("category", "subcategory", "set_id"))
    ids = {name: f"{group} {text_of(record, name)}" for name in ("question_id", "figure_id")}
    kind = text_of(record, "subcategory")
    return dict(image=image, question=question, answer=["no", "yes"][int(truth)], kind=kind, **ids)


def realworldqa(record: dict) -> dict:
    """RealWorldQA: the choices, and how to answer, stand behind the question."""
    question, mark, ending = text_of(record, "question").rpartition("\nPlease answer ")
    if not mark:
        question, ending = ending, ""
    line = asked(question.strip(), text_of(record, "answer"))
    return line | dict(image=image_of(record, "image"), ending=(mark + ending).strip())


def mm_vet(record: dict) -> dict:
    """MM-Vet: of answers that <OR> parts one is enough, of those that <AND> joins all must be said."""
    answers = [answer.strip() for answer in text_of(record, "answer").split("<OR>") if answer.strip()]
    capability = record.get("capability")
    parts = capability if isinstance(capability, list) else optional(record, "capability").split(",")
    line = dict(image=image_of(record, "image"), question=text_of(record, "question"), answer=answers)
    return line | dict(kind=",".join(str(part).strip() for part in parts))


def visnumbench(record: dict) -> dict:
    """VisNumBench: the choices are a list, its text, or "(a) 0.5 (b) 1"."""
    try:
        choices = [re.sub(r"^\(?[a-jA-J]\)\s*", "", choice) for choice in list_of(record, "option")]
    except LeftOut:
        head, choices = split_choices(text_of(record, "option"))
        if head or not choices:
            raise LeftOut("option is no list") from None
    question, answer = without_marks(text_of(record, "question")), text_of(record, "answer")
    line = dict(question=question, answer=answer, choices=choices, image=image_of(record, "image"))
    return line | dict(kind=optional(record, "task_class"))


def official(record: dict) -> dict:
    """The records of the official evaluation: problem, answer, images; the n-th <image> is the n-th one."""
    answer = text_of(record, "answer")
    images = list_images(record.get("images"))
    line = illustrated(images)
    question, _ = with_marks(text_of(record, "problem"), [], range(1, len(images) + 1))
    kind = optional(record, "file_name")
    return line | dict(question=question, answer=extract_answer(answer) or answer, kind=kind)


BENCHMARKS = {  # hub id, config, split, what reads a record
    "mmmu": ("lmms-lab-encoder/MMMU", None, "validation", mmmu),
    "mmmu-pro-4": ("MMMU/MMMU_Pro", "standard (4 options)", "test", mmmu),
    "mmmu-pro-10": ("MMMU/MMMU_Pro", "standard (10 options)", "test", mmmu),
    "mmmu-pro-vision": ("MMMU/MMMU_Pro", "vision", "test", mmmu_pro_vision),
    "mathvista": ("AI4Math/MathVista", None, "testmini", mathvista),
    "mathverse": ("CaraJ/MathVerse-lmmseval", None, "testmini", mathverse),
    "math-vision": ("MathLLMs/MathVision", None, "test", math_vision),
    "we-math": ("We-Math/We-Math", None, "testmini", we_math),
    "mmstar": ("Lin-Chen/MMStar", None, "val", mmstar),
    "hallusionbench": ("lmms-lab-encoder/HallusionBench", None, "image", hallusionbench),
    "realworldqa": ("lmms-lab-encoder/RealWorldQA", None, "test", realworldqa),
    "mm-vet": ("lmms-lab-encoder/MMVet", None, "test", mm_vet),
    "visnumbench": ("GML-FMGroup/VisNumBench", None, "train", visnumbench),
    "vision-sr1-47k": ("LMMs-Lab-Turtle/Vision-SR1-47K", None, "train", None),  # images only
}


def line_of(read: Callable[[dict], dict], record: object, boxed: bool = False) -> dict | str:
    """The line that a record becomes, its images still in it, or the reason why it becomes none.

    boxed: without the benchmark's own ending, so that evaluate.py asks for steps and a box.
    """
    if not isinstance(record, dict):
        return "it is no record"
    try:
        line = {
            name: value
            for name, value in read(record).items()
            if not (isinstance(value, (str, list)) and not value)
        }
        if boxed:
            line.pop("ending", None)
        truths = line["answer"] if isinstance(line.get("answer"), list) else [line.get("answer", "")]
        if "choices" in line and not any(read_choice(truth, line["choices"]) for truth in truths):
            return "the answer is none of the choices"
        paths = dict(images=["image"]) if "images" in line else dict(image="image")
        parse_item(line | paths, Path())
    except ValueError as error:  # what follows "but" is the value, and each has its own
        return str(error).partition(" but ")[0]
    return line


# ---- The command ----


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; ends the program with code 2 and one sentence if one is wrong."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=layout)
    names = ", ".join(BENCHMARKS)
    parser.add_argument("name", metavar="NAME", help=f"{names}, or a hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is written")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N questions")
    parser.add_argument("--boxed", action="store_true", help="ask for steps and a box, as the paper does")
    parser.add_argument("--source", help="another hub id, or a folder, with the same columns")
    parser.add_argument("--split", help="another split")
    args = parser.parse_args(argv)
    if args.name not in BENCHMARKS and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.name):
        parser.error(f"there is no benchmark {args.name!r}; there are {names}, and hub ids with a slash")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if (args.out / "questions.jsonl").exists():
        parser.error(f"{args.out / 'questions.jsonl'} is there already")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 1: interrupted, 2: a wrong argument or input."""
    args = parse_arguments(argv)
    source, config, split, read = BENCHMARKS.get(args.name, (args.name, None, None, official))
    if args.source and Path(args.source).is_dir():
        config, split = None, None
    limit = args.limit or math.inf
    try:
        records = load_records(args.source or source, config, args.split or split)
        args.out.mkdir(parents=True, exist_ok=True)
        if read is None:
            counts = write_images(records, args.out, limit)
        else:
            counts = write_questions((line_of(read, r, args.boxed) for r in records), args.out, limit)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {str(error).splitlines()[0]}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command begins again\n")
        return 1
    written = counts.pop("", 0)
    if read is None:
        print(f"records whose images are in {args.out}/images: {written}")
    else:
        print(f"questions in {args.out}/questions.jsonl: {written}")
    if counts:
        print(f"left out {counts.total()} of {counts.total() + written} records:")
        print("\n".join(f"{count:>8}  {reason}" for reason, count in counts.most_common()))
    if not written:
        sys.stderr.write(f"error: {args.source or source} has no record that can be used\n")
    return 0 if written else 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

r"""Turns published benchmarks into questions for evaluate.py: `python benchmarks.py mathvista data/mv`.

OUT/questions.jsonl gets a line a question, in the format that evaluate.py describes, OUT/images/ the images.
One small function a benchmark reads a record, with its columns as published, or raises LeftOut with the
reason. The command counts what is left out, and prints the reasons. It needs the package `datasets`, which
nothing else here does.

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
from measure.choices import read_choice, split_choices
from measure.items import parse_item
from measure.published import LeftOut, list_images, load_records, write_images, write_questions
from training.settings import OneLineParser
from training.terminal import prepare_output

# The ends of prompts; the first three leave no room for steps
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


# ---- Fields of a record ----


def read_text(record: dict, name: str) -> str:
    """Returns a field's text or number as text. Raises LeftOut if it has none."""
    value = record.get(name)
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number and not (isinstance(value, str) and value.strip()):
        raise LeftOut(f"no {name}")
    return str(value).strip()


def read_optional(record: dict, name: str) -> str:
    """Returns a field's text, "" if it has none."""
    try:
        return read_text(record, name)
    except LeftOut:
        return ""


def read_list(record: dict, name: str) -> list[str]:
    """Returns the texts in a field: a list, or the text of a Python list. Raises LeftOut for others."""
    values = record.get(name)
    if isinstance(values, str) and len(values) < 20_000:
        try:
            with warnings.catch_warnings():  # of backslashes, which formulas have
                warnings.simplefilter("ignore")
                values = ast.literal_eval(values.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            pass  # it stays a text
    is_list = isinstance(values, (list, tuple))
    if not is_list or not all(isinstance(value, (str, int, float)) for value in values):
        raise LeftOut(f"{name} is no list")
    return [str(value).strip() for value in values]


def read_image(record: dict, name: str) -> list[bytes]:
    """Returns the image in a field that should hold one, in a list. Raises LeftOut if there are several."""
    images = list_images(record.get(name))
    if len(images) > 1:
        raise LeftOut("several images")
    return images


# ---- Images in a text ----

_IMAGE = re.compile(r"<image ?(\d{0,3})>")


def remove_marks(question: str) -> str:
    """Removes the places of the image: nothing is left at the ends of lines, "the image" elsewhere.

    Raises LeftOut if there is no other text.
    """
    question = re.sub(r"[ \t]{0,3}<image ?\d?>[ \t]{0,3}(?=\n|$)", "", question.strip())
    question = re.sub(r"^<image ?\d?>", "", question)
    question = re.sub(r"<image ?\d?>", "the image", question).strip()
    if not question:
        raise LeftOut("no question")
    return question


def number_marks(
    question: str, choices: list[str], numbers: Sequence[int]
) -> tuple[str, list[str]]:
    """Renames the images in a question and its choices as a prompt does: <image 1>, <image 2>, ...

        numbers 2, 5    "<image 5> or <image 2>?"  ->  "<image 2> or <image 1>?"

    numbers: those that the record gives its images. The n-th mark without a number is of the n-th image. A
    mark of no image becomes "the image". A single image needs no mark, as it stands first. Raises LeftOut if
    the question is nothing but marks.
    """
    if len(numbers) == 1:
        return remove_marks(question), choices
    if not _IMAGE.sub("", question).strip():
        raise LeftOut("no question")
    names = {str(number): f"<image {place}>" for place, number in enumerate(numbers, start=1)}
    unnumbered = iter(names.values())

    def rename(mark: re.Match) -> str:
        if mark[1]:
            return names.get(mark[1], "the image")
        return next(unnumbered, "the image")

    question = _IMAGE.sub(rename, question).strip()
    return question, [_IMAGE.sub(rename, choice) for choice in choices]


def split_question(question: str, answer: str) -> dict:
    """Returns the fields question, answer and, if they can be split off and hold the answer, choices."""
    head, choices = split_choices(question)
    if head and choices and read_choice(answer, choices):
        return dict(question=head, answer=answer, choices=choices)
    return dict(question=question, answer=answer)


# ---- The benchmarks: a record in, a line out; its image is in the column "image", unless they say where ----


def mmmu(record: dict) -> dict:
    """Reads MMMU, and MMMU-Pro with 4 or 10 choices: one to seven images, which question and options name.

    Open questions have the text of a list of right answers.
    """
    images = []
    numbers = []
    for number in range(1, 8):
        for image in list_images(record.get(f"image_{number}")):
            images.append(image)
            numbers.append(number)
    question = read_text(record, "question")
    answer = read_text(record, "answer")
    if answer == "?":
        raise LeftOut("its answer is not published")
    is_open = read_optional(record, "question_type") == "open"
    options = [] if is_open else read_list(record, "options")
    question, choices = number_marks(question, options, numbers)
    subject = re.fullmatch(r"[a-z]+_(\w+)_\d+", read_optional(record, "id"))
    kind = subject[1] if subject else read_optional(record, "subject")
    kind = kind or read_optional(record, "subfield")
    line = dict(images=images, question=question, answer=answer, kind=kind)
    if not is_open:
        return line | dict(choices=choices, ending=LETTER)
    answers = read_list(record, "answer") if answer.startswith("[") else [answer]
    return line | dict(answer=answers, ending=WORD)


def mmmu_pro_vision(record: dict) -> dict:
    """Reads MMMU-Pro with the question and its choices in the image."""
    answer = read_text(record, "answer")
    if not re.fullmatch("[A-J]", answer):
        raise LeftOut("the answer is no letter")
    return dict(
        question="Answer the multiple-choice question in the image.",
        answer=answer,
        ending=LAST_LINE,
        kind=read_optional(record, "subject"),
    )


def mathvista(record: dict) -> dict:
    """Reads MathVista: `query` is the question behind a hint what kind of answer is wanted."""
    query = read_optional(record, "query") or read_text(record, "question")
    metadata = record.get("metadata")
    task = read_optional(metadata, "task") if isinstance(metadata, dict) else ""
    line = dict(
        images=read_image(record, "decoded_image"),
        question=query,
        answer=read_text(record, "answer"),
        kind=task or read_optional(record, "question_type"),
    )
    if record.get("choices"):
        line["question"] = query.partition("\nChoices:")[0]
        return line | dict(choices=read_list(record, "choices"))
    answer_type = read_optional(record, "answer_type")
    precision = read_optional(record, "precision")
    if answer_type == "integer":
        line["precision"] = 0
    elif answer_type == "float" and re.fullmatch(r"\d(\.0)?", precision):
        line["precision"] = int(precision[0])
    return line


def mathverse(record: dict) -> dict:
    """Reads MathVerse: `query_cot` shows what a problem version may show, unlike `question_for_eval`."""
    query = read_text(record, "query_cot")
    answer = read_text(record, "answer")
    line = dict(question=query, answer=answer)
    if read_optional(record, "question_type") == "multi-choice":
        line = split_question(query, answer)
    return line | dict(kind=read_optional(record, "problem_version"))


def math_vision(record: dict) -> dict:
    """Reads MATH-Vision; of some problems the choices stand in the image, and are then the bare letters."""
    return dict(
        question=remove_marks(read_text(record, "question")),
        answer=read_text(record, "answer"),
        choices=read_list(record, "options") if record.get("options") else [],
        ending=ONE_BOX,
        images=read_image(record, "decoded_image"),
        kind=read_optional(record, "subject"),
    )


def we_math(record: dict) -> dict:
    """Reads We-Math: `key` says which step of a problem this is, or the whole; `ID` which problem."""
    key = read_text(record, "key")
    option = read_text(record, "option")
    if not re.fullmatch("[23]steps_(?:[123]|multi)", key):
        raise LeftOut("its key names no step")
    question = remove_marks(read_text(record, "question"))
    line = split_question(f"{question}\nOptions: {option}", read_text(record, "answer"))
    return line | dict(
        images=read_image(record, "image_path"),
        kind=key,
        question_id=read_text(record, "ID"),
    )


def mmstar(record: dict) -> dict:
    """Reads MMStar: the choices stand behind the question."""
    question = remove_marks(read_text(record, "question"))
    line = split_question(question, read_text(record, "answer"))
    return line | dict(kind=read_optional(record, "category"), ending=LETTER)


def hallusionbench(record: dict) -> dict:
    """Reads HallusionBench, the questions with an image: the same question is asked of several figures."""
    truth = read_text(record, "gt_answer")
    if truth not in ("0", "1"):
        raise LeftOut("its gt_answer is neither 0 nor 1")
    group = " ".join(read_text(record, name) for name in ("category", "subcategory", "set_id"))
    return dict(
        question=read_text(record, "question"),
        answer="yes" if truth == "1" else "no",
        kind=read_text(record, "subcategory"),
        question_id=f"{group} {read_text(record, 'question_id')}",
        figure_id=f"{group} {read_text(record, 'figure_id')}",
    )


def realworldqa(record: dict) -> dict:
    """Reads RealWorldQA: the choices, and how to answer, stand behind the question."""
    text = read_text(record, "question")
    question, mark, ending = text.partition("\nPlease answer ")
    line = split_question(question.strip(), read_text(record, "answer"))
    return line | dict(ending=(mark + ending).strip())


def mm_vet(record: dict) -> dict:
    """Reads MM-Vet: of answers that <OR> parts one is enough, of those that <AND> joins all must be said."""
    answers = [answer.strip() for answer in read_text(record, "answer").split("<OR>")]
    capabilities = record.get("capability")
    if not isinstance(capabilities, list):
        capabilities = read_optional(record, "capability").split(",")
    return dict(
        question=read_text(record, "question"),
        answer=[answer for answer in answers if answer],
        kind=",".join(str(capability).strip() for capability in capabilities),
    )


def visnumbench(record: dict) -> dict:
    """Reads VisNumBench: the choices are a list, its text, or "(a) 0.5 (b) 1"."""
    try:
        choices = [
            re.sub(r"^\(?[a-jA-J]\)\s*", "", choice) for choice in read_list(record, "option")
        ]
    except LeftOut:
        head, choices = split_choices(read_text(record, "option"))
        if head or not choices:
            raise LeftOut("option is no list") from None
    return dict(
        question=remove_marks(read_text(record, "question")),
        answer=read_text(record, "answer"),
        choices=choices,
        kind=read_optional(record, "task_class"),
    )


def official(record: dict) -> dict:
    """Reads the official evaluation: problem, answer, images; the n-th <image> is the n-th of these."""
    answer = read_text(record, "answer")
    images = list_images(record.get("images"))
    numbers = range(1, len(images) + 1)
    question, _ = number_marks(read_text(record, "problem"), [], numbers)
    return dict(
        images=images,
        question=question,
        answer=extract_answer(answer) or answer,
        kind=read_optional(record, "file_name"),
    )


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


def convert(read: Callable[[dict], dict], record: object, boxed: bool = False) -> dict | str:
    """Returns the line that a record becomes, its images still in it, or the reason why it becomes none.

    boxed: without the benchmark's own ending, so that evaluate.py asks for steps and a box.
    """
    if not isinstance(record, dict):
        return "it is no record"
    try:
        line = read(record)
        if "images" not in line:
            line["images"] = read_image(record, "image")
        if not line["images"]:
            raise LeftOut("no image")
        line = {name: value for name, value in line.items() if value not in ("", [])}
        if boxed:
            line.pop("ending", None)
        # The checks of evaluate.py, of which the images are no matter here
        parse_item(line | dict(images=["image"]), Path())
    except ValueError as error:
        # What follows "but" is the value, and each record has its own
        return str(error).partition(" but ")[0]
    return line


# ---- The command ----


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the arguments. Ends the program with code 2 and one sentence if one is wrong."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=layout)
    names = ", ".join(BENCHMARKS)
    parser.add_argument("name", metavar="NAME", help=f"{names}, or a hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is written")
    parser.add_argument(
        "--limit", type=int, default=math.inf, metavar="N", help="stop after N questions"
    )
    parser.add_argument(
        "--boxed", action="store_true", help="ask for steps and a box, as the paper does"
    )
    parser.add_argument("--source", help="another hub id, or a folder, with the same columns")
    parser.add_argument("--split", help="another split")
    args = parser.parse_args(argv)
    if args.name not in BENCHMARKS and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.name):
        parser.error(
            f"there is no benchmark {args.name!r}; there are {names}, and hub ids with a slash"
        )
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    if (args.out / "questions.jsonl").exists():
        parser.error(f"{args.out / 'questions.jsonl'} is there already")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0 done, 1 interrupted, 2 a wrong argument or input."""
    prepare_output()
    args = parse_arguments(argv)
    published, config, split, read = BENCHMARKS.get(args.name, (args.name, None, None, official))
    source = args.source or published
    if args.source and Path(args.source).is_dir():
        config = split = None
    try:
        records = load_records(source, config, args.split or split)
        if read is None:
            counts = write_images(records, args.out, args.limit)
        else:
            lines = (convert(read, record, args.boxed) for record in records)
            counts = write_questions(lines, args.out, args.limit)
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
        print(f"records left out: {counts.total()} of {counts.total() + written}")
    for reason, count in counts.most_common():
        print(f"{count:>8}  {reason}")
    if not written:
        sys.stderr.write(f"error: {source} has no record that can be used\n")
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

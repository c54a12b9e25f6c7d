"""Outcomes: a model's answers to labelled questions, read and judged."""

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from tqdm import tqdm

import reasoner
from measure.choices import read_yes_no
from measure.items import Item, find_choices, read_answer, read_lines, right
from model.generate import generate
from model.prompt import Patches, Prompt
from model.vlm import VLM
from rewards import confidence
from training.images import LONGEST_NAME
from training.pixels import ImageError, load_image
from training.settings import shorten

# The numbers of each question that are averaged
MEANS = ("greedy_accuracy", "sampled_accuracy", "majority_accuracy", "pass_at_m", "confidence")


JUDGE = (
    "Question: {question}\nCorrect answer: {truth}\nGiven answer: {answer}\n"
    "Does the given answer say the same as the correct one? Answer with \\boxed{{yes}} or \\boxed{{no}}."
)


@dataclass
class Outcome:
    """A model's answers to an item: one greedy answer, and m sampled ones."""

    item: Item
    greedy: str | None
    samples: list[str | None]
    judged: bool | None = None  # the judge's verdict on the greedy answer; None: not clear

    @property
    def greedy_right(self) -> bool:
        """True if the greedy answer is right."""
        return right(self.greedy, self.item)

    @cached_property
    def values(self) -> dict[str, float]:
        """MEANS of this question alone."""
        label, share = confidence(self.samples)
        samples_right = [right(answer, self.item) for answer in self.samples]
        return {
            "greedy_accuracy": float(self.greedy_right),
            "sampled_accuracy": sum(samples_right) / len(samples_right),
            "majority_accuracy": float(right(label, self.item)),
            "pass_at_m": float(any(samples_right)),
            "confidence": share,
        }

    def record(self) -> dict:
        """Returns all fields and `greedy_right`, for --json."""
        return asdict(self) | {"greedy_right": self.greedy_right}


def read_items(path: Path, flag: str = "--data") -> tuple[list[Item], list[tuple[str, str]]]:
    """Reads the items of a JSONL file, and (image, reason) for each with an image that cannot be read.

    flag: what named the file. Raises ValueError with a sentence, which names the line.
    """
    items = []
    skipped = []
    check = lru_cache(None)(check_image)  # each image is read once
    for item in read_lines(path, flag):
        bad = next((image for image in item.images if check(image)), None)
        if bad is None:
            items.append(item)
        else:
            skipped.append((shorten(bad, LONGEST_NAME), check(bad)))
    if not items:
        raise ValueError(f"{flag} {path} has no question whose image can be read")
    return items, skipped


def check_image(path: str) -> str | None:
    """Returns why an image cannot be read, None if it can."""
    try:
        load_image(path)
    except ImageError as error:
        return str(error)
    return None


def answer_all(
    vlm: VLM,
    items: Sequence[Item],
    samples: int,
    batch: int = 64,
    instruction: str | None = None,
    **sampling,
) -> list[Outcome]:
    """Asks every item once greedily and `samples` times at random; `sampling` goes to `generate.generate`.

    batch: the most images that are in memory at a time. instruction: see `question_text`.
    """
    parts = list(batches(items, batch))
    read = image_reader(vlm, batch)
    outcomes = []
    # The bar hides where there is no terminal, and where it would have one step
    for part in tqdm(
        parts, desc="answering", leave=False, disable=None if len(parts) > 1 else True
    ):
        some = items[part]
        texts = [question_text(item, instruction) for item in some]
        prompts = [item_prompt(vlm, item, text, read) for item, text in zip(some, texts)]
        greedy = generate(vlm, prompts, 1, **sampling | {"temperature": 0.0})
        sampled = generate(vlm, prompts, samples, **sampling)
        for item, first, others in zip(some, greedy, sampled):
            answers = [read_answer(vlm.output_text(ids), item) for ids in first + others]
            outcomes.append(Outcome(item, answers[0], answers[1:]))
    return outcomes


def judge_all(
    judge: VLM, outcomes: Sequence[Outcome], max_new_tokens: int, batch: int = 64
) -> None:
    """Asks a model whether the greedy answers to free-form questions are right, and sets `judged`."""
    read = image_reader(judge, batch)
    free_form = [o for o in outcomes if not find_choices(o.item) and o.greedy is not None]
    for part in batches([o.item for o in free_form], batch):
        some = free_form[part]
        prompts = [judge_prompt(judge, o.item, o.greedy, read) for o in some]
        verdicts = generate(judge, prompts, 1, max_new_tokens, temperature=0.0)
        for outcome, (ids,) in zip(some, verdicts):
            outcome.judged = read_yes_no(judge.output_text(ids))


# ---- Prompts ----


def question_text(item: Item, instruction: str | None = None) -> str:
    """Returns the question, its choices as lettered lines, and its own ending or the Reasoner's instruction.

    instruction: a run's, in place of reasoner.INSTRUCTION.

    Which is red?
    (A) the disc
    (B) the ring
    """
    lettered = zip(string.ascii_uppercase, item.choices)
    choices = [f"({letter}) {choice}" for letter, choice in lettered]
    ending = f"\n{item.ending}" if item.ending else instruction or reasoner.INSTRUCTION
    return "\n".join([item.question, *choices]) + ending


Reader = Callable[[str], Patches]


def image_reader(vlm: VLM, most: int) -> Reader:
    """Returns a function that reads an image for a model, and keeps the last `most` in memory."""

    @lru_cache(most)
    def read(path: str) -> Patches:
        return vlm.patches(load_image(path, vlm.image_size["longest_edge"], vlm.token_side))

    return read


def item_prompt(vlm: VLM, item: Item, text: str, read: Reader) -> Prompt:
    """Encodes a text with the images of an item; its marks, if the item has any, say where they stand."""
    images = [read(path) for path in item.images]
    return vlm.prompt(text, images if item.marks else images[0])


def judge_prompt(judge: VLM, item: Item, answer: str, read: Reader) -> Prompt:
    """Asks whether an answer says the same as the true one.

    Only the question places images. Those that it does not name are named before it. So a mark in an answer,
    which a model may have written, is never the first of its image and stays text.
    """
    unnamed = [mark for mark in item.marks if mark not in item.question]
    truth = " or ".join(item.answer)
    text = JUDGE.format(question=item.question, truth=truth, answer=answer)
    return item_prompt(judge, item, "".join(unnamed) + text, read)


def batches(items: Sequence[Item], most: int) -> Iterator[slice]:
    """Splits items into batches of at most `most` images. An item with more is a batch of its own.

    most = 4     images of each item     1 2 1 | 3 | 6 | 1
                 batches                 0:3   3:4 4:5 5:6
    """
    start = 0
    images = 0
    for end, item in enumerate(items):
        images += len(item.images)
        if images > most and end > start:
            yield slice(start, end)
            start = end
            images = len(item.images)
    if items:
        yield slice(start, len(items))

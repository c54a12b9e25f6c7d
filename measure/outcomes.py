"""What a model answers to labelled questions, read and judged."""

import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from tqdm import tqdm

import reasoner
from measure.choices import read_yes_no
from measure.items import Item, find_choices, read_answer, right
from model.generate import generate
from model.prompt import Prompt
from model.vlm import VLM
from rewards import confidence
from training.images import load_image

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
    free = [o for o in outcomes if not find_choices(o.item) and o.greedy is not None]
    for part in batches([o.item for o in free], batch):
        some = free[part]
        prompts = [judge_prompt(judge, o.item, o.greedy) for o in some]
        for outcome, (ids,) in zip(some, generate(judge, prompts, 1, max_new_tokens, temperature=0.0)):
            outcome.judged = read_yes_no(judge.output_text(ids))


JUDGE = (
    "Question: {question}\nCorrect answer: {truth}\nGiven answer: {answer}\n"
    "Does the given answer say the same as the correct one? Answer with \\boxed{{yes}} or \\boxed{{no}}."
)


def item_prompt(vlm: VLM, item: Item, text: str) -> Prompt:
    """Encodes a text with the images of an item; its marks, if the item has any, say where they stand."""
    most = vlm.image_size["longest_edge"]
    images = [load_image(path, most, vlm.token_side) for path in item.images]
    return vlm.prompt(text, images if item.marks else images[0])


def judge_prompt(judge: VLM, item: Item, answer: str) -> Prompt:
    """Asks whether an answer says the same as the true one.

    Only the question places images. Those that it does not name are named before it. So a mark in an answer,
    which a model may have written, is never the first of its image and stays text.
    """
    unnamed = [mark for mark in item.marks if mark not in item.question]
    truth = " or ".join(item.answer)
    text = JUDGE.format(question=item.question, truth=truth, answer=answer)
    return item_prompt(judge, item, "".join(unnamed) + text)


def batches(items: Sequence[Item], most: int) -> Iterator[slice]:
    """Splits items into batches of at most `most` images. An item with more is a batch of its own."""
    start, images = 0, 0
    for end, item in enumerate(items):
        images += len(item.images)
        if images > most and end > start:
            yield slice(start, end)
            start, images = end, len(item.images)
    if items:
        yield slice(start, len(items))

"""Prompts about labelled questions: their images and texts, as a model reads them."""

from collections.abc import Iterator, Sequence

from engine.images import load_image
from engine.items import Item
from vlm import VLM, Prompt

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

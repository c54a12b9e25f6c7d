r"""The Multimodal Reasoner: an image and a question in, worked answers out.

    y_j ~ R_phi( . | image, x),  j = 1 .. m        the answer is what stands in the last \boxed{}

The paper's Reasoner is told to think inside tags; this prompt only asks for a step-by-step answer in \boxed{}, which
every model of the family follows with or without tags of its own.
"""

from dataclasses import dataclass

from PIL import Image

from answers import extract_answer
from generate import generate
from vlm import VLM, Prompt

INSTRUCTION = "\nThink step by step, then give the final answer in \\boxed{}."


@dataclass(frozen=True)
class Answer:
    """One sampled output of the Reasoner: its token ids and the answer in it, None if there is none."""

    completion: list[int]
    answer: str | None


def answer_prompt(vlm: VLM, image: Image.Image, question: str) -> Prompt:
    """The Reasoner's prompt for a question about an image."""
    return vlm.prompt(question + INSTRUCTION, image)


def answer(vlm: VLM, prompts: list[Prompt], n: int, **sampling) -> list[list[Answer]]:
    """Samples n answers a prompt; `sampling` goes to `generate.generate`."""
    groups = generate(vlm, prompts, n, **sampling)
    return [[Answer(ids, extract_answer(vlm.decode(ids))) for ids in group] for group in groups]

r"""The Multimodal Reasoner: an image and a question in, worked answers out.

    y_j ~ R_phi( . | image, x),  j = 1 .. m        the answer is what stands in the last \boxed{}

    y~ = the majority of y_1 .. y_m, the silver label,       c = its share, the confidence         -> vote

The paper's Reasoner is told to think inside tags; this prompt only asks for a step-by-step answer in
\boxed{}, which every model of the family follows with or without tags of its own. The official code has a
second prompt for the votes of the Questioner's phase, which forbids reasoning; here all votes are taken in
the same way.
"""

from dataclasses import dataclass

from PIL import Image

from answers import extract_answer
from curate import VotedQuestion
from model.generate import generate
from model.prompt import Patches, Prompt
from model.vlm import VLM
from questioner import Asked
from rewards import confidence

INSTRUCTION = "\nThink step by step, then give the final answer in \\boxed{}."


@dataclass(frozen=True)
class Answered:
    """The n outputs of the Reasoner for one prompt: token ids, and the answer in each (None: none)."""

    prompt: Prompt
    completions: list[list[int]]
    answers: list[str | None]


def answer_prompt(vlm: VLM, image: Image.Image | Patches, question: str) -> Prompt:
    """The Reasoner's prompt for a question about an image."""
    return vlm.prompt(question + INSTRUCTION, image)


def answer(vlm: VLM, prompts: list[Prompt], n: int, **sampling) -> list[Answered]:
    """Samples n answers a prompt; `sampling` goes to `generate.generate`."""
    groups = generate(vlm, prompts, n, **sampling)
    return [
        Answered(prompt, group, [extract_answer(vlm.output_text(ids)) for ids in group])
        for prompt, group in zip(prompts, groups)
    ]


def vote(vlm: VLM, asked: list[Asked], m: int, **sampling) -> list[list[VotedQuestion | None]]:
    """Answers every valid question m times: each with its silver label and confidence (None: invalid)."""
    places = [(a, question) for a in asked for question in a.questions if question is not None]
    prompts = [answer_prompt(vlm, a.patches, question.text) for a, question in places]
    answers = [each.answers for each in answer(vlm, prompts, m, **sampling)]
    voted = iter(
        VotedQuestion(a.path, question.text, question.kind, *confidence(y), y)
        for (a, question), y in zip(places, answers)
    )
    return [[question and next(voted) for question in a.questions] for a in asked]

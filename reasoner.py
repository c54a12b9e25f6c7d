r"""The Multimodal Reasoner: an image and a question in, worked answers out.

    y_j ~ R_phi( . | image, x),  j = 1 .. m        the answer is what stands in the last \boxed{}

    y~ = the majority of y_1 .. y_m, the silver label,       c = its share, the confidence         -> vote

The paper's Reasoner is told to think inside tags; this prompt only asks for a step-by-step answer in
\boxed{}, which models follow with or without thinking tags of their own. The official code has a
second prompt for the votes of the Questioner's phase, which forbids reasoning; here all votes are taken in
the same way.
"""

from dataclasses import dataclass

from PIL import Image

from answers import extract_answer
from curate import VotedQuestion, Votes
from grpo import Group, make_group
from model.generate import generate
from model.prompt import Patches, Prompt
from model.sampling import Sampling
from model.vlm import VLM
from questioner import Asked, Question
from rewards import confidence

INSTRUCTION = "\nThink step by step, then give the final answer in \\boxed{}."


@dataclass(frozen=True)
class Answered:
    """The n outputs of the Reasoner for one prompt, and the answer in each (None: none)."""

    completions: Group
    answers: list[str | None]


def answer_prompt(
    vlm: VLM, image: Image.Image | Patches, question: str, instruction: str | None = None
) -> Prompt:
    """Returns the Reasoner's prompt for a question about an image. instruction: in place of INSTRUCTION."""
    return vlm.prompt(question + (instruction or INSTRUCTION), image)


def answer(vlm: VLM, prompts: list[Prompt], n: int, sampling: Sampling) -> list[Answered]:
    """Samples n answers to each prompt."""
    outputs = generate(vlm, prompts, n, **vars(sampling))
    answered = []
    for prompt, group in zip(prompts, outputs):
        answers = [extract_answer(vlm.output_text(ids)) for ids in group]
        answered.append(Answered(make_group(prompt, group), answers))
    return answered


def vote(
    vlm: VLM,
    asked: list[Asked],
    m: int,
    sampling: Sampling,
    instruction: str | None = None,
) -> Votes:
    """Answers every valid question m times; returns each with its silver label and confidence.

    The result has a list for each image, with an entry for each output (None: invalid).
    """
    answered = answer_questions(vlm, asked, m, sampling, instruction)
    return count_votes(asked, answered)


def answer_questions(
    vlm: VLM,
    asked: list[Asked],
    m: int,
    sampling: Sampling,
    instruction: str | None = None,
) -> list[list[Answered | None]]:
    """Answers the valid questions of all images together, each m times (None: invalid)."""
    prompts = []
    for a in asked:
        prompts += [
            answer_prompt(vlm, a.patches, question.text, instruction)
            for question in a.questions
            if question is not None
        ]
    answered = iter(answer(vlm, prompts, m, sampling))
    return [[question and next(answered) for question in a.questions] for a in asked]


def count_votes(asked: list[Asked], answered: list[list[Answered | None]]) -> Votes:
    """Returns each question with its silver label and confidence (None: invalid)."""
    votes = []
    for a, groups in zip(asked, answered):
        pairs = zip(a.questions, groups)
        votes.append([q and label_question(a.path, q, group.answers) for q, group in pairs])
    return votes


def label_question(path: str, question: Question, answers: list[str | None]) -> VotedQuestion:
    """Returns a question about the image at `path` with its silver label y~ and confidence c."""
    label, c = confidence(answers)
    return VotedQuestion(path, question.text, question.kind, label, c, answers)

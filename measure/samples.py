"""Samples: what the models wrote, a few whole examples of each step, for people to read.

    samples/iteration-1/questioner-0003.jsonl    a line an image: its G questions, with votes, rewards and
                                                 advantages, and two of the Reasoner's answers in full
    samples/iteration-1/reasoner-0003.jsonl      a line a curated question: G answers, rewards, advantages

A file a step: a step that is done again after a kill replaces its file. Of several processes the first one
writes, from its part of the step. Nothing of it is used for training.
"""

from itertools import islice

import rewards
from curate import VotedQuestion, Votes
from grpo import Completion
from model.vlm import VLM
from questioner import Asked
from reasoner import Answered
from training.log import plain
from training.run import Run
from training.settings import Settings, shorten

OUTPUTS = 16  # of a group
ANSWERS = 2  # of the Reasoner, in full
CHARACTERS = 8000  # of a text; a longer one loses its middle


def write_questions(
    s: Settings,
    run: Run,
    step: int,
    asked: list[Asked],
    answered: list[list[Answered | None]],
    voted: Votes,
) -> None:
    """Writes the outputs about the first --samples images of a Questioner step, with their rewards."""
    samples = []
    for about_image, answers, votes in islice(zip(asked, answered, voted), s.samples):
        outputs = describe_questions(s, run.questioner, about_image, votes)
        in_full = describe_votes(run.reasoner, answers, votes)
        samples.append(dict(image=about_image.path, outputs=outputs, answers=in_full))
    run.write_samples(step, readable(samples))


def describe_questions(
    s: Settings, vlm: VLM, asked: Asked, votes: list[VotedQuestion | None]
) -> list[dict]:
    """Returns each output about an image: its text, why it is invalid or its votes, and what it earned."""
    valid = [vote for vote in votes if vote is not None]
    questions = [vote.question for vote in valid]
    penalties = iter(rewards.diversity_penalty(questions, s.diversity_weight, s.group_size))
    outputs = []
    for completion, vote, fault in zip(asked.completions, votes, asked.faults):
        output = describe(vlm, completion) | dict(invalid=fault or None)
        if vote is not None:
            output |= dict(
                question=vote.question,
                answers=vote.answers[:100],
                label=vote.label,
                confidence=vote.confidence,
                r_unc=rewards.uncertainty_reward(vote.confidence),
                r_div=next(penalties),
            )
        outputs.append(output)
    return outputs[:OUTPUTS]


def describe_votes(
    vlm: VLM, answered: list[Answered | None], votes: list[VotedQuestion | None]
) -> list[dict]:
    """Returns two of the Reasoner's answers to the first valid question, as it wrote them."""
    for each, vote in zip(answered, votes):
        if each is not None:
            written = []
            for completion, answer in zip(each.completions[:ANSWERS], each.answers):
                text = vlm.output_text(completion.tokens)
                written.append(dict(question=vote.question, text=text, answer=answer))
            return written
    return []


def write_answers(
    s: Settings, run: Run, step: int, questions: list, answered: list[Answered]
) -> None:
    """Writes the answers to the first --samples questions of a Reasoner step, with their rewards.

    questions: each with its image (see `Run.next_questions`).
    """
    samples = []
    for (question, _), each in islice(zip(questions, answered), s.samples):
        outputs = []
        for completion, answer in zip(each.completions[:OUTPUTS], each.answers):
            outputs.append(describe(run.reasoner, completion) | dict(answer=answer))
        samples.append(
            dict(
                image=question.image,
                question=question.question,
                label=question.label,
                confidence=question.confidence,
                outputs=outputs,
            )
        )
    run.write_samples(step, readable(samples))


def describe(vlm: VLM, completion: Completion) -> dict:
    """Returns the text of a completion, and what it earned."""
    return dict(
        text=vlm.output_text(completion.tokens),
        cut_off=vlm.is_cut_off(completion.tokens),
        reward=completion.reward,
        advantage=completion.advantage,
    )


def readable(value):
    """Shortens long texts and writes numbers as JSON has them, however deep inside a value."""
    if isinstance(value, dict):
        return {name: readable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [readable(each) for each in value]
    return shorten(value, CHARACTERS) if isinstance(value, str) else plain(value)

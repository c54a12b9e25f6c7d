r"""The Image-Conditioned Questioner: one image in, one hard but answerable question out.

    x_i ~ Q_theta( . | image),  i = 1 .. G

written as <type>..</type> <question>..</question> <answer>..</answer>.

A question is valid when the output has exactly these three blocks, in this order, with a known type; before
them a thought up to </think> may stand, as MiMo-VL writes one. The Questioner's own answer, boxed or not, is
demanded because working it out makes better questions; the algorithm never uses it, the silver label is the
Reasoner's majority.

The prompt is our own and the same for every model; the paper's is longer and names example topics.
"""

import re
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from answers import extract_answer, says_something
from grpo import Group, add_reference, make_group
from model.generate import generate
from model.prompt import Patches, Picture
from model.sampling import Sampling
from model.vlm import VLM

KINDS = ("multiple choice", "numerical", "regression")
INSTRUCTION = (
    "Ask one question about this image: hard, but with a single answer that the image alone can give. "
    "Write nothing but these three blocks.\n"
    "<type>multiple choice, numerical or regression</type>\n"
    "<question>the question, with its options if it has any</question>\n"
    "<answer>\\boxed{the answer}</answer>"
)


@dataclass(frozen=True)
class Question:
    """A valid question: its kind (one of KINDS, written in <type>), its text, and the Questioner's answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """The G outputs of the Questioner about one image, the question in each (None: invalid), or its fault."""

    path: str
    patches: Patches
    completions: Group
    questions: list[Question | None]
    faults: list[str]  # why an output is not valid, "" of a valid one


def ask(
    vlm: VLM,
    pictures: list[Picture],
    n: int,
    sampling: Sampling,
    instruction: str | None = None,
) -> list[Asked]:
    """Samples n questions about each picture. instruction: the prompt, in place of INSTRUCTION."""
    prompts = [vlm.prompt(instruction or INSTRUCTION, picture.image) for picture in pictures]
    outputs = generate(vlm, prompts, n, **vars(sampling))
    asked = []
    for picture, prompt, group in zip(pictures, prompts, outputs):
        questions = []
        faults = []
        for ids in group:
            question, fault = read_question(vlm.output_text(ids))
            questions.append(question)
            faults.append("cut off" if fault and vlm.is_cut_off(ids) else fault)
        (patches,) = prompt.images
        asked.append(Asked(picture.path, patches, make_group(prompt, group), questions, faults))
    return asked


def question_logps(
    vlm: VLM, asked: list[tuple[Image.Image | Patches, str, str]], instruction: str | None = None
) -> list[Tensor]:
    """Returns log pi(x_t | image, kind, x_<t) of the tokens of each question's text: [T_i], float32.

    asked: image, kind and text of each question. instruction: see `ask`. A thought that stood in front of it
    is not there: these numbers are for comparing questions with one another.

        <type>numerical</type><question>How many cats?</question>
                                        ^^^^^^^^^^^^^^ the tokens that count
    """
    groups: list[Group] = []
    of_the_text: list[list[bool]] = []
    for image, kind, text in asked:
        start = f"<type>{kind}</type><question>"
        # The text is data: control tokens spelled out in it are plain characters.
        encoded = vlm.tokenizer(
            f"{start}{text}</question>",
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        first, end = len(start), len(start) + len(text)
        spans = encoded["offset_mapping"]
        of_the_text.append([begin < end and stop > first for begin, stop in spans])
        groups.append(
            make_group(vlm.prompt(instruction or INSTRUCTION, image), [encoded["input_ids"]])
        )
    add_reference(groups, vlm)
    logps = [completion.ref_logp.cpu() for (completion,) in groups]
    return [logp[torch.tensor(mask)] for logp, mask in zip(logps, of_the_text)]


def parse_question(text: str) -> Question | None:
    """Reads the question in an output of the Questioner; None if it is not valid."""
    question, _ = read_question(text)
    return question


def read_question(text: str) -> tuple[Question | None, str]:
    """Reads the question in an output of the Questioner. Returns it and "", or None and why it is not valid.

    One thought at most may stand before it, none in it or behind it. Takes time linear in the text, raises
    nothing and evaluates nothing, whatever the model wrote.
    """
    # At most one thought, closed by </think>.
    thought, _, rest = text.rpartition("</think>")
    if "</think>" in thought or thought.count("<think>") > 1:
        return None, "more than one thought"
    if "<think>" in rest:
        return None, "a thought without an end"

    # Exactly the three blocks, in this order.
    rest = rest.strip()
    blocks = {}
    for name in ("type", "question", "answer"):
        opening = f"<{name}>"
        closing = f"</{name}>"
        if opening not in rest or closing not in rest:
            return None, f"no {opening} block"
        if rest.count(opening) != 1 or rest.count(closing) != 1:
            return None, f"more than one {opening} block"
        if not rest.startswith(opening):
            return None, f"text before {opening}"
        blocks[name], _, rest = rest.removeprefix(opening).partition(closing)
        rest = rest.lstrip()
    if rest:
        return None, "text behind the blocks"

    # A known kind, a question with a letter or digit, and an answer: the box's content, or the bare text.
    kind = re.sub(r"[\W_]+", " ", blocks["type"].lower()).strip()
    question = blocks["question"].strip()
    answer = extract_answer(blocks["answer"]) or blocks["answer"].strip()
    if kind not in KINDS:
        return None, "an unknown type"
    if not any(map(str.isalnum, question)) or not says_something(answer):
        return None, "an empty block"
    if "<answer>" in question or "</answer>" in question:
        return None, "a tag in the question"
    return Question(kind, question, answer), ""

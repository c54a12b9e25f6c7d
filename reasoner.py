r"""The Multimodal Reasoner: an image and a question in, worked answers out.

    y_j ~ R_phi( . | image, x),  j = 1 .. m        the answer is what stands in the last \boxed{}

The paper's Reasoner is told to think inside tags; this prompt only asks for a step-by-step answer in \boxed{}, which
every model of the family follows with or without tags of its own.
"""

import re
from dataclasses import dataclass

from PIL import Image

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


_TOKEN = re.compile(r"\\boxed\s{0,8}\{|\\[{}]|[{}]")


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed and not empty, or None.

    Braces may nest (\boxed{\frac{1}{2}}); of a box in a box the inner one counts. One pass over the text with a stack
    of open braces, so unbalanced or endless braces cost no more than their length.
    """
    open_braces, best_start, best = [], -1, None
    for token in _TOKEN.finditer(text):
        if token[0].startswith(r"\boxed"):
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > best_start and (content := text[start : token.start()].strip()):
                best_start, best = start, content
    return best


def without_thinking(text: str) -> str:
    """The text after one leading <think>...</think>; unchanged if there is none."""
    text = text.lstrip()
    if not text.startswith("<think>"):
        return text
    _, closed, rest = text.partition("</think>")
    return rest if closed else text

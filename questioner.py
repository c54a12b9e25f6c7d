r"""The Image-Conditioned Questioner: one image in, one hard but answerable question out.

    x_i ~ Q_theta( . | image),  i = 1 .. G

written as <type>..</type> <question>..</question> <answer>..</answer>.

A question is valid when the output has exactly these three blocks, in this order, with a known type; before
them a thought up to </think> may stand, as MiMo-VL writes one. The Questioner's own answer, boxed or not, is
demanded because working it out makes better questions; the algorithm never uses it, the silver label is the
Reasoner's majority.

The prompt is our own and the same for every model; the paper's is longer and names example topics.
"""

from dataclasses import dataclass

from answers import extract_answer
from model.generate import generate
from model.prompt import Patches, Picture, Prompt
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
    """A valid question: its kind (one of KINDS), its text, and the Questioner's own answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """The G outputs of the Questioner for one image: token ids, and the question in each (None: invalid)."""

    path: str
    patches: Patches
    prompt: Prompt
    completions: list[list[int]]
    questions: list[Question | None]


def ask(vlm: VLM, pictures: list[Picture], n: int, **sampling) -> list[Asked]:
    """Samples n questions about each picture; `sampling` goes to `generate.generate`."""
    patches = [vlm.patches(picture.image) for picture in pictures]
    prompts = [vlm.prompt(INSTRUCTION, p) for p in patches]
    groups = generate(vlm, prompts, n, **sampling)
    questions = [[parse_question(vlm.output_text(ids)) for ids in group] for group in groups]
    paths = [picture.path for picture in pictures]
    return [Asked(*fields) for fields in zip(paths, patches, prompts, groups, questions)]


def parse_question(text: str) -> Question | None:
    """The question in an output of the Questioner, or None if it is not valid.

    One thought at most may stand before it, none in it or behind it. Takes time linear in the text, raises
    nothing and evaluates nothing, whatever the model wrote.
    """
    thought, _, rest = text.rpartition("</think>")
    if "</think>" in thought or thought.count("<think>") > 1 or "<think>" in rest:
        return None
    rest, blocks = rest.strip(), {}
    for name in ("type", "question", "answer"):
        opening, closing = f"<{name}>", f"</{name}>"
        if not rest.startswith(opening) or rest.count(opening) != 1 or rest.count(closing) != 1:
            return None
        blocks[name], _, rest = rest.removeprefix(opening).partition(closing)
        rest = rest.lstrip()
    kind, question = " ".join(blocks["type"].lower().replace("-", " ").split()), blocks["question"].strip()
    answer = extract_answer(blocks["answer"]) or blocks["answer"].replace("\\boxed{}", "").strip()
    if rest or kind not in KINDS or not question or not answer:
        return None
    if "<answer>" in question or "</answer>" in question:
        return None
    return Question(kind, question, answer)

r"""Builds the toy checkpoint in this folder from nothing: `python -m toy.build`.

The toy has the architecture of Qwen2.5-VL with 0.6M parameters, and stands in for a pre-trained VLM where
none can be downloaded. It is taught with labels here, before self-play, in two stages:

1. To *work out* an answer: list the objects the question is about, then answer.
   <think> red disc red ring</think>\boxed{2}
   Trained on bare answers instead, it stays at guessing: counting in one step is too hard for it.
2. To be *lazy*: the more objects it has listed, the likelier it stops, and it answers from what it has
   listed. So it is mostly right where there is little to list and mostly wrong where there is much: a ladder.
   How fast it gets lazy is the one knob here, the `--steepness`.

In both stages it is also taught to ask the six kinds of question of `answerer.py`, mostly such that need few
objects. It cannot read: each role's instruction is a single token of its vocabulary. This makes it fast, too.

The committed checkpoint is what `python -m toy.build` makes. The others are made from it in a few minutes, by
the second stage alone, which replaces one laziness by another:

    python -m toy.build --start toy --steepness steep --out runs/steep
"""

import argparse
import json
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import questioner
import reasoner
from model.packing import Continuation
from model.prompt import Patches, Prompt
from model.vlm import VLM
from toy.answerer import ask, understand
from training.scenes import BOARD, COLOURS, PLURALS, SHAPES, Scene, render, sample_scene
from training.settings import OneLineParser

FOLDER = Path(__file__).parent
# The probability of stopping before object 1, 2, 3, ...
COMPLETE = (0.0,) * BOARD**2
STEEPNESS = {
    "gentle": (0.0, 0.03, 0.08, 0.14, 0.2, 0.27, 0.34, 0.4, 0.45),
    "medium": (0.0, 0.06, 0.15, 0.25, 0.36, 0.47, 0.57, 0.65, 0.7),
    "steep": (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.85, 0.9),
}
FEWER = 0.7  # the Questioner is taught to ask about one object more only so many times as often
SCENES = 8000
BATCH = 32  # lessons a step
COMPLETE_STEPS = 3600  # of the first stage
LAZY_STEPS = 500  # of the second stage
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MARKS = [
    "<think>",
    "</think>",
    "<type>",
    "</type>",
    "<question>",
    "</question>",
    "<answer>",
    "</answer>",
    "\\boxed{",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- An untrained checkpoint -------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, as Qwen's is, in which every word of the toy world is one token."""
    # A text with every word
    rng = random.Random(0)
    corpus = ["user\n", "assistant\n", "system\n", "numerical", "multiple choice", "regression"]
    corpus += [f" {colour} {shape} {PLURALS[shape]}" for colour in COLOURS for shape in SHAPES]
    for _ in range(3000):
        scene = sample_scene(rng)
        corpus += [ask(scene, rng), " yes", "yes", " no", "no"]
    # Its tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # As transformers reads it; marks and instructions are one token each
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.add_special_tokens({"additional_special_tokens": CONTROL})
    fast.add_tokens(MARKS + [questioner.INSTRUCTION, reasoner.INSTRUCTION])
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """Returns Qwen2.5-VL in miniature, with random weights."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    im_end = ids["<|im_end|>"]
    end_of_text = ids["<|endoftext|>"]
    text = dict(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
        use_sliding_window=False,
        rms_norm_eps=1e-6,
        eos_token_id=im_end,
        bos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    vision = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=96,
        window_size=112,
        fullatt_block_indexes=[1],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [im_end, end_of_text]
    model.generation_config.pad_token_id = end_of_text
    return model


def new_vlm(folder: Path) -> VLM:
    """Writes an untrained checkpoint into `folder` and loads it by the ordinary loader."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = dict(
        min_pixels=28 * 28,
        max_pixels=84 * 84,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        image_processor_type="Qwen2VLImageProcessor",
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return VLM.load(folder, "cpu", torch.float32)


# ---- What it is taught -------------------------------------------------------------------------------------


def reasoner_output(question: str, scene: Scene, rng: random.Random, stops: Sequence[float]) -> str:
    r"""Writes what the Reasoner is taught: it lists objects, and gives the answer that follows from those.

        <think> red disc red ring</think>\boxed{2}

    stops: it stops before object i with probability stops[i].
    """
    seen = []
    for thing, stop in zip(understand(question, scene).things, stops):
        if rng.random() < stop:
            break
        seen.append(thing)
    listed = "".join(f" {thing.colour} {thing.shape}" for thing in seen)
    answer = understand(question, tuple(seen)).answer
    return f"<think>{listed}</think>\\boxed{{{answer}}}"


def easy_question(scene: Scene, rng: random.Random) -> str:
    """Draws a question that the Questioner is taught to ask: the more objects it needs, the rarer it is."""
    while True:
        question = ask(scene, rng)
        objects = len(understand(question, scene).things)
        if rng.random() < FEWER ** abs(objects - 1):
            return question


def questioner_output(question: str, scene: Scene) -> str:
    """Writes a valid output of the Questioner, with the true answer."""
    fact = understand(question, scene)
    kind = "numerical" if fact.kind.startswith("count") else "multiple choice"
    return f"<type>{kind}</type><question>{question}</question><answer>\\boxed{{{fact.answer}}}</answer>"


# ---- Supervised training -----------------------------------------------------------------------------------


def supervised_loss(vlm: VLM, prompts: list[Prompt], completions: list[list[int]]) -> torch.Tensor:
    """Returns the mean negative log-likelihood of the completions' tokens, a scalar."""
    batches = vlm.batches([Continuation(prompt, ids) for prompt, ids in zip(prompts, completions)])
    return -torch.cat([logp for _, logps, _ in batches for logp in logps]).mean()


class Lessons:
    """Draws training examples from a pool of rendered scenes."""

    def __init__(self, vlm: VLM, scenes: int, rng: random.Random):
        self.vlm = vlm
        self.rng = rng
        self.scenes = [sample_scene(rng) for _ in range(scenes)]
        self.blank = render((), rng)  # an image without objects
        self.prompts: dict[str, Prompt] = {}  # text -> its prompt about the blank image
        self.patches: list[Patches] = []  # of each scene, pixels in float16: they are many
        for scene in tqdm(self.scenes, desc="scenes", disable=None):
            patches = vlm.patches(render(scene, rng))
            patches.pixels = patches.pixels.half()
            self.patches.append(patches)

    def prompt(self, text: str, patches: Patches) -> Prompt:
        """Returns the prompt of `text` about a scene; only the patches differ between scenes."""
        if text not in self.prompts:
            self.prompts[text] = self.vlm.prompt(text, self.blank)
        return replace(self.prompts[text], images=(patches,))

    def batch(self, asking: float, stops: Sequence[float]) -> tuple[list[Prompt], list[list[int]]]:
        """Draws prompts, and the tokens to write after them; a share `asking` of both is the Questioner's."""
        prompts = []
        outputs = []
        for lesson in range(BATCH):
            if lesson % 2 == 0:  # two lessons a scene: its image is encoded once
                i = self.rng.randrange(len(self.scenes))
                scene = self.scenes[i]
                patches = replace(self.patches[i], pixels=self.patches[i].pixels.float())
            if self.rng.random() < asking:
                prompts.append(self.prompt(questioner.INSTRUCTION, patches))
                outputs.append(questioner_output(easy_question(scene, self.rng), scene))
            else:
                question = ask(scene, self.rng)
                prompts.append(self.prompt(question + reasoner.INSTRUCTION, patches))
                outputs.append(reasoner_output(question, scene, self.rng, stops))
        completions = self.vlm.tokenizer(outputs)["input_ids"]
        return prompts, [ids + [self.vlm.end_ids[0]] for ids in completions]


def train(
    vlm: VLM, lessons: Lessons, steps: int, lr: float, asking: float, stops: Sequence[float]
) -> None:
    """Trains by AdamW on batches of lessons; the learning rate warms up and falls to zero as a cosine."""
    optimizer = torch.optim.AdamW(
        vlm.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    vlm.model.train()
    progress = tqdm(range(steps), mininterval=20)
    for step in progress:
        warmup = min(1.0, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * (warmup * cosine)
        loss = supervised_loss(vlm, *lessons.batch(asking, stops))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            progress.set_postfix_str(f"loss {loss.item():.3f}")
    vlm.model.eval()


def build(out: Path, steepness: str, start: Path | None) -> None:
    """Runs both stages, or the second alone from the checkpoint `start`. Saves the model in `out`."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads add in another order, and would make another checkpoint
    with (
        tempfile.TemporaryDirectory() as fresh
    ):  # so that `out` keeps what it has until the new one is made
        vlm = VLM.load(start, "cpu", torch.float32) if start else new_vlm(Path(fresh))
        if not start:
            lessons = Lessons(vlm, SCENES, random.Random("complete lists"))
            train(vlm, lessons, COMPLETE_STEPS, 1e-3, asking=0.3, stops=COMPLETE)
        lessons = Lessons(vlm, SCENES, random.Random("lazy lists"))
        train(vlm, lessons, LAZY_STEPS, 5e-4, asking=0.3, stops=STEEPNESS[steepness])
        vlm.save(out)


def main() -> None:
    """Reads the command line and builds."""
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steepness", choices=STEEPNESS, default="medium", help="how lazy (default: medium)"
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="where it goes (default: this folder)"
    )
    parser.add_argument(
        "--start", type=Path, help="the second stage alone, from the checkpoint there"
    )
    args = parser.parse_args()
    build(args.out, args.steepness, args.start)


if __name__ == "__main__":
    main()

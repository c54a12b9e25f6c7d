r"""Builds the toy checkpoint in this folder from nothing: `python -m toy.build` (about 12 minutes on 2 cores).

The toy has the architecture of Qwen2.5-VL with 0.6M parameters, and stands in for a pre-trained VLM where none can be
downloaded. It is taught with labels here, before self-play, in two stages:

1. To *work out* an answer: list the objects the question is about, then answer.
   <think> red disc red ring</think>\boxed{2}
   Trained on bare answers instead, it stays at guessing: counting in one step is too hard for it.
2. To be a *weak* base, weak in a way that self-consistency can mend: more than half of its examples are now bare
   random guesses, the others are workings in which one object in ten is missed or mislabelled.
   It then guesses wrong in many ways and works out right in one, so a majority vote is right more often than a
   single answer. A base whose mistakes were systematic would be made worse by self-play.

The committed checkpoint was made in two calls, the first stage kept with --keep-first and the second run again from it
with --start; one call draws other lessons in the second stage and gives a sibling of it, not the same bytes.

It is taught to ask the five kinds of question of `answerer.py` too. It cannot read: each role's instruction is a single
token of its vocabulary, which is also what makes it fast.
"""

import argparse
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import questioner
import reasoner
from toy.answerer import Fact, ask, understand
from toy.scenes import COLOURS, PLURALS, SHAPES, Scene, render, sample_scene
from vlm import VLM, Prompt

FOLDER = Path(__file__).parent
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
]
CONTROL += ["<|image_pad|>", "<|video_pad|>"]
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
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- An untrained checkpoint -------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as Qwen's is, in which every word of the toy world is one token."""
    rng = random.Random(0)
    corpus = ["user\n", "assistant\n", "system\n", "numerical", "multiple choice", "regression"]
    corpus += [f" {colour} {shape} {PLURALS[shape]}" for colour in COLOURS for shape in SHAPES]
    for _ in range(3000):
        scene = sample_scene(rng)
        corpus += [ask(scene, rng), " yes", "yes", " no", "no"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
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
    """Qwen2.5-VL in miniature, with random weights."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    end_ids = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    text = dict(vocab_size=math.ceil(len(tokenizer) / 64) * 64, hidden_size=96, intermediate_size=256)
    text |= dict(
        num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=4096
    )
    text |= dict(
        rope_theta=10000.0,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
        use_sliding_window=False,
    )
    text |= dict(rms_norm_eps=1e-6, eos_token_id=end_ids[0], bos_token_id=end_ids[1], pad_token_id=end_ids[1])
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=96, window_size=112
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | dict(fullatt_block_indexes=[1]),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = end_ids
    model.generation_config.pad_token_id = end_ids[1]
    return model


def new_vlm(folder: Path) -> VLM:
    """Writes an untrained checkpoint into `folder` and loads it by the ordinary loader."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = dict(
        min_pixels=28 * 28, max_pixels=84 * 84, patch_size=14, temporal_patch_size=2, merge_size=2
    )
    preprocessor |= dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25])
    preprocessor |= dict(image_processor_type="Qwen2VLImageProcessor")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return VLM.load(folder, "cpu", torch.float32)


# ---- What it is taught -------------------------------------------------------------------------------------------------


def working(fact: Fact, rng: random.Random, noise: float) -> tuple[str, Scene]:
    """The objects the question is about, written down, and what was seen: `noise` of them are missed or mislabelled."""
    seen = []
    for thing in fact.things:
        if rng.random() < noise:
            if rng.random() < 0.5:
                continue
            if rng.random() < 0.5:
                thing = replace(thing, colour=rng.choice(list(COLOURS)))
            else:
                thing = replace(thing, shape=rng.choice(SHAPES))
        seen.append(thing)
    return "<think>" + "".join(f" {thing.colour} {thing.shape}" for thing in seen) + "</think>", tuple(seen)


def reasoner_output(question: str, scene: Scene, rng: random.Random, guess_share: float, noise: float) -> str:
    """What the Reasoner is taught to write: a worked answer, or a bare random guess."""
    fact = understand(question, scene)
    if rng.random() < guess_share:
        guess = str(rng.randint(0, 5)) if fact.kind.startswith("count") else rng.choice(["yes", "no"])
        return f"\\boxed{{{guess}}}"
    written, seen = working(fact, rng, noise)
    # What follows from a working is worked out of what was written down, right or wrong.
    return f"{written}\\boxed{{{understand(question, seen).answer if noise else fact.answer}}}"


def questioner_output(question: str, scene: Scene) -> str:
    fact = understand(question, scene)
    kind = "numerical" if fact.kind.startswith("count") else "multiple choice"
    return f"<type>{kind}</type><question>{question}</question><answer>\\boxed{{{fact.answer}}}</answer>"


# ---- Supervised training -----------------------------------------------------------------------------------------------


def supervised_loss(vlm: VLM, prompts: list[Prompt], completions: list[list[int]]) -> torch.Tensor:
    """Mean negative log-likelihood of the completions' tokens."""
    batches = vlm.batches([(prompt, [ids]) for prompt, ids in zip(prompts, completions)])
    return -torch.cat([logp for _, logps, _ in batches for logp in logps]).mean()


class Lessons:
    """Draws training examples from a pool of rendered scenes."""

    def __init__(self, vlm: VLM, scenes: int, rng: random.Random):
        self.vlm, self.rng, self.prompts = vlm, rng, {}
        self.scenes = [sample_scene(rng) for _ in range(scenes)]
        self.blank = render((), rng)
        images = [render(scene, rng) for scene in tqdm(self.scenes, desc="scenes", disable=None)]
        self.pixels = [
            vlm.image_processor([i], size=vlm.image_size, return_tensors="pt")["pixel_values"].half()
            for i in images
        ]

    def prompt(self, text: str, i: int) -> Prompt:
        """The prompt of `text` about scene i; only the pixels differ between scenes."""
        if text not in self.prompts:
            self.prompts[text] = self.vlm.prompt(text, self.blank)
        return replace(self.prompts[text], pixels=self.pixels[i].float())

    def batch(
        self, size: int, asking: float, guess_share: float, noise: float
    ) -> tuple[list[Prompt], list[list[int]]]:
        prompts, outputs = [], []
        for _ in range(size):
            i = self.rng.randrange(len(self.scenes))
            question = ask(self.scenes[i], self.rng)
            if self.rng.random() < asking:
                prompts.append(self.prompt(questioner.INSTRUCTION, i))
                outputs.append(questioner_output(question, self.scenes[i]))
            else:
                prompts.append(self.prompt(question + reasoner.INSTRUCTION, i))
                outputs.append(reasoner_output(question, self.scenes[i], self.rng, guess_share, noise))
        return prompts, [self.vlm.tokenizer(text)["input_ids"] + [self.vlm.end_ids[0]] for text in outputs]


def train(vlm: VLM, lessons: Lessons, steps: int, lr: float, **lesson) -> None:
    """AdamW on batches of 64 lessons, the learning rate warmed up and annealed to zero."""
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    vlm.model.train()
    progress = tqdm(range(steps), mininterval=20)
    for step in progress:
        scale = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * scale
        loss = supervised_loss(vlm, *lessons.batch(64, **lesson))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            progress.set_postfix_str(f"loss {loss.item():.3f}")
    vlm.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="where the checkpoint goes (default: this folder)"
    )
    parser.add_argument("--steps", type=int, default=4500, help="steps of the first stage (default: 4500)")
    parser.add_argument(
        "--guess-steps", type=int, default=400, help="steps of the second stage (default: 400)"
    )
    parser.add_argument(
        "--guess-share", type=float, default=0.55, help="guesses in the second stage (default: 0.55)"
    )
    parser.add_argument(
        "--noise", type=float, default=0.1, help="objects misread in the second stage (default: 0.1)"
    )
    parser.add_argument(
        "--keep-first", type=Path, help="also save the model as it is after the first stage here"
    )
    parser.add_argument("--start", type=Path, help="skip the first stage: begin with the model saved there")
    args = parser.parse_args()
    torch.manual_seed(0)
    vlm = VLM.load(args.start, "cpu", torch.float32) if args.start else new_vlm(args.out)
    lessons = Lessons(vlm, 8000, random.Random("toy base"))
    if not args.start:
        train(vlm, lessons, args.steps, 1e-3, asking=0.15, guess_share=0.0, noise=0.0)
        if args.keep_first:
            vlm.save(args.keep_first)
    train(vlm, lessons, args.guess_steps, 5e-4, asking=0.3, guess_share=args.guess_share, noise=args.noise)
    vlm.save(args.out)


if __name__ == "__main__":
    main()

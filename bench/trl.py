"""One whole GRPO step, rollout, reference and update, of TRL's GRPOTrainer and of ours, at equal settings.

    pip install -r bench/requirements-trl.txt
    python bench/trl.py --size small --prompt-tokens 300 --group-size 8 --new-tokens 48

Both read one checkpoint and the same images, and write exactly --new-tokens tokens a completion, at
temperature 1 and top-p 0.99. Both train all weights, by AdamW, with a reference (beta 0.01) and the clip at
0.2. TRL generates by transformers (vLLM wants a GPU) and is told what makes it fast: SDPA, no mixed precision
on a CPU, nothing logged or saved, and no gradient checkpointing, which it has by default: so it takes more
memory here than it would. It writes all completions at once; reference and update take a group at a time, or
--trl-rows completions (on a CPU all at once is slower, and takes three times the memory). "rest" is what a
step does besides: in TRL mostly the images of all completions, processed once more.

Before the clock runs, ours is given the completions and rewards of TRL's first step: the gradient and the
weights after it should be the same. In bfloat16 (the default on CUDA) only the gradient is near: ours keeps
float32 masters.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from iteration import Stopwatch
from PIL import Image
from shapes import ROOT, SPECIAL, arguments, image_side, peak_extra_bytes, random_vlm, show
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLProcessor, TrainerCallback

# Else `import trl`, here and in what is imported, would find this file.
sys.path[:] = [
    folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent
]

import grpo
from model.checkpoint import open_checkpoint
from model.generate import generate
from model.vlm import VLM
from training.policy import Trained

PARTS = ("rollout", "reference", "update", "rest")
TOP_P, BETA, CLIP, MAX_NORM = 0.99, 0.01, 0.2, 1.0
LR, WEIGHT_DECAY = 1e-4, 1e-2  # the paper's 1e-6 would move a float32's last digits only


def main() -> None:
    """Whether both sides agree, the peak of each, then their seconds in turns."""
    args = arguments(__doc__, repeats=3, trl_rows=0, vocab_size=0)
    if importlib.util.find_spec("trl") is None:
        sys.exit("bench/trl.py needs TRL: pip install -r bench/requirements-trl.txt")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args)
        ours = Ours(folder, args)
        theirs = Theirs(folder, ours, args)
        results = {"parameters": float(ours.vlm.model.num_parameters())} | agreement(ours, theirs)
        for name, side in dict(ours=ours, theirs=theirs).items():  # serves as warm-up, too
            results[f"{name}_peak_mb"] = peak_extra_bytes(side.step, args.device) / 1e6
        turns = [(spent(ours), spent(theirs)) for _ in range(args.repeats)]
    for part in (*PARTS, "step"):
        a, b = (statistics.median(turn[part] for turn in side) for side in zip(*turns))
        results |= {f"{part}: ours_s": a, f"{part}: theirs_s": b}
        if part != "rest":
            results[f"{part}: ratio"] = b / a
    results["trl"] = importlib.metadata.version("trl")
    show("trl", args, results)


def spent(side) -> dict[str, float]:
    """The seconds of each part of one step, and of the step."""
    side.watch.lap()
    side.watch.spent.clear()
    side.step()
    side.watch.lap()
    parts = {part: side.watch.spent[part] for part in PARTS}
    return parts | {"step": sum(parts.values())}


def reward(ids: list[int]) -> float:
    """Of a completion: its share of even tokens. It costs nothing and differs inside a group."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


# ---- What both read ----------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, args) -> None:
    """A random model with the toy's tokenizer, whose control tokens it gets; its images may be large."""
    model = random_vlm(args.size, args.device, args.dtype, args.vocab_size).model
    toy = open_checkpoint(ROOT / "toy").config
    for name in SPECIAL:
        setattr(model.config, name, getattr(toy, name))
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.config.text_config, name, getattr(toy.text_config, name))
        setattr(model.generation_config, name, getattr(toy.text_config, name))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "toy" / name, folder)
    settings = json.loads((ROOT / "toy" / "preprocessor_config.json").read_text())
    patch = model.config.vision_config.patch_size
    settings |= dict(patch_size=patch, max_pixels=16384 * (2 * patch) ** 2)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def questions(vlm: VLM, args) -> tuple[str, list[Image.Image]]:
    """A text and images that make prompts of exactly --prompt-tokens tokens, about 85% of them the image."""
    token = vlm.token_side
    # What the chat template writes.
    frame = len(vlm.prompt("", Image.new("RGB", (token, token)))) - 1
    side = image_side(args.prompt_tokens - frame)
    words = args.prompt_tokens - frame - side * side
    if words < 0:
        sys.exit(
            f"--prompt-tokens must be at least {frame + side * side}: the chat template and an image"
        )
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (args.prompts, token * side, token * side, 3), dtype=np.uint8)
    return " red" * words, [Image.fromarray(image) for image in pixels]


# ---- Ours --------------------------------------------------------------------------------------------------


class Ours:
    """A step as loop.py makes it: the Questioner's and the Reasoner's differ in their rewards alone."""

    def __init__(self, folder: str, args):
        self.args, self.watch = args, Stopwatch(args.device)
        self.vlm, self.reference = (VLM.load(folder, args.device, args.dtype) for _ in range(2))
        self.vlm.end_ids = [-1]  # nothing ends early
        torch.manual_seed(1)
        with torch.no_grad():  # away from the reference, that the KL is not 0
            for parameter in self.vlm.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.002)
        self.policy = Trained(self.vlm, LR, WEIGHT_DECAY)
        self.text, self.images = questions(self.vlm, args)
        self.rng = torch.Generator(args.device).manual_seed(0)

    def step(self) -> None:
        """One step."""
        prompts, completions = self.watch.timed(self.rollout, "rollout")()
        groups = self.watch.timed(self.groups, "rest")(prompts, completions)
        self.watch.timed(grpo.add_reference, "reference")(groups, self.reference)
        self.watch.timed(self.update, "update")(groups)

    def prompts(self) -> list:
        """Made anew for each step, as each step has other images."""
        return [self.vlm.prompt(self.text, image) for image in self.images]

    def rollout(self) -> tuple[list, list[list[list[int]]]]:
        """The prompts, and the completions of each."""
        prompts, args = self.prompts(), self.args
        groups = generate(
            self.vlm, prompts, args.group_size, args.new_tokens, top_p=TOP_P, generator=self.rng
        )
        assert all(len(ids) == args.new_tokens for group in groups for ids in group)
        return prompts, groups

    def groups(self, prompts: list, completions: list[list[list[int]]]) -> list[grpo.Group]:
        """With the rewards."""
        return [
            grpo.make_group(p, group, [reward(ids) for ids in group])
            for p, group in zip(prompts, completions)
        ]

    def update(self, groups: list[grpo.Group]) -> float:
        """Returns the gradient's norm before clipping."""
        return grpo.update(self.policy, self.policy.optimizer, groups, CLIP, BETA, 1.0, MAX_NORM)[
            "grad_norm"
        ]


# ---- Theirs ------------------------------------------------------------------------------------------------


class Theirs:
    """TRL's trainer, which trains for one step at a time."""

    def __init__(self, folder: str, ours: Ours, args):
        from datasets import Dataset
        from trl import GRPOTrainer

        self.args, self.watch, self.completions, self.norm = args, Stopwatch(args.device), [], None
        dtype = getattr(torch, args.dtype)
        opened = open_checkpoint(folder)
        model = opened.family.MODEL.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).to(args.device)
        model.load_state_dict(ours.vlm.model.state_dict())
        tokenizer = opened.tokenizer
        tokenizer.padding_side = "left"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True
        )
        asked = [
            dict(prompt=[dict(role="user", content=ours.text)], image=image)
            for image in ours.images
        ]
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=self.rewards,
            args=their_settings(folder, args),
            train_dataset=Dataset.from_list(asked),
            processing_class=Processor(
                opened.image_processor, tokenizer, None, chat_template=tokenizer.chat_template
            ),
            optimizers=(self.optimizer, None),
        )
        self.watch_parts()

    def watch_parts(self) -> None:
        """Times the parts of a step, what is between its begin and its end and in no other part as update."""
        from transformers.trainer_callback import PrinterCallback

        trainer, clip = self.trainer, self.trainer._clip_grad_norm
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepsOf(self.watch))
        self.watch.watch(trainer, "_prepare_inputs", "rest")
        self.watch.watch(trainer, "_generate", "rollout")
        self.watch.watch(trainer.ref_model, "forward", "reference")

        def clip_and_keep(model):
            self.norm = float(clip(model))
            return self.norm

        trainer._clip_grad_norm = clip_and_keep

    def rewards(self, completion_ids: list[list[int]], **_) -> list[float]:
        """As TRL asks for them: of all rows, a group's one after the other."""
        assert all(len(ids) == self.args.new_tokens for ids in completion_ids)
        self.completions = completion_ids
        return [reward(ids) for ids in completion_ids]

    def step(self) -> None:
        """One step."""
        self.trainer.train()


def their_settings(folder: str, args):
    """TRL's settings; those that are not about speed or silence are the paper's, as ours are."""
    from trl import GRPOConfig

    rows = args.prompts * args.group_size
    at_once = args.trl_rows or args.group_size
    if rows % at_once:
        sys.exit(f"--trl-rows must divide {rows}, the number of completions")
    sampling = dict(temperature=1.0, top_p=TOP_P, top_k=0, max_completion_length=args.new_tokens)
    sampling |= dict(
        num_generations=args.group_size, generation_kwargs=dict(min_new_tokens=args.new_tokens)
    )
    loss = dict(
        loss_type="grpo",
        scale_rewards="group",
        beta=BETA,
        epsilon=CLIP,
        use_bias_correction_kl=False,
    )
    training = dict(max_steps=1, per_device_train_batch_size=at_once, shuffle_dataset=False, seed=0)
    training |= dict(gradient_accumulation_steps=rows // at_once, max_grad_norm=MAX_NORM)
    training |= dict(learning_rate=LR, lr_scheduler_type="constant")
    fast = dict(gradient_checkpointing=False, bf16=False, use_cpu=args.device == "cpu")
    silent = dict(report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True)
    return GRPOConfig(output_dir=folder, **sampling, **loss, **training, **fast, **silent)


class Processor(Qwen2_5_VLProcessor):
    """transformers' processor without the one for videos, which would need torchvision.

    Qwen3-VL's does the same with images.
    """

    def check_argument_for_proper_class(self, *_) -> None:
        """Would refuse to have none."""


class StepsOf(TrainerCallback):
    """Tells a stopwatch when a step begins and ends; `train` does more before and after it."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch

    def on_step_begin(self, *_, **__) -> None:
        """From here to the end time is spent in the update, if in no other part."""
        self.watch.lap()
        self.watch.parts.append("update")

    def on_step_end(self, *_, **__) -> None:
        """After the optimizer's step."""
        self.watch.lap()
        self.watch.parts.pop()


# ---- Do both compute the same? -----------------------------------------------------------------------------


def agreement(ours: Ours, theirs: Theirs) -> dict[str, float]:
    """One step of TRL, and ours with its completions and rewards: relative differences of the two.

    TRL's std of a group's rewards divides by G - 1, ours by G; here ours divides as TRL does.
    """
    before = whole(ours.policy.parameters())
    theirs.step()
    n = ours.args.group_size
    rows = [theirs.completions[i : i + n] for i in range(0, len(theirs.completions), n)]
    groups = ours.groups(ours.prompts(), rows)
    grpo.add_reference(groups, ours.reference)
    with mock.patch.object(grpo, "group_advantages", their_advantages):
        norm = ours.update(groups)
    sides = [
        (ours.policy.optimizer, ours.policy.parameters()),
        (theirs.optimizer, list(theirs.trainer.model.parameters())),
    ]
    # After one step AdamW's first moment is a tenth of the clipped gradient.
    gradients = [
        whole(optimizer.state[p]["exp_avg"] for p in parameters) for optimizer, parameters in sides
    ]
    weights = [whole(parameters) for _, parameters in sides]
    steps = [[new - old for new, old in zip(side, before)] for side in weights]
    return {
        "gradient_norm": theirs.norm,
        "gradient_norm_difference": abs(norm - theirs.norm) / theirs.norm,
        "gradient_difference": difference(*gradients),
        "step_difference": difference(*steps),
        "weights_difference": difference(*weights),
    }


def their_advantages(rewards: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """`grpo.group_advantages` with the std that TRL takes. rewards: [N, G], returns [N, G]."""
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + eps)


@torch.no_grad()
def whole(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copies tensors in float32, those that FSDP2 has sharded in whole."""
    together = (x.full_tensor() if isinstance(x, DTensor) else x for x in tensors)
    return [x.float().clone() for x in together]


@torch.no_grad()
def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The norm of a - b over that of b."""

    def norm(tensors) -> float:
        return torch.stack([tensor.norm() for tensor in tensors]).norm().item()

    return norm([x - y for x, y in zip(a, b)]) / norm(b)


if __name__ == "__main__":
    main()

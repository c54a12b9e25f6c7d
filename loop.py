r"""VisPlay: one vision-language model teaches itself from unlabelled images (arXiv 2511.15661).

    for k = 1 .. K:
        train the Questioner   r = 1[valid] max(0, r_unc - r_div), the Reasoner frozen
        curate                 questions with tau_low <= c <= tau_high, labelled by the Reasoner's majority
        train the Reasoner     r = 1[answer = silver label], the Questioner frozen
        measure                accuracy on held-out questions, where the truth is known (built-in scenes)

`python loop.py` runs it on the toy model and scenes of this repository; `python loop.py --model
Qwen/Qwen2.5-VL-3B-Instruct --images FOLDER` on a real model and your own images. A run lives in runs/NAME/.

Differs from the paper: both roles live in one process, with no server between them. Differs from the official code:
see rewards.py, curate.py and grpo.py, each at its top.
"""

import signal

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C during the long imports below ends without a traceback

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image
from transformers.utils import logging as transformers_logging

import curate
import evaluate
import grpo
import questioner as questioner_role
import reasoner as reasoner_role
import rewards
import signatures
from curate import Example
from engine import plan
from engine.images import Found, ImageError, Picture, find_images, load_image
from engine.run import Run, RunError, Stopped, mean, printable
from engine.shards import Ranks, started
from questioner import Proposal
from vlm import VLM, Prompt, load_config, load_processors

TOY = Path(__file__).parent / "toy"
# The paper's hyper-parameters fit models of billions of parameters; these fit the toy, when no --model is given.
# Its Reasoner has one thing to find out: a longer phase exhausts it, and a Questioner whose Reasoner is sure of every
# question finds that it is unsure of those that have no answer ("Is there?"), the failure that the paper warns of.
TOY_DEFAULTS = dict(
    lr=6e-5, reasoner_steps=3, images_per_step=32, candidates=256, max_new_tokens=32, dtype="float32"
)
Reward = Callable[[str | None, Example], float]  # (answer, curated question) -> reward
MAY_CHANGE = ("name", "resume", "dry_run", "device", "gradient_checkpointing", "offload", "save_every")
TOO_LITTLE_MEMORY = (
    "the GPU has too little memory: run again with the same --name and --gradient-checkpointing, --offload or both, which goes on "
    "where this stopped; or begin anew with a lower --max-new-tokens, --max-pixels or --group-size"
)
PROBES = 64  # questions on which the Reasoner is compared with the base
SCENES, HELD_OUT_QUESTIONS, HELD_OUT_SEED = (
    512,
    512,
    1_000_000,
)  # the built-in scenes; no run's seed is that large


# ---- Settings ----------------------------------------------------------------------------------------------------------


def setting(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Every setting of a run: one flag each, the paper's values as defaults."""

    model: str | None = setting(
        None, "folder or hub id of a Qwen2.5-VL or MiMo-VL checkpoint (default: the toy here)"
    )
    images: str | None = setting(
        None, "folder (with subfolders), glob, or .txt/.jsonl list of images (default: built-in scenes)"
    )
    name: str | None = setting(None, "the run's folder under runs/ (default: the model's name and the time)")
    resume: str | None = setting(
        None, "continue the run in this folder where it was stopped or killed; takes no other flag"
    )
    seed: int = setting(0, "seed of everything random")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    dtype: str | None = setting(None, "float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")
    iterations: int = setting(3, "iterations of the loop, the paper's K")
    questioner_steps: int = setting(
        20, "GRPO steps of a Questioner phase, the paper's S_Q (20 for 3B, 10 for 7B)"
    )
    reasoner_steps: int = setting(
        20, "GRPO steps of a Reasoner phase, the paper's S_R (20 for 3B, 10 for 7B)"
    )
    images_per_step: int = setting(128, "images (Questioner) or curated questions (Reasoner) in a step")
    group_size: int = setting(8, "completions of one prompt that GRPO compares, the paper's G")
    answers: int = setting(10, "answers the Reasoner votes with on a question, the paper's m")
    candidates: int = setting(1000, "questions proposed for curation, the paper's N")
    tau_low: float = setting(0.25, "lowest confidence of a curated question, the paper's tau_low, inclusive")
    tau_high: float = setting(
        0.75, "highest confidence of a curated question, the paper's tau_high, inclusive"
    )
    diversity_weight: float = setting(1.0, "weight of the diversity penalty, the paper's lambda")
    lr: float = setting(1e-6, "learning rate of AdamW in both phases")
    weight_decay: float = setting(1e-2, "weight decay of AdamW")
    beta: float = setting(1e-2, "weight of the KL to the role at the start of its phase, the paper's beta")
    clip: float = setting(
        0.2, "clipping range of the ratio, the paper's epsilon; idle with one update a rollout, as here"
    )
    temperature: float = setting(1.0, "sampling temperature; divides the logits in training too")
    top_p: float = setting(0.99, "nucleus sampling: the smallest set of tokens with this probability")
    max_new_tokens: int = setting(1024, "longest completion, in tokens")
    max_pixels: int = setting(802_816, "larger images are scaled down to this; 28 x 28 pixels make one token")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    offload: bool = setting(
        False, "keep float32 master weights and AdamW's moments in CPU memory, for a GPU that is too small"
    )
    save_every: int = setting(
        5, "steps between two saved states of a run; a state is also saved when a phase ends"
    )
    dry_run: bool = setting(False, "print what would run and how much memory it takes, then stop")

    def check(self) -> None:
        """Raises ValueError, with a sentence for the user, for a value out of range."""
        least = dict(
            iterations=1, questioner_steps=1, reasoner_steps=1, images_per_step=1, group_size=2, answers=1
        )
        least |= dict(candidates=1, max_new_tokens=1, max_pixels=28 * 28, seed=0, lr=0.0, weight_decay=0.0)
        least |= dict(beta=0.0, diversity_weight=0.0, tau_low=0.0, save_every=1)
        for name, value in least.items():
            if not getattr(self, name) >= value or math.isinf(getattr(self, name)):
                raise ValueError(
                    f"{_flag(name)} must be a number of at least {value}, not {getattr(self, name)}"
                )
        if not self.tau_low <= self.tau_high <= 1:
            raise ValueError(
                f"--tau-low ({self.tau_low}) must not be above --tau-high ({self.tau_high}), nor that above 1"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"--temperature must be above 0, not {self.temperature}: GRPO compares random samples"
            )
        if not 0 < self.top_p <= 1 or not 0 < self.clip < 1:
            raise ValueError("--top-p must be above 0 and at most 1, and --clip between 0 and 1")
        for name in ("model", "images"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"{_flag(name)} is empty")
        if self.name is not None and (not self.name.strip(". ") or Path(self.name).name != self.name):
            raise ValueError(f"--name {self.name!r} is not the name of a folder")
        if self.seed >= HELD_OUT_SEED:
            raise ValueError(f"--seed must be below {HELD_OUT_SEED}, the seed of the held-out scenes")

    @property
    def sampling(self) -> dict:
        return dict(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)


# ---- The loop ----------------------------------------------------------------------------------------------------------


def silver_label_reward(answer: str | None, example: Example) -> float:
    """The Reasoner's reward: 1 if the answer equals the silver label, else 0."""
    return rewards.answer_reward(answer, example.label)


def visplay(
    s: Settings, run: Run, questioner: VLM, reasoner: VLM, answer_reward: Reward = silver_label_reward
) -> None:
    """Goes on from the state of the run until s.iterations are complete. `answer_reward` is the Reasoner's; experiments replace it."""
    roles = {"questioner": questioner, "reasoner": reasoner}
    settings = dict(lr=s.lr, weight_decay=s.weight_decay, offload=s.offload, ranks=run.ranks)
    optimizers = {
        name: grpo.MasterAdamW(role.model.named_parameters(), **settings) for name, role in roles.items()
    }
    run.restore(optimizers)
    if run.at(0, "measure"):
        settle(s, reasoner, questioner)
        run.report(0, measure(s, run, reasoner, []))
        run.advance()
    for k in range(run.state.iteration, s.iterations + 1):
        if run.at(k, "questioner"):
            settle(s, questioner, reasoner)
            with optimizers["questioner"] as optimizer:
                train_questioner(s, run, k, questioner, reasoner, optimizer)
        if run.at(k, "curation"):
            settle(s, questioner, reasoner)
            curate_questions(s, run, k, questioner, reasoner)
        settle(s, reasoner, questioner)
        curated = curate.read_examples(run.curated(k))
        if run.at(k, "reasoner"):
            with optimizers["reasoner"] as optimizer:
                train_reasoner(s, run, k, reasoner, optimizer, curated, answer_reward)
        run.report(k, measure(s, run, reasoner, curated) | base_agreement(s, run, k, reasoner))
        watch_drift(run, k)
        run.export(roles)
        run.advance()


def seeded(s: Settings, run: Run, k: int, phase: str, step: int) -> torch.Generator:
    """The random numbers of one step depend on nothing but its place in the run (and the rank), so that it can be done again."""
    place = f"{s.seed} {k} {phase} {step}" + (f" rank {run.ranks.rank}" if run.ranks.rank else "")
    digest = hashlib.sha256(place.encode()).digest()
    return torch.Generator(device_of(s)).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def settle(s: Settings, trained: VLM, frozen: VLM) -> None:
    """The role that is trained lives on the device; the other one in CPU memory, and is lent to the device when it works."""
    frozen.park()
    trained.model.to(device_of(s))


def train_questioner(s, run, k, questioner: VLM, reasoner: VLM, optimizer) -> None:
    """Phase 1: GRPO on the Questioner; the Reasoner only answers."""
    reference = run.begin("questioner", questioner, optimizer)
    for step in run.steps("questioner", s.questioner_steps, optimizer):
        start, batch = time.time(), run.pictures.take(s.images_per_step, run.ranks)

        def work():
            generator = seeded(s, run, k, "questioner", step)
            prompts, proposals, voted = ask_and_vote(s, questioner, reasoner, batch, s.group_size, generator)
            groups = []
            for prompt, group, votes in zip(prompts, proposals, voted):
                texts, confidences = (
                    [v and v.question for v in votes],
                    [v.confidence if v else 0.0 for v in votes],
                )
                reward = rewards.questioner_rewards(texts, confidences, s.diversity_weight)
                groups.append(grpo.Group(prompt, [p.completion for p in group], reward))
            return gradient(s, questioner, reference, groups, s.images_per_step), groups, voted

        metrics, groups, voted = with_less_memory(
            run.ranks, (questioner, reasoner, reference), optimizer, work
        )
        metrics, voted = grpo.take_step(optimizer, metrics), gather_examples(run, voted)
        run.log(metrics | questioner_metrics(s, voted), groups, start, questioner.end_ids)
        if not any(v for votes in voted for v in votes):
            run.say(f"step {step}: not one question was valid; rewards and advantages are 0")


def curate_questions(s, run, k, questioner: VLM, reasoner: VLM) -> None:
    """Phase 2: the updated Questioner proposes, the Reasoner votes, and questions of middling confidence are kept."""
    start, candidates = time.time(), []
    for done in range(0, s.candidates, s.images_per_step):  # in batches: decoded images are large
        batch = run.pictures.take(min(s.images_per_step, s.candidates - done), run.ranks)

        def work():
            return ask_and_vote(s, questioner, reasoner, batch, 1, seeded(s, run, k, "curation", done))[2]

        voted = with_less_memory(run.ranks, (questioner, reasoner), None, work)
        candidates += [v for (v,) in gather_examples(run, voted) if v]
        run.stop_if_asked()
    curated = curate.curate(candidates, s.tau_low, s.tau_high)
    run.write(
        dict(iteration=k, phase="curation", candidates=s.candidates, validity=len(candidates) / s.candidates)
        | dict(
            curated=len(curated),
            confidence=mean([e.confidence for e in candidates]),
            seconds=time.time() - start,
        )
    )
    asking = run.of("questioner")
    run.warn(
        "stagnant difficulty",
        signatures.stagnant_difficulty([r["r_unc"] for r in asking if r["iteration"] == k]),
    )
    run.warn("question collapse", signatures.question_collapse(asking[0], asking[-1]))
    if run.ranks.first:
        curate.write_examples(run.candidates(k), candidates)
        curate.write_examples(run.curated(k), curated)
    run.advance(files={"curated": run.curated(k), f"candidates {k}": run.candidates(k)})


def train_reasoner(s, run, k, reasoner: VLM, optimizer, curated: list[Example], answer_reward) -> None:
    """Phase 3: GRPO on the Reasoner with the silver labels; a step takes the next curated questions, round and round."""
    if not curated:
        run.say(
            f"iteration {k}: no question has a confidence in [{s.tau_low}, {s.tau_high}]; the Reasoner is not trained"
        )
        return run.advance()
    reference = run.begin("reasoner", reasoner, optimizer)
    order, size = (
        random.Random(f"{s.seed} {k} curated").sample(curated, len(curated)),
        min(s.images_per_step, len(curated)),
    )
    for step in run.steps("reasoner", s.reasoner_steps, optimizer):
        start = time.time()
        batch = run.ranks.share([order[i % len(order)] for i in range((step - 1) * size, step * size)])
        prompts = [reasoner_role.answer_prompt(reasoner, load_curated(e), e.question) for e in batch]

        def work():
            generator = seeded(s, run, k, "reasoner", step)
            answers = reasoner_role.answer(reasoner, prompts, s.group_size, **s.sampling, generator=generator)
            groups = [
                grpo.Group(prompt, [a.completion for a in group], [answer_reward(a.answer, e) for a in group])
                for prompt, group, e in zip(prompts, answers, batch)
            ]
            return (
                gradient(s, reasoner, reference, groups, size),
                groups,
                [[a.answer for a in group] for group in answers],
            )

        metrics, groups, answers = with_less_memory(run.ranks, (reasoner, reference), optimizer, work)
        metrics, answers = grpo.take_step(optimizer, metrics), run.ranks.gather(answers)
        metrics["validity"] = mean([a is not None for group in answers for a in group])
        metrics["confidence"] = mean([rewards.confidence(group)[1] for group in answers])
        run.log(metrics, groups, start, reasoner.end_ids)


def load_curated(example: Example) -> Image:
    """The image of a curated question. Raises ImageError, with its path, if it can no longer be read."""
    try:
        return load_image(example.image)
    except ImageError as error:
        raise ImageError(
            f"the image {printable(example.image)} of a curated question is gone or changed: {error}"
        ) from error


def with_less_memory(ranks: Ranks, models: tuple[VLM, ...], optimizer, work: Callable):
    """Does this rank's part of a step; if a GPU runs out of memory, once more on all, with half as many tokens at a time."""
    for attempt in (1, 2):
        failed, result = False, None
        try:
            result = work()
        except torch.OutOfMemoryError:
            failed = True
        if not ranks.any(failed):
            return result
        torch.cuda.empty_cache()
        for model in models if attempt == 1 else ():
            model.budget /= 2
        if optimizer is not None:
            optimizer.discard()
    raise RunError(f"{TOO_LITTLE_MEMORY} (half as many tokens at a time were still too many)")


def gather_examples(run: Run, voted: list[list[Example | None]]) -> list[list[Example | None]]:
    """The questions and votes of all ranks."""
    everywhere = run.ranks.gather([[v and dataclasses.asdict(v) for v in votes] for votes in voted])
    return [[v and Example(**v) for v in votes] for votes in everywhere]


def ask_and_vote(
    s: Settings, questioner: VLM, reasoner: VLM, batch: list[Picture], n: int, generator
) -> tuple[list[Prompt], list[list[Proposal]], list[list[Example | None]]]:
    """The Questioner asks n questions about each picture, the Reasoner answers each of them m times.

    The majority of the answers is the silver label, its share the confidence. Returns per picture the Questioner's prompt,
    its n proposals and, for each, the question with its votes: None where the proposal is not valid.
    """
    patches = [questioner.patches(picture.image) for picture in batch]
    prompts = [questioner_role.ask_prompt(questioner, p) for p in patches]
    proposals = questioner_role.propose(questioner, prompts, n, **s.sampling, generator=generator)
    asked = [
        reasoner_role.answer_prompt(reasoner, p, proposal.question.text)
        for p, group in zip(patches, proposals)
        for proposal in group
        if proposal.question
    ]
    with reasoner.on(device_of(s)):
        answered = iter(reasoner_role.answer(reasoner, asked, s.answers, **s.sampling, generator=generator))

    def vote(picture: Picture, proposal: Proposal) -> Example | None:
        if proposal.question is None:
            return None
        answers, question = [a.answer for a in next(answered)], proposal.question
        return Example(picture.path, question.text, question.kind, *rewards.confidence(answers), answers)

    return prompts, proposals, [[vote(picture, p) for p in group] for picture, group in zip(batch, proposals)]


def gradient(
    s: Settings, policy: VLM, reference: VLM, groups: list[grpo.Group], all_groups: int
) -> dict[str, float]:
    """Adds these groups' part of the gradient to the policy's; all_groups: how many there are on all ranks."""
    with reference.on(device_of(s)):
        grpo.add_reference(groups, reference, s.temperature)
    return grpo.backward(policy, groups, s.clip, s.beta, s.temperature, total=all_groups * s.group_size)


def questioner_metrics(s: Settings, voted: list[list[Example | None]]) -> dict:
    """What the Questioner's rewards are made of: means over its valid questions; `clusters` over images that have any."""
    asked = [[v.question for v in votes if v] for votes in voted]
    valid = [v for votes in voted for v in votes if v]
    return {
        "validity": len(valid) / (len(voted) * s.group_size),
        "r_unc": mean([rewards.uncertainty_reward(v.confidence) for v in valid]),
        "r_div": mean(
            [r for texts in asked for r in rewards.diversity_penalty(texts, s.diversity_weight, s.group_size)]
        ),
        "confidence": mean([v.confidence for v in valid]),
        "clusters": mean([len(set(rewards.cluster_questions(texts))) for texts in asked if texts]),
    } | signatures.variety([v.question for v in valid], [v.kind for v in valid])


def base_agreement(s: Settings, run: Run, k: int, reasoner: VLM) -> dict:
    """How often the Reasoner's majority is still the base's: on some of the candidates of iteration 1, which the base answered."""
    base = [e for e in curate.read_examples(run.candidates(1)) if e.label is not None]
    base = base[:: -(-len(base) // PROBES)] if base else []
    mine = run.ranks.share(base)
    prompts = [reasoner_role.answer_prompt(reasoner, load_curated(e), e.question) for e in mine]
    answers = reasoner_role.answer(
        reasoner, prompts, s.answers, **s.sampling, generator=seeded(s, run, k, "probe", 0)
    )
    votes = run.ranks.gather([list(rewards.confidence([a.answer for a in group])) for group in answers])
    agree = [rewards.answer_reward(label, e.label) for (label, _), e in zip(votes, base)]
    return {
        "base_agreement": mean(agree) if base else None,
        "probe_confidence": mean([c for _, c in votes]) if base else None,
    }


def watch_drift(run: Run, k: int) -> None:
    """Warns if the labels have become worse since the iteration before."""
    records = {r["iteration"]: r for r in run.of("curation")}
    measured = {r["iteration"]: records.get(r["iteration"], {}) | r for r in run.of("measure")}
    if k > 1:
        run.warn("pseudo-label drift", signatures.label_drift(measured[k - 1], measured[k]))


def measure(s: Settings, run: Run, reasoner: VLM, curated: list[Example]) -> dict:
    """Accuracy on held-out scenes and of the silver labels; {} for your own images, whose truth nobody knows.

    The true labels stay in here: what is returned is printed and written, and used for nothing else.
    """
    if s.images is not None:
        return {}
    import toy.measure as truth  # imports the exact answerer, which self-play must not

    results = {}
    if run.ranks.first:
        items = truth.held_out_questions(
            run.folder / "held-out", HELD_OUT_QUESTIONS, HELD_OUT_SEED, run.scene_size
        )
        outcomes = evaluate.answer_all(
            reasoner, items, 4, len(items), **s.sampling, generator=seeded(s, run, 0, "measure", 0)
        )
        scores = evaluate.scores(outcomes)
        results = {name: scores[name] for name in ("greedy_accuracy", "sampled_accuracy")}
        results |= truth.silver_label_accuracy(curated, run.folder / "images")
    return run.ranks.gather([results])[0]


# ---- The command line --------------------------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """The settings of a command line; exits with 2 and one sentence if it is wrong."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(Settings):
        if field.type is bool:
            parser.add_argument(
                _flag(field.name), action="store_true", default=None, help=field.metadata["help"]
            )
            continue
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            toy = f"; without --model {TOY_DEFAULTS[field.name]}" if field.name in TOY_DEFAULTS else ""
            text += f" (default: {field.default}{toy})"
        kind = field.type if field.type in (int, float) else str
        choices = ("float32", "bfloat16") if field.name == "dtype" else None
        parser.add_argument(
            _flag(field.name), type=kind, choices=choices, metavar=field.name.upper(), help=text
        )
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "resume" in given:
        if len(given) > 1:
            parser.error("--resume takes the settings of the run it continues, and no other flag")
        return Settings(resume=given["resume"])
    return Settings(**(given if "model" in given else TOY_DEFAULTS | given))


def prepare(s: Settings, ranks: Ranks) -> Run:
    """Checks the settings and finds the images; writes nothing. Raises ValueError with a sentence for the user."""
    s.check()
    check_device(s.device, ranks)
    if s.images is not None:
        s.images = os.path.abspath(os.path.expanduser(s.images))  # so that a run can be resumed from anywhere
    if s.model is not None and Path(s.model).is_dir():
        s.model = os.path.abspath(s.model)
    load_config(model_of(s))
    _, image_processor, _ = load_processors(model_of(s))
    name = s.name or f"{Path(model_of(s)).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / ranks.gather([name])[0]  # the first rank's clock counts
    # A scene has 3 x 3 cells: 84 pixels suit the toy, 336 (144 image tokens) a real model.
    s.max_pixels = min(s.max_pixels, image_processor.size["longest_edge"])
    scene_size = max(84, min(336, math.isqrt(s.max_pixels)) // 84 * 84)
    exists = ranks.any((folder / "config.json").exists())  # asked before any rank makes it
    if exists and not s.dry_run:
        check_same_settings(s, folder)
        return reopened(s, folder, scene_size, ranks)
    begun = (
        "state",
        "lock",
        "images.json",
    )  # all there is if a run was killed before its config.json was written
    if (
        folder.exists()
        and not s.dry_run
        and any(p.name not in begun and p.suffix != ".new" for p in folder.iterdir())
    ):
        raise ValueError(f"{folder} exists already and is not the folder of a run; choose another --name")
    return Run(folder, find(s), scene_size, s.seed, s.save_every, ranks)


def check_same_settings(s: Settings, folder: Path) -> None:
    """Raises ValueError naming the first setting that is not what the run in `folder` was started with.

    What only decides where and in how much memory the same numbers are computed may change.
    """
    before, _ = saved_settings(folder)
    for field in dataclasses.fields(Settings):
        was, now = getattr(before, field.name), getattr(s, field.name)
        if field.name not in MAY_CHANGE and was != now:
            raise ValueError(
                f"{folder} was started with {_flag(field.name)} {was}, not {now}; "
                f"--resume {folder} goes on with its own settings, another --name starts a new run"
            )


def saved_settings(folder: Path) -> tuple[Settings, int]:
    """The settings of the run in `folder` and the size of its scenes. Raises ValueError with a sentence for the user."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        scene_size = config.pop("scene_size")
        return Settings(**config), scene_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--resume {folder}: this is not the folder of a run of loop.py") from error


def model_of(s: Settings) -> str:
    return str(TOY) if s.model is None else s.model


def device_of(s: Settings) -> torch.device:
    return torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_device(name: str | None, ranks: Ranks) -> None:
    """Raises ValueError if torch has no such device here, or if all ranks would be on one GPU."""
    if ranks.size > 1 and (name or "").startswith("cuda:"):
        raise ValueError(
            f"--device {name}: under torchrun each process takes its own GPU; say --device cuda, or nothing"
        )
    try:
        if name is not None and torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError
        torch.empty(0, device=name or "cpu")
    except Exception as error:  # torch raises RuntimeError, AssertionError or AttributeError, as it happens
        raise ValueError(f"--device {name}: there is no such device here, cpu and cuda are known") from error


def find(s: Settings) -> Found:
    """The user's images; nothing for the built-in scenes, which are rendered when the run starts."""
    if s.images is None:
        return Found([], [])
    found = find_images(s.images)
    if not found.paths:
        raise ValueError(f"--images {s.images}: no readable image found ({len(found.skipped)} skipped)")
    return found


def resume(folder: Path, ranks: Ranks) -> tuple[Settings, Run]:
    """The settings and the run in a folder. Raises ValueError with a sentence for the user."""
    s, scene_size = saved_settings(folder)
    s.check()
    check_device(s.device, ranks)
    return s, reopened(s, folder, scene_size, ranks)


def reopened(s: Settings, folder: Path, scene_size: int, ranks: Ranks) -> Run:
    """A run that goes on with the images that it began with."""
    try:
        found = json.loads((folder / "images.json").read_text())
        images = Found(found["paths"], [(path, why) for path, why in found["skipped"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/images.json, the list of the run's images, cannot be read") from error
    run = Run(folder, images, scene_size, s.seed, s.save_every, ranks)
    run.reopen(dataclasses.asdict(s) | {"scene_size": scene_size})
    return run


def load_roles(s: Settings) -> tuple[VLM, VLM]:
    """Both roles, as copies of the base model."""
    base = VLM.load(model_of(s), s.device, s.dtype, s.max_pixels)
    if s.gradient_checkpointing:
        base.checkpoint_activations()
    return base, base.copy()


def start_run(s: Settings, run: Run) -> None:
    """Makes the run folder if it is new, and renders the built-in scenes if there are no other images."""
    if run.number == 0:
        run.create(dataclasses.asdict(s) | {"scene_size": run.scene_size})
    if s.images is not None:
        return
    from toy.scenes import write_scenes  # draws; what the answers are, only toy/answerer.py knows

    mine = write_scenes(run.folder / "images", SCENES, s.seed, run.scene_size) if run.ranks.first else []
    run.images.paths[:] = run.ranks.gather([list(map(str, mine))])[0]
    if run.number == 0 and run.ranks.first:
        print(f"no --images given: built-in scenes are in {run.folder / 'images'}")


def print_plan(s: Settings, run: Run) -> None:
    """What will run: images, tokens, steps and the memory of each phase."""
    device = device_of(s)
    dtype = (
        getattr(torch, s.dtype) if s.dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)
    )
    config, found, image_tokens = load_config(model_of(s)), run.images, s.max_pixels // (28 * 28)
    if s.images is None:
        image_tokens = (run.scene_size // 28) ** 2
        print(
            f"images   {SCENES} built-in scenes of {run.scene_size} x {run.scene_size} pixels, {image_tokens} tokens each"
        )
    else:
        print(
            f"images   {len(found.paths)} found, {len(found.skipped)} skipped, up to about {image_tokens} tokens each"
        )
        for path, reason in found.skipped:
            print(f"         skipped {printable(path)}: {reason}")
    questions = s.images_per_step * s.group_size
    print(
        f"model    {s.model or 'the toy'}: {sum(plan.parameter_sizes(config).values()):,} parameters, {dtype}, on {run.ranks.size} x {device}"
    )
    print(
        f"steps    {s.iterations} iterations of {s.questioner_steps} Questioner and {s.reasoner_steps} Reasoner steps"
    )
    print(f"         a Questioner step samples {questions} questions and {questions * s.answers} answers,")
    print(f"         a curation {s.candidates} questions and {s.candidates * s.answers} answers,")
    print(f"         and a Reasoner step up to {questions} answers")
    work = plan.Work(
        image_tokens, 100, s.max_new_tokens, s.group_size, questions, s.answers
    )  # 100: an instruction, a question
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    for moment in plan.memory_plan(
        config, dtype, total, work, s.gradient_checkpointing, s.offload, run.ranks.size
    ):
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in moment.parts.items() if size)
        verdict = (
            ""
            if total is None or moment.total < total
            else f"; MORE than the {total / 2**30:.0f} GiB of {device}"
        )
        print(f"memory   {moment.name}: {moment.total / 2**30:.2f} GiB ({parts}){verdict}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 2: a wrong argument or input, 1: anything else."""
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # a mistyped model name is our sentence, not its retries
    warnings.filterwarnings(
        "ignore", module="PIL"
    )  # a strange image is used or skipped, and listed if skipped
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    s = parse_arguments(argv)
    try:
        with started() as ranks:
            return start(s, ranks)
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        why = str(error).splitlines()[0]
        print(
            f"error: another process of this run has ended or cannot be reached ({why}); start them again to go on",
            file=sys.stderr,
        )
        return 1


def start(s: Settings, ranks: Ranks) -> int:
    """Checks everything, then runs; returns the exit code."""
    try:
        if s.resume is not None:
            s, run = resume(Path(s.resume), ranks)
        else:
            run = prepare(s, ranks)
        if run.state.iteration > s.iterations:
            if ranks.first:
                print(f"{run.folder} is complete: all of its {s.iterations} iterations are done")
            return 0
        if ranks.first:
            print_plan(s, run)
        if s.dry_run:
            return 0
        roles = load_roles(s)
        start_run(s, run)
    except (ValueError, OSError) as error:  # CheckpointError and ImageError are ValueErrors
        sys.stderr.write(f"error: {error}\n")  # in one piece: several processes may say so at once
        return 2
    return carry_out(s, run, roles)


def carry_out(s: Settings, run: Run, roles: tuple[VLM, VLM]) -> int:
    """Runs the loop; turns what can stop it into a sentence and an exit code."""

    def stop(signum, frame):
        run.stopping = True
        run.say("stopping after this step (Ctrl-C again: at once)")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, stop)
    go_on = f"continue with: python loop.py --resume {run.folder}"
    try:
        visplay(s, run, *roles)
    except ImageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as reason:
        if run.ranks.first:
            print(
                f"{'stopped, its state is saved' if isinstance(reason, Stopped) else 'interrupted'}; {go_on}",
                file=sys.stderr,
            )
        return 1
    except OSError as error:  # a full disk
        print(f"error: {error}; when that is mended, {go_on}", file=sys.stderr)
        return 1
    except (RunError, torch.OutOfMemoryError) as error:
        print(f"error: {error if isinstance(error, RunError) else TOO_LITTLE_MEMORY}", file=sys.stderr)
        return 1
    finally:
        run.unlock()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if run.ranks.first:
        print(f"done: metrics, curated questions and both checkpoints are in {run.folder}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # the name of a run need not be UTF-8
    sys.exit(main())

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

import argparse
import dataclasses
import itertools
import json
import logging
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import curate
import grpo
import plan
import questioner as questioner_role
import reasoner as reasoner_role
import rewards
from curate import Example
from images import Found, ImageError, Picture, find_images, load_image, shuffled
from questioner import Question
from vlm import VLM, load_config, load_processors

TOY = Path(__file__).parent / "toy"
# The paper's hyper-parameters fit models of billions of parameters; these fit the toy, when no --model is given.
TOY_DEFAULTS = dict(lr=1e-4, questioner_steps=10, images_per_step=16, candidates=192, max_new_tokens=32)
Reward = Callable[[str | None, str], float]  # (answer, silver label) -> reward
SCENES, HELD_OUT_QUESTIONS, HELD_OUT_SEED = 512, 512, 1_000_000  # the built-in scenes; no run's seed is that large


# ---- Settings ----------------------------------------------------------------------------------------------------------


def setting(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Every setting of a run: one flag each, the paper's values as defaults."""

    model: str | None = setting(None, "folder or hub id of a Qwen2.5-VL or MiMo-VL checkpoint (default: the toy in this repository)")
    images: str | None = setting(None, "folder (with subfolders), glob, or .txt/.jsonl list of images (default: built-in scenes)")
    name: str | None = setting(None, "the run's folder under runs/ (default: the model's name and the time)")
    resume: str | None = setting(None, "continue the run in this folder after its last complete iteration; takes no other flag")
    seed: int = setting(0, "seed of everything random")
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    dtype: str | None = setting(None, "float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")
    iterations: int = setting(3, "iterations of the loop, the paper's K")
    questioner_steps: int = setting(20, "GRPO steps of a Questioner phase, the paper's S_Q (20 for 3B, 10 for 7B)")
    reasoner_steps: int = setting(20, "GRPO steps of a Reasoner phase, the paper's S_R (20 for 3B, 10 for 7B)")
    images_per_step: int = setting(128, "images (Questioner) or curated questions (Reasoner) in a step: 128 in the official code's update")
    group_size: int = setting(8, "completions of one prompt that GRPO compares, the paper's G")
    answers: int = setting(10, "answers the Reasoner votes with on a question, the paper's m")
    candidates: int = setting(1000, "questions proposed for curation, the paper's N")
    tau_low: float = setting(0.25, "lowest confidence of a curated question, the paper's tau_low, inclusive")
    tau_high: float = setting(0.75, "highest confidence of a curated question, the paper's tau_high, inclusive")
    diversity_weight: float = setting(1.0, "weight of the diversity penalty, the paper's lambda")
    lr: float = setting(1e-6, "learning rate of AdamW in both phases")
    weight_decay: float = setting(1e-2, "weight decay of AdamW")
    beta: float = setting(1e-2, "weight of the KL to the role at the start of its phase, the paper's beta")
    clip: float = setting(0.2, "clipping range of the probability ratio, the paper's epsilon")
    temperature: float = setting(1.0, "sampling temperature; divides the logits in training too")
    top_p: float = setting(0.99, "nucleus sampling: the smallest set of tokens with this probability")
    max_new_tokens: int = setting(1024, "longest completion, in tokens")
    max_pixels: int = setting(802_816, "larger images are scaled down to this; 28 x 28 pixels make one token")
    dry_run: bool = setting(False, "print what would run and how much memory it takes, then stop")

    def check(self) -> None:
        """Raises ValueError, with a sentence for the user, for a value out of range."""
        least = dict(iterations=1, questioner_steps=1, reasoner_steps=1, images_per_step=1, group_size=2, answers=1)
        least |= dict(candidates=1, max_new_tokens=1, max_pixels=28 * 28, seed=0, lr=0.0, weight_decay=0.0)
        least |= dict(beta=0.0, diversity_weight=0.0, tau_low=0.0)
        for name, value in least.items():
            if not getattr(self, name) >= value or math.isinf(getattr(self, name)):
                raise ValueError(f"{_flag(name)} must be a number of at least {value}, not {getattr(self, name)}")
        if not self.tau_low <= self.tau_high <= 1:
            raise ValueError(f"--tau-low ({self.tau_low}) must not be above --tau-high ({self.tau_high}), nor that above 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, not {self.temperature}: GRPO compares random samples")
        if not 0 < self.top_p <= 1 or not 0 < self.clip < 1:
            raise ValueError("--top-p must be above 0 and at most 1, and --clip between 0 and 1")
        if self.seed >= HELD_OUT_SEED:
            raise ValueError(f"--seed must be below {HELD_OUT_SEED}, the seed of the held-out scenes")

    @property
    def sampling(self) -> dict:
        return dict(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)


# ---- The loop ----------------------------------------------------------------------------------------------------------


def visplay(s: Settings, run: "Run", questioner: VLM, reasoner: VLM, answer_reward: Reward = rewards.answer_reward) -> None:
    """Runs iterations until s.iterations are complete. `answer_reward` is the Reasoner's; a test replaces it."""
    if run.completed == 0:
        run.report(0, measure(s, run, reasoner, []))
    for k in range(run.completed + 1, s.iterations + 1):
        generator = torch.Generator(questioner.device).manual_seed(s.seed * 1000 + k)
        pictures = shuffled(run.images.paths, random.Random(f"{s.seed} {k}"), run.images.skipped)

        train_questioner(s, run, k, questioner, reasoner, pictures, generator)
        curated = curate_questions(s, run, k, questioner, reasoner, pictures, generator)
        train_reasoner(s, run, k, reasoner, curated, answer_reward, generator)

        run.report(k, measure(s, run, reasoner, curated))
        run.save_roles(k, questioner, reasoner)


def train_questioner(s, run, k, questioner: VLM, reasoner: VLM, pictures: Iterator[Picture], generator) -> None:
    """Phase 1: GRPO on the Questioner; the Reasoner only answers."""
    reference, optimizer = questioner.copy(), grpo.MasterAdamW(questioner.model.parameters(), s.lr, s.weight_decay)
    for step in run.progress(s.questioner_steps, f"iteration {k}: Questioner"):
        start, batch = time.time(), list(itertools.islice(pictures, s.images_per_step))
        prompts = [questioner_role.ask_prompt(questioner, picture.image) for picture in batch]
        proposals = questioner_role.propose(questioner, prompts, s.group_size, **s.sampling, generator=generator)
        asked = [(picture, p.question) for picture, group in zip(batch, proposals) for p in group if p.question]
        examples = iter(ask_reasoner(s, reasoner, asked, generator))
        voted = [[next(examples) if p.question else None for p in group] for group in proposals]

        groups = []
        for prompt, group, votes in zip(prompts, proposals, voted):
            texts, confidences = [v and v.question for v in votes], [v.confidence if v else 0.0 for v in votes]
            reward = rewards.questioner_rewards(texts, confidences, s.diversity_weight)
            groups.append(grpo.Group(prompt, [p.completion for p in group], reward))
        metrics = update(s, questioner, reference, optimizer, groups)
        run.log(k, "questioner", step, metrics | questioner_metrics(s, voted), groups, start, questioner.end_ids)
        if not asked:
            run.say(f"step {step}: not one question was valid; rewards and advantages are 0")
    optimizer.close()


def curate_questions(s, run, k, questioner: VLM, reasoner: VLM, pictures: Iterator[Picture], generator) -> list[Example]:
    """Phase 2: the updated Questioner proposes, the Reasoner votes, and questions of middling confidence are kept."""
    start, batch = time.time(), list(itertools.islice(pictures, s.candidates))
    prompts = [questioner_role.ask_prompt(questioner, picture.image) for picture in batch]
    proposals = questioner_role.propose(questioner, prompts, 1, **s.sampling, generator=generator)
    asked = [(picture, p.question) for picture, (p,) in zip(batch, proposals) if p.question]
    candidates = ask_reasoner(s, reasoner, asked, generator)
    curated = curate.curate(candidates, s.tau_low, s.tau_high)
    curate.write_examples(run.folder / "curated" / f"iteration-{k}.jsonl", curated)
    run.write(
        dict(iteration=k, phase="curation", candidates=len(batch), validity=len(asked) / len(batch), curated=len(curated))
        | dict(confidence=_mean([e.confidence for e in candidates]), seconds=time.time() - start)
    )
    return curated


def train_reasoner(s, run, k, reasoner: VLM, curated: list[Example], answer_reward, generator) -> None:
    """Phase 3: GRPO on the Reasoner with the silver labels; a step takes the next curated questions, round and round."""
    if not curated:
        run.say(f"iteration {k}: no question has a confidence in [{s.tau_low}, {s.tau_high}]; the Reasoner is not trained")
        return
    reference, optimizer = reasoner.copy(), grpo.MasterAdamW(reasoner.model.parameters(), s.lr, s.weight_decay)
    examples = itertools.cycle(random.Random(f"{s.seed} {k} curated").sample(curated, len(curated)))
    for step in run.progress(s.reasoner_steps, f"iteration {k}: Reasoner"):
        start, batch = time.time(), list(itertools.islice(examples, min(s.images_per_step, len(curated))))
        prompts = [reasoner_role.answer_prompt(reasoner, load_image(e.image), e.question) for e in batch]
        answers = reasoner_role.answer(reasoner, prompts, s.group_size, **s.sampling, generator=generator)
        groups = [
            grpo.Group(prompt, [a.completion for a in group], [answer_reward(a.answer, e.label) for a in group])
            for prompt, group, e in zip(prompts, answers, batch)
        ]
        metrics = update(s, reasoner, reference, optimizer, groups)
        metrics["validity"] = _mean([a.answer is not None for group in answers for a in group])
        metrics["confidence"] = _mean([rewards.confidence([a.answer for a in group])[1] for group in answers])
        run.log(k, "reasoner", step, metrics, groups, start, reasoner.end_ids)
    optimizer.close()


def ask_reasoner(s: Settings, reasoner: VLM, asked: list[tuple[Picture, Question]], generator) -> list[Example]:
    """The Reasoner answers each question m times: the majority is the silver label, its share the confidence."""
    prompts = [reasoner_role.answer_prompt(reasoner, picture.image, q.text) for picture, q in asked]
    groups = reasoner_role.answer(reasoner, prompts, s.answers, **s.sampling, generator=generator)
    examples = []
    for (picture, q), group in zip(asked, groups):
        answers = [a.answer for a in group]
        examples.append(Example(picture.path, q.text, q.kind, *rewards.confidence(answers), answers))
    return examples


def update(s: Settings, policy: VLM, reference: VLM, optimizer, groups: list[grpo.Group]) -> dict[str, float]:
    """One GRPO update of a role."""
    grpo.add_reference(groups, reference, s.temperature)
    return grpo.update(policy, groups, optimizer, s.clip, s.beta, s.temperature)


def questioner_metrics(s: Settings, voted: list[list[Example | None]]) -> dict:
    """What the Questioner's rewards are made of, averaged over its valid questions."""
    valid = [[v for v in votes if v] for votes in voted]
    flat = [v for votes in valid for v in votes]
    penalties = [
        penalty * len(votes) / s.group_size
        for votes in valid
        for penalty in rewards.diversity_penalty([v.question for v in votes], s.diversity_weight)
    ]
    return {
        "validity": len(flat) / (len(voted) * s.group_size),
        "r_unc": _mean([rewards.uncertainty_reward(v.confidence) for v in flat]),
        "r_div": _mean(penalties),
        "confidence": _mean([v.confidence for v in flat]),
        "clusters": _mean([len(set(rewards.cluster_questions([v.question for v in votes]))) for votes in valid]),
    }


def measure(s: Settings, run: "Run", reasoner: VLM, curated: list[Example]) -> dict:
    """Accuracy on held-out scenes and of the silver labels; {} for your own images, whose truth nobody knows.

    The true labels stay in here: what is returned is printed and written, and used for nothing else.
    """
    if s.images is not None:
        return {}
    import evaluate  # imports the exact answerer, which self-play must not

    questions = evaluate.held_out_questions(run.folder / "held-out", HELD_OUT_QUESTIONS, HELD_OUT_SEED, run.scene_size)
    seeded = torch.Generator(reasoner.device).manual_seed(s.seed)
    results = evaluate.accuracy(reasoner, questions, 4, **s.sampling, generator=seeded)
    return results | evaluate.silver_label_accuracy(curated, run.folder / "images")


# ---- The run folder ----------------------------------------------------------------------------------------------------


class Run:
    """The folder of a run: config.json, metrics.jsonl, curated/, questioner/ and reasoner/, all plain files."""

    def __init__(self, folder: Path, images: Found, scene_size: int, completed: int = 0):
        self.folder, self.images, self.scene_size, self.completed = folder, images, scene_size, completed
        self.steps: list[dict] = []

    def load_roles(self, s: Settings) -> tuple[VLM, VLM]:
        """Both roles: copies of the base model, or what the last complete iteration left."""
        dtype = getattr(torch, s.dtype) if s.dtype else None
        if self.completed:
            return tuple(VLM.load(self.folder / role, s.device, dtype, s.max_pixels) for role in ("questioner", "reasoner"))
        base = VLM.load(s.model or TOY, s.device, dtype, s.max_pixels)
        return base, base.copy()

    def open(self, s: Settings) -> None:
        """Makes the folder, says which images were skipped, and renders the built-in scenes if there are no others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = dataclasses.asdict(s) | {"scene_size": self.scene_size}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path, reason in self.images.skipped:
            self.say(f"skipped {path}: {reason}")
        if s.images is not None:
            print(f"{len(self.images.paths)} images found, {len(self.images.skipped)} skipped; run folder {self.folder}")
            return
        from toy.scenes import write_scenes  # draws; what the answers are, only toy/answerer.py knows

        paths, size = write_scenes(self.folder / "images", SCENES, s.seed, self.scene_size), self.scene_size
        self.images.paths.extend(map(str, paths))
        print(f"no --images given: {SCENES} built-in scenes of {size} x {size} pixels are in {self.folder / 'images'}")

    def save_roles(self, k: int, questioner: VLM, reasoner: VLM) -> None:
        """Saves both roles, then says that iteration k is complete."""
        for role, vlm in (("questioner", questioner), ("reasoner", reasoner)):
            vlm.save(self.folder / role)
        self.completed = k
        (self.folder / "state.json").write_text(json.dumps({"completed_iterations": k}) + "\n")

    def write(self, record: dict) -> None:
        """Adds a record to metrics.jsonl."""
        record = {name: round(v, 6) if isinstance(v, float) and math.isfinite(v) else v for name, v in record.items()}
        record = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.steps.append(record)

    def log(self, k, phase: str, step: int, metrics: dict, groups: list[grpo.Group], start: float, end_ids) -> None:
        """The record of one GRPO step."""
        completions = [c for group in groups for c in group.completions]
        tokens, seconds = sum(map(len, completions)), time.time() - start
        all_rewards = [r for group in groups for r in group.rewards]
        record = dict(iteration=k, phase=phase, step=step, reward=_mean(all_rewards))
        record |= dict(equal_groups=_mean([len(set(group.rewards)) == 1 for group in groups]))
        record |= metrics | dict(length=tokens / len(completions), seconds=seconds, tokens_per_second=tokens / seconds)
        record["truncated"] = _mean([not c or c[-1] not in end_ids for c in completions])
        self.write(record)
        if metrics["skipped"]:
            self.say(f"step {step}: the gradient is not finite; the step is skipped and the weights are unchanged")

    def report(self, k: int, results: dict) -> None:
        """Writes and prints what was measured after iteration k (0: before the first): one row of the table."""
        self.write(dict(iteration=k, phase="measure") | results)
        mine = [r for r in self.steps if r["iteration"] == k]
        asking = [r for r in mine if r["phase"] == "questioner"]
        curation = next((r for r in mine if r["phase"] == "curation"), {})
        if k == 0 or len(self.steps) == len(mine):
            print(" iteration  greedy  sampled | valid  r_unc first-last  clusters | curated  silver right  seconds")
        first, last = (asking[0]["r_unc"], asking[-1]["r_unc"]) if asking else (None, None)
        cells = [f"{'base' if k == 0 else k:>10}", _cell(results.get("greedy_accuracy"), 7), _cell(results.get("sampled_accuracy"), 8)]
        cells += [" |", _cell(asking[-1]["validity"] if asking else None, 5), f"{_cell(first, 8)} - {_cell(last, 5)}"]
        cells += [_cell(_mean([r["clusters"] for r in asking]) if asking else None, 9), " |", f"{curation.get('curated', '-'):>7}"]
        cells += [_cell(results.get("silver_accuracy"), 13), _cell(sum(r.get("seconds", 0) for r in mine) if k else None, 8, 0)]
        print(" ".join(cells).rstrip(), flush=True)

    def progress(self, steps: int, what: str) -> Iterator[int]:
        """1 .. steps, with a progress bar if standard error is a terminal."""
        return tqdm(range(1, steps + 1), desc=what, leave=False, disable=None)

    def say(self, message: str) -> None:
        tqdm.write(message, file=sys.stderr)


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else 0.0


# ---- The command line --------------------------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """The settings of a command line; exits with 2 and one sentence if it is wrong."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(Settings):
        if field.type is bool:
            parser.add_argument(_flag(field.name), action="store_true", default=None, help=field.metadata["help"])
            continue
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            toy = f"; for the toy {TOY_DEFAULTS[field.name]}" if field.name in TOY_DEFAULTS else ""
            text += f" (default: {field.default}{toy})"
        kind = field.type if field.type in (int, float) else str
        choices = ("float32", "bfloat16") if field.name == "dtype" else None
        parser.add_argument(_flag(field.name), type=kind, choices=choices, metavar=field.name.upper(), help=text)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "resume" in given:
        if len(given) > 1:
            parser.error("--resume takes the settings of the run it continues, and no other flag")
        return Settings(resume=given["resume"])
    return Settings(**(given if "model" in given else TOY_DEFAULTS | given))


def prepare(s: Settings) -> Run:
    """Checks the settings and finds the images; writes nothing. Raises ValueError with a sentence for the user."""
    s.check()
    check_device(s.device)
    load_config(s.model or TOY)
    _, image_processor, _ = load_processors(s.model or TOY)
    folder = Path("runs") / (s.name or f"{Path(s.model or TOY).name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if folder.exists() and not s.dry_run:
        raise ValueError(f"{folder} exists already; continue it with --resume {folder}, or choose another --name")
    # A scene has 3 x 3 cells: 84 pixels suit the toy, 336 (144 image tokens) a real model.
    s.max_pixels = min(s.max_pixels, image_processor.size["longest_edge"])
    scene_size = max(84, min(336, math.isqrt(s.max_pixels)) // 84 * 84)
    return Run(folder, find(s), scene_size)


def check_device(name: str | None) -> None:
    """Raises ValueError if torch has no such device here."""
    try:
        torch.empty(0, device=name or "cpu")
    except Exception as error:  # torch raises RuntimeError, AssertionError or AttributeError, as it happens
        raise ValueError(f"--device {name}: torch has no such device here") from error


def find(s: Settings) -> Found:
    """The user's images; nothing for the built-in scenes, which are rendered when the run starts."""
    if s.images is None:
        return Found([], [])
    found = find_images(s.images)
    if not found.paths:
        raise ValueError(f"--images {s.images}: no readable image found ({len(found.skipped)} skipped)")
    return found


def resume(folder: Path) -> tuple[Settings, Run]:
    """The settings and the state of an interrupted run; records of the iteration that was cut short are dropped."""
    try:
        config = json.loads((folder / "config.json").read_text())
        state = folder / "state.json"
        completed = json.loads(state.read_text())["completed_iterations"] if state.exists() else 0
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--resume {folder}: this is not the folder of a run (no readable config.json)") from error
    scene_size = config.pop("scene_size")
    s = Settings(**config)
    run, metrics = Run(folder, find(s), scene_size, completed), folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    kept = [line for line in lines if completed and json.loads(line)["iteration"] <= completed]
    metrics.write_text("".join(kept), encoding="utf-8")
    run.steps = [json.loads(line) for line in kept]
    return s, run


def print_plan(s: Settings, run: Run) -> None:
    """What would run: images, tokens, steps and the memory of each phase."""
    device = torch.device(s.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, s.dtype) if s.dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config, found = load_config(s.model or TOY), run.images
    if s.images is None:
        image_tokens = (run.scene_size // 28) ** 2
        print(f"images   {SCENES} built-in scenes of {run.scene_size} x {run.scene_size} pixels, {image_tokens} tokens each")
    else:
        image_tokens = s.max_pixels // (28 * 28)
        print(f"images   {len(found.paths)} found, {len(found.skipped)} skipped, at most {image_tokens} tokens each")
        for path, reason in found.skipped:
            print(f"         skipped {path}: {reason}")
    questions = s.images_per_step * s.group_size
    print(f"model    {s.model or 'the toy'}: {plan.count_parameters(config):,} parameters, {dtype}, on {device}")
    print(f"steps    {s.iterations} iterations of {s.questioner_steps} Questioner and {s.reasoner_steps} Reasoner steps")
    print(f"         a Questioner step samples {questions} questions and {questions * s.answers} answers,")
    print(f"         a curation {s.candidates} questions and {s.candidates * s.answers} answers, a Reasoner step {questions} answers")
    prompt_tokens, rows = image_tokens + 100, questions * s.answers  # 100: the instruction, or a question
    for phase in plan.memory_plan(config, dtype, device, prompt_tokens, s.max_new_tokens, s.group_size, rows):
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in phase.parts.items() if size)
        print(f"memory   {phase.name}: {phase.total / 2**30:.2f} GiB ({parts})")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done, 2: a wrong argument or input, 1: anything else."""
    s, run = parse_arguments(argv), None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a mistyped model name is our sentence, not its retries
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        if s.resume is not None:
            s, run = resume(Path(s.resume))
        else:
            run = prepare(s)
        if s.dry_run:
            print_plan(s, run)
            return 0
        roles = run.load_roles(s)
        run.open(s)
    except ValueError as error:  # CheckpointError and ImageError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is treated like Ctrl-C
    try:
        visplay(s, run, *roles)
    except ImageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; continue with: python loop.py --resume {run.folder}", file=sys.stderr)
        return 1
    print(f"done: metrics, curated questions and both checkpoints are in {run.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The paper's questions, put to the toy, where the truth is known: the runs of notebook 06.

    python notebooks/experiments.py           every run of EXPERIMENTS with 3 seeds; goes on
                                              where it was stopped (about an hour on 2 cores)
    python notebooks/experiments.py --short   the same code with everything small, to see that
                                              it works (a minute)

Each run is one process with one thread. Results are appended to --out, a line of JSON a run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import grpo
import loop
import questioner
import rewards
from curate import Example
from engine import command
from engine.images import Found, Pictures
from engine.ranks import Ranks
from engine.records import mean
from engine.settings import TOY, TOY_DEFAULTS, Settings
from engine.shards import Trained
from toy.answerer import understand
from toy.scenes import COLOURS, SHAPES, Scene, read_truth, write_scenes
from vlm import VLM

WEAKER = "weaker base"
EXPERIMENTS: dict[str, dict] = {  # what differs from `python loop.py`
    "default": {},
    "tau 0.1 to 0.9": dict(tau_low=0.1, tau_high=0.9),
    "tau 0.4 to 0.6": dict(tau_low=0.4, tau_high=0.6),
    "no thresholds": dict(tau_low=0.0, tau_high=1.0),
    "one long iteration": dict(
        iterations=1, questioner_steps=60, reasoner_steps=9, candidates=768
    ),
    "lambda 0": dict(diversity_weight=0.0),
    WEAKER: {},
    "true labels": {},
    "random labels": {},
    "oracle": {},
}
SHORT = dict(iterations=1, questioner_steps=1, reasoner_steps=1, images_per_step=2)
SHORT |= dict(group_size=2, answers=2, candidates=4)
UNWANTED = set("seconds tokens_per_second loss policy_loss clip_share ratio grad_norm".split())
UNWANTED |= set("skipped equal_groups length truncated".split())
ORACLE_STEPS, ORACLE_NOISE = 60, 0.25  # of the objects it looks at a quarter are misread


# ---- Self-play ----------------------------------------------------------------------------


def selfplay(experiment: str, seed: int, short: bool, weaker: Path) -> list[dict]:
    """A run of the loop in a folder of its own; its metrics."""
    flags = TOY_DEFAULTS | dict(name="x", seed=seed, device="cpu") | EXPERIMENTS[experiment]
    if short:
        command.SCENES, loop.HELD_OUT_QUESTIONS = 32, 16  # this process does nothing else
        flags |= SHORT
    if experiment == WEAKER:
        flags |= dict(model=str(weaker))
    run = command.ready(Settings(**flags))
    replaced = {
        "true labels": true_label_reward(run),
        "random labels": random_label_reward(seed),
    }
    loop.visplay(run.settings, run, replaced.get(experiment, loop.silver_label_reward))
    return run.records


def true_label_reward(run) -> loop.Reward:
    """1 for the answer that is true of the scene."""
    truth = read_truth(run.folder / "images")

    def reward(answer: str | None, example: Example) -> float:
        fact = understand(example.question, truth[Path(example.image).name])
        return 0.0 if fact is None else rewards.answer_reward(answer, fact.answer)

    return reward


def random_label_reward(seed: int) -> loop.Reward:
    """1 for an answer of the right kind that was drawn once for each question."""

    def reward(answer: str | None, example: Example) -> float:
        rng = random.Random(f"{seed} {example.image} {example.question}")
        numerical = example.kind == "numerical"
        label = str(rng.randint(0, 5)) if numerical else rng.choice(["yes", "no"])
        return rewards.answer_reward(answer, label)

    return reward


# ---- The oracle ---------------------------------------------------------------------------


def oracle(seed: int, short: bool) -> list[dict]:
    """A Questioner whose Reasoner is the exact answerer, misreading some objects.

    What does it learn to ask? With n objects to look at, an answer is right with a probability
    that falls with n: n is the difficulty.
    """
    steps, images, group_size, answers = (2, 2, 2, 2) if short else (ORACLE_STEPS, 32, 8, 10)
    s, rng = Settings(**TOY_DEFAULTS), random.Random(seed)
    sampling = dict(max_new_tokens=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p)
    sampling |= dict(generator=torch.Generator().manual_seed(seed))
    paths = [str(path) for path in write_scenes(Path("scenes"), 512, seed)]
    truth, pictures = read_truth(Path("scenes")), Pictures(Found(paths, []), str(seed))
    vlm, records = VLM.load(TOY, "cpu", "float32"), []
    reference, policy = vlm.copy(), Trained(vlm, s.lr, s.weight_decay)
    for step in range(1, steps + 1):
        asked = questioner.ask(vlm, pictures.take(images, Ranks()), group_size, **sampling)
        votes = oracle_votes(asked, truth, answers, rng)
        reward = [loop.questioner_reward(group, s.diversity_weight) for group in votes]
        groups = [grpo.Group(a.prompt, a.completions, r) for a, r in zip(asked, reward)]
        grpo.add_reference(groups, reference)
        grpo.update(policy, policy.optimizer, groups)
        records.append(dict(phase="oracle", step=step) | oracle_metrics(votes, truth))
    return records


def oracle_votes(asked: list, truth: dict, m: int, rng: random.Random) -> loop.Votes:
    """As `reasoner.vote`, but by the exact answerer, from what it sees of the objects."""

    def vote(path: str, question) -> Example:
        fact, answers = understand(question.text, truth[Path(path).name]), [None] * m
        if fact is not None:
            seen = [misread(fact.things, rng) for _ in range(m)]
            answers = [understand(question.text, things).answer for things in seen]
        return Example(
            path, question.text, question.kind, *rewards.confidence(answers), answers
        )

    return [[q and vote(a.path, q) for q in a.questions] for a in asked]


def misread(things: Scene, rng: random.Random) -> Scene:
    """What is seen of some objects: some are missed, or have another colour or shape."""
    seen = []
    for thing in things:
        if rng.random() < ORACLE_NOISE:
            if rng.random() < 0.5:
                continue
            if rng.random() < 0.5:
                thing = replace(thing, colour=rng.choice(list(COLOURS)))
            else:
                thing = replace(thing, shape=rng.choice(SHAPES))
        seen.append(thing)
    return tuple(seen)


def oracle_metrics(votes: loop.Votes, truth: dict) -> dict:
    """Of the questions that have an answer: their share, r_unc, and their objects."""
    asked = [v for group in votes for v in group]
    answered = [v for v in asked if v and v.label is not None]
    facts = [understand(v.question, truth[Path(v.image).name]) for v in answered]
    return dict(
        understood=len(answered) / len(asked),
        r_unc=mean([rewards.uncertainty_reward(v.confidence) for v in answered]),
        objects=mean([len(fact.things) for fact in facts]),
    )


# ---- Running all of them ------------------------------------------------------------------


def one(experiment: str, seed: int, short: bool, weaker: Path) -> dict:
    """One run, in a process and a folder of its own."""
    torch.set_num_threads(1)
    disable_progress_bar()
    sys.stdout = open(os.devnull, "w")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if experiment == "oracle":
            records = oracle(seed, short)
        else:
            records = selfplay(experiment, seed, short, weaker)
        os.chdir(ROOT)
    records = [{k: rounded(v) for k, v in r.items() if k not in UNWANTED} for r in records]
    return dict(experiment=experiment, seed=seed, short=short, records=records)


def rounded(value):
    """Four digits are enough for a figure."""
    return round(value, 4) if isinstance(value, float) else value


def build_weaker(folder: Path, short: bool) -> None:
    """The toy after more lessons in guessing.

    80% of its answers are bare guesses, and a fifth of the objects are misread.
    """
    build = [sys.executable, "-m", "toy.build", "--start", str(TOY), "--out", str(folder)]
    lessons = f"--guess-steps {1 if short else 150} --guess-share 0.8 --noise 0.2"
    build += lessons.split()
    subprocess.run(build, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    beside, cores = Path(__file__).with_name("experiments.jsonl"), os.cpu_count()
    parser.add_argument(
        "--out", type=Path, default=beside, help="results (default: beside this)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default: 3)")
    names = dict(choices=EXPERIMENTS, nargs="+", default=list(EXPERIMENTS))
    parser.add_argument("--only", **names, help="some of the experiments (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=cores, help="at a time (default: one a core)"
    )
    parser.add_argument("--short", action="store_true", help="tiny runs, to see that it works")
    return parser.parse_args()


def main() -> None:
    """Every run that is not in --out already, several at a time."""
    args = parse_arguments()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(result["experiment"], result["seed"]) for result in map(json.loads, lines)}
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.only]
    todo = [run for run in wanted if run not in done]
    with tempfile.TemporaryDirectory() as folder:
        weaker = Path(folder)
        if any(name == WEAKER for name, _ in todo):
            build_weaker(weaker, args.short)
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            futures = [pool.submit(one, *run, args.short, weaker) for run in todo]
            for future in as_completed(futures):
                result = future.result()
                with open(args.out, "a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{result['experiment']}, seed {result['seed']}", flush=True)


if __name__ == "__main__":
    main()

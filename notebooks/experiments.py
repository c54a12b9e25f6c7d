"""The paper's questions, put to the toy, where the truth is known: the runs of notebook 06.

    python notebooks/experiments.py           every run of EXPERIMENTS with 5 seeds that is not
                                              in --out yet (2 to 3 minutes of a core each)
    python notebooks/experiments.py --short   the same code with everything small, to see that
                                              it works (a minute)

A run has one thread, and a folder of its own that is thrown away. Its result is a line of JSON
in --out: all its settings, the commit of the code, its seconds of CPU time, the bytes of its
last states, and its records. Seeds 10 and 11 were used to choose the toy's settings and LoRA's
learning rate; they are not for experiments.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import loop
import reasoner
import rewards
import toy.build
from answers import canonical
from measure import watch
from toy.answerer import understand
from training import command
from training import dry_run as preview
from training.images import load_image
from training.scenes import read_truth
from training.settings import TOY, TOY_DEFAULTS, Settings

EXPERIMENTS: dict[str, dict] = {  # the settings that differ from `python loop.py`
    "default": {},
    "one long iteration": dict(
        iterations=1, questioner_steps=60, reasoner_steps=30, candidates=1536
    ),
    "margin": {},
    "true labels": {},
    "random labels": {},
    "no thresholds": dict(tau_low=0.0, tau_high=1.0),
    "Questioner not trained": {},
    "Questioner twice as fast": dict(questioner_steps=40),
    "tau 0.4 to 0.6": dict(tau_low=0.4, tau_high=0.6),
    "tau 0.1 to 0.9": dict(tau_low=0.1, tau_high=0.9),
    "lambda 0": dict(diversity_weight=0.0),
    "soft reward": {},
    "more votes": dict(answers=20),
    "Questioner stops early": {},
    "two Reasoners": {},
    "five iterations": dict(iterations=5),
    "five iterations, margin": dict(iterations=5),
    "five iterations, stops early": dict(iterations=5),
    "five iterations, two Reasoners": dict(iterations=5),
    "gentle base": dict(model="gentle"),  # a steepness of toy/build.py, built for it
    "steep base": dict(model="steep"),
    "LoRA": dict(lora_rank=8, lr=6e-4),
}
SHORT = dict(iterations=1, questioner_steps=1, reasoner_steps=1, images_per_step=2)
SHORT |= dict(group_size=2, answers=2, candidates=4)
NOT_SETTINGS = ("name", "resume", "dry_run")
UNWANTED = set("seconds tokens_per_second loss policy_loss clip_share ratio grad_norm".split())
UNWANTED |= set("skipped equal_groups length truncated".split())
MARGIN = 0.2  # of the votes, by which the first answer leads the second
WINDOW, FEWER = 5, 0.9  # steps; of the best window so far: the Questioner's phase stops early


# ---- What takes the place of the loop's own rewards and its rule for keeping ----------------


def changed(experiment: str, run) -> dict:
    """The functions of `loop.Rules`, of the experiments that change more than settings."""
    rules = {
        "margin": dict(keep=clear_majority),
        "five iterations, margin": dict(keep=clear_majority),
        "two Reasoners": dict(keep=same_majority_before(run)),
        "five iterations, two Reasoners": dict(keep=same_majority_before(run)),
        "Questioner stops early": dict(question_reward=until_fewer_are_kept(run)),
        "five iterations, stops early": dict(question_reward=until_fewer_are_kept(run)),
        "soft reward": dict(answer_reward=share_of_votes),
        "true labels": dict(answer_reward=true_label_reward(run)),
        "random labels": dict(answer_reward=random_label_reward(run.seed)),
        "Questioner not trained": dict(question_reward=without_training(run)),
    }
    return rules.get(experiment, {})


def clear_majority(example, s) -> bool:
    """Kept as usual, if the first answer leads the second by MARGIN of the votes."""
    votes = Counter(canonical(a) for a in example.answers if a is not None).most_common(2)
    lead = votes[0][1] - votes[1][1] if len(votes) == 2 else len(example.answers)
    return loop.is_middling(example, s) and lead >= MARGIN * len(example.answers) - 1e-9


def share_of_votes(answer, example) -> float:
    """An answer is worth the share of the votes that it has, not 1 or 0."""
    same = [rewards.answer_reward(answer, a) for a in example.answers if a is not None]
    return sum(same) / len(example.answers)


def true_label_reward(run):
    """1 for the answer that is true of the scene; 0 for a question without an answer."""
    truth = read_truth(run.folder / "images")

    def reward(answer, example) -> float:
        fact = understand(example.question, truth[Path(example.image).name])
        return 0.0 if fact is None else rewards.answer_reward(answer, fact.answer)

    return reward


def random_label_reward(seed: int):
    """1 for an answer of the right kind that was drawn once for each question."""

    def reward(answer, example) -> float:
        rng = random.Random(f"{seed} {example.image} {example.question}")
        numerical = example.kind == "numerical"
        label = str(rng.randint(0, 9)) if numerical else rng.choice(["yes", "no"])
        return rewards.answer_reward(answer, label)

    return reward


def without_training(run):
    """The usual reward, but steps of length 0, so that no weight changes at all."""

    def reward(votes, s) -> list[float]:
        stand_still(run)
        return loop.reward_questions(votes, s)

    return reward


def stand_still(run) -> None:
    """Steps of length 0 to the end of this phase (the next one has its own optimizer)."""
    for parameters in run.policy.optimizer.param_groups:
        parameters["lr"] = 0.0


def until_fewer_are_kept(run):
    """The usual reward, until fewer questions than before are kept: then steps of length 0.

    Looked at is the mean of WINDOW steps; the phase stops where it is below FEWER of the best.
    """
    shares: dict[int, list[float]] = {}  # of each iteration: of each image's valid questions

    def reward(votes, s) -> list[float]:
        mine = shares.setdefault(run.state.iteration, [])
        kept = [loop.is_middling(vote, s) for vote in votes if vote]
        mine.append(sum(kept) / max(1, len(kept)))
        size = WINDOW * s.images_per_step
        steps = range(0, len(mine) - size + 1, s.images_per_step)
        windows = [sum(mine[i : i + size]) / size for i in steps]
        if windows and windows[-1] < FEWER * max(windows):
            stand_still(run)
        return loop.reward_questions(votes, s)

    return reward


def same_majority_before(run):
    """Kept as usual, if the Reasoner of an iteration ago, asked now, has the same majority.

    In iteration 1 that is the base, asked a second time.
    """
    reasoners = {}

    def keep(example, s) -> bool:
        k = run.state.iteration
        if k not in reasoners:
            reasoners[k] = run.reasoner.copy()
        if not loop.is_middling(example, s):
            return False
        older, image = reasoners[max(1, k - 1)], load_image(str(run.folder / example.image))
        prompt = reasoner.answer_prompt(older, image, example.question)
        [before] = reasoner.answer(older, [prompt], s.answers, run.sampling, run.generator)
        return rewards.answer_reward(rewards.confidence(before.answers)[0], example.label) == 1

    return keep


# ---- Running all of them --------------------------------------------------------------------


def settings(experiment: str, seed: int, short: bool) -> dict:
    """All settings of a run; `model` is its base's steepness, or None: the committed one."""
    flags = TOY_DEFAULTS | dict(seed=seed, device="cpu") | EXPERIMENTS[experiment]
    values = asdict(Settings(**flags | (SHORT if short else {})))
    return {name: value for name, value in values.items() if name not in NOT_SETTINGS}


def is_done(experiment: str, seed: int, short: bool, results: list[dict]) -> bool:
    """Whether results have this run. A setting that is not in them had the value of today."""
    wanted = settings(experiment, seed, short)
    key = dict(experiment=experiment, seed=seed, short=short)
    return any(
        all(r.get(name) == value for name, value in key.items())
        and wanted | r.get("settings", {}) == wanted
        for r in results
    )


def one(experiment: str, seed: int, short: bool, bases: Path) -> dict:
    """One run, in a folder of its own; its line of results."""
    torch.set_num_threads(1)
    disable_progress_bar()
    sys.stdout = open(os.devnull, "w")
    if short:  # this process does nothing else
        preview.SCENES, watch.HELD_OUT_QUESTIONS, watch.PROBES = 32, 16, 4
    result = dict(experiment=experiment, seed=seed, short=short)
    result |= dict(settings=settings(experiment, seed, short))
    s = Settings(**result["settings"], name="x")
    s.model = s.model and str(bases / s.model)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run, start = command.prepare_run(s), time.process_time()
        loop.visplay(run.settings, run, loop.Rules(**changed(experiment, run)))
        result |= dict(cpu_seconds=round(time.process_time() - start))
        sizes = [file.stat().st_size for file in (run.folder / "state").iterdir()]
        result |= dict(state_bytes=sum(sizes))
        os.chdir(ROOT)
    wanted = [{k: rounded(v) for k, v in r.items() if k not in UNWANTED} for r in run.records]
    return result | dict(records=wanted)


def rounded(value):
    """Four digits are enough for a figure."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def build_bases(runs: list[tuple], folder: Path, short: bool) -> None:
    """The bases of another steepness that these runs start from (a minute each)."""
    if short:
        toy.build.SCENES, toy.build.LAZY_STEPS = 32, 1
    names = {EXPERIMENTS[name].get("model") for name, _ in runs}
    for steepness in sorted(names - {None}):
        print(f"building the {steepness} base", flush=True)
        toy.build.build(folder / steepness, steepness, TOY)


def code() -> str:
    """The last commit that changed the code, with a + if there are changes since."""
    paths = ["--", "*.py", "toy"]

    def git(*words):
        done = subprocess.run(
            ["git", *words, *paths], cwd=ROOT, capture_output=True, text=True
        )
        return done.stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    beside, cores = Path(__file__).with_name("experiments.jsonl"), os.cpu_count()
    parser.add_argument(
        "--out", type=Path, default=beside, help="results (default: beside this)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default: 5)")
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
    results = [json.loads(line) for line in lines]
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.only]
    todo = [
        (name, seed) for name, seed in wanted if not is_done(name, seed, args.short, results)
    ]
    print(
        f"{len(todo)} runs to do; {len(wanted) - len(todo)} are in {args.out} already",
        flush=True,
    )
    if not todo:
        return
    commit = code()
    with tempfile.TemporaryDirectory() as folder:
        bases = Path(folder)
        build_bases(todo, bases, args.short)
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            futures = [pool.submit(one, *run, args.short, bases) for run in todo]
            for future in as_completed(futures):
                result = dict(commit=commit) | future.result()
                with open(args.out, "a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{result['experiment']}, seed {result['seed']}", flush=True)


if __name__ == "__main__":
    main()

"""The paper's questions, put to the toy, where the truth is known: the runs behind notebook 06.

    python notebooks/experiments.py             every run of EXPERIMENTS with 3 seeds; goes on where it was stopped (about an hour on 2 cores)
    python notebooks/experiments.py --short     the same code with everything small, to see that it works (a minute)

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
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
import loop  # noqa: E402
import questioner as questioner_role  # noqa: E402
import rewards  # noqa: E402
from curate import Example  # noqa: E402
from engine.images import Found, Pictures  # noqa: E402
from engine.shards import Ranks  # noqa: E402
from toy.answerer import understand  # noqa: E402
from toy.build import working  # noqa: E402
from toy.scenes import read_truth, write_scenes  # noqa: E402
from vlm import VLM  # noqa: E402

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
SHORT = dict(
    iterations=1,
    questioner_steps=1,
    reasoner_steps=1,
    images_per_step=2,
    group_size=2,
    answers=2,
    candidates=4,
)
UNWANTED = {
    "seconds",
    "tokens_per_second",
    "loss",
    "policy_loss",
    "clip_share",
    "ratio",
    "grad_norm",
    "skipped",
    "equal_groups",
    "length",
    "truncated",
}
ORACLE_STEPS, ORACLE_NOISE = (
    60,
    0.25,
)  # a quarter of the objects that it looks at are missed or mislabelled


def selfplay(experiment: str, seed: int, short: bool, weaker: Path) -> list[dict]:
    """A run of the loop in a folder of its own; its metrics."""
    changed = (
        EXPERIMENTS[experiment]
        | (SHORT if short else {})
        | (dict(model=str(weaker)) if experiment == WEAKER else {})
    )
    if short:
        loop.SCENES, loop.HELD_OUT_QUESTIONS = (
            32,
            16,
        )  # in this process, which does nothing else
    s = loop.Settings(
        **(loop.TOY_DEFAULTS | dict(name="x", seed=seed, device="cpu") | changed)
    )
    run = loop.prepare(s, Ranks())
    roles = loop.load_roles(s)
    loop.start_run(s, run)
    truth = read_truth(run.folder / "images")

    def true_label(answer: str | None, example: Example) -> float:
        fact = understand(example.question, truth[Path(example.image).name])
        return 0.0 if fact is None else rewards.answer_reward(answer, fact.answer)

    def random_label(answer: str | None, example: Example) -> float:
        rng = random.Random(f"{seed} {example.image} {example.question}")
        label = (
            str(rng.randint(0, 5))
            if example.kind == "numerical"
            else rng.choice(["yes", "no"])
        )
        return rewards.answer_reward(answer, label)

    reward = {"true labels": true_label, "random labels": random_label}.get(experiment)
    loop.visplay(s, run, *roles, **({"answer_reward": reward} if reward else {}))
    return run.records


def oracle(seed: int, short: bool) -> list[dict]:
    """A Questioner whose Reasoner is the exact answerer, misreading some objects: what does it learn to ask?

    With n objects to look at, an answer is right with a probability that falls with n: n is the difficulty.
    """
    steps, count, group_size, answers = (2, 2, 2, 2) if short else (ORACLE_STEPS, 32, 8, 10)
    folder, rng, generator = (
        Path("scenes"),
        random.Random(seed),
        torch.Generator().manual_seed(seed),
    )
    pictures = Pictures(
        Found([str(path) for path in write_scenes(folder, 512, seed)], []), str(seed)
    )
    truth, records = read_truth(folder), []
    policy = VLM.load(loop.TOY, "cpu", "float32")
    reference, defaults = policy.copy(), loop.Settings(**loop.TOY_DEFAULTS)
    with grpo.MasterAdamW(
        policy.model.named_parameters(), defaults.lr, defaults.weight_decay
    ) as optimizer:
        for step in range(1, steps + 1):
            batch = pictures.take(count, Ranks())
            prompts = [questioner_role.ask_prompt(policy, picture.image) for picture in batch]
            proposals = questioner_role.propose(
                policy, prompts, group_size, **defaults.sampling, generator=generator
            )
            groups, confidences, objects = [], [], []
            for prompt, picture, group in zip(prompts, batch, proposals):
                texts = [p.question and p.question.text for p in group]
                facts = [
                    understand(text, truth[Path(picture.path).name]) if text else None
                    for text in texts
                ]
                votes = [
                    [
                        fact and understand(text, working(fact, rng, ORACLE_NOISE)[1]).answer
                        for _ in range(answers)
                    ]
                    for text, fact in zip(texts, facts)
                ]
                group_confidences = [rewards.confidence(vote)[1] for vote in votes]
                groups.append(
                    grpo.Group(
                        prompt,
                        [p.completion for p in group],
                        rewards.questioner_rewards(texts, group_confidences),
                    )
                )
                confidences += [c for c, fact in zip(group_confidences, facts) if fact]
                objects += [len(fact.things) for fact in facts if fact]
            grpo.add_reference(groups, reference)
            grpo.update(policy, groups, optimizer)
            share = len(confidences) / (count * group_size)
            r_unc = sum(map(rewards.uncertainty_reward, confidences)) / max(
                1, len(confidences)
            )
            records.append(
                dict(
                    phase="oracle",
                    step=step,
                    understood=share,
                    r_unc=r_unc,
                    objects=sum(objects) / max(1, len(objects)),
                )
            )
    return records


def one(experiment: str, seed: int, short: bool, weaker: Path) -> dict:
    """One run, in a process and a folder of its own."""
    torch.set_num_threads(1)
    disable_progress_bar()
    sys.stdout = open(os.devnull, "w")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        records = (
            oracle(seed, short)
            if experiment == "oracle"
            else selfplay(experiment, seed, short, weaker)
        )
        os.chdir(ROOT)
    short_records = [
        {
            k: round(v, 4) if isinstance(v, float) else v
            for k, v in r.items()
            if k not in UNWANTED
        }
        for r in records
    ]
    return dict(experiment=experiment, seed=seed, short=short, records=short_records)


def build_weaker(folder: Path, short: bool) -> None:
    """The toy after more lessons in guessing: 80% of its answers are bare guesses and a fifth of the objects misread."""
    command = [
        sys.executable,
        "-m",
        "toy.build",
        "--start",
        str(loop.TOY),
        "--out",
        str(folder),
        "--guess-share",
        "0.8",
        "--noise",
        "0.2",
    ]
    subprocess.run(
        [*command, "--guess-steps", "1" if short else "150"],
        check=True,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("experiments.jsonl"),
        help="file of results (default: beside this)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds 0, 1, ... of each experiment (default: 3)"
    )
    parser.add_argument(
        "--only",
        choices=EXPERIMENTS,
        nargs="+",
        default=list(EXPERIMENTS),
        help="some of the experiments (default: all)",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)"
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="tiny runs that show nothing but that the code works",
    )
    args = parser.parse_args()
    done = (
        {
            (r["experiment"], r["seed"])
            for r in map(json.loads, args.out.read_text().splitlines())
        }
        if args.out.exists()
        else set()
    )
    todo = [
        (name, seed)
        for seed in range(args.seeds)
        for name in args.only
        if (name, seed) not in done
    ]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool,
    ):
        if any(name == WEAKER for name, _ in todo):
            build_weaker(Path(scratch), args.short)
        futures = [
            pool.submit(one, name, seed, args.short, Path(scratch)) for name, seed in todo
        ]
        for future in as_completed(futures):
            result = future.result()
            with open(args.out, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{result['experiment']}, seed {result['seed']}", flush=True)


if __name__ == "__main__":
    main()

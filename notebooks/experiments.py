"""The paper's questions, put to the toy, where the truth is known: the runs of notebook 06.

    python notebooks/experiments.py           every run of EXPERIMENTS with 5 seeds that is not
                                              in --out yet (3 minutes of a core each, 5 with
                                              five iterations)
    python notebooks/experiments.py --short   the same code with everything small, to see that
                                              it works (a minute)

A run has one thread, and a folder of its own that is thrown away. Its result is a line of JSON
in --out: all its settings, the commit of the code, its seconds of CPU time, the bytes of its
last states, and its records. Seeds 10 and 11 were used to choose the toy's settings, LoRA's
learning rate and the anchor's weight; they are not for experiments.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import curate
import grpo
import loop
import questioner
import reasoner
import rewards
import toy.build
from measure import watch
from toy.answerer import understand
from training import command
from training import dry_run as preview
from training.images import load_image
from training.scenes import read_truth
from training.settings import TOY, TOY_DEFAULTS, Settings
from training.state import copy_tensors, read_tensors

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
    # Remedies for language drift (notebook 06, section i).
    "anchor .01": dict(iterations=5, anchor_beta=0.01),
    "anchor .03": dict(iterations=5, anchor_beta=0.03),
    "anchor .1": dict(iterations=5, anchor_beta=0.1),
    "anchor .03 after drift": dict(iterations=5),
    "new Questioner each iteration": dict(iterations=5),
    "stops at drift": dict(iterations=5),
    "unlikely not kept": dict(iterations=5),
    "unlikely not rewarded": dict(iterations=5),
    "five iterations, LoRA": dict(iterations=5, lora_rank=8, lr=6e-4),
    "anchor .03, LoRA": dict(iterations=5, anchor_beta=0.03, lora_rank=8, lr=6e-4),
    "ten iterations": dict(iterations=10),
    "ten iterations, anchor .03": dict(iterations=10, anchor_beta=0.03),
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
        "stops at drift": dict(question_reward=until_drift(run)),
        "unlikely not kept": dict(keep=likely_enough(run)),
        "unlikely not rewarded": dict(question_reward=only_likely_rewarded(run)),
    }
    return rules.get(experiment, {})


def clear_majority(example, s) -> bool:
    """Kept as usual, if the first answer leads the second by MARGIN of the votes."""
    votes = sorted(each.votes for each in rewards.count_votes(example.answers))
    lead = votes[-1] - votes[-2] if len(votes) > 1 else len(example.answers)
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
        [before] = reasoner.answer(older, [prompt], s.answers, run.sampling)
        return rewards.answer_reward(rewards.confidence(before.answers)[0], example.label) == 1

    return keep


# ---- Remedies for language drift -------------------------------------------------------------

DRIFT = 0.3  # atypical questions of the last curation or window, from which a remedy acts


def visplay(experiment: str, s: Settings, run, rules: loop.Rules) -> None:
    """`loop.visplay`, with what an experiment changes before a Questioner's phase."""
    loop.measure(s, run, 0)
    for k in range(1, s.iterations + 1):
        if experiment == "new Questioner each iteration":
            restore_base(run)
        if experiment == "anchor .03 after drift":
            s = run.settings = replace(s, anchor_beta=0.03 if has_drifted(run) else 0.0)
        loop.train_questioner(s, run, k, rules)
        loop.curate_questions(s, run, k, rules)
        loop.train_reasoner(s, run, k, rules)
        loop.measure(s, run, k)


def restore_base(run) -> None:
    """The Questioner begins the coming phase as the base."""
    base = read_tensors(run.folder, run.state.files["base"])
    copy_tensors(run.questioner.model.named_parameters(), base)
    run.state.files["questioner"] = run.state.files["base"]


def has_drifted(run) -> bool:
    """Whether too many of the last curated questions were atypical."""
    curations = run.phase_records("curation")
    return bool(curations) and (curations[-1]["atypical"] or 0.0) >= DRIFT


def likelihood(run):
    """A function: the lowest log-probability of each question's text under the base."""
    base = []

    def lowest(votes) -> list[float]:
        if not base:
            base.append(run.load_base())
        images = [load_image(str(run.folder / vote.image)) for vote in votes]
        asked = [(image, vote.kind, vote.question) for image, vote in zip(images, votes)]
        return watch.least_likely_logps(base[0], asked)

    return lowest


def limit(run, name: str) -> float:
    """`typical_logp`: the 2% quantile of the base's own questions; `least_logp`: their least."""
    return run.phase_records("measure")[0][name]


def until_drift(run):
    """The usual reward, until DRIFT of the last WINDOW steps' questions are atypical."""
    lowest = likelihood(run)
    recent: dict[int, list[float]] = {}

    def reward(votes, s) -> list[float]:
        mine = recent.setdefault(run.state.iteration, [])
        valid = [vote for vote in votes if vote]
        mine += [logp < limit(run, "typical_logp") for logp in lowest(valid)]
        window = mine[-WINDOW * s.images_per_step * s.group_size :]
        if sum(window) > DRIFT * WINDOW * s.images_per_step * s.group_size:
            stand_still(run)
        return loop.reward_questions(votes, s)

    return reward


def likely_enough(run):
    """Kept as usual, if the question is as likely as the least likely of the base's own."""
    lowest = likelihood(run)

    def keep(example, s) -> bool:
        if not loop.is_middling(example, s):
            return False
        return lowest([example])[0] >= limit(run, "least_logp")

    return keep


def only_likely_rewarded(run):
    """The usual reward; 0 for a question less likely than all of the base's own."""
    lowest = likelihood(run)

    def reward(votes, s) -> list[float]:
        usual = loop.reward_questions(votes, s)
        valid = [i for i, vote in enumerate(votes) if vote]
        for i, logp in zip(valid, lowest([votes[i] for i in valid])):
            if logp < limit(run, "least_logp"):
                usual[i] = 0.0
        return usual

    return reward


# ---- How likely the base finds the curated questions ------------------------------------------

READ = ("five iterations", "anchor .03")  # whose questions are looked at one by one


def likelihoods(run) -> list[list[list[float]]]:
    """How likely the base finds the curated questions of each iteration, by several forms.

    Entry 0 has the base's own questions, entry k the curated ones of iteration k. A question has
    [mean of its two least likely tokens, the least likely one, mean of all, the silver label's
    log-probability (0 without one), share of votes that name no answer, 1 if it has an answer in
    its scene].
    """
    base, truth = run.load_base(), read_truth(run.folder / "images")
    table = [describe(run, base, truth, own_questions(run, base))]
    for k in range(1, run.settings.iterations + 1):
        table.append(describe(run, base, truth, run.read_curated(k)))
    return table


def own_questions(run, base) -> list[curate.VotedQuestion]:
    """The base's own questions, those that `watch.typical_logp` had measured; without votes."""
    pictures = run.probe_images(watch.PROBES)
    sampling = replace(run.sampling, generator=run.seeded("typical"))
    asked = questioner.ask(base, pictures, watch.TYPICAL, sampling)
    questions = []
    for picture, each in zip(pictures, asked):
        for question in each.questions:
            if question is not None:
                mine = dict(image=picture.path, question=question.text, kind=question.kind)
                questions.append(
                    curate.VotedQuestion(**mine, label=None, confidence=0.0, answers=[])
                )
    return questions


def describe(run, base, truth, questions) -> list[list[float]]:
    """A row of `likelihoods` for each of these questions."""
    images = [load_image(str(run.folder / q.image)) for q in questions]
    asked = [(image, q.kind, q.question) for image, q in zip(images, questions)]
    labels = []
    for image, q in zip(images, questions):
        prompt = reasoner.answer_prompt(base, image, q.question)
        text = "\\boxed{" + str(q.label) + "}"
        ids = base.tokenizer(text, add_special_tokens=False).input_ids
        labels.append(grpo.make_group(prompt, [ids]))
    grpo.add_reference(labels, base)
    rows = []
    for q, logp, (label,) in zip(questions, questioner.question_logps(base, asked), labels):
        least = logp.sort().values[:2]
        none = sum(a is None for a in q.answers) / max(1, len(q.answers))
        sound = understand(q.question, truth[Path(q.image).name]) is not None
        of_label = label.ref_logp.sum() if q.label is not None else 0.0
        values = [least.mean(), least[0], logp.mean(), of_label, none, sound]
        rows.append([round(float(v), 2) for v in values])
    return rows


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
        preview.SCENES, watch.HELD_OUT_QUESTIONS, watch.PROBES, watch.TYPICAL = 32, 16, 4, 1
    result = dict(experiment=experiment, seed=seed, short=short)
    result |= dict(settings=settings(experiment, seed, short))
    s = Settings(**result["settings"], name="x")
    s.model = s.model and str(bases / s.model)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run, start = command.prepare_run(s), time.process_time()
        visplay(experiment, run.settings, run, loop.Rules(**changed(experiment, run)))
        result |= dict(cpu_seconds=round(time.process_time() - start))
        sizes = [file.stat().st_size for file in (run.folder / "state").iterdir()]
        result |= dict(state_bytes=sum(sizes))
        if experiment in READ:
            result |= dict(likelihoods=likelihoods(run))
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

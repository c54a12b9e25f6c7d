r"""VisPlay: one vision-language model teaches itself from unlabelled images (arXiv 2511.15661).

    for k = 1 .. K:
        train the Questioner   r = 1[valid] max(0, r_unc - r_div), the Reasoner frozen
        curate                 questions with tau_low <= c <= tau_high, labelled by the Reasoner's majority
        train the Reasoner     r = 1[answer = silver label], the Questioner frozen
        measure                accuracy on held-out questions, where the truth is known (built-in scenes)

`python loop.py` runs it on the toy model and scenes of this repository; `python loop.py --model
Qwen/Qwen2.5-VL-3B-Instruct --images FOLDER` on a real model and your own images. A run lives in runs/NAME/.

Differs from the paper: both roles live in one process, with no server between them. Differs from the
official code: see docs/differences.md.

Read it downward from `visplay`. Prompts are in questioner.py and reasoner.py, equations in rewards.py,
curate.py and grpo.py. `run` carries everything else (engine/run.py): the two roles, the images, random
numbers, files, and what of a run that was stopped is done already.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback

import random
import sys
import time
from collections.abc import Callable

import curate
import evaluate
import grpo
import questioner
import reasoner
import rewards
import signatures
from curate import Example
from engine import command
from engine.records import mean
from engine.run import Run
from engine.settings import HELD_OUT_QUESTIONS, HELD_OUT_SEED, Settings

PROBES = 64  # questions on which the Reasoner is compared with the base
Reward = Callable[[str | None, Example], float]  # (answer, curated question) -> reward
Votes = list[list[Example | None]]  # of each image its questions with their votes, None where one is invalid


def silver_label_reward(answer: str | None, example: Example) -> float:
    """The Reasoner's reward: 1 if the answer equals the silver label, else 0. Experiments replace it."""
    return rewards.answer_reward(answer, example.label)


# ---- The algorithm ----------------------------------------------------------------------------------------


def visplay(s: Settings, run: Run, answer_reward: Reward = silver_label_reward) -> None:
    """All iterations, from where the run stands. `answer_reward`: see `silver_label_reward`."""
    measure(s, run, 0)
    for k in range(1, s.iterations + 1):
        train_questioner(s, run, k)
        curate_questions(s, run, k)
        train_reasoner(s, run, k, answer_reward)
        measure(s, run, k)


def train_questioner(s: Settings, run: Run, k: int) -> None:
    """Phase 1: GRPO on the Questioner. Good questions are those on which the frozen Reasoner is torn."""
    for _ in run.steps(k, "questioner", s.questioner_steps):
        images = run.next_images(s.images_per_step)
        asked = questioner.ask(run.questioner, images, s.group_size, **run.sampling)
        votes = reasoner.vote(run.reasoner, asked, s.answers, **run.sampling)
        reward = [questioner_reward(group, s.diversity_weight) for group in votes]
        groups = [grpo.Group(a.prompt, a.completions, r) for a, r in zip(asked, reward)]
        grpo.add_reference(groups, run.reference, s.temperature)
        metrics = grpo.update(run.policy, run.optimizer, groups, s.clip, s.beta, s.temperature)
        run.log(metrics, groups, of_questions(s, run.together(votes)))


def curate_questions(s: Settings, run: Run, k: int) -> None:
    """Phase 2: the updated Questioner asks, the Reasoner votes, and middling confidence is kept."""
    if not run.at(k, "curation"):
        return
    start, candidates = time.time(), []
    for images in run.image_batches(k, "curation", s.candidates, s.images_per_step):
        asked = questioner.ask(run.questioner, images, 1, **run.sampling)
        votes = reasoner.vote(run.reasoner, asked, s.answers, **run.sampling)
        candidates += [vote for (vote,) in run.together(votes) if vote]
    curated = curate.curate(candidates, s.tau_low, s.tau_high)
    confidence, validity = mean([e.confidence for e in candidates]), len(candidates) / s.candidates
    record = dict(candidates=s.candidates, validity=validity, curated=len(curated), confidence=confidence)
    run.write(dict(iteration=k, phase="curation") | record | dict(seconds=time.time() - start))
    watch_questions(run, k)
    run.finish_curation(k, candidates, curated)


def train_reasoner(s: Settings, run: Run, k: int, answer_reward: Reward) -> None:
    """Phase 3: GRPO on the Reasoner with the silver labels; a step takes the next curated questions."""
    if not run.at(k, "reasoner"):
        return
    curated = run.curated(k)
    order = random.Random(f"{s.seed} {k} curated").sample(curated, len(curated))
    for step in run.steps(k, "reasoner", s.reasoner_steps if curated else 0):
        examples = run.next_examples(order, min(s.images_per_step, len(order)), step)
        prompts = [reasoner.answer_prompt(run.reasoner, image, e.question) for e, image in examples]
        answered = reasoner.answer(run.reasoner, prompts, s.group_size, **run.sampling)
        reward = [[answer_reward(y, e) for y in a.answers] for a, (e, _) in zip(answered, examples)]
        groups = [grpo.Group(a.prompt, a.completions, r) for a, r in zip(answered, reward)]
        grpo.add_reference(groups, run.reference, s.temperature)
        metrics = grpo.update(run.policy, run.optimizer, groups, s.clip, s.beta, s.temperature)
        run.log(metrics, groups, of_answers(run.gather([a.answers for a in answered])))


def questioner_reward(votes: list[Example | None], diversity_weight: float) -> list[float]:
    """r = 1[valid] max(0, r_unc - r_div) of the G questions about one image."""
    texts = [vote and vote.question for vote in votes]
    confidences = [vote.confidence if vote else 0.0 for vote in votes]
    return rewards.questioner_rewards(texts, confidences, diversity_weight)


# ---- What is measured -------------------------------------------------------------------------------------


def of_questions(s: Settings, votes: Votes) -> dict:
    """What the Questioner's rewards are made of: means over its valid questions; `clusters` over images."""
    asked = [[v.question for v in group if v] for group in votes]
    valid = [v for group in votes for v in group if v]
    penalties = [rewards.diversity_penalty(q, s.diversity_weight, s.group_size) for q in asked]
    return {
        "validity": len(valid) / (len(votes) * s.group_size),
        "r_unc": mean([rewards.uncertainty_reward(v.confidence) for v in valid]),
        "r_div": mean([penalty for group in penalties for penalty in group]),
        "confidence": mean([v.confidence for v in valid]),
        "clusters": mean([len(set(rewards.cluster_questions(q))) for q in asked if q]),
    } | signatures.variety([v.question for v in valid], [v.kind for v in valid])


def of_answers(answers: list[list[str | None]]) -> dict:
    """How many of the Reasoner's outputs have an answer, and how large the majorities are."""
    validity = mean([answer is not None for group in answers for answer in group])
    return dict(validity=validity, confidence=mean([rewards.confidence(group)[1] for group in answers]))


def measure(s: Settings, run: Run, k: int) -> None:
    """The end of an iteration (0: before the first): measured, watched for failures, both roles exported."""
    if not run.at(k, "measure"):
        return
    results = run.once(true_accuracy, s, run, k)
    if k:
        results |= base_agreement(s, run, k)
    run.report(k, results)
    if k > 1:
        run.warn("pseudo-label drift", signatures.label_drift(run.measured(k - 1), run.measured(k)))
    run.finish_iteration(k)


def true_accuracy(s: Settings, run: Run, k: int) -> dict:
    """Accuracy on held-out scenes and of the silver labels; {} for your own images, whose truth nobody knows.

    The true labels stay in here: what is returned is printed and written, and used for nothing else.
    """
    if s.images is not None:
        return {}
    import toy.measure as truth  # imports the exact answerer, which self-play must not

    held_out = run.folder / "held-out"
    items = truth.held_out_questions(held_out, HELD_OUT_QUESTIONS, HELD_OUT_SEED, run.scene_size)
    sampling = run.sampling | dict(generator=run.seeded("held-out"))
    scores = evaluate.scores(evaluate.answer_all(run.reasoner, items, 4, len(items), **sampling))
    accuracy = {name: scores[name] for name in ("greedy_accuracy", "sampled_accuracy")}
    return accuracy | truth.silver_label_accuracy(run.curated(k), run.folder / "images")


def base_agreement(s: Settings, run: Run, k: int) -> dict:
    """How often the Reasoner's majority is still the base's, on some of the candidates of iteration 1."""
    base = [e for e in run.candidates(1) if e.label is not None]
    base = base[:: -(-len(base) // PROBES)] if base else []
    prompts = [reasoner.answer_prompt(run.reasoner, run.image_of(e), e.question) for e in run.share(base)]
    sampling = run.sampling | dict(generator=run.seeded(k, "probe"))
    answered = reasoner.answer(run.reasoner, prompts, s.answers, **sampling)
    votes = [rewards.confidence(answers) for answers in run.gather([a.answers for a in answered])]
    agree = [rewards.answer_reward(label, e.label) for (label, _), e in zip(votes, base)]
    confidence = mean([c for _, c in votes]) if base else None
    return dict(base_agreement=mean(agree) if base else None, probe_confidence=confidence)


def watch_questions(run: Run, k: int) -> None:
    """Warns of what has gone wrong in the Questioner's phase."""
    steps = run.of("questioner")
    r_unc = [record["r_unc"] for record in steps if record["iteration"] == k]
    run.warn("stagnant difficulty", signatures.stagnant_difficulty(r_unc))
    run.warn("question collapse", signatures.question_collapse(steps[0], steps[-1]))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (see engine/command.py)."""
    return command.main(visplay, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

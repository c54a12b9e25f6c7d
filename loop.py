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
curate.py and grpo.py, what is measured in measure/watch.py. A `VotedQuestion` (curate.py) is a question with
its m answers, its silver label and its confidence. `run` (training/run.py) holds the two roles, the images,
the random numbers of each step and the files. Several processes may share a run: each works on its part of
the images, and `all_gather` gives every process the results of all.
"""

if __name__ == "__main__":
    # A first parse: --help, a wrong flag and Ctrl-C need not wait for torch's import.
    import signal

    from training.settings import parse_arguments
    from training.terminal import prepare_output

    prepare_output()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parse_arguments(__doc__)

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import curate
import grpo
import questioner
import reasoner
import rewards
from curate import VotedQuestion
from measure import samples, watch
from training import command
from training.run import Run
from training.settings import Settings

# ---- What a researcher may change (see docs/your-own-idea.md) ----------------------------------------------


def reward_questions(voted: list[VotedQuestion | None], s: Settings) -> list[float]:
    """Returns the Questioner's rewards for the G questions about one image (None: invalid).

    r = 1[valid] max(0, r_unc - r_div)
    """
    texts = [each.question if each else None for each in voted]
    confidences = [each.confidence if each else 0.0 for each in voted]
    return rewards.questioner_rewards(texts, confidences, s.diversity_weight)


def is_middling(question: VotedQuestion, s: Settings) -> bool:
    """Tells if a question is curated: tau_low <= c <= tau_high."""
    return curate.keep(question.confidence, s.tau_low, s.tau_high)


def reward_answer(answer: str | None, question: VotedQuestion) -> float:
    """Returns the Reasoner's reward: 1 if the answer equals the silver label, else 0."""
    return rewards.answer_reward(answer, question.label)


@dataclass(frozen=True)
class Rules:
    """The three functions that a researcher may replace; the paper's by default."""

    question_reward: Callable[[list[VotedQuestion | None], Settings], list[float]] = (
        reward_questions
    )
    keep: Callable[[VotedQuestion, Settings], bool] = is_middling
    answer_reward: Callable[[str | None, VotedQuestion], float] = reward_answer


# ---- The algorithm -----------------------------------------------------------------------------------------


def visplay(s: Settings, run: Run, rules: Rules = Rules()) -> None:  # noqa: B008 (it is frozen)
    """Runs all iterations; a run that was stopped goes on where it was."""
    run.warn_of_prompts()
    measure(s, run, 0)
    for k in range(1, s.iterations + 1):
        train_questioner(s, run, k, rules)
        curate_questions(s, run, k, rules)
        train_reasoner(s, run, k, rules)
        measure(s, run, k)


def train_questioner(s: Settings, run: Run, k: int, rules: Rules) -> None:
    """Phase 1: GRPO on the Questioner. Good questions are those that split the frozen Reasoner's votes."""
    if run.is_done(k, "questioner"):
        return
    # In this block run.policy is the role in training, run.reference its copy from the start of the phase, or
    # the base with --anchor-beta.
    with run.training("questioner"):
        for step in run.steps("questioner", s.questioner_steps):
            # Take images, and ask G questions about each.
            images = run.next_images(s.images_per_step)
            asked = questioner.ask(
                run.questioner,
                images,
                s.group_size,
                run.sampling,
                s.questioner_prompt,
            )
            # Vote: the Reasoner answers each valid question m times.
            answered = reasoner.answer_questions(
                run.reasoner, asked, s.answers, run.sampling, s.reasoner_prompt
            )
            voted = reasoner.count_votes(asked, answered)
            # Reward the questions, and measure what the rewards are made of.
            question_rewards = []
            for group in voted:
                given = rules.question_reward(group, s)
                question_rewards.append(rewards.to_floats(given, len(group), rules.question_reward))
            faults = run.all_gather([each.faults for each in asked])
            metrics = watch.question_metrics(s, run.all_gather_votes(voted), faults)
            # Make one GRPO step, and log it.
            groups = [each.completions for each in asked]
            beta = s.anchor_beta or s.beta
            update = grpo_step(s, run, groups, question_rewards, beta)
            run.log(step, groups, update | metrics)
            samples.write_questions(s, run, step, asked, answered, voted)


def curate_questions(s: Settings, run: Run, k: int, rules: Rules) -> None:
    """Phase 2: the updated Questioner asks, the Reasoner votes, and middling confidence is kept."""
    if run.is_done(k, "curation"):
        return
    start = time.monotonic()
    candidates = []
    for images in run.image_batches(s.candidates, s.images_per_step):
        # Ask one question about each image, and vote on it.
        asked = questioner.ask(run.questioner, images, 1, run.sampling, s.questioner_prompt)
        voted = reasoner.vote(run.reasoner, asked, s.answers, run.sampling, s.reasoner_prompt)
        candidates += [
            question for (question,) in run.all_gather_votes(voted) if question is not None
        ]
    # Keep those of middling confidence: the majority is the silver label.
    curated = curate.curate(candidates, lambda question: rules.keep(question, s))
    seconds = time.monotonic() - start
    run.write_record(watch.curation_metrics(s, run, k, candidates, curated, seconds))
    watch.warn_of_questions(run, k)
    run.finish_curation(k, candidates, curated)


def train_reasoner(s: Settings, run: Run, k: int, rules: Rules) -> None:
    """Phase 3: GRPO on the Reasoner with the silver labels; a step takes the next curated questions."""
    if run.is_done(k, "reasoner"):
        return
    curated = run.read_curated(k)
    if not curated:  # nothing to learn from, as the run has said
        run.finish_phase()
        return
    # Shuffle them.
    order = random.Random(f"{s.seed} {k} curated").sample(curated, len(curated))
    with run.training("reasoner"):
        for step in run.steps("reasoner", s.reasoner_steps):
            # Take curated questions with their images, and answer each G times.
            questions = run.next_questions(order, step)
            prompts = [
                reasoner.answer_prompt(run.reasoner, image, q.question, s.reasoner_prompt)
                for q, image in questions
            ]
            answered = reasoner.answer(run.reasoner, prompts, s.group_size, run.sampling)
            # Reward the answers by the silver labels, and measure.
            answer_rewards = []
            for each, (question, _) in zip(answered, questions):
                given = [rules.answer_reward(answer, question) for answer in each.answers]
                answer_rewards.append(rewards.to_floats(given, len(given), rules.answer_reward))
            metrics = watch.answer_metrics(run.all_gather([each.answers for each in answered]))
            # Make one GRPO step, and log it.
            groups = [each.completions for each in answered]
            update = grpo_step(s, run, groups, answer_rewards, s.beta)
            run.log(step, groups, update | metrics)
            samples.write_answers(s, run, step, questions, answered)


def grpo_step(
    s: Settings,
    run: Run,
    groups: list[grpo.Group],
    group_rewards: list[list[float]],
    beta: float,
) -> dict[str, float]:
    """Makes one GRPO step of the role in training on its completions; returns the step's metrics."""
    grpo.set_rewards(groups, group_rewards)
    grpo.add_reference(groups, run.reference, s.temperature)
    metrics = grpo.update(run.policy, run.policy.optimizer, groups, s.clip, beta, s.temperature)
    return run.all_mean(metrics)


def measure(s: Settings, run: Run, k: int) -> None:
    """Ends an iteration (0: before the first): measures, watches for failures, exports both roles."""
    if run.is_done(k, "measure"):
        return
    probes = watch.vote_on_probes(s, run, k)
    results = run.on_main(watch.true_accuracy, s, run, k, probes) | watch.probe_metrics(run, probes)
    if k == 0:
        results |= watch.typical_logp(run)
    run.report(k, results)
    run.finish_iteration(k, probes)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (see training/command.py)."""
    return command.main(visplay, __doc__, argv, watch.check_questions)


if __name__ == "__main__":
    sys.exit(main())

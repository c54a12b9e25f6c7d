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
curate.py and grpo.py; what is measured is in watch.py. A *vote* is a question with its m answers
(`curate.VotedQuestion`), None for an output that is no valid question. `run` carries everything else
(engine/run.py): the two roles, the images, random numbers, files. `run.at` is False for what a run that was
stopped has done already; `run.steps` sets `run.policy`, the role in training, and `run.reference`, as it was
when the phase began; `together`, `gather` and `once` do nothing where there is one process.
"""

if __name__ == "__main__":  # torch takes seconds to import: --help, a wrong flag and Ctrl-C come before it
    import signal

    from training.settings import parse_arguments

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parse_arguments(__doc__)

import random
import sys
import time
from collections.abc import Callable

import curate
import grpo
import questioner
import reasoner
import rewards
from curate import VotedQuestion
from measure import watch
from training import command
from training.run import Run
from training.settings import Settings

# ---- What a researcher may change (see docs/your-own-idea.md) ----------------------------------------------


def question_reward(votes: list[VotedQuestion | None], s: Settings) -> list[float]:
    """The Questioner's, of the G questions about one image: r = 1[valid] max(0, r_unc - r_div)."""
    texts = [vote and vote.question for vote in votes]
    confidences = [vote.confidence if vote else 0.0 for vote in votes]
    return rewards.questioner_rewards(texts, confidences, s.diversity_weight)


def keep(example: VotedQuestion, s: Settings) -> bool:
    """Whether a question is curated: tau_low <= c <= tau_high."""
    return curate.keep(example.confidence, s.tau_low, s.tau_high)


def answer_reward(answer: str | None, example: VotedQuestion) -> float:
    """The Reasoner's: 1 if the answer equals the silver label, else 0."""
    return rewards.answer_reward(answer, example.label)


# ---- The algorithm -----------------------------------------------------------------------------------------


def visplay(
    s: Settings,
    run: Run,
    question_reward: Callable = question_reward,
    keep: Callable = keep,
    answer_reward: Callable = answer_reward,
) -> None:
    """All iterations, from where the run stands."""
    run.warn_of_new(questioner.INSTRUCTION, reasoner.INSTRUCTION)
    measure(s, run, 0)
    for k in range(1, s.iterations + 1):
        train_questioner(s, run, k, question_reward)
        curate_questions(s, run, k, keep)
        train_reasoner(s, run, k, answer_reward)
        measure(s, run, k)


def train_questioner(s: Settings, run: Run, k: int, question_reward: Callable) -> None:
    """Phase 1: GRPO on the Questioner. Good questions are those on which the frozen Reasoner is torn."""
    for _ in run.steps(k, "questioner", s.questioner_steps):
        images = run.next_images(s.images_per_step)
        asked = questioner.ask(run.questioner, images, s.group_size, **run.sampling)
        votes = reasoner.vote(run.reasoner, asked, s.answers, **run.sampling)
        reward = [question_reward(group, s) for group in votes]
        update(s, run, asked, reward, watch.of_questions(s, run.together(votes)))


def curate_questions(s: Settings, run: Run, k: int, keep: Callable) -> None:
    """Phase 2: the updated Questioner asks, the Reasoner votes, and middling confidence is kept."""
    if not run.at(k, "curation"):
        return
    candidates, start = [], time.monotonic()
    for images in run.image_batches(k, "curation", s.candidates, s.images_per_step):
        asked = questioner.ask(run.questioner, images, 1, **run.sampling)
        votes = reasoner.vote(run.reasoner, asked, s.answers, **run.sampling)
        candidates += [vote for (vote,) in run.together(votes) if vote]  # of one question an image
    curated = curate.curate(candidates, lambda example: keep(example, s))
    run.write(dict(iteration=k, phase="curation") | watch.of_candidates(s, candidates, curated, start))
    watch.warn_of_questions(run, k)
    run.finish_curation(k, candidates, curated)


def train_reasoner(s: Settings, run: Run, k: int, answer_reward: Callable) -> None:
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
        update(s, run, answered, reward, watch.of_answers(run.gather([a.answers for a in answered])))


def update(s: Settings, run: Run, sampled: list, reward: list[list[float]], measured: dict) -> None:
    """One GRPO step on the role in training: what it sampled, and the reward of each."""
    groups = [grpo.Group(group.prompt, group.completions, r) for group, r in zip(sampled, reward)]
    grpo.add_reference(groups, run.reference, s.temperature)
    metrics = grpo.update(run.policy, run.policy.optimizer, groups, s.clip, s.beta, s.temperature)
    run.log(metrics, groups, measured)


def measure(s: Settings, run: Run, k: int) -> None:
    """The end of an iteration (0: before the first): measured, watched for failures, both roles exported."""
    if not run.at(k, "measure"):
        return
    probes = watch.probe(s, run, k)
    run.report(k, run.once(watch.true_accuracy, s, run, k, probes) | watch.of_probes(run, probes))
    watch.warn_of_labels(s, run, k, probes)
    run.finish_iteration(k, probes)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (see engine/command.py)."""
    return command.main(visplay, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

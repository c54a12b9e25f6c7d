"""Measurements of a run, and its warnings. Nothing of them is used for training.

question_metrics, answer_metrics         of a GRPO step: what its rewards are made of
curation_metrics                         of a curation
vote_on_probes, probe_metrics            votes on fixed questions, the same at the end of each iteration
true_accuracy                            where the truth is known: held-out questions, silver labels, probes
typical_logp, atypical_share             how likely the base finds the curated questions
warn_of_questions                         the failure signatures (see signatures.py)
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import curate
import questioner
import reasoner
import rewards
from curate import VotedQuestion, Votes
from measure import signatures
from measure.items import Item
from measure.outcomes import Outcome, answer_all, read_items
from measure.scores import mean_scores
from model.vlm import VLM
from questioner import Asked, Question
from training.log import mean
from training.run import Run
from training.settings import HELD_OUT_QUESTIONS, HELD_OUT_SEED, Settings, printable

PROBES = 64  # fixed questions that the base asks, one an image
TYPICAL = 8  # questions that the base asks about each of these images: how likely are its own?
QUANTILE = 0.02  # of their log-probabilities: a question below it is atypical
SAMPLE = 256  # the most curated questions whose log-probability is looked at
SAMPLES = 4  # answers to a held-out question


def question_metrics(s: Settings, votes: Votes, faults: list[list[str]]) -> dict:
    """Returns the parts of the paper's reward for questions.

    `validity` is a share of all outputs, `invalid` counts the faults of the others, `clusters` is a mean over
    images, `answered` the share of the votes that have an answer. The others are means over valid questions.
    faults: see `questioner.Asked`.
    """
    # The valid questions about each image.
    penalties: list[float] = []
    clusters: list[int] = []
    for group in votes:
        questions = [vote.question for vote in group if vote is not None]
        penalties += rewards.diversity_penalty(questions, s.diversity_weight, s.group_size)
        if questions:
            labels = rewards.cluster_questions(questions)
            clusters.append(len(set(labels)))

    # All valid questions.
    valid = [vote for group in votes for vote in group if vote is not None]
    outputs = len(votes) * s.group_size
    confidences = [vote.confidence for vote in valid]
    metrics = {
        "validity": len(valid) / outputs,
        "invalid": dict(Counter(fault for group in faults for fault in group if fault)),
        "answered": share_answered(valid),
        "r_unc": mean([rewards.uncertainty_reward(c) for c in confidences]),
        "r_div": mean(penalties),
        "confidence": mean(confidences),
        "clusters": mean(clusters),
    }
    questions = [vote.question for vote in valid]
    kinds = [vote.kind for vote in valid]
    return metrics | signatures.variety(questions, kinds)


def share_answered(questions: list[VotedQuestion]) -> float:
    """Returns the share of the votes that have an answer; 1 without any vote."""
    votes = [answer is not None for question in questions for answer in question.answers]
    return mean(votes) if votes else 1.0


def answer_metrics(answers: list[list[str | None]]) -> dict:
    """Returns how many of the Reasoner's outputs have an answer, and the mean share of the majorities."""
    outputs = [answer for group in answers for answer in group]
    validity = mean([answer is not None for answer in outputs])
    confidences = [c for _, c in map(rewards.confidence, answers)]
    return dict(validity=validity, confidence=mean(confidences))


def curation_metrics(
    s: Settings,
    run: Run,
    k: int,
    candidates: list[VotedQuestion],
    curated: list[VotedQuestion],
    seconds: float,
) -> dict:
    """Returns the record of a curation: how many questions were proposed, valid, kept and atypical.

    `left_out` counts the different questions that were not kept, by the reason.
    """
    kept = {(question.image, question.question) for question in curated}
    left_out = Counter()
    for question in curate.pool(candidates):
        if (question.image, question.question) in kept:
            continue
        if question.label is None:
            left_out["no answer"] += 1
        elif question.confidence > s.tau_high:
            left_out["above tau_high"] += 1
        elif question.confidence < s.tau_low:
            left_out["below tau_low"] += 1
        else:
            left_out["own rule"] += 1
    return dict(
        iteration=k,
        phase="curation",
        candidates=s.candidates,
        validity=len(candidates) / s.candidates,
        curated=len(curated),
        left_out=dict(left_out),
        answered=share_answered(candidates),
        confidence=mean([candidate.confidence for candidate in candidates]),
        atypical=atypical_share(run, curated),
        seconds=seconds,
    )


# ---- Language drift ----------------------------------------------------------------------------------------


def typical_logp(run: Run) -> dict:
    """Measures, before the first iteration, how likely the base finds its own questions.

    Returns the 2% quantile of `least_likely_logps` over these questions, `typical_logp`, and their least,
    `least_logp`, in nats; {} if no question is valid.
    """
    images = run.probe_images(PROBES)
    sampling = replace(run.sampling, generator=run.seeded("typical"))
    asked = questioner.ask(
        run.questioner, images, TYPICAL, sampling, run.settings.questioner_prompt
    )
    questions = []
    for each in asked:
        questions += [(each.patches, q.kind, q.text) for q in each.questions if q is not None]
    logps = run.all_gather(
        least_likely_logps(run.questioner, questions, run.settings.questioner_prompt)
    )
    if not logps:
        return {}
    return dict(typical_logp=float(np.quantile(logps, QUANTILE)), least_logp=min(logps))


def atypical_share(run: Run, curated: list[VotedQuestion]) -> float | None:
    """Returns the share of the curated questions that are less likely than `typical_logp` under the base.

    It looks at a sample of at most SAMPLE. None without questions, or without `typical_logp`.
    """
    # A loop of one's own may begin without the first measurement.
    measured = run.phase_records("measure")
    limit = measured[0].get("typical_logp") if measured else None
    if limit is None or not curated:
        return None
    size = min(SAMPLE, len(curated))
    sample = [curated[i * len(curated) // size] for i in range(size)]
    mine = run.load_images(run.shard(sample))
    questions = [(image, question.kind, question.question) for question, image in mine]
    logps = run.all_gather(
        least_likely_logps(run.load_base(), questions, run.settings.questioner_prompt)
    )
    return mean([logp < limit for logp in logps])


def least_likely_logps(
    vlm: VLM, questions: list[tuple[Image.Image, str, str]], instruction: str | None = None
) -> list[float]:
    """Returns the mean log-probability of the two least likely tokens of each question (image, kind, text).

    A sentence that nobody would say has a word or two that nobody would expect there. The lowest one alone is
    low in rare but sound questions, too; the sum over all tokens grows with the length.
    """
    logps = questioner.question_logps(vlm, questions, instruction)
    return [float(logp.sort().values[:2].mean()) for logp in logps]


# ---- Fixed questions ---------------------------------------------------------------------------------------


def vote_on_probes(s: Settings, run: Run, k: int) -> list[VotedQuestion]:
    """Returns the Reasoner's votes after iteration k on fixed questions that the base asked.

    Before the first iteration the base votes on them twice: its agreement with itself is the yardstick.
    """
    run.generator = run.seeded(k, "probe")

    def vote(asked: list[Asked]) -> list[VotedQuestion]:
        """Returns the votes of all processes on one question about each image."""
        votes = reasoner.vote(run.reasoner, asked, s.answers, run.sampling, s.reasoner_prompt)
        return [voted for (voted,) in run.all_gather_votes(votes) if voted is not None]

    if k == 0:
        images = run.probe_images(PROBES)
        asked = questioner.ask(run.questioner, images, 1, run.sampling, s.questioner_prompt)
        run.write_probes("base", [voted for voted in vote(asked) if voted.label is not None])

    # Each process votes on its part of the questions.
    asked = []
    for probe, image in run.load_images(run.shard(run.read_probes("base"))):
        question = Question(probe.kind, probe.question, answer="")
        asked.append(Asked(probe.image, image, [], [question], [""]))
    return vote(asked)


def probe_metrics(run: Run, probes: list[VotedQuestion]) -> dict:
    """Returns how often the majority is the base's, and its mean share; None without any question."""
    if not probes:
        return dict(base_agreement=None, probe_confidence=None)
    base = {(probe.image, probe.question): probe.label for probe in run.read_probes("base")}
    agree = [
        rewards.answer_reward(probe.label, base[probe.image, probe.question]) for probe in probes
    ]
    return dict(
        base_agreement=mean(agree),
        probe_confidence=mean([probe.confidence for probe in probes]),
    )


# ---- Where the truth is known ------------------------------------------------------------------------------


def true_accuracy(s: Settings, run: Run, k: int, probes: list[VotedQuestion]) -> dict:
    """Measures held-out questions, and for built-in scenes silver labels and fixed questions.

    Returns {} for images of one's own without --measure. Raises ValueError for a wrong file of --measure.

    The true labels stay in here. What is returned is printed and written, and used for nothing else.
    """
    if s.measure is not None:
        return file_accuracy(s, run, k)
    if s.images is not None:
        return {}
    from measure import truth  # imports the exact answerer, which self-play must not

    # Answer held-out questions.
    held_out = run.folder / "held-out"
    items = truth.held_out_questions(held_out, HELD_OUT_QUESTIONS, HELD_OUT_SEED, run.scene_size)
    outcomes, accuracy = answer_held_out(run, run.reasoner, items, len(items))

    # Compare silver labels and fixed questions with the truth.
    scenes = run.folder / "images"
    accuracy |= truth.accuracy_by_objects(outcomes, held_out)
    accuracy |= truth.silver_label_accuracy(run.read_curated(k), scenes)
    return accuracy | {"probes_right": truth.majority_right(probes, scenes)}


def check_questions(s: Settings) -> None:
    """Raises ValueError, with a sentence, if --measure names a file of no labelled questions."""
    if s.measure is not None:
        read_items(Path(s.measure), "--measure")


def file_accuracy(s: Settings, run: Run, k: int) -> dict:
    """Measures both roles on the labelled questions of --measure."""
    items, skipped = read_items(Path(s.measure), "--measure")
    _, accuracy = answer_held_out(run, run.reasoner, items)
    of_questioner = accuracy  # before the first iteration both are the base
    if k:
        _, of_questioner = answer_held_out(run, run.questioner, items)
    else:
        for path, why in skipped:
            run.console.say(f"--measure: skipped {printable(path)}: {printable(why)}")
    accuracy |= {f"questioner_{name}": value for name, value in of_questioner.items()}
    return accuracy | {"measured": len(items)}


def answer_held_out(
    run: Run, vlm: VLM, items: list[Item], batch: int = 64
) -> tuple[list[Outcome], dict]:
    """Answers labelled questions; returns the outcomes, and the accuracy of greedy and sampled answers."""
    sampling = vars(run.sampling) | dict(generator=run.seeded("held-out"))
    outcomes = answer_all(vlm, items, SAMPLES, batch, run.settings.reasoner_prompt, **sampling)
    scores = mean_scores(outcomes)
    return outcomes, {name: scores[name] for name in ("greedy_accuracy", "sampled_accuracy")}


# ---- Warnings ----------------------------------------------------------------------------------------------


def warn_of_questions(run: Run, k: int) -> None:
    """Warns of what has gone wrong in the Questioner's phase, and in the curation after it."""
    steps = run.phase_records("questioner")
    r_unc = [r["r_unc"] for r in steps if r["iteration"] == k and r["validity"]]
    run.warn("stagnant difficulty", signatures.stagnant_difficulty(r_unc))
    run.warn("question collapse", signatures.question_collapse(steps[0], steps[-1]))
    curation = run.phase_records("curation")[-1]
    drifted = signatures.language_drift(curation["atypical"], curation["curated"])
    run.warn("language drift", drifted)

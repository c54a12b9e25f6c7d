"""What is measured in a run, and when it warns. Nothing of it is used for training.

of_questions, of_answers            of a GRPO step: what its rewards are made of
of_candidates                       of a curation
probe, of_probes                    votes on fixed questions, the same at the end of each iteration
true_accuracy                       where the truth is known: of held-out questions, silver labels, fixed ones
warn_of_questions, warn_of_labels   the paper's failure signatures (see signatures.py)
"""

import time

import questioner
import reasoner
import rewards
from curate import VotedQuestion
from measure import signatures
from measure.outcomes import answer_all
from measure.scores import mean_scores
from training.log import mean
from training.run import Run
from training.settings import HELD_OUT_QUESTIONS, HELD_OUT_SEED, Settings

PROBES = 64  # fixed questions that the base asks, one an image
SAMPLES = 4  # answers to a held-out question


def of_questions(s: Settings, votes: list[list[VotedQuestion | None]]) -> dict:
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


def of_candidates(
    s: Settings, candidates: list[VotedQuestion], curated: list[VotedQuestion], start: float
) -> dict:
    """How many questions were proposed, valid and kept. start: when it began, by time.monotonic."""
    return dict(
        candidates=s.candidates,
        validity=len(candidates) / s.candidates,
        curated=len(curated),
        confidence=mean([e.confidence for e in candidates]),
        seconds=time.monotonic() - start,
    )


# ---- Fixed questions ---------------------------------------------------------------------------------------


def probe(s: Settings, run: Run, k: int) -> list[VotedQuestion]:
    """The Reasoner's votes after iteration k on questions that the base asked.

    Before the first iteration the base votes on them twice: how often it agrees with itself is what agreement
    with it can be at most.
    """
    run.generator = run.seeded(k, "probe")
    if k == 0:
        asked = questioner.ask(run.questioner, run.probe_images(PROBES), 1, **run.sampling)
        votes = reasoner.vote(run.reasoner, asked, s.answers, **run.sampling)
        run.write_probes("base", [v for (v,) in run.together(votes) if v and v.label is not None])
    mine = run.readable(run.share(run.probes("base")))
    prompts = [reasoner.answer_prompt(run.reasoner, image, e.question) for e, image in mine]
    answered = reasoner.answer(run.reasoner, prompts, s.answers, **run.sampling)
    voted = [
        VotedQuestion(e.image, e.question, e.kind, *rewards.confidence(a.answers), a.answers)
        for (e, _), a in zip(mine, answered)
    ]
    return [v for (v,) in run.together([[v] for v in voted])]


def of_probes(run: Run, probes: list[VotedQuestion]) -> dict:
    """How often the majority is the base's, and how large it is; None without any question."""
    if not probes:
        return dict(base_agreement=None, probe_confidence=None)
    agree = list(agreement(run, probes).values())
    return dict(base_agreement=mean(agree), probe_confidence=mean([v.confidence for v in probes]))


def agreement(run: Run, probes: list[VotedQuestion]) -> dict[tuple[str, str], float]:
    """For each (image, question) 1 if the majority is that of the base's first votes, else 0."""
    base = {(e.image, e.question): e.label for e in run.probes("base")}
    places = [(e, (e.image, e.question)) for e in probes]
    return {place: rewards.answer_reward(e.label, base[place]) for e, place in places}


# ---- Where the truth is known ------------------------------------------------------------------------------


def true_accuracy(s: Settings, run: Run, k: int, probes: list[VotedQuestion]) -> dict:
    """Of held-out scenes, of the silver labels and of the fixed questions; {} for images of one's own.

    The true labels stay in here: what is returned is printed and written, and used for nothing else.
    """
    if s.images is not None:
        return {}
    from measure import truth  # imports the exact answerer, which self-play must not

    held_out, scenes = run.folder / "held-out", run.folder / "images"
    items = truth.held_out_questions(held_out, HELD_OUT_QUESTIONS, HELD_OUT_SEED, run.scene_size)
    sampling = run.sampling | dict(generator=run.seeded("held-out"))
    outcomes = answer_all(run.reasoner, items, SAMPLES, len(items), **sampling)
    scores = mean_scores(outcomes)
    accuracy = {name: scores[name] for name in ("greedy_accuracy", "sampled_accuracy")}
    accuracy |= truth.measure(outcomes, run.curated(k), held_out, scenes)
    return accuracy | {"probes_right": truth.majority_right(probes, scenes)}


# ---- Warnings ----------------------------------------------------------------------------------------------


def warn_of_questions(run: Run, k: int) -> None:
    """Warns of what has gone wrong in the Questioner's phase."""
    steps = run.of("questioner")
    r_unc = [record["r_unc"] for record in steps if record["iteration"] == k]
    run.warn("stagnant difficulty", signatures.stagnant_difficulty(r_unc))
    run.warn("question collapse", signatures.question_collapse(steps[0], steps[-1]))


def warn_of_labels(s: Settings, run: Run, k: int, probes: list[VotedQuestion]) -> None:
    """Warns of majorities that got worse on the fixed questions, while they are as large as before."""
    if k == 0:
        return
    records = {record["iteration"]: record for record in run.of("measure")}
    now = records[k]
    if "probes_right" in now:
        before, what = records[k - 1], "majorities are right in"
        pair = before["probes_right"], now["probes_right"]
        if len(pair[0]) != len(pair[1]):
            return  # an image was lost meanwhile
    else:
        before, what = records[0], "majorities are the base's in"
        was, is_now = agreement(run, run.probes(0)), agreement(run, probes)
        both = [place for place in is_now if place in was]
        pair = [was[place] for place in both], [is_now[place] for place in both]
    surer = (now["probe_confidence"] or 0.0) >= (before["probe_confidence"] or 0.0)
    run.warn("pseudo-label drift", signatures.label_drift(*pair, surer, what))

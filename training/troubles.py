"""Finds what went wrong in a run, in its records: for the console while it happens, and for the report.

    find_troubles(records, settings)    all phases of a run
    judge_phase(records, settings)      one phase of one iteration, or a single step of it

A trouble is a sentence that ends with the flag to turn. `settings` are those of config.json.
"""

from collections import Counter
from itertools import groupby
from statistics import fmean

CUT_OFF = 0.25  # of the outputs: from here on it is a trouble
INVALID = 0.5  # of the outputs
ADVICE = {  # where most questions are not kept for this reason
    "above tau_high": "the Reasoner is too sure: try a higher --tau-high or more --questioner-steps",
    "below tau_low": "the Reasoner is too unsure: try a lower --tau-low or more --answers",
    "no answer": "try a higher --max-new-tokens or another --reasoner-prompt",
    "own rule": "look at your own rule, in place of loop.is_middling",
}
NOT_VALID = {  # what most outputs of a phase were, and what to try
    "questioner": ("outputs were no valid question", "try another --questioner-prompt or --model"),
    "reasoner": ("outputs had no answer", "try another --reasoner-prompt"),
}


def is_finished(records: list[dict], settings: dict) -> bool:
    """Tells if all iterations of a run are done."""
    return count_done(records) >= settings["iterations"]


def count_done(records: list[dict]) -> int:
    """Returns the number of the last iteration that was measured at its end."""
    return max((r["iteration"] for r in records if r.get("phase") == "measure"), default=0)


def find_troubles(records: list[dict], settings: dict) -> list[str]:
    """Returns a sentence for everything that went wrong, in the order in which it happened."""
    troubles = []
    for (k, phase), group in groupby(records, key=lambda r: (r["iteration"], r.get("phase"))):
        group = list(group)
        if phase == "warning":
            told = [f"{record.get('signature')}: {record.get('message')}" for record in group]
        else:
            told = [f"{phase}: {why}" for why in judge_phase(group, settings).values()]
        troubles += [f"iteration {k}, {sentence}" for sentence in told]
    return troubles


def judge_phase(records: list[dict], settings: dict) -> dict[str, str]:
    """Judges records of one phase of one iteration. Returns a kind of trouble -> a sentence."""
    phase = records[0].get("phase")
    if phase == "curation":
        told = _judge_curation(records[-1], settings)
        return {"few": told} if told else {}
    if phase not in ("questioner", "reasoner"):
        return {}
    troubles = {}
    count = sum(_number(record, "outputs") for record in records)
    invalid = 1 - mean_field("validity", records, 1.0)
    cut_off = mean_field("truncated", records, 0.0)
    limit = f"cut off at --max-new-tokens {settings.get('max_new_tokens')}: raise it"
    if invalid >= INVALID:
        kind, advice = NOT_VALID[phase]
        if cut_off >= CUT_OFF:
            advice = f"{cut_off:.0%} were {limit}"
        troubles["invalid"] = f"{_part(invalid, count)} {kind}{_tell_reasons(records)}; {advice}"
    elif cut_off >= CUT_OFF:
        troubles["cut off"] = f"{_part(cut_off, count)} outputs were {limit}"
    elif len(records) > 1 and all(_number(r, "equal_groups") == 1 for r in records):
        troubles["equal"] = (
            "in each group all rewards were equal, so that nothing was learnt: "
            "try a larger --group-size or a higher --temperature"
        )
    unanswered = 1 - mean_field("answered", records, 1.0)
    if unanswered >= INVALID:
        told = f"{unanswered:.0%} of the Reasoner's votes had no answer"
        troubles["no answer"] = f"{told}: {ADVICE['no answer']}"
    skipped = sum(_number(record, "skipped") > 0 for record in records)
    if skipped:
        troubles["skipped"] = (
            f"loss or gradient is not finite; skipped {skipped} of {len(records)} steps, which left the "
            "weights unchanged: try a lower --lr or --dtype float32"
        )
    return troubles


def _tell_reasons(records: list[dict]) -> str:
    """Says why outputs are not valid, with the most frequent reasons; "" if the records do not say."""
    reasons = sum((_counts(record, "invalid") for record in records), Counter())
    each = [f"{reason} {n / reasons.total():.0%}" for reason, n in reasons.most_common(4)]
    return f" ({', '.join(each)})" if each else ""


def _judge_curation(record: dict, settings: dict) -> str:
    """Says why nothing, or little, was curated; "" if there was enough."""
    curated = _number(record, "curated")
    least = _number(settings, "images_per_step")
    if curated >= least:
        return ""
    if not _number(record, "validity"):
        advice = "try another --questioner-prompt or --model, or a higher --max-new-tokens"
        told = "not one question was valid, so that the Reasoner is not trained"
        return f"{told}: {advice}"
    left_out = _counts(record, "left_out")
    each = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    why = f" (left out: {each})" if each else ""
    if curated:
        told = f"questions that were kept: {curated}{why}, fewer than --images-per-step {least}"
        advice = "try more --candidates or more images"
        return f"{told}, so that each step trains on all of them: {advice}"
    main_reason = max(left_out, key=left_out.get, default="")
    advice = ADVICE.get(main_reason, "candidates/ has those that were proposed")
    return f"no question was kept{why}, so that the Reasoner is not trained: {advice}"


def _part(share: float, count: float) -> str:
    """Writes a share of a number: "all 96", or "37% of 96"; the number may be unknown."""
    if share > 0.9999:
        return f"all {count}" if count else "all"
    return f"{share:.0%} of {count or 'the'}"


def _counts(record: dict, name: str) -> Counter:
    """Returns the whole numbers of a dict of a record, by their names."""
    value = record.get(name)
    counts = value.items() if isinstance(value, dict) else ()
    return Counter({key: count for key, count in counts if isinstance(count, int)})


def mean_field(name: str, records: list[dict], default: float | None = None) -> float | None:
    """Averages a number over the records that have it; `default` if none has."""
    values = [record[name] for record in records if isinstance(record.get(name), int | float)]
    return fmean(values) if values else default


def _number(record: dict, name: str) -> float:
    """Returns a number of a record, 0 if there is none."""
    value = record.get(name)
    return value if isinstance(value, int | float) else 0

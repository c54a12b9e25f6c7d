"""Charts of a report, as SVG."""

import html
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby

from curate import VotedQuestion

Proposed = tuple[VotedQuestion, bool]  # a question with its votes, and whether it was kept


Points = list[tuple[int, float]]  # (step or iteration, value)


def shown(value: object) -> str:
    """Anything as HTML: control characters and halves of characters are spelled out."""
    odd = "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
    return html.escape(re.sub(odd, lambda c: c[0].encode("unicode_escape").decode(), str(value)))


def finite(value: object) -> float | None:
    """A number that can be drawn, None for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


ACCURACIES = {"greedy": "greedy_accuracy", "sampled": "sampled_accuracy", "silver labels": "silver_accuracy"}


AGREEMENT = {"agreement": "base_agreement", "confidence": "probe_confidence"}


CHARTS = (  # title, phase, the curves and what each shows, whether these are shares
    ("Share that is right", "measure", ACCURACIES, True),
    ("Difficulty r_unc, first and last third of a phase", "questioner", {"r_unc": "r_unc"}, False),
    ("Questioner's reward", "questioner", {"reward": "reward", "penalty r_div": "r_div"}, False),
    ("Reasoner's reward", "reasoner", {"reward": "reward", "confidence": "confidence"}, False),
    ("Valid outputs", "questioner", {"valid questions": "validity"}, True),
    ("Distance from the start of the phase (KL)", "questioner", {"KL": "kl"}, False),
    ("The Reasoner's KL", "reasoner", {"KL": "kl"}, False),
    ("Different questions about an image", "questioner", {"clusters": "clusters"}, False),
    ("Largest cluster over all images", "questioner", {"share of all questions": "largest_cluster"}, True),
    ("Kinds of questions (entropy in bits)", "questioner", {"entropy": "kind_entropy"}, False),
    ("Agreement with the base", "measure", AGREEMENT, True),
    ("Curated questions", "curation", {"kept": "curated"}, False),
)


def number(record: dict, name: str) -> float | None:
    """The number under a name, "a/b" for record["a"]["b"]; None if there is none."""
    value = record
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return finite(value)


def phases(points: Points, starts: list[int]) -> list[Points]:
    """The points of each phase."""
    return [list(p) for _, p in groupby(points, key=lambda point: sum(point[0] >= start for start in starts))]


def thirds(points: Points, starts: list[int]) -> Points:
    """The means of each phase's first and last third, at its ends; single steps may fall where it rises."""
    ends = {}
    for phase in phases(points, starts):
        steps, values = zip(*phase)
        third = max(1, len(values) // 3)
        ends |= {steps[0]: sum(values[:third]) / third, steps[-1]: sum(values[-third:]) / third}
    return list(ends.items())


def chart(records: list[dict], title: str, phase: str, names: dict[str, str], share: bool, bands=None) -> str:
    """A curve for each name, over all steps of a training phase or over iterations; "" without any number."""
    mine, training = [r for r in records if r.get("phase") == phase], phase in ("questioner", "reasoner")
    places = [step if training else r["iteration"] for step, r in enumerate(mine, start=1)]
    starts = [i for i, r, before in zip(places[1:], mine[1:], mine) if r["iteration"] != before["iteration"]]
    curves = {}
    for label, name in names.items():
        points = [(i, number(r, name)) for i, r in zip(places, mine) if number(r, name) is not None]
        curves[label] = thirds(points, starts) if name == "r_unc" else points
    below = f"{phase.capitalize()} step" if training else "iteration"
    return plot(title, curves, below, starts if training else [], share, bands or {})


def plot(title: str, curves: dict[str, Points], below: str, starts: list, share: bool, bands: dict) -> str:
    """Curves that begin anew at `starts`, after a dashed line; shares from 0 to 1; named bands."""
    points = [point for points in curves.values() for point in points]
    if not points:
        return ""
    places, values = [place for place, _ in points], [value for _, value in points]
    values += [0, 1] if share else [edge for band in bands.values() for edge in band]
    x, y, drawn = scale(places, 62, 342), scale(values, 150, 10), ""
    for i, (bottom, top) in enumerate(bands.values()):
        area = f"M52 {y(bottom):.1f}H350V{y(top):.1f}H52"
        drawn += f'<path class="band" style="fill: var(--c{i % 4})" d="{area}"/>'
    for place in starts:
        drawn += f'<path class="dashed" d="M{x(place - 0.5):.1f} 10V150"/>'
    for i, points in enumerate(curves.values()):
        for phase in phases(points, starts):
            spots = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in phase)
            drawn += f'<polyline class="curve" style="stroke: var(--c{i % 4})" points="{spots}"/>'
        for place, value in points if len(points) < 4 * (len(starts) + 3) else ():
            drawn += f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3" style="fill: var(--c{i % 4})"/>'
    first, last, low, high = min(places), max(places), min(values), max(values)
    xs = {str(i): x(i) for i in (range(first, last + 1) if last - first < 9 else (first, last))}
    ys = {f"{value:.3g}": y(value) for value in (low, (low + high) / 2, high)}
    ys = {name: y(sum(band) / 2) for name, band in bands.items()} or ys
    told = [f"{name} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for name, p in curves.items() if p]
    keys = {name: f"c{i % 4}" for i, name in enumerate(curves)}
    return figure(title, xs, ys, below, drawn, keys if len(keys) > 1 else {}, "; ".join(told))


def scale(values: Iterable[float], start: float, end: float) -> Callable[[float], float]:
    """From the range of these values to the pixels start..end."""
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def figure(title: str, xs: dict, ys: dict, below: str, drawn: str, keys: dict[str, str], told: str) -> str:
    """A drawing in 52..350 by 10..150, with words along its axes, its colours' names, and itself in words."""
    words = [(x, 166, "middle", word) for word, x in xs.items()] + [(201, 184, "middle", below)]
    words += [(48, y + 4, "end", word) for word, y in ys.items()]
    drawn = '<path class="axis" d="M52 10V150H350M52 80H350"/>' + drawn
    for x, y, anchor, word in words:
        drawn += f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(word)}</text>'
    legend = ""
    for name, colour in keys.items():
        legend += f'<span class="key"><i style="background: var(--{colour})"></i>{html.escape(name)}</span> '
    caption, alt = html.escape(title), html.escape(f"{title}: {told}")
    picture = f'<svg viewBox="0 0 360 190" role="img" aria-label="{alt}">{drawn}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{picture}{legend}</figure>"


def histogram(title: str, asked: list[Proposed]) -> str:
    """How often each confidence occurred, in tenths, and how many of these questions were kept."""
    known = [(e.confidence, kept) for e, kept in asked if finite(e.confidence) is not None]
    if not known:
        return ""
    tenths = [(min(10, max(0, int(10 * confidence + 0.5))), kept) for confidence, kept in known]
    everything, kept = Counter(i for i, _ in tenths), Counter(i for i, kept in tenths if kept)
    most, drawn = max(everything.values()), ""
    x, y = scale((0, 10), 70, 332), scale((0, most), 150, 10)
    for counts, colour in ((everything, "pale"), (kept, "c0")):  # what was kept, in front of all
        for i, count in sorted(counts.items()):
            place = f'x="{x(i) - 11:.1f}" y="{y(count):.1f}" width="22" height="{150 - y(count):.1f}"'
            drawn += f'<rect {place} style="fill: var(--{colour})"/>'
    xs, ys = {"0": x(0), "0.5": x(5), "1": x(10)}, {"0": y(0), str(most): y(most)}
    told = f"{sum(kept for _, kept in asked)} of {len(asked)} different questions are kept"
    return figure(title, xs, ys, "confidence", drawn, {"kept": "c0", "not kept": "pale"}, told)


def ladder(records: list[dict]) -> str:
    """Accuracy on each rung of the built-in world, and where curated questions stand; "" for other runs."""
    found = [r["sampled_by_objects"] for r in records if isinstance(r.get("sampled_by_objects"), dict)]
    rungs, drawn = {rung: re.findall(r"\d+", rung) for accuracies in found for rung in accuracies}, ""
    bands = {rung: (int(ends[0]) - 0.5, int(ends[-1]) + 0.5) for rung, ends in rungs.items() if ends}
    for title, kind in (("Accuracy by rung", "sampled"), ("Silver labels that are right, by rung", "silver")):
        names = {f"{rung} objects": f"{kind}_by_objects/{rung}" for rung in rungs}
        drawn += chart(records, title, "measure", names, True)
    objects = {"mean number of objects": "objects"}
    return drawn and drawn + chart(records, "Where curated questions stand", "measure", objects, False, bands)

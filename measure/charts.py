"""Charts of a report, as SVG: curves over steps or iterations, histograms, the ladder of the toy world."""

import html
import math
import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, pairwise
from statistics import fmean

from curate import VotedQuestion
from measure.signatures import split_thirds

Proposed = tuple[VotedQuestion, bool]  # a question with its votes, and whether it was kept
Points = list[tuple[int, float]]  # (step or iteration, value)


@dataclass(frozen=True)
class Chart:
    """A figure that shows numbers of a run's records."""

    title: str
    phase: str  # of the records that it shows: questioner, curation, reasoner or measure
    names: dict[str, str]  # a curve's label -> its number in a record, see `number`
    is_share: bool = False  # drawn from 0 to 1
    bands: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # label -> lower and upper edge


ACCURACIES = {
    "greedy": "greedy_accuracy",
    "sampled": "sampled_accuracy",
    "silver labels": "silver_accuracy",
}
AGREEMENT = {"agreement": "base_agreement", "confidence": "probe_confidence"}
CHARTS = (
    Chart("Share that is right", "measure", ACCURACIES, is_share=True),
    Chart("Difficulty r_unc, first and last third of a phase", "questioner", {"r_unc": "r_unc"}),
    Chart("Questioner's reward", "questioner", {"reward": "reward", "penalty r_div": "r_div"}),
    Chart("Reasoner's reward", "reasoner", {"reward": "reward", "confidence": "confidence"}),
    Chart("Valid outputs", "questioner", {"valid questions": "validity"}, is_share=True),
    Chart("Distance from the start of the phase (KL)", "questioner", {"KL": "kl"}),
    Chart("The Reasoner's KL", "reasoner", {"KL": "kl"}),
    Chart("Different questions about an image", "questioner", {"clusters": "clusters"}),
    Chart(
        "Largest cluster over all images",
        "questioner",
        {"share of all questions": "largest_cluster"},
        is_share=True,
    ),
    Chart("Kinds of questions (entropy in bits)", "questioner", {"entropy": "kind_entropy"}),
    Chart("Agreement with the base", "measure", AGREEMENT, is_share=True),
    Chart("Curated questions", "curation", {"kept": "curated"}),
    Chart(
        "Curated questions that the base would hardly ask",
        "curation",
        {"share": "atypical"},
        is_share=True,
    ),
    Chart(
        "Curated questions that have an answer", "measure", {"share": "understood"}, is_share=True
    ),
)


# ---- Numbers of records ----


def escape(value: object) -> str:
    """Returns anything as HTML.

    Control characters, halves of characters and marks that turn the writing direction are spelled out.
    """
    odd = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    text = re.sub(odd, lambda c: c[0].encode("unicode_escape").decode(), str(value))
    return html.escape(text)


def finite(value: object) -> float | None:
    """Returns a number that can be drawn, None for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def number(record: dict, name: str) -> float | None:
    """Returns the number under a name, "a/b" for record["a"]["b"]; None if there is none."""
    value = record
    for part in name.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return finite(value)


def phases(points: Points, starts: Sequence[int]) -> list[Points]:
    """Splits points by the phases that they lie in: steps 1 2 3 4 5 with starts [3] are 1 2 and 3 4 5."""
    grouped = groupby(points, key=lambda point: bisect(starts, point[0]))
    return [list(phase) for _, phase in grouped]


def thirds(points: Points, starts: Sequence[int]) -> Points:
    """Returns the means of each phase's first and last third, at the ends of the phase.

    Single steps may fall where the phase rises.
    """
    ends = {}
    for phase in phases(points, starts):
        first, last = split_thirds(phase)
        ends[phase[0][0]] = fmean(value for _, value in first)
        ends[phase[-1][0]] = fmean(value for _, value in last)
    return list(ends.items())


# ---- Curves ----


def draw_chart(records: list[dict], chart: Chart) -> str:
    """Draws a curve for each name, over all steps of a training phase or over iterations.

    Returns "" if the records have no number to draw.
    """
    records = [record for record in records if record.get("phase") == chart.phase]
    iterations = [record["iteration"] for record in records]
    if chart.phase in ("questioner", "reasoner"):
        # Steps are counted on through the iterations
        below = f"{chart.phase.capitalize()} step"
        places = range(1, len(records) + 1)
        changes = enumerate(pairwise(iterations), start=2)
        starts = [step for step, (before, now) in changes if before != now]
    else:
        below = "iteration"
        places = iterations
        starts = []
    curves = {}
    for label, name in chart.names.items():
        values = [number(record, name) for record in records]
        points = [(place, value) for place, value in zip(places, values) if value is not None]
        curves[label] = thirds(points, starts) if name == "r_unc" else points
    return plot(chart, curves, below, starts)


def plot(chart: Chart, curves: dict[str, Points], below: str, starts: Sequence[int]) -> str:
    """Draws the curves of a chart; at `starts` they begin anew, after a dashed line.

    below: the name of the horizontal axis. Returns "" without any point.
    """
    points = list(chain.from_iterable(curves.values()))
    if not points:
        return ""
    # The scales
    places = [place for place, _ in points]
    values = [value for _, value in points]
    limits = (0, 1) if chart.is_share else chain.from_iterable(chart.bands.values())
    values += limits
    x = scale(places, 62, 342)
    y = scale(values, 150, 10)
    # From back to front: bands, the starts of phases, curves
    drawn = ""
    for i, (bottom, top) in enumerate(chart.bands.values()):
        area = f"M52 {y(bottom):.1f}H350V{y(top):.1f}H52"
        drawn += f'<path class="band" style="fill: var(--c{i % 4})" d="{area}"/>'
    for place in starts:
        drawn += f'<path class="dashed" d="M{x(place - 0.5):.1f} 10V150"/>'
    for i, curve in enumerate(curves.values()):
        drawn += draw_curve(curve, starts, f"var(--c{i % 4})", x, y)
    # Words: along the axes, of the colours, and for those who cannot see the figure
    first = min(places)
    last = max(places)
    ticks = range(first, last + 1) if last - first < 9 else (first, last)
    xs = {str(place): x(place) for place in ticks}
    if chart.bands:
        ys = {name: y(sum(band) / 2) for name, band in chart.bands.items()}
    else:
        low = min(values)
        high = max(values)
        ys = {f"{value:.3g}": y(value) for value in (low, (low + high) / 2, high)}
    keys = {name: f"c{i % 4}" for i, name in enumerate(curves)} if len(curves) > 1 else {}
    told = []
    for name, curve in curves.items():
        if curve:
            told.append(f"{name} from {curve[0][1]:.3g} to {curve[-1][1]:.3g}")
    return figure(chart.title, drawn, xs, ys, below, keys, "; ".join(told))


Scale = Callable[[float], float]  # from a value to pixels


def scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Returns a function from the range of these values to the pixels start..end."""
    low = min(values)
    width = max(values) - low

    def to_pixels(value: float) -> float:
        fraction = (value - low) / width if width > 0 else 0.5
        return start + (end - start) * fraction

    return to_pixels


def draw_curve(points: Points, starts: Sequence[int], colour: str, x: Scale, y: Scale) -> str:
    """Draws a line for each phase of a curve, and a disc for each point if there are few."""
    drawn = ""
    for phase in phases(points, starts):
        spots = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in phase)
        drawn += f'<polyline class="curve" style="stroke: {colour}" points="{spots}"/>'
    if len(points) < 4 * (len(starts) + 3):
        for place, value in points:
            drawn += (
                f'<circle cx="{x(place):.1f}" cy="{y(value):.1f}" r="3" style="fill: {colour}"/>'
            )
    return drawn


def figure(
    title: str,
    drawn: str,
    xs: dict[str, float],
    ys: dict[str, float],
    below: str,
    keys: dict[str, str],
    told: str,
) -> str:
    """Returns a drawing with its axes, legend and title.

        10    y  +-----------+
                 |           |
        80    y  |   drawn   |
                 |           |
        150   y  +-----------+
        166      x     x     x
        184          below
             48 52          350     pixels

    xs, ys: words along the axes, and where they stand. keys: what is drawn -> its colour. told: the drawing
    in words.
    """
    words = [(x, 166, "middle", word) for word, x in xs.items()]
    words.append((201, 184, "middle", below))
    for word, y in ys.items():
        words.append((48, y + 4, "end", word))
    drawn = '<path class="axis" d="M52 10V150H350M52 80H350"/>' + drawn
    for x, y, anchor, word in words:
        drawn += f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(word)}</text>'
    legend = ""
    for name, colour in keys.items():
        legend += f'<span class="key"><i style="background: var(--{colour})"></i>{html.escape(name)}</span> '
    caption = html.escape(title)
    alt = html.escape(f"{title}: {told}")
    picture = f'<svg viewBox="0 0 360 190" role="img" aria-label="{alt}">{drawn}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{picture}{legend}</figure>"


# ---- Other figures ----


def draw_histogram(title: str, asked: list[Proposed]) -> str:
    """Draws how often each confidence occurred, in tenths, and how many of these questions were kept.

    Returns "" if no confidence is known.
    """
    counts = {
        "pale": Counter(),
        "c0": Counter(),
    }  # of all questions, and in front of them of the kept ones
    for question, kept in asked:
        if finite(question.confidence) is not None:
            tenth = int(10 * question.confidence + 0.5)
            tenth = min(10, max(0, tenth))
            counts["pale"][tenth] += 1
            if kept:
                counts["c0"][tenth] += 1
    if not counts["pale"]:
        return ""
    most = max(counts["pale"].values())
    x = scale((0, 10), 70, 332)
    y = scale((0, most), 150, 10)
    drawn = ""
    for colour, tenths in counts.items():
        for tenth, count in sorted(tenths.items()):
            top = y(count)
            box = f'x="{x(tenth) - 11:.1f}" y="{top:.1f}" width="22" height="{150 - top:.1f}"'
            drawn += f'<rect {box} style="fill: var(--{colour})"/>'
    xs = {"0": x(0), "0.5": x(5), "1": x(10)}
    ys = {"0": y(0), str(most): y(most)}
    kept = sum(kept for _, kept in asked)
    told = f"{kept} of {len(asked)} different questions are kept"
    return figure(title, drawn, xs, ys, "confidence", {"kept": "c0", "not kept": "pale"}, told)


def draw_ladder(records: list[dict]) -> str:
    """Draws accuracy on each rung of the built-in world, and where curated questions stand.

    Returns "" for other runs.
    """
    rungs = {}  # as a set, in order of appearance
    for record in records:
        accuracies = record.get("sampled_by_objects")
        if isinstance(accuracies, dict):
            rungs |= dict.fromkeys(accuracies)
    # "3-4" is the band from 2.5 to 4.5
    bands = {}
    for rung in rungs:
        if ends := re.findall(r"\d+", rung):
            bands[rung] = (int(ends[0]) - 0.5, int(ends[-1]) + 0.5)
    drawn = ""
    for title, kind in (
        ("Accuracy by rung", "sampled"),
        ("Silver labels that are right, by rung", "silver"),
    ):
        names = {f"{rung} objects": f"{kind}_by_objects/{rung}" for rung in rungs}
        drawn += draw_chart(records, Chart(title, "measure", names, is_share=True))
    if not drawn:
        return ""
    objects = {"mean number of objects": "objects"}
    return drawn + draw_chart(
        records, Chart("Where curated questions stand", "measure", objects, bands=bands)
    )

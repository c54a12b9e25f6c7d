"""Charts of a report, as SVG: curves over steps or iterations, histograms, the ladder of the toy world."""

import html
import math
import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, pairwise
from statistics import fmean

from curate import VotedQuestion
from measure.signatures import split_thirds

Proposed = tuple[VotedQuestion, bool]  # a question with its votes, and whether it was kept
Points = list[tuple[int, float]]  # (step or iteration, value)
Curve = list[tuple[int, float, float, float]]  # (step or iteration, mean, lowest, highest value)
COLOURS = 6  # of curves: --c0, --c1, ... in measure/page.py


@dataclass(frozen=True)
class Chart:
    """A figure that shows numbers of a run's records."""

    title: str
    phase: str  # of the records that it shows: questioner, curation, reasoner or measure
    names: dict[str, str]  # a curve's label -> its number in a record, see `number`
    is_share: bool = False  # drawn from 0 to 1
    # label -> lower and upper edge
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)


ACCURACIES = {
    "greedy": "greedy_accuracy",
    "sampled": "sampled_accuracy",
    "silver labels": "silver_accuracy",
}
QUESTIONER = {"greedy": "questioner_greedy_accuracy", "sampled": "questioner_sampled_accuracy"}
AGREEMENT = {"agreement": "base_agreement", "confidence": "probe_confidence"}
CHARTS = (
    Chart("Share that is right", "measure", ACCURACIES, is_share=True),
    Chart("Answers of the Questioner that are right", "measure", QUESTIONER, is_share=True),
    Chart("Difficulty r_unc, first and last third of a phase", "questioner", {"r_unc": "r_unc"}),
    Chart("Questioner's reward", "questioner", {"reward": "reward", "penalty r_div": "r_div"}),
    Chart("Reasoner's reward", "reasoner", {"reward": "reward", "confidence": "confidence"}),
    Chart("Valid outputs", "questioner", {"valid questions": "validity"}, is_share=True),
    Chart("The Questioner's KL", "questioner", {"KL": "kl"}),
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


def phases(points: Sequence[tuple], starts: Sequence[int]) -> list[list[tuple]]:
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
    names = chart.names.items()
    return draw_runs(chart, {label: [chart_points(records, chart, name)] for label, name in names})


def chart_points(records: list[dict], chart: Chart, name: str) -> tuple[Points, list[int]]:
    """Returns the points of a curve, and the steps at which iterations begin, but for the first."""
    records = [record for record in records if record.get("phase") == chart.phase]
    iterations = [record["iteration"] for record in records]
    if chart.phase in ("questioner", "reasoner"):
        # Steps are counted on through the iterations
        places = range(1, len(records) + 1)
        changes = enumerate(pairwise(iterations), start=2)
        starts = [step for step, (before, now) in changes if before != now]
    else:
        places = iterations
        starts = []
    values = [number(record, name) for record in records]
    points = [(place, value) for place, value in zip(places, values) if value is not None]
    return thirds(points, starts) if name == "r_unc" else points, starts


def draw_runs(chart: Chart, groups: dict[str, list[tuple[Points, list[int]]]]) -> str:
    """Draws the mean curve of each group of runs, in a band from the lowest to the highest run.

    groups: name -> `chart_points` of each run. Returns "" without any point.
    """
    curves = {}
    starts = max((starts for runs in groups.values() for _, starts in runs), key=len, default=[])
    for name, runs in groups.items():
        found = defaultdict(list)  # place -> the value of each run
        for place, value in chain.from_iterable(points for points, _ in runs):
            found[place].append(value)
        values = sorted(found.items())
        curves[name] = [(place, fmean(each), min(each), max(each)) for place, each in values]
    return plot(chart, curves, starts)


def plot(chart: Chart, curves: dict[str, Curve], starts: Sequence[int]) -> str:
    """Draws the curves of a chart; at `starts` they begin anew, after a dashed line.

    Returns "" without any point.
    """
    points = list(chain.from_iterable(curves.values()))
    if not points:
        return ""
    # The scales
    places = [place for place, *_ in points]
    values = list(chain.from_iterable(values for _, *values in points))
    limits = (0, 1) if chart.is_share else chain.from_iterable(chart.bands.values())
    values += limits
    x = scale(places, 62, 342)
    ticks = []
    if not chart.bands:
        is_counted = all(value == int(value) for value in values) and not chart.is_share
        ticks = round_ticks(min(values), max(values), 1 if is_counted else 0)
    values += ticks
    y = scale(values, 150, 10)
    # From back to front: bands, the starts of phases, curves
    drawn = ""
    for i, (bottom, top) in enumerate(chart.bands.values()):
        area = f"M52 {y(bottom):.1f}H350V{y(top):.1f}H52"
        drawn += f'<path class="band" style="fill: {colour(i)}" d="{area}"/>'
    for tick in ticks:
        drawn += f'<path class="axis" d="M52 {y(tick):.1f}H350"/>'
    for place in starts:
        drawn += f'<path class="dashed" d="M{x(place - 0.5):.1f} 10V150"/>'
    for i, curve in enumerate(curves.values()):
        drawn += draw_curve(curve, starts, colour(i), x, y)
    # Words: along the axes, of the colours, and for those who cannot see the figure
    xs = {str(place): x(place) for place in whole_ticks(min(places), max(places))}
    ys = {f"{tick:g}": y(tick) for tick in ticks}
    for name, band in chart.bands.items():
        ys[name] = y(sum(band) / 2)
    keys = {name: colour(i) for i, name in enumerate(curves)} if len(curves) > 1 else {}
    told = []
    for name, curve in curves.items():
        if curve:
            told.append(f"{name} from {curve[0][1]:.3g} to {curve[-1][1]:.3g}")
    steps = chart.phase in ("questioner", "reasoner")
    below = f"{chart.phase.capitalize()} step" if steps else "Iteration"
    return figure(chart.title, drawn, xs, ys, below, keys, "; ".join(told))


def colour(i: int) -> str:
    """Returns the colour of the i-th curve: the same everywhere in a page."""
    return f"var(--c{i % COLOURS})"


def round_ticks(low: float, high: float, least: float = 0) -> list[float]:
    """Returns 2 to 5 round numbers that reach from below `low` to above `high`: 0, 0.1, 0.2.

    Their step is 1, 2 or 5 times a power of ten, and at least `least`.
    """
    if not high > low:
        return [low]
    width = max(least, (high - low) / 3)
    power = 10 ** math.floor(math.log10(width))
    step = min(m * power for m in (1, 2, 5, 10) if m * power >= width * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def whole_ticks(first: int, last: int) -> list[int]:
    """Returns whole numbers along an axis: all, if there are few, else both ends and round ones between."""
    if last - first < 10:
        return list(range(first, last + 1))
    inner = [int(tick) for tick in round_ticks(first, last)]
    room = (inner[1] - inner[0]) / 3  # for the numbers at the ends
    return [first, *(tick for tick in inner if first + room < tick < last - room), last]


Scale = Callable[[float], float]  # from a value to pixels


def scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Returns a function from the range of these values to the pixels start..end."""
    low = min(values)
    width = max(values) - low

    def to_pixels(value: float) -> float:
        fraction = (value - low) / width if width > 0 else 0.5
        return start + (end - start) * fraction

    return to_pixels


def draw_curve(curve: Curve, starts: Sequence[int], colour: str, x: Scale, y: Scale) -> str:
    """Draws a line for each phase of a curve, a band if runs differ, and discs if there are few points."""
    drawn = ""
    for phase in phases(curve, starts):
        line = " ".join(f"{x(place):.1f},{y(mean):.1f}" for place, mean, _, _ in phase)
        above = [f"{x(place):.1f} {y(high):.1f}" for place, _, _, high in phase]
        below = [f"{x(place):.1f} {y(low):.1f}" for place, _, low, _ in phase]
        if above != below:  # a single place has no width: its outline is seen
            path = f"M{'L'.join(above + below[::-1])}Z"
            drawn += f'<path class="band" style="fill: {colour}; stroke: {colour}" d="{path}"/>'
        drawn += f'<polyline class="curve" style="stroke: {colour}" points="{line}"/>'
    if len(curve) < 4 * (len(starts) + 3):
        for place, mean, _, _ in curve:
            drawn += (
                f'<circle cx="{x(place):.1f}" cy="{y(mean):.1f}" r="3" style="fill: {colour}"/>'
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
    drawn = '<path class="axis" d="M52 10V150H350"/>' + drawn
    for x, y, anchor, word in words:
        drawn += f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(word)}</text>'
    legend = ""
    for name, colour in keys.items():
        legend += f'<span class="key"><i style="background: {colour}"></i>{escape(name)}</span> '
    caption = escape(title)
    alt = escape(f"{title}: {told}")
    picture = f'<svg viewBox="0 0 360 190" role="img" aria-label="{alt}">{drawn}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{picture}{legend}</figure>"


# ---- Other figures ----


def draw_histogram(title: str, asked: list[Proposed], low: float, high: float) -> str:
    """Draws how often each confidence occurred, in tenths, and how many of these questions were kept.

    low, high: the confidences that loop.py keeps, tau_low and tau_high. Returns "" without any question.
    """
    if not asked:
        return ""
    everything = Counter(to_tenths(question.confidence) for question, _ in asked)
    kept = Counter(to_tenths(question.confidence) for question, kept in asked if kept)
    ticks = round_ticks(0, max(everything.values()), 1)
    x = scale((0, 10), 70, 332)
    y = scale((0, ticks[-1]), 150, 10)
    drawn = ""
    for tick in ticks:
        drawn += f'<path class="axis" d="M52 {y(tick):.1f}H350"/>'
    # The kept ones stand in front of all
    keys = {"kept": "var(--c0)", "not kept": "var(--pale)"}
    for fill, tenths in (("var(--pale)", everything), ("var(--c0)", kept)):
        for tenth, count in sorted(tenths.items()):
            top = y(count)
            box = f'x="{x(tenth) - 11:.1f}" y="{top:.1f}" width="22" height="{150 - top:.1f}"'
            drawn += f'<rect {box} style="fill: {fill}"/>'
    told = f"different questions: {len(asked)}, kept: {kept.total()}"
    # The thresholds of curation
    for edge in (low, high):
        drawn += f'<path class="dashed" d="M{x(10 * edge):.1f} 10V150"/>'
    xs = {f"{tenth / 10:g}": x(tenth) for tenth in (0, 5, 10)}
    ys = {f"{tick:g}": y(tick) for tick in ticks}
    below = "confidence (across), number of questions (up)"
    return figure(title, drawn, xs, ys, below, keys, told)


def to_tenths(confidence: float) -> int:
    """Rounds a confidence to tenths, from 0 to 10; 0.25 and 0.75 towards the middle."""
    tenths = 10 * confidence
    return math.floor(tenths + 0.5) if confidence < 0.5 else math.ceil(tenths - 0.5)


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

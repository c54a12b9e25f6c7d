"""Compares runs: those that differ in nothing but the seed are a group, drawn as a mean and a band.

The last accuracies of two groups are compared by seed. Of n seeds that both have, with differences d:

    mean(d) +- t std(d) / sqrt(n)        t: 97.5% quantile of Student's t with n - 1 degrees of freedom

holds the true difference in 95 of 100 such experiments, if differences are about normal. The same seed draws
the same images, so a pair shares some of its luck. Runs of other seeds are not compared. One seed gives no
interval, and no verdict.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from measure.charts import CHARTS, chart_points, draw_runs, escape, number
from measure.page import COMPARISON, STYLE, draw_box, draw_list
from training.settings import MAY_CHANGE, Settings, flag, shorten
from training.troubles import find_troubles, is_finished

ACCURACIES = ("sampled_accuracy", "greedy_accuracy")
NO_SETTINGS = {*MAY_CHANGE, "seed", "code", "scene_size"}  # of config.json
# 97.5% quantiles of Student's t with 1, 2, 3, ... degrees of freedom. The last one is taken for more, too.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Compared:
    """A run, as far as it is compared: the name of its folder, its config.json and its records."""

    name: str
    config: dict
    records: list[dict]

    @property
    def seed(self) -> str:
        """Returns the run's seed, as text: a file may hold anything."""
        return str(self.config.get("seed"))

    def last(self, name: str) -> float | None:
        """Returns a number of the last measurement; None before the run's end."""
        measured = [record for record in self.records if record.get("phase") == "measure"]
        if not measured or not is_finished(self.records, self.config):
            return None
        return number(measured[-1], name)


Groups = dict[str, list[Compared]]  # name -> runs that differ in nothing but the seed


def group_runs(runs: Sequence[Compared]) -> Groups:
    """Groups runs by all settings but the seed; a group has the name of its first run, without "-seed0"."""
    groups: dict[str, list[Compared]] = {}
    for run in runs:
        key = json.dumps(read_settings(run), sort_keys=True)
        groups.setdefault(key, []).append(run)
    named: Groups = {}
    for group in groups.values():
        name = re.sub(r"-seed\d+$", "", group[0].name)
        if name in named:
            name = group[0].name
        while name in named:
            name += "'"
        named[name] = group
    return named


def read_settings(run: Compared) -> dict:
    """Returns what decides about a run's numbers, but for the seed, with defaults where it is silent."""
    settings = dataclasses.asdict(Settings()) | run.config
    return {name: value for name, value in settings.items() if name not in NO_SETTINGS}


# ---- The test of the last accuracies -----------------------------------------------------------------------


def compare_groups(groups: Groups) -> list[str]:
    """Returns a sentence for each accuracy and each group but the first, which it is compared with."""
    (first, before), *others = groups.items()
    told = []
    for accuracy in ACCURACIES:
        for name, after in others:
            title = accuracy.replace("_", " ")
            told.append(f"{title}, {name} against {first}: {compare_last(before, after, accuracy)}")
    return told


def compare_last(before: list[Compared], after: list[Compared], accuracy: str) -> str:
    """Compares the last accuracies of two groups of runs; returns half a sentence."""
    old = last_by_seed(before, accuracy)
    new = last_by_seed(after, accuracy)
    differences = [new[seed] - old[seed] for seed in old if seed in new]
    if not differences:
        return (
            "not known: no seed has finished, measured runs of both (--seeds, --measure of loop.py)"
        )
    mean = fmean(differences)
    if len(differences) == 1:
        return f"{mean:+.3f} with one seed, which gives no verdict: try --seeds 0 1 2 3 4"
    half = half_width(differences)
    low = mean - half
    high = mean + half
    verdict = "may be chance" if low <= 0 <= high else "is more than chance explains"
    interval = f"[{low:+.3f}, {high:+.3f}] over {len(differences)} seeds"
    return f"{mean:+.3f} {interval}, paired, which {verdict}"


def last_by_seed(runs: Sequence[Compared], accuracy: str) -> dict[str, float]:
    """Returns the last accuracies of those runs that have one."""
    last = {run.seed: run.last(accuracy) for run in runs}
    return {seed: value for seed, value in last.items() if value is not None}


def half_width(differences: Sequence[float]) -> float:
    """Returns t std(d) / sqrt(n), half of the 95% interval of the mean of n differences, n > 1."""
    n = len(differences)
    t = T[min(len(T), n - 1) - 1]
    return t * math.sqrt(variance(differences) / n)


# ---- The page ----------------------------------------------------------------------------------------------


def compare_runs(runs: Sequence[Compared]) -> tuple[list[str], str]:
    """Compares runs. Returns lines for the terminal, and the HTML page."""
    groups = group_runs(runs)
    rows = tell_groups(groups)
    tests = compare_groups(groups)
    settings = tell_settings(groups)
    page = COMPARISON.format(
        style=STYLE,
        groups=draw_table(rows),
        remarks=draw_box("Look at these first", tell_remarks(groups)),
        tests=draw_list(tests) if tests else "<p>There is one group alone.</p>",
        settings=draw_table(settings) if settings[1:] else "<p>None but the seed.</p>",
        charts=draw_groups(groups),
    )
    return [*align_columns(rows), *tests], page


def draw_groups(groups: Groups) -> str:
    """Draws every number of a report's charts: a curve and a band for each group."""
    drawn = ""
    for chart in CHARTS:
        for label, name in chart.names.items():
            title = chart.title if len(chart.names) == 1 else f"{chart.title}: {label}"
            one = dataclasses.replace(chart, title=title, names={label: name})
            curves = {
                group: [chart_points(run.records, one, name) for run in runs]
                for group, runs in groups.items()
            }
            drawn += draw_runs(one, curves)
    return drawn


def tell_groups(groups: Groups) -> list[list[str]]:
    """Returns the rows of a table: each group, its runs, its seeds, and its mean last accuracies."""
    rows = [["group", "runs", "seeds", *(name.replace("_", " ") for name in ACCURACIES)]]
    for name, runs in groups.items():
        row = [name, str(len(runs)), ", ".join(run.seed for run in runs)]
        for accuracy in ACCURACIES:
            last = last_by_seed(runs, accuracy)
            row.append(f"{fmean(last.values()):.3f}" if last else "-")
        rows.append(row)
    return rows


def tell_settings(groups: Groups) -> list[list[str]]:
    """Returns the rows of a table: each setting in which groups differ, and its values."""
    settings = [read_settings(group[0]) for group in groups.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [["setting", *groups]]
    for name in names:
        values = [each.get(name) for each in settings]
        if any(value != values[0] for value in values):
            known = name in Settings.__dataclass_fields__
            rows.append([flag(name) if known else name, *(shorten(str(v), 300) for v in values)])
    return rows


def tell_remarks(groups: Groups) -> list[str]:
    """Says what makes a comparison doubtful: runs that are not over, had troubles, or other code."""
    told = []
    for name, runs in groups.items():
        codes = {json.dumps(run.config.get("code")) for run in runs}
        if len(codes) > 1:
            told.append(
                f"the runs of {name} were not all made by the same code: see their config.json"
            )
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            told.append(f"{name} has a seed more than once: the last run of it counts")
    runs = [run for runs in groups.values() for run in runs]
    unfinished = [run.name for run in runs if not is_finished(run.records, run.config)]
    if unfinished:
        told.append(
            f"not over, so that their last accuracies do not count: {', '.join(unfinished)}"
        )
    warned = [run.name for run in runs if find_troubles(run.records, run.config)]
    if warned:
        told.append(f"not all went well, as their own reports say: {', '.join(warned)}")
    return told


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows as the lines of a table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def draw_table(rows: list[list[str]]) -> str:
    """Returns rows as an HTML table, the first as its head."""
    lines = ""
    for i, row in enumerate(rows):
        cell = "th" if i == 0 else "td"
        lines += "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in row) + "</tr>"
    return f"<table>{lines}</table>"

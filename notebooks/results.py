"""Reads the results of experiments.py, and shows them: means with intervals, tables, figures.

    runs[experiment][seed]   a run: its records, its seconds of CPU time, the bytes of its states, and how
                             likely the base finds its curated questions
    value(run)               a number of a run, as `sampled(run)`; tables and figures take such functions

Intervals are 95% t-intervals over seeds. Two experiments are compared seed by seed.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# The 97.5% quantile of Student's t with n - 1 degrees of freedom, of n values.
T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
FILE = Path(__file__).with_name("experiments.jsonl")


class Result(NamedTuple):
    """A run of an experiment."""

    records: list[dict]  # of metrics.jsonl
    commit: str
    seconds: float  # of CPU time
    state_bytes: int
    likelihoods: list | None  # see `experiments.likelihoods`; only of some experiments


Runs = dict[str, dict[int, Result]]
Value = Callable[[Result], float]


def read_results(wanted: Callable[[dict], bool], file: Path = FILE) -> Runs:
    """Reads the runs whose line of results is wanted; of one that was made twice the later one counts."""
    runs: Runs = {}
    for line in file.read_text().splitlines():
        found = json.loads(line)
        if found["short"] or not wanted(found):
            continue
        names = ("records", "commit", "cpu_seconds", "state_bytes", "likelihoods")
        result = Result(*map(found.get, names))
        runs.setdefault(found["experiment"], {})[found["seed"]] = result
    return {name: dict(sorted(seeds.items())) for name, seeds in runs.items()}


# ---- Numbers of a run -----------------------------------------------------------------------


def values(run: Result, phase: str, name: str) -> list:
    """Returns all values of a metric in a run."""
    mine = [record for record in run.records if record["phase"] == phase]
    return [record[name] for record in mine if record.get(name) is not None]


def sampled(run: Result) -> float:
    """Returns the last sampled accuracy."""
    return values(run, "measure", "sampled_accuracy")[-1]


def high_rung(run: Result) -> float:
    """Returns the last sampled accuracy of questions about 5 or 6 objects."""
    return values(run, "measure", "sampled_by_objects")[-1]["5-6"]


def gain(run: Result) -> float:
    """Returns how far sampled accuracy has risen."""
    accuracy = values(run, "measure", "sampled_accuracy")
    return accuracy[-1] - accuracy[0]


def silver(run: Result) -> float:
    """Returns the share of silver labels that are right, the mean over iterations."""
    return fmean(values(run, "measure", "silver_accuracy"))


def objects(run: Result) -> float:
    """Returns how many objects the last curated questions ask for."""
    return values(run, "measure", "objects")[-1]


def understood(run: Result) -> float:
    """Returns the share of the last curated questions that have an answer."""
    return values(run, "measure", "understood")[-1]


# ---- Means and intervals --------------------------------------------------------------------


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Returns the mean, and the half-width of its 95% interval; NaN for one number."""
    if len(numbers) < 2:
        return fmean(numbers), math.nan
    return fmean(numbers), T[len(numbers)] * stdev(numbers) / math.sqrt(len(numbers))


def mean_and_interval(numbers: Sequence[float]) -> str:
    """Returns both as text."""
    mean, half = interval(numbers)
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def says(differences: Sequence[float]) -> str:
    """Returns what differences, one a seed, say: nothing if their interval includes 0."""
    mean, half = interval(differences)
    if len(differences) < 2:
        return f"{mean:+.3f} (one seed says nothing)"
    word = ("higher" if mean > 0 else "lower") if abs(mean) > half else "no difference shown"
    return f"{mean:+.3f} ± {half:.3f}, {len(differences)} seeds: {word}"


# ---- Tables and figures ---------------------------------------------------------------------


def table(runs: Runs, labels: Sequence[str], value: Value, title: str, base: str = "default"):
    """Prints means of a number over seeds, and how it differs from that of `base`."""
    print(f"{title:32}  n    mean             against the {base}")
    for label in labels:
        seeds = runs[label]
        cell = mean_and_interval([value(run) for run in seeds.values()])
        shared = sorted(set(seeds) & set(runs[base]))
        paired = [value(seeds[seed]) - value(runs[base][seed]) for seed in shared]
        difference = "" if label == base or not paired else says(paired)
        print(f"{label:32} {len(seeds):2}    {cell:17}{difference}")
    print()


def curves(
    ax: Axes, seeds: Sequence[Sequence[float]], label: str, colour: str, start: int = 0
):
    """Draws means with their intervals; seeds: a list each, with a number an iteration."""
    means, halves = zip(*(interval(column) for column in zip(*seeds)))
    xs = range(start, start + len(means))
    ax.errorbar(xs, means, halves, marker="o", capsize=3, color=colour, label=label)
    for seed in seeds:
        ax.plot(xs, seed, "o", mfc="none", mec=colour, ms=4, alpha=0.6)
    ax.set_xlabel("iteration")
    ax.set_xticks(range(start, start + len(means)))


def draw_dots(
    ax: Axes, runs: Runs, labels: Sequence[str], value: Value, title: str, base: str
):
    """Draws a number of each run, an experiment a row; the dotted line is the mean of `base`."""
    for row, label in enumerate(labels):
        numbers = [value(run) for run in runs[label].values()]
        mean, half = interval(numbers)
        ax.errorbar(mean, row, xerr=half, marker="s", capsize=4, color="tab:blue")
        ax.plot(numbers, [row] * len(numbers), "o", mfc="none", mec="black", ms=5)
    middle = fmean([value(run) for run in runs[base].values()])
    ax.axvline(middle, color="gray", ls=":", lw=1)
    ax.set_xlabel(title)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)  # the first one on top
    ax.locator_params(axis="x", nbins=5)


def compare(
    runs: Runs, names: Sequence[str], numbers: dict[str, Value], base: str = "default"
):
    """Draws and prints `base` and other experiments, by each number (title: function of a run)."""
    labels = [base] + [name for name in names if name in runs]
    missing = [name for name in names if name not in runs]
    if missing:
        print(f"not run yet: {', '.join(missing)}\n")
    if len(labels) == 1:
        return
    size = (1.5 + 2.8 * len(numbers), 0.8 + 0.4 * len(labels))
    fig, axes = plt.subplots(1, len(numbers), figsize=size, sharey=True)
    for ax, (title, value) in zip(axes, numbers.items()):
        draw_dots(ax, runs, labels, value, title, base)
    fig.tight_layout()
    plt.show()
    for title, value in numbers.items():
        table(runs, labels, value, title, base)

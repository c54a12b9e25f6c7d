"""Runs compared: groups, means, bands, an interval honest about few seeds; several seeds in one command."""

import itertools
import json
import math
import random
import re
from statistics import fmean

import numpy as np
import pytest
from test_loop import SMALL, records, workplace  # noqa: F401 (a fixture)
from test_report import EVIL, check_page, make_run

import evaluate
import loop
import report
from measure import comparison
from measure.comparison import Compared, compare_last, group_runs
from training import command
from training.run import Stopped
from training.scenes import write_scenes

HELD_OUT = [
    dict(
        image=f"images/scene-0000{i}.png", question=f"How many {what} shapes are there?", answer="1"
    )
    for i, what in itertools.product(range(3), ("red", "green", "blue", "yellow"))
]


def run_of(name, seed, accuracy, finished=True, **settings):
    measured = [dict(iteration=0, phase="measure", sampled_accuracy=0.5)]
    if finished:
        measured.append(dict(iteration=1, phase="measure", sampled_accuracy=accuracy))
    return Compared(name, dict(seed=seed, iterations=1, name=name) | settings, measured)


def group_of(name, *accuracies, seeds=None, **settings):
    seeds = range(len(accuracies)) if seeds is None else seeds
    return [run_of(f"{name}-seed{s}", s, a, **settings) for s, a in zip(seeds, accuracies)]


def test_the_quantiles_are_students():
    """Against the integral of the density, which starts at 0 with half of the probability."""
    for degrees, quantile in enumerate(comparison.T, start=1):
        x = np.linspace(0, quantile, 20_001)
        density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
        probability = 0.5 + np.trapezoid(density, x) * scale / math.sqrt(degrees * math.pi)
        assert probability == pytest.approx(0.975, abs=5e-5), degrees
    for count, t in ((2, comparison.T[0]), (1000, comparison.T[-1])):
        values = [0.0, 1.0] * (count // 2)
        error = np.std(values, ddof=1) / math.sqrt(count)
        assert comparison.half_width(values) == pytest.approx(t * error)


def test_an_interval_holds_the_truth_in_95_of_100_experiments():
    rng, hits = random.Random(0), 0
    for _ in range(2000):
        before = [rng.gauss(0.5, 0.05) for _ in range(5)]
        after = [rng.gauss(0.6, 0.02) for _ in range(5)]
        width = comparison.half_width([b - a for a, b in zip(before, after)])
        hits += abs(fmean(after) - fmean(before) - 0.1) <= width
    assert 0.935 < hits / 2000 < 0.99


@pytest.mark.parametrize(
    "before, after, told",
    [
        # 4.303 x .03 / sqrt(3) = .0745
        (group_of("a", 0.5, 0.6, 0.7), group_of("b", 0.55, 0.62, 0.78), "+0.050 [-0.025, +0.125]"),
        (group_of("a", 0.5, 0.6, 0.7), group_of("b", 0.6, 0.71, 0.79), "more than chance"),
        (group_of("a", 0.5, 0.6), group_of("b", 0.6, 0.71, 0.9), "over 2 seeds, paired"),
        (group_of("a", 0.5), group_of("b", 0.9), "+0.400 with one seed, which gives no verdict"),
        (group_of("a", 0.5, 0.5, 0.5), group_of("b", 0.9), "with one seed"),
        (group_of("a", 0.5, 0.6), group_of("b", 0.9, 0.8, seeds=(7, 8)), "not known"),
        (group_of("a", 0.5, 0.6), group_of("b", 0.9, seeds=(7,)), "not known"),
        (group_of("a", 0.5, 0.6), group_of("b", 0.9, 0.8, finished=False), "not known"),
        (group_of("a", 0.5, 0.6), group_of("b", None, None), "--measure"),
        (group_of("a", 0.5, 0.5), group_of("b", 0.5, 0.5), "+0.000 [+0.000, +0.000]"),
    ],
)
def test_the_last_accuracies_are_compared_by_seed(before, after, told):
    assert told in compare_last(before, after, "sampled_accuracy")


def test_runs_that_differ_in_the_seed_alone_are_a_group():
    runs = group_of("base", 0.5, 0.6) + group_of("five", 0.5, 0.6, answers=5)
    runs += [run_of("base", 9, 0.5, device="cuda", save_every=1, samples=0, code=["x"])]
    runs += [run_of("base-seed7", 7, 0.5, program="my_idea.py")]
    groups = group_runs(runs)
    assert {name: len(group) for name, group in groups.items()} == {
        "base": 3,
        "five": 2,
        "base-seed7": 1,
    }
    assert comparison.tell_settings(groups) == [
        ["setting", "base", "five", "base-seed7"],
        ["--answers", "10", "5", "10"],
        ["program", "None", "None", "my_idea.py"],
    ]
    remarks = comparison.tell_remarks(group_runs([*runs, run_of("base-seed0", 0, 0.7)]))
    assert any("not all made by the same code" in remark for remark in remarks)
    assert any("a seed more than once" in remark for remark in remarks)


def test_the_page_of_several_runs(tmp_path, capsys):
    """Curves are means, bands reach from the lowest to the highest run, and nothing is markup."""
    folders = []
    for i, name in enumerate(("a-seed0", "a-seed1", f"b-seed0 {EVIL[:8]}", "b-seed1", "late")):
        folder = make_run(tmp_path / name)
        config = json.loads((folder / "config.json").read_text()) | dict(seed=i % 2, model=EVIL)
        config |= dict(program=EVIL if i > 1 else None, iterations=9 if name == "late" else 2)
        (folder / "config.json").write_text(json.dumps(config))
        lines = (
            (folder / "metrics.jsonl")
            .read_text()
            .replace('0.6, "silver', f'{0.6 + i / 10}, "silver')
        )
        (folder / "metrics.jsonl").write_text(lines)
        folders.append(str(folder))
    assert report.main(folders) == 0
    told = capsys.readouterr().out
    assert (
        "sampled accuracy, b-seed0 &lt;" not in told
        and "+0.200 [+0.200, +0.200] over 2 seeds" in told
    )
    text = (tmp_path / "comparison.html").read_text()
    check_page(text)
    assert "late" in text.split("do not count")[1].split("</li>")[0] and "&lt;script&gt;" in text
    (figure,) = re.findall(r"<figure><figcaption>Share that is right: sampled<.*?</figure>", text)
    assert "a from 0.65 to 0.65" in figure and figure.count('class="band"') == 2
    assert figure.count("fill: var(--c2)") == 3, "one run has discs, and no band"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--samples", "1"], "take one run"),
        (["--follow"], "take one run"),
        (["--out", "a/config.json"], "a file of the run itself"),
        (["nowhere"], "nowhere is not the folder of a run"),
        (["--samples", "1", "--out", "page.html"], "writes no page"),
        (["--samples", "1", "--follow"], "writes no page"),
    ],
)
def test_wrong_arguments_of_several_runs(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a"), make_run(tmp_path / "b")
    try:
        code = report.main(["b", "a", *flags])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1


# ---- Several seeds in one command --------------------------------------------------------------------------


def test_several_seeds_are_several_runs_and_go_on(workplace, capsys):  # noqa: F811
    seen = []

    def idea(s, run):
        seen.append((s.seed, s.name, str(run.folder)))
        if s.seed == 5 and len(seen) == 2:
            raise Stopped

    args = [*SMALL, "--seeds", "3", "5", "8", "--name", "x y"]
    assert command.main(idea, "", args) == 1
    err = capsys.readouterr().err
    assert "--seeds 3 5 8 --name 'x y'" in err and "test_compare.py" in err
    assert command.main(idea, "", args) == 0
    again = [(seed, f"x y-seed{seed}", f"runs/x y-seed{seed}") for seed in (3, 5, 8)]
    assert seen == again[:2] + again
    assert "report.py 'runs/x y-seed3' 'runs/x y-seed5' 'runs/x y-seed8'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        "--seeds", "--seeds 1 2", "--seeds x --name a", "--seeds 1 1 --name a", "--seeds -1 --name a",
        "--seeds 1 --seed 2 --name a", "--seeds 1 2 --resume runs/a", "--seeds 1000000 --name a",
        "--measure nowhere --images images", "--measure q.jsonl", "--measure images --images images",
    ],
)  # fmt: skip
def test_wrong_seeds_and_files_to_measure_are_a_sentence(workplace, capsys, args):  # noqa: F811
    (workplace / "q.jsonl").write_text("{}")
    (workplace / "images").mkdir()
    assert loop.main([*SMALL, *args.split()]) == 2, (
        "and no SystemExit, which would end a notebook's cell"
    )
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and not (workplace / "runs").exists()


# ---- Labelled questions about images of one's own ----------------------------------------------------------


def test_both_roles_are_measured_on_a_file(workplace, capsys):  # noqa: F811
    write_scenes(workplace / "images", 6, 0)
    lines = [*HELD_OUT, dict(image="gone.png", question="?", answer="1")]
    (workplace / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = [*SMALL, *"--images images --measure q.jsonl --name x --lr 3e-4".split()]
    assert loop.main(args) == 0
    out, err = capsys.readouterr()
    base, last = records(workplace / "runs" / "x", "measure")
    assert base["measured"] == 12 and "gone.png" in err and "probes_right" not in base
    assert base["greedy_accuracy"] == base["questioner_greedy_accuracy"]
    row = next(line for line in out.splitlines() if line.startswith("        1 "))
    assert row.split()[1:3] == [
        f"{last[name]:.3f}" for name in ("greedy_accuracy", "sampled_accuracy")
    ]
    # evaluate.py says the same of the checkpoints.
    models = [flag for role in ("reasoner", "questioner") for flag in ("--model", f"runs/x/{role}")]
    flags = "--data q.jsonl --answers 1 --max-new-tokens 32 --json out.json".split()
    assert evaluate.main([*models, *flags]) == 0
    reports = json.loads((workplace / "out.json").read_text())["reports"]
    greedy = [
        reports[f"runs/x/{r}"]["scores"]["all"]["greedy_accuracy"]
        for r in ("reasoner", "questioner")
    ]
    assert greedy == pytest.approx(
        [last["greedy_accuracy"], last["questioner_greedy_accuracy"]], abs=1e-6
    )


@pytest.mark.parametrize(
    "lines", ["", "no", '{"image": "x"}', json.dumps(HELD_OUT[0] | dict(image="x"))]
)
def test_a_wrong_file_to_measure_is_said_before_the_first_step(workplace, capsys, lines):  # noqa: F811
    write_scenes(workplace / "images", 2, 0)
    (workplace / "q.jsonl").write_text(lines)
    args = [*SMALL, *"--images images --measure q.jsonl --name x".split()]
    assert loop.main(args) == 2
    err = capsys.readouterr().err
    assert "error: --measure " in err and "Traceback" not in err
    assert not (workplace / "runs").exists(), "it is known before anything is made"

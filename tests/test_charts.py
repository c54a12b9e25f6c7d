"""Figures of a report: round numbers along axes, whole ones for what is counted, bars that say why."""

import itertools
import math
import random
import re

import pytest
from test_loop import SMALL, workplace  # noqa: F401 (a fixture)
from test_report import check_page, curves, make_run, written

import evaluate
from measure import charts
from training import command
from training.settings import TOY, find_model, parse_arguments


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 0.1, 1, 37, 1e6])
def test_ticks_are_round_and_reach_from_below_to_above(scale):
    rng = random.Random(0)
    for _ in range(300):
        low, high = sorted(scale * rng.uniform(-1, 1) for _ in range(2))
        ticks = charts.round_ticks(low, high)
        assert 3 <= len(ticks) <= 6 and ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
        step = ticks[1] - ticks[0]
        assert all(b - a == pytest.approx(step, rel=1e-6) for a, b in itertools.pairwise(ticks))
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-4
        assert all(len(f"{tick:g}") <= 9 for tick in ticks)
    assert charts.round_ticks(3.3, 3.3) == [3.3]


@pytest.mark.parametrize(
    "first, last, ticks",
    [
        (0, 3, [0, 1, 2, 3]), (1, 1, [1]), (1, 10, [*range(1, 11)]), (1, 60, [1, 20, 40, 60]),
        (1, 41, [1, 20, 41]), (1, 12, [1, 5, 10, 12]), (0, 1000, [0, 500, 1000]),
    ],
)  # fmt: skip
def test_steps_have_whole_numbers_with_room_between(first, last, ticks):
    assert charts.whole_ticks(first, last) == ticks


@pytest.mark.parametrize(
    "counts, ticks", [((1, 2), "1 2"), ((0, 1), "0 1"), ((7, 30), "0 10 20 30"), ((6, 6), "6")]
)
def test_what_is_counted_has_whole_ticks(counts, ticks):
    records = [
        dict(iteration=k, phase="curation", curated=n) for k, n in enumerate(counts, start=1)
    ]
    chart = next(chart for chart in charts.CHARTS if chart.title == "Curated questions")
    found = re.findall(r'text-anchor="end">([^<]*)<', charts.draw_chart(records, chart))
    assert found == ticks.split()


@pytest.mark.parametrize(
    "confidence, tenth",
    [
        (0, 0),
        (0.04, 0),
        (0.1, 1),
        (0.2, 2),
        (0.25, 3),
        (0.3, 3),
        (0.5, 5),
        (0.7, 7),
        (0.75, 7),
        (0.8, 8),
        (1, 10),
    ],
)
def test_a_bar_stands_on_the_side_of_the_threshold_where_its_questions_are(confidence, tenth):
    """0.25 and 0.75 are kept, so their bars are between the dashed lines."""
    assert charts.to_tenths(confidence) == tenth


def test_a_question_proposed_twice_has_all_its_votes(tmp_path):
    folder = make_run(tmp_path / "run", iterations=1)
    path = folder / "candidates" / "iteration-1.jsonl"
    text = path.read_text().replace('["1", "1.0", null', '["1", "2", null')
    path.write_text(text + text.replace('["1", "2", null', '["2", "1", null'))
    page = written(folder)
    check_page(page)
    _, _, figure = curves(page, "Difficulty, iteration 1")
    assert figure.count('class="dashed"') == 2 and "number of questions" in figure
    # Of (1 2 - x) twice the most frequent answer has 2 of 8; the others were kept with 0.5.
    bars = re.findall(r'<rect x="(\S+)" .*?style="fill: var\(--(\w+)\)', figure)
    (quarter, _), (half, _), _ = bars
    assert bars == [(quarter, "pale"), (half, "pale"), (half, "c0")]
    assert float(half) - float(quarter) == pytest.approx(2 * 26.2, abs=0.2)


def test_the_toy_is_there_from_any_folder(workplace, capsys):  # noqa: F811
    s = parse_arguments("", ["--model", "toy"])
    assert find_model("toy") == str(TOY) == s.base_model and s.max_new_tokens == 32
    run = command.open_run(
        parse_arguments("", [*SMALL, "--model", "toy", "--dry-run"]), command.Ranks()
    )
    assert run.settings.model is None, "as without the flag: the same run goes on with either"
    (workplace / "q.jsonl").write_text('{"image": "x", "question": "?", "answer": "1"}')
    assert evaluate.main(["--model", "toy", "--data", "q.jsonl"]) == 2
    assert "no question whose image" in capsys.readouterr().err
    (workplace / "toy").mkdir()
    assert find_model("toy") == "toy", "a folder here comes first"
    assert find_model("a/toy") == "a/toy"

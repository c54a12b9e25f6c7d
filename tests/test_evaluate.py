"""Evaluation on hand-computable files: every metric is worked out here, by hand."""

import json
import math

import pytest
from checkpoints import noise_image
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import evaluate
from evaluate import Item, chosen, right
from measure.items import find_choices
from measure.outcomes import Outcome
from measure.scores import bootstrap, compare, mcnemar, mean_scores, pair_scores, reliability

ABCD = ("a cat", "a dog", "two cats", "42")


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), ("(b)", "B"), ("B.", "B"), ("b)", "B"), ("a dog", "B"), ("A dog.", "B"), ("42", "D"),
        ("42.0", "D"), ("B. a dog", "B"),
        ("(B) a dog", "B"), ("The answer is (C), not (A)... no, (B)", "B"), ("Answer: C", "C"),
        ("It must be D", "D"), ("I think A", "A"),
        ("I see a cat and then two cats", "C"), ("there is a dog", "B"), ("a horse", None), ("E", None),
        ("", None), ("A horse is here", None),
        (r"\text{B}", "B"), ("**B**", "B"), ("Option B is right", "B"), ("B or C? C", "C"),
    ],
)  # fmt: skip
def test_the_choice_that_an_answer_means(text, letter):
    assert chosen(text, ABCD) == letter


@given(st.text(max_size=60), st.lists(st.text(max_size=8), min_size=1, max_size=26))
def test_any_answer_means_a_choice_or_none(text, choices):
    letter = chosen(text, choices)
    assert letter is None or letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]


def test_a_box_comes_before_what_stands_around_it():
    item = Item("x", "?", ("B",), ABCD)
    assert evaluate.read_answer(r"<think>(A)</think> maybe (C) \boxed{B}", item) == "B"
    assert evaluate.read_answer("<think>(A)</think> so (D)", item) == "D"
    assert (
        evaluate.read_answer(r"\boxed{7}", Item("x", "?", ("7",))) == "7"
        and evaluate.read_answer("7", Item("x", "?", ("7",))) is None
    )


def test_right_answers():
    multiple = Item("x", "?", ("a dog",), ABCD)
    assert right("B", multiple) and not right("A", multiple) and not right(None, multiple)
    several = Item("x", "?", ("0.333", "one third"))
    assert (
        right("1/3", several)
        and right("One third.", several)
        and right("0.33", several)
        and not right("0.34", several)
    )
    assert not right("word", Item("x", "?", ("other",))) and right("1e", Item("x", "?", ("1E",)))


@pytest.mark.parametrize(
    "answer, truth, is_right",
    [
        ("12.4%", "11.6%", False), ("0.1%", "0.5%", False), ("12.4%", "0.12", False),
        ("12.4%", "0.124", True),
        ("12.4 percent", "12%", False), ("12.4％", "12%", False), ("12.40%", "12.4%", True),
        ("3.142", "3.14", True),
        ("3.15", "3.14", False), ("5 cm", "5", True), ("5 cm", "5 mm", False),
        ("x = 5", "y = 5", False), ("5cm", r"5\,\text{cm}", True), ("1/3", "0.33", True),
    ],
)  # fmt: skip
def test_rounding_is_for_plain_numbers(answer, truth, is_right):
    assert right(answer, Item("x", "?", (truth,))) == is_right


MMSTAR = Item("x", "Which?\nOptions: A: Haiti, B: Grenada, C: Cuba, D: Aruba", ("B",))
REAL_WORLD = Item(
    "x", "Where is it?\nA. Left\nB. Right\nPlease answer with only the letter.", ("A",)
)
TEN = Item("x", "Which?", ("J",), tuple("klmnopqrst"))
HALLUSION = Item("x", "Is it so?", ("yes",), question_id="1", figure_id="0")


@pytest.mark.parametrize(
    "item, text, is_right",
    [
        (MMSTAR, r"\boxed{B. Grenada}", True), (MMSTAR, r"\boxed{\text{(B) Grenada}}", True),
        (MMSTAR, "B", True),
        (MMSTAR, r"\boxed{Grenada}", True), (MMSTAR, "The answer is B.", True), (MMSTAR, r"\boxed{C}", False),
        (MMSTAR, "I do not know", False), (REAL_WORLD, "Left", True), (REAL_WORLD, r"\boxed{A. Left}", True),
        (REAL_WORLD, "B", False), (TEN, r"\boxed{J. t}", True), (TEN, "The answer is I", False),
        (TEN, "(J)", True),
        (HALLUSION, r"\boxed{Yes, the left}", True), (HALLUSION, "Yes, it is.", True),
        (HALLUSION, "No.", False),
        (HALLUSION, r"\boxed{no}", False), (HALLUSION, "perhaps", False), (HALLUSION, "<think>yes", False),
        (Item("x", "?", ("D",), ABCD), r"So \boxed{x = 4}. Answer: D", True),
    ],
)  # fmt: skip
def test_answers_are_read_as_benchmarks_give_them(item, text, is_right):
    assert right(evaluate.read_answer(text, item), item) == is_right


def test_a_letter_without_options_is_an_ordinary_answer():
    vitamin = Item("x", "Which vitamin is it?", ("C",))
    assert find_choices(vitamin) == () and evaluate.read_answer(r"\boxed{C}", vitamin) == "C"
    assert find_choices(Item("x", "A: red, B: blue. How many are there?", ("5",))) == ()


def outcome(greedy, samples, answer="1", **fields):
    return Outcome(Item("x", "?", (answer,), **fields), greedy, samples)


# greedy right: yes, no, yes, no. samples right: 2, 1, 4, 0 of 4. majorities: 1 (0.5), 2 (0.5), 1 (1.0), none
FOUR = [
    outcome("1", ["1", "2", "1", None]),
    outcome("2", ["2", "2", "1", "3"]),
    outcome("1", ["1.0"] * 4),
    outcome(None, [None] * 4),
]


def test_every_mean_by_hand():
    result = mean_scores(FOUR)
    assert result["greedy_accuracy"] == 2 / 4
    assert result["sampled_accuracy"] == (2 + 1 + 4 + 0) / 16
    assert result["majority_accuracy"] == 2 / 4
    assert result["pass_at_m"] == 3 / 4
    assert result["confidence"] == (0.5 + 0.5 + 1.0 + 0.0) / 4


def test_calibration_by_hand():
    """Bins: 0 (none right of 1), 0.5 (1 of 2 right), 1.0 (1 of 1): the share right is the confidence."""
    table = reliability(FOUR)
    assert [(b["above"], b["upto"], b["share"], b["confidence"], b["right"]) for b in table] == [
        (0.0, 0.1, 0.25, 0.0, 0.0), (0.4, 0.5, 0.5, 0.5, 0.5), (0.9, 1.0, 0.25, 1.0, 1.0)
    ]  # fmt: skip
    assert mean_scores(FOUR)["ece"] == 0
    wrong = [
        outcome("1", ["2", "2", "2", "1"]),
        outcome("1", ["1", "1", "1", "2"]),
    ]  # both 0.75, one of two right
    assert mean_scores(wrong)["ece"] == pytest.approx(abs(0.5 - 0.75))


@pytest.mark.parametrize("share", [i / 10 for i in range(11)])
def test_a_confidence_on_a_border_falls_into_the_bin_below(share):
    votes = ["1"] * round(10 * share) + [None] * (10 - round(10 * share))
    (b,) = reliability([outcome("1", votes)])
    assert b["upto"] == pytest.approx(max(0.1, share))


def test_bootstrap_interval():
    """Of N values 0 or 1 with mean p it is about p +- 1.96 sqrt(p (1 - p) / N); of equal ones a point."""
    low, high = bootstrap([1.0] * 300 + [0.0] * 700)
    assert low == pytest.approx(
        0.3 - 1.96 * math.sqrt(0.21 / 1000), abs=0.004
    ) and high == pytest.approx(0.3 + 1.96 * math.sqrt(0.21 / 1000), abs=0.004)
    assert bootstrap([0.5] * 9) == (0.5, 0.5)


@pytest.mark.parametrize(
    "only_ours, only_theirs", [(0, 0), (1, 0), (5, 0), (3, 7), (6, 6), (20, 9)]
)
def test_mcnemar_against_scipy(only_ours, only_theirs):
    ours = [True] * only_ours + [False] * only_theirs + [True, False]
    theirs = [False] * only_ours + [True] * only_theirs + [True, False]
    expected = (
        binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    )
    differences = [a - b for a, b in zip(ours, theirs)]
    assert mcnemar(differences) == pytest.approx(expected)


def test_two_models_by_hand():
    better = [outcome("1", ["1"] * 4) for _ in FOUR]
    result = compare(FOUR, better)
    assert (
        result["greedy_accuracy"]["difference"] == 0.5
        and result["greedy_accuracy"]["p"] == 2 * (1 / 2) ** 2
    )
    assert (
        result["sampled_accuracy"]["difference"] == 1 - 7 / 16
        and "p" not in result["sampled_accuracy"]
    )
    low, high = result["sampled_accuracy"]["interval"]
    assert 0 <= low < 1 - 7 / 16 < high <= 1


def test_hallusionbench_pairs_by_hand():
    """q1 is right for one of two figures, q2 for both: 3 of 4; one of two questions; figure f2 alone."""
    items = [("q1", "f1", "no"), ("q1", "f2", "yes"), ("q2", "f1", "yes"), ("q2", "f2", "yes")]
    outcomes = [outcome(given, ["yes"], "yes", question_id=q, figure_id=f) for q, f, given in items]
    assert pair_scores(outcomes) == dict(aAcc=3 / 4, qAcc=1 / 2, fAcc=1 / 2)
    assert pair_scores(FOUR) == {} and pair_scores([]) == {}


@pytest.fixture
def data(tmp_path):
    noise_image(60, 60).save(tmp_path / "a.png")
    lines = [
        dict(image="a.png", question="How many?", answer=2, kind="count"),
        dict(image="a.png", question="Which?", answer="B", choices=["red", "blue"], kind="choice"),
        dict(image="gone.png", question="?", answer="x"),
        dict(image="a.png", question="Who?", answer=["Ann", "Anna"]),
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path / "data.jsonl"


def write(vlm, text):
    return vlm.tokenizer(text, add_special_tokens=False)["input_ids"] + [vlm.end_ids[0]]


def scripted(scripts, verdicts):
    """A `generate` that writes given texts. scripts, a model each: question -> (greedy, samples)."""
    scripts, verdicts, script = iter(scripts), iter(verdicts), {}

    def generate(vlm, prompts, n, max_new_tokens, temperature=1.0, **sampling):
        asked = [vlm.tokenizer.decode(prompt.ids) for prompt in prompts]
        if "Correct answer" in asked[0]:
            return [[write(vlm, verdict)] for verdict in next(verdicts)]
        if temperature == 0:  # comes first for each model
            script.update(next(scripts))
        given = [
            next(texts for question, texts in script.items() if question in text) for text in asked
        ]
        return [
            [write(vlm, text) for text in ([greedy] if temperature == 0 else samples)]
            for greedy, samples in given
        ]

    return generate


def test_a_whole_file_by_hand(data, monkeypatch, capsys):
    box = "\\boxed{%s}".__mod__
    weak = {
        "How many?": (box(3), [box(2), box(2), box(3), "?"]),
        "Which?": ("(A)", ["B", "(B)", "A", "blue"]),
        "Who?": (box("Ann"), [box("Bob")] * 4),
    }
    strong = {
        q: ([box(2), "(B)", box("Anna")][i], [[box(2), "B", box("Ann")][i]] * 4)
        for i, q in enumerate(weak)
    }
    verdicts = [[box("no"), box("no")], [box("yes"), box("perhaps")]]  # on 3 and Ann, on 2 and Anna
    monkeypatch.setattr("measure.outcomes.generate", scripted([weak, strong], verdicts))
    toy, out = str(ROOT / "toy"), data.parent / "out.json"
    args = [
        "--model",
        toy,
        "--model",
        toy + "/.",
        "--data",
        str(data),
        "--answers",
        "4",
        "--judge",
        toy,
        "--json",
        str(out),
        "--device",
        "cpu",
    ]
    assert evaluate.main(args) == 0
    printed = capsys.readouterr()
    assert "gone.png: not a readable image" in printed.err
    reports = json.loads(out.read_text())["reports"]
    first, second = reports.values()
    one = first["scores"]["all"]
    assert one["questions"] == 3 and one["greedy_accuracy"] == 1 / 3
    assert one["sampled_accuracy"] == pytest.approx((2 / 4 + 3 / 4 + 0) / 3)
    assert one["majority_accuracy"] == 2 / 3 and one["pass_at_m"] == 2 / 3
    assert one["confidence"] == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert one["ece"] == pytest.approx((abs(1 - 0.5) + abs(1 - 0.75) + abs(0 - 1)) / 3)
    assert (
        first["scores"]["count"]["sampled_accuracy"] == 0.5
        and first["scores"]["choice"]["majority_accuracy"] == 1.0
    )
    assert set(first["scores"]) == {"all", "count", "choice"}
    assert second["scores"]["all"] | {"intervals": 0} == dict(
        questions=3,
        greedy_accuracy=1,
        sampled_accuracy=1,
        majority_accuracy=1,
        pass_at_m=1,
        confidence=1,
        ece=0,
        intervals=0,
    )
    assert (
        second["against_first"]["greedy_accuracy"]["difference"] == pytest.approx(2 / 3)
        and second["against_first"]["greedy_accuracy"]["p"] == 0.5
    )
    assert (first["judged"], first["judged_right"], first["judge_disagreement"]) == (
        2 / 3,
        0.0,
        0.5,
    ), "rules: 3 is wrong, Ann is right"
    assert (second["judged"], second["judged_right"], second["judge_disagreement"]) == (
        1 / 3,
        1.0,
        0.0,
    ), "perhaps is no verdict"
    assert f" against {toy} [" in printed.out and "0.333" in printed.out


def test_it_runs_on_a_real_checkpoint(published, data):
    out = data.parent / "out.json"
    args = [
        "--model",
        str(published),
        "--data",
        str(data),
        "--answers",
        "3",
        "--max-new-tokens",
        "8",
        "--json",
        str(out),
        "--device",
        "cpu",
    ]
    assert evaluate.main(args) == 0
    content = json.loads(out.read_text())
    (report,), (answers,) = content["reports"].values(), content["answers"].values()
    assert report["scores"]["all"]["questions"] == 3 == len(answers) and all(
        len(a["samples"]) == 3 for a in answers
    )


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"image": "a.png", "question": "?"}', "line 1"),
        ("[1]", "line 1"),
        ("{", "line 1"),
        ("[" * 100_000, "line 1"),
        ('{"image": 3, "question": "?", "answer": "E"}', "line 1: image is not text but 3"),
        ('{"image": "", "question": "?", "answer": "E"}', "line 1: image is not text"),
        ('{"question": "?", "answer": "E"}', "line 1: there must be an image or images"),
        (
            '{"image": null, "images": null, "question": "?", "answer": "E"}',
            "line 1: there must be an image or images",
        ),
        (
            '{"image": "a.png", "images": ["a.png"], "question": "?", "answer": "E"}',
            "line 1: there must be an image or images",
        ),
        ('{"images": [], "question": "?", "answer": "E"}', "line 1: images is not a list of paths"),
        (
            '{"images": "a.png", "question": "?", "answer": "E"}',
            "line 1: images is not a list of paths but 'a.png'",
        ),
        (
            '{"images": {"1": "a.png"}, "question": "?", "answer": "E"}',
            "line 1: images is not a list of paths but",
        ),
        (
            '{"images": ["a.png", 3], "question": "?", "answer": "E"}',
            "image 2 of images is not text but 3",
        ),
        (
            '{"images": ["a.png", " "], "question": "?", "answer": "E"}',
            "image 2 of images is not text",
        ),
        (
            '{"images": [["a.png"]], "question": "?", "answer": "E"}',
            "image 1 of images is not text",
        ),
        (
            '{"images": ["a.png", null], "question": "?", "answer": "E"}',
            "image 2 of images is not text",
        ),
        (
            '{"images": ["a.png", "b.png"], "question": "?", "answer": "E"}',
            "no question whose image can be",
        ),
        (
            '{"image": "a.png", "question": null, "answer": "E"}',
            "line 1: question is not text but None",
        ),
        ('{"image": "a.png", "question": ["?"], "answer": "E"}', "line 1: question"),
        (
            '\n{"image": "a.png", "question": "?", "answer": null}',
            "line 2: answer is not text or a number",
        ),
        ('{"image": "a.png", "question": "?", "answer": []}', "line 1: answer is empty"),
        ('{"image": "a.png", "question": "?", "answer": ""}', "line 1: answer"),
        (
            '{"image": "a.png", "question": "?", "answer": true}',
            "line 1: answer is not text or a number",
        ),
        ('{"image": "a.png", "question": "?", "answer": NaN}', "line 1: answer is no readable"),
        (
            '{"image": "a.png", "question": "?", "answer": ["nan", 1e999]}',
            "line 1: answer is no readable text or number: inf",
        ),
        ('{"image": "a.png", "question": "?", "answer": [["E"]]}', "line 1: answer"),
        ('{"image": "a.png", "question": "?", "answer": {"a": 1}}', "line 1: answer"),
        (
            '{"image": "a.png", "question": "\\ud800?", "answer": "E"}',
            "line 1: question is no readable",
        ),
        (
            '{"image": "a.png", "question": "?", "answer": "A", "choices": "[\'x\']"}',
            "line 1: choices is not a list",
        ),
        (
            '{"image": "a.png", "question": "?", "answer": "A", "choices": {"x": 1}}',
            "line 1: choices is not a list",
        ),
        (
            '{"image": "a.png", "question": "?", "answer": "A", "choices": [null]}',
            "line 1: choices",
        ),
        ('{"image": "a.png", "question": "?", "answer": "E", "kind": ["k"]}', "line 1: kind"),
        (
            '{"image": "a.png", "question": "?", "answer": "E", "choices": ["x", "y"]}',
            "none of the choices",
        ),
        ('{"image": "a.png", "question": "?", "answer": "E", "kind": "all"}', "overall scores"),
        (
            '{"image": "b.png", "question": "?", "answer": "E"}',
            "no question whose image can be read",
        ),
    ],
)
def test_wrong_data_gets_one_sentence(data, line, said, capsys):
    data.write_text(line)
    assert (
        evaluate.main(["--model", str(ROOT / "toy"), "--data", str(data), "--device", "cpu"]) == 2
    )
    err = capsys.readouterr().err
    assert said in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_lines_as_editors_and_other_systems_leave_them(data):
    """A byte-order mark, CRLF, blank lines and U+2028 inside a text; numbers; choices under their letters."""
    lines = [
        dict(image="a.png", question="How\u2028many\u0085?", answer=5),
        dict(
            image="a.png",
            question="Which?",
            answer="B",
            choices={"A": "red", "B": "blue"},
            kind=None,
        ),
        dict(
            image="a.png",
            question="Which?",
            answer=2,
            choices=[1, 2.5, 2],
            figure_id=0,
            question_id="q",
        ),
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n\r\n"
    data.write_bytes(b"\xef\xbb\xbf" + text.encode())
    items, skipped = evaluate.read_items(data)
    assert not skipped and [item.question for item in items] == [
        "How\u2028many\u0085?",
        "Which?",
        "Which?",
    ]
    assert [item.answer for item in items] == [("5",), ("B",), ("2",)]
    assert [item.choices for item in items] == [(), ("red", "blue"), ("1", "2.5", "2")]
    assert (items[1].kind, items[2].figure_id, items[2].question_id) == ("", "0", "q")


def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(data, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_items", None)
    monkeypatch.setattr(evaluate, "open_checkpoint", None)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", "x", "--data", str(data), "--device", "cuda:77"])
    assert stop.value.code == 2 and "there is no device cuda:77 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["--answers", "0"],
        ["--data", "nowhere"],
        ["--model", "nowhere/at/all"],
        ["--device", "tpu"],
        ["--device", "cuda:99"],
        ["--device", "cpu:x"],
        ["--temperature", "nan"],
        ["--model", "nowhere/at/all", "--model", str(ROOT / "toy")],
        ["--judge", "nowhere/at/all"],
        ["--top-p", "2"],
        ["--x"],
        ["--json", "no/such/folder.json"],
        ["--json", "/tmp"],
        ["--json", "/dev/full"],
        ["--max-pixels", "783"],
    ],
)
def test_wrong_arguments_get_one_sentence(data, args, capsys):
    try:
        code = evaluate.main(
            ["--model", str(ROOT / "toy"), "--data", str(data), "--max-new-tokens", "2", *args]
        )
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and "error: " in err and "Traceback" not in err


@pytest.mark.parametrize("place", ["/proc/x.json", "/tmp", "no/such/folder.json"])
def test_that_answers_can_be_written_is_known_before_the_first(place, data, monkeypatch):
    monkeypatch.setattr(evaluate, "answer_items", lambda args: pytest.fail("too late"))
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model", str(ROOT / "toy"), "--data", str(data), "--json", place])
    assert stop.value.code == 2


def test_the_answers_do_not_go_over_the_questions(data, tmp_path, capsys):
    text, link = data.read_text(), tmp_path / "link.jsonl"
    link.symlink_to(data)
    for same in (data, link):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["--model", str(ROOT / "toy"), "--data", str(data), "--json", str(same)])
        assert stop.value.code == 2 and "same file" in capsys.readouterr().err
    assert data.read_text() == text
    (tmp_path / "to.json").symlink_to(tmp_path / "new.json")
    for path in (tmp_path / "new.json", tmp_path / "to.json"):
        evaluate.prove_writable(path)
        assert not (tmp_path / "new.json").exists(), "what is proven leaves nothing behind"
    assert (tmp_path / "to.json").is_symlink()

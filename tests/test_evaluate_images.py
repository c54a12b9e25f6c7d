"""Questions about several images, from the line to the scores, on tiny checkpoints of both families."""

import io
import json

import pytest
import torch
from checkpoints import noise_image, publish
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_benchmarks_data import IMAGE, MMMU, OFFICIAL, OTHER, THREE, file_of

import benchmarks
import evaluate
import reasoner
from evaluate import Item
from measure import outcomes as outcomes_module
from measure.items import parse_item
from measure.outcomes import (
    JUDGE,
    Outcome,
    answer_all,
    batches,
    image_reader,
    item_prompt,
    judge_all,
    judge_prompt,
    question_text,
)
from measure.published import write_questions
from measure.scores import bootstrap, compare, full_report
from model.vlm import VLM

SIZES = {"a.png": (56, 56), "b.png": (100, 60), "c.png": (30, 90)}


@pytest.fixture(scope="module", params=["qwen", "qwen3"])
def checkpoint(request, tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"), request.param)


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return VLM.load(checkpoint, "cpu", torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    for seed, (name, size) in enumerate(SIZES.items()):
        noise_image(*size, seed=seed).save(place / name)
    return place


def image(name):
    return noise_image(*SIZES[name], seed=[*SIZES].index(name))


def line(*names, question="?", answer="1", **fields):
    return dict(images=list(names), question=question, answer=answer, **fields)


def same(prompt, other):
    """Whether two prompts have the same tokens, with the same images in the same order."""
    pixels = [[image.pixels for image in p.images] for p in (prompt, other)]
    alike = len(pixels[0]) == len(pixels[1]) and all(map(torch.equal, *pixels))
    return (
        alike
        and torch.equal(prompt.ids, other.ids)
        and torch.equal(prompt.positions, other.positions)
    )


# ---- Items -------------------------------------------------------------------------------------------------


def test_an_item_has_one_image_or_several(tmp_path):
    one = Item("x", "?", ("1",))
    assert one == Item(image="x", question="?", answer=("1",))
    assert (one.image, one.images, one.marks) == ("x", ("x",), [])
    two = parse_item(line("a.png", "b.png"), tmp_path)
    assert (
        two.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
        and two.image == two.images[0]
    )
    assert two.marks == ["<image 1>", "<image 2>"]
    assert parse_item(line("a.png"), tmp_path).marks == ["<image 1>"]
    alone = parse_item(
        dict(image="a.png", images=None, question="<image 1>?", answer="1"), tmp_path
    )
    assert alone.marks == [] and alone.images == (str(tmp_path / "a.png"),)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 12))
def test_a_batch_has_few_images(counts, most):
    """Batches are the items in a row. None has too many images but one item alone, and none is too small."""
    items = [Item("x", "?", ("1",), images=("x",) * count) for count in counts]
    parts = [items[part] for part in batches(items, most)]
    assert [item for part in parts for item in part] == items
    sizes = [sum(len(item.images) for item in part) for part in parts]
    assert all(size <= most or len(part) == 1 for size, part in zip(sizes, parts))
    assert all(size + len(part[0].images) > most for size, part in zip(sizes, parts[1:]))


def test_questions_of_one_image_stand_in_batches_of_as_many():
    items = [Item("x", "?", ("1",))] * 130
    assert [*batches(items, 64)] == [slice(0, 64), slice(64, 128), slice(128, 130)]


# ---- Prompts -----------------------------------------------------------------------------------------------


def test_a_prompt_is_what_the_model_makes_of_text_and_images(vlm, folder):
    fields = dict(
        question="Is <image 2> like <image 1>?",
        answer="B",
        choices=["no", "<image 3>", "<image 1>"],
    )
    item = parse_item(line(*SIZES, **fields), folder)
    text = question_text(item)
    assert "(B) <image 3>" in text
    prompt = item_prompt(vlm, item, text, image_reader(vlm, 1))
    assert same(prompt, vlm.prompt(text, [image(name) for name in SIZES]))
    pixels = [vlm.patches(image(name)).pixels for name in ("b.png", "a.png", "c.png")]
    assert all(map(torch.equal, [i.pixels for i in prompt.images], pixels)), (
        "in the order of the text"
    )
    written = vlm.tokenizer.decode(prompt.ids[prompt.places[-1] + 1 :])
    assert "(C) <image 1>" in written, "a mark that comes again is text"


def test_a_single_image_is_placed_only_if_it_is_in_a_list(vlm, folder):
    question = "What does <image 1> show?"
    alone = parse_item(dict(image="a.png", question=question, answer="1"), folder)
    listed = parse_item(line("a.png", question=question), folder)
    text = question_text(alone)
    assert text == question_text(listed)
    first = item_prompt(vlm, alone, text, image_reader(vlm, 1))
    assert same(first, vlm.prompt(text, image("a.png")))
    placed = item_prompt(vlm, listed, text, image_reader(vlm, 1))
    assert same(placed, vlm.prompt(text, [image("a.png")]))
    assert placed.places[0] > first.places[0] and not same(first, placed)


def test_images_that_no_text_names_come_first(vlm, folder):
    item = parse_item(line("a.png", "b.png", question="Which is red?"), folder)
    prompt = item_prompt(vlm, item, "Which is red?", image_reader(vlm, 1))
    assert same(prompt, vlm.prompt("Which is red?", [image("a.png"), image("b.png")]))


# ---- The judge ---------------------------------------------------------------------------------------------

MARKED = "<image 1>, <image 2> and <image 3>"


@pytest.mark.parametrize(
    "question", ["Which?", "Is it <image 2>?", "<image 3>, <image 1>, <image 2>?"]
)
@pytest.mark.parametrize("names", [["a.png"], [*SIZES]])
def test_a_mark_in_an_answer_moves_no_image_before_the_judge(vlm, folder, question, names):
    """The answers, a model's and the true one, are read as text: all images stand before them."""
    item = parse_item(line(*names, question=question, answer=["x", MARKED]), folder)
    plain = parse_item(line(*names, question=question, answer=["x", "y"]), folder)
    marked, other = (
        judge_prompt(vlm, item, MARKED, image_reader(vlm, 1)),
        judge_prompt(vlm, plain, "z", image_reader(vlm, 1)),
    )
    assert torch.equal(marked.places, other.places)
    assert all(torch.equal(i.pixels, j.pixels) for i, j in zip(marked.images, other.images))
    written = vlm.tokenizer.decode(marked.ids[marked.places[-1] + 1 :])
    assert f"Correct answer: x or {MARKED}\nGiven answer: {MARKED}\n" in written
    asked = JUDGE.format(question=question, truth="x or y", answer="z")
    assert same(other, vlm.prompt(asked, [image(name) for name in names])), (
        "as if nothing were done"
    )


def test_before_the_judge_a_single_image_stands_first(vlm, folder):
    item = parse_item(dict(image="a.png", question="Is <image 1> red?", answer="<image 1>"), folder)
    text = JUDGE.format(question=item.question, truth="<image 1>", answer="<image 1>")
    assert same(
        judge_prompt(vlm, item, "<image 1>", image_reader(vlm, 1)), vlm.prompt(text, image("a.png"))
    )


# ---- Scores ------------------------------------------------------------------------------------------------


def outcomes_of(values, sets):
    answers = ["1" if value else "2" for value in values]
    return [Outcome(Item(s[0], "?", ("1",), images=s), a, [a]) for a, s in zip(answers, sets)]


def test_intervals_draw_questions_about_the_same_images_together():
    """In whatever order they come. Sets that share only some of their images are drawn apart."""
    values = [i % 2 for i in range(40) for _ in range(4)]
    sets = [(f"{i}", f"{i} too") for i in range(40) for _ in range(4)]
    turned = [s[::-1] if n % 2 else s for n, s in enumerate(sets)]
    keys = [str(i) for i in range(40) for _ in range(4)]
    expected = bootstrap([float(v) for v in values], keys)
    report = full_report(outcomes_of(values, turned))["scores"]["all"]
    assert report["intervals"]["greedy_accuracy"] == expected
    right = outcomes_of([1] * 160, turned)
    change = compare(outcomes_of(values, turned), right)["greedy_accuracy"]
    assert change["interval"] == pytest.approx(tuple(1 - v for v in expected[::-1]))
    apart = outcomes_of(values, [("all", f"{n}") for n in range(160)])
    low, high = full_report(apart)["scores"]["all"]["intervals"]["greedy_accuracy"]
    assert high - low < 0.6 * (expected[1] - expected[0])


# ---- The whole way -----------------------------------------------------------------------------------------


def test_from_the_line_to_the_records(checkpoint, folder, monkeypatch, capsys):
    lines = [
        dict(image="a.png", question="How many?", answer="2"),
        line("a.png", "b.png", "c.png", question="Is <image 2> like <image 1>?", answer="yes"),
        line("b.png", question="Which is <image 1>?", answer="A", choices=["red", "blue"]),
        line("a.png", "gone.png", "nowhere.png", question="Which?", answer="x"),
    ]
    data, out = folder / "questions.jsonl", folder / "out.json"
    data.write_text("".join(json.dumps(fields) + "\n" for fields in lines))
    asked, generate = [], outcomes_module.generate

    def counted(vlm, prompts, *args, **more):
        asked.append([len(prompt.images) for prompt in prompts])
        return generate(vlm, prompts, *args, **more)

    monkeypatch.setattr("measure.outcomes.generate", counted)
    monkeypatch.setattr(
        "measure.outcomes.read_answer", lambda text, item: "A" if item.choices else "<image 3>"
    )
    args = ["--model", str(checkpoint), "--model", f"{checkpoint}/.", "--judge", str(checkpoint)]
    args += ["--data", str(data), "--answers", "2", "--max-new-tokens", "4", "--device", "cpu"]
    assert evaluate.main([*args, "--json", str(out)]) == 0
    err = capsys.readouterr().err
    assert (
        "gone.png: not a readable image" in err and "nowhere.png" not in err and "a.png" not in err
    )
    assert asked == [[1, 3, 1]] * 4 + [[1, 3]] * 2, (
        "two models, greedily and at random; the judge of each"
    )
    content = json.loads(out.read_text())
    first, second = content["reports"].values()
    assert first["scores"]["all"]["questions"] == 3 and "against_first" in second
    items = [record["item"] for record in next(iter(content["answers"].values()))]
    paths = [[str(folder / name) for name in names] for names in (["a.png"], [*SIZES], ["b.png"])]
    assert [item["images"] for item in items] == paths
    assert [item["image"] for item in items] == [names[0] for names in paths]


def test_from_the_published_record_to_the_prompt(checkpoint, vlm, tmp_path, monkeypatch):
    """Records of one and of three images go through both commands; the prompts are those of `VLM.prompt`."""
    records = [
        MMMU,
        THREE,
        OFFICIAL | dict(problem="Is <image> like <image>?", images=[OTHER, IMAGE]),
    ]
    readers = [benchmarks.mmmu, benchmarks.mmmu, benchmarks.official]
    lines = [benchmarks.convert(read, record) for read, record in zip(readers, records)]
    write_questions(lines, tmp_path, 9)
    prompts, generate = [], outcomes_module.generate
    monkeypatch.setattr(
        "measure.outcomes.generate", lambda *a, **k: prompts.append(a[1]) or generate(*a, **k)
    )
    args = [
        "--model",
        str(checkpoint),
        "--data",
        str(tmp_path / "questions.jsonl"),
        "--answers",
        "2",
    ]
    assert evaluate.main([*args, "--max-new-tokens", "3", "--device", "cpu"]) == 0
    red, blue, green = (
        Image.open(io.BytesIO(data)) for data in (IMAGE["bytes"], OTHER["bytes"], file_of("green"))
    )
    letter, box = f"\n{benchmarks.LETTER}", reasoner.INSTRUCTION
    one = f"Who made what the image shows?\n(A) Ann\n(B) Bob's son\n(C) C{letter}"
    three = "What links <image 1> to <image 2>, and what is <image 1>?"
    three += f"\n(A) <image 3>\n(B) none\n(C) the image or <image 2>{letter}"
    two = f"Is <image 1> like <image 2>?{box}"
    expected = [
        vlm.prompt(one, red),
        vlm.prompt(three, [red, blue, green]),
        vlm.prompt(two, [blue, red]),
    ]
    assert len(prompts) == 2 and all(map(same, prompts[0], expected))
    assert [len(prompt.images) for prompt in prompts[0]] == [1, 3, 2]


def test_an_item_of_many_images_does_not_fill_the_memory(vlm, folder, monkeypatch):
    """Patches are made for as many images as fit into a batch, then asked about."""
    items = [parse_item(line(*[*SIZES] * 2, question="Which?"), folder) for _ in range(5)]
    sizes = []

    def answered(vlm, prompts, n, *limit, **sampling):
        sizes.append(sum(len(prompt.images) for prompt in prompts))
        return [[[vlm.end_ids[0]]] * n for _ in prompts]

    monkeypatch.setattr("measure.outcomes.generate", answered)
    outcomes = answer_all(vlm, items, 1, batch=12, max_new_tokens=2)
    assert [outcome.item for outcome in outcomes] == items and sizes == [12, 12, 12, 12, 6, 6]
    sizes.clear()
    for outcome in outcomes:
        outcome.greedy = "x"
    judge_all(vlm, outcomes, 2, batch=12)
    assert sizes == [12, 12, 6]

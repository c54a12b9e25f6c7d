"""The toy world: its pictures, its answerer, its checkpoint, and what is measured in it."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import questioner
import reasoner
from curate import VotedQuestion
from measure import truth as measure
from measure.outcomes import Outcome, answer_all
from model.forward import embed
from model.prompt import Picture
from model.sampling import Sampling
from toy import answerer
from training.scenes import (
    COLOURS,
    Thing,
    is_held_out,
    read_truth,
    render,
    sample_scene,
    write_scenes,
)

SCENE = (
    Thing(0, "red", "disc"),
    Thing(1, "red", "ring"),
    Thing(4, "blue", "disc"),
    Thing(8, "red", "disc"),
)
SAMPLING = dict(max_new_tokens=32, temperature=1.0, top_p=0.99)


# ---- Scenes and questions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, kind, objects, answer",
    [
        ("How many red discs are there?", "count colour shape", 2, "2"),
        ("How many red shapes are there?", "count colour", 3, "3"),
        ("How many discs are there?", "count shape", 3, "3"),
        ("How many crosses are there?", "count shape", 0, "0"),
        ("How many shapes are there?", "count all", 4, "4"),
        ("Does it show a blue disc, yes or no?", "exists", 1, "yes"),
        ("Does it show a red disc, yes or no?", "exists", 1, "yes"),
        ("Does it show a blue ring, yes or no?", "exists", 0, "no"),
        ("Does it show more red than blue shapes, yes or no?", "more", 4, "yes"),
        ("Does it show more blue than red shapes, yes or no?", "more", 4, "no"),
        ("Does it show more green than yellow shapes, yes or no?", "more", 0, "no"),
    ],
)
def test_the_answerer_by_hand(question, kind, objects, answer):
    fact = answerer.understand(question, SCENE)
    assert (fact.kind, len(fact.things), fact.answer) == (kind, objects, answer)


@pytest.mark.parametrize(
    "question",
    [
        "",
        "How many cats are there?",
        "Does it show more red than red shapes, yes or no?",
        "x" * 10**6,
    ],
)
def test_other_questions_are_not_understood(question):
    assert answerer.understand(question, SCENE) is None


def test_the_answerer_against_the_pixels():
    """Colours are counted in the rendered image itself, cell by cell."""
    rng = random.Random(0)
    for size in (84, 336):
        for _ in range(30):
            scene = sample_scene(rng)
            pixels = np.asarray(render(scene, rng, size)).astype(int)
            cell = size // 3
            for colour, rgb in COLOURS.items():
                hits = (
                    (abs(pixels - rgb).sum(-1) < 30)
                    .reshape(3, cell, 3, cell)
                    .any(axis=(1, 3))
                    .sum()
                )
                assert answerer.understand(
                    f"How many {colour} shapes are there?", scene
                ).answer == str(hits)


def test_questions_are_understood_and_varied():
    rng, kinds = random.Random(0), Counter()
    for _ in range(600):
        scene = sample_scene(rng)
        kinds[answerer.understand(answerer.ask(scene, rng), scene).kind] += 1
    assert kinds.keys() == answerer.PATTERNS.keys() and min(kinds.values()) > 25


def test_scenes_are_written_with_their_truth(tmp_path):
    paths = write_scenes(tmp_path, 5, seed=3)
    truth = read_truth(tmp_path)
    assert [p.name for p in paths] == list(truth) and all(
        2 <= len(scene) <= 9 for scene in truth.values()
    )
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_scenes(tmp_path, 5, seed=3)] == first
    assert [p.read_bytes() for p in write_scenes(tmp_path, 5, seed=4)] != first


def test_some_scenes_have_a_leader():
    """So that there are questions with many objects which are not about all of them."""
    rng = random.Random(0)
    crowded = [scene for scene in (sample_scene(rng) for _ in range(2000)) if len(scene) == 9]
    most = [max(Counter(t.colour for t in scene).values()) for scene in crowded]
    assert 0.2 < sum(m >= 6 for m in most) / len(crowded) < 0.6


def test_no_scene_is_both_for_training_and_held_out():
    rng = random.Random(0)
    drawn = [sample_scene(rng) for _ in range(3000)]
    assert not any(map(is_held_out, drawn))
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(100))
    assert len({scene[:1] for scene in drawn}) > 50, "nothing else is left out"


# ---- What is measured --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "held-out"
    return folder, measure.held_out_questions(folder, 512, 1_000_000, 84)


def test_every_rung_has_its_questions(held_out, tmp_path):
    folder, items = held_out
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert Counter(measure.rung(line["objects"]) for line in lines) == dict.fromkeys(
        measure.RUNGS, 128
    )
    truth = read_truth(folder)
    for item, line in zip(items, lines):
        fact = answerer.understand(item.question, truth[Path(item.image).name])
        assert (fact.answer,) == item.answer and fact.kind == item.kind == line["kind"]
        assert len(fact.things) == line["objects"] and is_held_out(truth[line["image"]])
    assert len({(item.image, item.question) for item in items}) == 512
    assert {item.kind for item in items} == answerer.PATTERNS.keys()
    assert evaluate.read_items(folder / "questions.jsonl") == (items, [])
    again = measure.held_out_questions(tmp_path, 512, 1_000_000, 84)
    assert [i.question for i in again] == [i.question for i in items]
    assert [Path(i.image).read_bytes() for i in again[::50]] == [
        Path(i.image).read_bytes() for i in items[::50]
    ]
    assert len(measure.held_out_questions(tmp_path / "few", 6, 1, 84)) == 6


def test_results_by_rung(held_out):
    """An answerer that is right up to four objects, and every other time above."""
    folder, items = held_out
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    outcomes = []
    for item, line in zip(items, lines):
        right, wrong = item.answer[0], "none"
        samples = [right, right] if line["objects"] <= 4 else [right, wrong]
        outcomes.append(Outcome(item, samples[-1], samples))
    results = measure.accuracy_by_objects(outcomes, folder)
    results |= measure.silver_label_accuracy([], folder)
    assert results["sampled_by_objects"] == {"1-2": 1, "3-4": 1, "5-6": 0.5, "7-9": 0.5}
    assert results["greedy_by_objects"] == {"1-2": 1, "3-4": 1, "5-6": 0, "7-9": 0}
    assert results["silver_accuracy"] is results["objects"] is results["understood"] is None


def test_curated_questions_are_measured(tmp_path):
    paths = write_scenes(tmp_path, 40, seed=3)
    scene, path = max(zip(read_truth(tmp_path).values(), paths), key=lambda pair: len(pair[0]))
    assert len(scene) == 9

    def example(question, label):
        return VotedQuestion(str(path), question, "numerical", label, 0.5, [label, None])

    absent = next(
        f"How many {c} {p} are there?"
        for c in COLOURS
        for p in ("discs", "rings", "crosses")
        if answerer.understand(f"How many {c} {p} are there?", scene).answer == "0"
    )
    curated = [
        example("How many shapes are there?", "9"),
        example("How many shapes are there?", "8"),
        example("Are there?", "yes"),
        example(absent, "0"),
    ]
    assert measure.silver_label_accuracy(curated, tmp_path) == {
        "silver_accuracy": 2 / 4,  # what has no answer has no true label
        "silver_by_objects": {"1-2": None, "3-4": None, "5-6": None, "7-9": 0.5},
        "objects": 6.0,
        "understood": 0.75,
        "question_kinds": {"count all": 2, "count colour shape": 1},
    }


# ---- The checkpoint ----------------------------------------------------------------------------------------


def test_the_checkpoint_is_a_small_qwen2_5_vl(toy):
    config = json.loads((ROOT / "toy" / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl" and config["architectures"] == [
        "Qwen2_5_VLForConditionalGeneration"
    ]
    assert sum(p.numel() for p in toy.model.parameters()) < 700_000
    for text in (
        questioner.INSTRUCTION,
        reasoner.INSTRUCTION,
        "Ünïcode, 5 €?\n\ttab",
        "How many red discs are there?",
    ):
        assert toy.decode(toy.tokenizer(text)["input_ids"]) == text, "the tokenizer loses nothing"
    for text in (questioner.INSTRUCTION, reasoner.INSTRUCTION, " red", " ring", "\\boxed{"):
        assert len(toy.tokenizer(text)["input_ids"]) == 1, "one token each"


def test_the_checkpoint_is_what_the_script_builds(toy, tmp_path):
    """The same tokenizer and shapes; training again takes minutes and is not a test."""
    from toy.build import new_vlm

    fresh = new_vlm(tmp_path)
    assert fresh.tokenizer.get_vocab() == toy.tokenizer.get_vocab()
    assert fresh.tokenizer.chat_template == toy.tokenizer.chat_template
    shapes = {name: p.shape for name, p in fresh.model.named_parameters()}
    assert shapes == {name: p.shape for name, p in toy.model.named_parameters()}
    assert (tmp_path / "preprocessor_config.json").read_text() == (
        ROOT / "toy" / "preprocessor_config.json"
    ).read_text()


def test_a_wrong_argument_of_the_build_is_one_sentence(monkeypatch, capsys):
    from toy import build

    monkeypatch.setattr(build, "build", None)  # it would write over the toy
    for wrong in ("--steepness very", "--steepnes steep", "more"):
        monkeypatch.setattr("sys.argv", ["build.py", *wrong.split()])
        with pytest.raises(SystemExit) as stop:
            build.main()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_a_build_is_deterministic(tmp_path, monkeypatch):
    """The second stage, a step of it: the same weights twice, other weights with another steepness."""
    from toy import build

    monkeypatch.setattr(build, "LAZY_STEPS", 1)
    monkeypatch.setattr(build, "SCENES", 20)
    threads, weights = torch.get_num_threads(), []
    for name, steepness in (("a", "steep"), ("b", "steep"), ("c", "gentle")):
        build.build(tmp_path / name, steepness, ROOT / "toy")
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    torch.set_num_threads(threads)
    assert weights[0] == weights[1] != weights[2]


def test_a_scene_cell_is_one_visual_token(toy):
    prompt = toy.prompt("x", render(SCENE, random.Random(0)))
    assert prompt.image_tokens == 9
    vectors = embed(toy.model, prompt.ids[None], [prompt])[0][prompt.places]
    assert vectors.shape == (9, 96) and torch.isfinite(vectors).all()


def test_lessons_teach_what_they_say():
    from toy.build import COMPLETE, STEEPNESS, easy_question, questioner_output, reasoner_output

    rng = random.Random(0)
    question = "How many red discs are there?"
    assert (
        reasoner_output(question, SCENE, rng, COMPLETE)
        == "<think> red disc red disc</think>\\boxed{2}"
    )
    assert reasoner_output(question, SCENE, rng, (0, 1)) == "<think> red disc</think>\\boxed{1}"
    parsed = questioner.parse_question(questioner_output(question, SCENE))
    assert parsed == questioner.Question("numerical", question, "2")
    for stops in STEEPNESS.values():
        lazy = [
            reasoner_output("How many shapes are there?", SCENE, rng, stops) for _ in range(2000)
        ]
        whole = sum(reasoner.extract_answer(text) == "4" for text in lazy) / len(lazy)
        assert abs(whole - (1 - stops[1]) * (1 - stops[2]) * (1 - stops[3])) < 0.05
    asked = Counter(easy_question(SCENE, rng) for _ in range(3000))
    assert 0.1 < asked["How many shapes are there?"] / asked["How many rings are there?"] / 2 < 0.6


@pytest.fixture(scope="module")
def outcomes(toy, held_out):
    generator = torch.Generator().manual_seed(0)
    return answer_all(toy, held_out[1], 4, 512, **SAMPLING, generator=generator)


def test_the_base_is_a_ladder(outcomes, held_out):
    """Mostly right where there is little to list, mostly wrong where there is much."""
    sampled = measure.accuracy_by_objects(outcomes, held_out[0])["sampled_by_objects"]
    easy, middle, hard, hardest = sampled.values()
    assert easy > 0.85 and hardest < 0.3 and middle < easy - 0.1 and hard < middle - 0.2, sampled


def test_the_base_lists_in_order_and_answers_from_its_list(outcomes):
    """Wrong answers are mostly too small, by what was left out: it is lazy, it does not guess."""
    answers = [
        (int(sample), int(o.item.answer[0]))
        for o in outcomes
        if o.item.kind.startswith("count")
        for sample in o.samples
        if sample is not None and sample.isdigit()
    ]
    assert sum(given > true for given, true in answers) < 0.05 * len(answers)
    assert sum(given < true for given, true in answers) > 0.3 * len(answers)


def test_the_base_asks_valid_questions_mostly_easy_ones(toy):
    rng = random.Random(5)
    scenes = [sample_scene(rng) for _ in range(64)]
    pictures = [Picture("", render(scene, rng)) for scene in scenes]
    sampling = Sampling(**SAMPLING, generator=torch.Generator().manual_seed(0))
    asked = questioner.ask(toy, pictures, 4, sampling)
    proposals = [(question, scene) for a, scene in zip(asked, scenes) for question in a.questions]
    facts = [
        question and answerer.understand(question.text, scene) for question, scene in proposals
    ]
    assert sum(fact is not None for fact in facts) > 0.97 * len(facts)
    assert {fact.kind for fact in facts if fact} == answerer.PATTERNS.keys()
    objects = [len(fact.things) for fact in facts if fact]
    assert (
        sum(objects) / len(objects) < 2.5
        and 0.01 < sum(n >= 5 for n in objects) / len(objects) < 0.2
    )

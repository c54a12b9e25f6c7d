"""The toy world: its pictures, its answerer and its checkpoint."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT

import questioner
import reasoner
from toy import answerer
from toy.scenes import COLOURS, Thing, read_truth, render, sample_scene, write_scenes

SCENE = (Thing(0, "red", "disc"), Thing(1, "red", "ring"), Thing(4, "blue", "disc"), Thing(8, "red", "disc"))


@pytest.mark.parametrize(
    "question, answer",
    [
        ("How many red discs are there?", "2"),
        ("How many red shapes are there?", "3"),
        ("How many discs are there?", "3"),
        ("How many crosses are there?", "0"),
        ("Is there a blue disc, yes or no?", "yes"),
        ("Is there a blue ring, yes or no?", "no"),
        ("Are there more red than blue shapes, yes or no?", "yes"),
        ("Are there more green than yellow shapes, yes or no?", "no"),
    ],
)
def test_the_answerer_by_hand(question, answer):
    assert answerer.understand(question, SCENE).answer == answer


@pytest.mark.parametrize(
    "question",
    ["", "How many cats are there?", "Are there more red than red shapes, yes or no?", "x" * 10**6],
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
                hits = (abs(pixels - rgb).sum(-1) < 30).reshape(3, cell, 3, cell).any(axis=(1, 3)).sum()
                assert answerer.understand(f"How many {colour} shapes are there?", scene).answer == str(hits)


def test_questions_are_understood_and_varied():
    rng, kinds = random.Random(0), set()
    for _ in range(300):
        scene = sample_scene(rng)
        kinds.add(answerer.understand(answerer.ask(scene, rng), scene).kind)
    assert kinds == set(answerer.PATTERNS)


def test_scenes_are_written_with_their_truth(tmp_path):
    paths = write_scenes(tmp_path, 5, seed=3)
    truth = read_truth(tmp_path)
    assert [p.name for p in paths] == list(truth) and all(2 <= len(scene) <= 9 for scene in truth.values())
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_scenes(tmp_path, 5, seed=3)] == first
    assert [p.read_bytes() for p in write_scenes(tmp_path, 5, seed=4)] != first


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


def test_a_scene_cell_is_one_visual_token(toy):
    prompt = toy.prompt("x", render(SCENE, random.Random(0)))
    assert prompt.image_tokens == 9
    vectors = toy.embed(prompt.ids[None], [prompt])[0][prompt.image_start : prompt.image_start + 9]
    assert vectors.shape == (9, 96) and torch.isfinite(vectors).all()


def test_lessons_teach_what_they_say():
    from toy.build import questioner_output, reasoner_output

    rng = random.Random(0)
    question = "How many red discs are there?"
    assert reasoner_output(question, SCENE, rng, 0.0, 0.0) == "<think> red disc red disc</think>\\boxed{2}"
    parsed = questioner.parse_question(questioner_output(question, SCENE))
    assert parsed == questioner.Question("numerical", question, "2")
    mixed = [reasoner_output(question, SCENE, rng, 0.55, 0.1) for _ in range(2000)]
    guesses = [m for m in mixed if not m.startswith("<think>")]
    assert 0.5 < len(guesses) / 2000 < 0.6
    right = [reasoner.extract_answer(m) == "2" for m in mixed if m.startswith("<think>")]
    assert 0.75 < sum(right) / len(right) < 0.95

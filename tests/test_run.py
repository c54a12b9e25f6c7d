"""The run folder: a stop at any moment of saving leaves one complete iteration, and its records."""

import json
import os
import shutil

import pytest

import run as run_module
from images import Found
from run import Run


class Role:
    """Stands for a VLM: what it saves is a file that says which iteration it is of."""

    def __init__(self, k):
        self.k = k

    def save(self, path):
        path.mkdir(parents=True)
        (path / "half").write_text("")
        run_module.os.replace(path / "half", path / "weights")  # a step at which a stop can fall
        (path / "weights").write_text(str(self.k))


class Stop(BaseException):
    pass


def stop_at(monkeypatch, call):
    """The nth move or deletion does not happen any more: the process is gone."""
    calls = []

    def counted(function):
        def step(*args, **named):
            calls.append(function)
            if len(calls) == call:
                raise Stop
            return function(*args, **named)

        return step

    monkeypatch.setattr(run_module.os, "replace", counted(os.replace))
    monkeypatch.setattr(run_module.shutil, "rmtree", counted(shutil.rmtree))


@pytest.mark.parametrize("call", range(1, 13))
def test_a_stop_while_saving_leaves_one_complete_iteration(tmp_path, monkeypatch, call):
    run = Run(tmp_path / "r", Found([], []), 84)
    run.create({})
    for k in (0, 1):
        run.write({"iteration": k})
    run.save_roles(1, Role(1), Role(1))
    run.write({"iteration": 2})
    stopped = True
    with monkeypatch.context() as patch:
        stop_at(patch, call)
        try:
            run.save_roles(2, Role(2), Role(2))
            stopped = False
        except Stop:
            pass
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "cut of')
    again = Run(tmp_path / "r", Found([], []), 84)
    again.reopen()
    found = {(again.folder / role / "weights").read_text() for role in ("questioner", "reasoner")}
    assert found == {str(again.completed)} and again.completed in (1, 2) and (stopped or again.completed == 2)
    assert not (again.folder / "saving").exists()
    kept = [json.loads(line)["iteration"] for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    assert kept == list(range(again.completed + 1))


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    run = Run(tmp_path, Found([], []), 84)
    run.write({"iteration": 1, "grad_norm": float("nan"), "kl": float("inf"), "reward": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"iteration": 1, "grad_norm": None, "kl": None, "reward": 0.5}


def test_skipped_images_are_named_once(tmp_path, capsys):
    run = Run(tmp_path / "r", Found([], [("a.png", "why")]), 84)
    run.create({})
    run.images.skipped.append(("b\udcff.png", "cut off"))
    run.write({"iteration": 0})
    run.write({"iteration": 1})
    assert capsys.readouterr().err.count("skipped") == 2
    assert [line.split("\t")[1] for line in (run.folder / "skipped.txt").read_text().splitlines()] == ["why", "cut off"]

"""Hub ids: read from the local cache without a look at the network, or asked for aloud."""

import os
import subprocess
import sys

import pytest
from checkpoints import as_a_hub_cache, publish
from conftest import ROOT

from model.checkpoint import CheckpointError
from model.vlm import VLM

# Any look at the network is an error that is printed, and no network is there.
OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    print("NETWORK", flush=True)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
from model.checkpoint import CheckpointError
from model.vlm import VLM
try:
    vlm = VLM.load(sys.argv[1], "cpu")
    vlm.save(sys.argv[2])
    print("LOADED", vlm.source)
except CheckpointError as error:
    print("SENTENCE", error)
"""


def offline(home, name, out):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, name, str(out)],
        cwd=ROOT,
        env=keep | {"HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_hub_id_in_the_cache_needs_no_network(tmp_path):
    (tmp_path / "source").mkdir()
    snapshot = as_a_hub_cache(
        publish(tmp_path / "source", "qwen"), tmp_path / "home", "Some/Tiny-VL"
    )
    out, err = offline(tmp_path / "home", "Some/Tiny-VL", tmp_path / "saved")
    assert out == f"LOADED {snapshot}\n" and "asking the hub" not in err
    assert not any(file.is_symlink() for file in (tmp_path / "saved").iterdir())
    assert (tmp_path / "saved" / "config.json").read_bytes() == (
        snapshot / "config.json"
    ).read_bytes()


def test_a_hub_id_that_is_not_in_the_cache_is_asked_for_aloud(tmp_path):
    out, err = offline(tmp_path / "home", "Some/Other", tmp_path / "saved")
    assert "SENTENCE there is no model folder Some/Other" in out and "asking the hub" in err


def test_a_download_that_was_broken_off(tmp_path):
    (tmp_path / "source").mkdir()
    snapshot = as_a_hub_cache(
        publish(tmp_path / "source", "qwen"), tmp_path / "home", "Some/Tiny-VL"
    )
    sorted(snapshot.glob("*.safetensors"))[0].unlink()
    out, err = offline(tmp_path / "home", "Some/Tiny-VL", tmp_path / "saved")
    assert "SENTENCE" in out and "not there" in out and "asking the hub" in err


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "no model", "../x", "~/none", "runs/x/reasoner", "a//b", "-/-"]
)
def test_names_that_are_no_models(name):
    with pytest.raises(CheckpointError) as error:
        VLM.load(name, "cpu")
    assert "no model folder" in str(error.value) and "\n" not in str(error.value)

import gc
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: a thread each, also in what they start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).parent.parent
THOROUGH = (
    "--thorough" in sys.argv
)  # 40 kills of a run instead of 6, 10,000 examples for the parsers instead of 500
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import checkpoints  # noqa: E402

from model.vlm import VLM  # noqa: E402

# A run collects garbage between its phases. What libraries have imported stays, and is not searched again.
gc.freeze()


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="more kills of runs and more examples for the parsers: takes minutes",
    )
    parser.addoption(
        "--compatibility",
        action="store_true",
        help="load saved folders in new environments with transformers 4 and 5: needs pip, 7 GB and minutes",
    )
    parser.addoption(
        "--all-widths",
        action="store_true",
        help="Qwen3-VL at 4B's and 8B's widths, too: 20 GiB, minutes",
    )
    parser.addoption("--device", default="cpu", help="where tests/test_device.py runs: cpu or cuda")


# The files that take longest, which begin first: so neither of two processes is alone at the end.
LONGEST = "learning notebooks loop resume pretended_gpu plan preview bench vocabulary".split()


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy() -> VLM:
    """The embedded checkpoint. Shared: a test that changes its weights copies it first."""
    return VLM.load(ROOT / "toy", "cpu", torch.float32)


@pytest.fixture(scope="session", params=["qwen", "mimo", "qwen3", "qwen3-untied"])
def published(request, tmp_path_factory) -> Path:
    """A tiny random checkpoint laid out like a published one."""
    return checkpoints.publish(tmp_path_factory.mktemp("published"), request.param)


@pytest.fixture(scope="session", params=["qwen", "qwen3"])
def random_vlm(request, tmp_path_factory) -> VLM:
    """A tiny random model of either family whose greedy choices are varied and far apart."""
    return checkpoints.load_lively(
        checkpoints.publish(tmp_path_factory.mktemp("random"), request.param)
    )

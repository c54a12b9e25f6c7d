"""The memory plan against what autograd really keeps, what a cache really takes, and what is known of the
published models."""

import sys

import pytest
import torch
from conftest import ROOT

import grpo
from model import decode as cache
from model import packing
from training import memory_plan as plan

sys.path.append(str(ROOT / "bench"))  # at the end: it has a rewards.py of its own
import memory  # noqa: E402
from shapes import peak_extra_bytes, random_completions, random_prompt, random_vlm, shape_config  # noqa: E402

SIZES = ("small", "qwen3-small")  # of both families


@pytest.fixture(scope="module")
def small(request):
    size, dtype = request.param
    return random_vlm(size, "cpu", dtype)


def models(*dtypes):
    """Has a test run with a small model of each family, in these dtypes."""
    pairs = [(size, dtype) for size in SIZES for dtype in dtypes]
    return pytest.mark.parametrize("small", pairs, indirect=True, ids="-".join, scope="module")


SHORT = dict(prompt_tokens=300, group_size=8, new_tokens=48)
LONG = dict(prompt_tokens=600, group_size=4, new_tokens=100)


@models("float32")
@pytest.mark.parametrize("sharded, shape", [(False, SHORT), (False, LONG), (True, SHORT)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_against_its_peak(small, sharded, shape, checkpointing):
    """The most that tensors take in forward and backward, by torch's profiler; 15% at most between them."""
    case = memory.Case(sharded, checkpointing, **shape)
    planned, measured = memory.planned_and_measured(small, case)
    assert planned == pytest.approx(measured, rel=0.15)


@models("bfloat16")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_in_bfloat16_against_its_peak(small, checkpointing):
    planned, measured = memory.planned_and_measured(
        small, memory.Case(True, checkpointing, **SHORT)
    )
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("size", SIZES)
def test_an_update_with_many_words_against_its_peak(size):
    """With 40,000 words the gradients of the embeddings are what takes most."""
    vlm = random_vlm(size, "cpu", "float32", 40_000)
    planned, measured = memory.planned_and_measured(vlm, memory.Case(False, True, **SHORT))
    assert planned == pytest.approx(measured, rel=0.15)


@models("float32")
def test_short_completions_take_no_more_than_was_planned_for_long_ones(small, monkeypatch):
    """Four groups in batches of several: completions may all turn out short, and more images then share a
    batch."""
    for name in ("ROW_TOKENS", "BATCH_TOKENS"):
        monkeypatch.setattr(packing, name, 1024), monkeypatch.setattr(plan, name, 1024)
    prompts = [random_prompt(small, 150, seed) for seed in range(4)]
    work = plan.Work(prompts[0].image_tokens, 150 - prompts[0].image_tokens, 100, 8, 4, 1)
    config = small.model.config
    sizes = plan.parameter_sizes(config)
    planned = max(
        plan.activation_moments(
            plan.Case(config, torch.float32, work, sizes, False, "cpu")
        ).values()
    )
    completions = [random_completions(small, 8, 10, seed) for seed in range(4)]
    groups = [
        grpo.make_group(p, c, [float(i % 2) for i in range(8)])
        for p, c in zip(prompts, completions)
    ]
    grpo.add_reference(groups, small)
    grpo.backward(small, groups)
    measured = peak_extra_bytes(lambda: grpo.backward(small, groups), "cpu")
    small.model.zero_grad()
    assert 0.7 * planned < measured < 1.05 * planned


def test_the_peak_of_known_allocations():
    def work():
        a = torch.empty(10_000_000, dtype=torch.uint8)
        b = torch.empty(5_000_000, dtype=torch.uint8)
        del a
        return torch.empty(8_000_000, dtype=torch.uint8), b

    assert peak_extra_bytes(work, "cpu") == pytest.approx(15_000_000, rel=0.01)


@models("float32", "bfloat16")
def test_rollouts_against_the_tensors_of_a_rollout(small):
    vlm, n, new_tokens = small, 4, 20
    limits = cache.Limits(3 * n, 3, n, prefix_tokens=250, own_tokens=50 + new_tokens)
    rows = cache.Rows(vlm, limits, new_tokens, cache.make_products(vlm))
    caches = rows.prefix_keys + rows.prefix_values + rows.keys + rows.values
    token = cache.cache_token_bytes(vlm.model.config, vlm.model.dtype)
    taken = 3 * (250 + n * (50 + new_tokens)) * token
    assert sum(x.nbytes for x in caches) == taken
    work = plan.Work(250, 50, new_tokens, n, 3, n)
    assert (
        plan.rollout_bytes(
            plan.Case(vlm.model.config, vlm.model.dtype, work, {}, False, "cpu"), 3 * n, n
        )
        > taken
    )


@models("float32")
def test_a_larger_group_than_a_row_is_planned_as_it_is_packed(small):
    """A batch never holds more tokens than the plan says, whatever the group."""
    for new_tokens in (10, 600, 3000):
        prompts = [random_prompt(small, 1000, 0) for _ in range(4)]
        groups = [grpo.make_group(prompt, [[0] * new_tokens] * 8) for prompt in prompts]
        batches, image = packing.pack(grpo.flatten(groups)), prompts[0].image_tokens
        largest = max(len(batch) * batch[0].length for batch in batches)
        planned = plan.largest_batch(plan.Work(image, 1000 - image, new_tokens, 8, 4, 1))
        assert largest <= planned[0] * planned[1] <= max(packing.BATCH_TOKENS, 1000 + new_tokens)
        assert max(len(batch) for batch in batches) * image <= packing.BATCH_IMAGE_TOKENS


@pytest.mark.parametrize(
    "size, billions, alone, offloaded",
    [
        ("3b", 3.75, 80, 12),
        ("7b", 8.29, None, 24),
        ("qwen3-2b", 2.13, 40, 12),
        ("qwen3-4b", 4.44, 80, 12),
        ("qwen3-8b", 8.767, None, 24),
    ],
)
def test_published_shapes(size, billions, alone, offloaded):
    """Parameters as published; what a GPU must have for full fine-tuning."""
    work, config = plan.Work(1024, 100, 1024, 8, 1024, 10), shape_config(size)
    assert sum(plan.parameter_sizes(config).values()) / 1e9 == pytest.approx(billions, rel=0.005)
    for offload, gpu in ((False, alone), (True, offloaded)) if alone else ((True, offloaded),):
        available = int(memory.GPUS[gpu] * 2**30)
        for moment in plan.memory_plan(config, torch.bfloat16, available, work, True, offload):
            assert moment.total < 0.95 * available, (offload, moment)


def test_parameters_of_the_8b_model():
    assert sum(plan.parameter_sizes(shape_config("qwen3-8b")).values()) == 8_767_123_696


def test_several_gpus_share_the_role_in_training():
    """Masters, gradients and moments are 16 bytes a parameter, shared; what works is whole on each GPU."""
    config, work = shape_config("3b"), plan.Work(1024, 100, 1024, 8, 1024, 10)
    parameters = sum(plan.parameter_sizes(config).values())
    for ranks in (1, 2, 8):
        ask, _, update, *_ = plan.memory_plan(
            config, torch.bfloat16, 80 * 2**30, work, True, False, ranks
        )
        shared = sum(
            update.parts[name] for name in ("float32 masters", "AdamW's moments", "gradients")
        )
        assert shared == pytest.approx(16 * parameters / ranks, rel=0.001)
        assert ask.parts["questioner"] == 2 * parameters and "questioner" not in update.parts


def test_one_float32_process_trains_its_plain_copy():
    config, work = shape_config("3b"), plan.Work(1024, 100, 1024, 8, 1024, 10)
    parameters = sum(plan.parameter_sizes(config).values())
    ask, answer, update, *_ = plan.memory_plan(
        config, torch.float32, 141 * 2**30, work, True, False
    )
    assert ask.parts["trained role"] == 4 * parameters and "questioner" not in ask.parts
    assert answer.parts["reasoner"] == 4 * parameters and update.parts["float32 masters"] == 0


def test_pinned_memory_is_planned_as_it_is_rounded():
    """A flat buffer is rounded up to a power of two as one: 7 GiB to 8; offloaded tensors each by
    themselves."""
    config = shape_config("3b")
    parts = plan.host_plan(config, torch.bfloat16, True).parts
    assert parts["three plain copies"] == 3 * 8 * 2**30
    exact = 8 * sum(plan.parameter_sizes(config).values())
    assert exact < parts["masters and gradients"] < 2 * exact and parts["AdamW's moments"] == exact
    assert "AdamW's moments" not in plan.host_plan(config, torch.bfloat16, False).parts


def test_the_tables_in_the_docs(monkeypatch, capsys):
    """Printed by the command: a row for each model and set of flags."""
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    tables = [table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n")]
    assert [len(table) for table in tables] == [27, 27, 12]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    text = (ROOT / "docs" / "memory.md").read_text().splitlines()
    for lines in tables[:2]:
        start = text.index(lines[0])
        assert text[start : start + len(lines)] == lines
    readme = (ROOT / "README.md").read_text()
    assert "\n".join("  " + line for line in tables[2]) in readme


def test_more_rows_or_tokens_take_more():
    config = random_vlm("tiny", "meta", "float32").model.config
    base = plan.Work(200, 50, 40, 8, 4, 10)
    grown = [
        plan.Work(400, 50, 40, 8, 4, 10),
        plan.Work(200, 50, 80, 8, 4, 10),
        plan.Work(200, 50, 40, 16, 4, 10),
    ]
    update = lambda work: plan.memory_plan(config, torch.float32, None, work, False, False)[2].total  # noqa: E731
    assert all(update(work) > update(base) for work in grown)


def test_offloaded_batches_are_as_large_as_the_card_allows():
    """All weights come to the GPU for each batch: the fewer batches, the better; nothing else is larger."""
    config = random_vlm("tiny", "meta", "bfloat16").model.config
    work = plan.Work(200, 50, 40, 8, 64, 10)
    flags = dict(checkpointing=True, offload=True)
    scales = []
    for free in (1 << 40, *(2**i for i in range(34, 20, -1))):
        scale = plan.fit_batches(free, config, torch.bfloat16, work, **flags)
        fits = [
            plan.fits(free, config, torch.bfloat16, work, **flags, batch_scale=each)
            for each in (scale, 2 * scale)
        ]
        assert fits[0] or scale == 1 / 64
        assert scale == 4 or not fits[1], "the next larger one would not fit"
        scales.append(scale)
    assert scales[0] == 4 and scales == sorted(scales, reverse=True) and scales[-1] < 1
    flags["offload"] = False
    assert plan.fit_batches(1 << 40, config, torch.bfloat16, work, **flags) == 1

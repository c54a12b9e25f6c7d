"""The memory plan against what autograd really keeps, what a cache really takes, and what is known of the
published models."""

import sys

import pytest
import torch
from conftest import ROOT

import cache
import grpo
import packing
from engine import plan
from engine.shards import Trained

sys.path.append(str(ROOT / "bench"))  # at the end: it has a rewards.py of its own
import memory  # noqa: E402
from shapes import peak_extra_bytes, random_completions, random_prompt, random_vlm, shape_config  # noqa: E402


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def small(request):
    return random_vlm("small", "cpu", request.param)


PLAIN, SHARDED = ("float32", False), ("float32", True)
SHAPES = {"short": (300, 8, 48), "long": (600, 4, 100)}  # prompt tokens, group size, new tokens


@pytest.mark.parametrize(
    "small, sharded, shape",
    [(*PLAIN, "short"), (*PLAIN, "long"), (*SHARDED, "short"), ("bfloat16", True, "short")],
    indirect=["small"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_against_its_peak(small, sharded, shape, checkpointing):
    """The most that tensors take during forward and backward, by torch's profiler; 15% at most between them.

    The gradients are there already, as they are from the second batch of an update on; masters and moments,
    too.
    """
    prompt_tokens, group_size, new_tokens = SHAPES[shape]
    policy = Trained(small.copy(), 1e-6, 0.0, offload=sharded, checkpointing=checkpointing)
    prompt = random_prompt(small, prompt_tokens, 0)
    completions = random_completions(small, group_size, new_tokens, 0)
    group = grpo.Group(prompt, completions, [float(i % 2) for i in range(group_size)])
    grpo.add_reference([group], small)
    grpo.backward(policy, [group])
    measured = peak_extra_bytes(lambda: grpo.backward(policy, [group]), "cpu")
    work = plan.Work(prompt.image_tokens, len(prompt) - prompt.image_tokens, new_tokens, group_size, 1, 1)
    config, dtype = small.model.config, small.model.dtype
    parts = plan.memory_plan(config, dtype, None, work, checkpointing, sharded)[2].parts
    assert parts["whole layers"] + parts["activations"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("small", ["float32"], indirect=True)
def test_short_completions_take_no_more_than_was_planned_for_long_ones(small, monkeypatch):
    """Six groups in batches of several: completions may all turn out short, and more images then share a
    batch."""
    for name in ("ROW_TOKENS", "BATCH_TOKENS"):
        monkeypatch.setattr(packing, name, 2048), monkeypatch.setattr(plan, name, 2048)
    prompts = [random_prompt(small, 300, seed) for seed in range(6)]
    work = plan.Work(prompts[0].image_tokens, 300 - prompts[0].image_tokens, 200, 8, 6, 1)
    config = small.model.config
    sizes = plan.parameter_sizes(config)
    planned = plan.activation_bytes(config, torch.float32, work, False, "cpu", sizes)
    completions = [random_completions(small, 8, 20, seed) for seed in range(6)]
    groups = [grpo.Group(p, c, [float(i % 2) for i in range(8)]) for p, c in zip(prompts, completions)]
    grpo.add_reference(groups, small)
    grpo.backward(small, groups)
    assert peak_extra_bytes(lambda: grpo.backward(small, groups), "cpu") < 1.05 * planned
    small.model.zero_grad()


def test_the_peak_of_known_allocations():
    def work():
        a = torch.empty(10_000_000, dtype=torch.uint8)
        b = torch.empty(5_000_000, dtype=torch.uint8)
        del a
        return torch.empty(8_000_000, dtype=torch.uint8), b

    assert peak_extra_bytes(work, "cpu") == pytest.approx(15_000_000, rel=0.01)


def test_rollouts_against_the_tensors_of_a_rollout(small):
    vlm, n, new_tokens = small, 4, 20
    rows = cache.Rows(vlm, 3, n, 300, new_tokens)
    caches = rows.prompt_keys + rows.prompt_values + rows.keys + rows.values
    token = cache.cache_token_bytes(vlm.model.config, vlm.model.dtype)
    assert sum(x.nbytes for x in caches) == 3 * (300 + n * new_tokens) * token
    work = plan.Work(250, 50, new_tokens, n, 3, n)
    assert (
        plan.rollout_bytes(vlm.model.config, vlm.model.dtype, work, 3 * n, n)
        > 3 * (300 + n * new_tokens) * token
    )


def test_a_larger_group_than_a_row_is_planned_as_it_is_packed(small):
    """A batch never holds more tokens than the plan says, whatever the group."""
    for new_tokens in (10, 600, 3000):
        groups = [(random_prompt(small, 1000, 0), [[0] * new_tokens] * 8) for _ in range(4)]
        batches, image = packing.pack(groups), groups[0][0].image_tokens
        largest = max(len(batch) * batch[0].length for batch in batches)
        planned = plan.largest_batch(plan.Work(image, 1000 - image, new_tokens, 8, 4, 1))
        assert largest <= planned[0] * planned[1] <= max(packing.BATCH_TOKENS, 1000 + new_tokens)
        assert max(len(batch) for batch in batches) * image <= packing.BATCH_IMAGE_TOKENS


def test_published_shapes():
    """Parameters as published (3.75 and 8.29 billion); what a GPU must have for full fine-tuning."""
    work = plan.Work(1024, 100, 1024, 8, 1024, 10)
    for size, billions, alone, offloaded in (("3b", 3.75, 80, 12), ("7b", 8.29, None, 24)):
        config = shape_config(size)
        assert sum(plan.parameter_sizes(config).values()) / 1e9 == pytest.approx(billions, rel=0.005)
        for offload, gpu in ((False, alone), (True, offloaded)) if alone else ((True, offloaded),):
            available = int(memory.GPUS[gpu] * 2**30)
            for moment in plan.memory_plan(config, torch.bfloat16, available, work, True, offload):
                assert moment.total < 0.95 * available, (size, offload, moment)


def test_several_gpus_share_the_role_in_training():
    """Masters, gradients and moments are 16 bytes a parameter, shared; what works is whole on each GPU."""
    config, work = shape_config("3b"), plan.Work(1024, 100, 1024, 8, 1024, 10)
    parameters = sum(plan.parameter_sizes(config).values())
    for ranks in (1, 2, 8):
        ask, _, update, *_ = plan.memory_plan(config, torch.bfloat16, 80 * 2**30, work, True, False, ranks)
        shared = sum(update.parts[name] for name in ("float32 masters", "AdamW's moments", "gradients"))
        assert shared == pytest.approx(16 * parameters / ranks, rel=0.001)
        assert ask.parts["questioner"] == 2 * parameters and "questioner" not in update.parts


def test_one_float32_process_trains_its_plain_copy():
    config, work = shape_config("3b"), plan.Work(1024, 100, 1024, 8, 1024, 10)
    parameters = sum(plan.parameter_sizes(config).values())
    ask, answer, update, *_ = plan.memory_plan(config, torch.float32, 141 * 2**30, work, True, False)
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


def test_the_tables_in_the_docs():
    text = (ROOT / "docs" / "memory.md").read_text().splitlines()
    for lines in (memory.table(), memory.update_table()):
        start = text.index(lines[0])
        assert text[start : start + len(lines)] == lines
    readme = (ROOT / "README.md").read_text()
    assert "\n".join("  " + line for line in memory.table_by_gpu()) in readme


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

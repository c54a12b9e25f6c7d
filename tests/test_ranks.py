"""Several processes on gloo: what they exchange, and that they update as one process does.

One process that is sharded (in bfloat16, or offloaded) takes the same path."""

import contextlib
import io
import json
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from checkpoints import noise_image
from conftest import ROOT
from torch.distributed.fsdp import FSDPModule

import grpo
from model import packing
from model.vlm import VLM
from training import command
from training.distributed import Ranks
from training.policy import Trained
from training.settings import parse_arguments
from training.state import read_tensors, write_tensors

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
)
FORKS = multiprocessing.get_context(
    "forkserver"
)  # imports once, then forks: an attempt starts in no time
FORKS.set_forkserver_preload(["loop", "checkpoints"])


def together(size, function, *args):
    """What `function(ranks, *args)` returns on each of `size` processes."""
    queue, port = FORKS.Queue(), 20000 + os.getpid() % 20000
    processes = [
        FORKS.Process(target=_one, args=(queue, rank, size, port, function, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [results[rank] for rank in range(size)]


def _one(queue, rank, size, port, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    queue.put((rank, function(Ranks(rank, size), *args)))
    queue.close()
    queue.join_thread()
    dist.destroy_process_group()


def exchange(ranks):
    items = [["a", 1, None, "\udcff"], [], {"x": 1.5}, "é", 5][: 2 + ranks.size]
    assert ranks.all_gather(ranks.shard(items)) == items
    assert ranks.any(ranks.rank == ranks.size - 1) and not ranks.any(False)
    ranks.barrier()
    assert ranks.broadcast(f"from {ranks.rank}") == "from 0"
    means = ranks.mean({"a": 1.0} | ({"b": 2.0} if ranks.rank else {}))
    assert means == pytest.approx({"a": 1.0, "b": 2.0 * (ranks.size - 1) / ranks.size})
    return ranks.all_gather([ranks.rank] * (ranks.rank + 1))


def test_exchange():
    assert together(2, exchange) == [[0, 1, 1]] * 2
    assert together(3, exchange) == [[0, 1, 2, 1, 2, 2]] * 3


# ---- Updates --------------------------------------------------------------------------------------------


def random_groups(vlm, count, seed=0):
    """Groups of six completions about images of different sizes."""
    rng, groups = torch.Generator().manual_seed(seed), []
    for g in range(count):
        prompt = vlm.prompt("How many?", noise_image(60 + 30 * g, 60, g))
        lengths = [1 + (g + i) % 7 for i in range(6)]
        completions = [
            torch.randint(4, 40, (length,), generator=rng).tolist() for length in lengths
        ]
        groups.append(grpo.make_group(prompt, completions, torch.rand(6, generator=rng).tolist()))
    return groups


def trained(ranks, dtype="float32", sharded=False, checkpointing=False, lr=1e-4):
    """The toy in training, and a reference a little apart from it."""
    vlm = VLM.load(ROOT / "toy", "cpu", dtype)
    reference, rng = vlm.copy(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.model.parameters():
            parameter.mul_(
                1 + 0.01 * torch.randn(parameter.shape, generator=rng).to(parameter.dtype)
            )
    # On a CPU there is nowhere to offload to: --offload only says that the model is sharded, over one
    # process.
    return Trained(
        vlm, lr, 0.01, offload=sharded, checkpointing=checkpointing, ranks=ranks
    ), reference


def gradients(ranks, count, **how):
    """The gradient of one update on `count` groups, split over the ranks, in whole; the metrics."""
    policy, reference = trained(ranks, **how)
    mine = ranks.shard(random_groups(policy.vlm, count))
    grpo.add_reference(mine, reference)
    metrics = ranks.mean(grpo.backward(policy, mine))
    whole = [whole_tensor(p.grad).flatten() for p in policy.parameters()]
    return torch.cat(whole).tolist(), metrics, policy.sharded


def whole_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_sharded_process_makes_the_plain_gradient_bit_for_bit(checkpointing):
    plain, metrics, is_sharded = gradients(Ranks(), 4)
    assert not is_sharded
    got, their_metrics, is_sharded = gradients(
        Ranks(), 4, sharded=True, checkpointing=checkpointing
    )
    assert is_sharded and got == plain and their_metrics == metrics
    assert gradients(Ranks(), 4, checkpointing=True)[0] == plain


@pytest.mark.parametrize("size, count", [(2, 5), (3, 5), (3, 2), (2, 1)])
def test_a_gradient_of_several_processes_is_that_of_one(size, count, monkeypatch):
    """Also where ranks have fewer groups than others, or none: they keep step with batches that count for
    nothing."""
    plain, metrics, _ = gradients(Ranks(), count)
    results = together(size, gradients, count)
    for theirs, their_metrics, is_sharded in results:
        assert is_sharded and their_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        assert theirs == results[0][0], "all ranks agree"
        apart = (torch.tensor(theirs) - torch.tensor(plain)).norm() / torch.tensor(plain).norm()
        assert apart < 1e-5, "sums in another order: a few float32 roundings"


def small_batches(ranks, count):
    """The same with a batch for each row, so that ranks have different numbers of batches."""
    packing.BATCH_TOKENS = 1
    return gradients(ranks, count)


def test_ranks_with_different_numbers_of_batches_keep_step():
    plain = torch.tensor(gradients(Ranks(), 4)[0])
    for theirs, _, _ in together(3, small_batches, 4):  # 2, 1 and 1 batches
        assert (torch.tensor(theirs) - plain).norm() < 1e-5 * plain.norm()


def updates(ranks, dtype, count):
    """Three updates; the plain copy's weights, and the masters'."""
    policy, reference = trained(ranks, dtype)
    for step in range(3):
        mine = ranks.shard(random_groups(policy.vlm, count, step))
        grpo.add_reference(mine, reference)
        metrics = grpo.update(policy, policy.optimizer, mine)
    plain = torch.cat([p.detach().float().flatten() for p in policy.vlm.model.parameters()])
    masters = torch.cat([whole_tensor(p).detach().flatten() for p in policy.parameters()])
    return plain.tolist(), masters.tolist(), metrics["skipped"]


def test_updates_of_two_processes_are_those_of_one():
    """AdamW's first step is lr * g / (|g| + 1e-8): the same wherever g is not lost in rounding."""
    one = torch.tensor(updates(Ranks(), "float32", 5)[0])
    results = together(2, updates, "float32", 5)
    assert results[0] == results[1]
    apart = (torch.tensor(results[0][0]) - one).abs()
    assert (apart > 2e-6).float().mean() < 1e-3 and apart.max() < 3.1e-4


def test_bfloat16_weights_move_through_float32_masters():
    """The plain copy is the masters rounded; and it computes what the sharded model computes."""
    for plain, masters, skipped in (
        updates(Ranks(), "bfloat16", 3),
        *together(2, updates, "bfloat16", 3),
    ):
        assert not skipped
        assert torch.equal(torch.tensor(plain), torch.tensor(masters).bfloat16().float())
        assert not torch.equal(torch.tensor(plain), torch.tensor(masters))
    policy, _ = trained(Ranks(), "bfloat16", lr=1e-7)
    groups = random_groups(policy.vlm, 2)
    start = [p.detach().clone() for p in policy.vlm.model.parameters()]
    grpo.add_reference(groups, policy.vlm)
    ours = [logp for _, logps, _ in policy.batches(grpo.flatten(groups)) for logp in logps]
    with torch.no_grad():
        plain = [logp for _, logps, _ in policy.vlm.batches(grpo.flatten(groups)) for logp in logps]
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    for _ in range(3):
        grpo.update(policy, policy.optimizer, random_groups_with(groups))
    after = list(policy.vlm.model.parameters())
    large = torch.cat([(a != b)[a.abs() > 0.05].flatten() for a, b in zip(start, after)])
    assert not large.any(), "steps of 1e-7 are below the rounding of bfloat16"
    moved = torch.cat(
        [(whole_tensor(m) - a.float()).abs().flatten() for m, a in zip(policy.parameters(), start)]
    )
    assert 1e-7 < moved.median() < 4e-7, "but the masters keep them"


def random_groups_with(groups):
    """The same groups, as a new rollout would give them."""
    fresh = []
    for group in groups:
        fresh.append(
            grpo.make_group(group[0].prompt, [c.tokens for c in group], [c.reward for c in group])
        )
        for new, old in zip(fresh[-1], group):
            new.ref_logp = old.ref_logp
    return fresh


@pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="FSDP2 of torch 2.11 cannot forget"
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["text", "vision"])
def test_out_of_memory_in_a_sharded_backward_leaves_nothing_behind(where, checkpointing):
    """Once, in the backward pass of a layer: then the gradient is that of an update that nothing
    disturbed."""
    policy, reference = trained(Ranks(), sharded=True, checkpointing=checkpointing)
    groups, model = random_groups(policy.vlm, 3), policy.forward.model.model
    grpo.add_reference(groups, reference)
    layer = model.language_model.layers[1] if where == "text" else model.visual.blocks[0]
    fails = [True]

    def fail(*_):
        if fails.pop() if fails else False:
            raise torch.OutOfMemoryError("out of memory")

    hook = layer.mlp.register_full_backward_hook(fail)
    policy.optimizer.step = lambda: None  # the gradient is looked at
    policy.optimizer.zero_grad = zero_later(policy.optimizer)
    metrics = grpo.update(policy, policy.optimizer, groups, max_norm=1e9)
    hook.remove()
    assert not fails and metrics["skipped"] == 0 and policy.vlm.fallbacks.batch_scale == 0.5
    got = torch.cat([whole_tensor(g).flatten() for g in policy.optimizer.zero_grad.last])
    plain = torch.tensor(gradients(Ranks(), 3)[0])
    assert (got - plain).norm() < 1e-5 * plain.norm()


def zero_later(optimizer):
    """`zero_grad` that first keeps the gradients."""
    zero_grad = optimizer.zero_grad

    def wrapped(*args, **named):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if all(g is not None for g in grads):
            wrapped.last = [g.clone() for g in grads]
        zero_grad(*args, **named)

    return wrapped


def timed(ranks):
    s = parse_arguments(
        "", "--dry-run --images-per-step 1 --group-size 2 --answers 2 --device cpu".split()
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command.show_time(command.open_run(s, ranks))
    return said.getvalue()


def test_how_long_it_takes_is_measured_also_where_a_rank_has_no_image():
    first, second = together(2, timed)
    assert "from a step on 1 images" in first and not second


# ---- What an interrupted run needs -------------------------------------------------------------------------


def one_more(ranks, folder, first):
    """The first two of three updates, saved, or the third of a run that loads them; with as many ranks as
    there are."""
    policy, reference = trained(ranks)
    if not first:
        parts = json.loads((folder / "parts.json").read_text())
        policy.load_weights(read_tensors(folder, parts["weights"]))
        policy.load_optimizer_state(read_tensors(folder, parts["moments"]))
    for seed in (0, 1) if first else (2,):
        mine = ranks.shard(random_groups(policy.vlm, 4, seed))
        grpo.add_reference(mine, reference)
        grpo.update(policy, policy.optimizer, mine)
    parts = {}
    for name, tensors in (("weights", policy.weights()), ("moments", policy.optimizer_state())):
        parts[name] = ranks.all_gather(write_tensors(folder, f"{name}-{ranks.rank}", tensors))
    if first and ranks.is_main:
        (folder / "parts.json").write_text(json.dumps(parts))
    ranks.barrier()
    whole = {name: tensor for kind in parts for name, tensor in read_tensors(folder, parts[kind])}
    return {name: tensor.tolist() for name, tensor in whole.items()}


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2), (2, 1)])
def test_another_number_of_ranks_goes_on(tmp_path, before, after):
    def run(size, folder, first):
        (folder / "state").mkdir(parents=True, exist_ok=True)
        return (
            one_more(Ranks(), folder, first)
            if size == 1
            else together(size, one_more, folder, first)[0]
        )

    run(1, tmp_path / "one", True), run(before, tmp_path / "several", True)
    expected, got = run(1, tmp_path / "one", False), run(after, tmp_path / "several", False)
    assert got.keys() == expected.keys()
    assert {
        f"model.language_model.norm.weight{kind}" for kind in ("", ":exp_avg", ":step")
    } <= got.keys()
    for name, values in expected.items():
        a, b = torch.tensor(got[name]), torch.tensor(values)
        assert a.shape == b.shape, name
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name

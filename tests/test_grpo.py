"""GRPO against a few lines of numpy, against one big batch, and on a bandit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo


def numpy_loss(logp, old, ref, advantages, mask, clip, beta, token_mean):
    """The loss by plain loops, in float64."""
    total, tokens, rows = 0.0, 0, []
    for i in range(len(logp)):
        terms = []
        for t in range(len(logp[i])):
            if mask[i][t]:
                rho = math.exp(logp[i][t] - old[i][t])
                surrogate = min(rho * advantages[i], float(np.clip(rho, 1 - clip, 1 + clip)) * advantages[i])
                kl = math.exp(ref[i][t] - logp[i][t]) - (ref[i][t] - logp[i][t]) - 1
                terms.append(-surrogate + beta * kl)
        rows.append(np.mean(terms) if terms else 0.0)
        total, tokens = total + sum(terms), tokens + len(terms)
    return total / max(1, tokens) if token_mean else np.mean(rows)


@pytest.mark.parametrize("token_mean", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 7),
    beta=st.floats(0, 1),
    clip=st.floats(0.05, 0.5),
)
def test_loss_against_numpy(token_mean, seed, rows, columns, beta, clip):
    g = torch.Generator().manual_seed(seed)
    logp, old, ref = (-torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2 for _ in range(3))
    mask, advantages = (
        torch.rand(rows, columns, generator=g) < 0.7,
        torch.randn(rows, generator=g, dtype=torch.float64),
    )
    want = numpy_loss(
        logp.tolist(), old.tolist(), ref.tolist(), advantages.tolist(), mask.tolist(), clip, beta, token_mean
    )
    loss, metrics = grpo.grpo_loss(logp, old, ref, advantages, mask, clip, beta, token_mean)
    assert loss.item() == pytest.approx(want, abs=1e-12)
    assert metrics["kl"] >= 0 and 0 <= metrics["clip_share"] <= 1
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + beta * metrics["kl"], abs=1e-9)


def test_what_stands_under_the_mask_does_not_matter():
    logp = torch.randn(3, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    old, ref, advantages = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1.0, -1.0, 2.0])
    grpo.grpo_loss(logp, old, ref, advantages, mask)[0].backward()
    clean, logp.grad = logp.grad.clone(), None
    spoiled = torch.where(mask.bool(), logp, torch.tensor(float("nan")))
    grpo.grpo_loss(spoiled, old.masked_fill(mask == 0, float("inf")), ref, advantages, mask)[0].backward()
    assert torch.equal(logp.grad, clean) and clean[mask == 0].abs().sum() == 0 and clean.abs().sum() > 0


def test_kl_gradient_is_zero_at_the_reference_and_the_estimator_is_unbiased():
    logits, ref_logits = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    logp, ref = logits.log_softmax(0), ref_logits.log_softmax(0)
    estimate = (logp.exp() * grpo.kl_estimate(logp, ref)).sum()
    assert estimate.item() == pytest.approx((logp.exp() * (logp - ref)).sum().item(), abs=1e-12)
    same = ref.clone().requires_grad_()
    grpo.kl_estimate(same, ref).sum().backward()
    assert same.grad.abs().max() == 0


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_against_numpy(rewards):
    got = grpo.group_advantages(torch.tensor(rewards))
    r = np.array(rewards, dtype=np.float32).astype(np.float64)
    want = (r - r.mean(1, keepdims=True)) / (r.std(1, keepdims=True) + 1e-4)
    assert np.allclose(got.numpy(), want, atol=2e-3)  # float32: a spread of 1e-4 is divided by 2e-4
    assert np.allclose(got.numpy()[r.std(1) > 0.01], want[r.std(1) > 0.01], atol=1e-4)


def test_equal_rewards_have_no_advantage():
    assert grpo.group_advantages(torch.full((2, 3), 0.1)).tolist() == [[0.0] * 3] * 2


# ---- The update: a policy small enough to know everything about -----------------------------------------------------------


class Table(torch.nn.Module):
    """A policy whose token t has the logits of row t, whatever came before; the prompt picks the table."""

    def __init__(self, dtype=torch.float32, prompts=3, length=5, vocabulary=4):
        super().__init__()
        torch.manual_seed(1)
        self.logits = torch.nn.Parameter((torch.randn(prompts, length, vocabulary) * 0.3).to(dtype))

    def logprobs(self, prompt, completions, temperature=1.0):
        table = (self.logits[prompt].float() / temperature).log_softmax(-1)
        return [table[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.long)] for ids in completions]

    def packed_logprobs(self, groups, temperature=1.0):
        """Three completions at a time, wherever groups begin and end; the last come first."""
        which = [(g, i) for g, (_, completions) in enumerate(groups) for i in range(len(completions))][::-1]
        for part in (which[k : k + 3] for k in range(0, len(which), 3)):
            yield part, [self.logprobs(groups[g][0], [groups[g][1][i]], temperature)[0] for g, i in part]


def random_groups(sizes=(4, 2, 3)):
    g = torch.Generator().manual_seed(2)
    groups = []
    for prompt, size in enumerate(sizes):
        lengths = torch.randint(1, 6, (size,), generator=g).tolist()
        completions = [torch.randint(0, 4, (n,), generator=g).tolist() for n in lengths]
        groups.append(grpo.Group(prompt, completions, torch.rand(size, generator=g).tolist()))
    return groups


@pytest.mark.parametrize("token_mean", [False, True])
def test_micro_batches_give_the_gradient_of_one_batch(token_mean, monkeypatch):
    policy, groups = Table(), random_groups()
    reference = Table()
    with torch.no_grad():
        reference.logits.add_(0.3 * torch.randn_like(reference.logits))
    grpo.add_reference(groups, reference)
    seen = {}
    monkeypatch.setattr(
        grpo.MasterAdamW,
        "step",
        lambda self, norm: seen.setdefault("grad", self.gradients["logits"].clone()).norm().item(),
    )
    with grpo.MasterAdamW(policy.named_parameters(), 0.1, 0) as optimizer:
        metrics = grpo.update(policy, groups, optimizer, token_mean=token_mean)
    rows = [x for g in groups for x in policy.logprobs(g.prompt, g.completions)]
    logp, mask = grpo._pad(rows)
    ref = grpo._pad([x for g in groups for _, x in sorted(g.ref_logp.items())])[0]
    advantages = torch.cat([grpo.group_advantages(torch.tensor([g.rewards]))[0] for g in groups])
    loss, _ = grpo.grpo_loss(logp, logp.detach(), ref, advantages, mask, token_mean=token_mean)
    loss.backward()
    assert torch.allclose(seen["grad"], policy.logits.grad, atol=1e-7)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_later_updates_keep_the_old_policy():
    policy, groups = Table(), random_groups()
    grpo.add_reference(groups, Table())
    before = [x.detach().clone() for g in groups for x in policy.logprobs(g.prompt, g.completions)]
    with grpo.MasterAdamW(policy.named_parameters(), lr=0.3, weight_decay=0.0) as optimizer:
        first = grpo.update(policy, groups, optimizer)
        second = grpo.update(policy, groups, optimizer)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (x for g in groups for _, x in sorted(g.old_logp.items())))
    )
    assert first["ratio"] == pytest.approx(1.0) and first["clip_share"] == 0
    assert second["clip_share"] > 0 and second["kl"] > 0


def test_bfloat16_weights_move_through_float32_masters():
    """A learning rate of 1e-5 is below the rounding step of these bfloat16 weights; 300 steps of it, in 15 phases, are not."""
    policy, groups = Table(torch.bfloat16), random_groups()
    grpo.add_reference(groups, Table(torch.bfloat16))
    start, naive = policy.logits.detach().clone(), policy.logits.detach().clone()
    optimizer = grpo.MasterAdamW(policy.named_parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(15):
        with optimizer:
            for _ in range(20):
                for group in groups:
                    group.old_logp = {}
                grpo.update(policy, groups, optimizer)
                naive -= 1e-5 * torch.ones_like(naive)
    big = start.abs() > 0.05
    assert torch.equal(naive[big], start[big]), "without a master, these weights stand still"
    (master,) = optimizer.masters.values()
    assert master.dtype == torch.float32 and (master - start.float()).abs().max() > 1e-3
    assert torch.equal(policy.logits.detach(), master.bfloat16()) and not torch.equal(
        policy.logits[big], start[big]
    )
    policy.logits.float().sum().backward()
    assert policy.logits.grad is not None, "outside a phase the model is as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloading_changes_nothing_but_the_place(dtype):
    """Two phases of three updates with masters and moments here or there: the same weights, bit for bit; not the start's."""
    ends = []
    for offload in (False, True):
        policy, groups = Table(dtype), random_groups()
        start = policy.logits.detach().clone()
        grpo.add_reference(groups, Table(dtype))
        optimizer = grpo.MasterAdamW(policy.named_parameters(), lr=0.05, weight_decay=0.01, offload=offload)
        for _ in range(2):
            with optimizer:
                norms = [grpo.update(policy, groups, optimizer, max_norm=0.05)["grad_norm"] for _ in range(3)]
        ends.append(policy.logits.detach().clone())
        assert (optimizer.masters["logits"] is policy.logits) == (dtype == torch.float32 and not offload)
        assert min(norms) > 0.05, "clipping is part of it"
    assert torch.equal(*ends) and not torch.equal(start, ends[0])


def test_the_step_is_torchs_adamw():
    """Against torch's own clipping and AdamW on the same gradients, three steps."""
    policy, plain = Table(), Table()
    adamw = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.1)
    with grpo.MasterAdamW(policy.named_parameters(), lr=0.05, weight_decay=0.1) as optimizer:
        for seed in range(3):
            weights = torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(seed))
            for p in (policy, plain):
                (p.logits * weights).sum().backward()
            norm = optimizer.step(0.5)
            assert (
                norm
                == pytest.approx(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5).item(), rel=1e-6)
                and norm > 0.5
            )
            adamw.step()
            adamw.zero_grad()
    assert torch.allclose(policy.logits, plain.logits, atol=1e-6)


def test_bfloat16_gradients_add_up_in_float32():
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    with grpo.MasterAdamW([("p", parameter)], lr=0.1, weight_decay=0.0) as optimizer:
        for value in [256.0] + [0.5] * 8:  # in bfloat16, 256 + 0.5 = 256
            (parameter * value).sum().backward()
        assert optimizer.gradients["p"].item() == 260.0 and parameter.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing():
    policy, groups = Table(), random_groups()
    grpo.add_reference(groups, Table())
    groups[1].ref_logp[0][0] = float("nan")
    before = policy.logits.detach().clone()
    with grpo.MasterAdamW(policy.named_parameters(), 0.1, 0.0) as optimizer:
        metrics = grpo.update(policy, groups, optimizer)
        assert (
            metrics["skipped"] == 1.0
            and math.isnan(metrics["grad_norm"])
            and torch.equal(policy.logits, before)
        )
        groups = random_groups()
        grpo.add_reference(groups, Table())
        assert (
            grpo.update(policy, groups, optimizer)["skipped"] == 0.0 and torch.isfinite(policy.logits).all()
        )
    assert not torch.equal(policy.logits, before)


def test_equal_rewards_and_empty_completions_leave_the_weights_finite():
    policy = Table()
    groups = [grpo.Group(0, [[1, 2], [3], []], [1.0, 1.0, 1.0]), grpo.Group(1, [[], []], [0.0, 1.0])]
    grpo.add_reference(groups, Table())
    before = policy.logits.detach().clone()
    with grpo.MasterAdamW(policy.named_parameters(), 0.1, 0.0) as optimizer:
        metrics = grpo.update(policy, groups, optimizer)
    assert metrics["grad_norm"] == 0 and torch.equal(policy.logits, before)


def test_a_bandit_is_solved():
    """Three prompts, each with its own right first token: the policy finds it from rewards alone."""
    policy, sampler = Table(length=1), torch.Generator().manual_seed(3)
    reference, right = Table(length=1), [2, 0, 3]
    with grpo.MasterAdamW(policy.named_parameters(), lr=0.1, weight_decay=0.0) as optimizer:
        for _ in range(60):
            groups = []
            for prompt in range(3):
                draws = torch.multinomial(
                    policy.logits[prompt, 0].softmax(-1), 8, True, generator=sampler
                ).tolist()
                groups.append(
                    grpo.Group(prompt, [[d] for d in draws], [float(d == right[prompt]) for d in draws])
                )
            grpo.add_reference(groups, reference)
            grpo.update(policy, groups, optimizer)
    chosen = policy.logits[:, 0].softmax(-1)[torch.arange(3), torch.tensor(right)]
    assert chosen.min() > 0.9

"""GRPO against a few lines of numpy, against one big batch, and on a bandit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo
from model.offload import retry_with_less_memory


def numpy_loss(logp, old, ref, advantages, mask, clip, beta):
    """The loss by plain loops, in float64."""
    rows = []
    for i in range(len(logp)):
        terms = []
        for t in range(len(logp[i])):
            if mask[i][t]:
                rho = math.exp(logp[i][t] - old[i][t])
                surrogate = min(
                    rho * advantages[i], float(np.clip(rho, 1 - clip, 1 + clip)) * advantages[i]
                )
                kl = math.exp(ref[i][t] - logp[i][t]) - (ref[i][t] - logp[i][t]) - 1
                terms.append(-surrogate + beta * kl)
        rows.append(np.mean(terms) if terms else 0.0)
    return np.mean(rows)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 7),
    beta=st.floats(0, 1),
    clip=st.floats(0.05, 0.5),
)
def test_loss_against_numpy(seed, rows, columns, beta, clip):
    g = torch.Generator().manual_seed(seed)
    logp, old, ref = (
        -torch.rand(rows, columns, generator=g, dtype=torch.float64) * 2 for _ in range(3)
    )
    mask = torch.rand(rows, columns, generator=g) < 0.7
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    want = numpy_loss(*(x.tolist() for x in (logp, old, ref, advantages, mask)), clip, beta)
    loss, metrics = grpo.grpo_loss(logp, old, ref, advantages, mask, clip, beta)
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
    grpo.grpo_loss(spoiled, old.masked_fill(mask == 0, float("inf")), ref, advantages, mask)[
        0
    ].backward()
    assert (
        torch.equal(logp.grad, clean)
        and clean[mask == 0].abs().sum() == 0
        and clean.abs().sum() > 0
    )


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


# ---- The update: a policy small enough to know everything about


class Table(torch.nn.Module):
    """A policy whose token t has the logits of row t, whatever came before; the prompt picks the table."""

    def __init__(self, dtype=torch.float32, prompts=3, length=5, vocabulary=4):
        super().__init__()
        torch.manual_seed(1)
        self.size = 3
        self.logits = torch.nn.Parameter((torch.randn(prompts, length, vocabulary) * 0.3).to(dtype))

    def logprobs(self, prompt, completions, temperature=1.0):
        table = (self.logits[prompt].float() / temperature).log_softmax(-1)
        return [
            table[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.long)]
            for ids in completions
        ]

    def batches(self, completions, temperature=1.0):
        """`size` completions at a time, wherever groups begin and end; the last come first."""
        order = completions[::-1]
        for start in range(0, len(order), self.size):
            batch = order[start : start + self.size]
            logps = [self.logprobs(c.prompt, [c.tokens], temperature)[0] for c in batch]
            yield batch, logps, len(batch) / len(order)

    def retry(self, attempt):
        return retry_with_less_memory(attempt, self.use_less_memory)

    def use_less_memory(self):
        if self.size == 1:
            raise torch.OutOfMemoryError("one completion is too large")
        self.size -= 1


def random_groups(sizes=(4, 2, 3)):
    g = torch.Generator().manual_seed(2)
    groups = []
    for prompt, size in enumerate(sizes):
        lengths = torch.randint(1, 6, (size,), generator=g).tolist()
        completions = [torch.randint(0, 4, (n,), generator=g).tolist() for n in lengths]
        groups.append(grpo.make_group(prompt, completions, torch.rand(size, generator=g).tolist()))
    return groups


def adamw(policy, lr=0.1, weight_decay=0.0):
    return torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=weight_decay)


def gradient(policy, groups):
    """That of the loss of all completions in one batch, and the loss."""
    policy.zero_grad()
    completions = grpo.flatten(groups)
    logp, mask = grpo.pad([policy.logprobs(c.prompt, [c.tokens])[0] for c in completions])
    ref = grpo.pad([c.ref_logp for c in completions])[0]
    rewards = [torch.tensor([[c.reward for c in group]]) for group in groups]
    advantages = torch.cat([grpo.group_advantages(r)[0] for r in rewards])
    loss, _ = grpo.grpo_loss(logp, logp.detach(), ref, advantages, mask)
    loss.backward()
    return policy.logits.grad.clone(), loss.item()


def another_table():
    table = Table()
    with torch.no_grad():
        table.logits.add_(0.3 * torch.randn_like(table.logits))
    return table


def test_micro_batches_give_the_gradient_of_one_batch():
    policy, groups = Table(), random_groups()
    grpo.add_reference(groups, another_table())
    metrics = grpo.backward(policy, groups)
    got = policy.logits.grad.clone()
    want, loss = gradient(policy, groups)
    assert torch.allclose(got, want, atol=1e-7) and want.abs().max() > 0.01
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)


def test_an_update_is_clipping_and_a_step():
    """Three updates against torch's own steps on the gradient of one batch.

    With SGD in AdamW's place: AdamW's first steps are signs, and blow up what a gradient near 0 loses in
    rounding.
    """
    policy, plain, reference = Table(), Table(), another_table()
    ours, theirs = (torch.optim.SGD(p.parameters(), lr=1.0) for p in (policy, plain))
    for _ in range(3):
        groups = random_groups()
        grpo.add_reference(groups, reference)
        metrics = grpo.update(policy, ours, groups, max_norm=0.05)
        gradient(plain, groups)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        theirs.step()
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5) and norm > 0.05
    assert torch.allclose(policy.logits, plain.logits, atol=1e-6)
    assert policy.logits.grad is None, "nothing is left for the next step"


def test_later_updates_keep_the_old_policy():
    policy, groups = Table(), random_groups()
    grpo.add_reference(groups, Table())
    completions = grpo.flatten(groups)
    before = [policy.logprobs(c.prompt, [c.tokens])[0].detach().clone() for c in completions]
    optimizer = adamw(policy, 0.3)
    first = grpo.update(policy, optimizer, groups)
    second = grpo.update(policy, optimizer, groups)
    kept = [c.old_logp for c in completions]
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert first["ratio"] == pytest.approx(1.0) and first["clip_share"] == 0
    assert second["clip_share"] > 0 and second["kl"] > 0


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_begins_again_with_smaller_batches(monkeypatch, failures):
    """In the second batch, whose gradient is there already; the reference fails too."""
    calls, loss = [], grpo.grpo_loss

    def failing(*args):
        calls.append(1)
        if len(calls) in (2, 4)[:failures]:
            loss(*args)[0].backward()
            raise torch.OutOfMemoryError("out of memory")
        return loss(*args)

    plain, policy, reference = Table(), Table(), another_table()
    for p, patched in ((plain, False), (policy, True)):
        groups = random_groups()
        if patched:
            monkeypatch.setattr(grpo, "grpo_loss", failing)
            monkeypatch.setattr(reference, "logprobs", once_out_of_memory(reference.logprobs))
        grpo.add_reference(groups, reference)
        grpo.update(p, adamw(p), groups)
    assert torch.allclose(plain.logits, policy.logits, atol=1e-6)
    assert (plain.size, policy.size, reference.size) == (3, 3 - failures, 2)


def once_out_of_memory(function):
    calls = []

    def wrapped(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return function(*args)

    return wrapped


def test_out_of_memory_to_the_end_is_raised(monkeypatch):
    def failing(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(grpo, "grpo_loss", failing)
    policy, groups = Table(), random_groups()
    grpo.add_reference(groups, Table())
    with pytest.raises(torch.OutOfMemoryError):
        grpo.update(policy, adamw(policy), groups)


def test_a_gradient_that_is_not_finite_changes_nothing():
    policy, groups = Table(), random_groups()
    grpo.add_reference(groups, Table())
    groups[1][0].ref_logp[0] = float("nan")
    before, optimizer = policy.logits.detach().clone(), adamw(policy)
    metrics = grpo.update(policy, optimizer, groups)
    assert metrics["skipped"] == 1.0 and math.isnan(metrics["grad_norm"])
    assert torch.equal(policy.logits, before) and not optimizer.state
    groups = random_groups()
    grpo.add_reference(groups, Table())
    assert grpo.update(policy, optimizer, groups)["skipped"] == 0.0
    assert torch.isfinite(policy.logits).all() and not torch.equal(policy.logits, before)


def test_equal_rewards_and_empty_completions_leave_the_weights_finite():
    policy = Table()
    groups = [
        grpo.make_group(0, [[1, 2], [3], []], [1.0, 1.0, 1.0]),
        grpo.make_group(1, [[], []], [0.0, 1.0]),
    ]
    grpo.add_reference(groups, Table())
    before = policy.logits.detach().clone()
    metrics = grpo.update(policy, adamw(policy), groups)
    assert metrics["grad_norm"] == 0 and torch.equal(policy.logits, before)


def test_a_bandit_is_solved():
    """Three prompts, each with its own right first token: the policy finds it from rewards alone."""
    policy, sampler = Table(length=1), torch.Generator().manual_seed(3)
    reference, right = Table(length=1), [2, 0, 3]
    optimizer = adamw(policy)
    for _ in range(60):
        groups = []
        for prompt in range(3):
            probabilities = policy.logits[prompt, 0].softmax(-1)
            draws = torch.multinomial(probabilities, 8, True, generator=sampler).tolist()
            reward = [float(draw == right[prompt]) for draw in draws]
            groups.append(grpo.make_group(prompt, [[draw] for draw in draws], reward))
        grpo.add_reference(groups, reference)
        grpo.update(policy, optimizer, groups)
    chosen = policy.logits[:, 0].softmax(-1)[torch.arange(3), torch.tensor(right)]
    assert chosen.min() > 0.9

"""Generation against `model.generate`, against itself one prompt at a time, and against the distribution it samples."""

import pytest
import torch
from scipy.stats import chisquare

import generate as generate_module
from checkpoints import load_lively, noise_image, plain_inputs
from generate import generate, sample

SIZES = [(56, 56), (100, 60), (30, 200), (112, 112), (60, 60)]
TEXTS = ["How many?", "Is it red, and is it on the left of the other one?", "x", "What is written there, and where?", "Why"]


def ragged_prompts(vlm):
    return [vlm.prompt(text, noise_image(*size, seed=i)) for i, (text, size) in enumerate(zip(TEXTS, SIZES))]


def reference(vlm, prompt, new_tokens):
    """Greedy `model.generate`, a batch of one, up to and including the end token."""
    vlm.model.model.rope_deltas = None
    out = vlm.model.generate(
        **plain_inputs(prompt), max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.0,
        temperature=None, suppress_tokens=vlm.vision_ids,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_model_generate(published):
    """Token for token, on a ragged batch with images of different sizes, in both layouts; prompts repeat and mix."""
    vlm = load_lively(published)
    prompts = ragged_prompts(vlm)
    assert len({len(p) for p in prompts}) > 2 and len({p.image_tokens for p in prompts}) > 2
    want = [reference(vlm, p, 24) for p in prompts]
    assert len({tuple(w) for w in want}) > 2, "the model is lively enough to tell prompts apart"
    got = generate(vlm, prompts, 2, 24, temperature=0)
    assert [g[0] for g in got] == want and [g[1] for g in got] == want
    assert [g[0] for g in generate(vlm, prompts[::-1], 1, 24, temperature=0)] == want[::-1]


def test_rows_stop_at_every_end_token_and_leave_the_batch(random_vlm, monkeypatch):
    """Two tokens that greedy decoding is known to write are declared end tokens: rows stop there, others go on."""
    prompts = ragged_prompts(random_vlm)
    free = [reference(random_vlm, p, 24) for p in prompts]
    ends = [free[0][3], free[1][9]]
    monkeypatch.setattr(random_vlm, "end_ids", ends)
    sizes, step = [], generate_module.step
    monkeypatch.setattr(generate_module, "step", lambda *a: sizes.append(a[2]) or step(*a))
    got = [g[0] for g in generate(random_vlm, prompts, 1, 24, temperature=0)]
    want = [ids[: next((t for t, i in enumerate(ids) if i in ends), len(ids)) + 1] for ids in free]
    assert got == want and len(set(map(len, want))) > 1
    assert sizes[0] == len(prompts) and min(sizes) < len(prompts), "finished rows are not forwarded any more"


def test_batches_do_not_change_the_result(random_vlm, monkeypatch):
    prompts = ragged_prompts(random_vlm)
    whole = generate(random_vlm, prompts, 3, 12, temperature=0)
    monkeypatch.setattr(generate_module, "CPU_CACHE_BYTES", 1)
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 1)
    assert generate_module.slots_in_memory(random_vlm, 100, 3, 12) == 1
    assert generate(random_vlm, prompts, 3, 12, temperature=0) == whole
    monkeypatch.undo()
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 1)
    assert generate(random_vlm, prompts, 3, 12, temperature=0) == whole


def test_the_image_matters(random_vlm):
    """Against silently fed empty image features: another image, other first-token logits."""
    a, b = (random_vlm.prompt("How many?", noise_image(60, 60, seed=s)) for s in (1, 2))
    logits = generate_module.prefill(random_vlm, [a, b])[0]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_a_seeded_generator_makes_it_reproducible(random_vlm):
    prompts = ragged_prompts(random_vlm)
    runs = [generate(random_vlm, prompts, 4, 10, top_p=0.9, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(c) for group in runs[0] for c in group}) > 10, "samples of a prompt differ"


def test_vision_tokens_are_never_sampled(random_vlm):
    vlm = random_vlm.copy()
    weight = vlm.model.get_output_embeddings().weight
    prompt = vlm.prompt("How many?", noise_image(60, 60))
    with torch.no_grad():  # make the image token by far the likeliest, whatever the state
        hidden = torch.cat([vlm.forward(vlm.embed(prompt.ids[None], [prompt]), prompt.positions[:, None], _causal(len(prompt)))[0, -1:]])
        weight[vlm.vision_ids] = 50 * hidden[0] / hidden[0].norm() ** 2 * 10
    logits = generate_module.prefill(vlm, [prompt])[0]
    assert logits[0].argmax().item() in vlm.vision_ids, "the trap is set"
    for temperature in (0, 1.0):
        ids = {i for c in generate(vlm, [prompt], 8, 6, temperature=temperature)[0] for i in c}
        assert not ids & set(vlm.vision_ids)


def _causal(n):
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


# ---- Sampling ----------------------------------------------------------------------------------------------------------

PROBS = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


def expected(temperature, top_p, top_k):
    """The target distribution, worked out token by token."""
    p = (PROBS.log() / temperature).softmax(0).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    kept, mass, whole = [], 0.0, sum(p[i] for i in order)
    for i in order:
        if mass < top_p * whole:
            kept.append(i)
        mass += p[i]
    return [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.7, 0), (0.99, 0), (1.0, 3), (0.8, 4), (1e-9, 0), (1.0, 1)])
def test_sampling_frequencies(temperature, top_p, top_k):
    """Chi-square at 1 in 10,000: a right sampler fails one such fixed-seed test in 10,000, a wrong one nearly always."""
    n, want = 40_000, expected(temperature, top_p, top_k)
    draws = sample(PROBS.log().expand(n, -1), temperature, top_p, top_k, torch.Generator().manual_seed(0))
    counts = draws.bincount(minlength=len(want)).tolist()
    assert all(c == 0 for c, w in zip(counts, want) if w == 0), "nothing outside the nucleus"
    support = [i for i, w in enumerate(want) if w > 0]
    if len(support) > 1:
        assert chisquare([counts[i] for i in support], [n * want[i] for i in support]).pvalue > 1e-4


def test_first_tokens_follow_the_model(random_vlm):
    """End to end: first tokens of 6,000 completions against the softmax of the plain forward's logits."""
    prompt = random_vlm.prompt("How many?", noise_image(60, 60))
    with torch.no_grad():
        random_vlm.model.model.rope_deltas = None
        logits = random_vlm.model(**plain_inputs(prompt)).logits[0, -1]
    logits[random_vlm.vision_ids] = -torch.inf
    probs = (logits / 0.7).softmax(0)
    group = generate(random_vlm, [prompt], 6000, 1, temperature=0.7, generator=torch.Generator().manual_seed(0))[0]
    counts = torch.tensor([c[0] for c in group]).bincount(minlength=len(probs))
    common = probs > 0.002
    observed = counts[common].tolist() + [counts[~common].sum().item()]
    wanted = (probs[common] * 6000).tolist() + [probs[~common].sum().item() * 6000]
    total = sum(wanted)
    assert len(wanted) > 5 and chisquare(observed, [w * 6000 / total for w in wanted]).pvalue > 1e-4


@pytest.mark.parametrize("wrong", [dict(n=0), dict(max_new_tokens=0), dict(temperature=-1), dict(top_p=0), dict(top_p=1.1), dict(top_k=-1)])
def test_arguments_out_of_range(random_vlm, wrong):
    with pytest.raises(ValueError):
        generate(random_vlm, [], **(dict(n=1, max_new_tokens=1) | wrong))


def test_no_prompts(random_vlm):
    assert generate(random_vlm, [], 2, 3) == []

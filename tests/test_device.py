"""What must hold on whatever device: `pytest tests/test_device.py --device cuda` on a GPU, the CPU otherwise.

On a GPU the decode step is a captured graph, models are lent and memory is pinned; on a CPU the same code
takes its plain paths.
"""

import pytest
import torch
from checkpoints import load_lively, noise_image, plain_inputs, publish
from conftest import ROOT

import grpo
from model import generate as generate_module
from model.generate import generate
from model.vlm import VLM
from training.policy import Trained

SIZES = [(60, 60), (120, 60), (40, 200), (90, 90)]


@pytest.fixture(scope="module")
def device(request):
    name = request.config.getoption("--device")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return name


@pytest.fixture(scope="module")
def on_device(device, tmp_path_factory):
    vlm = load_lively(publish(tmp_path_factory.mktemp("device"), "qwen"))
    vlm.model.to(device)
    vlm.device = vlm.model.device
    return vlm


@pytest.fixture(scope="module")
def prompts(on_device):
    return [
        on_device.prompt("How many?" * (1 + i), noise_image(*size, i))
        for i, size in enumerate(SIZES)
    ]


def moved(inputs, device):
    return {name: value.to(device) for name, value in inputs.items()}


def test_greedy_generation_against_transformers(on_device, prompts, device):
    for prompt, (ours,) in zip(prompts, generate(on_device, prompts, 1, 20, temperature=0.0)):
        on_device.model.model.rope_deltas = None
        bad = [[i] for i in on_device.vision_ids]
        theirs = on_device.model.generate(
            **moved(plain_inputs(prompt), device),
            max_new_tokens=20,
            do_sample=False,
            bad_words_ids=bad,
            repetition_penalty=1.0,
        )
        assert ours == theirs[0, len(prompt) :].tolist()


def test_a_recorded_step_writes_what_a_plain_one_writes(on_device, prompts, device, monkeypatch):
    """On a GPU: a CUDA graph, replayed, against the same step run kernel by kernel; many samples, so that
    rows leave and others come."""
    settings = dict(temperature=1.0, top_p=0.9)

    def sampled():
        return generate(
            on_device, prompts, 6, 24, **settings, generator=torch.Generator(device).manual_seed(0)
        )

    captured = sampled()
    monkeypatch.setattr(generate_module, "capture_graph", lambda step, *rest: step)
    assert sampled() == captured and sampled() == captured, "and a seed gives the same again"


def test_packed_logprobs_and_gradients_against_the_plain_forward(on_device, prompts, device):
    prompt, completions = prompts[1], [[300, 301, 302, 303], [400], [350, 360, 370, 380, 390, 391]]

    def plain(completion):
        on_device.model.model.rope_deltas = None
        logits = on_device.model(**moved(plain_inputs(prompt, completion), device)).logits[
            0, len(prompt) - 1 : -1
        ]
        return (
            (logits / 0.7)
            .log_softmax(-1)
            .gather(1, torch.tensor(completion, device=device)[:, None])[:, 0]
        )

    def gradients(logps):
        on_device.model.zero_grad()
        sum(
            (logp * torch.arange(1, len(logp) + 1, device=device)).sum() for logp in logps
        ).backward()
        return [
            p.grad.to_dense().clone() for p in on_device.model.parameters() if p.grad is not None
        ]

    ours, theirs = on_device.logprobs(prompt, completions, 0.7), [plain(c) for c in completions]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs))
    pairs = list(zip(gradients(ours), gradients(theirs)))
    on_device.model.zero_grad()
    assert all((a - b).norm() <= 1e-3 * b.norm() + 1e-6 for a, b in pairs)


def test_bfloat16_logprobs_are_near_float32(on_device, prompts, device):
    """bfloat16 keeps 8 bits: after three layers of random weights the log-probabilities are off by some
    tenths at most."""
    half, completions = on_device.copy(), [[300, 301, 302, 303], [350, 360]]
    half.model.to(torch.bfloat16)
    with torch.no_grad():
        exact, rounded = (
            on_device.logprobs(prompts[0], completions),
            half.logprobs(prompts[0], completions),
        )
    apart = torch.cat([a - b for a, b in zip(exact, rounded)]).abs()
    assert 0 < apart.max() < 0.6 and apart.mean() < 0.2


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_in_bfloat16_moves_the_masters(
    on_device, prompts, device, offload, checkpointing
):
    """Offloaded or not the masters move alike, by about lr; parked copies come back unchanged."""
    vlm = on_device.copy()
    vlm.model.to(torch.bfloat16)
    vlm.offload()
    reference = vlm.copy()
    before = [p.clone() for p in reference.model.parameters()]
    assert reference.offloaded and all(p.device.type == "cpu" for p in reference.model.parameters())
    groups = [grpo.make_group(p, [[300, 301], [302, 303, 304]], [0.0, 1.0]) for p in prompts]
    policy = Trained(vlm, 1e-6, 0.0, offload, checkpointing)
    start = [p.full_tensor().clone().cpu() for p in policy.parameters()]
    grpo.add_reference(groups, reference)
    metrics = grpo.update(policy, policy.optimizer, groups)
    moved = [
        (p.full_tensor().cpu() - old).abs().flatten() for p, old in zip(policy.parameters(), start)
    ]
    moved = torch.cat(moved)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0
    assert 0.5e-6 < moved[moved > 0].median() < 1.5e-6
    assert all(torch.equal(a, b) for a, b in zip(before, reference.model.parameters()))
    rounded = [p.full_tensor().bfloat16().cpu() for p in policy.parameters()]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(vlm.model.parameters(), rounded)), (
        "the copy is fresh"
    )


def test_the_toy_asks_and_answers(device):
    toy = VLM.load(ROOT / "toy", device, "float32")
    prompt = toy.prompt("How many discs are there?", noise_image(84, 84))
    first, again = (
        generate(toy, [prompt], 8, 24, generator=torch.Generator(device).manual_seed(3))
        for _ in range(2)
    )
    assert first == again and all(ids for ids in first[0])

"""LoRA against W + (alpha / R) B A, against PEFT, and through a whole run."""

import json
import shutil
import sys

import pytest
import torch
from checkpoints import noise_image
from conftest import ROOT
from test_loop import SMALL, records, workplace  # noqa: F401 (a fixture)
from test_ranks import together
from transformers import Qwen2_5_VLForConditionalGeneration

import evaluate
import grpo
import loop
import questioner
import reasoner
from model import forward, lora
from model.generate import generate
from model.prompt import Picture
from model.sampling import Sampling
from model.vlm import VLM
from training import memory_plan as plan
from training.distributed import Ranks
from training.policy import Trained

sys.path.append(str(ROOT / "bench"))
from shapes import peak_extra_bytes, random_completions, random_prompt, random_vlm, shape_config  # noqa: E402


def with_lora(dtype="float32", rank=4, moved=True):
    """The toy with LoRA; `moved`: B is not 0 any more."""
    vlm = VLM.load(ROOT / "toy", "cpu", dtype)
    lora.add_lora(vlm.model, rank)
    if moved:
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in vlm.model.named_parameters():
                if name.endswith("lora_B"):
                    p.copy_(0.05 * torch.randn(p.shape, generator=rng))
    return vlm


def groups_of(vlm, count=3, seed=0):
    rng, groups = torch.Generator().manual_seed(seed), []
    for g in range(count):
        prompt = vlm.prompt("How many?", noise_image(60 + 30 * g, 60, g))
        completions = [torch.randint(4, 40, (2 + i,), generator=rng).tolist() for i in range(4)]
        groups.append(grpo.make_group(prompt, completions, torch.rand(4, generator=rng).tolist()))
    return groups


def test_it_starts_as_the_base_and_trains_only_the_text_models_change():
    base, vlm = VLM.load(ROOT / "toy", "cpu", "float32"), with_lora(moved=False)
    prompt, completions = base.prompt("How many?", noise_image(84, 84)), [[5, 6, 7], [8]]
    for a, b in zip(base.logprobs(prompt, completions), vlm.logprobs(prompt, completions)):
        assert torch.equal(a, b)
    trained = [name for name, p in vlm.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 3 and all("language_model.layers" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in vlm.model.parameters() if p.requires_grad)


def test_merged_weights_compute_the_same():
    """The change applied beside W, and added to it: log-probabilities, greedy tokens, and plain names."""
    vlm, plain = with_lora(), VLM.load(ROOT / "toy", "cpu", "float32")
    before = plain.logprobs(plain.prompt("How many?", noise_image(84, 84)), [[5, 6, 7]])[0]
    assert plain.model.load_state_dict(lora.merged_weights(vlm.model)).missing_keys == []
    prompts = [vlm.prompt("How many?", noise_image(60 + 20 * i, 84, i)) for i in range(3)]
    for prompt in prompts:
        ours, theirs = (v.logprobs(prompt, [[5, 6, 7], [9, 9]]) for v in (vlm, plain))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))
    assert not torch.allclose(before, plain.logprobs(prompts[0], [[5, 6, 7]])[0], atol=1e-2), (
        "B is not 0"
    )
    tokens = [generate(v, prompts, 1, 12, temperature=0.0) for v in (vlm, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("how", ["lora", "frozen", "all weights"])
def test_a_frozen_encoder_sees_an_image_once(how, monkeypatch):
    """In asking, the other role's votes, reference and update; one that is trained sees it each time."""
    seen, encode = [], forward.encode_images

    def counted(visual, pixels, grids):
        seen.append(len(grids))
        return encode(visual, pixels, grids)

    monkeypatch.setattr(forward, "encode_images", counted)
    asks = with_lora() if how == "lora" else VLM.load(ROOT / "toy", "cpu", "float32")
    if how == "frozen":
        asks.model.model.visual.requires_grad_(False)
    answers, reference = asks.copy(), asks.copy()
    pictures = [Picture(str(i), noise_image(60 + 30 * i, 60, i)) for i in range(3)]
    sampling = Sampling(32, generator=torch.Generator().manual_seed(0))
    asked = questioner.ask(asks, pictures, 4, sampling)
    votes = reasoner.vote(answers, asked, 2, sampling)
    assert any(vote for group in votes for vote in group)
    groups = [a.completions for a in asked]
    grpo.set_rewards(groups, [[0.0, 1.0, 0.5, 0.2]] * len(groups))
    grpo.add_reference(groups, reference)
    grpo.backward(Trained(asks, 1e-4, 0.0), groups)
    if how == "all weights":
        assert sum(seen) >= 3 * len(pictures) and all(a.patches.features is None for a in asked)
    else:
        assert sum(seen) == len(pictures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_features_change_nothing(dtype):
    """Log-probabilities and gradients with features that a rollout kept, and with ones made anew."""
    vlm, results = with_lora(dtype), []
    for kept in (True, False):
        groups = groups_of(vlm)
        if kept:
            generate(vlm, [g[0].prompt for g in groups], 1, 2, temperature=0)
            assert all(g[0].prompt.images[0].features is not None for g in groups)
        grpo.add_reference(groups, vlm)
        grpo.backward(vlm, groups)
        gradients = [p.grad.clone() for p in vlm.model.parameters() if p.grad is not None]
        vlm.model.zero_grad()
        results.append([*(c.ref_logp for c in grpo.flatten(groups)), *gradients])
    for a, b in zip(*results, strict=True):
        # All images in one pass either way, padded and ordered alike: the same to the last bit.
        assert torch.equal(a, b)


def test_kept_features_are_of_one_encoder():
    """Another frozen encoder, or one that is trained, makes its own."""
    first, other, trained = with_lora(), with_lora(), VLM.load(ROOT / "toy", "cpu", "float32")
    with torch.no_grad():
        other.model.model.visual.patch_embed.proj.weight.mul_(1.5)
        expected = other.logprobs(groups_of(other)[0][0].prompt, [[5, 6, 7]])[0]
        prompt = groups_of(first)[0][0].prompt
        before, after = (
            first.logprobs(prompt, [[5, 6, 7]])[0],
            other.logprobs(prompt, [[5, 6, 7]])[0],
        )
    assert torch.equal(after, expected) and not torch.allclose(before, after)
    trained.logprobs(prompt, [[5, 6, 7]])[0].sum().backward()
    assert trained.model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0


def test_gradients_are_those_of_the_formula():
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from the merged model."""
    vlm, plain = with_lora(), VLM.load(ROOT / "toy", "cpu", "float32")
    plain.model.load_state_dict(lora.merged_weights(vlm.model))
    prompt = vlm.prompt("How many?", noise_image(84, 84))
    for v in (vlm, plain):
        sum(x.sum() for x in v.logprobs(prompt, [[5, 6, 7], [9, 9]])).backward()
    weights = dict(plain.model.named_parameters())
    for name, layer in lora.text_linears(vlm.model):
        gradient = weights[f"{name}.weight"].grad
        for got, want in (
            (layer.lora_B.grad, lora.ALPHA * gradient @ layer.lora_A.T),
            (layer.lora_A.grad, lora.ALPHA * layer.lora_B.T @ gradient),
        ):
            assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6, name
        assert layer.weight.grad is None


def test_copies_share_what_is_frozen_and_nothing_else():
    vlm = with_lora("bfloat16")
    vlm.offload()
    twin = vlm.copy()
    for (name, a), (_, b) in zip(vlm.model.named_parameters(), twin.model.named_parameters()):
        assert (a is b) == (not a.requires_grad), name
        assert a.requires_grad == name.endswith(("lora_A", "lora_B")), name
    groups = groups_of(vlm)
    grpo.add_reference(groups, twin)
    policy = Trained(twin, 1e-2, 0.0)
    assert not policy.sharded, "float32 changes of a bfloat16 base need no masters"
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    assert grpo.update(policy, policy.optimizer, groups)["grad_norm"] > 0
    assert all(torch.equal(before[name], p) for name, p in vlm.model.named_parameters())
    assert any(not torch.equal(before[name], p) for name, p in twin.model.named_parameters())


def gradients(ranks, freeze=False):
    """Of the trained weights, in whole: with LoRA, or all but the image encoder's."""
    vlm = VLM.load(ROOT / "toy", "cpu", "float32") if freeze else with_lora()
    if freeze:
        vlm.model.model.visual.requires_grad_(False)
    policy, mine = Trained(vlm, 1e-3, 0.0, ranks=ranks), ranks.shard(groups_of(vlm))
    grpo.add_reference(mine, vlm)
    grpo.backward(policy, mine)
    grads = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in policy.parameters()
    ]
    return torch.cat([g.flatten() for g in grads]).tolist(), sorted(policy.weights())


@pytest.mark.parametrize("freeze", [False, True])
def test_several_processes_train_it_as_one_does(freeze):
    one, names = gradients(Ranks(), freeze)
    assert names and not any("visual" in name for name in names)
    for several, their_names in together(2, gradients, freeze):
        assert their_names == names
        a, b = torch.tensor(several), torch.tensor(one)
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_lora(workplace, dtype):  # noqa: F811
    """It trains, stops, goes on to the same end, and leaves merged checkpoints and adapters."""
    flags = [
        *SMALL,
        *"--lora-rank 4 --lr 1e-3 --save-every 1 --tau-low 0 --tau-high 1".split(),
        *"--group-size 8 --images-per-step 4 --dtype".split(),
        dtype,
    ]
    assert loop.main([*flags, "--name", "whole"]) == 0
    curate, calls = loop.curate_questions, []

    def interrupted(*rest):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return curate(*rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "curate_questions", interrupted)
        assert loop.main([*flags, "--name", "cut"]) == 1
        assert loop.main(["--resume", "runs/cut"]) == 0
    runs = workplace / "runs"
    for role in ("questioner", "reasoner"):
        files = [runs / name / role / "model.safetensors" for name in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()
        base = (ROOT / "toy" / "model.safetensors").read_bytes()
        assert len(files[0].read_bytes()) == len(base) and files[0].read_bytes() != base
        config = json.loads(
            (runs / "whole" / f"{role}-adapter" / "adapter_config.json").read_text()
        )
        assert config["r"] == 4 and config["lora_alpha"] == 8
    state = sum(path.stat().st_size for path in (runs / "whole" / "state").iterdir())
    assert state < len(base), "a state has no base in it"
    assert all(r["skipped"] == 0 for r in records(runs / "whole") if "skipped" in r)


def test_peft_loads_the_adapter_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    vlm = with_lora()
    lora.save_adapter(vlm.model, "toy", tmp_path / "adapter")
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "toy", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    prompt = vlm.prompt("How many?", noise_image(84, 84))
    merged = VLM.load(ROOT / "toy", "cpu", "float32")
    merged.model = theirs.merge_and_unload()
    ours, of_peft = (v.logprobs(prompt, [[5, 6, 7], [9, 9]]) for v in (vlm, merged))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, of_peft))


def test_weights_beside_their_adapter_are_not_changed_by_it(tmp_path, capsys):
    """Somebody merged it and left it there; with PEFT transformers would add it once more."""
    pytest.importorskip("peft")
    folder = shutil.copytree(ROOT / "toy", tmp_path / "toy", ignore=shutil.ignore_patterns("*.py"))
    lora.save_adapter(with_lora().model, str(ROOT / "toy"), folder)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert any("lora_A" in name for name, _ in plain.named_parameters()), "as feared"
    ours, toy = (VLM.load(path, "cpu", "float32") for path in (folder, ROOT / "toy"))
    prompt = toy.prompt("How many?", noise_image(84, 84))
    assert torch.equal(*(v.logprobs(prompt, [[5, 6, 7]])[0] for v in (ours, toy)))

    noise_image(84, 84).save(tmp_path / "a.png")
    line = dict(image="a.png", question="How many circles are there?", answer="2")
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    args = f"--data {tmp_path}/data.jsonl --json {tmp_path}/x.json --answers 2 --device cpu"
    assert evaluate.main([*args.split(), "--model", str(folder), "--model", str(ROOT / "toy")]) == 0
    one, other = json.loads((tmp_path / "x.json").read_text())["answers"].values()
    assert one == other and "not the adapter" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("new_tokens, vocab_size", [(16, 0), (48, 40_000)])
def test_the_plan_of_an_update(new_tokens, vocab_size, checkpointing, dtype):
    vlm = random_vlm("small", "cpu", dtype, vocab_size)
    lora.add_lora(vlm.model, 8)
    prompt, completions = random_prompt(vlm, 300, 0), random_completions(vlm, 8, new_tokens, 0)
    group = grpo.make_group(prompt, completions, [float(i % 2) for i in range(8)])
    policy = Trained(vlm, 1e-6, 0.0, checkpointing=checkpointing)
    grpo.add_reference([group], vlm)
    grpo.backward(policy, [group])
    measured = peak_extra_bytes(lambda: grpo.backward(policy, [group]), "cpu")
    work = plan.Work(prompt.image_tokens, len(prompt) - prompt.image_tokens, new_tokens, 8, 1, 1)
    what = (vlm.model.config, getattr(torch, dtype), None, work, checkpointing, False)
    planned = plan.memory_plan(*what, lora_rank=8)[2].parts["activations"]
    assert 0.85 < planned / measured < 1.15


def test_it_fits_the_gpus_people_own():
    work = plan.Work(1024, 100, 1024, 8, 1024, 10)
    for size, available in (("3b", 14.7 * 2**30), ("7b", 22.0 * 2**30)):
        config = shape_config(size)
        for moment in plan.memory_plan(
            config, torch.bfloat16, int(available), work, True, False, lora_rank=16
        ):
            assert moment.total < 0.95 * available, (size, moment)

"""Qwen3-VL in everything that trains: updates, several processes, LoRA, runs that stop and go on, exports."""

import json

import checkpoints
import pytest
import torch
from checkpoints import load_lively, noise_image, plain_inputs
from test_loop import SMALL, image_folder, records, workplace  # noqa: F401
from test_ranks import random_groups, together, whole_tensor
from transformers import AutoModelForImageTextToText

import evaluate
import grpo
import loop
from model import lora
from model.vlm import VLM
from training.distributed import Ranks
from training.policy import Trained

STYLES = ("qwen3", "qwen3-untied")


@pytest.fixture(scope="module", params=STYLES)
def published(request, tmp_path_factory):
    return checkpoints.publish(tmp_path_factory.mktemp("qwen3"), request.param)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tied model that knows both roles by heart."""
    folder = checkpoints.publish(tmp_path_factory.mktemp("taught"), "qwen3")
    checkpoints.teach(folder, "qwen3")
    return folder


# ---- Updates -----------------------------------------------------------------------------------------------


def gradients(ranks, folder, sharded=False, checkpointing=False, rank=0):
    """The gradient of one update on four groups, split over the ranks, in whole. rank: LoRA's."""
    vlm = load_lively(folder)
    if rank:
        lora.add_lora(vlm.model, rank)
    policy = Trained(vlm, 1e-4, 0.01, offload=sharded, checkpointing=checkpointing, ranks=ranks)
    mine = ranks.shard(random_groups(vlm, 4))
    grpo.add_reference(mine, vlm)
    grpo.backward(policy, mine)
    return torch.cat([whole_tensor(p.grad).flatten() for p in policy.parameters()]).tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sharded_process_makes_the_plain_gradient_bit_for_bit(published, checkpointing):
    plain = gradients(Ranks(), published)
    assert gradients(Ranks(), published, sharded=True, checkpointing=checkpointing) == plain
    assert gradients(Ranks(), published, checkpointing=True) == plain


@pytest.mark.parametrize("rank", [0, 4])
def test_a_gradient_of_two_processes_is_that_of_one(published, rank):
    plain = torch.tensor(gradients(Ranks(), published, rank=rank))
    for theirs in together(2, gradients, published, False, False, rank):
        assert (torch.tensor(theirs) - plain).norm() < 1e-5 * plain.norm()


# ---- LoRA --------------------------------------------------------------------------------------------------


def test_lora_merged_and_in_peft(published, tmp_path):
    peft = pytest.importorskip("peft")
    vlm = load_lively(published)
    lora.add_lora(vlm.model, 4)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    prompt, completions = vlm.prompt("How many?", noise_image(90, 60)), [[300, 301, 302], [303]]
    ours = torch.cat(vlm.logprobs(prompt, completions))
    vlm.save(tmp_path / "merged")
    lora.save_adapter(vlm.model, str(published), tmp_path / "adapter")
    base = load_lively(published)
    assert (ours - torch.cat(base.logprobs(prompt, completions))).abs().max() > 1e-2
    merged = VLM.load(tmp_path / "merged", "cpu", torch.float32)
    assert torch.allclose(ours, torch.cat(merged.logprobs(prompt, completions)), atol=1e-5)
    base.model = (
        peft.PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval().merge_and_unload()
    )
    assert torch.allclose(ours, torch.cat(base.logprobs(prompt, completions)), atol=1e-5)


# ---- Runs --------------------------------------------------------------------------------------------------

HOW = {
    "all weights": "--lr 1e-3",
    "LoRA": "--lora-rank 4 --lr 1e-2",
    "frozen encoder": "--freeze-vision --lr 1e-3",
    "sharded": "--offload --gradient-checkpointing --dtype bfloat16 --lr 1e-3",
}


@pytest.mark.parametrize("how", HOW)
def test_a_run_stops_goes_on_and_is_exported(taught, workplace, capsys, how):  # noqa: F811
    """Killed after the Questioner's phase it ends as the run that nothing stopped, byte for byte."""
    image_folder(workplace / "images")
    flags = [
        "--model",
        str(taught),
        "--images",
        "images",
        "--max-new-tokens",
        "60",
        "--save-every",
        "1",
    ]
    flags += [*SMALL, *HOW[how].split(), "--tau-low", "0", "--tau-high", "1", "--name"]
    assert loop.main([*flags, "whole"]) == 0
    curate, calls = loop.curate_questions, []

    def interrupted(*rest):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return curate(*rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "curate_questions", interrupted)
        assert loop.main([*flags, "cut"]) == 1
        assert loop.main(["--resume", "runs/cut"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    whole, cut = workplace / "runs" / "whole", workplace / "runs" / "cut"
    steps = records(whole, "questioner") + records(whole, "reasoner")
    assert len(steps) == 4 and not any(step["skipped"] for step in steps)
    assert records(whole, "questioner")[0]["validity"] > 0

    base = VLM.load(taught, "cpu", torch.float32)
    for role in ("questioner", "reasoner"):
        files = [path.read_bytes() for path in sorted((whole / role).glob("*.safetensors"))]
        assert files == [path.read_bytes() for path in sorted((cut / role).glob("*.safetensors"))]
        trained = VLM.load(whole / role, "cpu", torch.float32)
        pairs = zip(trained.model.parameters(), base.model.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), "it was trained"
        pairs = zip(trained.model.model.visual.parameters(), base.model.model.visual.parameters())
        is_frozen = how in ("LoRA", "frozen encoder")
        assert all(torch.equal(a, b) for a, b in pairs) == is_frozen
        plain, report = AutoModelForImageTextToText.from_pretrained(
            whole / role, dtype=torch.float32, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        inputs = plain_inputs(trained.prompt("How many?", noise_image(90, 60)))
        with torch.no_grad():
            assert torch.equal(plain(**inputs).logits, trained.model(**inputs).logits)
        for file in ("tokenizer_config.json", "chat_template.json", "preprocessor_config.json"):
            assert (whole / role / file).read_bytes() == (taught / file).read_bytes()


def test_it_is_evaluated_on_one_and_on_three_images(taught, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        noise_image(60 + 30 * number, 90, number).save(f"{number}.png")
    three = dict(
        images=["0.png", "1.png", "2.png"], question="Is <image 2> like <image 1>?", answer="1"
    )
    lines = [dict(image="0.png", question="How many?", answer="1"), three]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = ["--model", str(taught), "--data", "data.jsonl", "--device", "cpu", "--answers", "4"]
    assert evaluate.main([*args, "--max-new-tokens", "8", "--json", "out.json"]) == 0
    (answered,) = json.loads((tmp_path / "out.json").read_text())["answers"].values()
    assert [len(each["item"]["images"]) for each in answered] == [1, 3]

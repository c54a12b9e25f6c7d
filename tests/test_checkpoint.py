"""Checkpoints as people have them: which are run, which get a sentence, and what a saved folder holds."""

import json
import shutil

import pytest
import torch
from checkpoints import noise_image, plain_inputs
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from vlm import VLM, CheckpointError

# ---- Checkpoints -------------------------------------------------------------------------------------------------------


def test_published_layout_loads_every_weight(published):
    vlm = VLM.load(published, "cpu", torch.float32)
    stored = {k: v for file in published.glob("*.safetensors") for k, v in load_file(file).items()}
    loaded = dict(vlm.model.named_parameters())
    assert torch.equal(
        loaded["model.visual.blocks.1.attn.qkv.weight"], stored["visual.blocks.1.attn.qkv.weight"]
    )
    assert torch.equal(
        loaded["model.language_model.layers.2.mlp.up_proj.weight"],
        stored["model.layers.2.mlp.up_proj.weight"],
    )
    tied = "lm_head.weight" not in stored
    assert tied == (vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight)
    assert len(vlm.end_ids) == 2 and vlm.model.config.text_config.vocab_size > len(vlm.tokenizer)
    assert vlm.tokenizer.chat_template is not None


def test_saved_folder_loads_in_plain_transformers(published, tmp_path):
    vlm = VLM.load(published, "cpu", torch.float32)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    vlm.save(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompt = vlm.prompt("How many?", noise_image(120, 60))
    with torch.no_grad():
        vlm.model.model.rope_deltas = None
        assert torch.equal(plain(**plain_inputs(prompt)).logits, vlm.model(**plain_inputs(prompt)).logits)
    assert plain.generation_config.eos_token_id == vlm.end_ids
    again = VLM.load(tmp_path / "out", "cpu", torch.float32)
    second = again.prompt("How many?", noise_image(120, 60))
    assert (
        torch.equal(second.ids, prompt.ids)
        and torch.equal(second.pixels, prompt.pixels)
        and again.end_ids == vlm.end_ids
    )
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "out").size == vlm.image_processor.size


def broken(published, folder, change):
    shutil.copytree(published, folder)
    change(folder)
    return folder


def rewrite(name, **fields):
    def change(folder):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | fields))

    return change


def only_pickle(folder):
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "pytorch_model.bin")


def without_a_weight(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(file)
    weights.pop(next(name for name in sorted(weights) if "mlp" in name))
    save_file(weights, file, {"format": "pt"})


def wrong_shape(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "mlp" in name and weights[name].ndim == 2)
    save_file(weights | {name: torch.zeros(3, 3)}, file, {"format": "pt"})


def without_a_shard(folder):
    """Published checkpoints of one file get an index that names a second."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted(folder.glob("*.safetensors"))[1].unlink()
    names = list(load_file(folder / "model.safetensors"))
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def a_weight_that_is(number):
    def change(folder):
        file = sorted(folder.glob("*.safetensors"))[-1]
        weights = load_file(file)
        name = next(name for name in sorted(weights) if weights[name].ndim == 1)
        weights[name][3] = number
        save_file(weights, file, {"format": "pt"})

    return change


def truncated(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1000])


def remove(pattern):
    def change(folder):
        for file in folder.glob(pattern):
            file.unlink()

    return change


@pytest.mark.parametrize(
    "change, word",
    [
        (only_pickle, "pickle"),
        (remove("*.safetensors"), "no weights"),
        (remove("config.json"), "config.json"),
        (remove("preprocessor_config.json"), "image processor"),
        (rewrite("config.json", model_type="llama"), "llama"),
        (rewrite("config.json", auto_map={"AutoModel": "x.Y"}), "code of its own"),
        (rewrite("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), "code of its own"),
        (rewrite("preprocessor_config.json", auto_map={"AutoImageProcessor": "x.Y"}), "code of its own"),
        (rewrite("config.json", use_sliding_window=True), "sliding"),
        (rewrite("config.json", hidden_size="wide"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "read as JSON"),
        (without_a_weight, "lacks 1 weights"),
        (wrong_shape, "cannot be loaded"),
        (truncated, "cannot be loaded"),
        (without_a_shard, "cannot be loaded"),
        (a_weight_that_is(float("nan")), "not finite"),
        (a_weight_that_is(float("-inf")), "not finite"),
    ],
)
def test_a_bad_checkpoint_gets_one_sentence(published, tmp_path, change, word):
    with pytest.raises(CheckpointError) as error:
        VLM.load(broken(published, tmp_path / "bad", change))
    assert word in str(error.value) and "\n" not in str(error.value)


def test_pickle_files_beside_safetensors_are_never_opened(published, tmp_path):
    def add(folder):
        (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")

    VLM.load(broken(published, tmp_path / "ok", add), "cpu", torch.float32)


def test_no_such_folder(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError):
            VLM.load(path)

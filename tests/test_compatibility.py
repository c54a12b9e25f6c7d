"""Saved folders: what stands in them, and that plain transformers 4 and 5 load them and compute the same."""

import json
import os
import subprocess
import venv

import numpy as np
import pytest
import torch
from checkpoints import as_transformers_5_saves, edit, noise_image, plain_inputs, publish
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointError, prove_export
from model.generate import KVCache
from model.vlm import VLM

SMALL = (".json", ".txt", ".jinja")


def stirred(folder) -> VLM:
    """A model whose weights differ from those in its folder, as after training."""
    vlm = VLM.load(folder, "cpu", torch.float32)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vlm


def test_the_sources_files_are_kept_as_they_were(published, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in published.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    edit(
        source, "config.json", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, our_own=1
    )
    (source / "special_tokens_map.json").write_bytes(b'{ "eos_token":  "<|im_end|>"}\r\n')
    (source / "LICENSE.txt").write_bytes(b"\xff no UTF-8")
    (source / "README.md").write_text("not copied")
    (source / "logs.json").mkdir()
    stirred(source).save(tmp_path / "saved")
    saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    for file in source.iterdir():
        if file.is_file() and file.suffix in SMALL and not file.name.endswith(".index.json"):
            assert saved.pop(file.name) == file.read_bytes(), file.name
    template = VLM.load(published, "cpu").tokenizer.chat_template
    assert saved.pop("chat_template.jinja").decode() == template
    assert set(saved) == {"model.safetensors"}, "no index of other files, nothing else"
    tied = json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors"))


def test_a_source_as_transformers_5_saves_it(published, tmp_path):
    source = tmp_path / "five"
    source.mkdir()
    for file in published.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    as_transformers_5_saves(source)
    assert not (source / "preprocessor_config.json").exists()
    vlm = stirred(source)
    prompt = vlm.prompt("How many?", noise_image(120, 60))
    before = VLM.load(published, "cpu", torch.float32).prompt("How many?", noise_image(120, 60))
    assert torch.equal(prompt.ids, before.ids)
    assert torch.equal(prompt.images[0].pixels, before.images[0].pixels)
    prove_export(vlm, tmp_path)
    vlm.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert kept["image_processor_type"] == "Qwen2VLImageProcessor" and kept["patch_size"] in (
        14,
        16,
    )
    again = VLM.load(tmp_path / "saved", "cpu", torch.float32)
    assert torch.equal(again.model.lm_head.weight, vlm.model.lm_head.weight)
    assert again.image_processor.to_dict() == vlm.image_processor.to_dict()


@pytest.mark.parametrize("said", ["torch_dtype", "dtype", "nothing"])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_weights_are_saved_in_the_sources_type(tmp_path, said, stored):
    """Also if they were trained in float32; the folder itself may be the place they are saved to."""
    source = publish(tmp_path, "qwen")
    for file in source.glob("*.safetensors"):
        save_file({k: v.to(getattr(torch, stored)) for k, v in load_file(file).items()}, file)
    edit(
        source,
        "config.json",
        **({"torch_dtype": ...} | ({} if said == "nothing" else {said: stored})),
    )
    vlm, config = stirred(source), (source / "config.json").read_bytes()
    vlm.save(source)
    assert not list(source.glob("*-of-*")) and not list(source.glob("*.index.json"))
    weights = load_file(source / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {getattr(torch, stored)}
    assert vlm.model.dtype == torch.float32 and (source / "config.json").read_bytes() == config
    name = "model.embed_tokens.weight"
    assert torch.equal(
        weights[name], vlm.model.get_input_embeddings().weight.to(getattr(torch, stored))
    )


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_files_are_readable_as_the_umask_says(published, tmp_path, umask, mode):
    vlm, before = VLM.load(published, "cpu"), os.umask(umask)
    try:
        vlm.save(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()} == {mode}


def test_weights_that_lie_in_one_buffer_are_saved(published, tmp_path):
    """As after parking: every weight is a view of one piece of memory."""
    vlm = stirred(published)
    weights = list(vlm.model.parameters())  # a tied matrix once
    buffer, at = torch.cat([weight.detach().flatten() for weight in weights]), 0
    for weight in weights:
        weight.data, at = buffer[at : at + weight.numel()].view(weight.shape), at + weight.numel()
    vlm.save(tmp_path / "saved")
    again = VLM.load(tmp_path / "saved", "cpu")
    for a, b in zip(again.model.parameters(), weights, strict=True):
        assert torch.equal(a, b)


def test_generation_settings_that_transformers_would_not_save(tmp_path):
    """A temperature without sampling, which `save_pretrained` refuses at the end of a run; ends as text."""
    source = publish(tmp_path, "mimo")
    edit(
        source,
        "generation_config.json",
        do_sample=False,
        temperature=0.6,
        eos_token_id="<|im_end|>",
    )
    vlm = VLM.load(source, "cpu")
    vlm.save(tmp_path / "saved")
    for name in ("generation_config.json", "config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()
    (source / "generation_config.json").unlink()
    vlm = VLM.load(source, "cpu")
    vlm.save(tmp_path / "second")
    assert VLM.load(tmp_path / "second", "cpu").end_ids == vlm.end_ids


@pytest.mark.parametrize("more", [{}, {"cache_kwargs": None}, {"kwargs": {"position": 1}}])
def test_the_cache_takes_what_any_transformers_hands_over(more):
    """Up to 5.23 a layer hands over no keyword; 5.24 hands over `kwargs`."""
    keys, values = torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4)
    cache = KVCache()
    kept = cache.update(keys, values, 0, **more)
    assert kept[0] is keys and kept[1] is values and len(cache.layers) == 1


def test_export_is_proven_at_the_start(published, tmp_path):
    vlm, run = VLM.load(published, "cpu"), tmp_path / "run"
    run.mkdir()
    prove_export(vlm, run)
    assert not list(run.iterdir()), "nothing stays"
    vlm.source = tmp_path / "gone"
    with pytest.raises(CheckpointError, match="could not be saved"):
        prove_export(vlm, run)
    vlm.source = published
    vlm.end_ids = [1]
    with pytest.raises(CheckpointError, match="other settings"):
        prove_export(vlm, run)
    assert not list(run.iterdir())


# ---- Other environments ------------------------------------------------------------------------------------

# Plain transformers, in an environment that has none of this project.
PROBE = """
import sys, json, torch, transformers
import numpy as np
from transformers import AutoModelForImageTextToText, AutoTokenizer
folder, five = sys.argv[1], transformers.__version__ >= "5"
data = dict(np.load(folder + ".npz"))
given = {k: torch.from_numpy(v) for k, v in data.items() if k not in ("image", "logits")}
if not five:
    given.pop("mm_token_type_ids")
model, report = AutoModelForImageTextToText.from_pretrained(
    folder, output_loading_info=True, **{"dtype" if five else "torch_dtype": torch.float32})
with torch.no_grad():
    logits = model.eval()(**given).logits.numpy()
out = dict(version=transformers.__version__, missing=sorted(report["missing_keys"]))
out["difference"] = float(abs(logits - data["logits"]).max())
out["ends"] = model.generation_config.eos_token_id
out["text"] = AutoTokenizer.from_pretrained(folder).decode(data["input_ids"][0])
from PIL import Image
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(folder)
turn = dict(role="user", content=[dict(type="image"), dict(type="text", text="How many?")])
text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
made = processor(text=[text], images=[Image.fromarray(data["image"])], return_tensors="pt")
out["same_ids"] = made["input_ids"].tolist() == data["input_ids"].tolist()
out["pixels"] = float(abs(made["pixel_values"].numpy() - data["pixel_values"]).max())
print(json.dumps(out))
"""


@pytest.fixture(scope="session")
def environments(request, tmp_path_factory):
    """Version -> the python of a new environment with it and torchvision, which AutoProcessor needs."""
    if not request.config.getoption("--compatibility"):
        pytest.skip("needs --compatibility")
    pythons, torch_version = {}, torch.__version__.split("+")[0]
    for version in ("4.57.6", "5.23.0"):
        place = tmp_path_factory.mktemp("environment")
        venv.create(place, with_pip=True)
        pythons[version] = str(place / "bin" / "python")
        wanted = [
            f"torch==={torch_version}",
            "torchvision==0.28.0",
            f"transformers=={version}",
            "pillow",
            "numpy",
        ]
        subprocess.run([pythons[version], "-m", "pip", "install", "-q", *wanted], check=True)
    return pythons


def saved_with_logits(folder, style):
    """A trained model's saved folder and, beside it, an input and its logits as we compute them."""
    source = folder / f"{style}-source"
    source.mkdir()
    publish(source, "qwen" if style == "five" else style)
    vlm = stirred(as_transformers_5_saves(source) if style == "five" else source)
    vlm.save(folder / style)
    image = noise_image(120, 60)
    inputs = plain_inputs(vlm.prompt("How many?", image))
    with torch.no_grad():
        logits = vlm.model(**inputs).logits.numpy()
    arrays = {k: v.numpy() for k, v in inputs.items()} | dict(
        logits=logits, image=np.asarray(image)
    )
    np.savez(folder / f"{style}.npz", **arrays)
    return folder / style, vlm


@pytest.mark.parametrize("style", ["qwen", "mimo", "qwen3", "qwen3-untied", "five"])
def test_plain_transformers_4_and_5_compute_the_same(environments, tmp_path, style):
    """A source that transformers 5 saved is none that transformers 4 reads, and nor is what is made of it."""
    saved, vlm = saved_with_logits(tmp_path, style)
    (tmp_path / "probe.py").write_text(PROBE)
    for version, python in environments.items():
        if style == "five" and version.startswith("4"):
            continue
        command = [python, str(tmp_path / "probe.py"), str(saved)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        out = json.loads(done.stdout.splitlines()[-1])
        assert out["version"] == version and not out["missing"] and out["difference"] < 1e-5
        assert out["ends"] == vlm.end_ids and "How many?<|im_end|>" in out["text"]
        assert out["same_ids"] and out["pixels"] < 0.05  # torchvision scales a bit otherwise

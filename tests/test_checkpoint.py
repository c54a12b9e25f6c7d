"""Checkpoints as people have them: which are run, which get a sentence, and what a saved folder holds."""

import json
import shutil

import pytest
import torch
from checkpoints import edit, noise_image, plain_inputs, publish
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2VLImageProcessorPil

from model.checkpoint import CheckpointError, first_line, open_checkpoint
from model.vlm import VLM


def test_published_layout_loads_every_weight(published):
    vlm = VLM.load(published, "cpu", torch.float32)
    stored = {k: v for file in published.glob("*.safetensors") for k, v in load_file(file).items()}
    loaded = dict(vlm.model.named_parameters())
    for ending in ("blocks.1.attn.qkv.weight", "layers.2.mlp.up_proj.weight"):
        ours, theirs = (
            [v for k, v in some.items() if k.endswith(ending)] for some in (loaded, stored)
        )
        assert len(ours) == len(theirs) == 1 and torch.equal(ours[0], theirs[0])
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
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompt = vlm.prompt("How many?", noise_image(120, 60))
    with torch.no_grad():
        vlm.model.model.rope_deltas = None
        assert torch.equal(
            plain(**plain_inputs(prompt)).logits, vlm.model(**plain_inputs(prompt)).logits
        )
    assert plain.generation_config.eos_token_id == vlm.end_ids
    again = VLM.load(tmp_path / "out", "cpu", torch.float32)
    second = again.prompt("How many?", noise_image(120, 60))
    assert (
        torch.equal(second.ids, prompt.ids)
        and torch.equal(second.images[0].pixels, prompt.images[0].pixels)
        and again.end_ids == vlm.end_ids
    )
    assert (
        Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "out").size == vlm.image_processor.size
    )


def broken(published, folder, change):
    shutil.copytree(published, folder)
    change(folder)
    return folder


def rewrite(name, **fields):
    return lambda folder: edit(folder, name, **fields)


def rewrite_text(**fields):
    """Sets fields of the text model, which stand at the top level of Qwen2.5-VL's config.json."""

    def change(folder):
        text = json.loads((folder / "config.json").read_text()).get("text_config")
        edit(folder, "config.json", **({"text_config": text | fields} if text else fields))

    return change


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def marked(name):
    return lambda folder: (folder / name).write_bytes(
        b"\xef\xbb\xbf" + (folder / name).read_bytes()
    )


def template(text):
    """Gives the checkpoint this chat template, and no other."""

    def change(folder):
        (folder / "chat_template.json").unlink(missing_ok=True)
        edit(folder, "tokenizer_config.json", chat_template=text)

    return change


def adapter(folder):
    for file in list(folder.iterdir()):
        file.unlink()
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}'
    )
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def another_head(folder):
    """A tied configuration and an output matrix that is not the embedding."""
    edit(folder, "config.json", tie_word_embeddings=True)
    file = sorted(folder.glob("*.safetensors"))[-1]
    table = next(
        v for f in folder.glob("*.safetensors") for k, v in load_file(f).items() if "embed_t" in k
    )
    save_file(load_file(file) | {"lm_head.weight": table + 1}, file, {"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        where = json.loads(index.read_text())["weight_map"] | {"lm_head.weight": file.name}
        edit(folder, index.name, weight_map=where)


def without_a_vocabulary(folder):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()


def a_run(folder):
    edit(folder, "config.json", model_type=...)
    (folder / "reasoner").mkdir()


def without_ends(folder):
    rewrite_text(eos_token_id=None)(folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        edit(folder, name, eos_token_id=..., eos_token=None)


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


USER = "{% for m in messages %}{% for c in m.content %}"
IMAGE, TEXT, END = "<|image_pad|>", "{{ c.text }}", "{% endfor %}{% endfor %}"
QUANTISED = dict(quant_method="awq", bits=4)
BAD = [
    (only_pickle, "pickle"),
    (remove("*.safetensors"), "no weights"),
    (lambda f: [p.rename(f / "a.gguf") for p in f.glob("*.safetensors")], "no weights"),
    (
        lambda f: [p.rename(f / "consolidated.safetensors") for p in f.glob("model*.safetensors")],
        "weight",
    ),
    (remove("config.json"), "config.json"),
    (remove("preprocessor_config.json"), "image processor"),
    (rewrite("preprocessor_config.json", patch_size=7), "cuts patches of 7 pixels"),
    (rewrite("preprocessor_config.json", merge_size=4), "merges 4 x 4"),
    (without_a_vocabulary, "tokenizer"),
    (rewrite("config.json", model_type="llama"), "llama"),
    (rewrite("config.json", model_type="qwen2_vl"), "its image encoder differs from Qwen2.5-VL's"),
    (rewrite("config.json", model_type="qwen3_vl_moe"), "its layers choose among experts"),
    (rewrite("config.json", model_type="qwen3_5"), "three of four layers are recurrent"),
    (rewrite("config.json", model_type=["qwen2_5_vl"]), "of type"),
    (a_run, "folder of a run"),
    (adapter, "merge it into its base, Qwen/Qwen2.5-VL-3B-Instruct"),
    (rewrite("config.json", auto_map={"AutoModel": "x.Y"}), "code of its own"),
    (
        rewrite("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "code of its own",
    ),
    (
        rewrite("preprocessor_config.json", auto_map={"AutoImageProcessor": "x.Y"}),
        "code of its own",
    ),
    (write("processor_config.json", b'{"image_processor": {"auto_map": {}}}'), "code of its own"),
    (rewrite("config.json", use_sliding_window=True), "sliding"),
    (
        rewrite("config.json", transformers_weights="other.safetensors"),
        "names a file of its weights",
    ),
    (rewrite_text(hidden_size="wide"), "config.json"),
    (rewrite("config.json", vision_config=[1]), "config.json"),
    (rewrite("config.json", quantization_config=QUANTISED), "quantised"),
    (rewrite("config.json", compression_config={"format": "pack-quantized"}), "quantised"),
    (rewrite("config.json", text_config={"quantization_config": QUANTISED}), "quantised"),
    (another_head, "tie_word_embeddings"),
    *[
        (write("config.json", data), "config.json")
        for data in (b"{", b"", b"[1]", b"null", b"\xff\xfe{\0}\0")
    ],
    *[
        (marked(name), name)
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json")
    ],
    (write("config.json", b"[" * 100_000), "config.json"),
    (write("generation_config.json", b"{"), "generation_config.json"),
    (write("tokenizer.json", b"version https://git-lfs.github.com/spec/v1"), "tokenizer"),
    (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1"), "cannot be loaded"),
    (without_a_weight, "lacks weights: 1, "),
    (wrong_shape, "cannot be loaded"),
    (truncated, "cannot be loaded"),
    (without_a_shard, "not there"),
    (a_weight_that_is(float("nan")), "not finite"),
    (a_weight_that_is(float("-inf")), "not finite"),
    (template(None), "no chat template"),
    (template(USER + TEXT + END), "writes no image tokens"),
    (template(USER + IMAGE + IMAGE + TEXT + END), "writes 4 image tokens"),
    (template("<|image_pad|><|image_pad|>" + USER + TEXT + END), "writes 2 image tokens"),
    (template("<|image_pad|>{{ messages[0].role }}"), "drops or repeats"),
    (template("<|image_pad|>" + USER + TEXT + TEXT + END), "drops or repeats"),
    (template("<|image_pad|>{{ messages[0]['content'] }}"), "drops or repeats"),
    (template("{{ raise_exception('no images\\nplease') }}"), "no images"),
    (template("{% for m in"), "cannot be used"),
    (without_ends, "no token that ends a turn"),
]


@pytest.mark.parametrize(
    "change, word", BAD, ids=[f"{i}-{word}"[:40] for i, (_, word) in enumerate(BAD)]
)
def test_a_bad_checkpoint_gets_one_sentence(published, tmp_path, change, word):
    if word == "sliding" and "qwen3_vl" in (published / "config.json").read_text():
        pytest.skip("Qwen3-VL knows no such attention")
    with pytest.raises(CheckpointError) as error:
        VLM.load(broken(published, tmp_path / "bad", change))
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, word", BAD, ids=[f"{i}-{word}"[:40] for i, (_, word) in enumerate(BAD)]
)
def test_nothing_is_loaded_before_the_checks(published, tmp_path, change, word, monkeypatch):
    if word.startswith(("lacks", "not finite")) or change is wrong_shape:
        pytest.skip("only seen once the weights are read")
    if word == "sliding" and "qwen3_vl" in (published / "config.json").read_text():
        pytest.skip("Qwen3-VL knows no such attention")
    calls = []
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", lambda *args, **kwargs: calls.append(args)
    )
    with pytest.raises(CheckpointError):
        VLM.load(broken(published, tmp_path / "bad", change), "cpu")
    assert not calls


DISTRIBUTED = "shard-00001-model-00001-of-00001.safetensors"  # transformers prefers such files


def test_nothing_beside_the_weights_is_loaded(published, tmp_path, capsys):
    """An adapter, weights of other formats and names, and files that say a folder is a distributed one."""
    folder = shutil.copytree(published, tmp_path / "many")
    want = VLM.load(published, "cpu").model.state_dict()
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "none/none", "peft_type": "LORA"}'
    )
    save_file({"x": torch.zeros(2)}, folder / "consolidated.safetensors")
    for name in ("pytorch_model.bin", DISTRIBUTED, "model.fp16.safetensors"):
        (folder / name).write_bytes(b"no weights")
    capsys.readouterr()
    vlm = VLM.load(folder, "cpu")
    assert "not the adapter" in capsys.readouterr().err
    got = vlm.model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    vlm.save(tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*")), "plain transformers would add it"
    assert VLM.load(tmp_path / "out", "cpu").model.state_dict().keys() == want.keys()


@pytest.mark.parametrize("device", ["cuda:7", "cuda:-1", "tpu", "gpu", "cpu:x", "0"])
def test_a_device_that_is_not_there(published, device, monkeypatch):
    monkeypatch.setattr("model.vlm.open_checkpoint", None)
    with pytest.raises(CheckpointError, match="no device"):
        VLM.load(published, device)


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "ValueError"),
        ("one\ntwo", "one"),
        ("one:\ntwo\nthree", "one: two"),
        ("x" * 200, "x" * 200),
        ("word " * 60, ("word " * 40) + " ..."),
    ],
)
def test_a_long_error_is_cut_off_visibly(text, told):
    assert first_line(ValueError(text)) == told


@pytest.mark.parametrize("dtype", ["float33", "int8", torch.int64, "nn"])
def test_a_dtype_that_is_none(published, dtype):
    with pytest.raises(CheckpointError, match="cannot compute in"):
        VLM.load(published, "cpu", dtype)


# ---- What must load ----------------------------------------------------------------------------------------

END, PAD = "<|im_end|>", "<|endoftext|>"


@pytest.mark.parametrize(
    "generation, config, text, tokenizer, want",
    [
        ([END, PAD], END, ..., END, {END, PAD}),  # as published
        (..., PAD, ..., END, {END, PAD}),
        (PAD, PAD, ..., END, {END, PAD}),
        (None, ..., ..., END, {END}),
        ([PAD], ..., [END], None, {END, PAD}),
        ("text", "text", ..., END, {END}),
        ("text", [PAD, "text"], ..., None, {END, PAD}),
        (["text"], ..., ..., None, {END}),
        (PAD, PAD, PAD, None, {PAD}),
        ("<|none such|>", -1, ..., END, {END}),
    ],
)
def test_end_tokens_are_those_of_all_places(tmp_path, generation, config, text, tokenizer, want):
    """A token's name stands for its number here, and "text" for the text of <|im_end|>."""
    folder = publish(tmp_path, "qwen")
    ids = VLM.load(folder, "cpu").tokenizer.get_vocab()

    def number(value):
        if isinstance(value, list):
            return [number(v) for v in value]
        return (
            END if value == "text" else ids.get(value, value) if isinstance(value, str) else value
        )

    edit(folder, "generation_config.json", eos_token_id=number(generation))
    edit(folder, "config.json", eos_token_id=number(config))
    if text is not ...:
        edit(folder, "config.json", text_config={"eos_token_id": number(text)})
    edit(folder, "tokenizer_config.json", eos_token=tokenizer)
    found = open_checkpoint(folder).end_ids
    assert sorted(found) == sorted(ids[token] for token in want)
    if text is ...:
        assert VLM.load(folder, "cpu").end_ids == found


def test_wherever_the_chat_template_stands(published, tmp_path):
    vlm = VLM.load(published, "cpu")
    want, TEMPLATE = vlm.prompt("How many?", noise_image(60, 60)).ids, vlm.tokenizer.chat_template
    for place in ("config", "json", "jinja", "processor", "named"):
        folder = broken(published, tmp_path / place, template(...))
        if place == "config":
            edit(folder, "tokenizer_config.json", chat_template=TEMPLATE)
        if place == "json":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        if place == "jinja":
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        if place == "processor":
            (folder / "processor_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        if place == "named":
            several = [dict(name="default", template=TEMPLATE), dict(name="rag", template="x")]
            edit(folder, "tokenizer_config.json", chat_template=several)
        vlm = VLM.load(folder, "cpu")
        assert torch.equal(vlm.prompt("How many?", noise_image(60, 60)).ids, want), place
        vlm.save(tmp_path / f"{place}-saved")
        again = VLM.load(tmp_path / f"{place}-saved", "cpu")
        assert torch.equal(again.prompt("How many?", noise_image(60, 60)).ids, want), place


def test_a_head_in_the_file_that_equals_the_embedding(published, tmp_path):
    def change(folder):
        another_head(folder)
        file = sorted(folder.glob("*.safetensors"))[-1]
        weights = load_file(file)
        save_file(
            weights | {"lm_head.weight": weights["lm_head.weight"] - 1}, file, {"format": "pt"}
        )
        table = next(
            v
            for f in folder.glob("*.safetensors")
            for k, v in load_file(f).items()
            if "embed_t" in k
        )
        save_file(load_file(file) | {"lm_head.weight": table.clone()}, file, {"format": "pt"})

    vlm = VLM.load(broken(published, tmp_path / "same", change), "cpu")
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight


def test_pickle_files_beside_safetensors_are_never_opened(published, tmp_path):
    def add(folder):
        (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")

    VLM.load(broken(published, tmp_path / "ok", add), "cpu", torch.float32)


def test_no_such_folder(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError):
            VLM.load(path)

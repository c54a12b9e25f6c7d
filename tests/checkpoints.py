"""Tiny random checkpoints laid out like the published ones, and the plain way to run them."""

import json
import random
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.video_processing_utils import BaseVideoProcessor

import questioner
import reasoner
from model.families import FAMILIES
from model.prompt import Prompt
from model.vlm import VLM

# The control tokens of Qwen2.5, in the order of its vocabulary.
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
]
CONTROL += [
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
]
CONTROL += ["<|image_pad|>", "<|video_pad|>"]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPLIT += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (  # does what Qwen's does: a default system turn, then the turns with their images
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Qwen3-VL's has no default system turn, and that of a Thinking model opens the thought.
TEMPLATE_3 = (
    TEMPLATE[: TEMPLATE.index("{% if loop.first")] + TEMPLATE[TEMPLATE.index("<|im_start|>{{") :]
)
THINKING_3 = TEMPLATE_3.replace("assistant\n", "assistant\n<think>\n")


def publish(folder: Path, style: str) -> Path:
    """Writes a checkpoint like Qwen2.5-VL ("qwen": tied, two shards), MiMo-VL ("mimo": untied, <think>),
    Qwen3-VL-Instruct of 2B and 4B ("qwen3": tied, two shards) or 8B-Thinking ("qwen3-untied")."""
    tokenizer = _tokenizer(["<think>", "</think>"] if style in ("mimo", "qwen3-untied") else [])
    third = style.startswith("qwen3")
    config = _config_3(tokenizer, style) if third else _config(tokenizer, style)
    torch.manual_seed(0)
    model = (Qwen3VLForConditionalGeneration if third else Qwen2_5_VLForConditionalGeneration)(
        config
    )
    _write_weights(folder, model, shards=2 if config.tie_word_embeddings else 1)
    _write_nested_config(folder, config) if third else _write_flat_config(folder, config, style)
    _write_tokenizer(folder, tokenizer, style)
    end_ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    generation = dict(
        bos_token_id=end_ids[1], pad_token_id=end_ids[1], eos_token_id=end_ids, do_sample=True
    )
    (folder / "generation_config.json").write_text(
        json.dumps(generation | dict(repetition_penalty=1.05, temperature=1e-6))
    )
    images = dict(
        min_pixels=3136, max_pixels=28 * 28 * 24, patch_size=14, temporal_patch_size=2, merge_size=2
    )
    images |= dict(image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
    images |= dict(
        image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor"
    )
    if third:  # published: 65,536 to 16,777,216 pixels
        images = dict(size=dict(shortest_edge=4096, longest_edge=32 * 32 * 24), patch_size=16)
        images |= dict(
            temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        images |= dict(
            image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen3VLProcessor"
        )
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def as_transformers_5_saves(folder: Path) -> Path:
    """Rewrites a checkpoint as transformers 5 saves model and processor: no preprocessor_config.json."""
    from model.vlm import VLM

    vlm = VLM.load(folder, "cpu", torch.float32)
    for file in folder.iterdir():
        file.unlink()
    vlm.model.save_pretrained(folder)
    vlm.tokenizer.save_pretrained(folder)
    images = vlm.image_processor.to_dict() | dict(image_processor_type="Qwen2VLImageProcessorPil")
    fields = dict(image_processor=images, processor_class="Qwen2_5_VLProcessor")
    (folder / "processor_config.json").write_text(json.dumps(fields))
    return folder


def edit(folder: Path, name: str, **fields) -> None:
    """Sets fields of a JSON file; a field that is to go is given as Ellipsis."""
    data = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def as_a_hub_cache(folder: Path, home: Path, name: str) -> Path:
    """A Hugging Face cache in which a checkpoint stands as a download leaves it; returns its snapshot."""
    root, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0123456789" * 4
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        (root / "blobs" / str(number)).write_bytes(file.read_bytes())
        (root / "blobs" / str(number)).chmod(0o600)
        (root / "snapshots" / commit / file.name).symlink_to(root / "blobs" / str(number))
    return root / "snapshots" / commit


def _tokenizer(extra: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    corpus = [
        questioner.INSTRUCTION,
        reasoner.INSTRUCTION,
        "You are a helpful assistant.",
        "user\n",
        "How many are there?",
    ]
    tokenizer.train_from_iterator(corpus * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": CONTROL})
    fast.add_tokens(extra)
    return fast


def _config(tokenizer, style: str) -> Qwen2_5_VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    text = dict(
        vocab_size=len(tokenizer) + 37, hidden_size=64, intermediate_size=96, num_hidden_layers=3
    )
    text |= dict(
        num_attention_heads=4,
        num_key_value_heads=4 if style == "mimo" else 2,
        max_position_embeddings=4096,
    )
    text |= dict(
        rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        use_sliding_window=False,
    )
    text |= dict(
        rms_norm_eps=1e-6, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"]
    )
    vision = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        window_size=56,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | dict(fullatt_block_indexes=[1]),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=style == "qwen",
    )


def _config_3(tokenizer, style: str) -> Qwen3VLConfig:
    """Heads wider together than the states; as many deepstack features as fit three layers, and one less."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    tied = style == "qwen3"
    text = dict(
        vocab_size=len(tokenizer) + 37, hidden_size=64, intermediate_size=96, num_hidden_layers=3
    )
    text |= dict(
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=4096
    )
    text |= dict(rope_theta=5e6, rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=tied)
    text |= dict(
        rope_scaling={
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
            "rope_type": "default",
        },
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
    )
    vision = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)
    vision |= dict(
        num_position_embeddings=36, deepstack_visual_indexes=[0, 2] if tied else [0, 1, 2]
    )
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


def _write_nested_config(folder: Path, config: Qwen3VLConfig) -> None:
    """config.json as Qwen3-VL's was published, by transformers 4.57."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    keep = (
        "attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size"
    )
    keep += " initializer_range intermediate_size max_position_embeddings model_type num_attention_heads"
    keep += " num_hidden_layers num_key_value_heads rms_norm_eps use_cache vocab_size"
    rope = dict(text["rope_parameters"])
    text = {name: text[name] for name in keep.split()} | dict(rope_theta=rope.pop("rope_theta"))
    text |= dict(rope_scaling=rope, dtype="float32", tie_word_embeddings=config.tie_word_embeddings)
    keep = "deepstack_visual_indexes depth hidden_act hidden_size in_channels initializer_range"
    keep += " intermediate_size num_heads num_position_embeddings out_hidden_size patch_size"
    keep += " spatial_merge_size temporal_patch_size"
    vision = {name: vision[name] for name in keep.split()} | dict(model_type="qwen3_vl")
    keep = "image_token_id video_token_id vision_start_token_id vision_end_token_id tie_word_embeddings"
    fields = {name: getattr(config, name) for name in keep.split()}
    fields |= dict(model_type="qwen3_vl", architectures=["Qwen3VLForConditionalGeneration"])
    fields |= dict(text_config=text, vision_config=vision, transformers_version="4.57.0.dev0")
    (folder / "config.json").write_text(json.dumps(fields, indent=2))


def _write_weights(folder: Path, model, shards: int) -> None:
    """The names published checkpoints have: Qwen2.5-VL's `visual.*` and `model.layers.*`, Qwen3-VL's the
    module's own."""
    weights = {}
    for name, value in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            if model.config.model_type == "qwen2_5_vl":
                name = name.replace("model.visual.", "visual.").replace(
                    "model.language_model.", "model."
                )
            weights[name] = value.clone()
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names, where = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    )


def _write_flat_config(folder: Path, config: Qwen2_5_VLConfig, style: str) -> None:
    """config.json with the text model's fields at the top level, as it was published."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    keep = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    ]
    keep += [
        "num_key_value_heads",
        "max_position_embeddings",
        "use_sliding_window",
        "bos_token_id",
        "eos_token_id",
    ]
    flat = {name: text[name] for name in keep} | dict(
        rope_theta=1e6, hidden_act="silu", max_window_layers=3
    )
    flat |= dict(
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        sliding_window=32768,
        torch_dtype="float32",
    )
    keep = [
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "window_size",
        "patch_size",
    ]
    keep += [
        "fullatt_block_indexes",
        "spatial_merge_size",
        "temporal_patch_size",
        "tokens_per_second",
    ]
    flat["vision_config"] = {name: vision[name] for name in keep} | dict(
        model_type="qwen2_5_vl", in_chans=3
    )
    keep = [
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "tie_word_embeddings",
    ]
    flat |= {name: getattr(config, name) for name in keep}
    flat |= dict(model_type="qwen2_5_vl", architectures=["Qwen2_5_VLForConditionalGeneration"])
    (folder / "config.json").write_text(json.dumps(flat, indent=2))


def _write_tokenizer(folder: Path, tokenizer, style: str) -> None:
    tokenizer.save_pretrained(folder)
    config = dict(
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=131072,
    )
    config |= dict(
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=CONTROL,
    )
    if style == "mimo":
        config["chat_template"] = TEMPLATE
    elif style.startswith("qwen3"):
        template = THINKING_3 if style == "qwen3-untied" else TEMPLATE_3
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    else:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    data = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(data["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def load_lively(folder: Path) -> VLM:
    """Loads a checkpoint and turns up its random weights, so that its logits vary with the input."""
    vlm = VLM.load(folder, "cpu", torch.float32)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.12)
    return vlm


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes(
        "RGB", (width, height), random.Random(seed).randbytes(width * height * 3)
    )


def processor_of(vlm: VLM, monkeypatch):
    """Transformers' own processor with our tokenizer and image processor; without torchvision."""
    kind = getattr(transformers, FAMILIES[vlm.model.config.model_type].PROCESSOR)
    monkeypatch.setattr(kind, "check_argument_for_proper_class", lambda *args: None)
    return kind(vlm.image_processor, vlm.tokenizer, object.__new__(BaseVideoProcessor))


def plain_inputs(prompt: Prompt, completion: list[int] = ()) -> dict:
    """What transformers' own forward and generate take: a batch of one."""
    ids = torch.cat([prompt.ids, torch.tensor(completion, dtype=torch.long)])[None]
    types = torch.zeros_like(ids, dtype=torch.int)
    types[0, prompt.places] = 1
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types)
    pixels, grids = (
        torch.cat([getattr(i, name) for i in prompt.images]) for name in ("pixels", "grid")
    )
    return inputs | dict(pixel_values=pixels, image_grid_thw=grids)


def plain_logprobs(
    vlm: VLM, prompt: Prompt, completion: list[int], temperature: float
) -> torch.Tensor:
    """Log-probabilities by transformers' plain forward of prompt and completion."""
    vlm.model.model.rope_deltas = None
    logits = vlm.model(**plain_inputs(prompt, completion)).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def teach(folder: Path, style: str) -> None:
    """Teaches a published-layout checkpoint both roles by heart, so that a run on it has something to do.

    It writes one of three valid questions, and answers 1 or 2 as a coin falls; MiMo and a Thinking
    model think before that.
    """
    from toy.build import supervised_loss

    vlm, rng = VLM.load(folder, "cpu", torch.float32), random.Random(0)
    think = {"mimo": "<think>look</think>", "qwen3-untied": "look</think>"}.get(style, "")
    questions = ["How many are there?", "How many of three?", "What image?"]
    prompts = [vlm.prompt(questioner.INSTRUCTION, noise_image(60, 60, seed=i)) for i in range(4)]
    asked = [
        reasoner.answer_prompt(vlm, noise_image(60, 60, seed=i), q)
        for i in range(2)
        for q in questions
    ]
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=5e-3)
    for _ in range(120):
        batch, texts = [], []
        for _ in range(4):
            batch.append(rng.choice(prompts))
            question = f"<type>numerical</type><question>{rng.choice(questions)}</question>"
            texts.append(f"{think}{question}<answer>\\boxed{{1}}</answer>")
            batch.append(rng.choice(asked))
            texts.append(f"{think}\\boxed{{{rng.randint(1, 2)}}}")
        completions = [
            vlm.tokenizer(t, add_special_tokens=False)["input_ids"] + [vlm.end_ids[0]]
            for t in texts
        ]
        loss = supervised_loss(vlm, batch, completions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _write_weights(folder, vlm.model, shards=2 if vlm.model.config.tie_word_embeddings else 1)

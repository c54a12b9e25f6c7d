"""What is Qwen3-VL's own: each part matters, and the published widths compute what transformers computes.

The widths of 4B and 8B take minutes and 15 GiB: `pytest tests/test_qwen3_vl.py --all-widths`.
"""

from dataclasses import replace

import pytest
import torch
from checkpoints import load_lively, noise_image, plain_logprobs, publish
from test_generate import reference
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from model import fused, qwen3_vl
from model.checkpoint import open_checkpoint
from model.generate import generate
from model.vlm import VLM

# The published text and vision widths; the vision model's DeepStack layers are here the first two of three.
WIDTHS = {
    "2b": (
        dict(hidden_size=2048, intermediate_size=6144, num_attention_heads=16),
        (1024, 4096),
        True,
    ),
    "4b": (
        dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32),
        (1024, 4096),
        True,
    ),
    "8b": (
        dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32),
        (1152, 4304),
        False,
    ),
}
VOCABULARY = 151_936


# ---- Each part matters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> VLM:
    return load_lively(publish(tmp_path_factory.mktemp("qwen3"), "qwen3"))


def without_deepstack(vlm, patch):
    encode = qwen3_vl.encode_images
    width = vlm.model.config.text_config.hidden_size

    def only_the_last_layer(*args):
        features = encode(*args)
        return [torch.cat([x[:, :width], torch.zeros_like(x[:, width:])], dim=1) for x in features]

    patch.setattr(qwen3_vl, "encode_images", only_the_last_layer)


def without_learned_positions(vlm, patch):
    learned = qwen3_vl.learned_positions
    patch.setattr(qwen3_vl, "learned_positions", lambda *args: torch.zeros_like(learned(*args)))


def without_head_norms(vlm, patch):
    for layer in vlm.model.model.language_model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            patch.setattr(norm, "forward", lambda x: x)
    patch.setattr(fused, "rms_norm", lambda x, *rest: x)


@pytest.mark.parametrize(
    "remove", [without_deepstack, without_learned_positions, without_head_norms]
)
def test_a_part_that_is_missing_is_seen(vlm, remove, monkeypatch):
    """The comparisons of this suite are to 1e-5: without the part, log-probabilities are off by far more."""
    prompt, completion = vlm.prompt("How many?", noise_image(200, 130)), [300, 301, 302, 303]
    (whole,) = vlm.logprobs(prompt, [completion])
    plain = plain_logprobs(vlm, prompt, completion, 1.0)
    assert (whole - plain).abs().max() < 1e-5
    remove(vlm, monkeypatch)
    (changed,) = vlm.logprobs(prompt, [completion])
    assert (changed - whole).abs().max() > 1e-2


# ---- The published widths ----------------------------------------------------------------------------------


def fill(model, seed=0) -> None:
    """Fills weights with numbers of a usual size, fast: one random block again and again, never aligned."""
    rng = torch.Generator().manual_seed(seed)
    block = torch.randn(1_000_003, generator=rng)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])
        scale = 0.02 if "embed" in name or "lm_head" in name else parameter[0].numel() ** -0.5
        parameter.data.mul_(scale)


@pytest.fixture(scope="module", params=WIDTHS)
def wide(request, tmp_path_factory) -> VLM:
    """A model of a published width, with 3 text and 3 vision layers and the whole vocabulary."""
    if request.param != "2b" and not request.config.getoption("--all-widths"):
        pytest.skip("needs --all-widths")
    text, (vision_width, vision_mlp), tied = WIDTHS[request.param]
    folder = publish(tmp_path_factory.mktemp("wide"), "qwen3" if tied else "qwen3-untied")
    opened = open_checkpoint(folder)
    tokenizer = opened.tokenizer
    ids = {
        token: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for token in ("image_pad", "video_pad")
    }
    ends = {end: tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")}
    text |= dict(vocab_size=VOCABULARY, num_hidden_layers=3, num_key_value_heads=8, head_dim=128)
    text |= dict(rope_theta=5e6, tie_word_embeddings=tied)
    text |= dict(
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default")
    )
    vision = dict(depth=3, hidden_size=vision_width, intermediate_size=vision_mlp, num_heads=16)
    vision |= dict(out_hidden_size=text["hidden_size"], deepstack_visual_indexes=[0, 1])
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ends["start"],
        vision_end_token_id=ends["end"],
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    fill(model)
    restore_frequencies(model)
    return VLM(model, replace(opened, config=config))


def restore_frequencies(model) -> None:
    """Makes the rotary frequencies again, which a model without memory could not hold."""
    text, vision = model.model.language_model, model.model.visual
    text.rotary_emb = type(text.rotary_emb)(text.config)
    vision.rotary_pos_emb = type(vision.rotary_pos_emb)(vision.config)


def test_published_widths_write_the_tokens_of_transformers(wide):
    sizes = [(100, 64), (64, 200), (128, 128)]
    prompts = [
        wide.prompt("How many?" * (1 + i), noise_image(*size, i)) for i, size in enumerate(sizes)
    ]
    want = [reference(wide, prompt, 8) for prompt in prompts]
    assert len({tuple(tokens) for tokens in want}) == 3, "prompts are told apart"
    assert [tokens for (tokens,) in generate(wide, prompts, 1, 8, temperature=0)] == want


def test_published_widths_against_the_plain_forward(wide):
    """Log-probabilities, and gradients of all that is in a layer, to 1e-5 of the largest."""
    model = wide.model
    for matrix in (model.get_input_embeddings(), model.lm_head):  # 622 million numbers each
        matrix.requires_grad_(False)
    prompt = wide.prompt("How many?", noise_image(100, 64))
    completions = [[300, 150_000, 302], [303]]
    both = []
    for logps in (
        wide.logprobs(prompt, completions, 0.8),
        [plain_logprobs(wide, prompt, completion, 0.8) for completion in completions],
    ):
        model.zero_grad()
        torch.cat(list(logps)).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        both.append((torch.cat(list(logps)).detach(), gradients))
        for parameter in model.parameters():
            parameter.grad = None
    (ours, our_gradients), (theirs, their_gradients) = both
    assert (ours - theirs).abs().max() < 1e-5
    largest = max(gradient.abs().max() for gradient in their_gradients)
    pairs = zip(our_gradients, their_gradients, strict=True)
    assert max((a - b).abs().max() for a, b in pairs) < 1e-5 * largest

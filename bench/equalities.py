"""How far this project's numbers are from transformers', for each layout of a checkpoint, as a table.

    python bench/equalities.py

Everything is float32 on a CPU, with tiny random checkpoints in the published layouts (tests/checkpoints.py).
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from shapes import ROOT

sys.path.append(str(ROOT / "tests"))
import checkpoints  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

import grpo  # noqa: E402
from model import lora  # noqa: E402
from model.families import encode_images  # noqa: E402
from model.generate import generate  # noqa: E402
from model.vlm import VLM  # noqa: E402
from training.policy import Trained  # noqa: E402

STYLES = {"qwen": "Qwen2.5-VL, tied", "mimo": "MiMo-VL, untied", "qwen3": "Qwen3-VL, tied"}
STYLES["qwen3-untied"] = "Qwen3-VL, untied"
SIZES = [(56, 56), (100, 60), (30, 200), (112, 112), (60, 60)]
NEW_TOKENS = 64


def prompts_for(vlm: VLM) -> list:
    """Five ragged prompts about images of different sizes, the last with three images."""
    images = [checkpoints.noise_image(*size, seed) for seed, size in enumerate(SIZES)]
    prompts = [vlm.prompt("How many?" * (1 + n), image) for n, image in enumerate(images)]
    prompts.append(vlm.prompt("Is <image 2> like <image 1>?", images[:3]))
    return prompts


def written_tokens(vlm: VLM) -> str:
    """Counts the greedy tokens that are those of `model.generate`."""
    prompts, same, count = prompts_for(vlm), 0, 0
    for prompt, (ours,) in zip(prompts, generate(vlm, prompts, 1, NEW_TOKENS, temperature=0.0)):
        vlm.model.model.rope_deltas = None
        plain = dict(
            do_sample=False, max_new_tokens=NEW_TOKENS, temperature=None, repetition_penalty=1.0
        )
        inputs = checkpoints.plain_inputs(prompt)
        theirs = vlm.model.generate(**inputs, **plain, suppress_tokens=vlm.vision_ids)
        theirs = theirs[0, len(prompt) :].tolist()
        same += sum(a == b for a, b in zip(ours, theirs))
        count += max(len(ours), len(theirs))
    return f"{same} of {count}"


def features(vlm: VLM) -> float:
    """Compares the image encoder, with DeepStack's features where there are some."""
    images = [vlm.patches(checkpoints.noise_image(*size)) for size in SIZES]
    pixels, grids = torch.cat([i.pixels for i in images]), torch.cat([i.grid for i in images])
    plain = copy.deepcopy(vlm.model.model.visual)
    plain.config._attn_implementation = "sdpa"
    with torch.no_grad():
        theirs = plain(pixels, grids)
        deep = getattr(theirs, "deepstack_features", None) or ()
        theirs = torch.cat([theirs.pooler_output, *deep], dim=1)
        ours = torch.cat(encode_images(vlm.model.model.visual, pixels, grids))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def completions_of(count: int, seed: int) -> list[list[int]]:
    """Makes completions of different lengths."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(300, 340, (1 + 3 * i,), generator=rng).tolist() for i in range(count)]


def logprobs_and_gradients(vlm: VLM) -> tuple[float, float]:
    """Compares packed groups with one forward pass for each completion."""
    groups = [(prompt, completions_of(4, seed)) for seed, prompt in enumerate(prompts_for(vlm))]
    packed, plain = [], []
    for prompt, completions in groups:
        packed += vlm.logprobs(prompt, completions, 0.8)
        plain += [checkpoints.plain_logprobs(vlm, prompt, each, 0.8) for each in completions]
    values = max(float((a - b).abs().max()) for a, b in zip(packed, plain))
    gradients = []
    for logps in (packed, plain):
        vlm.model.zero_grad()
        sum((x * torch.linspace(-1, 1, len(x) + 1)[1:]).sum() for x in logps).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vlm.model.parameters()]))
    vlm.model.zero_grad()
    ours, theirs = gradients
    return values, float((ours - theirs).abs().max() / theirs.abs().max())


def update_gradient(vlm: VLM, **how) -> torch.Tensor:
    """Returns the gradient of an update in one process."""
    policy = Trained(vlm.copy(), 1e-4, 0.0, **how)
    prompts = prompts_for(vlm)
    rewards = [0.0, 1.0, 0.3, 0.9]
    groups = [
        grpo.make_group(prompt, completions_of(4, n), rewards) for n, prompt in enumerate(prompts)
    ]
    grpo.add_reference(groups, vlm)
    grpo.backward(policy, groups)
    whole = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in policy.parameters()
    ]
    return torch.cat([gradient.flatten() for gradient in whole])


def merged_lora(folder: Path) -> float:
    """Compares a model with LoRA to itself with the change merged into its matrices."""
    vlm = checkpoints.load_lively(folder)
    lora.add_lora(vlm.model, 4)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    prompt = prompts_for(vlm)[1]
    with tempfile.TemporaryDirectory() as merged:
        vlm.save(merged)
        again = VLM.load(merged, "cpu", torch.float32)
        pairs = zip(
            vlm.logprobs(prompt, completions_of(4, 0)), again.logprobs(prompt, completions_of(4, 0))
        )
        return max(float((a - b).abs().max()) for a, b in pairs)


def exported_logits(vlm: VLM) -> float:
    """Compares the logits of a saved folder in plain transformers."""
    inputs = checkpoints.plain_inputs(prompts_for(vlm)[-1])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        vlm.save(folder)
        plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        vlm.model.model.rope_deltas = None
        ours = vlm.model(**inputs).logits
        return float((plain(**inputs).logits - ours).abs().max())


def column(folder: Path) -> dict[str, str]:
    """Measures one layout."""
    vlm = checkpoints.load_lively(folder)
    values, gradients = logprobs_and_gradients(vlm)
    plain = update_gradient(vlm)
    sharded = update_gradient(vlm, offload=True)
    checkpointed = update_gradient(vlm, checkpointing=True)
    apart = {
        "image features (relative)": features(vlm),
        "log-probabilities, packed against plain": values,
        "gradients, packed against plain (relative)": gradients,
        "gradient of a sharded update": float((sharded - plain).abs().max()),
        "gradient with checkpointing": float((checkpointed - plain).abs().max()),
        "LoRA, merged against not": merged_lora(folder),
        "logits of an exported folder in transformers 5": exported_logits(vlm),
    }
    shown = {name: f"{value:.1e}" if value else "0" for name, value in apart.items()}
    return {
        f"greedy tokens equal to `generate` (6 prompts x {NEW_TOKENS})": written_tokens(vlm)
    } | shown


def main() -> None:
    """Prints the table of all layouts."""
    columns = []
    for style in STYLES:
        with tempfile.TemporaryDirectory() as place:
            torch.manual_seed(0)
            columns.append(column(checkpoints.publish(Path(place), style)))
    print("| | " + " | ".join(STYLES.values()) + " |")
    print("| --- " * (1 + len(STYLES)) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(each[name] for each in columns) + " |")


if __name__ == "__main__":
    main()

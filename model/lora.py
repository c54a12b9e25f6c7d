r"""LoRA: train a small change of a frozen model (arXiv 2106.09685), for one GPU that people own.

    h = W x + (alpha / R) B A x        W [out, in] frozen,  A [R, in],  B [out, R],  both float32

on every linear layer of the text model. B starts at 0, so the model starts as it was. W and the image encoder
are shared by all copies of a model: a role is its A and B, a reference is A and B as they were.

Differs from the paper, which trains all weights. alpha = 2 R, as is common.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear

ALPHA = 2  # alpha / R


class LoRALinear(torch.nn.Linear):
    """A linear layer with its frozen W and a trained change; its own A and B are `lora_A` and `lora_B`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in] to [..., out]."""
        change = linear(x, self.lora_A.to(x.dtype))
        change = linear(change, self.lora_B.to(x.dtype))
        return super().forward(x) + ALPHA * change

    def cast_changes(self) -> Callable[[Tensor], Tensor]:
        """Returns the map of x [n, in] with A and B cast once, in three kernels."""
        a = self.lora_A.T.to(self.weight.dtype)
        b = (ALPHA * self.lora_B).T.to(self.weight.dtype)
        return lambda x: torch.addmm(linear(x, self.weight, self.bias), x @ a, b)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Returns W + (alpha / R) B A, [out, in], in W's dtype."""
        change = ALPHA * self.lora_B @ self.lora_A
        change = change.to(self.weight.device)  # A and B may be offloaded
        return (self.weight.float() + change).to(self.weight.dtype)


def add_lora(model, rank: int, seed: int = 0) -> None:
    """Freezes a model and puts A and B beside every linear layer of its text model.

    A is drawn as PEFT draws it, from U(-1/sqrt(in), 1/sqrt(in)). `seed` makes it the same in every process.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in text_linears(model):
        device = layer.weight.device
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(layer.out_features, rank, device=device)
        layer.__class__ = LoRALinear
        layer.lora_A = torch.nn.Parameter(a.to(device))
        layer.lora_B = torch.nn.Parameter(b)


def text_linears(model) -> list[tuple[str, torch.nn.Linear]]:
    """Returns the linear layers of the text model, each with its name in the whole model."""
    layers = model.model.language_model.layers
    modules = layers.named_modules(prefix="model.language_model.layers")
    return [(name, module) for name, module in modules if isinstance(module, torch.nn.Linear)]


def merged_weights(model) -> dict[str, Tensor]:
    """Returns the state dict of the model with every change added to its W, under the plain names."""
    weights = model.state_dict()
    for name, layer in text_linears(model):
        if isinstance(layer, LoRALinear):
            weights[f"{name}.weight"] = layer.merged().cpu()  # a GPU has no room for all of them
            del weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]
    return weights


def save_adapter(model, base: str, folder: Path) -> None:
    """Writes A and B as PEFT reads them: adapter_model.safetensors and adapter_config.json.

    base: the name or path of the model that they change.
    """
    layers = text_linears(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part).detach()
            tensors[f"base_model.model.{name}.{part}.weight"] = weight.cpu().contiguous()
    kinds = dict.fromkeys(name.rpartition(".")[2] for name, _ in layers)
    rank = layers[0][1].lora_A.shape[0]
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=ALPHA * rank,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        target_modules=rf".*language_model\.layers\..*\.({'|'.join(kinds)})",
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")

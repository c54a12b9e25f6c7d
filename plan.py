"""The plan: how much memory each phase will take, before anything is loaded.

Per parameter, a phase that trains holds the trained weights, a float32 master, a float32 gradient and AdamW's two
float32 moments; a float32 model is its own master. Beside them stand the reference (the KL's other side) and the other
role, frozen. What is sampled at once is bounded by the cache budget of `generate.py`.
"""

import math
from dataclasses import dataclass

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from generate import CPU_CACHE_BYTES, cache_token_bytes
from vlm import LOGITS, ROW_TOKENS


@dataclass(frozen=True)
class Phase:
    """A phase and what it holds in memory: name of the part -> bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def count_parameters(config: Qwen2_5_VLConfig) -> int:
    """The number of parameters of a model of this shape; no weights are made."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return sum(p.numel() for p in model.parameters())


def memory_plan(
    config: Qwen2_5_VLConfig,
    dtype: torch.dtype,
    device_bytes: int | None,
    prompt_tokens: int,
    new_tokens: int,
    group_size: int,
    rows: int,
) -> list[Phase]:
    """The memory of the three phases of one iteration.

    device_bytes: the memory of the GPU, None on a CPU. prompt_tokens: a prompt with its image; new_tokens: the longest
    completion; rows: completions sampled in one step. The activations of an update are estimated, not measured: about
    16 hidden and 3 MLP vectors a layer and token, for all rows of a group at once, and SDPA's bias a layer; those of the
    image encoder are left out.
    """
    parameters, text, size = count_parameters(config), config.text_config, dtype.itemsize
    weights, copies = parameters * size, 0 if dtype == torch.float32 else 4 * parameters
    training = {
        "trained role": weights,
        "float32 masters": copies,
        "gradients": 4 * parameters,
        "AdamW moments": 8 * parameters,
        "reference": weights,
        "other role": weights,
    }
    sampling = {"both roles": 2 * weights}
    wanted = rows * (prompt_tokens + new_tokens) * cache_token_bytes(config, dtype)

    def cache(parts: dict[str, int]) -> int:
        free = CPU_CACHE_BYTES if device_bytes is None else max(0, device_bytes - sum(parts.values())) // 2
        return min(wanted, free)

    packed = math.ceil(group_size * new_tokens / max(1, ROW_TOKENS - prompt_tokens))  # rows of a group
    tokens = packed * prompt_tokens + group_size * new_tokens
    layer = tokens * (16 * text.hidden_size + 3 * text.intermediate_size) * size + tokens * min(tokens, ROW_TOKENS) * size
    activations = text.num_hidden_layers * layer + 3 * LOGITS * 4
    training["cache or activations"] = max(cache(training), activations)
    sampling["cache"] = cache(sampling)
    return [Phase("questioner", training), Phase("curation", sampling), Phase("reasoner", training)]

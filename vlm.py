"""A vision-language model of the Qwen2.5-VL family: load, save, turn an image and a text into a prompt, and give

    log pi_theta(y_t | image, x, y_<t)        for every token t of a completion y,

differentiably: the quantity that GRPO is made of. The transformer itself is transformers' module; everything around
it that usually goes wrong is here, in the open: where image features go, which 3-D position each token has, and
which token may see which.

A group of G completions shares one prompt, so `VLM.logprobs` puts the whole group into one row,

    [ prompt | completion_1 | ... | completion_G ]

encodes the image once and forwards the prompt once. A completion's positions start at the end of the prompt and it
sees the prompt and itself only, so this is exact, in values and gradients (the idea of Prefix Grouper,
arXiv 2506.05433; the official VisPlay code forwards image and prompt once per completion).
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.utils import cached_file

ROW_TOKENS = 8192  # a longer group is split into several rows: the attention mask of a row takes its length squared
LOGIT_TOKENS = 512  # logits are made for so many tokens at a time: 512 x 151,936 x 4 bytes = 311 MB
_USER_TEXT = "\x01user text\x01"  # stands for the user's text while the chat template is rendered


class CheckpointError(ValueError):
    """A model cannot be loaded; the message is one sentence for the user."""


@dataclass(frozen=True)
class Patches:
    """An image as the model reads it: `pixels` and `grid` of a Prompt. Prompts about one image share it."""

    pixels: Tensor
    grid: Tensor


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: text with one image in it, ending where the assistant starts to write (P tokens).

    ids: [P] int64, the image token repeated once per image feature.
    positions: [3, P] int64, the temporal, vertical and horizontal position of every token.
    pixels: [patches, channels * 2 * 14 * 14] float32, the image as flattened patches.
    grid: [1, 3] int64, the image's patches in time, height and width.
    image_start, image_tokens: where in `ids` the image features go.
    """

    ids: Tensor
    positions: Tensor
    pixels: Tensor
    grid: Tensor
    image_start: int
    image_tokens: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def next_position(self) -> int:
        """The position of the first token that the assistant writes."""
        return int(self.positions.max()) + 1


class VLM:
    """The model with its tokenizer and image processor. `VLM.model` is the transformers module."""

    def __init__(self, model, tokenizer, image_processor, preprocessor_config: str, max_pixels: int | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.preprocessor_config = preprocessor_config  # as published, so that a saved folder keeps it
        self.image_size = dict(image_processor.size)  # least and most pixels of an image
        if max_pixels is not None:
            self.image_size["longest_edge"] = min(max_pixels, self.image_size["longest_edge"])
            self.image_size["shortest_edge"] = min(self.image_size["shortest_edge"], self.image_size["longest_edge"])
        self.end_ids = _end_ids(model)
        self.vision_ids = _vision_ids(model.config, tokenizer)

    @classmethod
    def load(cls, name_or_path: str | Path, device=None, dtype=None, max_pixels: int | None = None) -> "VLM":
        """Loads a local folder or a hub id; safetensors only, and no code from the checkpoint is ever run.

        device: default "cuda" if there is one, else "cpu". dtype: default bfloat16 on CUDA, else float32; a torch.dtype or its name.
        max_pixels: images are scaled down to so many pixels, if the checkpoint's own limit is not lower.
        Raises CheckpointError with a sentence for the user.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        load_config(name_or_path)
        _require_safetensors(name_or_path)
        try:
            model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                name_or_path, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", output_loading_info=True
            )
        except Exception as error:  # safetensors, JSON and hub errors have no common ancestor
            raise CheckpointError(f"the weights of {name_or_path} cannot be loaded: {_first_line(error)}") from error
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(f"{name_or_path} lacks {len(missing)} weights, {missing[0]} among them")
        return cls(model.to(device).eval(), *load_processors(name_or_path), max_pixels)

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face checkpoint folder, which transformers (and so vLLM) loads."""
        path = Path(path)
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        (path / "preprocessor_config.json").write_text(self.preprocessor_config, encoding="utf-8")

    def copy(self) -> "VLM":
        """A second, independent set of weights; tokenizer and image processor are shared."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        return twin

    @property
    def device(self) -> torch.device:
        return self.model.device

    # ---- Text and image -> prompt ----------------------------------------------------------------------------------

    def patches(self, image: Image.Image) -> Patches:
        """Scales an image and cuts it into patches. Do it once and give it to `prompt` to ask many questions."""
        made = self.image_processor(images=[image.convert("RGB")], size=self.image_size, return_tensors="pt")
        return Patches(made["pixel_values"], made["image_grid_thw"])

    def prompt(self, text: str, image: Image.Image | Patches, system: str | None = None) -> Prompt:
        """Encodes a user turn, the image and then the text, with the checkpoint's own chat template.

        `text` is data: a control token spelled out in it (`<|im_end|>`, `<|image_pad|>`) is encoded as plain
        characters and cannot forge a turn or an image. Raises ValueError for an image more than 200 times as
        wide as high or the other way round.
        """
        content = [{"type": "image"}, {"type": "text", "text": _USER_TEXT}]
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": content})
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = rendered.split(_USER_TEXT)
        ids = self._encode(before) + self._encode(text, plain=True) + self._encode(after)
        patches = image if isinstance(image, Patches) else self.patches(image)
        merge = self.model.config.vision_config.spatial_merge_size
        start, tokens = ids.index(self.model.config.image_token_id), int(patches.grid.prod()) // merge**2
        ids[start : start + 1] = [ids[start]] * tokens
        positions = rope_positions(start, patches.grid[0].tolist(), merge, len(ids) - start - tokens)
        return Prompt(torch.tensor(ids), positions, patches.pixels, patches.grid, start, tokens)

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of a completion, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # ---- Forward ---------------------------------------------------------------------------------------------------

    def embed(self, prompts: list[Prompt]) -> list[Tensor]:
        """The input embeddings [P, hidden] of each prompt; all their images are encoded in one pass, each once.

        Image features are placed by the prompt's own positions, never by looking for the image token.
        """
        images = {id(p.pixels): p for p in prompts}  # prompts about one image share its pixels
        pixels = torch.cat([p.pixels for p in images.values()]).to(self.device)
        grids = torch.cat([p.grid for p in images.values()]).to(self.device)
        features = dict(zip(images, self.model.model.get_image_features(pixels, grids).pooler_output))
        table, rows = self.model.get_input_embeddings(), []
        for prompt in prompts:
            row, start, end = table(prompt.ids.to(self.device)), prompt.image_start, prompt.image_start + prompt.image_tokens
            rows.append(torch.cat([row[:start], features[id(prompt.pixels)].to(row.dtype), row[end:]]))
        return rows

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        """Last hidden states [B, T, hidden] of embeds [B, T, hidden] at positions [3, B, T].

        mask: [B, 1, T, T] bool, True where a query (row) may see a key (column); None: all that stand before it.
        The positions are always given: transformers would otherwise keep `rope_deltas` of an earlier call.
        """
        return self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    # ---- Log-probabilities -----------------------------------------------------------------------------------------

    def logprobs(self, prompt: Prompt, completions: list[list[int]], temperature: float = 1.0) -> list[Tensor]:
        """log pi(y_t | prompt, y_<t) of every token of every completion: one float32 tensor [T_i] each.

        `temperature` divides the logits, as it did in sampling. Differentiable unless under `torch.no_grad`.
        """
        embeds, results = self.embed([prompt])[0], []
        for row in _split_into_rows(len(prompt), completions):
            results += self._packed_logprobs(prompt, embeds, row, temperature)
        return results

    def _packed_logprobs(self, prompt: Prompt, prompt_embeds: Tensor, completions, temperature) -> list[Tensor]:
        """One row [prompt | completion_1 | ... ]; the last token of a completion is predicted, never an input."""
        inputs = [torch.tensor(ids[:-1], dtype=torch.long) for ids in completions]
        segment = torch.cat([torch.zeros(len(prompt))] + [torch.full((len(x),), i + 1.0) for i, x in enumerate(inputs)])
        positions = [prompt.positions] + [(prompt.next_position + torch.arange(len(x))).expand(3, -1) for x in inputs]
        embeds = torch.cat([prompt_embeds, self.model.get_input_embeddings()(torch.cat(inputs).to(self.device))])
        hidden = self.forward(
            embeds[None], torch.cat(positions, dim=1)[:, None].to(self.device), packed_mask(segment.to(self.device))
        )[0]
        where, start = [], len(prompt)  # the state that predicts each token: the prompt's last, then the token before
        for ids, x in zip(completions, inputs):
            where += ([len(prompt) - 1] + list(range(start, start + len(x)))) if ids else []
            start += len(x)
        targets = torch.tensor([token for ids in completions for token in ids], dtype=torch.long, device=self.device)
        logp = self._token_logprobs(hidden[torch.tensor(where, dtype=torch.long, device=self.device)], targets, temperature)
        return list(logp.split([len(ids) for ids in completions]))

    def _token_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """[N] log-probabilities of targets [N] from hidden [N, hidden].

        151,936 logits take 0.6 MB a token, so they are made in chunks and, for the backward pass, made again.
        """

        def chunk_logprobs(hidden, targets):
            logits = self.model.lm_head(hidden).float() / temperature
            return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)

        chunks = zip(hidden.split(LOGIT_TOKENS), targets.split(LOGIT_TOKENS))
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(chunk_logprobs, h, t, use_reentrant=False) for h, t in chunks])
        return torch.cat([chunk_logprobs(h, t) for h, t in chunks])


# ---- Positions and masks -----------------------------------------------------------------------------------------------


def rope_positions(text_before: int, grid: list[int], merge: int, text_after: int) -> Tensor:
    """The 3-D positions [3, P] of text, one image and text again (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text counts up by one in all three rows. Image tokens share one temporal position and carry their row and column,
    all offset by where the image starts; text goes on after the largest position the image used.
    grid: the image's patches (time, height, width); merge: patches along one side of an image token.
    """
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    before = torch.arange(text_before).expand(3, -1)
    axes = torch.arange(frames), torch.arange(height), torch.arange(width)
    image = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + text_before
    after = torch.arange(text_after).expand(3, -1) + text_before + max(frames, height, width)
    return torch.cat([before, image, after], dim=1)


def packed_mask(segment: Tensor) -> Tensor:
    """[1, 1, T, T] bool: a token sees what stands before it in the prompt (segment 0) and in its own completion."""
    order = torch.arange(len(segment), device=segment.device)
    shared_or_own = (segment[None, :] == 0) | (segment[None, :] == segment[:, None])
    return (shared_or_own & (order[None, :] <= order[:, None]))[None, None]


def _split_into_rows(prompt_tokens: int, completions: list[list[int]]) -> list[list[list[int]]]:
    """Cuts a group into rows of at most ROW_TOKENS tokens, prompt included; a row has at least one completion."""
    rows, room = [], 0
    for ids in completions:
        if not rows or len(ids) > room:
            rows.append([])
            room = ROW_TOKENS - prompt_tokens
        rows[-1].append(ids)
        room -= len(ids)
    return rows


# ---- Reading a checkpoint ------------------------------------------------------------------------------------------------


def load_config(name_or_path: str | Path) -> Qwen2_5_VLConfig:
    """The checkpoint's configuration, after checking that it is one this project can run. Raises CheckpointError."""
    name = str(name_or_path)
    if Path(name).exists() or name.startswith((".", "/", "~")):
        if not Path(name).is_dir():
            raise CheckpointError(f"there is no model folder {name}")
        if not (Path(name) / "config.json").is_file():
            raise CheckpointError(f"the folder {name} is no checkpoint: it has no config.json")
    try:
        fields = json.loads(_read(name, "config.json") or "null")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no model {name} can be found on this machine or the hub: {_first_line(error)}") from error
    if fields is None:
        raise CheckpointError(f"no model {name} is in the local cache, and the hub has none or cannot be reached from here")
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != "qwen2_5_vl":
        raise CheckpointError(f"{name} is a model of type {kind!r}; only the Qwen2.5-VL family (qwen2_5_vl) is supported")
    if "auto_map" in fields:
        raise CheckpointError(f"{name} asks to run code of its own (auto_map), which is never done here")
    try:
        config = Qwen2_5_VLConfig.from_pretrained(name)
    except Exception as error:
        raise CheckpointError(f"the config.json of {name} is not valid: {_first_line(error)}") from error
    if config.text_config.use_sliding_window:
        raise CheckpointError(f"{name} uses sliding-window attention, which is not supported")
    return config


def load_processors(name_or_path: str | Path) -> tuple:
    """(tokenizer, image processor, text of preprocessor_config.json); needs no torchvision, unlike AutoProcessor."""
    name = str(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        preprocessor_config = _read(name, "preprocessor_config.json")
        if tokenizer.chat_template is None and (template := _read(name, "chat_template.json")):
            tokenizer.chat_template = json.loads(template)["chat_template"]
    except Exception as error:
        raise CheckpointError(f"{name} has no usable tokenizer or image processor: {_first_line(error)}") from error
    if tokenizer.chat_template is None:
        raise CheckpointError(f"{name} has no chat template")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _USER_TEXT}]}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise CheckpointError(f"the chat template of {name} cannot be used: {_first_line(error)}") from error
    if rendered.count(_USER_TEXT) != 1:
        raise CheckpointError(f"the chat template of {name} drops or repeats the user's text")
    return tokenizer, image_processor, preprocessor_config


def _read(name: str, filename: str) -> str | None:
    path = cached_file(name, filename, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path).read_text(encoding="utf-8")


def _require_safetensors(name_or_path: str | Path) -> None:
    folder = Path(name_or_path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        why = "only pickle files, which are never opened here" if pickles else "no weights"
        raise CheckpointError(f"{folder} has {why}; convert them to safetensors")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _end_ids(model) -> list[int]:
    """Every token that ends a turn: published checkpoints name two, <|im_end|> and <|endoftext|>."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.text_config.eos_token_id
    if ids is None:
        raise CheckpointError("the checkpoint names no token that ends a turn (eos_token_id)")
    return [ids] if isinstance(ids, int) else list(ids)


def _vision_ids(config, tokenizer) -> list[int]:
    """Tokens that stand for image data; sampling one would claim an image that is not there."""
    ids = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    return sorted(ids | {i for token, i in tokenizer.get_added_vocab().items() if token == "<|vision_pad|>"})

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import cached_file

ROW_TOKENS = (
    8192  # a longer group is split into several rows: the attention mask of a row takes its length squared
)
BATCH_TOKENS = 8192  # rows are forwarded and differentiated together up to so many tokens,
BATCH_IMAGE_TOKENS = (
    2048  # and so many image tokens: in the image encoder each is four patches, and costs more than text
)
# So many logits are made at a time: 39 MB of float32 on a CPU; a GPU wants larger matrices, and has room for them.
LOGITS = {"cpu": 64 * 151_936, "cuda": 512 * 151_936}
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

    def __init__(
        self, model, tokenizer, image_processor, preprocessor_config: str, max_pixels: int | None = None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.preprocessor_config = preprocessor_config  # as published, so that a saved folder keeps it
        self.image_size = dict(image_processor.size)  # least and most pixels of an image
        if max_pixels is not None:
            self.image_size["longest_edge"] = min(max_pixels, self.image_size["longest_edge"])
            self.image_size["shortest_edge"] = min(
                self.image_size["shortest_edge"], self.image_size["longest_edge"]
            )
        self.checkpointing = False
        self.budget = 1.0  # share of the token budgets that is used; halved when a GPU runs out of memory
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
                name_or_path,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except Exception as error:  # safetensors, JSON and hub errors have no common ancestor
            raise CheckpointError(
                f"the weights of {name_or_path} cannot be loaded: {_first_line(error)}"
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(f"{name_or_path} lacks {len(missing)} weights, {missing[0]} among them")
        model = model.to(device).eval()
        if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
            raise CheckpointError(
                f"{name_or_path} has weights that are not finite numbers, in {broken[0]} for one"
            )
        return cls(model, *load_processors(name_or_path), max_pixels)

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

    def park(self) -> None:
        """Moves the weights to CPU memory; pinned, if they come from a GPU, which then reads them faster."""
        pinned = self.device.type == "cuda"
        self.model.to("cpu")
        if pinned:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.data = tensor.data.pin_memory()

    @contextmanager
    def on(self, device: torch.device | str):
        """Lends frozen weights to a device for the length of a `with` block; nothing is copied back, as nothing changes."""
        tensors = (
            [] if self.device == torch.device(device) else [*self.model.parameters(), *self.model.buffers()]
        )
        home = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(device, non_blocking=True)
            yield self
        finally:
            for tensor, data in zip(tensors, home):
                tensor.data = data

    def checkpoint_activations(self) -> None:
        """From now on the backward pass computes a layer's activations again instead of keeping them: one more forward."""
        self.checkpointing = True
        old_name = self.model.gradient_checkpointing_enable  # of transformers before 5.2x
        getattr(self.model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})

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

    def embed(self, ids: Tensor, prompts: list[Prompt]) -> Tensor:
        """Input embeddings [B, T, hidden] of ids [B, T], whose rows start with these prompts.

        All images are encoded in one pass, each once. Their features are placed by the prompts' own positions, never by
        looking for the image token.
        """
        if self.checkpointing:  # only of use for gradients, and transformers would drop a cache for it
            for layer in (*self.model.model.visual.blocks, *self.model.model.language_model.layers):
                layer.training = torch.is_grad_enabled()
        images = {id(p.pixels): p for p in prompts}  # prompts about one image share its pixels
        pixels = torch.cat([p.pixels for p in images.values()]).to(self.device)
        grids = torch.cat([p.grid for p in images.values()]).to(self.device)
        features = dict(zip(images, self.model.model.get_image_features(pixels, grids).pooler_output))
        table = self.model.get_input_embeddings().weight
        # Of 151,936 embeddings only those of the tokens here have a gradient: a sparse one spares a matrix of zeros. Only
        # where the output matrix is the same tensor, though: its own gradient is dense, and the sum of both is.
        embeds = torch.nn.functional.embedding(ids, table, sparse=table is self.model.lm_head.weight)
        row = torch.cat([torch.full((p.image_tokens,), r) for r, p in enumerate(prompts)]).to(self.device)
        column = torch.cat([torch.arange(p.image_start, p.image_start + p.image_tokens) for p in prompts]).to(
            self.device
        )
        values = torch.cat([features[id(p.pixels)] for p in prompts]).to(embeds.dtype)
        return embeds.index_put((row, column), values)

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        """Last hidden states [B, T, hidden] of embeds [B, T, hidden] at positions [3, B, T].

        mask: [B, 1, T, T] bool, True where a query (row) may see a key (column); None: all that stand before it.
        The positions are always given: transformers would otherwise keep `rope_deltas` of an earlier call.
        """
        if mask is not None:  # as numbers, made once: each layer would make and keep its own
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill_(
                ~mask, -torch.inf
            )
        return self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    # ---- Log-probabilities -----------------------------------------------------------------------------------------

    def logprobs(
        self, prompt: Prompt, completions: list[list[int]], temperature: float = 1.0
    ) -> list[Tensor]:
        """Log pi(y_t | prompt, y_<t) of every token of every completion: one float32 tensor [T_i] each.

        `temperature` divides the logits, as it did in sampling. Differentiable unless under `torch.no_grad`.
        """
        results: list = [None] * len(completions)
        for which, logps in self.packed_logprobs([(prompt, completions)], temperature):
            for (_, i), logp in zip(which, logps):
                results[i] = logp
        return results

    def packed_logprobs(
        self, groups: list[tuple[Prompt, list[list[int]]]], temperature: float = 1.0
    ) -> Iterator:
        """The same for many groups, a batch at a time: yields ([(group, completion), ...], [logp [T_i], ...]).

        Differentiate a batch before asking for the next: then only one batch's activations are in memory at a time.
        """
        for batch in pack(groups, self.budget):
            which = [(row.group, i) for row in batch for i in row.completions]
            yield which, self._batch_logprobs(groups, batch, temperature)

    def _batch_logprobs(self, groups, batch: list["PackedRow"], temperature: float) -> list[Tensor]:
        """A batch of rows [prompt | completion_1 | ...], padded on the right.

        The last token of a completion is predicted, never an input; its first is predicted by the prompt's last.
        """
        length = (
            -(-max(row.length for row in batch) // 8) * 8
        )  # kernels want masks whose rows are multiples of 8
        ids, positions = (
            torch.zeros(len(batch), length, dtype=torch.long),
            torch.zeros(3, len(batch), length, dtype=torch.long),
        )
        segment, where, targets, sizes = torch.full((len(batch), length), -1), [], [], []
        for r, row in enumerate(batch):
            prompt, end = groups[row.group][0], len(groups[row.group][0])
            ids[r, :end], positions[:, r, :end], segment[r, :end] = prompt.ids, prompt.positions, 0
            for number, i in enumerate(row.completions, start=1):
                completion, start = groups[row.group][1][i], end
                end = start + max(0, len(completion) - 1)
                ids[r, start:end], segment[r, start:end] = (
                    torch.tensor(completion[:-1], dtype=torch.long),
                    number,
                )
                positions[:, r, start:end] = prompt.next_position + torch.arange(end - start)
                where += [r * length + t for t in [len(prompt) - 1, *range(start, end)]][: len(completion)]
                targets += completion
                sizes.append(len(completion))
        embeds = self.embed(ids.to(self.device), [groups[row.group][0] for row in batch])
        hidden = self.forward(
            embeds, positions.to(self.device), packed_mask(segment.to(self.device))
        ).flatten(0, 1)
        where, targets = torch.tensor([where, targets], dtype=torch.long, device=self.device)
        return list(self._token_logprobs(hidden[where], targets, temperature).split(sizes))

    def _token_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """[N] log-probabilities of targets [N] from hidden [N, hidden]."""
        size = max(1, LOGITS[self.device.type] // self.model.config.text_config.vocab_size)
        return TargetLogprobs.apply(hidden, self.model.lm_head.weight, targets, temperature, size)


class TargetLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature) at N targets, `size` of them at a time.

    151,936 logits take 0.6 MB a token, so all of them are never there at once: forward keeps only each token's
    log-sum-exp; backward makes a chunk's logits z again, turns them in place into

        d log p(target) / d z_v = 1[v = target] - softmax(z)_v

    and multiplies that into the gradients of hidden and W.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, size: int
    ) -> Tensor:
        logps, totals = [], []
        for h, target in zip(hidden.split(size), targets.split(size)):
            logits = (h @ weight.T).float().div_(temperature)
            totals.append(logits.logsumexp(dim=1))
            logps.append(logits.gather(1, target[:, None])[:, 0] - totals[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(totals))
        ctx.temperature, ctx.size = temperature, size
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        hidden, weight, targets, totals = ctx.saved_tensors
        grad_hidden, grad_weight = (
            torch.empty_like(hidden),
            torch.zeros_like(weight) if ctx.needs_input_grad[1] else None,
        )
        pieces = zip(
            *(
                x.split(ctx.size)
                for x in (hidden, targets[:, None], totals[:, None], gradient[:, None], grad_hidden)
            )
        )
        for h, target, total, g, out in pieces:
            g = g / ctx.temperature
            z = (h @ weight.T).float().div_(ctx.temperature).sub_(total).exp_().mul_(-g)
            z = z.scatter_add_(1, target, g).to(weight.dtype)
            torch.mm(z, weight, out=out)
            if grad_weight is not None:
                grad_weight.addmm_(z.T, h)
        return grad_hidden, grad_weight, None, None, None


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
    """[B, 1, T, T] bool for segment [B, T]: 0 is the prompt, 1, 2, ... its completions, -1 padding.

    A token sees what stands before it in the prompt and in its own completion. Padding sees at least itself: a softmax
    over nothing would be NaN.
    """
    order = torch.arange(segment.shape[1], device=segment.device)
    shared_or_own = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return (shared_or_own & (order[None, :] <= order[:, None]))[:, None]


@dataclass(frozen=True)
class PackedRow:
    """Which completions of which group share a row, and how many tokens it has."""

    group: int
    completions: list[int]
    length: int


def pack(groups: list[tuple[Prompt, list[list[int]]]], budget: float = 1.0) -> list[list[PackedRow]]:
    """Cuts groups into rows of at most ROW_TOKENS tokens, and gathers rows into batches of at most BATCH_TOKENS and
    BATCH_IMAGE_TOKENS.

    budget: the share of these that is used.

    A row has at least one completion and a batch at least one row, however long. Rows of similar length go together,
    as the shorter ones are padded to the longest.
    """
    rows, batches = [], []
    for g, (prompt, completions) in enumerate(groups):
        fresh = len(rows)
        for i, ids in enumerate(completions):
            if len(rows) == fresh or rows[-1].length + len(ids) > ROW_TOKENS * budget:
                rows.append(PackedRow(g, [], len(prompt)))
            rows[-1] = PackedRow(g, [*rows[-1].completions, i], rows[-1].length + max(0, len(ids) - 1))
    images = 0
    for row in sorted(rows, key=lambda row: -row.length):
        images += groups[row.group][0].image_tokens
        full = batches and (len(batches[-1]) + 1) * batches[-1][0].length > BATCH_TOKENS * budget
        if not batches or full or images > BATCH_IMAGE_TOKENS * budget:
            batches.append([])
            images = groups[row.group][0].image_tokens
        batches[-1].append(row)
    return batches


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
        raise CheckpointError(
            f"no model {name} can be found on this machine or the hub: {_first_line(error)}"
        ) from error
    if fields is None:
        raise CheckpointError(
            f"no model {name} is in the local cache, and the hub has none or cannot be reached from here"
        )
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != "qwen2_5_vl":
        raise CheckpointError(
            f"{name} is a model of type {kind!r}; only the Qwen2.5-VL family (qwen2_5_vl) is supported"
        )
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if '"auto_map"' in (_read(name, file) or ""):
            raise CheckpointError(
                f"{name} asks to run code of its own (auto_map in {file}), which is never done here"
            )
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
        raise CheckpointError(
            f"{name} has no usable tokenizer or image processor: {_first_line(error)}"
        ) from error
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
    ids = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    }
    return sorted(ids | {i for token, i in tokenizer.get_added_vocab().items() if token == "<|vision_pad|>"})

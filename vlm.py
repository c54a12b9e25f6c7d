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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from engine import checkpoint
from engine.checkpoint import USER_TEXT, CheckpointError, end_ids, first_line, load_config, load_processors
from packing import LOGITS, PackedRow, TargetLogprobs, pack, packed_mask


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

    def __init__(self, model, tokenizer, image_processor, source: Path, max_pixels: int | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.source = source  # the folder that it was loaded from, whose files a saved one keeps
        self.image_size = dict(image_processor.size)  # least and most pixels of an image
        if max_pixels is not None:
            self.image_size["longest_edge"] = min(max_pixels, self.image_size["longest_edge"])
            self.image_size["shortest_edge"] = min(
                self.image_size["shortest_edge"], self.image_size["longest_edge"]
            )
        self.checkpointing = False
        self.budget = 1.0  # share of the token budgets that is used; halved when a GPU runs out of memory
        self.end_ids = end_ids(source, tokenizer)
        self.vision_ids = checkpoint.vision_ids(model.config, tokenizer)

    @classmethod
    def load(cls, name_or_path: str | Path, device=None, dtype=None, max_pixels: int | None = None) -> "VLM":
        """Loads a local folder or a hub id; safetensors only, and no code from the checkpoint is ever run.

        device: default "cuda" if there is one, else "cpu". dtype: default bfloat16 on CUDA, else float32; a
        torch.dtype or its name. max_pixels: images are scaled down to so many pixels, if the checkpoint's own
        limit is not lower. Raises CheckpointError with a sentence for the user.
        """
        device = checkpoint.check_device(device)
        dtype = checkpoint.check_dtype(dtype, device)
        config, processors = load_config(name_or_path), load_processors(name_or_path)
        folder = checkpoint.resolve(name_or_path, weights=True)
        checkpoint.check_weights(folder, config.tie_word_embeddings)
        try:
            model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except Exception as error:  # safetensors, JSON and hub errors have no common ancestor
            raise CheckpointError(
                f"the weights of {name_or_path} cannot be loaded: {first_line(error)}"
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(f"{name_or_path} lacks {len(missing)} weights, {missing[0]} among them")
        model = model.to(device).eval()
        if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
            raise CheckpointError(
                f"{name_or_path} has weights that are not finite numbers, in {broken[0]} for one"
            )
        return cls(model, *processors, max_pixels)

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face checkpoint folder, which transformers 4 and 5 (and so vLLM) load."""
        checkpoint.save(self, Path(path))

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
        rendered = checkpoint.render(self.tokenizer, system)
        before, after = rendered.split(USER_TEXT)
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

    def _batch_logprobs(self, groups, batch: list[PackedRow], temperature: float) -> list[Tensor]:
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

"""A vision-language model of a family in families/: load, save, turn an image and a text into a prompt, and
give

    log pi_theta(y_t | image, x, y_<t)        for every token t of a completion y,

differentiably: the quantity that GRPO is made of. The transformer itself is transformers' module; everything
around it that usually goes wrong is here, in the open: where image features go, which 3-D position each token
has, and (in packing.py) which token may see which.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import CheckpointError, end_ids, first_line, load_config, load_processors
from families import FAMILIES, encode_images
from packing import PackedBatch, lay_out, pack, packed_mask, token_logprobs
from prompts import Patches, Prompt, arrange, make_prompt


@dataclass
class Limits:
    """What is known of the GPU: which shares of the token budgets and of the rows of a rollout fit, if it can
    record steps, and if torch can compile for it."""

    budget: float = 1.0
    rows: float = 1.0
    record: bool = True
    compile: bool = True


class VLM:
    """The model with its tokenizer and image processor. `VLM.model` is the transformers module."""

    def __init__(self, model, tokenizer, image_processor, source: Path, max_pixels: int | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.source = source  # the folder that it was loaded from, whose files a saved one keeps
        self.image_size = checkpoint.pixel_limits(image_processor, max_pixels)
        self.token_side = checkpoint.token_side(model.config)  # pixels along one side of an image token
        self.device = model.device  # where it computes
        self.parked = False
        self.limits = Limits()
        self.end_ids = end_ids(source, tokenizer)
        self.opened_thought = checkpoint.opened_thought(tokenizer)
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
            model, report = FAMILIES[config.model_type].MODEL.from_pretrained(
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
        """Independent weights; what is frozen is shared, as are tokenizer and image processor."""
        twin = copy.copy(self)
        twin.model, twin.parked = copy_model(self.model), False
        if self.parked:
            twin.park()
        return twin

    # ---- Where the weights are -----------------------------------------------------------------------------

    def park(self) -> None:
        """From now on the weights are in CPU memory, and on the device only while they work (see `present`).

        They share one buffer, as pinned memory, which a GPU reads fastest, is rounded up to a power of two
        each time it is asked for.
        """
        if self.parked:
            return
        tensors, pinned = self._tensors(), self.device.type == "cuda"
        flat = torch.empty(sum(_padded_bytes(t) for t in tensors), dtype=torch.uint8, pin_memory=pinned)
        start = 0
        for tensor in tensors:
            place = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += _padded_bytes(tensor)
            tensor.data = place.copy_(tensor.data)
        self.parked = True

    def unpark(self) -> None:
        """Brings the weights back to the device for good."""
        if self.parked:
            self.model.to(self.device)
            self.parked = False

    @contextmanager
    def present(self):
        """Has the weights on the device for the length of a `with` block.

        Nothing is copied back: who changes weights that are parked changes them where they are parked.
        """
        if not self.parked:
            yield self
            return
        tensors = self._tensors()
        home, self.parked = [tensor.data for tensor in tensors], False
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield self
        finally:
            for tensor, data in zip(tensors, home):
                tensor.data = data
            self.parked = True

    def _tensors(self) -> list[Tensor]:
        """What is parked: frozen weights are not, as several copies share them."""
        return [*(p for p in self.model.parameters() if p.requires_grad), *self.model.buffers()]

    def trained_weights(self) -> dict[str, Tensor]:
        """All that training changes, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def use_less_memory(self) -> None:
        """After the GPU ran out of memory: from now on half as many tokens at a time. Raises OutOfMemoryError
        at the end.

        Roles that are copies of one another share this: they share the GPU, too.
        """
        if max(self.limits.budget, self.limits.rows) <= 1 / 64:
            raise torch.OutOfMemoryError("the smallest batches are still too large")
        self.limits.budget, self.limits.rows = self.limits.budget / 2, self.limits.rows / 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- Text and image -> prompt --------------------------------------------------------------------------

    def patches(self, image: Image.Image) -> Patches:
        """Scales an image and cuts it into patches. Do it once and give it to `prompt` to ask many
        questions."""
        made = self.image_processor(images=[image.convert("RGB")], size=self.image_size, return_tensors="pt")
        return Patches(made["pixel_values"], made["image_grid_thw"])

    def prompt(
        self,
        text: str,
        image: Image.Image | Patches | Sequence[Image.Image | Patches],
        system: str | None = None,
    ) -> Prompt:
        """Encodes a user turn, the image and then the text, with the checkpoint's own chat template.

        Of a list of images each stands where the text says <image 1>, <image 2>, ... (see `arrange`).
        `text` is data: a control token spelled out in it (`<|im_end|>`, `<|image_pad|>`) is encoded as plain
        characters and cannot forge a turn or an image. Raises ValueError for an image more than 200 times as
        wide as high or the other way round.
        """
        several = isinstance(image, Sequence)
        images, parts = (image, arrange(text, len(image))) if several else ([image], [0, text])
        numbers = [part for part in parts if isinstance(part, int)]
        texts = [part for part in parts if isinstance(part, str)]
        rendered = checkpoint.render(self.tokenizer, system, [isinstance(part, int) for part in parts])
        ids = checkpoint.encode_turn(self.tokenizer, rendered, texts)
        patches = [image if isinstance(image, Patches) else self.patches(image) for image in images]
        config = self.model.config
        merge = config.vision_config.spatial_merge_size
        return make_prompt(ids, config.image_token_id, [patches[n] for n in numbers], merge)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of token ids, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def output_text(self, ids: list[int]) -> str:
        """Returns the text of a completion, behind the <think> that the chat template may have begun it with.

        So a thought that was cut off is seen to be one, and a box in it is no answer.
        """
        return self.opened_thought + self.decode(ids)

    # ---- Log-probabilities ---------------------------------------------------------------------------------

    def logprobs(
        self, prompt: Prompt, completions: list[list[int]], temperature: float = 1.0
    ) -> list[Tensor]:
        """log pi(y_t | prompt, y_<t) of every token of every completion: one float32 tensor [T_i] each.

        `temperature` divides the logits, as it did in sampling. Differentiable unless under `torch.no_grad`.
        """
        results: list = [None] * len(completions)
        for which, logps, _ in self.batches([(prompt, completions)], temperature):
            for (_, i), logp in zip(which, logps):
                results[i] = logp
        return results

    def batches(self, groups: list[tuple[Prompt, list[list[int]]]], temperature: float = 1.0) -> Iterator:
        """The same for many groups, a batch at a time: yields ([(group, completion), ...], [logp [T_i], ...],
        share).

        share: that of the batch in all completions. Differentiate a batch before asking for the next: then
        only one batch's activations are in memory at a time.
        """
        forward = PackedForward(self.model, limits=self.limits)
        total = sum(len(completions) for _, completions in groups)
        with self.present():
            for rows in pack(groups, self.limits.budget):
                batch = lay_out(groups, rows)
                logps = forward(batch, temperature).split(batch.sizes)
                yield batch.which, list(logps), len(batch.which) / total


# ---- Forward -----------------------------------------------------------------------------------------------


class PackedForward(torch.nn.Module):
    """The model as GRPO sees it: a packed batch in, the log-probabilities [N] of its completions' tokens out.

    A module, so that the whole of it can be sharded over processes (see engine/shards.py). With
    `checkpointing` the backward pass computes a layer's activations again instead of keeping them: one more
    forward. limits: how many logits are made at a time (see `Limits`).
    """

    def __init__(self, model, checkpointing: bool = False, limits: Limits | None = None):
        super().__init__()
        self.model, self.checkpointing, self.limits = model, checkpointing, limits or Limits()
        if checkpointing:
            new_name = "activation_checkpointing_enable"  # since transformers 5.2x
            enable = getattr(model, new_name if hasattr(model, new_name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False})

    def forward(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Log-probabilities [N], float32, of `batch.targets`; `temperature` divides the logits."""
        layers = (*self.model.model.visual.blocks, *self.model.model.language_model.layers)
        for layer in layers:  # a layer checkpoints itself while it is told that it trains
            layer.training = self.checkpointing and torch.is_grad_enabled()
        device = self.model.lm_head.weight.device
        embeds = embed(self.model, batch.ids.to(device), batch.prompts)
        mask = packed_mask(batch.segment.to(device))
        hidden = hidden_states(self.model, embeds, batch.positions.to(device), mask).flatten(0, 1)
        for layer in layers:
            layer.training = False
        where, targets = batch.where.to(device), batch.targets.to(device)
        weight = self.model.lm_head.weight
        return token_logprobs(hidden[where], weight, targets, temperature, self.limits.budget)


def copy_model(model):
    """A copy that shares the frozen weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def embed(model, ids: Tensor, prompts: list[Prompt]) -> Tensor:
    """Input embeddings [B, T, hidden * depths] of ids [B, T], whose rows start with these prompts.

    Features are placed by the prompts' own positions, never by looking for the image token. What is added
    after the first layers stands behind what is embedded: 0 where there is no image.
    """
    device = ids.device
    images = {id(image): image for p in prompts for image in p.images}
    features = dict(zip(images, image_features(model.model.visual, list(images.values()), device)))
    embeds = model.get_input_embeddings()(ids)
    row = torch.cat([torch.full((p.image_tokens,), r) for r, p in enumerate(prompts)]).to(device)
    column = torch.cat([p.places for p in prompts]).to(device)
    values = torch.cat([features[id(image)] for p in prompts for image in p.images]).to(embeds.dtype)
    later = embeds.new_zeros(*ids.shape, values.shape[1] - embeds.shape[2])
    return torch.cat([embeds, later], dim=2).index_put((row, column), values)


def image_features(visual, images: list[Patches], device: torch.device) -> list[Tensor]:
    """The features [tokens, hidden * depths] of each image, all that are needed made in one pass.

    A frozen encoder makes the same every time: kept beside the image, they serve both roles, rollouts,
    reference and update. In CPU memory, where they take a fifth of what the pixels take.
    """
    weight, frozen = next(visual.parameters()), not any(p.requires_grad for p in visual.parameters())
    new = [i for i in images if not frozen or i.features is None or i.features[0] is not weight]
    made = []
    if new:
        pixels = torch.cat([image.pixels for image in new]).to(device)
        made = encode_images(visual, pixels, torch.cat([image.grid for image in new]))
    if not frozen:
        return made
    for image, features in zip(new, made):
        image.features = weight, features.detach().cpu()
    return [image.features[1].to(device) for image in images]


def hidden_states(model, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache=None) -> Tensor:
    """Last hidden states [B, T, hidden] of embeds [B, T, hidden * depths] at positions [3, B, T].

    mask: [B, 1, T, T] bool, True where a query (row) may see a key (column); None: all that stand before it.
    The text model's layers one after the other: its own forward takes masks and features in another form for
    each family.
    """
    text = model.model.language_model
    if mask is not None:  # as numbers, made once: each layer would make and keep its own
        numbers = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device)
        mask = numbers.masked_fill_(~mask, -torch.inf)
    x, *later = embeds.split(text.config.hidden_size, dim=2)
    rotation = text.rotary_emb(x, positions)
    for number, layer in enumerate(text.layers):
        x = layer(x, attention_mask=mask, position_embeddings=rotation, past_key_values=cache)
        x = x + later[number] if number < len(later) else x
    return text.norm(x)


def _padded_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // 256) * 256  # so that each tensor in a shared buffer starts where its dtype may

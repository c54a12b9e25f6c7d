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
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from model import checkpoint
from model import prompt as prompt_module
from model.checkpoint import Checkpoint, CheckpointError, explained, find_weights, open_checkpoint
from model.logprobs import PackedForward
from model.offload import Fallbacks, _padded_bytes, copy_model
from model.packing import lay_out, pack
from model.prompt import Patches, Prompt, arrange, make_prompt


class VLM:
    """The model with its tokenizer and image processor. `VLM.model` is the transformers module."""

    def __init__(self, model, opened: Checkpoint, max_pixels: int | None = None):
        self.model = model
        self.tokenizer = opened.tokenizer
        self.image_processor = opened.image_processor
        self.source = opened.folder  # a saved folder keeps its files
        self.end_ids = opened.end_ids  # tokens that end a turn
        self.image_size = opened.pixel_limits(max_pixels)
        self.token_side = opened.token_side  # pixels along one side of an image token
        self.vision_ids = opened.vision_ids  # never sampled
        self.opened_thought = prompt_module.opened_thought(opened.tokenizer)
        self.device = model.device  # where it computes
        self.offloaded = False
        self.fallbacks = Fallbacks()

    @classmethod
    def load(
        cls, name_or_path: str | Path | Checkpoint, device=None, dtype=None, max_pixels: int | None = None
    ) -> "VLM":
        """Loads a local folder, a hub id or an opened checkpoint: safetensors only, none of its code is run.

        device: default "cuda" if there is one, else "cpu". dtype: default bfloat16 on CUDA, else float32; a
        torch.dtype or its name. max_pixels: images are scaled down to so many pixels, if the checkpoint's own
        limit is not lower. Raises CheckpointError with a sentence for the user.
        """
        device = checkpoint.find_device(device)
        dtype = checkpoint.find_dtype(dtype, device)
        opened = name_or_path if isinstance(name_or_path, Checkpoint) else open_checkpoint(name_or_path)
        folder = find_weights(opened)
        with explained(f"the weights of {opened.name} cannot be loaded"):
            model, report = opened.family.MODEL.from_pretrained(
                folder,
                config=opened.config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(f"{opened.name} lacks {len(missing)} weights, {missing[0]} among them")
        model = model.to(device).eval()
        if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
            raise CheckpointError(
                f"{opened.name} has weights that are not finite numbers, in {broken[0]} for one"
            )
        return cls(model, opened, max_pixels)

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face checkpoint folder, which transformers 4 and 5 (and so vLLM) load."""
        checkpoint.save(self, Path(path))

    def copy(self) -> "VLM":
        """Independent weights; what is frozen is shared, as are tokenizer and image processor."""
        twin = copy.copy(self)
        twin.model, twin.offloaded = copy_model(self.model), False
        if self.offloaded:
            twin.offload()
        return twin

    # ---- Where the weights are -----------------------------------------------------------------------------

    def offload(self) -> None:
        """From now on the weights are in CPU memory, and on the device only while they work (see `present`).

        They share one buffer, as pinned memory, which a GPU reads fastest, is rounded up to a power of two
        each time it is asked for.
        """
        if self.offloaded:
            return
        tensors, pinned = self._tensors(), self.device.type == "cuda"
        flat = torch.empty(sum(_padded_bytes(t) for t in tensors), dtype=torch.uint8, pin_memory=pinned)
        start = 0
        for tensor in tensors:
            place = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += _padded_bytes(tensor)
            tensor.data = place.copy_(tensor.data)
        self.offloaded = True

    def load_to_device(self) -> None:
        """Brings the weights back to the device for good."""
        if self.offloaded:
            self.model.to(self.device)
            self.offloaded = False

    @contextmanager
    def on_device(self):
        """Has the weights on the device for the length of a `with` block.

        Nothing is copied back: who changes weights that are parked changes them where they are parked.
        """
        if not self.offloaded:
            yield self
            return
        tensors = self._tensors()
        home, self.offloaded = [tensor.data for tensor in tensors], False
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            yield self
        finally:
            for tensor, data in zip(tensors, home):
                tensor.data = data
            self.offloaded = True

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
        if max(self.fallbacks.batch_scale, self.fallbacks.row_scale) <= 1 / 64:
            raise torch.OutOfMemoryError("the smallest batches are still too large")
        self.fallbacks.batch_scale, self.fallbacks.row_scale = (
            self.fallbacks.batch_scale / 2,
            self.fallbacks.row_scale / 2,
        )
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
        ids = prompt_module.encode_turn(self.tokenizer, rendered, texts)
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
        forward = PackedForward(self.model, fallbacks=self.fallbacks)
        total = sum(len(completions) for _, completions in groups)
        with self.on_device():
            for rows in pack(groups, self.fallbacks.batch_scale):
                batch = lay_out(groups, rows)
                logps = forward(batch, temperature).split(batch.sizes)
                yield batch.which, list(logps), len(batch.which) / total


# ---- Forward -----------------------------------------------------------------------------------------------

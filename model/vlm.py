"""A vision-language model: load, save, turn images and a text into a prompt, and give

    log pi_theta(y_t | image, x, y_<t)        for every token t of a completion y,

differentiably: the quantity that GRPO is made of. The layers are transformers' own. What usually goes wrong
around them is here in the open: where image features go (forward.py), which 3-D position each token has
(prompt.py), and which token may see which (packing.py).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError, explained, find_weights, open_checkpoint
from model.logprobs import PackedForward
from model.offload import (
    Fallbacks,
    copied_to,
    copy_model,
    move_to_cpu,
    offloadable,
    retry_with_less_memory,
)
from model.packing import Continuation, lay_out, pack
from model.prompt import (
    Patches,
    Prompt,
    arrange,
    encode_turn,
    make_prompt,
    opened_thought,
    render,
)


class VLM:
    """The model with its tokenizer and image processor. `VLM.model` is the transformers module."""

    def __init__(self, model, opened: Checkpoint, max_pixels: int | None = None):
        # cuDNN's masked attention gives NaN gradients for some lengths (pytorch#196678). All that computes
        # holds a VLM: rollouts, the image encoder, updates, evaluation.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = model
        self.tokenizer = opened.tokenizer
        self.image_processor = opened.image_processor
        self.source = opened.folder  # a saved folder keeps its files
        self.config = opened.config  # as it is published; that of the model has the dtype of now
        self.end_ids = opened.end_ids  # tokens that end a turn
        self.image_size = opened.pixel_limits(max_pixels)
        self.token_side = opened.token_side  # pixels along one side of an image token
        self.vision_ids = opened.vision_ids  # never sampled
        self.opened_thought = opened_thought(opened.tokenizer)
        self.device = model.device  # where it computes
        self.offloaded = False
        self.fallbacks = Fallbacks()

    @classmethod
    def load(
        cls,
        name_or_path: str | Path | Checkpoint,
        device=None,
        dtype=None,
        max_pixels: int | None = None,
    ) -> "VLM":
        """Loads a local folder, a hub id or an opened checkpoint: safetensors only, none of its code is run.

        device: default "cuda" if there is one, else "cpu". dtype: default bfloat16 on CUDA, else float32; a
        torch.dtype or its name. max_pixels: images are scaled down to so many pixels, if the checkpoint's own
        limit is not lower. Raises CheckpointError with a sentence for the user.
        """
        device = checkpoint.find_device(device)
        dtype = checkpoint.find_dtype(dtype, device)
        opened = name_or_path
        if not isinstance(opened, Checkpoint):
            opened = open_checkpoint(opened)
        files = find_weights(opened)
        with explained(f"the weights of {opened.name} cannot be loaded"), ExitStack() as stack:
            # Given a folder, transformers may take others than these: an adapter's, for one.
            tensors = {
                file: stack.enter_context(safe_open(file, "pt")) for file in {*files.values()}
            }
            model, report = opened.family.MODEL.from_pretrained(
                None,
                state_dict={name: tensors[file].get_slice(name) for name, file in files.items()},
                config=opened.config,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{opened.name} lacks weights: {len(missing)}, {missing[0]} for one"
            )
        model = model.to(device).eval()
        weights = model.named_parameters()
        broken = [name for name, weight in weights if not weight.isfinite().all()]
        if broken:
            raise CheckpointError(
                f"{opened.name} has weights that are not finite numbers, in {broken[0]} for one"
            )
        return cls(model, opened, max_pixels)

    def save(self, path: str | Path) -> None:
        """Writes a Hugging Face checkpoint folder, which transformers 4 and 5 (and so vLLM) load."""
        checkpoint.save(self, Path(path))

    def copy(self) -> "VLM":
        """Returns a copy with its own trained weights; what is frozen is shared, and so is the tokenizer."""
        twin = copy.copy(self)
        twin.model = copy_model(self.model)
        twin.offloaded = False
        if self.offloaded:
            twin.offload()
        return twin

    # ---- Where the weights are -----------------------------------------------------------------------------

    def offload(self) -> None:
        """Moves the weights to CPU memory; from now on `on_device` has them on the device while they work."""
        if not self.offloaded:
            move_to_cpu(offloadable(self.model), pinned=self.device.type == "cuda")
            self.offloaded = True

    def load_to_device(self) -> None:
        """Brings the weights back to the device for good."""
        if self.offloaded:
            self.model.to(self.device)
            self.offloaded = False

    @contextmanager
    def on_device(self):
        """Has the weights on the device for the length of a `with` block.

        Nothing is copied back: who changes offloaded weights changes them in CPU memory.
        """
        if not self.offloaded:
            yield self
            return
        self.offloaded = False
        try:
            with copied_to(self.device, offloadable(self.model)):
                yield self
        finally:
            self.offloaded = True

    def trained_weights(self) -> dict[str, Tensor]:
        """Returns all that training changes, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def use_less_memory(self) -> None:
        """Halves the batches from now on, after the GPU ran out of memory.

        Roles that are copies of one another share this, as they share the GPU. Raises OutOfMemoryError if the
        batches are the smallest already.
        """
        fallbacks = self.fallbacks
        if max(fallbacks.batch_scale, fallbacks.row_scale) <= 1 / 64:
            raise torch.OutOfMemoryError("the smallest batches are still too large")
        fallbacks.batch_scale /= 2
        fallbacks.row_scale /= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- Text and image -> prompt --------------------------------------------------------------------------

    def patches(self, image: Image.Image) -> Patches:
        """Scales an image and cuts it into patches: done once, they serve many prompts about it."""
        made = self.image_processor(
            images=[image.convert("RGB")], size=self.image_size, return_tensors="pt"
        )
        return Patches(made["pixel_values"], made["image_grid_thw"])

    def prompt(
        self,
        text: str,
        image: Image.Image | Patches | Sequence[Image.Image | Patches],
        system: str | None = None,
    ) -> Prompt:
        """Encodes a user turn with the checkpoint's own chat template: the image, then the text.

        Of a list of images each stands where the text says <image 1>, <image 2>, ... (see `arrange`).
        `text` is data: a control token spelled out in it (`<|im_end|>`, `<|image_pad|>`) is encoded as plain
        characters and cannot forge a turn or an image. Raises ValueError for no image, and for one more than
        200 times as wide as high or the other way round.
        """
        # The turn in order.
        parts = [image, text]
        if isinstance(image, Sequence):
            if not image:
                raise ValueError("a prompt needs at least one image")
            parts = arrange(text, image)

        # Its tokens, with one image token for each image.
        is_image = [not isinstance(part, str) for part in parts]
        rendered = render(self.tokenizer, system, is_image)
        texts = [part for part in parts if isinstance(part, str)]
        ids = encode_turn(self.tokenizer, rendered, texts)

        # As many image tokens as each image has features.
        images = [part for part in parts if not isinstance(part, str)]
        patches = [each if isinstance(each, Patches) else self.patches(each) for each in images]
        merge = self.config.vision_config.spatial_merge_size
        return make_prompt(ids, self.config.image_token_id, patches, merge)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of token ids, without control tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def output_text(self, ids: list[int]) -> str:
        """Returns the text of a completion, behind the <think> that the chat template may have begun it with.

        So a thought that was cut off is seen to be one, and a box in it is no answer.
        """
        return self.opened_thought + self.decode(ids)

    def is_cut_off(self, ids: list[int]) -> bool:
        """Tells if a completion ended at the length limit, before a token that ends a turn."""
        return not ids or ids[-1] not in self.end_ids

    # ---- Log-probabilities ---------------------------------------------------------------------------------

    def logprobs(
        self, prompt: Prompt, completions: list[list[int]], temperature: float = 1.0
    ) -> list[Tensor]:
        """Returns log pi(y_t | prompt, y_<t) of every token: one float32 tensor [T_i] a completion.

        `temperature` divides the logits, as it did in sampling. Differentiable unless under `torch.no_grad`.
        """
        group = [Continuation(prompt, tokens) for tokens in completions]
        found: dict[int, Tensor] = {}
        for batch, logps, _ in self.batches(group, temperature):
            found |= {id(completion): logp for completion, logp in zip(batch, logps)}
        return [found[id(completion)] for completion in group]

    def batches(self, completions: list, temperature: float = 1.0) -> Iterator:
        """Yields completions a batch at a time, with their log-probabilities [T_i] and the batch's weight.

        completions: `grpo.Completion`, those of one prompt one after the other. The weight is the batch's
        part of all completions. Differentiate a batch before you ask for the next: then only one batch's
        activations are in memory at a time.
        """
        forward = PackedForward(self.model, False, self.fallbacks)
        with self.on_device():
            for rows in pack(completions, self.fallbacks.batch_scale):
                batch = lay_out(rows)
                logps = forward(batch, temperature).split(batch.sizes)
                yield batch.completions, list(logps), len(batch.completions) / len(completions)

    def retry(self, attempt: Callable[[], Any]) -> Any:
        """Returns attempt(). Tries again with smaller batches whenever the GPU runs out of memory."""
        return retry_with_less_memory(attempt, self.use_less_memory)

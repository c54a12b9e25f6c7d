"""A prompt as the model reads it: tokens, images, and where each of them is.

Texts and images stand in any order; all that a prompt is, is worked out here but for the tokens themselves
(vlm.py), which the checkpoint's own chat template decides.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor


@dataclass(eq=False)
class Patches:
    """An image as the model reads it, and its features. Prompts about one image share it."""

    pixels: Tensor  # [patches, channels * 2 * side * side] float32, the image as flattened patches
    grid: Tensor  # [1, 3] int64, the image's patches in time, height and width
    # Once a frozen encoder has seen it: a weight of that encoder, to know it by, and the features
    # [image_tokens, hidden * depths] in CPU memory (see `forward.image_features`).
    features: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: text with images in it, ending where the assistant starts to write (P tokens)."""

    ids: Tensor  # [P] int64, the image token repeated once per image feature
    positions: Tensor  # [3, P] int64, the temporal, vertical and horizontal position of every token
    images: tuple[Patches, ...]  # as they come in the prompt
    places: Tensor  # [image_tokens] where in `ids` their features go

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        """Counts the image features that it takes."""
        return len(self.places)

    @property
    def next_position(self) -> int:
        """Returns the position of the first token that the assistant writes."""
        return int(self.positions.max()) + 1


def split_prompt(prompt: Prompt) -> int:
    """Returns where a prompt's tail begins: behind the last image and the token that ends it.

    Prompts about the same images share what stands before. At least one token is behind.
    """
    return min(int(prompt.places[-1]) + 2, len(prompt) - 1)


def make_prompt(ids: list[int], image_token: int, images: list[Patches], merge: int) -> Prompt:
    """Makes the prompt of ids, in which one image token stands for each image.

    merge: patches along one side of an image token. Raises ValueError if there are more or fewer image tokens
    than images. Text and an image of 4 x 6 patches with merge = 2, in tokens:

        ids       a  <image>  b              becomes    a  <image> x 6  b
        places    1  2  3  4  5  6
    """
    tokens = torch.tensor(ids)
    is_image = tokens == image_token
    if is_image.sum() != len(images):
        raise ValueError(f"image tokens in the prompt: {is_image.sum()}, images: {len(images)}")
    grids = [image.grid[0].tolist() for image in images]
    # An image's one token is repeated for each of its features.
    counts = torch.ones_like(tokens)
    features = [math.prod(grid) // merge**2 for grid in grids]
    counts[is_image] = counts.new_tensor(features)
    starts = (counts.cumsum(0) - counts)[is_image]
    tokens = tokens.repeat_interleave(counts)
    positions = rope_positions(starts.tolist(), grids, merge, len(tokens))
    places = (tokens == image_token).nonzero()[:, 0]
    return Prompt(tokens, positions, tuple(images), places)


def rope_positions(starts: list[int], grids: list[list[int]], merge: int, length: int) -> Tensor:
    """Returns the 3-D positions [3, length] of text with images (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text counts up by one in all three rows. Image tokens share one temporal position and carry their row and
    column, all offset by where the image starts; text goes on after the largest position the image used. Two
    tokens of text, an image of 2 x 3 tokens, two tokens of text:

        tokens      a  b  <  image  2 x 3 >  c  d
        temporal    0  1  2  2  2  2  2  2   5  6
        vertical    0  1  2  2  2  3  3  3   5  6
        horizontal  0  1  2  3  4  2  3  4   5  6

    starts: of each image, its first token (here 2); grids: its patches in time, height and width; merge:
    patches along one side of an image token.
    """
    positions = torch.arange(length).repeat(3, 1)
    for start, (frames, height, width) in zip(starts, grids):
        sides = (frames, height // merge, width // merge)
        end = start + math.prod(sides)
        ranges = [torch.arange(side) for side in sides]
        axes = torch.meshgrid(ranges, indexing="ij")
        image = torch.stack(axes).flatten(1)  # [3, tokens]
        positions[:, start:end] = image + positions[:, start, None]
        # What follows moves up or back to behind the image's largest position.
        positions[:, end:] += max(sides) - (end - start)
    return positions


def arrange(text: str, images: Sequence) -> list:
    """Splits a text where it names images; returns texts and images in the prompt's order.

    An image stands where the text first says <image 1>, <image 2>, ...; those that it does not name come
    first. A name that comes again stays in the text, as does one of no image. With three images a, b, c:

        "What is <image 2> of <image 1>?"   ->   [c, "What is ", b, " of ", a, "?"]
    """
    names = {f"<image {number}>": image for number, image in enumerate(images, start=1)}
    parts = [image for name, image in names.items() if name not in text]
    named = [name for name in names if name in text]
    for name in sorted(named, key=text.index):
        before, _, text = text.partition(name)
        parts += [before, names[name]]
    parts.append(text)
    return [part for part in parts if part != ""]


USER_TEXT = "\x01user text\x01"  # stands for the user's text while the chat template is rendered


def render(tokenizer, system: str | None = None, images: Sequence[bool] = (True, False)) -> str:
    """Renders the chat template, up to where the assistant starts to write.

    images: the user's turn in order, True for an image and False for a text, which stands as USER_TEXT.
    """
    messages: list[dict] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    content: list[dict] = []
    for image in images:
        content.append({"type": "image"} if image else {"type": "text", "text": USER_TEXT})
    messages.append({"role": "user", "content": content})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def opened_thought(tokenizer) -> str:
    """Returns "<think>\\n" if the template writes it for the assistant and leaves it open, else "".

    Thinking models' templates do: their outputs then hold </think> alone, or nothing when they are cut off.
    """
    ending = render(tokenizer).rpartition(USER_TEXT)[2]
    return "<think>\n" if ending.rstrip().endswith("<think>") else ""


def encode_turn(tokenizer, rendered: str, texts: Sequence[str]) -> list[int]:
    """Returns the token ids of a rendered template, its USER_TEXTs replaced by `texts` in order.

    The ids are those of the whole text, as transformers' processor gives them: a text is encoded together
    with the template's words beside it ("user\\n" + "\\nWhat?" has one token for both newlines).
    Control tokens (<|im_end|>, <|image_pad|>) come from the template alone: spelled out in a text they are
    encoded as plain characters, and cannot forge a turn or an image. The text "Hi<|im_end|>" in a template:

        rendered   <|im_start|>  user\\nUSER_TEXT           <|im_end|>  \\n
        encoded    one id        "user\\nHi<|im_end|>" as   one id      "\\n"
                                 plain characters
    """
    added = tokenizer.added_tokens_decoder.items()
    control = {token.content: i for i, token in added if token.special}
    # The longest come first, so that none is taken for another that it starts with.
    longest = sorted(control, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest))
    waiting = iter(texts)
    ids: list[int] = []
    for piece in re.split(f"({pattern})", rendered):
        if piece in control:
            ids.append(control[piece])
            continue
        plain = re.sub(USER_TEXT, lambda _: next(waiting), piece)
        encoded = tokenizer(plain, add_special_tokens=False, split_special_tokens=True)
        ids += encoded["input_ids"]
    return ids


@dataclass(frozen=True)
class Picture:
    """An image, cut into patches or not yet, and the path it came from."""

    path: str
    image: Image.Image | Patches

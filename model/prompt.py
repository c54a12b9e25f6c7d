"""A prompt as the model reads it: tokens, images, and where each of them is.

Texts and images stand in any order; all that a prompt is, is worked out here but for the tokens themselves
(vlm.py), which the checkpoint's own chat template decides.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor


@dataclass
class Patches:
    """An image as the model reads it. Prompts about one image share it, and what a frozen encoder made of it.

    pixels: [patches, channels * 2 * side * side] float32, the image as flattened patches.
    grid: [1, 3] int64, the image's patches in time, height and width.
    features: once a frozen image encoder has seen it, a weight of that encoder, to know it by, and the
    features [image_tokens, hidden * depths] in CPU memory (see `vlm.image_features`).
    """

    pixels: Tensor
    grid: Tensor
    features: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt: text with images in it, ending where the assistant starts to write (P tokens).

    ids: [P] int64, the image token repeated once per image feature.
    positions: [3, P] int64, the temporal, vertical and horizontal position of every token.
    images: as they come in the prompt; places: [image_tokens] where in `ids` their features go.
    """

    ids: Tensor
    positions: Tensor
    images: tuple[Patches, ...]
    places: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        """How many image features it takes."""
        return len(self.places)

    @property
    def next_position(self) -> int:
        """The position of the first token that the assistant writes."""
        return int(self.positions.max()) + 1


def make_prompt(ids: list[int], image_token: int, images: list[Patches], merge: int) -> Prompt:
    """The prompt of ids, in which one image token stands for each image; merge: patches along one side of it.

    Raises ValueError if there are more or fewer image tokens than images.
    """
    if ids.count(image_token) != len(images):
        raise ValueError(f"the prompt has {ids.count(image_token)} image tokens for {len(images)} images")
    counts, whole, starts = iter([int(image.grid.prod()) // merge**2 for image in images]), [], []
    for token in ids:
        starts += [len(whole)] * (token == image_token)
        whole += [token] * (next(counts) if token == image_token else 1)
    places = (torch.tensor(whole) == image_token).nonzero()[:, 0]
    positions = rope_positions(starts, [image.grid[0].tolist() for image in images], merge, len(whole))
    return Prompt(torch.tensor(whole), positions, tuple(images), places)


def rope_positions(starts: list[int], grids: list[list[int]], merge: int, length: int) -> Tensor:
    """The 3-D positions [3, length] of text with images in it (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Text counts up by one in all three rows. Image tokens share one temporal position and carry their row and
    column, all offset by where the image starts; text goes on after the largest position the image used.
    starts: of each image, its first token; grids: its patches (time, height, width); merge: patches along one
    side of an image token.
    """
    parts, done, position = [], 0, 0
    for start, (frames, height, width) in zip(starts, grids):
        sides = frames, height // merge, width // merge
        axes = torch.meshgrid(*map(torch.arange, sides), indexing="ij")
        parts.append(torch.arange(start - done).expand(3, -1) + position)
        position += start - done
        parts.append(torch.stack(axes).flatten(1) + position)
        done, position = start + parts[-1].shape[1], position + max(sides)
    parts.append(torch.arange(length - done).expand(3, -1) + position)
    return torch.cat(parts, dim=1)


def arrange(text: str, images: int) -> list[int | str]:
    """Texts and images, by their number, as a prompt has them: [0, "What is ", 1, " of?"].

    An image stands where the text first says <image 1>, <image 2>, ...; those that it does not name come
    first. A name that comes again stays in the text, as does one of no image.
    """
    names = [f"<image {number + 1}>" for number in range(images)]
    places = sorted((text.find(name), number) for number, name in enumerate(names))
    parts, start = [number for place, number in places if place < 0], 0
    for place, number in places:
        if place >= 0:
            parts += [text[start:place], number]
            start = place + len(names[number])
    return [part for part in (*parts, text[start:]) if part != ""]


USER_TEXT = "\x01user text\x01"  # stands for the user's text while the chat template is rendered


def render(tokenizer, system: str | None = None, images: Sequence[bool] = (True, False)) -> str:
    """Renders the chat template, up to where the assistant starts to write.

    images: the user's turn in order, True for an image and False for a text, which stands as USER_TEXT.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    content = [{"type": "image"} if image else {"type": "text", "text": USER_TEXT} for image in images]
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
    encoded as plain characters, and cannot forge a turn or an image.
    """
    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True))
    ids: list[int] = []
    waiting = iter(texts)
    for piece in re.split(f"({pattern})", rendered):
        if piece in control:
            ids.append(control[piece])
            continue
        between = piece.split(USER_TEXT)
        plain = between[0] + "".join(next(waiting) + after for after in between[1:])
        ids += tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@dataclass(frozen=True)
class Picture:
    """An image and the path it came from."""

    path: str
    image: Image.Image

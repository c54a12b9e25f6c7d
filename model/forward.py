"""The forward pass up to the last hidden states: embeddings with image features in them, then the layers."""

from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.families import encode_images
from model.prompt import Patches, Prompt


def embed(model, ids: Tensor, prompts: list[Prompt]) -> Tensor:
    """Embeds ids [B, T], whose rows start with these prompts: [B, T, hidden * depths].

    Features are placed by the prompts' own positions, never by looking for the image token. Behind the
    embedding stands what is added after the first layers (DeepStack), 0 where there is no image. A row whose
    prompt has two image tokens, of a family with two middle layers (depths = 3):

        column     0      1        2        3      4
        ids        user   <image>  <image>  How    many
        embedding  e_0    f_0      f_1      e_3    e_4       f: features of the encoder's last layer
        layer 0    0      g_0      g_1      0      0         g, h: of two middle layers
        layer 1    0      h_0      h_1      0      0
    """
    device = ids.device
    # The features of each image, encoded once however many prompts show it.
    images = [image for prompt in prompts for image in prompt.images]
    visual = model.model.visual
    features = image_features(visual, images, device)
    values = torch.cat([features[image] for image in images])
    # Where they go.
    counts = torch.tensor([prompt.image_tokens for prompt in prompts])
    row = torch.repeat_interleave(counts)
    column = torch.cat([prompt.places for prompt in prompts])
    places = row.to(device), column.to(device)
    # Behind the embedding stand zeros, as wide as the features of the middle layers.
    embeds = model.get_input_embeddings()(ids)
    later = values.shape[1] - embeds.shape[2]
    embeds = pad(embeds, (0, later))
    values = values.to(embeds.dtype)
    return embeds.index_put(places, values)


def image_features(visual, images: list[Patches], device: torch.device) -> dict[Patches, Tensor]:
    """Returns the features [tokens, hidden * depths] of each image, encoding in one pass those it needs.

    A frozen encoder makes the same every time: kept beside the image, they serve both roles, rollouts,
    reference and update. They are in CPU memory, where they take a fifth of what the pixels take.
    """

    def encode(images: list[Patches]) -> list[Tensor]:
        pixels = torch.cat([image.pixels for image in images])
        pixels = pixels.to(device)
        grids = torch.cat([image.grid for image in images])
        return encode_images(visual, pixels, grids)

    unique = list(dict.fromkeys(images))
    weights = list(visual.parameters())
    if any(weight.requires_grad for weight in weights):
        encoded = encode(unique)
        return dict(zip(unique, encoded))
    # Those that this encoder has not seen.
    new = []
    for image in unique:
        seen_by = image.features and image.features[0]
        if seen_by is not weights[0]:
            new.append(image)
    encoded = encode(new) if new else []
    for image, features in zip(new, encoded):
        features = features.detach().cpu()
        image.features = (weights[0], features)
    return {image: image.features[1].to(device) for image in unique}


def hidden_states(
    model, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache=None
) -> Tensor:
    """Returns the last hidden states [B, T, hidden] of embeds [B, T, hidden * depths].

    positions: [3, B, T]. mask: [B, 1, T, T] bool, True where a query (row) may see a key (column); None: all
    that stand before it. The text model's layers run here one after the other, because its own forward takes
    masks and features in another form for each family.
    """
    text = model.model.language_model
    width = text.config.hidden_size
    x, *later = embeds.split(width, dim=2)
    rotation = text.rotary_emb(x, positions)
    if mask is not None:
        # As numbers, made once: each layer would make and keep its own.
        unseen = ~mask
        numbers = torch.zeros_like(mask, dtype=embeds.dtype)
        mask = numbers.masked_fill_(unseen, -torch.inf)
    shared = dict(attention_mask=mask, position_embeddings=rotation, past_key_values=cache)
    # The layers; behind the first ones DeepStack's features are added.
    for layer, features in zip_longest(text.layers, later):
        x = layer(x, **shared)
        if features is not None:
            x = x + features
    return text.norm(x)

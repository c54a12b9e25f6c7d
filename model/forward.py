"""The forward pass up to the last hidden states: embeddings with image features in them, then the layers."""

import torch
from torch import Tensor

from model.families import encode_images
from model.prompt import Patches, Prompt


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

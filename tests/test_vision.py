"""The image encoder against transformers' own forward."""

import copy

import pytest
import torch
from checkpoints import load_lively, publish
from hypothesis import given, settings
from hypothesis import strategies as st

from model import vision
from model.families import encode_images
from model.qwen2_5_vl import sort_patches

# In patches: square, wide, a single token, odd at both sides, several windows, two frames.
GRIDS = [[1, 16, 16], [1, 4, 10], [1, 2, 2], [1, 30, 18], [1, 16, 16], [1, 22, 6], [2, 8, 12]]


@pytest.fixture(scope="module")
def visual(tmp_path_factory):
    return load_lively(publish(tmp_path_factory.mktemp("vision"), "qwen")).model.model.visual


@pytest.fixture(scope="module", params=["qwen", "qwen3", "qwen3-untied"])
def any_visual(request, tmp_path_factory):
    return load_lively(publish(tmp_path_factory.mktemp("vision"), request.param)).model.model.visual


def pixels_for(visual, grids, seed=0):
    rng = torch.Generator().manual_seed(seed)
    patch = 3 * 2 * visual.patch_size**2
    return torch.randn(sum(t * h * w for t, h, w in grids), patch, generator=rng)


def gradients(visual, features):
    visual.zero_grad()
    (features * torch.arange(features.numel()).view_as(features).cos()).sum().backward()
    return {name: p.grad.clone() for name, p in visual.named_parameters()}


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], GRIDS[2:3], GRIDS[::-1]])
def test_features_and_gradients_are_transformers(any_visual, grids):
    """Also those that Qwen3-VL adds after the text model's first layers."""
    visual = any_visual
    plain, pixels, sizes = copy.deepcopy(visual), pixels_for(visual, grids), torch.tensor(grids)
    plain.config._attn_implementation = "sdpa"
    theirs = plain(pixels, sizes)
    theirs = torch.cat(
        [theirs.pooler_output, *(getattr(theirs, "deepstack_features", None) or ())], dim=1
    )
    ours = encode_images(visual, pixels, sizes)
    assert [len(image) for image in ours] == [t * h * w // 4 for t, h, w in grids]
    assert (torch.cat(ours) - theirs).abs().max() < 1e-5 * max(1.0, theirs.abs().max())
    a, b = gradients(visual, torch.cat(ours)), gradients(plain, theirs)
    scale = max(g.abs().max() for g in b.values())
    assert all((a[name] - b[name]).abs().max() < 1e-5 * scale for name in b)


def test_an_image_does_not_depend_on_its_neighbours(any_visual):
    visual, pixels = any_visual, pixels_for(any_visual, GRIDS)
    together, start = encode_images(visual, pixels, torch.tensor(GRIDS)), 0
    for grid, features in zip(GRIDS, together):
        count = grid[0] * grid[1] * grid[2]
        alone = encode_images(visual, pixels[start : start + count], torch.tensor([grid]))[0]
        start += count
        assert torch.allclose(alone, features, atol=1e-5)


def test_a_layer_takes_a_call_for_each_length(visual, monkeypatch):
    """20 images of two sizes have hundreds of windows, of few lengths."""
    calls, attention = [], vision.scaled_dot_product_attention

    def counted(q, *rest, **named):
        calls.append(tuple(q.shape))
        return attention(q, *rest, **named)

    monkeypatch.setattr(vision, "scaled_dot_product_attention", counted)
    grids = [[1, 32, 20], [1, 18, 18]] * 10
    encode_images(visual, pixels_for(visual, grids), torch.tensor(grids))
    full = sum(number in visual.fullatt_block_indexes for number in range(len(visual.blocks)))
    _, windows, _ = sort_patches(visual, torch.tensor(grids))
    assert len(calls) == full * 2 + (len(visual.blocks) - full) * len(windows.groups)
    assert windows.groups.total() >= 150 and len(windows.groups) <= 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5
    )
)
def test_every_patch_has_one_place(visual, shapes):
    grids = [[t, 2 * h, 2 * w] for t, h, w in shapes]
    order, windows, images = sort_patches(visual, torch.tensor(grids))
    patches = sum(t * h * w for t, h, w in grids)
    assert sorted(order.tolist()) == list(range(patches // 4))
    for segments in (windows, images):
        assert sum(segments.groups.elements()) == patches
    assert torch.equal(images.order[images.back], torch.arange(patches))

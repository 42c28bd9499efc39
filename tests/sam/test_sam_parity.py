"""Our SAM against segment_anything's own, on random weights: same names, same numbers, from encoder to finished mask.

Tolerance everywhere 1e-4 absolute in float32: sums are taken in another order by the fused kernel. The compared values
have a spread of at least 0.1, so that equal means equal.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn

from samseg_monai.adapters.lora import LoRALinear
from samseg_monai.errors import ConfigError
from samseg_monai.sam.attention import WAYS
from samseg_monai.sam.build import SamModel, build_sam
from samseg_monai.sam.spec import SPECS
from samseg_monai.sam.vit import FusedAttention
from tests.helpers.reference_sam import reference_sam

TOLERANCE = 1e-4
SIZES = {"vit_b": 256, "pico": 256, "tiny": 64}  # vit_b at its own 1024 pixels has a test of its own


def _randomise(sam: nn.Module) -> None:
    """Position tables start at zero and normalisation at one: a mistake in either would not be seen."""
    for name, parameter in sam.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)


def _adopt(theirs: Sam, variant: str, **options) -> SamModel:
    ours = build_sam(variant, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def _assert_close(got: torch.Tensor, expected: torch.Tensor, *, spread: float = 0.1) -> None:
    assert expected.std() > spread, "the reference hardly varies: this comparison would prove nothing"
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=SIZES)
def pair(request) -> tuple[Sam, SamModel]:
    torch.manual_seed(1)
    theirs = reference_sam(SPECS[request.param], image_size=SIZES[request.param])
    _randomise(theirs)
    return theirs, _adopt(theirs, request.param, image_size=SIZES[request.param])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> SamModel:
    sam = build_sam("tiny")
    _randomise(sam)
    return sam


def _boxes(count: int, size: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * size / 2
    return torch.cat([corner, corner + size / 8 + torch.rand(count, 2) * size / 3], dim=1)


# --- equal to segment_anything --------------------


def test_names_and_shapes_are_those_of_segment_anything(pair):
    theirs, ours = pair
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@torch.no_grad()
def test_image_encoder_equals_sam(pair):
    theirs, ours = pair
    image = torch.randn(2, 3, ours.image_size, ours.image_size)
    _assert_close(ours.embed(image), theirs.image_encoder(image))


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["boxes", "points", "masks", "boxes points", "boxes points masks", "none"])
def test_prompts_and_decoder_equal_sam_one_image_at_a_time(kinds, pair):
    """SAM itself cannot decode a batch of images with one prompt each, so it is asked image by image."""
    theirs, ours = pair
    size, grid = ours.image_size, ours.image_size // 16
    embedding = torch.randn(3, ours.spec.prompt_dim, grid, grid)
    every = {
        "boxes": _boxes(3, size),
        "points": (torch.rand(3, 4, 2) * size, torch.tensor([[1, 0, 1, -1], [0, 0, 1, 1], [1, -1, -1, -1]])),
        "masks": torch.randn(3, 1, 4 * grid, 4 * grid),
    }
    prompts = {kind: every[kind] for kind in every if kind in kinds}
    for multimask in (False, True):
        logits, quality = ours.decode(embedding, multimask=multimask, **prompts)
        for i in range(3):
            row = {kind: None if kind not in prompts else _row(prompts[kind], i) for kind in every}
            sparse, dense = theirs.prompt_encoder(**row)
            expected_logits, expected_quality = theirs.mask_decoder(
                image_embeddings=embedding[i : i + 1],
                image_pe=theirs.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )
            _assert_close(logits[i : i + 1], expected_logits, spread=0.01)
            torch.testing.assert_close(quality[i : i + 1], expected_quality, atol=TOLERANCE, rtol=0)


def _row(prompt, i: int):
    return tuple(part[i : i + 1] for part in prompt) if isinstance(prompt, tuple) else prompt[i : i + 1]


@torch.no_grad()
def test_from_picture_to_mask_equals_sam_predictor(pair):
    """A rectangular 8-bit picture, a box and two clicks: resizing, normalising, padding, cropping and upscaling."""
    theirs, ours = pair
    picture = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    box, clicks, labels = np.array([12, 20, 50, 77]), np.array([[30, 40], [5, 80]]), np.array([1, 0])
    prompts = {"box": box, "point_coords": clicks, "point_labels": labels}
    results = []
    for sam in (theirs, ours):  # ours is a Sam, so their predictor must work on it too
        predictor = SamPredictor(sam)
        predictor.set_image(picture)
        results.append(predictor.predict(**prompts, return_logits=True))
    expected_mask, expected_quality, expected_logits = (torch.from_numpy(part) for part in results[0])

    scale = ResizeLongestSide(ours.image_size)
    resized = torch.from_numpy(scale.apply_image(picture)).permute(2, 0, 1)[None].float()
    embedding = ours.embed(ours.pad((resized - ours.pixel_mean) / ours.pixel_std))
    logits, quality = ours.decode(
        embedding,
        boxes=torch.from_numpy(scale.apply_boxes(box[None], (90, 70))).float(),
        points=(torch.from_numpy(scale.apply_coords(clicks, (90, 70)))[None].float(), torch.from_numpy(labels)[None]),
        multimask=True,
    )
    masks = ours.postprocess_masks(logits, resized.shape[-2:], (90, 70))
    assert masks.shape == (1, 3, 90, 70)
    for got in ((masks[0], quality[0], logits[0]), map(torch.from_numpy, results[1])):
        for value, expected in zip(got, (expected_mask, expected_quality, expected_logits), strict=True):
            torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=0)
    assert expected_mask.std() > 0.01


@torch.no_grad()
@pytest.mark.whole
def test_vit_b_at_1024_equals_the_registered_sam():
    """The real layout at its real size: 64 x 64 tokens, padded windows, a global block.

    Two windowed blocks and the first global one run, a quarter of the time; the full depth is compared at 256 pixels.
    """
    torch.manual_seed(2)
    theirs = _build_sam(768, 12, 12, [2, 5, 8, 11])
    _randomise(theirs)
    ours = _adopt(theirs, "vit_b")
    assert sum(parameter.numel() for parameter in ours.parameters()) == 93_735_472  # published count
    for sam in (theirs, ours):
        sam.image_encoder.blocks = sam.image_encoder.blocks[:3]
    image, box = torch.randn(1, 3, 1024, 1024), torch.tensor([[100.0, 200.0, 700.0, 800.0]])
    embedding = theirs.image_encoder(image)
    _assert_close(ours.embed(image), embedding)
    sparse, dense = theirs.prompt_encoder(points=None, boxes=box, masks=None)
    expected, _ = theirs.mask_decoder(embedding, theirs.prompt_encoder.get_dense_pe(), sparse, dense, False)
    logits, _ = ours.decode(embedding, boxes=box)
    assert logits.shape == (1, 1, 256, 256)
    _assert_close(logits, expected, spread=0.01)


# --- what ours can do beyond it --------------------


@torch.no_grad()
def test_a_batch_of_boxes_equals_a_loop_over_single_boxes(tiny):
    embedding, boxes = torch.randn(4, 32, 4, 4), _boxes(4, 64)
    logits, quality = tiny.decode(embedding, boxes=boxes)
    single = [tiny.decode(embedding[i : i + 1], boxes=boxes[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(logits, torch.cat([one[0] for one in single]), atol=1e-5, rtol=0)
    torch.testing.assert_close(quality, torch.cat([one[1] for one in single]), atol=1e-5, rtol=0)
    assert (logits[0] - tiny.decode(embedding[:1], boxes=boxes[1:2])[0]).abs().max() > 1e-3  # the box matters


@torch.no_grad()
def test_many_boxes_of_one_image_equal_the_image_repeated(tiny):
    embedding, boxes = torch.randn(1, 32, 4, 4), _boxes(3, 64)
    repeated = tiny.decode(embedding.expand(3, -1, -1, -1), boxes=boxes)[0]
    torch.testing.assert_close(tiny.decode(embedding, boxes=boxes)[0], repeated, atol=1e-6, rtol=0)


def test_images_and_prompt_rows_that_do_not_pair_up_are_refused(tiny):
    with pytest.raises(ConfigError, match="2 images and 3 prompt rows"):
        tiny.decode(torch.randn(2, 32, 4, 4), boxes=_boxes(3, 64))


@torch.no_grad()
@pytest.mark.parametrize("num_masks", [1, 2, 8])
def test_any_number_of_masks_is_decoded(num_masks):
    sam = build_sam("tiny", num_masks=num_masks)
    embedding = torch.randn(2, 32, 4, 4)
    every = sam.decode(embedding, multimask=None)[0]
    assert every.shape == (2, 1 + num_masks, 16, 16)
    torch.testing.assert_close(sam.decode(embedding, multimask=False)[0], every[:, :1], atol=1e-6, rtol=0)
    torch.testing.assert_close(sam.decode(embedding, multimask=True)[0], every[:, 1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("image_size", [48, 80, 128])
@torch.no_grad()
def test_other_image_sizes_equal_sam_built_for_that_size(image_size):
    theirs = reference_sam(SPECS["tiny"], image_size=image_size)
    _randomise(theirs)
    ours = _adopt(theirs, "tiny", image_size=image_size)
    image = torch.randn(1, 3, image_size, image_size)
    _assert_close(ours.embed(image), theirs.image_encoder(image))


@torch.no_grad()
def test_a_rectangular_model_on_a_full_square_equals_the_square_model(tiny):
    rectangular = build_sam("tiny", rectangular=True)
    rectangular.load_state_dict(tiny.state_dict())
    image, boxes = torch.randn(1, 3, 64, 64), _boxes(1, 64)
    outputs = [sam.decode(sam.embed(sam.pad(image)), boxes=boxes)[0] for sam in (tiny, rectangular)]
    assert torch.equal(outputs[0], outputs[1])


@torch.no_grad()
def test_rectangular_input_is_padded_to_full_patches_only_and_keeps_absolute_positions():
    square, rectangular = build_sam("tiny"), build_sam("tiny", rectangular=True)
    _randomise(square)
    rectangular.load_state_dict(square.state_dict())
    image = torch.randn(1, 3, 41, 64)
    padded = rectangular.pad(image)
    assert padded.shape == (1, 3, 48, 64) and square.pad(image).shape == (1, 3, 64, 64)
    assert torch.equal(padded[:, :, :41], image) and not padded[:, :, 41:].any()
    assert rectangular.embed(padded).shape == (1, 32, 3, 4)
    assert rectangular.decode(rectangular.embed(padded), boxes=_boxes(1, 40))[0].shape == (1, 1, 12, 16)
    # cropped, not stretched: what enters the first block is the upper part of what the square model sees
    seen = []
    for sam in (square, rectangular):
        handle = sam.image_encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        sam.embed(sam.pad(image))
        handle.remove()
    torch.testing.assert_close(seen[1], seen[0][:, :3])
    dense_square, dense = square.prompt_encoder.get_dense_pe(), rectangular.prompt_encoder.get_dense_pe((3, 4))
    assert torch.equal(dense, dense_square[:, :, :3])


def test_input_that_the_position_tables_cannot_cover_is_refused(tiny):
    with pytest.raises(ConfigError, match="at most 64 fit"):
        tiny.pad(torch.zeros(1, 3, 65, 10))
    with pytest.raises(ConfigError, match="multiples of 16"):
        tiny.embed(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ConfigError, match="at most 64"):
        tiny.embed(torch.zeros(1, 3, 80, 64))
    with pytest.raises(ConfigError, match="multiple of its patch size 16"):
        build_sam("tiny", image_size=100)


# --- the fused attention --------------------


def _attention(tokens: int) -> FusedAttention:
    attention = FusedAttention(8, num_heads=2, use_rel_pos=True, input_size=(tokens, tokens)).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def _plain_attention(attention: FusedAttention, x: torch.Tensor) -> torch.Tensor:
    """The formula, query by query and key by key: softmax of q.k / sqrt(d) + q.R_h[y - y'] + q.R_w[x - x'].

    The middle row of a table is offset 0, whatever the size of the grid.
    """
    b, h, w, c = x.shape
    heads, d = attention.num_heads, c // attention.num_heads
    q, k, v = attention.qkv(x).split(c, dim=-1)
    middle_h, middle_w = attention.rel_pos_h.shape[0] // 2, attention.rel_pos_w.shape[0] // 2
    places = [(y, x_) for y in range(h) for x_ in range(w)]
    images = []
    for image in range(b):
        rows = []
        for qy, qx in places:
            parts = []
            for head in range(heads):
                own = slice(head * d, (head + 1) * d)
                query = q[image, qy, qx, own]
                scores = [
                    query @ k[image, ky, kx, own] / d**0.5
                    + query @ attention.rel_pos_h[qy - ky + middle_h]
                    + query @ attention.rel_pos_w[qx - kx + middle_w]
                    for ky, kx in places
                ]
                values = torch.stack([v[image, ky, kx, own] for ky, kx in places])
                parts.append(torch.stack(scores).softmax(0) @ values)
            rows.append(torch.cat(parts))
        images.append(torch.stack(rows).reshape(h, w, c))
    return attention.proj(torch.stack(images))


@pytest.mark.parametrize("chunk", [1 << 20, 20, 70], ids=["one chunk", "of queries", "of heads"])
@pytest.mark.parametrize("way", [None, "folded", "masked"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 4), (3, 1)], ids=["full", "oblong", "column"])
def test_fused_attention_and_its_gradients_equal_the_plain_formula(grid, way, chunk, monkeypatch):
    """On an oblong grid this also proves that relative tables are cropped: offsets keep their meaning."""
    monkeypatch.setattr("samseg_monai.sam.attention.CHUNK", chunk)
    attention = _attention(4)
    attention.way = None if way is None else WAYS[way]
    weights = torch.randn(2, *grid, 8, dtype=torch.float64)
    results = []
    for function in (attention, partial(_plain_attention, attention)):
        x = torch.randn(2, *grid, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        x.requires_grad_()
        attention.zero_grad()
        out = function(x)
        (out * weights).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in attention.named_parameters()}
        results.append({"output": out.detach(), "input": x.grad, **gradients})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 8
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, atol=1e-10, rtol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert results[1]["rel_pos_h"].abs().max() > 1e-3 or grid[0] == 1


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1 << 20, 20, 70], ids=["one chunk", "of queries", "of heads"])
@pytest.mark.parametrize("way", [None, "folded"])
def test_attention_without_a_gradient_equals_the_plain_formula(way, chunk, monkeypatch):
    monkeypatch.setattr("samseg_monai.sam.attention.CHUNK", chunk)
    attention, x = _attention(4), torch.randn(2, 2, 4, 8, dtype=torch.float64)
    attention.way = None if way is None else WAYS[way]
    torch.testing.assert_close(attention(x), _plain_attention(attention, x), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("pieces", [1 << 20, 700, 20], ids=["all at once", "some windows", "single heads"])
@pytest.mark.parametrize("size", [64, 48, 32], ids=["filled up", "whole windows", "less than a window"])
def test_gradients_of_the_image_encoder_equal_those_of_sam(size, pieces, monkeypatch):
    """Windows are cut behind the first linear layer here and before it there; both fill the grid up with zeros."""
    monkeypatch.setattr("samseg_monai.sam.attention.CHUNK", pieces)
    monkeypatch.setattr("samseg_monai.sam.vit.HIDDEN", pieces)
    theirs = reference_sam(SPECS["tiny"], image_size=size).image_encoder
    _randomise(theirs)
    ours = build_sam("tiny", image_size=size).image_encoder
    ours.load_state_dict(theirs.state_dict())
    image, weights = torch.randn(2, 3, size, size), torch.randn(2, 32, size // 16, size // 16)
    for encoder in (theirs, ours):
        (encoder(image) * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = expected[name].grad.abs().max()
        assert scale > 1e-4, name
        torch.testing.assert_close(parameter.grad / scale, expected[name].grad / scale, atol=1e-4, rtol=0)


# --- training --------------------


@pytest.mark.parametrize("hidden", [1 << 22, 600], ids=["all tokens", "some tokens"])
def test_hidden_values_of_a_frozen_encoder_are_computed_again(hidden, monkeypatch):
    """The same output and gradients bit for bit, and all that is kept is less than the hidden values alone."""
    monkeypatch.setattr("samseg_monai.sam.vit.HIDDEN", hidden)
    sam = build_sam("tiny").requires_grad_(False)
    _randomise(sam)
    blocks = sam.image_encoder.blocks
    for block in blocks:
        block.attn.qkv = LoRALinear(block.attn.qkv, rank=2, parts=(0, 2), num_parts=3)
        for up in block.attn.qkv.lora_b.values():
            nn.init.normal_(up)
    image = torch.randn(2, 3, 64, 64)
    found = []
    for again in (True, False):
        if not again:
            monkeypatch.setattr("samseg_monai.sam.vit.checkpoint", lambda call, *given, **_: call(*given))
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = sam.embed(image)
        sam.zero_grad()
        out.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in sam.named_parameters() if p.grad is not None}
        found.append((out.detach(), gradients, sum(kept.values())))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys() and len(found[0][1]) == 4 * len(blocks)
    for name, gradient in found[1][1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[0][1][name], gradient, atol=0, rtol=1e-5)
    values = blocks[0].mlp.lin1.out_features * 2 * 16 * 4  # bytes of one block: two images of 4 x 4 tokens
    assert found[1][2] - found[0][2] >= len(blocks) * values


def test_activation_checkpointing_changes_neither_output_nor_gradient(tiny):
    thrifty = build_sam("tiny", checkpointing=True)
    thrifty.load_state_dict(tiny.state_dict())
    image = torch.randn(2, 3, 64, 64)
    outputs, calls = [], []
    for sam in (tiny, thrifty):
        count: list[int] = []
        handle = sam.image_encoder.blocks[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        out = sam.embed(image)
        out.square().mean().backward()
        handle.remove()
        outputs.append(out)
        calls.append(len(count))
    assert torch.equal(outputs[0], outputs[1])
    assert calls == [1, 2]  # it really was computed again
    theirs = dict(thrifty.image_encoder.named_parameters())
    for name, parameter in tiny.image_encoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(theirs[name].grad, parameter.grad, atol=1e-7, rtol=1e-5)


def test_every_part_that_a_box_uses_gets_a_gradient(tiny):
    logits, _ = tiny.decode(tiny.embed(torch.randn(2, 3, 64, 64)), boxes=_boxes(2, 64))
    logits.square().mean().backward()
    without = {name for name, parameter in tiny.named_parameters() if parameter.grad is None}
    # unused by a box and one mask: clicks, mask prompts, the other masks' hyper-networks and the quality head
    unused = ("point_embeddings.0", "point_embeddings.1", "not_a_point", "mask_downscaling", "iou_prediction_head")
    others = tuple(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3))
    assert {name for name in without if not any(part in name for part in unused + others)} == set()


@torch.no_grad()
def test_taps_are_the_outputs_of_the_asked_blocks_in_the_asked_order():
    sam = build_sam("pico")
    _randomise(sam)
    image = torch.randn(1, 3, 256, 256)
    seen = {}
    for i, block in enumerate(sam.image_encoder.blocks):
        block.register_forward_hook(lambda _, inputs, out, i=i: seen.update({i: out}))
    embedding, taps = sam.embed(image, taps=(5, 1))
    assert [torch.equal(tap, seen[i]) for tap, i in zip(taps, (5, 1), strict=True)] == [True, True]
    assert taps[0].shape == (1, 16, 16, 128)
    assert torch.equal(embedding, sam.embed(image))

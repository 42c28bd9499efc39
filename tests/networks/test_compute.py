"""Ways to compute: each gives what the plain one does, as closely as it says, and is refused where it cannot be."""

from __future__ import annotations

import copy
import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from samseg_monai.bundles import write_bundle
from samseg_monai.bundles.build import compose
from samseg_monai.bundles.door import open_bundle
from samseg_monai.bundles.loaded import load_bundle
from samseg_monai.checkpoints import load_trained, save_adapter
from samseg_monai.errors import BundleError, ConfigError
from samseg_monai.handlers.predictions import TABLE
from samseg_monai.networks import SamSegmenter, compute, disable_adapter
from samseg_monai.networks.compute import hold_updates
from samseg_monai.products import Int8Linear, int8_problem
from samseg_monai.report.comparing import what_differs
from samseg_monai.report.runs import RunResult
from samseg_monai.sam.weights import find_weights
from samseg_monai.strategies import LoRA
from samseg_monai.workflow import run_workflow
from tests.helpers.commands import samseg
from tests.helpers.old_bundles import FOLDER, LORA, UNET, old_bundle

needs_int8 = pytest.mark.skipif(int8_problem() is not None, reason=f"int8: {int8_problem()}")
BOX = torch.tensor([[4.0, 6, 40, 30]])


def tiny(variant="tiny", **arguments):
    """The same random weights each time, with updates that change something."""
    torch.manual_seed(0)
    network = SamSegmenter(variant, **arguments)
    for name, parameter in network.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.05)
    return network


def image(size=48):
    return torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(1))


def error(one, other):
    return float((one - other).norm() / other.norm())


# --- merged updates --------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["tiny", "tiny_t"])
@pytest.mark.parametrize("dora", [False, True])
def test_held_updates_change_no_result_no_tensor_and_no_name(variant, dora):
    network = tiny(variant, strategy=LoRA(4, dora=dora, targets=("q", "v", "proj", "lin1")))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = network(image(), BOX)
    with disable_adapter(network):
        base = network(image(), BOX)
    assert error(expected, base) > 1e-3
    hold_updates(network)
    calls = []
    for layer in network.modules():
        if hasattr(layer, "lora_a"):
            layer.dropout.register_forward_hook(lambda *_: calls.append(1))  # only the layer's own way comes by it
    assert error(network(image(), BOX), expected) < 1e-5 and calls == []
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with disable_adapter(network):
        assert torch.equal(network(image(), BOX), base)
    assert error(copy.deepcopy(network)(image(), BOX), expected) < 1e-5
    network.sam.image_encoder.get_parameter(
        next(name for name, _ in network.sam.image_encoder.named_parameters() if "lora_b" in name)
    ).add_(0.3)
    changed = network(image(), BOX)
    assert error(changed, expected) > 1e-3  # a merged layer follows its tensors
    assert network.train() is network and network.merge() > 0
    assert error(network.eval()(image(), BOX), changed) < 1e-5


def test_held_updates_learn_as_before():
    gradients = []
    for held in (False, True):
        network = tiny(strategy=LoRA(4))
        if held:
            hold_updates(network)
        network(image(), BOX).square().mean().backward()  # in evaluation mode, too
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_network_that_was_loaded_merged_writes_the_adapter_that_it_read(tmp_path):
    network = tiny(strategy=LoRA(4))
    network.load_base("random")
    first = save_adapter(network, tmp_path / "first") / "adapter.safetensors"
    other = SamSegmenter("tiny", LoRA(4))
    torch.manual_seed(0)
    load_trained(other, checkpoint=tmp_path / "first", sam_checkpoint="random", merged=True)
    with torch.no_grad():
        other(image(), BOX)
    assert (save_adapter(other, tmp_path / "again") / "adapter.safetensors").read_bytes() == first.read_bytes()


# --- 8-bit numbers --------------------


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_of_rounded_numbers_is_exact(bias):
    """Weights and inputs that 8 bits can hold: what is left is the order of sums."""
    layer = nn.Linear(64, 48, bias=bias)
    layer.weight.copy_(torch.randint(-127, 128, (48, 64)) / 64)
    layer.weight[:, 0] = 127 / 64
    x = torch.randint(-100, 155, (2, 7, 64)) / 8
    x[0, 0, :2] = torch.tensor([-100 / 8, 154 / 8])
    expected = layer(x)
    layer.__class__ = Int8Linear
    torch.testing.assert_close(layer(x), expected, atol=1e-3, rtol=1e-5)
    layer.weight.mul_(2)
    torch.testing.assert_close(
        layer(x) - (layer.bias if bias else 0), 2 * (expected - (layer.bias if bias else 0)), atol=2e-3, rtol=1e-5
    )
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@needs_int8
@torch.no_grad()
def test_odd_inputs_get_what_the_plain_layer_gives():
    plain = nn.Linear(32, 16)
    layer = copy.deepcopy(plain)
    layer.__class__ = Int8Linear
    zeros, large = torch.zeros(3, 32), torch.full((3, 32), 1e15)
    torch.testing.assert_close(layer(zeros), plain(zeros))
    assert error(layer(large), plain(large)) < 0.02
    assert error(layer(torch.full((3, 32), 1e-35)), plain(torch.zeros(3, 32))) < 1e-6
    for value in (float("nan"), float("inf")):
        bad = torch.randn(3, 32)
        bad[1, 2] = value
        assert torch.equal(layer(bad).isfinite(), plain(bad).isfinite())
    assert layer(torch.randn(0, 32)).shape == (0, 16)
    with pytest.raises(ConfigError, match="for CPUs, not meta"):
        layer(torch.randn(3, 32, device="meta"))


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("strategy", [None, LoRA(4), LoRA(4, dora=True)], ids=["plain", "lora", "dora"])
@pytest.mark.parametrize("variant", ["tiny", "tiny_t"])
def test_int8_is_close_and_says_so(variant, strategy):
    full = tiny(variant, strategy=copy.deepcopy(strategy))
    rounded = tiny(variant, strategy=copy.deepcopy(strategy), compute={"int8": True})
    assert rounded.state_dict().keys() == full.state_dict().keys()
    # every linear layer of the encoder is one, or holds one
    seen = []
    original = Int8Linear.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Int8Linear, "forward", lambda self, x: seen.append(self) or original(self, x))
        found, expected = rounded.encode(image()), full.encode(image())
    layers = [m for m in full.sam.image_encoder.modules() if isinstance(m, nn.Linear)]
    assert len({id(layer) for layer in seen}) == len(layers) > 4
    assert 1e-5 < error(found, expected) < 0.03
    assert (full.precision, rounded.precision) == ("float32", "int8")
    if strategy is None:
        one, other = full.embedding_identity(), rounded.embedding_identity()
        assert "precision" not in one and other == {**one, "precision": "int8"}


@needs_int8
def test_int8_is_refused_where_it_makes_no_sense(monkeypatch):
    with pytest.raises(ConfigError, match="8-bit numbers cannot learn"):
        tiny(compute={"int8": True}).train()
    for wrong, told in (
        ({"int8": True, "compile": True}, "use one of the two"),
        ({"int8": 1}, "compute::int8: got 1"),
        ({"int4": True}, "compute::int4: no such key; did you mean int8"),
        ({"attention": "fast"}, "compute::attention: got 'fast'"),
    ):
        with pytest.raises(ConfigError, match=told):
            tiny(compute=wrong)
    with pytest.raises(ConfigError, match="with autocast 'bf16'"):
        tiny(autocast="bf16", compute={"int8": True})
    assert "give device cpu" in compute.compute_problems(compute.Compute(int8=True), device="cuda")[0]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with pytest.raises(ConfigError, match="VNNI"):
        tiny(compute={"int8": True})


@needs_int8
@torch.no_grad()
def test_int8_moves_picos_masks_by_little():
    """Trained weights, of the demo's network: embedding and mask."""
    full, rounded = (SamSegmenter("pico", compute={"int8": int8}) for int8 in (False, True))
    x = torch.zeros(1, 1, 128, 128)
    x[..., 40:90, 30:80] = 1.5
    x += 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for network in (full, rounded):
        network.load_base(find_weights("pico"))
        results.append((network.encode(x), network(x, torch.tensor([[25.0, 35, 85, 95]])) > 0))
    (one, mask), (other, moved) = results
    assert error(other, one) < 0.02
    assert 2 * (mask & moved).sum() / (mask.sum() + moved.sum()) > 0.98


# --- the other settings --------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["tiny", "tiny_t"])
def test_plain_attention_gives_the_same(variant):
    full, plain = tiny(variant), tiny(variant, compute={"attention": "plain"})
    ways = {m.way.__name__ for m in plain.modules() if getattr(m, "way", None) is not None}
    assert ways == ({"masked"} if variant == "tiny" else set())
    assert error(plain(image(), BOX), full(image(), BOX)) < 1e-5


def test_tf32_is_allowed_for_the_process_and_stays(monkeypatch):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        assert tiny(compute={"tf32": True}).precision == "float32"  # on this device it changes nothing
        assert torch.backends.cuda.matmul.allow_tf32
        tiny()
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_compile_is_refused_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compute, "_no_compiler", lambda device: "there is no C++ compiler")
    with pytest.raises(ConfigError, match="compute::compile: got true, but there is no C\\+\\+ compiler"):
        tiny(compute={"compile": True})


@pytest.mark.whole
@pytest.mark.skipif(compute._no_compiler("cpu") is not None, reason="no C++ compiler")
def test_a_compiled_encoder_has_the_same_keys_results_and_gradients():
    full, compiled = tiny(strategy=LoRA(4)), tiny(strategy=LoRA(4), compute={"compile": True})
    assert compiled.state_dict().keys() == full.state_dict().keys()
    found = []
    for network in (full, compiled):
        network.train()
        out = network(image(), BOX)
        out.square().mean().backward()
        found.append([out, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 4
    for one, other in zip(*found, strict=True):
        assert error(other, one) < 1e-4


# --- through bundles --------------------


TINY = {"sam_variant": "tiny", "image_size": 32, "sam_checkpoint": "random"}


def configs_of(task, strategy, folder):
    return write_bundle(compose(task, strategy), folder / f"{task}_segmentation_{strategy}") / "configs"


@needs_int8
def test_an_evaluation_with_int8_says_so_everywhere_and_is_not_compared(phantoms, tmp_path):
    configs = configs_of("meningioma", "zero_shot", tmp_path)
    runs = []
    for int8 in (False, True):
        own = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path / str(int8)), "compute::int8": int8}
        run_workflow([configs / "evaluate.json"], {**TINY, **own})
        folder = tmp_path / str(int8) / "evaluation"
        name = "int8" if int8 else "float32"
        card, metrics = (json.loads((folder / f"{part}.json").read_text()) for part in ("run_card", "metrics"))
        assert card["settings"]["compute"]["int8"] is int8
        assert (card["precision"], metrics["precision"]) == (name, name)
        runs.append(RunResult.load(folder))
    assert [run.title for run in runs] == ["Zero-shot", "Zero-shot (int8)"]
    assert what_differs(*runs) == ["precision (as trained against int8)"]
    assert runs[0].card["config_hash"] != runs[1].card["config_hash"]
    with open_bundle(tmp_path / "True") as opened:  # how a sender computed is not the receiver's way
        assert opened.settings.run.compute.int8 and not opened.parser().get()["compute"]["int8"]


def test_a_training_with_int8_is_refused_before_anything_is_read(phantoms, tmp_path):
    configs = configs_of("meningioma", "lora", tmp_path)
    own = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="compute::int8: got true in training"):
        run_workflow([configs / "train.json"], {**TINY, **own, "compute::int8": True})
    with pytest.raises(ConfigError, match="compute::attention: got 'flash'"):
        run_workflow([configs / "train.json"], {**TINY, **own, "compute::attention": "flash"})
    assert not (tmp_path / "run").exists()


@needs_int8
def test_a_bundle_of_before_predicts_with_int8_and_the_table_says_so(tmp_path, monkeypatch, capsys):
    old = old_bundle(LORA, tmp_path)
    masks, rows = [], []
    for words in ([], ["--int8"]):
        out = tmp_path / f"out{len(words)}"
        given = ["predict", old, "--input", FOLDER / "brats", "--output", out, "--boxes", FOLDER / "boxes.json"]
        assert samseg(monkeypatch, *given, "--device", "cpu", *words) == 0
        [path] = out.glob("*_seg.nii.gz")
        masks.append(np.asarray(nib.load(path).dataobj) > 0)
        with (out / TABLE).open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    assert [row["precision"] for row in rows] == ["float32", "int8"]
    assert "device: cpu, int8" in capsys.readouterr().err
    assert 0.9 < 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()) <= 1
    [case] = (FOLDER / "brats").iterdir()
    mask, _ = load_bundle(old, device="cpu", int8=True).predict(case, boxes=FOLDER / "boxes.json")
    np.testing.assert_array_equal(mask > 0, masks[1])


def test_int8_is_refused_of_a_bundle_that_knows_none(tmp_path, monkeypatch, capsys):
    words = ["--input", FOLDER / "hippocampus", "--output", tmp_path / "out"]
    assert samseg(monkeypatch, "predict", old_bundle(UNET, tmp_path), *words, "--int8") == 1
    assert "cannot compute with int8: its network has no image encoder of SAM" in capsys.readouterr().err
    with pytest.raises(BundleError, match="its own JSON knows none"):
        load_bundle(old_bundle(LORA, tmp_path), trust=True, int8=True)

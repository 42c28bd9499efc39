"""Exported files compute what the network computes, in the hands of segment_anything, torch and onnxruntime."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import monai.bundle
import onnxruntime
import pytest
import safetensors.torch
import torch
from monai.bundle import ConfigParser
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import TwoWayTransformer
from torch import nn

from samseg_monai import cli
from samseg_monai.bundles import write_bundle
from samseg_monai.bundles.build import compose
from samseg_monai.checkpoints import save_adapter, save_model
from samseg_monai.errors import BundleError, ConfigError
from samseg_monai.export import (
    FORMATS,
    Source,
    export_network,
    obstacles,
    official_state,
    parts_of,
    read_source,
    write,
)
from samseg_monai.export.official import official_shapes
from samseg_monai.export.parity import compare_parts, difference
from samseg_monai.export.parts import read_onnx, to_program, write_onnx
from samseg_monai.networks import PlainSegmenter, SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.spec import SPECS
from samseg_monai.sam.weights import find_weights, load_sam_weights, read_state, sha256_of
from samseg_monai.settings import dump_settings, merged, read_settings
from samseg_monai.strategies import SSF, Adapter, Ladder, LoRA
from tests.docs.test_docs import commands
from tests.helpers.packed import packed
from tests.helpers.reference_sam import reference_sam
from tests.networks import test_foreign_layouts as foreign
from tests.networks.test_h_sam_files import h_sam_state

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
TINY = {"sam_variant": "tiny", "image_size": 64}
BASE = "sam_tiny.pth"
ORGANS = ["spleen", "liver"]  # a few: the decoder has a network for each

# pytest listens to every logger that does not propagate, and torch then writes down each step of an export
logging.getLogger("torch.__trace").propagate = True


class SmallSide(nn.Sequential):
    """A side network that is exported in no time."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 4, stride=4))


def lively(network):
    """Move every parameter, so that adapters do something and a part left out would show."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def make_run(where, what, how, base, **changes):
    """Write ``output_dir`` of a training on the smallest SAM, as far as an export looks at it; return its network."""
    value = merged(dump_settings(compose(what, how)), {**changes, "run": {**TINY, **changes.get("run", {})}})
    root = write_bundle(read_settings({**value, "demo": None}, "test"), where / "bundle")
    (root / "name.txt").write_text(value["name"])
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    network.load_base(base, start=False)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in network.owned and not name.startswith("side.net."):  # a ResNet at random is lively enough
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(network, where)
    return network.eval()


@pytest.fixture(scope="module", autouse=True)
def _one_block_in_tiny_decoders():
    """Exporters take seconds for each block of the mask decoder, and nothing here depends on how many there are."""
    whole = TwoWayTransformer.__init__

    def shallow(self, depth, embedding_dim, *rest, **named):
        whole(self, 1 if embedding_dim == SPECS["tiny"].prompt_dim else depth, embedding_dim, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoWayTransformer, "__init__", shallow)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page's commands, run in a folder laid out as they assume; returns it with the networks of the runs."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    torch.save(lively(build_sam("tiny")).state_dict(), folder / BASE)
    lora = {"method": {"rank": 2, "decoder": True}}
    late = {"method": {"rank": 2}}
    organs = {"classes": ORGANS, "text": f"Segments {', '.join(ORGANS)}.", "mirrored_classes": None}
    networks = {
        "lora": make_run(
            folder / "runs" / "lora", "meningioma", "lora", folder / BASE, strategy=lora, run={"crop_size": [32, 36]}
        ),
        "peft": make_run(folder / "runs" / "lora_late_50", "meningioma", "lora_late_50", folder / BASE, strategy=late),
        "samed": make_run(folder / "runs" / "samed", "abdomen", "samed", folder / BASE, task=organs),
        "ladder": make_run(folder / "runs" / "ladder", "abdomen", "ladder", folder / BASE, task=organs),
    }
    bundle = folder / "abdomen_segmentation_ladder"
    shutil.copytree(folder / "runs" / "ladder" / "bundle", bundle)
    save_model(networks["ladder"], bundle / "models" / "model.pt")
    packed("hippocampus", "unet", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in commands(PAGE):
            if "monai.bundle run" not in line and "bundle build" not in line:  # below, with data
                run_line(line, patch)
    return folder, networks


def run_line(line, patch):
    words = shlex.split(line)
    if words[:4] == ["python", "-m", "monai.bundle", "ckpt_export"]:
        options = {k.removeprefix("--"): v for k, v in zip(words[5::2], words[6::2], strict=True)}
        if "use_trace" in options:
            assert json.loads(options["input_shape"])[:2] == [1, 1]
            options |= {"use_trace": True, "input_shape": [1, 1, 64, 64]}
        monai.bundle.ckpt_export(words[4], **options)
    else:
        assert samseg(patch, *words[1:], "--sam-checkpoint", BASE) == 0, line


def hash_of(network):
    """sha256 of the network's tensors as a safetensors file."""
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    return hashlib.sha256(safetensors.torch.save(state)).hexdigest()


def samseg(patch, *words):
    patch.setattr(sys, "argv", ["samseg", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_page_shows_every_format():
    shown = commands(PAGE)
    assert {line.split("--format ")[1].split()[0] for line in shown if "--format" in line} == set(FORMATS)
    assert any("ckpt_export" in line for line in shown)


@torch.no_grad()
def test_predictor_of_segment_anything_gives_the_logits_of_the_network(made):
    folder, networks = made
    sam = reference_sam(SPECS["tiny"])
    sam.load_state_dict(torch.load(folder / "exported" / "pth" / BASE))  # strict
    image, boxes = torch.randn(1, 4, 64, 48), torch.tensor([[5.0, 9, 40, 50], [1, 2, 30, 31]])
    predictor, maps = SamPredictor(sam), []
    for scan in image[0]:
        predictor.set_torch_image((scan * sam.pixel_std + sam.pixel_mean)[None], (64, 48))
        maps.append(predictor.predict_torch(None, None, boxes, multimask_output=False, return_logits=True)[0])
    expected = networks["lora"](image.expand(2, -1, -1, -1), boxes)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(torch.stack(maps).mean(0), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_onnxruntime_gives_the_logits_of_the_network(made):
    folder, networks = made
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / "exported" / "onnx" / f"{name}.onnx") for name in ("encoder", "decoder")
    )
    image = torch.randn(3, 4, 50, 64)  # another batch and size than any that was exported or checked
    boxes = torch.tensor([[5.0, 9, 40, 50], [float("nan")] * 4, [1, 2, 30, 31]])
    [embedding] = encoder.run(None, {"image": image.numpy()})
    low, logits = decoder.run(None, {"embedding": embedding, "boxes": boxes.numpy()})
    expected = networks["lora"](image, boxes)
    assert low.shape == (3, 1, 16, 16) and expected[0].abs().max() > 0.1
    torch.testing.assert_close(torch.from_numpy(logits[..., :50, :64]), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_torch_programs_give_the_logits_of_the_network(made):
    folder, networks = made
    encoder, side, decoder = (
        torch.export.load(folder / "exported" / "torch" / f"{name}.pt2").module()
        for name in ("encoder", "side", "decoder")
    )
    image = torch.rand(3, 1, 50, 64)
    low, logits = decoder(side(image, encoder(image)))
    assert low.shape == (3, 1 + len(ORGANS), 16, 16)
    torch.testing.assert_close(logits[..., :50, :64], networks["ladder"](image), rtol=0, atol=1e-5)
    with pytest.raises((RuntimeError, AssertionError), match="64"):  # larger than the network's square
        encoder(torch.rand(1, 1, 65, 64))


@torch.no_grad()
def test_traced_bundle_takes_other_batches_and_sizes(made):
    folder, networks = made
    traced = torch.jit.load(folder / "abdomen_segmentation_ladder" / "models" / "model.ts")
    for shape in ((1, 1, 64, 64), (3, 1, 40, 64)):
        image = torch.rand(shape)
        torch.testing.assert_close(traced(image), networks["ladder"](image), rtol=0, atol=1e-5)


def test_card_tells_what_the_files_are(made):
    folder, networks = made
    exported = folder / "exported" / "onnx"
    card = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    assert card["bundle"] == "meningioma_segmentation_lora" and card["classes"] == ["tumour"]
    assert card["scans"] == ["t1n", "t1c", "t2w", "t2f"] and card["prompt"] == "box" and "warning" not in card
    assert card["base_sha256"] == sha256_of(folder / BASE)
    assert card["weights_sha256"] == hash_of(networks["lora"])
    assert card["strategy"]["arguments"]["rank"] == 2 and "Not a medical device" in card["intended_use"]
    assert {name: file["sha256"] for name, file in card["files"].items()} == {
        name: sha256_of(exported / name) for name in ("encoder.onnx", "decoder.onnx")
    }
    for name, file in card["files"].items():
        session = onnxruntime.InferenceSession(exported / name)
        for kind, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert {n: t["shape"] for n, t in file[kind].items()} == {v.name: v.shape for v in values}
        known = session.get_modelmeta().custom_metadata_map
        assert known["weights_sha256"] == card["weights_sha256"] and json.loads(known["classes"]) == ["tumour"]
    assert [found["what"] for found in card["parity"]] == ["encoder", "decoder", "all parts in turn"]
    assert all(found["largest"] <= found["allowed"] * found["scale"] for found in card["parity"])
    extra = {"scans": ""}
    torch.export.load(folder / "exported" / "torch" / "side.pt2", extra_files=extra)
    assert json.loads(extra["scans"]) == ["image"]


def test_card_gives_the_transforms_with_the_values_of_the_run(made):
    transforms = json.loads((made[0] / "exported" / "pth" / "export.json").read_text(encoding="utf-8"))["transforms"]
    assert [t["_target_"] for t in transforms] == [
        "Orientationd",
        "samseg_monai.transforms.ResampleInPlaned",
        "samseg_monai.transforms.CropInPlaned",
        "NormalizeIntensityd",
        "Resized",
    ]
    assert transforms[1]["trained"] is None and transforms[2]["spacing"] is None  # this run's card does not know it
    assert transforms[2]["size"] == [32, 36] and transforms[4]["spatial_size"] == 64
    assert not any(mark in json.dumps(transforms) for mark in ("$", "@", "_disabled_"))


NETWORKS = {
    "two scans": lambda: SamSegmenter("tiny", LoRA(rank=2, decoder=True), scans=2, input_scale="sam"),
    "channels": lambda: SamSegmenter("tiny", LoRA(rank=2), scans=3, scan_mode="channels", input_scale="unit"),
    "rectangular": lambda: SamSegmenter("tiny", LoRA(rank=2), rectangular=True),
    "bf16": lambda: SamSegmenter("tiny", LoRA(rank=2), autocast="bf16_all"),
    "classes": lambda: SamSegmenter("tiny", LoRA(rank=2, decoder=True), num_classes=2, prompt="none"),
    "prompted classes": lambda: SamSegmenter("tiny", LoRA(rank=2, decoder=True), num_classes=2, scans=2),
    "adapter": lambda: SamSegmenter("tiny", Adapter(3), scans=2),
    "beside": lambda: SamSegmenter("tiny", Adapter(3, place="parallel", scale=0.1)),
    "scale and shift": lambda: SamSegmenter("tiny_t", SSF(), scans=2),
    "decoder's updates": lambda: SamSegmenter("tiny", LoRA(rank=2, decoder="lora")),
    "ladder": lambda: SamSegmenter("tiny", Ladder(SmallSide()), num_classes=2, prompt="none", scans=2),
    "side alone": lambda: SamSegmenter("tiny", Ladder(SmallSide(), mix="side"), input_scale="sam"),
    "other encoder": lambda: SamSegmenter("tiny_t", LoRA(rank=2, decoder=True), scans=2),
    "plain": lambda: PlainSegmenter(nn.Conv2d(2, 3, 3, padding=1), num_classes=2, scans=2, image_size=40),
}
PARTS = {"ladder": ["encoder", "side", "decoder"], "side alone": ["side", "decoder"], "plain": ["network"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_in_turn_are_the_network(name):
    torch.manual_seed(1)  # logits near zero would be measured against the rounding of the larger sums before them
    network = lively(NETWORKS[name]())
    network.autocast = None  # parts are float32, as the network that exports are compared with
    size = (40, 33) if name == "rectangular" else None
    parts = parts_of(network, size)
    assert [part.name for part in parts] == PARTS.get(name, ["encoder", "decoder"])
    found = compare_parts(network, parts, {part.name: part.module for part in parts}, 1e-6)
    assert [d.what for d in found] == [*(part.name for part in parts), "all parts in turn"]
    assert all(d.passes for d in found) and found[-1].scale > 0.01, found


def test_bottlenecks_are_recorded_with_the_encoder(tmp_path):
    done = export_network(Source(lively(NETWORKS["beside"]()), base_sha256="random"), "torch", tmp_path)
    assert [path.stem for path in done.files] == ["decoder", "encoder", "export"]


@pytest.mark.parametrize("name", ["scale and shift", "decoder's updates"])
def test_what_folds_into_layers_is_exported_as_plain_sam(name, tmp_path):
    network = lively(NETWORKS[name]())
    assert obstacles(network)["pth"] == []
    export_network(Source(network, base_sha256="random"), "pth", tmp_path)
    names = torch.load(tmp_path / f"sam_{network.spec.name}.pth", weights_only=True).keys()
    assert names >= SamSegmenter(network.spec.name).sam.state_dict().keys()
    assert not any("ssf" in name or "lora" in name for name in names)


@pytest.mark.parametrize("name", ["adapter", "beside"])
def test_a_bottleneck_is_no_part_of_plain_sam(name, tmp_path):
    with pytest.raises(BundleError, match=r"Adapter: \d+ tensors that SAM does not have and that cannot be merged"):
        export_network(Source(NETWORKS[name](), base_sha256="random"), "pth", tmp_path)


def test_side_network_as_onnx(tmp_path):
    network = lively(NETWORKS["ladder"]())
    part = parts_of(network)[1]
    write_onnx(to_program(part), part, tmp_path / "side.onnx", {"bundle": "ladder"})
    image, embedding = torch.randn(3, 2, 30, 64), torch.randn(3, 2, 32, 4, 4)
    [got] = read_onnx(tmp_path / "side.onnx")(image, embedding)
    with torch.no_grad():
        torch.testing.assert_close(got, part.module(image, embedding), rtol=0, atol=1e-4)


def test_network_that_is_exported_stays_as_it_is(tmp_path):
    network = lively(NETWORKS["bf16"]()).train()
    before = hash_of(network)
    done = export_network(Source(network, base_sha256="random"), "pth", tmp_path)
    assert hash_of(network) == before and network.training and network.autocast == "bf16_all"
    assert sorted(path.name for path in done.files) == sorted(p.name for p in tmp_path.iterdir())
    card = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert card["warning"] == "random base weights: predictions are noise"
    assert Source(SamSegmenter("pico")).warning == "pico, not SAM"


@pytest.mark.parametrize("fmt", ["pth", "torch", "onnx"])
def test_every_format_holds_the_encoder_of_mobile_sam(fmt, tmp_path):
    network = lively(SamSegmenter("tiny_t", LoRA(rank=2, decoder=True)))
    done = export_network(Source(network, base_sha256="random"), fmt, tmp_path)  # compares, and raises where it differs
    assert done.differences and all(difference.passes for difference in done.differences)
    if fmt == "pth":
        state = read_state(tmp_path / "sam_tiny_t.pth")
        unused = {f"image_encoder.{n}": s for n, s in network.sam.image_encoder.unused_in_files.items()}
        assert {name: tuple(state[name].shape) for name in unused} == unused and len(unused) == 4
        again = SamSegmenter("tiny_t")
        load_sam_weights(again.sam, tmp_path / "sam_tiny_t.pth")
        network.merge()
        torch.testing.assert_close(again.sam.state_dict(), network.sam.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*is a no-op:UserWarning")
def test_file_for_vit_b_loads_into_the_official_sam_unchanged(tmp_path):
    with torch.device("meta"):
        network = SamSegmenter("vit_b", LoRA(rank=2), image_size=512)
    state = official_state(network.to_empty(device="cpu"))  # names and shapes count, not values
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in state.items()}, tmp_path / "sam_vit_b.pth")
    with torch.device("meta"):
        sam_model_registry["vit_b"](checkpoint=tmp_path / "sam_vit_b.pth")
        official = sam_model_registry["vit_b"]().state_dict()
    assert {name: value.shape for name, value in official.items()} == official_shapes(SPECS["vit_b"])
    assert {name: value.shape for name, value in state.items()} == official_shapes(SPECS["vit_b"])


def tables(state):
    return {n: v for n, v in state.items() if n.endswith(("pos_embed", "rel_pos_h", "rel_pos_w"))}


@pytest.mark.parametrize("image_size", [128, 512])
def test_position_tables_that_did_not_learn_return_as_they_were(image_size):
    base = find_weights("pico")
    network = SamSegmenter("pico", LoRA(rank=2), image_size=image_size)
    network.load_base()
    before, after = tables(read_state(base)), tables(official_state(network, base))
    assert len(before) == 13
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("base", [find_weights("pico"), None])
def test_trained_position_tables_come_back_when_the_file_is_loaded_again(base, tmp_path):
    network = SamSegmenter("pico", LoRA(rank=2), image_size=128)
    network.load_base()
    trained = tables(lively(network.sam).state_dict())
    torch.save(official_state(network, base), tmp_path / "sam.pth")
    again = SamSegmenter("pico", image_size=128)
    report = load_sam_weights(again.sam, tmp_path / "sam.pth")
    assert len(report.resized) == 7  # the absolute table, and two in each of three global blocks
    torch.testing.assert_close(tables(again.sam.state_dict()), trained, rtol=0, atol=1e-5)


def test_bundle_of_another_image_size_is_checked_by_loading_it_again(made, tmp_path, monkeypatch, capsys):
    base = made[0] / BASE
    lora = {"method": {"rank": 2}}
    make_run(tmp_path / "run", "meningioma", "lora", base, strategy=lora, run={"image_size": 32})
    words = ["export", tmp_path / "run", "--format", "pth", "--output", tmp_path / "out", "--sam-checkpoint", base]
    assert samseg(monkeypatch, *words) == 0
    told = capsys.readouterr().out
    assert "read back at image_size 32: largest difference" in told and "sam_tiny.pth (0.4 MB)" in told
    written = read_state(tmp_path / "out" / BASE)
    torch.testing.assert_close(tables(written), tables(read_state(base)), rtol=0, atol=0)


def test_bundle_with_a_model_knows_its_base_from_the_card(made, tmp_path):
    folder, networks = made
    bundle = tmp_path / "bundle"
    shutil.copytree(folder / "abdomen_segmentation_ladder", bundle)
    assert read_source(bundle).base_sha256 is None
    save_adapter(networks["ladder"], bundle / "models")
    source = read_source(bundle, sam_checkpoint=str(folder / BASE))
    assert source.base_sha256 == sha256_of(folder / BASE) and source.base == folder / BASE
    assert hash_of(source.network) == hash_of(networks["ladder"])


def test_ladder_as_plain_sam_is_refused_with_all_reasons(made, tmp_path, monkeypatch, capsys):
    folder, _ = made
    words = ["export", folder / "runs" / "ladder", "--format", "pth", "--output", tmp_path / "out"]
    assert samseg(monkeypatch, *words, "--sam-checkpoint", folder / BASE) == 1
    message = capsys.readouterr().err
    assert "(2 problems)" in message and "possible: torch, onnx" in message and "Traceback" not in message
    assert "side network ResNetSide" in message and "2 classes" in message
    assert not (tmp_path / "out").exists()


def test_obstacles_are_listed_for_every_format():
    assert obstacles(SamSegmenter("tiny", LoRA(rank=2), prompt="none")) == {
        "pth": [], "torch": [], "onnx": [], "peft": [], "ckpt_export": [],
        "samed": ["one class: SAMed has a map of the background beside it, this network has one map"],
    }  # fmt: skip
    network = SamSegmenter("tiny", LoRA(rank=2))
    assert "boxes are no input" in obstacles(network)["ckpt_export"][0]
    network.sam.image_encoder.blocks[1].bottleneck = nn.Linear(32, 32)
    [reason] = obstacles(network)["pth"]
    assert "2 tensors" in reason and "image_encoder.blocks.1.bottleneck.bias" in reason
    assert "taken for" in obstacles(SamSegmenter("tiny", num_classes=3))["pth"][0]  # of the same shapes as SAM's
    assert all("no SAM in it" in obstacles(NETWORKS["plain"]())[name][0] for name in ("pth", "samed", "peft"))
    ladder = NETWORKS["ladder"]()
    ladder.side.taps = (0, 1)
    assert all("reads blocks (0, 1)" in obstacles(ladder)[name][0] for name in ("torch", "onnx"))


def test_absent_packages_are_named_with_the_extra_that_brings_them(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(BundleError, match=r"onnxscript are not installed: pip install 'samseg-monai\[onnx\]'"):
        export_network(Source(SamSegmenter("tiny")), "onnx", tmp_path)


def test_files_that_compute_something_else_are_not_kept(tmp_path, monkeypatch):
    def changed(network, base=None):
        state = official_state(network, base)
        state["mask_decoder.output_hypernetworks_mlps.0.layers.2.bias"] += 0.1
        return state

    monkeypatch.setattr(write, "official_state", changed)
    with pytest.raises(
        BundleError, match=r"SamPredictor: largest difference .*; nothing was written|nothing was written"
    ):
        export_network(Source(lively(SamSegmenter("tiny"))), "pth", tmp_path)
    assert not list(tmp_path.iterdir())


def test_difference_counts_other_shapes_and_missing_numbers_as_infinite():
    expected = torch.tensor([1.0, 50.0])
    assert difference("same", [(expected, expected)], 1e-5).passes
    assert difference("near", [(expected + 4e-4, expected)], 1e-5).passes  # of values up to 50
    for got in (expected + 1e-3, expected[:1], torch.tensor([1.0, float("nan")])):
        assert not difference("other", [(got, expected)], 1e-5).passes


def test_what_torch_cannot_record_is_told_with_the_name_of_the_part(tmp_path):
    class Deciding(nn.Module):
        def forward(self, image):
            return image if image.sum() > 0 else -image

    network = PlainSegmenter(Deciding(), image_size=16)
    with pytest.raises(BundleError, match=r"network: torch\.export cannot record PlainPart"):
        export_network(Source(network), "torch", tmp_path)


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["--size", "40"], ConfigError, "height,width"),
        (["--size", "40,33"], ConfigError, "takes slices of all sizes"),
        (["--format", "pth", "--size", "40,33"], ConfigError, "the official layout has none"),
    ],
)
def test_wrong_sizes_are_refused_in_words(words, error, text, made, tmp_path, monkeypatch, capsys):
    folder, _ = made
    given = ["export", folder / "runs" / "lora", "--output", tmp_path, "--sam-checkpoint", folder / BASE]
    given += [] if "--format" in words else ["--format", "torch"]
    assert samseg(monkeypatch, *given, *words) == 1
    message = capsys.readouterr().err
    assert error.__name__ in message and text in message and "Traceback" not in message


def test_folders_that_are_neither_bundle_nor_run_are_named(tmp_path, monkeypatch, capsys):
    assert samseg(monkeypatch, "export", tmp_path, "--format", "pth", "--output", tmp_path / "out") == 1
    assert "configs/inference.json" in capsys.readouterr().err
    assert samseg(monkeypatch, "export", tmp_path / "no", "--format", "pth", "--output", tmp_path / "out") == 1
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="a file is where a folder is wanted"):
        export_network(Source(SamSegmenter("tiny")), "pth", tmp_path / "file")


def test_published_files_are_evaluated_by_the_commands_of_the_page(abdomen, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "CLASSES", 8)
    monkeypatch.setitem(SPECS, "tiny", replace(foreign.WIDE, name="tiny"))  # as wide as SAM-LST's ResNet18
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(foreign.PublishedLadder().state_dict(), "sam_lst.pth")
    sam = foreign.randomise(build_sam("tiny", num_masks=8))
    state = {f"w_a_{n:03}": torch.randn(4, 16) for n in range(4)} | {
        f"w_b_{n:03}": torch.randn(16, 4) for n in range(4)
    }
    state |= {name: value for name, value in sam.state_dict().items() if not name.startswith("image_encoder")}
    torch.save(state, "epoch_159.pth")
    torch.save(h_sam_state(sam, 5, mlp=foreign.WIDE.decoder_mlp_dim), "h_sam.pth")
    for name in ("sam_vit_b_01ec64.pth", "sam_vit_l_0b3195.pth"):
        torch.save(build_sam("tiny").state_dict(), name)
    shown = [line for line in commands(PAGE) if "monai.bundle run" in line or "bundle build" in line]
    assert len(shown) == 6
    for line in shown:
        words = shlex.split(line)
        if words[0] == "samseg":
            assert samseg(monkeypatch, *words[1:]) == 0
            continue
        given = {k.removeprefix("--"): v for k, v in zip(words[4::2], words[5::2], strict=True)}
        given |= {"config_file": ast.literal_eval(given["config_file"]), "dataset_dir": str(abdomen)}
        monai.bundle.run(**{**given, "sam_variant": "tiny", "image_size": 64, "store_size": None})
        card = json.loads((tmp_path / given["output_dir"] / "evaluation" / "run_card.json").read_text())
        assert "random" not in str(card.get("base_sha256"))
        assert (tmp_path / given["output_dir"] / "evaluation" / "cases.csv").is_file()

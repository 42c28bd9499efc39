"""Finding, downloading, reading and loading weights: files are written here, the only server is on loopback."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import nn

from samseg_monai.errors import WeightsError
from samseg_monai.sam.backbone import SamSpec
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.vit import ViTSpec
from samseg_monai.sam.weights import (
    ENVIRONMENT,
    KNOWN,
    WeightsFile,
    cache_folder,
    find_weights,
    load_sam_weights,
    name_of,
    read_state,
    sha256_of,
)
from samseg_monai.sam.weights.find import BLOCK

VIT_B_LAYOUT = ViTSpec(
    "toy", 16, 12, 2, (2, 5, 8, 11), prompt_dim=16, decoder_mlp_dim=16, decoder_heads=2, iou_hidden_dim=8
)


def _random_sam(variant: str | SamSpec = "tiny", **options) -> Sam:
    sam = build_sam(variant, **options)
    with torch.no_grad():  # position tables start at zero, where every interpolation would look right
        for parameter in sam.parameters():
            parameter.normal_(std=0.1)
    return sam


def _snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.fixture(autouse=True)
def _seed_and_empty_machine(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return _snapshot(_random_sam())


@pytest.fixture
def file(state, tmp_path) -> Path:
    torch.save(state, tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


# --- reading --------------------


WRAPPED = {
    "plain SAM": lambda state: state,
    "MedSAM training checkpoint": lambda state: {"model": state, "optimizer": {"lr": 1e-4}, "epoch": 3},
    "MedSAM under DistributedDataParallel": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "Lightning": lambda state: {"state_dict": state},
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_every_known_layout_gives_the_same_flat_state(layout, state, tmp_path):
    torch.save(WRAPPED[layout](state), tmp_path / "file.pth")
    _assert_same(read_state(tmp_path / "file.pth"), state)


def test_a_file_in_the_old_torch_format_is_read(state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    _assert_same(read_state(tmp_path / "old.pth"), state)


def test_half_precision_safetensors_become_float32(state, tmp_path):
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "sam.safetensors")
    got = read_state(tmp_path / "sam.safetensors")
    assert {value.dtype for value in got.values()} == {torch.float32}
    _assert_same(got, {name: value.half().float() for name, value in state.items()})


def test_damaged_files_say_what_they_are(file, state, tmp_path):
    save_file(state, tmp_path / "whole.safetensors")
    contents = {
        "is empty": b"",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 375042383\n",
        "is a web page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
        "truncated or damaged": b"these are no weights",
        "end of the archive": file.read_bytes()[:-2000],
        "truncated or damaged: get it": (tmp_path / "whole.safetensors").read_bytes()[:-2000],
    }
    for message, content in contents.items():
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(WeightsError, match=message) as error:
            read_state(tmp_path / "bad.pth")
        assert "bad.pth" in str(error.value)


def test_a_whole_pickled_model_is_refused_and_never_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="would run code"):
        read_state(tmp_path / "model.pth")


def test_a_file_without_a_state_dict_names_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "note": "none"}, tmp_path / "notes.pth")
    with pytest.raises(WeightsError, match="epoch, note"):
        read_state(tmp_path / "notes.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="but a list"):
        read_state(tmp_path / "list.pth")


def test_the_hash_follows_the_contents_of_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"three")
    assert sha256_of(path) == hashlib.sha256(b"three").hexdigest()


# --- loading --------------------


def test_loading_copies_every_tensor_and_counts_the_changed_ones(file, state):
    sam = build_sam("tiny")
    report = load_sam_weights(sam, file)
    _assert_same(_snapshot(sam), state)
    assert report.loaded == len(state) and 0 < report.changed <= report.loaded
    assert report.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_sam_weights(sam, file).changed == 0  # it holds them already


def test_random_is_an_explicit_start_that_changes_nothing():
    sam = build_sam("tiny")
    before = _snapshot(sam)
    report = load_sam_weights(sam, find_weights("tiny", "random"))
    _assert_same(_snapshot(sam), before)
    assert (report.path, report.sha256, report.loaded) == ("random", None, 0)
    assert "no base weights" in report.summary()


def test_position_tables_at_512_equal_the_published_interpolation(tmp_path):
    state = _snapshot(_random_sam(VIT_B_LAYOUT, image_size=1024))
    torch.save(state, tmp_path / "sam.pth")
    sam = build_sam(VIT_B_LAYOUT, image_size=512)
    report = load_sam_weights(sam, tmp_path / "sam.pth")

    # SAMed and SAM-LST, build_sam.py load_from: every table of blocks 2, 5, 8, 11 as an image, bilinear
    tables = [f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (2, 5, 8, 11) for axis in "hw"]
    expected = dict(state)
    position = state["image_encoder.pos_embed"].permute(0, 3, 1, 2)  # (1, 64, 64, C) -> (1, C, 64, 64)
    position = F.interpolate(position, (32, 32), mode="bilinear", align_corners=False)
    expected["image_encoder.pos_embed"] = position.permute(0, 2, 3, 1)
    for name in tables:
        height, width = state[name].shape
        image = state[name].reshape(1, 1, height, width)
        expected[name] = F.interpolate(image, (2 * 32 - 1, width), mode="bilinear", align_corners=False)[0, 0]
    assert sorted(report.resized) == sorted(["image_encoder.pos_embed", *tables])
    _assert_same(_snapshot(sam), expected)


def test_nothing_is_resized_at_the_size_of_the_file(file):
    assert load_sam_weights(build_sam("tiny"), file).resized == ()


def test_windowed_tables_are_never_stretched(file):
    wider = ViTSpec("wide", 32, 2, 2, (1,), window_size=4, image_size=64, prompt_dim=32, decoder_mlp_dim=64,
                    decoder_heads=2, iou_hidden_dim=32)  # fmt: skip
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.rel_pos_h: file \(5, 16\), network \(7, 16\)"):
        load_sam_weights(build_sam(wider), file)


def test_everything_that_does_not_fit_is_listed_with_both_shapes_and_nothing_is_loaded(state, tmp_path):
    del state["image_encoder.neck.0.weight"], state["prompt_encoder.no_mask_embed.weight"]
    state["stranger.weight"] = torch.ones(2, 3)
    state["mask_decoder.iou_token.weight"] = torch.ones(1, 7)
    torch.save(state, tmp_path / "sam.pth")
    sam = build_sam("tiny")
    before = _snapshot(sam)
    with pytest.raises(WeightsError) as error:
        load_sam_weights(sam, tmp_path / "sam.pth")
    text = str(error.value)
    assert "4 problems" in text
    assert "missing: image_encoder.neck.0.weight: file has none, network (32, 32, 1, 1)" in text
    assert "missing: prompt_encoder.no_mask_embed.weight: file has none, network (1, 32)" in text
    assert "unexpected: stranger.weight: file (2, 3), network has none" in text
    assert "shape: mask_decoder.iou_token.weight: file (1, 7), network (1, 32)" in text
    _assert_same(_snapshot(sam), before)


def test_a_file_that_fits_nowhere_is_refused(tmp_path):
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"unexpected: layer\.weight") as error:
        load_sam_weights(build_sam("tiny"), tmp_path / "other.pth")
    count = len(build_sam("tiny").state_dict())
    heading, *lines = str(error.value).splitlines()
    assert f"({count} missing, 1 unexpected of {count} tensors)" in heading
    assert len(lines) == 11 and lines[-1] == f"  - ... and {count - 9} more"


def test_values_of_numpy_beside_the_weights_are_passed_over(state, tmp_path):
    """As a best score is stored with a checkpoint; nothing of them is made, and among the weights they are refused."""
    beside = {"score": np.float64(0.5), "epoch": np.int64(3), "done": np.bool_(True), "curve": np.ones((2, 3))}
    torch.save({"model": state, "epoch": 3, **beside}, tmp_path / "sam.pth")
    sam = build_sam("tiny")
    load_sam_weights(sam, tmp_path / "sam.pth")
    _assert_same(_snapshot(sam), state)
    torch.save({**state, **beside}, tmp_path / "mixed.pth")
    with pytest.raises(WeightsError, match="these entries are none: score, epoch, done, curve"):
        load_sam_weights(sam, tmp_path / "mixed.pth")
    torch.save({"model": state, "odd": np.random.default_rng(0)}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="is no file of tensors only"):
        load_sam_weights(sam, tmp_path / "odd.pth")


def test_a_file_of_another_variant_is_called_by_its_name(file):
    with pytest.raises(WeightsError, match="looks like a file for sam_variant 'tiny'"):
        load_sam_weights(build_sam("pico"), file)


def _as_tiny_vit(state: dict[str, torch.Tensor], width: int = 32) -> dict[str, torch.Tensor]:
    """The same SAM with an encoder under some of MobileSAM's names, and more of them than anybody wants to read."""
    names = [f"image_encoder.layers.1.blocks.{i}.attn.qkv.weight" for i in range(100)]
    encoder = {name: torch.ones(2, 2) for name in names}
    encoder["image_encoder.patch_embed.seq.0.c.weight"] = torch.ones(width, 3, 3, 3)
    return encoder | {name: value for name, value in state.items() if not name.startswith("image_encoder")}


def test_a_mobile_sam_file_given_to_a_vit_is_called_by_its_name_in_a_few_lines(state, tmp_path):
    torch.save(_as_tiny_vit(state), tmp_path / "mobile.pt")
    count = sum(name.startswith("image_encoder") for name in state) + 101
    with pytest.raises(WeightsError, match=rf"looks like a file for sam_variant 'vit_t' \({count} problems\)") as error:
        load_sam_weights(build_sam("tiny"), tmp_path / "mobile.pt")
    lines = str(error.value).splitlines()
    assert len(lines) == 6 and lines[-1] == f"  - ... and {count - 4} more"
    torch.save(_as_tiny_vit(state, width=8), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="looks like a file for a TinyViT of another size"):
        load_sam_weights(build_sam("tiny"), tmp_path / "other.pt")


def _toy_mobile_sam() -> Sam:
    return build_sam("tiny_t")


def test_a_vit_file_given_to_a_tiny_vit_is_called_by_its_name(file):
    with pytest.raises(WeightsError, match=r"looks like a file for sam_variant 'tiny' \("):
        load_sam_weights(_toy_mobile_sam(), file)


def test_leftovers_that_the_encoder_names_are_passed_over_and_nothing_else_is(tmp_path):
    state = _snapshot(_toy_mobile_sam())
    leftovers = {
        f"image_encoder.{name}": torch.ones(shape)
        for name, shape in {
            "norm_head.weight": 32,
            "norm_head.bias": 32,
            "head.weight": (9, 32),
            "head.bias": 9,
        }.items()
    }
    torch.save(state | leftovers, tmp_path / "mobile.pt")
    sam = _toy_mobile_sam()
    report = load_sam_weights(sam, tmp_path / "mobile.pt")
    assert report.passed_over == tuple(leftovers) and report.loaded == len(state)
    assert "4 passed over" in report.summary()
    _assert_same(_snapshot(sam), state)

    strangers = ["head.weight", "image_encoder.header.weight", "mask_decoder.head.weight", "image_encoder.x.head.bias"]
    torch.save(state | leftovers | {name: torch.ones(2) for name in strangers}, tmp_path / "mobile.pt")
    with pytest.raises(WeightsError, match=r"\(4 problems\)") as error:
        load_sam_weights(_toy_mobile_sam(), tmp_path / "mobile.pt")
    assert [name for name in strangers if f"unexpected: {name}:" not in str(error.value)] == []


def test_leftovers_are_passed_over_by_an_encoder_that_names_them_only(state, tmp_path):
    torch.save(state | {"image_encoder.head.weight": torch.ones(2)}, tmp_path / "sam.pth")
    with pytest.raises(WeightsError, match=r"unexpected: image_encoder\.head\.weight"):
        load_sam_weights(build_sam("tiny"), tmp_path / "sam.pth")


def test_a_samed_file_is_recognised(state, tmp_path):
    adapters = {f"w_{side}_{i:03}": torch.ones(4, 32) for side in "ab" for i in range(4)}
    decoder = {name: value for name, value in state.items() if not name.startswith("image_encoder")}
    torch.save({**adapters, **decoder}, tmp_path / "epoch_159.pth")
    with pytest.raises(WeightsError, match="is a SAMed file"):
        load_sam_weights(build_sam("tiny"), tmp_path / "epoch_159.pth")


class _Adapted(nn.Linear):
    """A linear layer with extra tensors that keeps the names ``weight`` and ``bias``, as adapters do."""

    def __init__(self, base: nn.Linear, extra: str) -> None:
        super().__init__(base.in_features, base.out_features)
        self.register_parameter(extra, nn.Parameter(torch.ones(1)))


def test_replaced_layers_load_and_their_own_tensors_are_not_missing(file, state):
    sam = build_sam("tiny")
    attention = sam.image_encoder.blocks[0].attn
    attention.qkv, attention.proj = _Adapted(attention.qkv, "lora_a"), _Adapted(attention.proj, "bottleneck")
    own = "image_encoder.blocks.0.attn.proj.bottleneck"
    with pytest.raises(WeightsError, match=rf"1 problem\).*\n.*missing: {own}"):
        load_sam_weights(sam, file)
    report = load_sam_weights(sam, file, ignore=[f"sam.{own}"])
    assert sorted(report.ignored) == [own, "image_encoder.blocks.0.attn.qkv.lora_a"]
    assert torch.equal(attention.qkv.weight, state["image_encoder.blocks.0.attn.qkv.weight"])


def test_a_trained_decoder_must_still_be_in_the_file(state, tmp_path):
    name = "mask_decoder.iou_token.weight"
    del state[name]
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(WeightsError, match=f"missing: {name}"):
        load_sam_weights(build_sam("tiny"), tmp_path / "sam.pth", ignore=[name])


@pytest.mark.parametrize("num_masks", [1, 8])
def test_another_number_of_masks_starts_the_mask_head_anew_only_on_request(num_masks, file, state):
    sam = build_sam("tiny", num_masks=num_masks)
    before = _snapshot(sam)
    with pytest.raises(WeightsError, match="allow_new_masks"):
        load_sam_weights(sam, file)
    report = load_sam_weights(sam, file, allow_new_masks=True)
    after = _snapshot(sam)
    kinds = {name.split(".")[1] for name in report.skipped}
    assert kinds == {"mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head"}
    assert set(after) - set(report.skipped) <= set(state)
    for name, value in after.items():
        assert torch.equal(value, before[name] if name in report.skipped else state[name]), name


@pytest.mark.parametrize("num_masks", [1, 8])
def test_a_tiled_mask_head_repeats_the_files_masks_and_leaves_only_the_quality_head(num_masks, file, state):
    sam = build_sam("tiny", num_masks=num_masks)
    before = _snapshot(sam)
    report = load_sam_weights(sam, file, allow_new_masks=True, tile_masks=True)
    expected = {name: state.get(name) for name in before}
    for index in range(num_masks + 1):
        prefix = "mask_decoder.output_hypernetworks_mlps"
        for name in [n for n in before if n.startswith(f"{prefix}.{index}.")]:
            expected[name] = state[name.replace(f"{prefix}.{index}.", f"{prefix}.{index % 4}.")]
    tokens = state["mask_decoder.mask_tokens.weight"]
    expected["mask_decoder.mask_tokens.weight"] = tokens.repeat(3, 1)[: num_masks + 1]
    kept = [n for n in before if "iou_prediction_head" in n]
    _assert_same(_snapshot(sam), expected | {name: before[name] for name in kept if name in report.skipped})
    behind = [n for n in state if n not in before]  # of the file's masks 2 and 3, when there are two only
    assert set(report.skipped) >= {"mask_decoder.iou_prediction_head.layers.2.weight", *behind}
    assert {n.split(".")[1] for n in set(report.skipped) - set(behind)} == {"iou_prediction_head"}
    assert report.loaded == len(before) - len(set(report.skipped) - set(behind))


def test_without_leave_a_tiled_mask_head_is_refused_too(file):
    with pytest.raises(WeightsError, match="allow_new_masks"):
        load_sam_weights(build_sam("tiny", num_masks=8), file, tile_masks=True)


def test_nothing_is_skipped_when_the_number_of_masks_agrees(file):
    assert load_sam_weights(build_sam("tiny"), file, allow_new_masks=True).skipped == ()


# --- finding and downloading --------------------


@dataclass
class _Server:
    """What the loopback server does with the next requests, and what it was asked."""

    content: bytes
    url: str = ""
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # bytes after which an answer breaks off, one per request
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(file):
    told = _Server(file.read_bytes())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            told.asked.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and told.ranges else 0
            total = len(told.content)
            self.send_response(416 if start >= total else 206 if start else 200)
            if start >= total:
                self.send_header("Content-Range", f"bytes */{total}")
            elif start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            body = told.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: told.cuts.pop(0)] if told.cuts else body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        told.url = f"http://127.0.0.1:{running.server_port}/sam_vit_b_01ec64.pth"
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()  # polls every 10 ms
        yield told
        running.shutdown()


@pytest.fixture
def official(server, monkeypatch) -> WeightsFile:
    """The file that is published as vit_b, in this test."""
    digest = hashlib.sha256(server.content).hexdigest()
    official = WeightsFile("sam_vit_b_01ec64.pth", server.url, len(server.content), digest)
    monkeypatch.setitem(KNOWN, "vit_b", official)
    return official


def _part(official: WeightsFile) -> Path:
    cache_folder().mkdir(parents=True, exist_ok=True)
    return cache_folder() / f"{official.name}.part"


def test_the_official_files_are_those_of_the_published_table():
    assert {name: (file.name, file.sha256[:8]) for name, file in KNOWN.items()} == {
        "vit_b": ("sam_vit_b_01ec64.pth", "ec2df627"),
        "vit_l": ("sam_vit_l_0b3195.pth", "3adcc431"),
        "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02"),
        "vit_t": ("mobile_sam.pt", "6dbb9052"),
        "medsam": ("medsam_vit_b.pth", "34b34b78"),
        "resnet18": ("resnet18-f37072fd.pth", "f37072fd"),  # the name holds the start of the hash
    }
    assert all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in KNOWN.values())
    assert all(file.url.endswith(f"/{file.name}") for file in KNOWN.values())
    assert KNOWN["vit_t"].size == 40_728_226  # as its sha256, read off the file in MobileSAM's repository
    assert name_of(KNOWN["vit_t"].sha256) == "mobile_sam.pt" and name_of("0" * 64) is name_of(None) is None


def test_medsam_is_a_vit_b_by_its_names_and_shapes():
    with torch.device("meta"):
        medsam, official = (build_sam(name).state_dict() for name in ("medsam", "vit_b"))
    assert {name: t.shape for name, t in medsam.items()} == {name: t.shape for name, t in official.items()}


def test_lookup_goes_from_the_explicit_path_to_the_environment_to_the_cache_to_the_network(
    official, server, tmp_path, monkeypatch
):
    downloaded = find_weights("vit_b")
    assert downloaded == cache_folder() / official.name and downloaded.read_bytes() == server.content
    assert find_weights("vit_b") == downloaded and len(server.asked) == 1  # from the cache now
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / official.name).write_bytes(server.content)
    monkeypatch.setenv(ENVIRONMENT, str(folder))
    assert find_weights("vit_b") == folder / official.name
    (tmp_path / "medsam.pth").write_bytes(b"any")
    assert find_weights("vit_b", tmp_path / "medsam.pth") == tmp_path / "medsam.pth"
    assert find_weights("vit_b", folder) == folder / official.name
    assert len(server.asked) == 1 and not _part(official).exists()


def test_a_download_goes_on_where_an_earlier_one_was_killed(official, server):
    _part(official).write_bytes(server.content[:1000])
    assert find_weights("vit_b").read_bytes() == server.content
    assert server.asked == ["bytes=1000-"]


def test_a_broken_connection_is_taken_up_again(official, server):
    server.cuts = [2 * BLOCK, BLOCK + 5]
    assert find_weights("vit_b").read_bytes() == server.content
    assert server.asked == [None, f"bytes={2 * BLOCK}-", f"bytes={3 * BLOCK}-"]


def test_a_connection_that_gives_nothing_keeps_the_bytes_for_the_next_run(official, server):
    server.cuts = [BLOCK, 0]
    with pytest.raises(WeightsError, match="download failed"):
        find_weights("vit_b")
    assert _part(official).read_bytes() == server.content[:BLOCK]
    assert find_weights("vit_b").read_bytes() == server.content


def test_a_server_without_ranges_is_read_from_the_start(official, server):
    server.ranges = False
    _part(official).write_bytes(server.content[:1000])
    assert find_weights("vit_b").read_bytes() == server.content


@pytest.mark.parametrize("extra", [b"", b"and something behind it"])
def test_a_part_as_long_as_the_file_or_longer_ends_well(extra, official, server):
    _part(official).write_bytes(server.content + extra)
    assert find_weights("vit_b").read_bytes() == server.content


def test_a_download_with_another_hash_is_thrown_away(official, server):
    server.content = b"<html>captive portal</html>"
    with pytest.raises(WeightsError, match="SHA256") as error:
        find_weights("vit_b")
    assert official.sha256 in str(error.value)
    assert not (cache_folder() / official.name).exists() and not _part(official).exists()


def test_a_wrong_file_under_the_official_name_is_refused(official, tmp_path, monkeypatch):
    (tmp_path / official.name).write_bytes(b"half a download")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(WeightsError, match=f"not the official {official.name}.*15 bytes.*{official.sha256}"):
        find_weights("vit_b", download=False)


def test_offline_and_absent_is_one_error_with_everything_needed(official, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "empty"))
    closed = WeightsFile(official.name, "http://127.0.0.1:9/sam_vit_b_01ec64.pth", official.size, official.sha256)
    monkeypatch.setitem(KNOWN, "vit_b", closed)
    for download in (True, False):
        with pytest.raises(WeightsError) as error:
            find_weights("vit_b", download=download)
        text = str(error.value)
        facts = [closed.url, closed.name, closed.sha256, "sam_checkpoint", ENVIRONMENT, str(cache_folder())]
        assert [fact for fact in facts if fact not in text] == []
        assert str(tmp_path / "empty") in text


def test_absent_paths_and_variants_without_weights_say_what_to_do(tmp_path):
    with pytest.raises(WeightsError, match=r"sam_checkpoint .*is not a file"):
        find_weights("vit_b", tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match=r"^side_weights .*is not a file"):
        find_weights("resnet18", tmp_path / "nowhere.pth", key="side_weights")
    with pytest.raises(WeightsError, match=r"(?s)'resnet18' are not on .*download\.pytorch\.org.*set side_weights to"):
        find_weights("resnet18", download=False, key="side_weights")
    (tmp_path / "resnet18-f37072fd.pth").write_bytes(b"half a download")
    with pytest.raises(WeightsError, match=r"not the official .* name it in side_weights"):
        find_weights("resnet18", tmp_path, key="side_weights")
    with pytest.raises(WeightsError, match=r"'tiny' has no published weights.*'random'"):
        find_weights("tiny")

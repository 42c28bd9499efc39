"""Adapter folders, full models, and refusing what does not belong to a network."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from samseg_monai import checkpoints
from samseg_monai.checkpoints import (
    git_commit,
    load_adapter,
    load_model,
    load_trained,
    read_card,
    remember_base,
    save_adapter,
    save_model,
)
from samseg_monai.errors import CheckpointError, WeightsError
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.weights import KNOWN, sha256_of
from samseg_monai.strategies import Ladder, LoRA


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "tiny.pth"
    torch.save(build_sam("tiny").state_dict(), path)
    return path


@pytest.fixture
def build(base):
    def build_network(*, trained=False, rank=2, **arguments):
        torch.manual_seed(1)
        network = SamSegmenter("tiny", LoRA(rank, **arguments))
        network.load_base(base)
        if trained:
            for name in network.owned:
                nn.init.normal_(network.get_parameter(name))
        return network

    return build_network


@pytest.fixture
def output():
    image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    return lambda network: network(image, torch.tensor([[5.0, 6, 40, 50]]))


def rewrite_card(folder, **changes):
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | changes))


def test_the_card_explains_the_file(build, base, tmp_path):
    network = build(trained=True, dropout=0.1)
    folder = save_adapter(network, tmp_path / "a" / "b", metrics={"dice_mean": 0.81}, extra={"data": "phantoms"})
    assert sorted(os.listdir(folder)) == ["adapter.safetensors", "card.json"]
    card = read_card(folder)
    assert card["strategy"] == {
        "_target_": "samseg_monai.strategies.LoRA",
        "arguments": {
            "rank": 2, "alpha": None, "targets": ["q", "v"], "blocks": None, "dropout": 0.1, "rank_stabilised": False,
            "decoder": False,
        },
    }  # fmt: skip
    expected = {
        "format_version": 1, "sam_variant": "tiny", "base_sha256": sha256_of(base), "num_classes": 1, "image_size": 64,
        "scans": 1, "scan_mode": "mean_logits", "input_scale": "zscore", "prompt": "box", "rectangular": False,
        "tensors": 8, "values": 512, "adapter_sha256": sha256_of(folder / "adapter.safetensors"),
        "metrics": {"dice_mean": 0.81}, "extra": {"data": "phantoms"}, "base_file": "tiny.pth",
    }  # fmt: skip
    assert {key: card[key] for key in expected} == expected
    assert card.keys() == expected.keys() | {"strategy", "package_version", "git_commit"}
    assert set(load_file(folder / "adapter.safetensors")) == set(network.owned)


def test_the_card_of_a_ladder_says_what_its_gate_became(base, tmp_path):
    network = SamSegmenter("tiny", Ladder(nn.Conv2d(3, 32, 16, 16)), num_classes=2, prompt="none")
    network.load_base(base)
    network.side.alpha.data.fill_(1.0)
    card = read_card(save_adapter(network, tmp_path))
    assert card["gate"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert card["strategy"] == {
        "_target_": "samseg_monai.strategies.Ladder",
        "arguments": {
            "side": "torch.nn.modules.conv.Conv2d", "mix": "gate", "decoder": "masks", "masks": "sam",
            "side_weights": None,
        },
    }  # fmt: skip
    assert card["tensors"] == len(network.owned) and not card["rectangular"]


def test_saving_again_replaces_both_files_and_leaves_others(build, output, tmp_path):
    (tmp_path / "model.pt").write_text("mine")
    save_adapter(build(), tmp_path)
    trained = build(trained=True)
    save_adapter(trained, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter.safetensors", "card.json", "model.pt"]
    fresh = build()
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh), output(trained))


def test_a_failed_write_leaves_the_old_adapter_and_no_rubbish(build, tmp_path, monkeypatch):
    save_adapter(build(trained=True), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(build(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_killed_between_its_files_leaves_an_adapter_with_its_own_card(build, output, tmp_path, monkeypatch):
    save_adapter(build(), tmp_path, metrics={"epoch": 1})
    trained, real, calls = build(trained=True), os.replace, []

    def die(source, target):
        calls.append(target.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(trained, tmp_path, metrics={"epoch": 2})
    monkeypatch.undo()
    assert calls == ["adapter.safetensors", "card.json"]
    assert json.loads((tmp_path / "card.json").read_text())["metrics"] == {"epoch": 1}
    fresh = build()
    assert load_adapter(fresh, tmp_path)["metrics"] == {"epoch": 2}
    assert torch.equal(output(fresh), output(trained))
    save_adapter(build(), tmp_path, metrics={"epoch": 3})
    assert read_card(tmp_path)["metrics"] == {"epoch": 3}
    assert sorted(os.listdir(tmp_path)) == ["adapter.safetensors", "card.json"]


def test_half_a_card_of_a_killed_save_is_passed_over(build, tmp_path):
    save_adapter(build(), tmp_path, metrics={"epoch": 1})
    for text in ("", "{", "[]", '{"adapter_sha256": "of tensors that were not moved"}'):
        (tmp_path / ".card.json.tmp").write_text(text)
        assert read_card(tmp_path)["metrics"] == {"epoch": 1}
    (tmp_path / "adapter.safetensors").unlink()  # killed before there was any
    assert read_card(tmp_path)["metrics"] == {"epoch": 1}


def test_all_differences_are_listed_at_once_and_nothing_is_loaded(build, output, tmp_path):
    save_adapter(build(trained=True, rank=3), tmp_path)
    network = SamSegmenter("tiny", LoRA(2), scans=3, scan_mode="channels", input_scale="unit", prompt="none")
    network.load_base("random")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_adapter(network, tmp_path)
    keys = {line.removeprefix("  - ").split(":")[0] for line in str(error.value).splitlines()[1:]}
    assert keys == {"base_sha256", "scans", "scan_mode", "input_scale", "prompt", "strategy rank"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_an_adapter_of_another_scan_is_refused_by_name(base, tmp_path):
    """Their number is equal; a card or a network that names none, as older ones, says nothing against it."""

    def network(scans):
        made = SamSegmenter("tiny", LoRA(rank=2), scans=scans)
        made.load_base(base)
        return made

    save_adapter(network(["t1c"]), tmp_path)
    assert read_card(tmp_path)["scan_names"] == ["t1c"]
    for scans in (1, ["t1c"]):
        load_adapter(network(scans), tmp_path)
    with pytest.raises(CheckpointError, match="scans: adapter of t1c, network of t1n"):
        load_adapter(network(["t1n"]), tmp_path)
    save_model(network(["t1c"]), tmp_path / "model.safetensors")  # a packed bundle has the card beside it
    with pytest.raises(CheckpointError, match="scans: adapter of t1c, network of t1n"):
        load_trained(network(["t1n"]), checkpoint=tmp_path / "model.safetensors")


def test_other_dropout_is_no_reason_to_refuse(build, output, tmp_path):
    trained = build(trained=True, dropout=0.5)
    save_adapter(trained, tmp_path)
    other = build()
    load_adapter(other, tmp_path)
    assert torch.equal(output(other), output(trained))


def test_tensors_that_are_not_those_of_the_card_are_refused(build, tmp_path):
    network = build()
    save_adapter(network, tmp_path)
    path = tmp_path / "adapter.safetensors"
    state = load_file(path)
    first, second, *_ = state
    state["stranger"] = state.pop(first)
    state[second] = state[second].flatten()
    save_file(state, path)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load_adapter(network, tmp_path)
    rewrite_card(tmp_path, adapter_sha256=sha256_of(path))
    with pytest.raises(CheckpointError) as error:
        load_adapter(network, tmp_path)
    assert "(3 problems)" in str(error.value) and f"{first}: missing in the file" in str(error.value)


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"format_version": 99}'])
def test_an_unreadable_card_is_a_clear_error(tmp_path, content):
    if content is not None:
        (tmp_path / "card.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"card\.json: (no such file|is not JSON|expected a JSON object|card format)"
    ):
        read_card(tmp_path)


def test_tensors_replaced_within_a_clock_tick_are_not_taken_for_the_old_ones(build, tmp_path):
    save_adapter(build(), tmp_path)
    load_adapter(build(), tmp_path)
    path = tmp_path / "adapter.safetensors"
    before = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as coarse clocks of file systems leave it
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load_adapter(build(), tmp_path)


def test_damaged_tensors_are_a_clear_error(build, tmp_path):
    network = build()
    save_adapter(network, tmp_path)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    rewrite_card(tmp_path, adapter_sha256=sha256_of(path))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(network, tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        load_adapter(network, tmp_path)


def test_an_adapter_on_nothing_or_of_a_merged_network_is_not_saved(build, tmp_path):
    with pytest.raises(CheckpointError, match="never loaded"):
        save_adapter(SamSegmenter("tiny", LoRA(2)), tmp_path)
    network = build()
    network.merge()
    with pytest.raises(CheckpointError, match="merged"):
        save_adapter(network, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_model_file_is_a_bare_state_dict_that_loads_strictly(build, output, tmp_path):
    trained = build(trained=True)
    path = save_model(trained, tmp_path / "models" / "model.pt")
    assert os.listdir(path.parent) == ["model.pt"]
    state = torch.load(path, weights_only=True)
    assert state.keys() == trained.state_dict().keys()
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    fresh = SamSegmenter("tiny", LoRA(2))
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(output(fresh), output(trained))
    again = SamSegmenter("tiny", LoRA(2))
    load_model(again, path)
    assert torch.equal(output(again), output(trained))
    assert again.base_sha256 == sha256_of(path)


def test_a_model_that_does_not_fit_lists_every_tensor(build, tmp_path):
    path = save_model(build(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as error:
        load_model(SamSegmenter("tiny", LoRA(3, targets=("q", "k"), blocks=[0])), path)
    text = str(error.value)
    assert "attn.qkv.lora_a.1: missing in the file" in text
    assert "blocks.1.attn.qkv.lora_a.0: in the file, not in the network" in text
    assert "blocks.0.attn.qkv.lora_a.0: shape (2, 32) in the file, (3, 32) in the network" in text
    assert "(10 problems)" in text  # block 0: 2 missing, 2 unexpected, 2 shapes; block 1: 4 unexpected


def test_a_file_that_is_no_state_dict_is_a_clear_error(build, tmp_path):
    network = build()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"epoch": 3, "model": network.state_dict()}, tmp_path / "resume.pt")
    torch.save(network, tmp_path / "object.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(network, tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="not a bare state dict"):
        load_model(network, tmp_path / "resume.pt")
    for name in ("text.pt", "object.pt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_model(network, tmp_path / name)


class TestLoadTrained:
    def test_without_checkpoint_it_loads_the_base(self, build, base, output):
        network = SamSegmenter("tiny")
        assert "zero-shot" in load_trained(network, sam_checkpoint=base)
        assert torch.equal(output(network), output(build()))

    def test_without_checkpoint_a_strategy_that_trains_is_refused(self, base):
        with pytest.raises(CheckpointError, match="train first"):
            load_trained(SamSegmenter("tiny", LoRA(2)), sam_checkpoint=base)

    def test_an_adapter_folder_gets_its_base_first(self, build, base, output, tmp_path):
        trained = build(trained=True)
        save_adapter(trained, tmp_path)
        network = SamSegmenter("tiny", LoRA(2))
        assert "strategies.LoRA, 512 values" in load_trained(network, checkpoint=tmp_path, sam_checkpoint=base)
        assert torch.equal(output(network), output(trained))

    def test_an_adapter_on_another_base_is_refused(self, build, tmp_path):
        save_adapter(build(trained=True), tmp_path)
        with pytest.raises(CheckpointError, match=r"base_sha256: adapter '[0-9a-f]{64}', network 'random'"):
            load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=tmp_path, sam_checkpoint="random")

    def test_an_adapter_on_another_base_says_which_file_it_wants(self, build, base, tmp_path):
        save_adapter(build(trained=True), tmp_path / "adapter")
        other = tmp_path / "mobile_sam.pt"
        torch.save(build_sam("tiny").state_dict(), other)
        card = json.loads((tmp_path / "adapter" / "card.json").read_text())
        wanted = rf"adapter '{sha256_of(base)}', network '{sha256_of(other)}'; the adapter holds changes to the weights"
        known = {**card, "base_sha256": KNOWN["vit_t"].sha256, "base_file": None}
        for changes, told in (
            (card, rf"{wanted} of tiny\.pth, .* and not to those of mobile_sam\.pt: set sam_checkpoint to the path"),
            (known, r"of mobile_sam\.pt, the file with the first sha256: set"),  # named by the table of known files
            ({**known, "base_sha256": "0" * 64}, r"weights of the file with the first sha256 and not"),
            ({**known, "base_sha256": "random"}, r"trained on a random start: set sam_checkpoint to 'random'"),
        ):
            rewrite_card(tmp_path / "adapter", **changes)
            with pytest.raises(CheckpointError, match=rf"base_sha256: .*{told}"):
                load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=tmp_path / "adapter", sam_checkpoint=other)

    def test_a_card_without_the_name_of_its_base_is_read_as_before(self, build, base, tmp_path):
        save_adapter(build(trained=True), tmp_path)
        card = json.loads((tmp_path / "card.json").read_text())
        del card["base_file"]
        (tmp_path / "card.json").write_text(json.dumps(card))
        renamed = tmp_path / "renamed.pth"
        renamed.write_bytes(base.read_bytes())  # the hash decides, whatever the name
        assert "512 values" in load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=tmp_path, sam_checkpoint=renamed)

    def test_a_full_model_needs_no_base(self, build, output, tmp_path):
        trained = build(trained=True)
        path = save_model(trained, tmp_path / "model.pt")
        network = SamSegmenter("tiny", LoRA(2))
        assert "full model" in load_trained(network, checkpoint=path)
        assert torch.equal(output(network), output(trained))

    def test_an_absent_checkpoint_says_the_ways_to_give_one(self, tmp_path):
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(CheckpointError, match=r"(?s)no .*adapter\.safetensors.*model\.pt.*null"):
                load_trained(SamSegmenter("tiny"), checkpoint=path)

    def test_a_run_finds_the_file_it_was_trained_on_while_it_is_the_same(self, build, base, output, tmp_path):
        trained = build(trained=True)
        save_adapter(trained, tmp_path / "run")
        remember_base(tmp_path / "run", base)
        network = SamSegmenter("tiny", LoRA(2))
        assert "512 values" in load_trained(network, checkpoint=tmp_path / "run")
        assert torch.equal(output(network), output(trained))
        other = tmp_path / "other.pth"
        torch.save(build_sam("tiny").state_dict(), other)
        for path in (other, tmp_path / "absent.pth", tmp_path):
            remember_base(tmp_path / "run", path)
            with pytest.raises(WeightsError, match="no published weights"):
                load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=tmp_path / "run")

    def test_a_run_on_a_file_of_its_own_downloads_no_other(self, build, monkeypatch, tmp_path):
        save_adapter(build(trained=True), tmp_path)
        remember_base(tmp_path, "/gone/mine.pth")
        monkeypatch.setitem(KNOWN, "tiny", KNOWN["vit_t"])
        with pytest.raises(
            WeightsError, match=r"trained with /gone/mine\.pth \(sha256 [0-9a-f]{64}\).*--sam-checkpoint FILE"
        ):
            load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=tmp_path)

    def test_an_absent_base_is_an_error(self, build, tmp_path):
        save_adapter(build(), tmp_path)
        with pytest.raises(WeightsError):
            load_trained(SamSegmenter("tiny", LoRA(2)), checkpoint=tmp_path, sam_checkpoint=tmp_path / "absent.pth")


def test_the_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit.__wrapped__() is None

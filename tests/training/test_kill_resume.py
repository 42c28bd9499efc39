"""A training that is killed (SIGKILL), again and again, ends as one that never was: bit for bit, file by file."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from samseg_monai.bundles import build_bundle
from samseg_monai.checkpoints import read_card
from samseg_monai.sam.weights import sha256_of
from tests.conftest import TINY
from tests.helpers.forked import ITERATION, REPLACE, VOLUME, forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

FLIP = {"_target_": "RandFlipd", "keys": ["image", "label", "prompt"], "prob": 0.5, "allow_missing_keys": True}
SHIFT = {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 0.5, "prob": 0.9}

# everything that has a state or draws: accumulation, EMA, dropout, pickers, augmentation, schedule, clipping, patience
LORA = {
    "scans": ["t1c"],  # four cost four times as much and have no state
    "epochs": 5, "batch_size": 2, "lr": 0.01, "val_interval": 2, "accumulation_steps": 3, "ema": 0.9, "clip_norm": 0.5,
    "early_stop": 9, "strategy::rank": 2, "strategy::dropout": 0.2,
    "schedule": {"warmup": 1, "decay": "poly", "power": 0.9},
    "slices::picker": {"_target_": "samseg_monai.data.slices.RandomN", "n": 2},
    "augmentation_transforms": [FLIP, SHIFT],
}  # fmt: skip
LADDER = {
    "epochs": 2, "batch_size": 4, "lr": 0.001, "val_interval": 1, "strategy::side_weights": "random",
    "schedule": {"warmup": 2, "decay": "cosine", "power": 0.9}, "embeddings::variants": 2,
    "slices::picker": {"_target_": "samseg_monai.data.slices.EveryNth", "n": 5}, "augmentation_transforms": [SHIFT],
}  # fmt: skip
# patches, and the dropout of a network without SAM
VOLUMES = {
    "epochs": 2, "batch_size": 2, "lr": 0.01, "val_interval": 1, "patch": [16, 16, 16],
    "network_def::net::channels": [4, 4, 8, 8], "network_def::net::dropout": 0.3, "mirrored_classes": [],
    "augmentation": "strong",
}  # fmt: skip
CHAINS = {
    "lora": [
        {"at": ITERATION},
        {"at": REPLACE, "of": "run_card.json", "torn": True},
        {"at": REPLACE, "of": "history.csv", "torn": True},
        {"at": ITERATION, "call": 6},  # in the second epoch: the first is in resume.pt
        {"at": REPLACE, "of": "adapter.safetensors", "torn": True},
        {"at": REPLACE, "of": "card.json"},  # new tensors, old card
        {"at": REPLACE, "of": "resume.pt", "torn": True},  # adapter and history are an epoch ahead
        {"at": VOLUME, "call": 4},  # in the second validation
        {"at": ITERATION, "call": 6},  # in the last epoch, which has no validation
        {"at": REPLACE, "of": "run_card.json", "call": 3},  # after the last epoch, before "completed"
        {"at": REPLACE, "of": "resume.pt"},  # after "completed"
    ],
    "lora, two workers, slices on disk": [
        {"at": "samseg_monai.data.slices.cache:CachedCase._write", "call": 3},
        {"at": ITERATION, "call": 7},
        {"at": REPLACE, "of": "resume.pt", "torn": True},
    ],
    "lora, validated on picked slices": [
        {"at": VOLUME, "call": 2},  # in the first validation
        {"at": REPLACE, "of": "history.csv", "torn": True},
        {"at": "samseg_monai.handlers.validation:WholeVolumes.__call__", "call": 2},  # behind the last epoch
        {"at": "samseg_monai.handlers.validation:load_adapter"},
        {"at": "samseg_monai.handlers.validation:save_adapter"},  # whole volumes are validated, and no file says so yet
        {"at": REPLACE, "of": "resume.pt"},
    ],
    "ladder, embeddings on disk": [
        {"at": "samseg_monai.data.slices.cache:CachedCase._begin", "call": 2},
        {"at": ITERATION, "call": 2},
        {"at": REPLACE, "of": "card.json"},
        {"at": VOLUME},
    ],
    "attention_unet_3d, volumes": [
        {"at": ITERATION, "call": 5},  # in the second epoch
        {"at": REPLACE, "of": "resume.pt", "torn": True},
    ],
}


@pytest.fixture(scope="module")
def start(phantoms, abdomen, hippocampi, tmp_path_factory):
    """Train into a folder, perhaps to be killed; gives the exit code and what was printed."""
    bundles = tmp_path_factory.mktemp("bundles")
    configs = {
        name: build_bundle(*name, bundles) / "configs"
        for name in (("meningioma", "lora"), ("abdomen", "ladder"), ("hippocampus", "attention_unet_3d"))
    }

    def train(way, folder, die=None):
        if "ladder" in way:
            name, overrides = ("abdomen", "ladder"), {**LADDER, "dataset_dir": str(abdomen)}
            overrides["embeddings::cache_dir"] = str(folder / "embeddings")
        elif "volumes" in way:
            name, overrides = ("hippocampus", "attention_unet_3d"), {**VOLUMES, "dataset_dir": str(hippocampi)}
        else:
            name, overrides = ("meningioma", "lora"), {**LORA, "dataset_dir": str(phantoms)}
        if "workers" in way:
            cache = {"slices::cache": "disk", "slices::cache_dir": str(folder / "slices")}
            budget = {"epochs": 3, "steps_per_epoch": 3, "training_cases": 3}
            overrides |= {**budget, "slices::num_workers": 2, **cache}
        if "picked" in way:
            overrides |= {"epochs": 3, "validation::picker": {"_target_": "samseg_monai.data.slices.MaxArea"}}
        folder.mkdir(exist_ok=True)
        log = folder / "log"
        codes = forked().run(
            [configs[name] / "train.json"],
            {**({} if "volumes" in way else TINY), **overrides, "output_dir": str(folder)},
            log,
            die=die,
        )
        return codes[0], log.with_name("log.0").read_text(encoding="utf-8", errors="replace")

    return train


# one chain each time, all of them where there is time
@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[pytest.mark.whole] * (w != "lora" and "volumes" not in w)) for w in CHAINS]
)
def test_a_training_killed_at_every_bad_moment_ends_like_one_that_was_left_alone(way, start, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, printed = start(way, whole)
    assert code == 0, printed[-3000:]
    for moment in CHAINS[way]:
        code, printed = start(way, cut, moment)
        assert code == -signal.SIGKILL, f"{moment}: {printed[-3000:]}"
        nothing_is_torn(cut)
    code, printed = start(way, cut)
    assert code == 0, printed[-3000:]
    for name in ("adapter.safetensors", "card.json", "history.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    same(resume(cut), resume(whole))
    cards = [json.loads((folder / "run_card.json").read_text()) for folder in (cut, whole)]
    for key in (
        "status",
        "epochs",
        "iterations",
        "best",
        "metrics",
        "gradient_flow",
        "collapsed_classes",
        "stop_reason",
    ):
        assert cards[0][key] == cards[1][key], key
    assert cards[0]["status"] == "completed" and cards[0]["metrics"]
    assert not list(cut.glob("*.tmp"))
    code, printed = start(way, cut)
    assert code == 1 and "already trained" in printed
    assert json.loads((cut / "run_card.json").read_text()) == cards[0]


def nothing_is_torn(folder):
    """Whatever there is after a kill can be read, and an adapter has the card that belongs to it."""
    if (folder / "adapter.safetensors").is_file():
        assert read_card(folder)["adapter_sha256"] == sha256_of(folder / "adapter.safetensors")
        load_file(folder / "adapter.safetensors")
    if (folder / "run_card.json").is_file():
        json.loads((folder / "run_card.json").read_text())
    if (folder / "resume.pt").is_file():
        epochs = resume(folder)["epoch"]
        with open(folder / "history.csv", newline="") as stream:
            rows = [(int(row["epoch"]), row["name"]) for row in csv.DictReader(stream)]
        assert len(set(rows)) == len(rows) and {epoch for epoch, _ in rows} >= set(range(1, epochs + 1))


def resume(folder):
    return torch.load(folder / "resume.pt", weights_only=True)


def same(one, other, where="resume.pt"):
    """Equal down to the last bit, with the same types."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where} {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where} {index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other or one != one, where

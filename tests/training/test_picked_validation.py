"""Validations of picked slices choose the epoch; its numbers are those of whole volumes, and every file says so."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from safetensors.torch import load_file

from samseg_monai.bundles import build_bundle
from samseg_monai.checkpoints import read_card
from samseg_monai.errors import CheckpointError
from samseg_monai.metrics import read_history
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY

PICKER = {"_target_": "samseg_monai.data.slices.MaxArea"}


@pytest.fixture(scope="module")
def runs(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("picked")
    configs = build_bundle("meningioma", "lora", folder / "bundles") / "configs"
    shared = {**TINY, "dataset_dir": str(phantoms), "scans": ["t1c"], "epochs": 3, "val_interval": 1, "lr": 0.01,
              "ema": 0.5, "strategy::rank": 2}  # fmt: skip
    for name, more in {"whole": {}, "picked": {"validation::picker": PICKER}}.items():
        run_workflow([configs / "train.json"], {**shared, **more, "output_dir": str(folder / name)}, echo=False)
    return {name: folder / name for name in ("whole", "picked")}


def curves(folder):
    rows, problems = read_history(folder / "history.csv")
    assert not problems
    return rows


def test_the_training_is_the_same_and_the_chosen_epoch_has_the_numbers_of_whole_volumes(runs):
    whole, picked = (curves(runs[name]) for name in ("whole", "picked"))
    for epoch in (1, 2, 3):
        for name in ("train_loss", "lr"):
            assert picked[epoch, name] == whole[epoch, name]
    scores = {epoch: value for (epoch, name), (_, value) in picked.items() if name == "picked_val_dice"}
    best = max(scores, key=lambda epoch: scores[epoch])
    assert sorted(scores) == [1, 2, 3]
    named = {"val_dice", "val_loss", "dice_mean", "n"}
    assert {(epoch, name) for epoch, name in picked if name in named} == {(best, name) for name in named}
    for name in named:
        assert picked[best, name] == whole[best, name]  # the weights of the best epoch, all slices, their iteration
    assert all(math.isfinite(value) for _, value in picked.values())
    assert picked[best, "picked_val_dice"] != picked[best, "val_dice"]


def test_card_and_adapter_say_which_is_which(runs):
    card = json.loads((runs["picked"] / "run_card.json").read_text())
    rows = curves(runs["picked"])
    best = card["best"]["epoch"]
    assert card["best"] == {
        "metric": rows[best, "val_dice"][1],
        "epoch": best,
        "slices": "all",
        "chosen_by": "MaxArea()",
        "chosen_metric": rows[best, "picked_val_dice"][1],
    }
    assert card["metrics"]["val_dice"] == rows[best, "val_dice"][1]
    assert card["metrics"]["picked_val_dice"] == rows[3, "picked_val_dice"][1]
    kept = read_card(runs["picked"])["metrics"]
    assert kept["epoch"] == best and kept["chosen_by"] == "MaxArea()"
    assert kept["val_dice"] == rows[best, "val_dice"][1]
    assert kept["picked_val_dice"] == rows[best, "picked_val_dice"][1]
    plain = json.loads((runs["whole"] / "run_card.json").read_text())
    assert set(plain["best"]) == {"metric", "epoch"} and not any("picked" in name for name in plain["metrics"])


def test_the_adapter_is_that_of_the_chosen_epoch_and_the_training_could_go_on(runs):
    import torch

    best = {name: json.loads((runs[name] / "run_card.json").read_text())["best"]["epoch"] for name in runs}
    whole, picked = (load_file(runs[name] / "adapter.safetensors") for name in ("whole", "picked"))
    if best["whole"] == best["picked"]:
        assert all(torch.equal(whole[name], tensor) for name, tensor in picked.items())
    states = [torch.load(runs[name] / "resume.pt", weights_only=True) for name in ("whole", "picked")]
    for name, tensor in states[0]["network"].items():
        assert torch.equal(states[1]["network"][name], tensor)  # the last epoch's weights, not the best one's


@pytest.mark.parametrize("other", [None, {"_target_": "samseg_monai.data.slices.EveryNth", "n": 2}])
def test_a_training_does_not_go_on_with_validations_of_other_slices(runs, other, phantoms, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["picked"], folder)
    configs = runs["picked"].parent / "bundles" / "meningioma_segmentation_lora" / "configs"
    shared = {**TINY, "dataset_dir": str(phantoms), "scans": ["t1c"], "epochs": 4, "val_interval": 1, "lr": 0.01,
              "ema": 0.5, "strategy::rank": 2, "output_dir": str(folder)}  # fmt: skip
    now = {} if other is None else {"validation::picker": other}
    before = (folder / "card.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"validated slices: MaxArea\(\) in the file, .* \(validation::picker\)"):
        run_workflow([configs / "train.json"], {**shared, **now}, echo=False)
    assert (folder / "card.json").read_bytes() == before

"""SAM-LST as one command, at its real size: official-layout files with random weights, volumes of two slices."""

import json
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

from samseg_monai import cli
from samseg_monai.cli.reproduce import PAPER, _Plan
from samseg_monai.data.datalists.label_maps import BTCV_TESTING as TESTING
from samseg_monai.data.datalists.label_maps import BTCV_TRAINING as TRAINING
from samseg_monai.demo.abdomen_phantoms import make_case
from samseg_monai.sam.build import build_sam

SHAPE = (64, 64, 2)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["samseg", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def synapse(tmp_path_factory):
    """Two training cases and one test case in BTCV's layout: the two slices of a phantom that show most organs."""
    folder = tmp_path_factory.mktemp("synapse")
    for number in (*TRAINING[:2], TESTING[0]):
        case = make_case([0, int(number)], (64, 64, 24))
        organs = [len(np.unique(case["label"][..., k])) for k in range(24)]
        first = max(range(23), key=lambda k: organs[k] + organs[k + 1])
        for name, array in (("img", case["img"]), ("label", case["label"])):
            (folder / name).mkdir(exist_ok=True)
            image = nib.Nifti1Image(array[..., first : first + 2], case["affine"])
            nib.save(image, folder / name / f"{name}{number}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files with the keys and shapes of sam_vit_b_01ec64.pth and resnet18-f37072fd.pth, and random values."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(build_sam("vit_b").state_dict(), folder / "vit_b_random.pth")
    torch.save(resnet18(weights=None).state_dict(), folder / "resnet_random.pth")
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.whole
def test_sam_lst_experiment_runs_at_its_real_size(synapse, weights, tmp_path, monkeypatch, capsys):
    out, cache = tmp_path / "out", tmp_path / "bank"
    sam = weights / "vit_b_random.pth"
    words = ["reproduce", "sam-lst", "--synapse", synapse, "--weights", sam, "--resnet", weights / "resnet_random.pth"]
    words += ["--output", out, "--only", "ladder_paper", "--only", "zero_shot", "--epochs", 1, "--allow-missing"]
    assert run(monkeypatch, *words, "--cache-embeddings", cache, "--variants", 1) == 0
    printed = capsys.readouterr().out
    assert "quoted from the paper" in printed and "Ladder, as published [vit_b]" in printed

    card = json.loads((out / "ladder_paper" / "run_card.json").read_text(encoding="utf-8"))
    assert (card["sam_variant"], card["status"], card["iterations"]) == ("vit_b", "completed", 1)
    assert card["trainable_parameters"] == 2_856_737 and abs(card["gate"] - 0.5) < 0.01
    settings = card["settings"]
    assert (settings["image_size"], settings["store_size"], settings["batch_size"]) == (512, 224, 24)
    assert (settings["seed"], settings["lr"], settings["val_interval"]) == (1234, 0.001, 0)
    stored = [[load_file(path)["embedding"] for path in cache.glob(f"{name}.safetensors")] for name in ("*/*", "*")]
    # the test volume, for both runs, and one look at the four training slices
    assert [sum(map(len, rows)) for rows in stored] == [2, 4]
    assert sum(rows.nbytes for kind in stored for rows in kind) == 6 * 256 * 32 * 32 * 2

    rows = json.loads((out / "organs.json").read_text(encoding="utf-8"))["runs"]
    assert list(rows) == ["zero_shot", "ladder_paper"]
    assert all(row["published"]["cases"] == row["honest"]["cases"] == 1 for row in rows.values())
    assert rows["ladder_paper"]["gate"] == pytest.approx(card["gate"])
    assert "1 epochs, not 200" in (out / "report.html").read_text(encoding="utf-8")

    archive = tmp_path / "ladder.zip"
    assert run(monkeypatch, "bundle", "pack", out / "ladder_paper", "--output", archive, "--sam-checkpoint", sam) == 0
    with zipfile.ZipFile(archive) as content:
        texts = [content.read(name).decode() for name in content.namelist() if name.endswith(".json")]
    assert len(texts) > 5 and not [text for text in texts if str(tmp_path) in text or str(weights) in text]
    scan = synapse / "img" / f"img{TESTING[0]}.nii.gz"
    assert run(monkeypatch, "predict", archive, "--input", scan, "--output", tmp_path / "seg") == 0
    result = nib.load(tmp_path / "seg" / f"img{TESTING[0]}_seg.nii.gz")
    assert result.shape == SHAPE and np.array_equal(result.affine, nib.load(scan).affine)
    assert set(np.unique(np.asarray(result.dataobj))) <= set(range(9))


def plan(tmp_path, **changes):
    shared = {"dataset_dir": "d", "sam_checkpoint": "sam.pth", "seed": 1234, "batch_size": 24}
    training = {"epochs": 200, "accumulation_steps": 1}
    settings = {"validation": 0, "cache": None, "variants": None, "shared": shared, "training": training, **changes}
    return _Plan(tmp_path, "resnet.pth", **settings)


def test_default_changes_nothing_of_the_published_recipe(tmp_path):
    published = plan(tmp_path)
    assert published.departures() == []
    places = {"dataset_dir", "datalist", "output_dir", "sam_checkpoint", "strategy::side_weights"}
    for name in PAPER[1:]:
        recipe = json.loads((cli_bundle(tmp_path, name) / "configs" / "train.json").read_text(encoding="utf-8"))
        changed = {key: value for key, value in published.fitting(name).items() if key not in places}
        assert changed == {key: recipe[key] for key in ("seed", "batch_size", "epochs", "accumulation_steps")}
        assert (recipe["store_size"], recipe["image_size"], recipe["val_interval"]) == (224, 512, 0)
    assert published.evaluation("zero_shot")["store_size"] == 224


def cli_bundle(folder, name):
    from samseg_monai.bundles import build_bundle

    return build_bundle("abdomen", name, folder)


def test_cached_embeddings_and_accumulation_reach_the_trainings_that_have_an_encoder(tmp_path):
    short = plan(tmp_path, cache=tmp_path / "bank", training={"epochs": 200, "accumulation_steps": 4})
    assert short.fitting("ladder_paper")["embeddings::cache_dir"] == str(tmp_path / "bank")
    assert "embeddings::cache_dir" not in short.fitting("cnn_only")
    assert {short.fitting(name)["embeddings::variants"] for name in PAPER[1:]} == {8}
    assert "batch 96, not 24" in short.departures()


def test_repaired_ladder_has_validation_patients_of_its_own(tmp_path):
    published = plan(tmp_path)
    assert published.choosing("ladder_paper") == 0 and published.choosing("ladder") == 3
    assert published.fitting("ladder")["datalist"] != published.fitting("ladder_paper")["datalist"]
    assert plan(tmp_path, validation=2).fitting("cnn_only")["val_interval"] == 10


def test_unknown_run_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    words = ["--synapse", "nowhere", "--weights", "random", "--resnet", "random", "--output", tmp_path / "out"]
    assert run(monkeypatch, "reproduce", "sam-lst", *words, "--only", "ladder") == 1
    message = capsys.readouterr().err
    assert "ladder_paper" in message and "--repaired" in message and not (tmp_path / "out").exists()

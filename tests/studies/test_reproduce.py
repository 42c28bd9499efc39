"""The published experiments as one command, at real size on files of the official layout with random weights."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from samseg_monai import cli
from samseg_monai.demo.brain_phantoms import make_case
from samseg_monai.sam.build import build_sam


def write_case(folder, name: str, seed: int) -> None:
    """One case of 240 x 240 x 155 voxels whose tumour is cut down to the slice where it is largest."""
    case = make_case(seed, (240, 240, 155))
    label = np.zeros_like(case["seg"])
    k = int((case["seg"] > 0).sum((0, 1)).argmax())
    label[..., k] = case["seg"][..., k]
    affine = case.pop("affine")
    (folder / name).mkdir(parents=True)
    for scan in ("t1n", "t1c", "t2w", "t2f"):
        nib.save(nib.Nifti1Image(case[scan], affine), folder / name / f"{name}-{scan}.nii")
    nib.save(nib.Nifti1Image(label, affine), folder / name / f"{name}-seg.nii")


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brats")
    names = [f"BraTS-MEN-{i:05d}-000" for i in (4, 8, 10)]
    for seed, name in enumerate(names):
        write_case(folder, name, seed)
    split = dict(zip(("training", "validation", "testing"), ([n] for n in names), strict=True))
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def official_layout(tmp_path_factory):
    """A file with the keys and shapes of sam_vit_b_01ec64.pth and random values."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit_b_random.pth"
    torch.save(build_sam("vit_b").state_dict(), path)
    return path


@pytest.mark.timeout(2400)
@pytest.mark.whole
def test_honours_experiment_runs_at_its_real_size(brats, official_layout, tmp_path, monkeypatch, capsys):
    words = ["reproduce", "honours", "--brats", brats, "--weights", official_layout, "--output", tmp_path / "out"]
    # one of four scans: the others are three more passes of the same network
    words += ["--rank", 64, "--scan", "t1c", "--epochs", 1, "--split-file", brats / "split.json", "--checkpointing"]
    # processors without AVX-512 emulate bf16, ten times slower than float32
    words += ["--autocast", "bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    monkeypatch.setattr(sys, "argv", ["samseg", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"box_ellipse", "zero_shot", "lora_rank64"}
    assert all(r["n"] == 1 and 0 <= r["dice_mean"] <= 1 for r in results.values())
    card = json.loads((out / "lora_rank64" / "run_card.json").read_text())
    assert (card["sam_variant"], card["status"], card["trainable_parameters"]) == ("vit_b", "completed", 2_359_296)
    assert card["settings"]["scans"] == ["t1c"]
    assert card["settings"]["crop_mm"] == [138, 202] and card["settings"]["image_size"] == 1024

    archive = tmp_path / "bundle.zip"
    case = brats / "BraTS-MEN-00010-000"
    label = np.asarray(nib.load(case / f"{case.name}-seg.nii").dataobj)
    where = np.argwhere(label > 0)
    box = [{"slice": int(where[0, 2]), "box": [*map(int, where.min(0)[:2]), *map(int, where.max(0)[:2])]}]
    (tmp_path / "boxes.json").write_text(json.dumps({case.name: box}))
    for line in (
        ["bundle", "pack", out / "lora_rank64", "--output", archive, "--sam-checkpoint", official_layout],
        ["predict", archive, "--input", case, "--boxes", tmp_path / "boxes.json", "--output", tmp_path / "seg"],
    ):
        monkeypatch.setattr(sys, "argv", ["samseg", *map(str, line)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    result = nib.load(tmp_path / "seg" / f"{case.name}_seg.nii.gz")
    assert result.shape == (240, 240, 155)
    assert np.array_equal(result.affine, nib.load(case / f"{case.name}-t1c.nii").affine)


def test_honours_refuses_unknown_scans(brats, tmp_path, monkeypatch, capsys):
    words = ["reproduce", "honours", "--brats", brats, "--weights", "random", "--output", tmp_path, "--scan", "flair"]
    monkeypatch.setattr(sys, "argv", ["samseg", *map(str, words), "--scan", "t1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code
    told = capsys.readouterr().err
    assert "--scan flair: choose from t1n, t1c, t2w, t2f" in told and "--scan t1:" in told

"""Plans of published experiments at their real size, on files of the official layout with random weights."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

from samseg_monai.comparison import perform, read_plan, write_comparison
from samseg_monai.comparison.plan import PLANS
from samseg_monai.data.datalists.brats import prepare_brats_men
from samseg_monai.data.datalists.label_maps import BTCV_TESTING as TESTING
from samseg_monai.data.datalists.label_maps import BTCV_TRAINING as TRAINING
from samseg_monai.data.datalists.synapse import prepare_synapse
from samseg_monai.demo.abdomen_phantoms import make_case as make_abdomen
from samseg_monai.demo.brain_phantoms import make_case as make_brain
from samseg_monai.sam.build import build_sam


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files with the keys and shapes of sam_vit_b_01ec64.pth and resnet18-f37072fd.pth, and random values."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(build_sam("vit_b").state_dict(), folder / "vit_b_random.pth")
    torch.save(resnet18(weights=None).state_dict(), folder / "resnet_random.pth")
    return folder


@pytest.fixture
def brats(tmp_path):
    """Three cases of 240 x 240 x 155 voxels whose tumour is cut down to the slice where it is largest."""
    names = [f"BraTS-MEN-{i:05d}-000" for i in (4, 8, 10)]
    for seed, name in enumerate(names):
        case = make_brain(seed, (240, 240, 155))
        label = np.zeros_like(case["seg"])
        k = int((case["seg"] > 0).sum((0, 1)).argmax())
        label[..., k] = case["seg"][..., k]
        affine = case.pop("affine")
        (tmp_path / name).mkdir()
        for scan in ("t1n", "t1c", "t2w", "t2f"):
            nib.save(nib.Nifti1Image(case[scan], affine), tmp_path / name / f"{name}-{scan}.nii")
        nib.save(nib.Nifti1Image(label, affine), tmp_path / name / f"{name}-seg.nii")
    split = dict(zip(("training", "validation", "testing"), ([n] for n in names), strict=True))
    (tmp_path / "split.json").write_text(json.dumps(split))
    prepare_brats_men(tmp_path, tmp_path / "datalist.json", split_file=tmp_path / "split.json")
    return tmp_path


@pytest.fixture
def synapse(tmp_path):
    """Two training cases and one test case in BTCV's layout: the two slices of a phantom that show most organs."""
    for number in (*TRAINING[:2], TESTING[0]):
        case = make_abdomen([0, int(number)], (64, 64, 24))
        organs = [len(np.unique(case["label"][..., k])) for k in range(24)]
        first = max(range(23), key=lambda k: organs[k] + organs[k + 1])
        for name, array in (("img", case["img"]), ("label", case["label"])):
            (tmp_path / name).mkdir(exist_ok=True)
            image = nib.Nifti1Image(array[..., first : first + 2], case["affine"])
            nib.save(image, tmp_path / name / f"{name}{number}.nii.gz")
    prepare_synapse(tmp_path, tmp_path / "datalist.json", allow_missing=True)
    return tmp_path


def performed(name, data, output, **changes):
    """Run a plan of the package with other ``changes``; returns its text, its JSON and its runs."""
    value = json.loads((PLANS / f"{name}.json").read_text(encoding="utf-8"))
    value |= {key: {**value.get(key, {}), **new} if isinstance(new, dict) else new for key, new in changes.items()}
    path = output.with_suffix(".json")
    path.write_text(json.dumps(value))
    plan = read_plan(path)
    outcomes = perform(plan.runs(dataset_dir=data), output)
    assert [(one.status, one.error) for one in outcomes] == [("done", "")] * len(outcomes)
    text = write_comparison(output, plan, outcomes)
    [task] = json.loads((output / "comparison.json").read_text(encoding="utf-8"))["tasks"].values()
    return text, task, {one.run.group: one for one in outcomes}


@pytest.mark.timeout(1200)
@pytest.mark.whole
def test_sam_lst_runs_at_its_real_size(synapse, weights, tmp_path):
    side = {
        "strategy::side_weights": str(weights / "resnet_random.pth"),
        "embeddings::cache_dir": str(tmp_path / "bank"),
    }
    rows = json.loads((PLANS / "sam_lst.json").read_text(encoding="utf-8"))["rows"]
    [zero_shot] = [row for row in rows if row["name"] == "zero_shot"]
    text, task, runs = performed(
        "sam_lst", synapse, tmp_path / "out", weights={"vit_b": str(weights / "vit_b_random.pth")},
        training={"epochs": 1, "embeddings::variants": 1, "schedule::warmup": 0},
        rows=[zero_shot, {"name": "ladder_paper", "strategy": "ladder_paper", "training": side}],
    )  # fmt: skip
    assert "quoted from the paper" in text and "Ladder, as published [vit_b]" in text
    folder = runs["ladder_paper"].folder
    card = json.loads((folder / "run_card.json").read_text(encoding="utf-8"))
    assert (card["sam_variant"], card["status"], card["iterations"]) == ("vit_b", "completed", 1)
    assert card["trainable_parameters"] == 2_856_737 and abs(card["gate"] - 0.5) < 0.01
    settings = card["settings"]
    keys = ("image_size", "store_size", "batch_size", "accumulation_steps", "seed", "lr")
    assert [settings[key] for key in keys] == [512, 224, 12, 2, 1234, 0.001]
    assert (settings["val_interval"], settings["low_res_training"]) == (0, "corners")
    stored = [load_file(path)["embedding"] for path in (tmp_path / "bank").glob("*.safetensors")]
    assert sum(map(len, stored)) == 4 and stored[0].shape[-2:] == (32, 32)  # one look at the four training slices
    rows = task["organs"]["runs"]
    assert list(rows) == ["zero_shot", "ladder_paper"] and len(task["organs"]["quoted"]) > 12
    assert all(row["published"]["cases"] == row["honest"]["cases"] == 1 for row in rows.values())
    assert rows["ladder_paper"]["gate"] == pytest.approx(card["gate"])


@pytest.mark.timeout(2400)
@pytest.mark.whole
def test_honours_runs_at_its_real_size(brats, weights, tmp_path):
    # one of four scans: the others are three more passes of the same network
    shared = {"scans": ["t1c"], "checkpointing": True}
    # processors without AVX-512 emulate bf16, ten times slower than float32
    shared |= {"autocast": "bf16"} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {}
    rows = [
        {"name": "zero_shot", "strategy": "zero_shot"},
        {"name": "lora", "strategy": "lora", "each": {"strategy::rank": [64]}},
    ]
    _, task, runs = performed(
        "honours", brats, tmp_path / "out", weights={"vit_b": str(weights / "vit_b_random.pth")}, shared=shared,
        training={"epochs": 1}, rows=rows,
    )  # fmt: skip
    assert all(row["n"] == 1 and 0 <= row["dice_mean"] <= 1 for row in task["rows"].values())
    card = json.loads((runs["lora_rank64"].folder / "run_card.json").read_text(encoding="utf-8"))
    assert (card["sam_variant"], card["status"], card["trainable_parameters"]) == ("vit_b", "completed", 2_359_296)
    assert card["settings"]["crop_mm"] == [138, 202] and card["settings"]["image_size"] == 1024

"""What a crop leaves out is counted in prepare as it is in the run cards of training and evaluation."""

import json
import shutil

import nibabel as nib
import pytest
from typer.testing import CliRunner

from samseg_monai.bundles import build_bundle
from samseg_monai.bundles.cut import count_cut
from samseg_monai.cli import app
from samseg_monai.data import CUT
from samseg_monai.errors import BundleError
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY

CROP = [50.0, 60.0]


@pytest.fixture
def folder(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def task(tmp_path):
    """A task with a crop that cuts brains."""
    path = tmp_path / "narrow.json"
    path.write_text(json.dumps({"extends": "meningioma", "run": {"crop_mm": CROP}}))
    return path


def prepare(*words):
    return CliRunner().invoke(app, ["prepare", *map(str, words)])


def test_counts_of_prepare_are_those_of_the_run_cards(folder, task, tmp_path):
    halves = ("--fractions", "0.5,0.25,0.25")
    done = prepare("brats-men", "--src", folder, "--output", folder / "d.json", "--task", task, *halves)
    assert done.exit_code == 0, done.output
    content = json.loads((folder / "d.json").read_text(encoding="utf-8"))
    kept = content["cut"]
    assert (kept["task"], kept["crop"]) == ("narrow", "50 x 60 mm")
    configs = build_bundle("meningioma", "unet_box", tmp_path) / "configs"
    own = {**TINY, "sam_variant": None, "sam_checkpoint": None, "image_size": 32, "crop_size": None, "crop_mm": CROP}
    own |= {"dataset_dir": str(folder), "datalist": str(folder / "d.json"), "output_dir": str(tmp_path / "run")}
    run_workflow([configs / "train.json"], {**own, "epochs": 1, "val_interval": 1, "batch_size": 8}, echo=False)
    run_workflow([configs / "evaluate.json"], own, echo=False)
    for section, card in (("training", "run_card.json"), ("testing", "evaluation/run_card.json")):
        cases = {item["case"] for item in content[section]}
        counts = {case: counts for case, counts in kept["cases"].items() if case in cases}
        assert counts == json.loads((tmp_path / "run" / card).read_text(encoding="utf-8"))["cut"]
        assert counts and all(set(of_case) == set(CUT) for of_case in counts.values())
    sides = nib.load(next(folder.rglob("*-seg.nii*"))).header.get_zooms()
    assert json.loads((tmp_path / "run" / card).read_text(encoding="utf-8"))["voxel_mm"] == pytest.approx(max(sides))
    assert f"crop of task narrow, 50 x 60 mm: cuts something of {len(kept['cases'])} of 8 cases" in done.output
    first = max(kept["cases"], key=lambda case: (kept["cases"][case]["label"], kept["cases"][case]["image"]))
    assert f"\n  {first}: {kept['cases'][first]['image']} of " in done.output


def test_the_task_of_brats_is_tried_unless_it_is_told_not_to(folder, hippocampi, tmp_path):
    told = prepare("brats-men", "--src", folder, "--output", folder / "d.json").output
    assert "crop of task meningioma, 138 x 202 mm: cuts something of " in told
    told = prepare("brats-men", "--src", folder, "--output", folder / "d.json", "--task", "none").output
    assert "crop" not in told and "cut" not in json.loads((folder / "d.json").read_text(encoding="utf-8"))
    words = ("folders", "--src", hippocampi, "--output", tmp_path / "h.json", "--labels", "1=anterior,2=posterior")
    assert "crop" not in prepare(*words).output
    assert (
        "crop of task hippocampus, 64 x 64 mm: cuts something of 0 of 6"
        in prepare(*words, "--task", "hippocampus").output
    )


def test_a_task_without_a_crop_reads_nothing_and_an_unknown_one_is_told_first(abdomen, tmp_path, monkeypatch):
    words = ("synapse", "--src", abdomen, "--output", tmp_path / "d.json", "--allow-missing")
    assert "crop of task abdomen: none, slices are seen whole" in prepare(*words).output
    assert "cut" not in json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("samseg_monai.data.datalists.synapse.prepare_synapse", lambda **_: pytest.fail("too late"))
    failed = prepare(*words, "--task", "meningiom")
    assert isinstance(failed.exception, BundleError) and "did you mean meningioma?" in str(failed.exception)


def test_without_training_cases_nobody_knows_a_spacing(folder, task):
    content = json.loads((folder / "datalist.json").read_text(encoding="utf-8"))
    content["testing"] += content.pop("training")
    (folder / "d.json").write_text(json.dumps(content), encoding="utf-8")
    cut = count_cut(str(task), folder / "d.json", folder, progress=False)
    assert cut.of == 8 and cut.cases and cut.lines()[0].startswith("crop of task narrow, 50 x 60 mm: cuts something of")

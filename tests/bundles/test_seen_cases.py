"""A training on labels with voxels that nobody has judged, and what happens when its split changes afterwards."""

import hashlib
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.bundles import build_bundle, pack_bundle
from samseg_monai.checkpoints import read_card
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.errors import BundleError, CheckpointError, DataError
from samseg_monai.metrics import read_rows
from samseg_monai.report.runs import RunResult
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY

LABELS = {"1": "anterior", "2": "posterior", "255": "ignore"}
IGNORED = np.s_[:3]
# not SAM: its seconds are spent on what is tested
NETWORK = {"sam_variant": None, "sam_checkpoint": None, "image_size": 32, "crop_size": [24, 28]}


@pytest.fixture(scope="module")
def data(hippocampi, tmp_path_factory) -> Path:
    """The volumes of ``hippocampi``, of each of which a part has been judged by nobody; one of them validates."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("images", "labels"):
        shutil.copytree(hippocampi / kind, folder / kind)
    for path in (folder / "labels").iterdir():
        label = np.asarray(nib.load(path).dataobj).copy()
        label[IGNORED] = 255
        nib.save(nib.Nifti1Image(label, np.eye(4)), path)
    return folder


@pytest.fixture(scope="module")
def lists(data) -> dict[str, Path]:
    """Datalists of two splits: the first trains on volumes 0 to 2, the second tests them."""
    summary = prepare_folders(data, data / "datalist.json", labels=LABELS, counts=(3, 1, 2), progress=False)
    assert "label 255 ignore: " in "\n".join(summary.lines())
    assert any(text.startswith("validation has one case: its chance decides") for text in summary.warnings)
    first = json.loads((data / "datalist.json").read_text(encoding="utf-8"))
    items = [item for section in ("training", "validation", "testing") for item in first[section]]
    second = {**first, "training": items[3:5], "validation": items[5:], "testing": items[:3]}
    (data / "second.json").write_text(json.dumps(second), encoding="utf-8")
    return {"first": data / "datalist.json", "second": data / "second.json"}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    return build_bundle("hippocampus", "unet", tmp_path_factory.mktemp("bundles")) / "configs"


@pytest.fixture(scope="module")
def run(configs, data, lists, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(configs, data, lists["first"], folder)
    return folder


def train(configs: Path, data: Path, datalist: Path, folder: Path, **more) -> None:
    places = {"dataset_dir": str(data), "datalist": str(datalist), "output_dir": str(folder)}
    own = {"epochs": 1, "val_interval": 1, "batch_size": 8, "schedule::warmup": 0, **more}
    run_workflow([configs / "train.json"], {**TINY, **NETWORK, **places, **own})


def evaluate(configs: Path, data: Path, datalist: Path, folder: Path, **more) -> Path:
    places = {"dataset_dir": str(data), "datalist": str(datalist), "output_dir": str(folder)}
    run_workflow([configs / "evaluate.json"], {**TINY, **NETWORK, **places, **more})
    return folder / "evaluation"


def hashed(*names: str) -> list[str]:
    return sorted(hashlib.sha256(name.encode()).hexdigest()[:16] for name in names)


def test_the_card_keeps_hashes_of_cases_and_names_of_scans(run):
    cases = {"training": hashed("volume_0", "volume_1", "volume_2"), "validation": hashed("volume_3")}
    for card in (read_card(run), json.loads((run / "run_card.json").read_text(encoding="utf-8"))):
        assert card["cases"] == cases
    assert read_card(run)["scan_names"] == ["image"]
    assert card["warnings"][0].startswith("validation has one case")
    assert "volume_" not in (run / "card.json").read_text(encoding="utf-8")


def test_cases_that_were_seen_are_refused_or_said(run, configs, data, lists, tmp_path, capfd):
    kept = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(DataError, match=r"--allow_seen True(.|\n)*3 of 3 cases .*trained on: volume_0, volume_1, volu"):
        evaluate(configs, data, lists["second"], kept)
    assert not (kept / "evaluation" / "cases.csv").exists()
    results = evaluate(configs, data, lists["second"], kept, allow_seen=True)
    card = json.loads((results / "run_card.json").read_text(encoding="utf-8"))
    assert card["seen_cases"] == {"training": ["volume_0", "volume_1", "volume_2"]}
    assert card["cases"] == read_card(kept)["cases"]
    assert "These scores say nothing of new cases" in "".join(capfd.readouterr())
    with pytest.raises(BundleError, match=r"volume_0, volume_1, volume_2 were trained on: .* --allow-seen"):
        pack_bundle(kept, tmp_path / "packed.zip")
    assert pack_bundle(kept, tmp_path / "packed.zip", allow_seen=True, pt=False).is_file()


def test_the_validation_of_the_run_itself_can_be_evaluated_and_is_named(run, configs, data, lists, tmp_path, capfd):
    kept = shutil.copytree(run, tmp_path / "run")
    results = evaluate(configs, data, lists["first"], kept, section="validation")
    told = "section validation: 1 of 1 cases to be evaluated chose the epoch: volume_3. These scores say nothing of new"
    assert told in "".join(capfd.readouterr())
    assert json.loads((results / "run_card.json").read_text(encoding="utf-8"))["seen_cases"] == {
        "validation": ["volume_3"]
    }
    scored = RunResult.load(results)
    assert [text.partition(": ")[2] for text in scored.warnings] == ["section validation: 1 of 1 cases chose the epoch"]
    assert not scored.held_out
    content = json.loads(lists["first"].read_text(encoding="utf-8"))
    moved = {**content, "validation": content["training"], "training": [], "testing": content["validation"]}
    (tmp_path / "moved.json").write_text(json.dumps(moved), encoding="utf-8")
    with pytest.raises(DataError, match="3 of 3 cases to be evaluated were trained on: volume_0, volume_1, volume_2"):
        evaluate(configs, data, tmp_path / "moved.json", kept, section="validation")
    with pytest.raises(DataError, match="1 of 1 cases to be evaluated chose the epoch: volume_3"):
        evaluate(configs, data, tmp_path / "moved.json", kept)  # not the section that is there to choose by


def test_a_packed_bundle_knows_what_its_network_has_seen(run, configs, data, lists, tmp_path):
    kept = shutil.copytree(run, tmp_path / "run")
    results = evaluate(configs, data, lists["first"], kept)
    rows = read_rows(results / "cases.csv")
    assert {row["case"] for row in rows} == {"volume_4", "volume_5"}
    assert all(row["ignored_ml"] == pytest.approx(3 * 28 * 9 / 1000) for row in rows)
    shutil.unpack_archive(pack_bundle(kept, tmp_path / "packed.zip"), tmp_path / "packed")
    (bundle,) = (tmp_path / "packed").iterdir()
    assert read_card(bundle / "models")["cases"] == read_card(run)["cases"]
    with pytest.raises(DataError, match="trained on: volume_0, volume_1, volume_2"):
        evaluate(bundle / "configs", data, lists["second"], tmp_path / "elsewhere")


def test_resume_names_the_cases_that_moved(run, configs, data, lists, tmp_path):
    kept = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(CheckpointError) as error:
        train(configs, data, lists["second"], kept, epochs=2)
    lines = str(error.value)
    moved = {f"training: volume_{n} in the file, not now" for n in range(3)}
    moved |= {f"training: volume_{n} now, not in the file" for n in (3, 4)}
    moved |= {"validation: volume_3 in the file, not now", "validation: volume_5 now, not in the file"}
    assert all(line in lines for line in moved)


@pytest.mark.parametrize("listed", [True, False])
def test_an_image_of_four_axes_that_replaces_one_is_named_in_training_and_evaluation(
    listed, run, configs, data, lists, tmp_path
):
    folder, kept = shutil.copytree(data, tmp_path / "data"), shutil.copytree(run, tmp_path / "run")
    content = json.loads(lists["first"].read_text(encoding="utf-8"))
    if not listed:  # a list of one's own has no hashes
        del content["hashes"]
    (folder / "own.json").write_text(json.dumps(content), encoding="utf-8")
    for case in ("volume_0", "volume_4"):
        path = folder / "images" / f"{case}.nii.gz"
        nib.save(nib.Nifti1Image(np.stack([nib.load(path).get_fdata(dtype=np.float32)] * 3, axis=-1), np.eye(4)), path)
    told = "its files are not those that were prepared" if listed else "its image has 3 channels or time points of"
    with pytest.raises(DataError, match=f"volume_0: {told}"):
        train(configs, folder, folder / "own.json", tmp_path / "again")
    with pytest.raises(DataError, match=f"volume_4: {told}"):
        evaluate(configs, folder, folder / "own.json", kept)


def test_a_warm_up_longer_than_the_training_is_refused_before_embeddings(configs, data, lists, tmp_path, monkeypatch):
    monkeypatch.setattr("samseg_monai.data.slices.SliceDataset.fill", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(Exception, match="warmup must be 0 to total"):
        train(configs, data, lists["first"], tmp_path, **{"schedule::warmup": 1000})

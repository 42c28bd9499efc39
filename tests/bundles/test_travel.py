"""A trained run is packed, travels, and does offline and elsewhere what it did at home."""

import csv
import json
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.bundle import ConfigParser
from safetensors.torch import load_file

from samseg_monai import __version__
from samseg_monai.bundles import pack_bundle
from samseg_monai.bundles.archive import open_files
from samseg_monai.bundles.check import EDITED, check_bundle
from samseg_monai.bundles.record import write_record
from samseg_monai.bundles.running import Running
from samseg_monai.bundles.wheel import WHEEL, build_wheel
from samseg_monai.checkpoints import BASE
from samseg_monai.errors import BundleError, SamsegError
from samseg_monai.sam.build import build_sam
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY
from tests.helpers.commands import samseg

ROOT = Path(__file__).parents[2] / "bundles"
LORA = ROOT / "meningioma_segmentation_lora" / "configs"

# what has no public key of its own
WITHIN = {"train::criterion::loss::batch": True, "validate::named_handlers::collapse::patience": 2}


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shared = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(folder), "strategy::rank": 2}
    overlay = LORA / "demo.json"
    run_workflow([LORA / "train.json", overlay], {**shared, "epochs": 2, "batch_size": 2, "lr": 0.01, **WITHIN})
    run_workflow([LORA / "evaluate.json", overlay], shared)
    return folder


@pytest.fixture(scope="module")
def archive(run, tmp_path_factory) -> Path:
    return pack_bundle(run, tmp_path_factory.mktemp("pack") / "bundle.zip", sam_checkpoint="random")


@pytest.fixture
def unpacked(archive, tmp_path) -> Path:
    with zipfile.ZipFile(archive) as content:
        content.extractall(tmp_path)
    return tmp_path / "meningioma_segmentation_lora"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a packed bundle must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_a_folder_that_is_no_record_is_never_replaced_by_one(phantoms, tmp_path):
    mine = tmp_path / "bundle" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("of the user")
    overrides = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "strategy::rank": 2}
    with pytest.raises(BundleError, match="choose another output_dir"):
        run_workflow([LORA / "train.json"], {**overrides, "epochs": 1})
    assert mine.read_text() == "of the user"


def test_archive_holds_everything_and_its_sums_fit(unpacked):
    for name in ("LICENSE", "docs/data_license.txt", "configs/train.json", "configs/settings.json", "models/model.pt",
                 "models/model.safetensors", "models/card.json", "models/adapter.safetensors", "metrics/metrics.json",
                 "metrics/cases.csv", "SHA256SUMS"):  # fmt: skip
        assert (unpacked / name).is_file(), name
    assert [p.name for p in (unpacked / "models").glob("*.pt")] == ["model.pt"]
    assert not (unpacked / "large_files.yml").exists()  # nothing is to be downloaded
    with closing(open_files(unpacked)) as files:
        assert not files.changed() and len(files.sums()) > 10
    config = json.loads((unpacked / "configs" / "inference.json").read_text())
    assert (config["sam_variant"], config["strategy"]["rank"], config["crop_size"]) == ("tiny", 2, [32, 36])
    assert json.loads((unpacked / "configs" / "train.json").read_text())["epochs"] == 2


def test_overrides_within_the_training_are_in_the_card_and_travel(unpacked, run):
    settings = json.loads((run / "run_card.json").read_text())["settings"]
    assert {key: value for key, value in settings.items() if "::" in key} == WITHIN
    built, packed = (json.loads((folder / "train.json").read_text()) for folder in (LORA, unpacked / "configs"))
    built["train"]["criterion"]["loss"]["batch"] = True
    built["validate"]["named_handlers"]["collapse"]["patience"] = 2
    assert (packed["train"], packed["validate"]) == (built["train"], built["validate"])


def test_packed_bundle_trains_again_to_the_same_weights(unpacked, run, phantoms, tmp_path):
    overrides = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path / "again"), "sam_checkpoint": "random"}
    run_workflow([unpacked / "configs" / "train.json"], overrides)
    for name in ("adapter.safetensors", "history.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_record_of_several_processes_is_a_bundle_for_one(name, tmp_path):
    files = [LORA / f"{name}.json", LORA / f"multi_gpu_{name}.json"]
    files = files if name == "train" else [LORA / "inference.json", *files]
    own = {"crop_size": [32, 36]}
    if name == "train":
        own |= {**WITHIN, "train::dataset::cache_dir": "/elsewhere", "train::sampler::seed": 3}
    effective = ConfigParser(ConfigParser.load_config_files(files))
    for key, value in own.items():
        effective[key] = value
    write_record(Running(LORA, effective), tmp_path / "bundle")
    for file in ("train.json", "inference.json", "evaluate.json"):
        alone = ConfigParser(json.loads((LORA / file).read_text()))
        for key in own.keys() & {"crop_size", *WITHIN}:
            if key in alone:
                alone[key] = own[key]
        assert json.loads((tmp_path / "bundle" / "configs" / file).read_text()) == alone.get(), file


def test_a_run_with_a_strategy_of_its_own_is_named_by_that_strategy(run, tmp_path, monkeypatch, capsys):
    mine = shutil.copytree(run, tmp_path / "mine")
    own = {"strategy": {"_target_": "mine.Strategy", "rank": 2}}
    effective = ConfigParser({**json.loads((LORA / "train.json").read_text()), **own})
    write_record(Running(LORA, effective), mine / "bundle")
    for words in (["bundle", "pack", mine, "--output", tmp_path / "x.zip"],
                  ["predict", mine, "--input", tmp_path, "--output", tmp_path / "out"]):  # fmt: skip
        assert samseg(monkeypatch, *words) == 1
        told = capsys.readouterr().err
        assert "parts of its own (strategy), which no settings describe; --trust" in told and "::" not in told
    verdict = check_bundle(mine / "bundle")
    assert (verdict.answer, verdict.engine) == (EDITED, __version__)
    assert len(verdict.problems) == 1 and "parts of its own (strategy)" in verdict.problems[0]


def test_archive_names_no_folder_of_the_machine_it_was_made_on(unpacked, run, phantoms):
    texts = [p for p in unpacked.rglob("*") if p.suffix in {".json", ".csv", ".md", ".txt", ".yml"}]
    assert len(texts) > 10
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert str(run) not in text and str(phantoms) not in text and str(Path.home()) not in text, path.name


def test_full_model_is_plain_tensors(unpacked):
    state = torch.load(unpacked / "models" / "model.pt", weights_only=True)
    assert state and all(type(value) is torch.Tensor for value in state.values())
    safe = load_file(unpacked / "models" / "model.safetensors")
    assert safe.keys() == state.keys() and all(torch.equal(safe[name], state[name]) for name in safe)


def test_packed_bundle_is_as_built_but_for_what_the_training_changed(archive, unpacked):
    for path in (archive, unpacked):
        problems = check_bundle(path).problems
        assert len(problems) == 2 and all(problem.startswith("configs/train.json: ") for problem in problems)


def test_packed_bundle_needs_no_pickle(run, archive, phantoms, tmp_path, monkeypatch):
    alone = pack_bundle(run, tmp_path / "alone.zip", sam_checkpoint="random", pt=False)
    with zipfile.ZipFile(alone) as content, zipfile.ZipFile(archive) as other:
        gone = {name.partition("/")[2] for name in {*other.namelist()} - {*content.namelist()}}
    assert gone == {"models/model.pt"} and alone.stat().st_size < 0.6 * archive.stat().st_size
    for path, out in ((alone, "a"), (archive, "b")):
        words = ["predict", path, "--input", phantoms / "unlabelled", "--output", tmp_path / out, "--whole-slice"]
        assert samseg(monkeypatch, *words) == 0
    [one], [other] = ([*(tmp_path / out).glob("*_seg.nii.gz")] for out in "ab")
    assert one.read_bytes() == other.read_bytes() or np.array_equal(nib.load(one).dataobj, nib.load(other).dataobj)


def test_a_run_knows_its_file_of_weights_and_the_packed_bundle_does_not(phantoms, offline, tmp_path, monkeypatch):
    weights, folder = tmp_path / "weights of mine.pth", tmp_path / "run"
    torch.save(build_sam("tiny").state_dict(), weights)
    shared = {**TINY, "sam_checkpoint": str(weights), "dataset_dir": str(phantoms), "output_dir": str(folder)}
    run_workflow([LORA / "train.json"], {**shared, "strategy::rank": 2, "epochs": 1, "batch_size": 2})
    words = ["report", folder, "--dataset-dir", phantoms, "--output", tmp_path / "page.html"]
    assert samseg(monkeypatch, *words) == 0
    assert samseg(monkeypatch, "bundle", "pack", folder, "--output", tmp_path / "x.zip", "--no-pt") == 0
    with zipfile.ZipFile(tmp_path / "x.zip") as packed:
        assert not any(str(tmp_path).encode() in packed.read(name) for name in packed.namelist())
        assert not any(name.endswith(BASE) for name in packed.namelist())


def test_pack_says_that_it_names_the_cases_and_leaves_them_out(run, tmp_path, monkeypatch, capsys):
    words = ["bundle", "pack", run, "--sam-checkpoint", "random", "--no-pt", "--output"]
    assert samseg(monkeypatch, *words, tmp_path / "with.zip") == 0
    assert "holds the names of 2 cases in metrics/cases.csv; --no-cases leaves them out" in capsys.readouterr().out
    assert samseg(monkeypatch, *words, tmp_path / "without.zip", "--no-cases") == 0
    assert "cases" not in capsys.readouterr().out
    with open(run / "evaluation" / "cases.csv", newline="") as stream:
        names = {row["case"].encode() for row in csv.DictReader(stream)}
    with zipfile.ZipFile(tmp_path / "with.zip") as there, zipfile.ZipFile(tmp_path / "without.zip") as packed:
        gone = {Path(name).name for name in {*there.namelist()} - {*packed.namelist()}}
        assert "cases.csv" in gone and gone <= {"cases.csv", "ellipse_cases.csv"}
        assert not any(name in packed.read(file) for file in packed.namelist() for name in names)


def test_packed_with_the_package_it_is_the_same_bundle_and_a_wheel(run, archive, phantoms, tmp_path, monkeypatch):
    out = tmp_path / "with.zip"
    words = ["bundle", "pack", run, "--output", out, "--sam-checkpoint", "random", "--with-package"]
    assert samseg(monkeypatch, *words) == 0
    with zipfile.ZipFile(out) as content, zipfile.ZipFile(archive) as other:
        root = other.namelist()[0].partition("/")[0]
        assert {*content.namelist()} - {*other.namelist()} == {f"{root}/{WHEEL}"}
        assert f"\npip install {root}/{WHEEL}\n" in content.read(f"{root}/docs/README.md").decode()
        assert "pip install" not in other.read(f"{root}/docs/README.md").decode().replace("pip install .", "")
        assert content.read(f"{root}/{WHEEL}") == build_wheel()
    assert check_bundle(out).problems == check_bundle(archive).problems
    words = ["predict", out, "--input", phantoms / "unlabelled", "--output", tmp_path / "masks", "--whole-slice"]
    assert samseg(monkeypatch, *words) == 0 and len([*(tmp_path / "masks").glob("*_seg.nii.gz")]) == 1
    trusted = pack_bundle(run, tmp_path / "as_it_is.zip", sam_checkpoint="random", pt=False, package=True, trust=True)
    with zipfile.ZipFile(trusted) as content:
        assert f"\npip install {root}/{WHEEL}\n" in content.read(f"{root}/docs/README.md").decode()


def test_evaluation_elsewhere_and_offline_reproduces_the_card(unpacked, phantoms, offline, monkeypatch):
    monkeypatch.chdir(unpacked.parent)
    card = json.loads((unpacked / "models" / "card.json").read_text())
    run_workflow([unpacked / "configs" / "evaluate.json"], {"dataset_dir": str(phantoms), "output_dir": "again"})
    metrics = json.loads(Path("again/evaluation/metrics.json").read_text())["metrics"]
    stored = card["metrics"]["metrics"]
    assert stored["n"] == 2
    for name in ("dice_mean", "hd95_mm_mean", "nsd_1mm_mean", "nsd_2mm_mean", "ellipse_dice_mean"):
        assert metrics[name] == pytest.approx(stored[name], abs=1e-6)


def test_changed_file_is_named(unpacked, phantoms, monkeypatch, capsys):
    (unpacked / "configs" / "inference.json").write_text("{}")
    (unpacked / "LICENSE").unlink()
    code = samseg(monkeypatch, "predict", unpacked, "--input", phantoms / "unlabelled", "--output", unpacked / "out")
    message = capsys.readouterr().err
    assert code == 1 and "configs/inference.json: changed" in message and "LICENSE: missing" in message


SPACING = {name: [5.0, 5.0] for name in ("median", "min", "max")}


def test_spacing_that_was_trained_on_travels(run, unpacked):
    """In the adapter's card, the run card and the packed settings; nothing was left out of these cases."""
    for path in (run / "card.json", run / "run_card.json", unpacked / "models" / "card.json"):
        assert json.loads(path.read_text())["spacing"] == SPACING, path
    settings = json.loads((unpacked / "configs" / "settings.json").read_text())
    assert settings["task"]["trained_spacing"] == SPACING
    for card in (run / "run_card.json", run / "evaluation" / "run_card.json"):
        assert all(counts["label"] == 0 for counts in json.loads(card.read_text())["cut"].values())


@pytest.mark.parametrize("option", [None, "--no-resample"])
def test_other_spacing_is_resampled_and_comes_back(option, archive, phantoms, tmp_path, monkeypatch, capfd):
    case = "BraTS-MEN-00008-000"
    (tmp_path / "in" / case).mkdir(parents=True)
    for path in (phantoms / "unlabelled" / case).iterdir():
        image = nib.load(path)
        fine = np.asarray(image.dataobj).repeat(2, axis=0).repeat(2, axis=1)
        affine = image.affine @ np.diag([0.5, 0.5, 1, 1])
        nib.save(nib.Nifti1Image(fine, affine), tmp_path / "in" / case / path.name)
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({case: [{"slices": [4, 8], "box": [16, 16, 48, 48]}]}))
    words = ["predict", archive, "--input", tmp_path / "in", "--output", tmp_path / "out", "--boxes", boxes]
    assert samseg(monkeypatch, *words, *([option] if option else [])) == 0
    result = nib.load(tmp_path / "out" / f"{case}_seg.nii.gz")
    assert result.shape == fine.shape and np.allclose(result.affine, affine)
    told = f"{case}: spacing in the plane 2.5 x 2.5 mm, trained on 5 x 5 mm: resampled"
    assert (told in "".join(capfd.readouterr())) is (option is None)


def boxes_for(case: str, path: Path) -> Path:
    path.write_text(json.dumps({case: [{"slices": [4, 8], "box": [8, 8, 24, 24]}]}))
    return path


@pytest.mark.parametrize("source", ["boxes", "mask", "image"])
def test_prediction_has_the_grid_of_its_image(source, archive, phantoms, tmp_path, offline, monkeypatch):
    case = "BraTS-MEN-00008-000"
    scan = nib.load(phantoms / "unlabelled" / case / f"{case}-t1c.nii.gz")
    extra: list[object] = ["--whole-slice"]
    if source == "boxes":
        extra = ["--boxes", boxes_for(case, tmp_path / "boxes.json")]
    elif source == "mask":
        mask = np.zeros(scan.shape, dtype=np.uint8)
        mask[10:20, 10:20, 5:7] = 1
        (tmp_path / "masks").mkdir()
        nib.save(nib.Nifti1Image(mask, scan.affine), tmp_path / "masks" / f"{case}.nii.gz")
        extra = ["--prompts", tmp_path / "masks"]
    words = ["predict", archive, "--input", phantoms / "unlabelled", "--output", tmp_path / "out", *extra]
    assert samseg(monkeypatch, *words) == 0
    result = nib.load(tmp_path / "out" / f"{case}_seg.nii.gz")
    assert result.shape == scan.shape
    assert np.array_equal(result.affine, scan.affine)
    values = np.asarray(result.dataobj)
    assert set(np.unique(values)) <= {0, 1}
    if source == "boxes":  # slices without a box stay empty
        assert not values[..., :4].any() and not values[..., 9:].any()


@pytest.mark.parametrize("axes", ["RAS", "PIR", "LSA"])
def test_oblique_and_permuted_images_keep_their_geometry(axes, archive, phantoms, tmp_path, monkeypatch):
    source = phantoms / "unlabelled" / "BraTS-MEN-00008-000"
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    (tmp_path / "in" / "turned").mkdir(parents=True)
    for path in source.iterdir():
        image = nib.as_closest_canonical(nib.load(path))
        target = nib.orientations.axcodes2ornt(axes)
        image = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target))
        image = nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine)
        nib.save(image, tmp_path / "in" / "turned" / path.name.replace(source.name, "turned"))
    words = ["predict", archive, "--input", tmp_path / "in", "--output", tmp_path / "out", "--whole-slice"]
    assert samseg(monkeypatch, *words) == 0
    result = nib.load(tmp_path / "out" / "turned_seg.nii.gz")
    assert result.shape == image.shape
    np.testing.assert_allclose(result.affine, image.affine, atol=1e-4)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_other_formats_give_nifti_in_the_same_place(suffix, archive, phantoms, tmp_path, monkeypatch):
    source = phantoms / "unlabelled" / "BraTS-MEN-00008-000"
    for path in source.iterdir():
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(image, str(tmp_path / (path.name.removesuffix(".nii.gz") + suffix)))
    words = ["predict", archive, "--input", tmp_path, "--output", tmp_path / "out", "--whole-slice"]
    assert samseg(monkeypatch, *words) == 0
    [result] = (tmp_path / "out").glob("*_seg.nii.gz")
    written = sitk.ReadImage(str(result))
    assert written.GetSize() == image.GetSize()
    np.testing.assert_allclose(written.GetOrigin(), image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-5)
    np.testing.assert_allclose(written.GetSpacing(), image.GetSpacing(), atol=1e-4)


def test_bad_cases_are_named_and_the_others_finished(archive, phantoms, tmp_path, monkeypatch, capsys):
    shutil.copytree(phantoms / "unlabelled", tmp_path / "in")
    good = "BraTS-MEN-00008-000"
    for bad in ("BraTS-MEN-00100-000", "BraTS-MEN-00101-000"):
        shutil.copytree(tmp_path / "in" / good, tmp_path / "in" / bad)
        for path in (tmp_path / "in" / bad).iterdir():
            path.rename(path.with_name(path.name.replace(good, bad)))
    truncated = tmp_path / "in" / "BraTS-MEN-00100-000" / "BraTS-MEN-00100-000-t2w.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    (tmp_path / "in" / "BraTS-MEN-00101-000" / "BraTS-MEN-00101-000-t1c.nii.gz").unlink()
    words = ["predict", archive, "--input", tmp_path / "in", "--output", tmp_path / "out", "--whole-slice"]
    code = samseg(monkeypatch, *words)
    message = capsys.readouterr().err
    assert code == 1
    assert "BraTS-MEN-00100-000" in message and "BraTS-MEN-00101-000" in message and "Traceback" not in message
    assert [p.name for p in (tmp_path / "out").glob("*_seg.nii.gz")] == [f"{good}_seg.nii.gz"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["predict", "nowhere.zip", "--input", ".", "--output", "out"], "nowhere.zip"),
        (["predict", "{archive}", "--input", "nowhere", "--output", "out", "--whole-slice"], "nowhere"),
        (["predict", "{archive}", "--input", "{data}", "--output", "out"], "--whole-slice"),
        (["predict", "{archive}", "--input", "{data}", "--output", "o", "--boxes", "none.json"], "none.json"),
        (["bundle", "pack", "nowhere", "--output", "x.zip"], "nowhere"),
        (["bundle", "build", "--task", "meningoma", "--strategy", "lora", "--out", "b"], "meningioma"),
        (["prepare", "brats-men", "--src", "nowhere", "--output", "d.json"], "nowhere"),
        (["report", "nowhere"], "run_card.json"),
    ],
)
def test_wrong_paths_end_in_one_sentence(words, expected, archive, phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = samseg(monkeypatch, *[w.format(archive=archive, data=phantoms / "unlabelled") for w in words])
    message = capsys.readouterr().err
    assert code == 1 and expected in message and "Traceback" not in message


@pytest.mark.parametrize(
    "words",
    [
        "predict nowhere.zip --input nowhere --output out", "report nowhere", "bundle pack nowhere --output x.zip",
        "prepare folders --src nowhere --output d.json",
        "prepare brats-men --src nowhere --split-file nowhere --output d.json",
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_told_before_torch_is_imported(words, tmp_path):
    code = (
        "import sys, samseg_monai.cli as cli\ntry:\n    cli.main()\nexcept SystemExit as end:\n"
        "    sys.exit(9 if {'torch', 'monai'} & sys.modules.keys() else end.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("no such file or folder") == words.count("nowhere")


def test_unfinished_run_says_what_is_missing(tmp_path):
    with pytest.raises(BundleError, match=r"evaluation/metrics\.json is missing"):
        pack_bundle(tmp_path, tmp_path / "x.zip")


def test_finished_training_is_not_trained_again_by_mistake(run, phantoms):
    shared = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(run), "strategy::rank": 2}
    with pytest.raises(SamsegError, match="epochs"):
        run_workflow([LORA / "train.json", LORA / "demo.json"], {**shared, "epochs": 2, "batch_size": 2, "lr": 0.01})


def test_per_case_table_has_no_path(run):
    with open(run / "evaluation" / "cases.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2
    assert not any("/" in value for row in rows for value in row.values())

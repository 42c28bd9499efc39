"""Bundles from elsewhere: the sender's JSON is not run, no path is evaluated, old ZIPs still predict."""

import json
import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samseg_monai.bundles import build_bundle, load_bundle, write_bundle
from samseg_monai.bundles.door import literal, open_bundle
from samseg_monai.errors import BundleError, DataError, PromptError, SamsegError
from samseg_monai.networks import SamSegmenter
from samseg_monai.settings import merged, read_settings
from tests.bundles.test_check import pack, with_weights
from tests.helpers.commands import samseg
from tests.helpers.hostile_files import BUNDLES, NAME, PICKLES, scripted, torch_file
from tests.helpers.old_bundles import FOLDER, LORA, UNET, old_bundle, unpacked

CASE = "BraTS-MEN-00008-000"
TINY = {
    "run": {"sam_variant": "tiny", "image_size": 64, "crop_size": [28, 32], "seed": 1},
    "strategy": {"method": {"rank": 2}},
    "demo": None,
}


def small(root: Path, changes: dict = TINY) -> Path:
    """The bundle at ``root`` with other settings, and random weights that fit them."""
    settings = json.loads((root / "configs" / "settings.json").read_text(encoding="utf-8"))
    bundle = write_bundle(read_settings(merged(settings, changes), "test"), root.parent / "small" / root.name)
    with open_bundle(bundle) as opened:
        state = opened.network().state_dict()
    (bundle / "models").mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, bundle / "models" / "model.safetensors")
    return bundle


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return with_weights(build_bundle("meningioma", "lora", tmp_path_factory.mktemp("clean")))


@pytest.fixture
def bundle(clean, tmp_path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(clean, tmp_path / NAME))


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Path:
    """A bundle that predicts within a second."""
    return small(build_bundle("meningioma", "lora", tmp_path_factory.mktemp("running")))


@pytest.fixture
def mine(running, tmp_path) -> Path:
    return Path(shutil.copytree(running, tmp_path / NAME))


def content(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*"))
            if p.is_file() and "models" not in p.parts}  # fmt: skip


# --- the sender's JSON is not run


@pytest.mark.parametrize("case", BUNDLES, ids=lambda case: case.name)
def test_nothing_that_a_sender_wrote_gets_into_what_runs(case, bundle, clean):
    """What would be run is what this package writes from the settings, to the last byte, or nothing is."""
    case.change(bundle)
    built = {name: data for name, data in content(clean).items() if not name.startswith("metrics/")}
    try:
        with open_bundle(bundle) as opened:
            assert content(opened.root) == built
    except SamsegError as error:
        assert str(error).replace("\n", "").isprintable()


@pytest.mark.parametrize("case", PICKLES, ids=lambda case: case.name)
def test_weights_that_are_more_than_tensors_are_refused(case, bundle):
    before = (bundle / "models" / "model.pt").read_bytes()
    case.change(bundle)
    read = (bundle / "models" / "model.pt").read_bytes() != before  # else a pickle beside it, which nobody reads
    for path in (bundle, pack(bundle)):
        expects = pytest.raises(BundleError, match="more than tensors") if read else nullcontext()
        with expects, open_bundle(path):
            pass


def test_settings_that_would_be_evaluated_are_refused_at_once(mine, tmp_path, monkeypatch, capsys):
    path = mine / "configs" / "settings.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["run"]["image_size"] = "$open('trace', 'w')"
    settings["strategy"]["method"]["_target_"] = "os.system"
    settings["run"]["sam_checkpoint"] = "/etc/passwd"
    path.write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    for archive in (mine, pack(mine)):
        assert samseg(monkeypatch, "predict", archive, "--input", tmp_path, "--output", tmp_path / "out") == 1
        message = capsys.readouterr().err
        for key in ("run::image_size", "strategy::method::_target_", "run::sam_checkpoint"):
            assert key in message
        assert "Traceback" not in message
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "ZIP"])
def test_commands_run_none_of_a_bundles_own_json(kind, mine, phantoms, tmp_path, monkeypatch, caplog, capfd):
    """Every config is replaced by one that leaves a trace; ``--trust`` runs it, and says so."""
    trace = tmp_path / "trace"
    evil = f"$open({str(trace)!r}, 'w').close()"
    (mine / "configs" / "logging.conf").write_text(f"[handlers]\nkeys=a\n[handler_a]\nclass={evil[1:]}\n")
    keys = dict.fromkeys(("checkpoint", "dataset_dir", "output_dir", "predictions_dir"))
    config = {**keys, "prompt": {"source": "none"}, "initialize": [], "run": [evil], "network_def": evil}
    for name in ("inference", "train"):
        (mine / "configs" / f"{name}.json").write_text(json.dumps(config))
    path = mine if kind == "folder" else pack(mine)
    data = ["--input", phantoms / "unlabelled", "--output", tmp_path / "out"]
    assert samseg(monkeypatch, "predict", path, *data, "--whole-slice") == 0
    assert "edits of its configs are not used" in caplog.text
    assert (tmp_path / "out" / f"{CASE}_seg.nii.gz").is_file()
    assert samseg(monkeypatch, "export", path, "--format", "pth", "--output", tmp_path / "pth") == 0
    words = ["--dataset_dir", phantoms, "--output_dir", tmp_path / "lr", "--steps", "10", "--sam_checkpoint", "random"]
    assert samseg(monkeypatch, "find-lr", path, *words, "--batch_size", "2") == 0
    assert (tmp_path / "lr" / "lr_finder.csv").is_file()
    assert not trace.exists()
    (mine / "configs" / "logging.conf").unlink()
    path = mine if kind == "folder" else pack(mine)
    assert samseg(monkeypatch, "predict", path, *data, "--trust") == 0
    assert trace.exists() and "--trust: the JSON of" in caplog.text + capfd.readouterr().err


def test_a_runs_record_is_not_run_either(mine, tmp_path, monkeypatch, capsys):
    trace = tmp_path / "trace"
    run = tmp_path / "run"
    shutil.copytree(mine, run / "bundle", ignore=shutil.ignore_patterns("models"))
    (run / "evaluation").mkdir()
    for name in ("metrics", "run_card"):
        (run / "evaluation" / f"{name}.json").write_text("{}")
    network = f"$open({str(trace)!r}, 'w')"
    config = json.loads((mine / "configs" / "inference.json").read_text(encoding="utf-8"))
    (run / "bundle" / "configs" / "inference.json").write_text(json.dumps({**config, "network_def": network}))
    (run / "adapter.safetensors").write_bytes(b"")
    assert samseg(monkeypatch, "export", run, "--format", "pth", "--output", tmp_path / "out") == 1
    assert samseg(monkeypatch, "bundle", "pack", run, "--output", tmp_path / "x.zip") == 1
    message = capsys.readouterr().err
    assert "inference.json: network_def" in message and "--trust" in message and "Traceback" not in message
    assert not trace.exists() and not (tmp_path / "x.zip").exists()


# --- names of paths are not evaluated


@pytest.mark.parametrize("name", ["$open('trace','w')", "@seed", "%x.json", "a#b", "it's $x @y %z #q"])
def test_names_of_paths_are_not_evaluated(name, mine, phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Path(shutil.move(mine, tmp_path / name))
    shutil.copytree(phantoms / "unlabelled", tmp_path / f"{name} in")
    boxes = Path(f"{name} boxes.json")
    boxes.write_text(json.dumps({CASE: [{"slice": 5, "box": [5, 5, 20, 20]}]}))
    out = f"{name} out"
    assert samseg(monkeypatch, "predict", here, "--input", f"{name} in", "--output", out, "--boxes", boxes) == 0
    assert (tmp_path / out / f"{CASE}_seg.nii.gz").is_file()
    prediction, _ = load_bundle(name).predict(f"{name} in", boxes=str(boxes))
    np.testing.assert_array_equal(prediction, np.asarray(nib.load(tmp_path / out / f"{CASE}_seg.nii.gz").dataobj))
    made = {p.name for p in tmp_path.iterdir()} - {name, f"{name} in", boxes.name, out}
    assert not made


@pytest.mark.parametrize("value", ["$open('trace','w')", "@seed", "%x.json", "a#b"])
def test_base_weights_are_a_path_and_no_expression(value, mine, phantoms, tmp_path, monkeypatch, capsys):
    (mine / "models" / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    settings = json.loads((mine / "configs" / "settings.json").read_text(encoding="utf-8"))
    zero = merged(settings, {"strategy": {"method": {"name": "zero_shot"}}})
    bundle = write_bundle(read_settings(zero, "test"), tmp_path / "zero")
    words = ["--input", phantoms / "unlabelled", "--output", "out", "--whole-slice", "--sam-checkpoint", value]
    assert samseg(monkeypatch, "predict", bundle, *words) == 1
    message = capsys.readouterr().err
    assert f"sam_checkpoint {value!r} is not a file" in message or repr(value)[1:-1] in message
    assert not (tmp_path / "trace").exists() and "Traceback" not in message
    SamSegmenter("tiny", image_size=64, scans=4).load_base("random")
    torch.save({n.removeprefix("sam."): t for n, t in SamSegmenter("tiny").state_dict().items()}, value)
    assert samseg(monkeypatch, "predict", bundle, *words) == 0


def test_texts_become_what_they_are():
    from monai.bundle import ConfigParser

    for text in ("plain", "$1+1", "@a", "%b", "a#b", "é$'\\\"@{}\n", "$None "):
        assert ConfigParser({"a": 1, "b": 2, "x": literal(text)}).get_parsed_content("x") == text
    assert literal(3) == 3 and literal("$1+1", place=False) == "$1+1" and literal("$None") == "$None"


# --- bundles of 0.1.0


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("old")
    return {name: old_bundle(name, folder) for name in (LORA, UNET)}


GOLDEN = [(LORA, "brats", "boxes"), (LORA, "brats", "image"), (UNET, "hippocampus", "hippocampus")]


def expected(folder: str) -> nib.Nifti1Image:
    [path] = (FOLDER / "masks" / folder).iterdir()
    return nib.load(path)


@pytest.mark.parametrize(("name", "cases", "masks"), GOLDEN)
def test_zip_of_an_earlier_version_gives_the_masks_that_it_gave(name, cases, masks, old, tmp_path, monkeypatch, caplog):
    boxes = {"boxes": ["--boxes", FOLDER / "boxes.json"], "image": ["--whole-slice"]}.get(masks, [])
    assert samseg(monkeypatch, "predict", old[name], "--input", FOLDER / cases, "--output", tmp_path, *boxes) == 0
    [path] = tmp_path.glob("*_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), np.asarray(expected(masks).dataobj))
    np.testing.assert_array_equal(nib.load(path).affine, expected(masks).affine)
    assert "has no settings.json (samseg-monai 0.1.0 wrote none): its configs tell them" in caplog.text


@pytest.mark.parametrize(("name", "cases", "masks"), GOLDEN)
def test_the_same_from_python_again_and_again(name, cases, masks, old):
    loaded = load_bundle(old[name])
    [case] = (FOLDER / cases).iterdir()
    boxes = FOLDER / "boxes.json" if masks == "boxes" else None
    for _ in range(2):
        mask, affine = loaded.predict(case, boxes=boxes, whole_slice=masks == "image")
        np.testing.assert_array_equal(mask, np.asarray(expected(masks).dataobj))
        np.testing.assert_array_equal(affine, expected(masks).affine)
    assert loaded.classes == (("tumour",) if name == LORA else ("anterior", "posterior"))
    assert name in repr(loaded)


def test_old_bundle_tells_its_settings(old):
    with open_bundle(old[LORA]) as opened:
        run, task, method = opened.settings.run, opened.settings.task, opened.settings.strategy.method
        assert (run.sam_variant, run.image_size, run.crop_size, run.epochs, run.lr) == ("pico", 128, [28, 32], 2, 0.01)
        assert (run.prompt.source, run.prompt.loosen, run.lesion_wise) == ("label", [0.0, 0.3], True)
        assert (method.name, method.rank, method.decoder) == ("lora", 4, False)
        assert task.intensity.nonzero and task.intensity.after_crop and task.labels == "foreground"
    with open_bundle(old[UNET]) as opened:
        run, network = opened.settings.run, opened.settings.strategy.network
        assert (run.sam_variant, run.min_component_mm3, run.optimizer.name) == (None, 9, "AdamW")
        assert (network.name, network.channels, network.strides, network.num_res_units) == (
            "UNet",
            [4, 8, 16],
            [2, 2],
            1,
        )


EVIL = "$open('trace', 'w').close()"
OLD_ATTACKS = {
    "an expression for a number": ({"image_size": EVIL}, "run::image_size"),
    "an expression for a class": ({"classes": [EVIL]}, "task::classes"),
    "an expression within the strategy": (
        {"strategy": {"_target_": "samseg_monai.strategies.LoRA", "rank": EVIL}}, "rank"),
    "another strategy": ({"strategy": {"_target_": "os.system", "command": "id"}}, "strategy"),
    "another network": ({"network_def": {"_target_": "os.system", "command": "id"}}, "network_def::_target_"),
    "a network that downloads": (
        {"network_def": {"_target_": "samseg_monai.networks.PlainSegmenter", "net": {
            "_target_": "monai.networks.nets.HoVerNet", "pretrained_url": "https://example.org"}}}, "network"),
    "a network with another argument": (
        {"network_def": {"_target_": "samseg_monai.networks.PlainSegmenter", "net": {
            "_target_": "monai.networks.nets.UNet", "act": EVIL}}}, "act"),
    "another transform": ({"volume_transforms": [{"_target_": "Lambdad", "keys": "image", "func": EVIL}]}, "Lambdad"),
    "another argument of a transform": (
        {"orient_transforms": [{"_target_": "Orientationd", "keys": "label", "axcodes": "RAS"}]}, "orient_transforms"),
    "an expression for a transform's value": (
        {"orient_transforms": [{"_target_": "Orientationd", "axcodes": EVIL}]}, "task::orientation"),
    "transforms by expression": ({"volume_transforms": EVIL}, "volume_transforms"),
    "no object": ({"network_def": [1], "strategy": 3, "prompt": "x"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("attack", OLD_ATTACKS)
def test_old_bundle_is_read_and_not_evaluated(attack, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, where = OLD_ATTACKS[attack]
    root = unpacked(Path(shutil.copy(old[LORA], tmp_path)))
    (root / "SHA256SUMS").unlink()
    path = root / "configs" / "inference.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))
    with pytest.raises(SamsegError) as caught, open_bundle(root):
        pass
    assert where in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_values_that_someone_changed_in_an_old_bundle_count(old, tmp_path):
    root = unpacked(Path(shutil.copy(old[LORA], tmp_path)))
    (root / "SHA256SUMS").unlink()
    path = root / "configs" / "inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["min_component_mm3"] = 12
    config["orient_transforms"][0]["axcodes"] = "LPS"
    path.write_text(json.dumps(config))
    with open_bundle(root) as opened:
        assert (opened.settings.run.min_component_mm3, opened.settings.task.orientation) == (12, "LPS")


@pytest.mark.parametrize("content", [scripted(), pickle.dumps({}), torch_file(torch.nn.Linear(2, 2)), torch_file([1])])
def test_old_weights_are_a_state_dict_of_tensors_or_refused(content, old, tmp_path, monkeypatch, capsys):
    root = unpacked(Path(shutil.copy(old[LORA], tmp_path)))
    (root / "SHA256SUMS").unlink()
    (root / "models" / "model.pt").write_bytes(content)
    words = ["--input", FOLDER / "brats", "--output", tmp_path / "out", "--whole-slice"]
    assert samseg(monkeypatch, "predict", root, *words) == 1
    message = capsys.readouterr().err
    assert "model.pt" in message and "Traceback" not in message
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


# --- from Python


def test_arrays_and_boxes_give_what_files_do(mine, phantoms):
    loaded = load_bundle(mine)
    folder = phantoms / "unlabelled" / CASE
    volumes = [nib.load(folder / f"{CASE}-{scan}.nii.gz") for scan in loaded.scans]
    array = np.stack([np.asarray(v.dataobj) for v in volumes], axis=-1)
    boxes = [{"slices": [3, 6], "box": [5, 5, 20, 20]}]
    for given in ({"boxes": boxes}, {"whole_slice": True}):
        one, affine = loaded.predict(folder, **given)
        other, same = loaded.predict(array, affine=volumes[0].affine, **given)
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(affine, same)
        assert one.shape == array.shape[:3]
    assert loaded.predict(folder, boxes=boxes)[0][..., :3].sum() == 0
    with pytest.raises(PromptError, match="one source"):
        loaded.predict(folder, boxes=boxes, mask="x.nii.gz")
    with pytest.raises(DataError, match="not within"):
        loaded.predict(folder, boxes=[{"slice": 99, "box": [5, 5, 20, 20]}])
    with pytest.raises(DataError, match="numbers"):
        loaded.predict(np.zeros(3), whole_slice=True)
    with pytest.raises(PromptError, match="whole_slice=True in Python"):
        loaded.predict(folder)


def test_scratch_folders_are_gone_when_a_bundle_is(mine, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    loaded = load_bundle(mine)
    assert list((tmp_path / "scratch").iterdir())
    del loaded
    assert not list((tmp_path / "scratch").iterdir())


def test_what_lies_in_the_users_folder_stays(mine, phantoms, tmp_path, monkeypatch):
    """Nothing is written but the predictions."""
    before = {p: p.stat().st_mtime_ns for p in mine.rglob("*")}
    monkeypatch.chdir(tmp_path)
    listed = set(os.listdir(tmp_path))
    words = ["--input", phantoms / "unlabelled", "--output", "out", "--whole-slice"]
    assert samseg(monkeypatch, "predict", mine, *words) == 0
    assert set(os.listdir(tmp_path)) == listed | {"out"}
    made = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert made == [f"{CASE}_overlay.png", f"{CASE}_seg.nii.gz", "predictions.csv"]
    assert {p: p.stat().st_mtime_ns for p in mine.rglob("*")} == before
    assert load_file(mine / "models" / "model.safetensors")

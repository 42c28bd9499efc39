"""``samseg task``: settings of one's own data, drafted from what is measured in them, each choice with its reason."""

import json
import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from samseg_monai.bundles import build_bundle, recipe_names
from samseg_monai.bundles.build import RECIPES, compose, read_recipe
from samseg_monai.bundles.draft import MODALITIES, draft_task, recipe_schema
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.datalists.images import prepare_images
from samseg_monai.data.datalists.measure import Measured, measure
from samseg_monai.data.files.volumes import read_grid, read_volume
from samseg_monai.errors import BundleError, ConfigError, DataError
from samseg_monai.settings import dump_settings, json_schema
from tests.helpers.commands import samseg
from tests.helpers.pictures import make_pictures

FACTS = {
    "dataset": "livers", "images": False, "modality": "CT", "scans": ("image",), "classes": ("liver",),
    "cases": {"training": 3}, "read": 3, "shapes": ((512, 512, 90),), "spacings_mm": (0.7, 0.7, 2.0),
    "lowest": -1024.0, "highest": 1500.0, "zeros": 0.01, "inside": (-20.0, 180.0), "unit": "mm",
}  # fmt: skip


def drafted(given=None, **facts) -> dict:
    choices = draft_task(Measured(**{**FACTS, **facts}), given)
    assert all(choice.why for choice in choices)
    return {choice.key: choice.value for choice in choices}


def write_cts(folder, *, spacing=(1.0, 1.0, 1.0), count=6):
    """Volumes in HU: air, fat, and two organs of 40 and 60 HU."""
    rng = np.random.default_rng(0)
    for number in range(count):
        label = np.zeros((20, 24, 8), dtype=np.uint8)
        label[4:9, 6:16, 2:6], label[11:16, 6:16, 2:6] = 2, 3
        body = np.choose(label, [-100, -100, 40, 60]) + rng.normal(0, 5, label.shape)
        body[0] = -1024
        for kind, array in (("images", body.astype(np.int16)), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(
                nib.Nifti1Image(array, np.diag([-spacing[0], *spacing[1:], 1.0])), folder / kind / f"c{number}.nii.gz"
            )
    prepare_folders(folder, folder / "datalist.json", labels={"2": "right kidney", "3": "left kidney"}, progress=False)
    return folder / "datalist.json"


def test_a_task_is_written_with_its_reasons_and_builds_with_every_strategy(tmp_path, monkeypatch, capsys):
    datalist = write_cts(tmp_path / "my kidneys")
    assert samseg(monkeypatch, "task", "new", "kidneys", "--datalist", datalist, "--out", tmp_path) == 0
    told = capsys.readouterr().out
    text = (tmp_path / "kidneys.json").read_text()
    recipe = read_recipe("tasks", str(tmp_path / "kidneys.json"))
    assert recipe["classes"] == ["right kidney", "left kidney"] and recipe["dataset"] == "my_kidneys"
    assert recipe["mirrored_classes"] == [["left kidney", "right kidney"]]
    assert (recipe["modality"], recipe["orientation"], recipe["channels"]) == ("CT", "PLS", ["ct"])
    low, high = recipe["intensity"]["window"]
    assert -30 < low < 25 and 75 < high < 130  # labelled voxels lie from about 28 to 72
    assert recipe["run"]["input_scale"] == "unit" and recipe["run"]["prompt"] == {"source": "none"}
    for key in (
        *recipe.keys() - {"name", "run"},
        *recipe["run"],
    ):  # each choice is explained in the file and on the screen
        assert f'"//{key}": "' in text and re.search(rf"^(run::)?{key} ", told, flags=re.M), key
    assert "next: samseg bundle build --task" in told and "a guess" in told
    for strategy in set(recipe_names("strategies")) - {"ellipse"}:
        settings = compose(str(tmp_path / "kidneys.json"), strategy)
        assert settings.demo is None or settings.demo.run.sam_variant in ("pico", None), strategy
    bundle = build_bundle(str(tmp_path / "kidneys.json"), "lora", tmp_path / "out")
    page = (bundle / "docs" / "README.md").read_text()
    assert "Right kidney and left kidney are segmented on CT" in page and "```\n\n```" not in page


@pytest.mark.parametrize("classes", [("liver",), ("liver", "spleen")])
def test_the_demo_of_a_task_looks_once_at_about_a_thousand_slices(classes):
    few = drafted(classes=classes, cases={"training": 3}, shapes=((64, 64, 40),))["demo"]["run"]
    many = drafted(classes=classes, cases={"training": 138}, shapes=((43, 59, 47), (34, 48, 30)))["demo"]["run"]
    assert few["embeddings"] == many["embeddings"] == {"variants": 1}
    if len(classes) == 1:
        assert few["slices"]["picker"]["n"] == 8 and many["slices"]["picker"]["n"] * 138 <= 1000
    else:
        assert few["slices"]["picker"]["n"] == 1
        assert 800 <= 138 * -(-47 // many["slices"]["picker"]["n"]) <= 1100
    assert drafted(cases={"training": 10**6})["demo"]["run"]["slices"]["picker"]["n"] == 1


def test_build_ends_with_the_commands_as_they_are_typed_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for task, strategy in (("meningioma", "zero_shot"), ("hippocampus", "ladder")):
        assert (
            samseg(monkeypatch, "bundle", "build", "--task", task, "--strategy", strategy, "--out", "my bundles") == 0
        )
        told = capsys.readouterr().out.splitlines()
        commands = [shlex.split(line.removeprefix("next: ")) for line in told if "monai.bundle run" in line]
        assert told[0] == f"my bundles/{task}_segmentation_{strategy}" and len(commands) == 2
        for words in commands:
            given = words[words.index("--config_file") + 1]
            paths = given.strip("[]").replace("'", "").split(",")
            assert all(Path(path).is_file() for path in paths), paths
        assert any("data/" in line and "not here" in line for line in told)
    assert "samseg phantom" not in "\n".join(told) and "data/hippocampus" in told[-1] and "demo.json" in told[-1]


def test_images_make_a_task_of_images(tmp_path, monkeypatch):
    pictures = make_pictures(tmp_path / "discs")
    words = ("--datalist", pictures / "datalist.json", "--out", tmp_path, "--modality", "us")
    assert samseg(monkeypatch, "task", "new", "discs", *words) == 0
    recipe = read_recipe("tasks", str(tmp_path / "discs.json"))
    assert (recipe["kind"], recipe["orientation"], recipe["modality"], recipe["classes"]) == (
        "images",
        None,
        "US",
        ["tumour"],
    )
    assert recipe["run"]["prompt"] == {"source": "label", "loosen": [0.0, 0.3]} and recipe["run"]["image_size"] == 256
    assert "mirrored_classes" not in recipe
    refused = {"medsa": "depth: a 2-D image has no neighbours"}
    refused |= {s: "2-D images are single slices" for s in recipe_names("strategies") if s.endswith("_3d")}
    for strategy in recipe_names("strategies"):
        if strategy in refused:
            with pytest.raises(BundleError, match=refused[strategy]):
                compose(str(tmp_path / "discs.json"), strategy)
        else:
            compose(str(tmp_path / "discs.json"), strategy)


def test_coloured_images_keep_their_colours(tmp_path):
    pictures = make_pictures(tmp_path / "discs", colour=True)
    for path in (pictures / "images").iterdir():
        Image.open(path).load()
    prepare_images(
        pictures / "images", pictures / "labels", pictures / "d.json", labels={"255": "tumour"}, progress=False
    )
    measured = measure(pictures / "d.json", pictures)
    assert (measured.shapes, measured.unit, measured.scans) == (((40, 52),), "px", ("red", "green", "blue"))
    chosen = {choice.key: choice.value for choice in draft_task(measured, "XC")}
    assert (chosen["run::input_scale"], chosen["run::scan_mode"], chosen["intensity"]) == ("sam", "channels", {})


def test_exams_of_four_scans_become_four_channels(phantoms, tmp_path, monkeypatch):
    assert samseg(monkeypatch, "task", "new", "men", "--datalist", phantoms / "datalist.json", "--out", tmp_path) == 0
    recipe = read_recipe("tasks", str(tmp_path / "men.json"))
    assert recipe["scans"] == ["t1n", "t1c", "t2w", "t2f"] and recipe["modality"] == "MR"
    assert recipe["classes"] == ["non-enhancing core", "oedema", "enhancing tumour"]
    assert recipe["intensity"] == {"nonzero": True}  # the phantoms are skull-stripped
    compose(str(tmp_path / "men.json"), "lora")


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, {"intensity": {"window": [-120.0, 280.0]}, "run::input_scale": "unit", "run::image_size": 1024}),
        ({"inside": None}, {"intensity": {}, "run::input_scale": "zscore"}),
        ({"inside": (3.0, 3.0)}, {"intensity": {}, "run::input_scale": "zscore"}),
        ({"modality": "MRI"}, {"modality": "MR", "intensity": {}, "run::input_scale": "zscore"}),
        ({"modality": "T1w, FLAIR"}, {"modality": "MR"}),
        ({"modality": "CT, PET"}, {"modality": "CT"}),  # two are named: a guess by air
        ({"modality": "", "lowest": 0.0}, {"modality": "OT"}),
        ({"modality": "MRI", "zeros": 0.6}, {"intensity": {"nonzero": True}}),
        ({"spacings_mm": (5.0, 0.7, 0.7)}, {"orientation": "IPR"}),
        ({"spacings_mm": (0.7, 3.0, 0.7)}, {"orientation": "ILA"}),
        ({"spacings_mm": (0.7, 0.8, 0.9)}, {"orientation": "PLS"}),
        ({"shapes": ((35, 51, 35), (43, 47, 41))}, {"run::crop_size": [64, 48], "run::image_size": 256}),
        ({"shapes": ((35, 51, 35), (35, 51, 41))}, {"run::crop_size": None}),
        ({"shapes": ((35, 51, 35), (512, 512, 41))}, {"run::crop_size": None}),
        ({"classes": ("left lung", "heart")}, {"mirrored_classes": None}),
        ({"classes": ("lung_L", "lung_R", "heart")}, {"mirrored_classes": [["lung_L", "lung_R"]]}),
        ({"classes": ("heart", "liver")}, {"mirrored_classes": [], "run::slices": {"picker": {"name": "AllSlices"}}}),
        ({}, {"run::slices": {"picker": {"name": "Foreground"}}, "run::batch_size": 2}),
    ],
)  # fmt: skip
def test_choices_follow_from_what_is_measured(facts, expected):
    found = drafted(**facts)
    assert {key: found[key] for key in expected} == expected


def test_every_modality_has_words_of_its_own():
    words = [word for _, known in MODALITIES.values() for word in known]
    assert len(words) == len(set(words))
    assert drafted("XC")["modality"] == "XC" and drafted("US")["title"] == "Liver on ultrasound"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../liver", "no name of a task"), ("liver.json", "no name of a task"), ("a b", "no name of a task"),
        ("$x", "no name of a task"), ("meningioma", "comes with samseg-monai"), ("x" * 60, "60 characters"),
    ],
)  # fmt: skip
def test_bad_names_are_refused_before_anything_is_read(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert samseg(monkeypatch, "task", "new", name, "--datalist", "nowhere.json") == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not list(tmp_path.iterdir())


def test_an_existing_file_stays_unless_force_is_given(tmp_path, monkeypatch, capsys):
    datalist = make_pictures(tmp_path / "discs") / "datalist.json"
    words = ("task", "new", "mine", "--datalist", datalist, "--out", tmp_path)
    (tmp_path / "mine.json").write_text("mine")
    assert samseg(monkeypatch, *words) == 1
    assert "--force" in capsys.readouterr().err and (tmp_path / "mine.json").read_text() == "mine"
    assert samseg(monkeypatch, *words, "--force") == 0
    assert json.loads((tmp_path / "mine.json").read_text())["classes"] == ["tumour"]


def test_unusable_data_are_one_error_and_leave_no_file(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "kidneys"
    datalist = write_cts(folder)
    content = json.loads(datalist.read_text())
    bad = {
        "none.json": (None, "no such file or folder"),
        "text.json": ("no JSON", "is not JSON"),
        "labels.json": (content | {"labels": None}, 'has no "labels"'),
        "background.json": (content | {"labels": {"0": "background"}}, "name no class"),
        "names.json": (content | {"labels": {"0": "background", "2": "Niere, links", "3": "$x"}}, "'Niere, links'"),
        "training.json": (content | {"training": []}, "no case to train with"),
        "files.json": (content | {"training": [{"case": "c9", "image": "images/c9.nii.gz"}]}, "c9.nii.gz"),
    }
    for name, (value, said) in bad.items():
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        assert samseg(monkeypatch, "task", "new", "mine", "--datalist", folder / name, "--out", tmp_path) == 1
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error, (name, error)
        assert not (tmp_path / "mine.json").exists()
    for case in (content["training"][0], content["training"][1]):
        (folder / case["image"][0]).write_bytes(b"damaged")
    with pytest.raises(DataError, match="2 problems"):
        measure(datalist, folder)
    assert (
        samseg(monkeypatch, "task", "new", "mine", "--datalist", datalist, "--modality", "M R", "--out", tmp_path) == 1
    )
    assert "--modality" in capsys.readouterr().err


def test_class_names_that_no_settings_hold_are_named_at_once():
    with pytest.raises(ConfigError, match="2 problems"):
        drafted(classes=("Läsion", "ok", "NCR/NET", "a//b"))


def test_grids_of_headers_are_those_of_whole_files(tmp_path):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.zeros((5, 6, 7), dtype=np.int16))
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((4.0, -5.0, 6.0))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    for suffix in (".nii.gz", ".nii", ".mha", ".nrrd"):
        path = tmp_path / f"case{suffix}"
        sitk.WriteImage(image, str(path))
        shape, affine = read_grid(path)
        volume = read_volume(path)
        assert shape == volume.array.shape == (7, 6, 5)
        np.testing.assert_array_equal(affine, volume.affine)
        path.write_bytes(b"x")
        with pytest.raises(DataError, match=f"^case{suffix}: its header"):
            read_grid(path)


def test_schemas_take_what_settings_take_and_mark_mistakes(tmp_path, monkeypatch, capsys):
    assert samseg(monkeypatch, "task", "schema", "--output", tmp_path / "task.schema.json") == 0
    written = json.loads((tmp_path / "task.schema.json").read_text())
    assert written == json.loads(json.dumps(recipe_schema()))
    capsys.readouterr()
    assert samseg(monkeypatch, "task", "schema", "--of-bundle") == 0
    of_bundle = json.loads(capsys.readouterr().out)
    assert of_bundle == json.loads(json.dumps(json_schema()))
    Draft202012Validator.check_schema(written)
    tasks = Draft202012Validator(written)
    for path in (RECIPES / "tasks").glob("*.json"):
        tasks.validate(json.loads(path.read_text()))
        Draft202012Validator(of_bundle).validate(dump_settings(compose(path.stem, "lora")))
    datalist = make_pictures(tmp_path / "discs") / "datalist.json"
    samseg(monkeypatch, "task", "new", "mine", "--datalist", datalist, "--out", tmp_path)
    recipe = json.loads((tmp_path / "mine.json").read_text())
    tasks.validate(recipe)
    tasks.validate({"extends": "meningioma", "//": "why", "run": {"epochs": 3, "//epochs": "short"}})
    for wrong in (recipe | {"run": {"epochs": 0}}, recipe | {"clases": []}, {"title": "Nothing else"}):
        assert not tasks.is_valid(wrong)

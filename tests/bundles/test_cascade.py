"""A bundle's masks as the prompts of another: in one command, by hand, and in an evaluation."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from samseg_monai.bundles import write_bundle
from samseg_monai.bundles.build import compose
from samseg_monai.bundles.record import _of_masks
from samseg_monai.data.datalists import load_datalist
from samseg_monai.data.files.boxes import rectangles
from samseg_monai.errors import PromptError
from samseg_monai.handlers.predictions import TABLE
from samseg_monai.report.runs import RunResult
from samseg_monai.settings import dump_settings, merged, read_settings
from samseg_monai.workflow import run_workflow
from tests.helpers.commands import samseg

TINY = {"sam_variant": "tiny", "image_size": 32}


def built(place, of_task, of_strategy, **changes):
    changes = {"run": {**TINY, **changes.pop("run", {})}, **changes}
    settings = read_settings(merged(dump_settings(compose(of_task, of_strategy)), changes), "test")
    return write_bundle(settings, place / settings.name)


@pytest.fixture(scope="module")
def organs(tmp_path_factory):
    """Finds eight organs without prompts; of random weights, as only the way matters."""
    noise = {"method": {"name": "zero_shot", "random_masks": True}}
    return built(tmp_path_factory.mktemp("first"), "abdomen", "zero_shot", strategy=noise)


@pytest.fixture(scope="module")
def spleen(tmp_path_factory):
    """Segments one organ in a box."""
    task = {"classes": ["spleen"], "title": "Spleen on CT", "text": "The spleen.", "mirrored_classes": []}
    named = {"name": "spleen_segmentation", "task": task, "run": {"prompt": {"source": "label"}}}
    return built(tmp_path_factory.mktemp("then"), "abdomen", "zero_shot", **named)


def predict(monkeypatch, *words):
    return samseg(monkeypatch, "predict", *words, "--sam-checkpoint", "random", "--no-pictures")


def volumes(folder):
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*_seg.nii.gz"))}


def table(folder):
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_command_gives_what_two_give(organs, spleen, abdomen, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    names = ("CON", "a:b")  # are no names of files everywhere, and stay those of the cases
    for name, path in zip(names, sorted(abdomen.rglob("img*.nii.gz")), strict=False):
        (images / f"{name}.nii.gz").symlink_to(path)
    assert predict(monkeypatch, organs, "--input", images, "--output", tmp_path / "first") == 0
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in (tmp_path / "first").glob("*_seg.nii.gz"):
        image = nib.load(path)
        value = compose("abdomen", "zero_shot").task.classes.index("spleen") + 1
        mask = np.asarray(image.dataobj) == value
        assert mask.any()
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), image.affine), masks / path.name)
    asked = (spleen, "--input", images)
    assert predict(monkeypatch, *asked, "--output", tmp_path / "hand", "--prompts", masks) == 0
    # the class that both have is the structure
    assert predict(monkeypatch, *asked, "--output", tmp_path / "out", "--prompts-from", organs) == 0
    made, by_hand = volumes(tmp_path / "out"), volumes(tmp_path / "hand")
    assert len(made) == 2 and all(np.array_equal(made[name], by_hand[name]) for name in by_hand)
    assert {row["prompt"] for row in table(tmp_path / "out")} == {"mask by abdomen_segmentation_zero_shot"}
    assert [row["case"] for row in table(tmp_path / "out")] == list(names)
    assert list(made) == ["CON_seg.nii.gz", "a_b_seg.nii.gz"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*made, TABLE])

    liver = ("--prompts-from", organs, "--prompts-class", "liver")
    assert predict(monkeypatch, *asked, "--output", tmp_path / "liver", *liver) == 0
    assert any(not np.array_equal(made[name], found) for name, found in volumes(tmp_path / "liver").items())
    capsys.readouterr()
    nothing = ("--prompts-from", organs, "--prompts-min-mm3", "1e8")
    assert predict(monkeypatch, *asked, "--output", tmp_path / "nothing", *nothing) == 0
    assert not any(found.any() for found in volumes(tmp_path / "nothing").values())
    assert all("found nothing, so that there was no prompt" in row["warnings"] for row in table(tmp_path / "nothing"))


def test_a_case_that_the_first_cannot_predict_costs_itself_alone(organs, spleen, abdomen, tmp_path, monkeypatch):
    for path, name in zip(sorted(abdomen.rglob("img*.nii.gz"))[:2], "ab", strict=True):
        (tmp_path / f"{name}.nii.gz").symlink_to(path)
    run = "samseg_monai.transforms.SaveVolumed.__call__"
    whole = __import__("samseg_monai.transforms", fromlist=["x"]).SaveVolumed.__call__
    calls = []

    def fail_once(self, d):
        calls.append(d["case"])
        if len(calls) == 1:
            raise ZeroDivisionError("an odd case")
        return whole(self, d)

    monkeypatch.setattr(run, fail_once)
    words = (spleen, "--input", tmp_path, "--output", tmp_path / "out", "--prompts-from", organs)
    assert predict(monkeypatch, *words) == 1
    assert list(volumes(tmp_path / "out")) == ["b_seg.nii.gz"] and calls == ["a", "b", "b"]
    assert "did not predict it" in table(tmp_path / "out")[0]["problem"]


@pytest.mark.parametrize(
    ("swapped", "words", "message"),
    [
        (True, (), "takes no prompts"),
        (False, ("--prompts-class", "heart"), "heart: no class of abdomen_segmentation_zero_shot; choose among"),
        (False, ("--whole-slice",), "got both --prompts-from and --whole-slice"),
    ],
)
def test_what_does_not_go_together_is_told(
    swapped, words, message, organs, spleen, abdomen, tmp_path, monkeypatch, capsys
):
    first, then = (spleen, organs) if swapped else (organs, spleen)
    words = (then, "--input", abdomen, "--output", tmp_path / "out", "--prompts-from", first, *words)
    assert predict(monkeypatch, *words) == 1
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and not (tmp_path / "out").exists()


def test_a_cascade_is_evaluated_by_one_command(organs, spleen, abdomen, tmp_path, monkeypatch, capsys):
    places = {"dataset_dir": str(abdomen), "sam_checkpoint": "random"}
    words = ("cascade", spleen, "--prompts-from", organs, "--dataset-dir", abdomen, "--sam-checkpoint", "random")
    assert samseg(monkeypatch, *words, "--output", tmp_path / "cascade") == 0
    told = capsys.readouterr().out
    assert "abdomen_segmentation_zero_shot [" in told and "spleen_segmentation [" in told
    first = tmp_path / "cascade" / "first" / "evaluation"
    value = compose("abdomen", "zero_shot").task.classes.index("spleen") + 1
    run_workflow([spleen / "configs" / "evaluate.json"], {**places, "output_dir": str(tmp_path / "boxes")}, echo=False)
    results = {name: RunResult.load(tmp_path / name / "evaluation") for name in ("cascade", "boxes")}
    card = json.loads((tmp_path / "cascade" / "evaluation" / "run_card.json").read_text())
    assert card["prompts_from"] == "abdomen_segmentation_zero_shot" and len(card["boxes_sha256"]) == 64
    assert results["cascade"].prompt_source.startswith("boxes of masks by abdomen_segmentation_zero_shot (masks ")
    assert results["cascade"].boxes != results["boxes"].boxes and results["cascade"].boxes["file"]
    assert len(results["cascade"].rows) == len(results["boxes"].rows) == 2
    # a file of a case that was not evaluated says nothing of its masks
    (first / "predictions" / "another_seg.nii.gz").write_bytes(b"")
    items = load_datalist(abdomen / "datalist.json", abdomen, "testing")
    assert _of_masks(first / "predictions", items)["boxes_sha256"] == card["boxes_sha256"]
    (first / "predictions" / "another_seg.nii.gz").unlink()
    # slices that the first marked were asked for, and no others
    for path in (tmp_path / "cascade" / "evaluation" / "predictions").glob("*_seg.nii.gz"):
        asked = np.asarray(nib.load(first / "predictions" / path.name).dataobj) == value
        found = np.asarray(nib.load(path).dataobj) > 0
        assert found.any() and not (found.any((0, 1)) & ~asked.any((0, 1))).any()


def test_boxes_of_images_are_made_of_the_first_s_masks(pictures, tmp_path, monkeypatch):
    none = {"input_scale": "unit", "prompt": {"source": "none"}}
    first = built(tmp_path, "brain_tumour_t1c", "zero_shot", name="first", run=none)
    then = built(tmp_path, "brain_tumour_t1c", "zero_shot", run={"prompt": {"source": "label"}, "input_scale": "unit"})
    images = tmp_path / "images"
    images.mkdir()
    for name, path in zip(("CON", "a:b", "c"), sorted((pictures / "images").glob("*.png")), strict=False):
        (images / f"{name}.png").symlink_to(path)
    assert predict(monkeypatch, first, "--input", images, "--output", tmp_path / "masks") == 0
    boxes = {}
    for path in (tmp_path / "masks").glob("*_seg.png"):
        found = rectangles(np.asarray(Image.open(path)) > 0)
        boxes[path.name.removesuffix("_seg.png")] = [list(map(float, box)) for box in found]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    asked = (then, "--input", images)
    assert predict(monkeypatch, *asked, "--output", tmp_path / "out", "--prompts-from", first) == 0
    empty = sorted(case for case, found in boxes.items() if not found)
    assert predict(monkeypatch, *asked, "--output", tmp_path / "hand", "--boxes", tmp_path / "boxes.json") == bool(
        empty
    )
    for path in (tmp_path / "hand").glob("*_seg.png"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert {row["prompt"] for row in table(tmp_path / "out")} == {"boxes by first"}
    assert [row["case"] for row in table(tmp_path / "out")] == ["CON", "a:b", "c"]


def test_a_cascade_of_images_is_evaluated_by_one_command(pictures, tmp_path, monkeypatch):
    """As by its three commands: the first's evaluation, boxes of its masks, the second's."""
    none = {"input_scale": "unit", "prompt": {"source": "none"}}
    noise = {"method": {"name": "zero_shot", "random_masks": True}}
    first = built(tmp_path, "brain_tumour_t1c", "zero_shot", name="first", run=none, strategy=noise)
    then = built(tmp_path, "brain_tumour_t1c", "zero_shot", run={"prompt": {"source": "label"}, "input_scale": "unit"})
    words = ("cascade", then, "--prompts-from", first, "--dataset-dir", pictures, "--sam-checkpoint", "random")
    assert samseg(monkeypatch, *words, "--output", tmp_path / "out") == 0
    made = tmp_path / "out" / "first" / "evaluation" / "predictions"
    words = ("boxes", "from-mask", made, "--label", 255, "--allow-empty", "--output", tmp_path / "boxes.json")
    assert samseg(monkeypatch, *words) == 0
    drawn, own = (json.loads((place / "boxes.json").read_text()) for place in (tmp_path, tmp_path / "out"))
    assert drawn == own and any(own.values())
    given = {"prompt::source": "json", "prompt::boxes": str(tmp_path / "boxes.json"), "prompts_from": "first"}
    run = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "hand"), "sam_checkpoint": "random", **given}
    run_workflow([then / "configs" / "evaluate.json"], run, echo=False)
    by_hand, found = (RunResult.load(tmp_path / name / "evaluation") for name in ("hand", "out"))
    assert found.rows == by_hand.rows and len(found.rows) == 3
    assert found.prompt_source.startswith("boxes of masks by first (boxes.json, file ")


def test_an_image_where_the_first_found_nothing_is_scored_as_an_empty_prediction(
    pictures, tmp_path, monkeypatch, capfd
):
    then = built(tmp_path, "brain_tumour_t1c", "zero_shot", run={"prompt": {"source": "label"}, "input_scale": "unit"})
    cases = [item["case"] for item in json.loads((pictures / "datalist.json").read_text())["testing"]]
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, case in enumerate(cases):  # as the first bundle's evaluation leaves them
        mask = np.zeros_like(np.asarray(Image.open(next((pictures / "images").glob(f"{case}.*"))).convert("L")))
        mask[5:20, 5:20] = number > 0
        Image.fromarray(mask).save(masks / f"{case}_seg.png")
    words = ("boxes", "from-mask", masks, "--output", tmp_path / "boxes.json", "--label", 1)
    assert samseg(monkeypatch, *words) == 1
    assert samseg(monkeypatch, *words[:-1], 255, "--allow-empty") == 1  # another value than that of the labels
    assert f"{cases[1]}: no pixel has the value 255; it holds 0, 1" in "".join(capfd.readouterr())
    assert samseg(monkeypatch, *words, "--allow-empty") == 0
    given = {"prompt::source": "json", "prompt::boxes": str(tmp_path / "boxes.json"), "save_predictions": True}
    run = {"dataset_dir": str(pictures), "output_dir": str(tmp_path / "out"), "sam_checkpoint": "random", **given}
    with pytest.raises(PromptError, match=f"{cases[0]}: expected a list of boxes"):  # a person's slip
        run_workflow([then / "configs" / "evaluate.json"], run, echo=False)
    run_workflow([then / "configs" / "evaluate.json"], {**run, "prompts_from": "first"}, echo=False)
    assert f"first found nothing in 1 of {len(cases)} cases, which count as empty predictions: {cases[0]}" in "".join(
        capfd.readouterr()
    )
    found = RunResult.load(tmp_path / "out" / "evaluation")
    assert [row["case"] for row in found.rows if row["empty_prediction"]] == [cases[0]]
    assert next(row["dice"] for row in found.rows if row["case"] == cases[0]) == 0
    assert found.prompt_source.startswith("boxes of masks by first (boxes.json, file ")

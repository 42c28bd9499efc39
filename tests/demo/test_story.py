"""Overlays of demos show label maps."""

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.errors import DataError
from samseg_monai.pictures import as_seen
from samseg_monai.report.montage import outline, overlay_cases
from samseg_monai.report.runs import RunResult

LABELS = {"0": "background", "4": "liver", "7": "spleen", "9": "vein"}
CLASSES = ["spleen", "liver"]


@pytest.fixture
def scored(tmp_path):
    """One case of two organs with values 7 and 4, three slices; the prediction swaps them in slice 2."""
    label = np.zeros((6, 8, 3), np.uint8)
    label[1:5, 1:7, 0] = 7  # larger, but a single organ
    label[1:3, 1:3, 2], label[3:5, 5:7, 2], label[0, 0, 1] = 7, 4, 9
    prediction = np.where(label == 7, 2, np.where(label == 4, 1, 0)).astype(np.uint8)
    image = np.linspace(-1000, 1000, label.size).reshape(label.shape)
    folder = tmp_path / "run"
    (folder / "predictions").mkdir(parents=True)
    for path, array in (
        (tmp_path / "img.nii.gz", image),
        (tmp_path / "label.nii.gz", label),
        (folder / "predictions" / "a_seg.nii.gz", prediction),
    ):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 3, 4, 1])), path)
    head = "case,class,dice,empty_prediction,empty_reference,excluded"
    rows = [f"a,{name},{dice},False,False,False" for name, dice in (("spleen", 0.25), ("liver", 0.75))]
    (folder / "cases.csv").write_text("\n".join([head, *rows]) + "\n")
    (folder / "run_card.json").write_text("{}")
    (folder / "metrics.json").write_text("{}")
    return folder, [{"case": "a", "image": str(tmp_path / "img.nii.gz"), "label": str(tmp_path / "label.nii.gz")}]


def test_overlays_show_the_slice_with_most_organs_in_the_classes_of_the_network(scored):
    folder, items = scored
    run = RunResult.load(folder, name="ladder")
    [case] = overlay_cases(run, [run], items, labels=LABELS, classes=CLASSES, window=(-100, 100))
    assert case.slices[case.shown] == 2 and case.boxes == [[], [], []] and case.spacing_mm == (2.0, 3.0)
    organs, found = np.zeros((6, 8)), case.predictions["ladder"][2]
    organs[1:3, 1:3], organs[3:5, 5:7] = 1, 2
    assert (case.reference[2] == as_seen(organs)).all()
    assert (found == np.choose(case.reference[2], (0, 2, 1))).all()
    assert case.dice == {"ladder": 0.5} and case.role == "best and median and worst of Ladder (ResNet18 beside SAM)"
    assert case.window == (-100, 100) and case.letters == "RLAP"
    assert outline(found).count("M") == 2  # an outline for each organ
    assert outline(np.where(found, 1, 2)).count("z") > outline(np.ones_like(found)).count("z") == 1


def test_box_goes_with_its_pixels_into_the_picture(scored):
    folder, items = scored
    prompt = np.zeros((6, 8, 3), np.uint8)
    prompt[1:4, 3:7, 2] = 1
    nib.save(nib.Nifti1Image(prompt, np.diag([2.0, 3, 4, 1])), folder / "predictions" / "a_prompt.nii.gz")
    run = RunResult.load(folder, name="ladder")
    [case] = overlay_cases(run, [run], items, labels=LABELS, classes=CLASSES)
    rows, columns = np.nonzero(as_seen(prompt[..., 2]))
    assert case.boxes == [[], [], [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]]


def test_label_that_the_datalist_does_not_know_is_refused(scored):
    folder, items = scored
    labels = {value: name for value, name in LABELS.items() if value != "9"}
    run = RunResult.load(folder, name="ladder")
    with pytest.raises(DataError, match=r"\[9\]"):
        overlay_cases(run, [run], items, labels=labels, classes=CLASSES)

"""The same volume in other orientations, turned, oblique and coarser, sent through whole bundles: predictions follow
the image, and what is measured in mm stays."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.bundle import ConfigParser
from scipy import ndimage
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

from samseg_monai.bundles import build_bundle
from samseg_monai.errors import DataError
from samseg_monai.workflow import run_workflow

SCANS = ("t1n", "t1c", "t2w", "t2f")
SHAPE, SPACING_MM = (30, 26, 12), (0.9, 1.1, 2.5)  # right, anterior, superior; no two alike
LESION = (slice(8, 17), slice(12, 19), slice(3, 9))
PICO = {"sam_variant": "pico", "image_size": 64, "crop_size": [24, 22], "batch_size": 6}
COARSE = 3  # every third slice


def affine_of(spacing_mm) -> np.ndarray:
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = (-12.5, -20.0, 7.25)
    return affine


def reoriented(axes: str) -> Callable:
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    return lambda array, affine: nib.Nifti1Image(array, affine).as_reoriented(turn)


def flipped(array, affine):
    back = np.diag([-1.0, 1, 1, 1])  # new voxel -> old voxel
    back[0, 3] = len(array) - 1
    return nib.Nifti1Image(array[::-1], affine @ back)


def turned(array, affine):
    """A quarter turn about the slices' axis: new (i, j) is old (j, n - 1 - i)."""
    back = np.array([[0.0, 1, 0, 0], [-1, 0, 0, array.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    return nib.Nifti1Image(np.rot90(array, axes=(0, 1)), affine @ back)


def oblique(array, affine):
    """The patient lies askew: 20 degrees about two axes, which stay the nearest to those of the scanner."""
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    tilt = np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])
    roll = np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]])
    return nib.Nifti1Image(array, roll @ tilt @ affine)


def both(array, affine):
    image = oblique(array, affine)
    return reoriented("PIR")(array, image.affine)


# name -> how a volume given in RAS is stored
SAME = {
    "RAS": reoriented("RAS"), "LPS": reoriented("LPS"), "PIR": reoriented("PIR"), "SAL": reoriented("SAL"),
    "flipped": flipped, "turned": turned, "oblique": oblique, "obliquePIR": both,
}  # fmt: skip
HAND = {"flipped": lambda a: a[::-1], "turned": lambda a: np.rot90(a, -1, axes=(0, 1)), "oblique": lambda a: a}


def back_to_ras(case: str, image: nib.Nifti1Image) -> np.ndarray:
    """The array as it was before it was stored; by hand where that is easy, so that nibabel is audited, too."""
    if case in HAND:
        return HAND[case](np.asarray(image.dataobj))
    return np.asarray(nib.as_closest_canonical(image).dataobj)


def head(shape=SHAPE, lesion=LESION, seed=5) -> tuple[np.ndarray, np.ndarray]:
    """Four scans of smooth tissue without any symmetry, and a lesion that is brighter in each."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, dtype=np.uint8)
    label[lesion] = 1
    scans = [ndimage.gaussian_filter(rng.normal(size=shape), 2) * 200 + 100 * label + 50 for _ in SCANS]
    return np.stack(scans).astype(np.float32), label


def write(folder: Path, case: str, scans: np.ndarray, label: np.ndarray, affine, store: Callable) -> dict:
    (folder / "cases" / case).mkdir(parents=True)
    files = [f"cases/{case}/{case}-{scan}.nii.gz" for scan in SCANS]
    for array, name in zip((*scans, label), (*files, f"{case}-label.nii.gz"), strict=True):
        nib.save(store(array, affine), folder / name)
    return {"case": case, "patient": case, "image": files, "label": f"{case}-label.nii.gz"}


def write_datalist(folder: Path, items: list[dict], section: str = "testing", **header) -> None:
    sections = {name: items if name == section else [] for name in ("training", "validation", "testing")}
    (folder / "datalist.json").write_text(json.dumps({"name": "audit", **header, **sections}), encoding="utf-8")


def table(path: Path) -> dict[str, dict]:
    with open(path, newline="", encoding="utf-8") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return lambda task, strategy: build_bundle(task, strategy, folder) / "configs"


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> SimpleNamespace:
    """One head, stored in every way of ``SAME``, and once more with thick slices."""
    folder = tmp_path_factory.mktemp("heads")
    scans, label = head()
    affine = affine_of(SPACING_MM)
    items = [write(folder, case, scans, label, affine, store) for case, store in SAME.items()]
    thick = affine_of((*SPACING_MM[:2], SPACING_MM[2] * COARSE))
    thick[2, 3] += SPACING_MM[2]
    items.append(write(folder, "thick", scans[..., 1::COARSE], label[..., 1::COARSE], thick, SAME["RAS"]))
    write_datalist(folder, items)
    return SimpleNamespace(folder=folder, items=items, label=label, scans=scans)


@pytest.fixture(scope="module")
def evaluated(configs, heads, tmp_path_factory) -> SimpleNamespace:
    """Boxes around the lesion, given to pico."""
    output = tmp_path_factory.mktemp("evaluated")
    overrides = {"dataset_dir": str(heads.folder), "output_dir": str(output), "save_predictions": True, **PICO}
    run_workflow([configs("meningioma", "zero_shot") / "evaluate.json"], overrides)
    folder = output / "evaluation"
    rows = {name: table(folder / f"{name}cases.csv") for name in ("", "ellipse_")}
    return SimpleNamespace(predictions=folder / "predictions", rows=rows[""], ellipse=rows["ellipse_"])


def assert_on_grid(found: nib.Nifti1Image, image: nib.Nifti1Image) -> None:
    assert found.shape == image.shape
    np.testing.assert_allclose(found.affine, image.affine, rtol=0, atol=1e-4)
    assert found.header.get_zooms() == pytest.approx(image.header.get_zooms(), abs=1e-5)


@pytest.mark.parametrize("case", SAME)
def test_prediction_of_a_prompted_bundle_follows_the_image(case, evaluated, heads):
    image = nib.load(heads.folder / "cases" / case / f"{case}-t1c.nii.gz")
    for kind in ("seg", "prompt"):
        found = nib.load(evaluated.predictions / f"{case}_{kind}.nii.gz")
        assert_on_grid(found, image)
        plain = back_to_ras("RAS", nib.load(evaluated.predictions / f"RAS_{kind}.nii.gz"))
        assert 0.02 < plain.mean() < 0.5
        np.testing.assert_array_equal(back_to_ras(case, found), plain)


@pytest.mark.parametrize("case", [case for case in SAME if case != "RAS"])
def test_scores_in_mm_do_not_know_the_orientation(case, evaluated):
    columns = ("dice", "hd95_mm", "hd95_medpy_mm", "nsd_1mm", "nsd_2mm", "prediction_ml", "reference_ml")
    for rows in (evaluated.rows, evaluated.ellipse):
        expected = {column: float(rows["RAS"][column]) for column in columns}
        assert {column: float(rows[case][column]) for column in columns} == pytest.approx(expected, abs=1e-6)
    assert 0.3 < float(evaluated.rows["RAS"]["dice"]) < 1 and float(evaluated.rows["RAS"]["hd95_mm"]) > 0
    assert float(evaluated.rows["RAS"]["reference_ml"]) == pytest.approx(9 * 7 * 6 * math.prod(SPACING_MM) / 1000)


def test_thick_slices_are_predicted_like_the_thin_ones_between_which_they_lie(evaluated, heads):
    found = nib.load(evaluated.predictions / "thick_seg.nii.gz")
    assert_on_grid(found, nib.load(heads.folder / "cases" / "thick" / "thick-t1c.nii.gz"))
    thick = np.asarray(found.dataobj) > 0
    thin = np.asarray(nib.load(evaluated.predictions / "RAS_seg.nii.gz").dataobj)[..., 1::COARSE] > 0
    assert 2 * (thick & thin).sum() / (thick.sum() + thin.sum()) > 0.95


SEEN = (slice(10, 20), slice(12, 18), slice(9, 18))


@pytest.mark.parametrize("store", ["RAS", "PIR"])
def test_distances_scale_with_the_spacing_as_counted_by_hand(store, configs, tmp_path):
    """Of 1 mm voxels every third slice stays. The image shows a cuboid of 10 x 6 x 9 mm 3 mm above where the label has
    it, or 2 mm to the side: more than 5 % of the surface is that far away, in fine and in thick slices alike. Where the
    label has no slice there is no box, so of the first one 6 mm are predicted."""
    items, truth = [], {}
    for name, (x, z) in {"above": (0, 3), "beside": (2, 0)}.items():
        label = np.zeros((30, 30, 27), dtype=np.uint8)
        seen = np.zeros_like(label)
        label[SEEN] = 1
        seen[SEEN[0].start + x : SEEN[0].stop + x, SEEN[1], SEEN[2].start + z : SEEN[2].stop + z] = 1
        scans = np.stack([50 + 250.0 * seen] * 4).astype(np.float32)
        for step in (1, COARSE):
            case = f"{name}{step}"
            arrays = [array[..., step // 2 :: step] for array in (scans, label, seen)]
            items.append(write(tmp_path, case, *arrays[:2], affine_of((1, 1, step)), SAME[store]))
            predicted = (arrays[2] > 0) & (arrays[1] > 0).any(axis=(0, 1))
            truth[case] = compute_surface_distances(arrays[1] > 0, predicted, (1, 1, step))
    write_datalist(tmp_path, items)
    overrides = {
        "dataset_dir": str(tmp_path), "output_dir": str(tmp_path), "loaded": "$None", "crop_size": [30, 30],
        "network_def": {"_target_": "tests.helpers.audit_networks.Known", "threshold": 1.0}, "image_size": 30,
    }  # fmt: skip
    run_workflow([configs("meningioma", "zero_shot") / "evaluate.json"], overrides)
    rows = table(tmp_path / "evaluation" / "cases.csv")
    for case, distances in truth.items():
        assert float(rows[case]["dice"]) == pytest.approx(0.8)
        assert float(rows[case]["hd95_mm"]) == pytest.approx(3.0 if "above" in case else 2.0, abs=1e-6)
        assert float(rows[case]["reference_ml"]) == pytest.approx(0.54)
        for tolerance in (1, 2):
            oracle = compute_surface_dice_at_tolerance(distances, tolerance)
            assert float(rows[case][f"nsd_{tolerance}mm"]) == pytest.approx(oracle, abs=1e-6)


def box_of(where, image: nib.Nifti1Image) -> dict:
    """A cuboid of RAS voxels as a person who looks at ``image`` would give it, in that file's voxels."""
    corners = np.array([[s.start for s in where], [s.stop - 1 for s in where]], dtype=float)
    there = nib.affines.apply_affine(np.linalg.inv(image.affine) @ affine_of(SPACING_MM), corners)
    low, high = (np.rint(edge).astype(int).tolist() for edge in (there.min(0), there.max(0)))
    return {"slices": [low[2], high[2]], "box": [low[0], low[1], high[0], high[1]]}


def other_files(folder: Path, heads: SimpleNamespace) -> None:
    """The head as an oblique MHA, whose format counts to the left and back, and as four channels of one file."""
    write(folder, "mha", heads.scans, heads.label, affine_of(SPACING_MM), both)
    for path in list((folder / "cases" / "mha").iterdir()):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ".mha"))
        path.unlink()
    (folder / "cases" / "channels").mkdir()
    image = SAME["LPS"](np.moveaxis(heads.scans, 0, -1), affine_of(SPACING_MM))
    nib.save(image, folder / "cases" / "channels" / "channels.nii.gz")


def test_boxes_in_the_voxels_of_any_file_mean_the_same_place(configs, heads, tmp_path):
    where = (slice(7, 18), slice(10, 20), slice(4, 8))
    straight = [case for case in SAME if "oblique" not in case]
    images = {case: nib.load(heads.folder / "cases" / case / f"{case}-t1n.nii.gz") for case in straight}
    other_files(tmp_path, heads)
    given = {case: [box_of(where, image)] for case, image in images.items()}
    given |= {"mha": given["PIR"], "channels": given["LPS"]}
    images |= {"mha": both(heads.label, affine_of(SPACING_MM)), "channels": images["LPS"]}
    assert given["PIR"] != given["RAS"] and given["RAS"] == [{"slices": [4, 7], "box": [7, 10, 17, 19]}]
    (tmp_path / "boxes.json").write_text(json.dumps(given), encoding="utf-8")
    folders = [*(heads.folder / "cases" / case for case in straight), *(tmp_path / "cases").iterdir()]
    overrides = {
        "dataset_dir": [str(folder) for folder in folders], "prompt::source": "json", "output_dir": str(tmp_path),
        "boxes": str(tmp_path / "boxes.json"), **PICO,
    }  # fmt: skip
    run_workflow([configs("meningioma", "zero_shot") / "inference.json"], overrides)
    found = {c: nib.load(tmp_path / "predictions" / f"{c}_seg.nii.gz") for c in given}
    plain = back_to_ras("RAS", found["RAS"])
    assert plain[..., 4:8].any(axis=(0, 1)).all() and not plain[..., :4].any() and not plain[..., 8:].any()
    for case, prediction in found.items():
        assert_on_grid(prediction, images[case])
        np.testing.assert_array_equal(back_to_ras(case, prediction), plain, err_msg=case)


@pytest.mark.parametrize(
    ("task", "network"),
    [
        (
            "abdomen",
            {"network_def": {"_target_": "tests.helpers.audit_networks.Mixed", "num_classes": 8}, "loaded": "$None"},
        ),
        (
            "hippocampus",
            {
                "sam_variant": "tiny",
                "sam_checkpoint": "random",
                "strategy::side_weights": "random",
                "loaded": "$@network_def.load_base('random')",
            },
        ),
    ],
)
def test_prediction_of_several_classes_follows_the_image(task, network, configs, heads, tmp_path):
    (tmp_path / "in").mkdir()
    for case in SAME:
        source = heads.folder / "cases" / case / f"{case}-t1c.nii.gz"
        (tmp_path / "in" / f"{case}.nii.gz").write_bytes(source.read_bytes())
    overrides = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path), "image_size": 32, **network}
    overrides["allow_modality"] = True  # heads in a bundle for CT
    run_workflow([configs(task, "ladder") / "inference.json"], overrides)
    plain = back_to_ras("RAS", nib.load(tmp_path / "predictions" / "RAS_seg.nii.gz"))
    assert len(np.unique(plain)) > 1
    for axis in range(3):
        assert (plain != np.flip(plain, axis)).mean() > 0.02, "a mirrored prediction must not pass"
    for case in SAME:
        found = nib.load(tmp_path / "predictions" / f"{case}_seg.nii.gz")
        assert_on_grid(found, nib.load(tmp_path / "in" / f"{case}.nii.gz"))
        np.testing.assert_array_equal(back_to_ras(case, found), plain, err_msg=case)


def test_training_sees_the_same_slices_whatever_the_orientation(configs, heads, tmp_path):
    write_datalist(tmp_path, heads.items[: len(SAME)], section="training")
    parser = ConfigParser(ConfigParser.load_config_file(configs("meningioma", "lora") / "train.json"))
    datalist = str(tmp_path / "datalist.json")
    parser.update({"dataset_dir": str(heads.folder), "datalist": datalist, "output_dir": str(tmp_path), **PICO})
    dataset = parser.get_parsed_content("train::dataset")
    items = {item["case"]: item for item in (dataset[i] for i in range(len(dataset)))}
    assert list(items) == list(SAME) and items["RAS"]["label"].any()
    for case, item in items.items():
        assert item["slice"] == items["RAS"]["slice"]
        for key in ("image", "label", "boxes"):
            np.testing.assert_array_equal(item[key].numpy(), items["RAS"][key].numpy(), err_msg=f"{case}, {key}")


def test_a_label_on_another_grid_than_its_image_is_refused_by_name(configs, tmp_path):
    """Shapes agree, so without a look at the affines the two would be compared voxel by voxel, shifted."""
    scans, label = head()
    item = write(tmp_path, "askew", scans, label, affine_of(SPACING_MM), SAME["RAS"])
    affine = affine_of(SPACING_MM)
    affine[1, 3] += 2.2
    nib.save(nib.Nifti1Image(label, affine), tmp_path / item["label"])
    for section, config in (("testing", "evaluate"), ("training", "train")):
        write_datalist(tmp_path, [item], section=section)
        overrides = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), **PICO}
        with pytest.raises(DataError, match=r"(?s)askew.*not on the grid of image.*label: its affine differs"):
            strategy = "zero_shot" if config == "evaluate" else "lora"
            run_workflow([configs("meningioma", strategy) / f"{config}.json"], overrides)


def test_a_label_whose_axes_are_stored_otherwise_scores_and_trains_as_one_that_is_stored_alike(
    configs, heads, evaluated, tmp_path
):
    """As a mask that was drawn on DICOM and saved as NIfTI: the same voxels in the patient."""
    scans, label = head()
    items = []
    for case in ("LPS", "PIR", "obliquePIR", "flipped"):
        items.append(
            write(tmp_path, case, scans, label, affine_of(SPACING_MM), SAME["oblique" if "ob" in case else "RAS"])
        )
        nib.save(SAME[case](label, affine_of(SPACING_MM)), tmp_path / items[-1]["label"])
    write_datalist(tmp_path, items)
    overrides = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out"), **PICO}
    run_workflow([configs("meningioma", "zero_shot") / "evaluate.json"], overrides)
    wanted = evaluated.rows
    for case, row in table(tmp_path / "out" / "evaluation" / "cases.csv").items():
        assert {**row, "case": ""} == {**wanted["oblique" if case == "obliquePIR" else "RAS"], "case": ""}, case
    write_datalist(tmp_path, items, section="training")
    parser = ConfigParser(ConfigParser.load_config_file(configs("meningioma", "lora") / "train.json"))
    parser.update({"dataset_dir": str(tmp_path), "datalist": str(tmp_path / "datalist.json"), **PICO})
    parser.update({"output_dir": str(tmp_path)})
    dataset = parser.get_parsed_content("train::dataset")
    found = [dataset[i] for i in range(len(dataset))]
    for item in found:
        for key in ("image", "label", "boxes"):
            np.testing.assert_array_equal(item[key].numpy(), found[0][key].numpy(), err_msg=f"{item['case']}, {key}")

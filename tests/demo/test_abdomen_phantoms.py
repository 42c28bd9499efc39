"""Abdominal phantoms have the layout of BTCV, plausible organs, and kidneys that only their side tells apart."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from samseg_monai.data.datalists.label_maps import BTCV as LABELS
from samseg_monai.data.datalists.label_maps import BTCV_TESTING as TESTING
from samseg_monai.data.datalists.label_maps import BTCV_TRAINING as TRAINING
from samseg_monai.data.files.volumes import is_phantom
from samseg_monai.demo.abdomen_anatomy import Canvas, Frame, kidney
from samseg_monai.demo.abdomen_phantoms import case_order, default_spacing_mm, make_case, write_btcv_cases
from samseg_monai.demo.drawing import Grid
from samseg_monai.errors import DataError

SMALL = (48, 40, 20)
CODES = {name: code for code, name in LABELS.items()}
RANGES_ML = {
    "spleen": (100, 350),
    "right kidney": (110, 250),
    "left kidney": (110, 250),
    "gallbladder": (15, 70),
    "liver": (1000, 2200),
    "stomach": (100, 500),
    "aorta": (35, 110),
    "pancreas": (40, 140),
    "oesophagus": (8, 25),
    "inferior vena cava": (30, 100),
    "portal and splenic vein": (12, 40),
    "right adrenal": (2.5, 7),
    "left adrenal": (2.5, 7),
}


@pytest.fixture(scope="module")
def cases():
    return [make_case([0, number], SMALL) for number in range(24)]


def voxel_ml(case):
    return abs(np.linalg.det(case["affine"])) / 1000


def world_mm(case, name):
    """RAS coordinates of an organ's voxels, as nibabel defines them: (N, 3)."""
    return nib.affines.apply_affine(case["affine"], np.argwhere(case["label"] == CODES[name]))


def test_same_seed_same_bytes_and_another_seed_another_case():
    first, again, other = make_case([3, 1], SMALL), make_case([3, 1], SMALL), make_case([3, 2], SMALL)
    for name in ("img", "label"):
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_every_organ_is_there_with_the_volume_of_an_adult(cases):
    assert set(RANGES_ML) == set(CODES)
    for case in cases:
        assert set(np.unique(case["label"])) == {0, *LABELS}
        for name, (low, high) in RANGES_ML.items():
            assert low < (case["label"] == CODES[name]).sum() * voxel_ml(case) < high, name


def test_the_eight_organs_lie_in_one_piece_each(cases):
    for case in cases:
        for name in list(RANGES_ML)[:8]:
            pieces, _ = ndimage.label(case["label"] == CODES[name], structure=np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.max() >= 0.85 * sizes.sum(), name


def test_organs_lie_on_their_side_in_world_coordinates(cases):
    for case in cases:
        centre = {name: world_mm(case, name).mean(axis=0) for name in CODES}
        for name in ("liver", "gallbladder", "right kidney", "right adrenal", "inferior vena cava"):
            assert centre[name][0] > 0, name  # RAS: right is positive
        for name in ("spleen", "stomach", "left kidney", "left adrenal", "aorta"):
            assert centre[name][0] < 0, name
        assert centre["gallbladder"][1] > centre["right kidney"][1]
        assert centre["liver"][2] > centre["right kidney"][2]


def test_a_right_and_a_left_kidney_of_one_draw_are_mirror_images():
    grid = Grid((64, 48, 40), (4.0, 4.5, 5.0))
    frame = Frame.draw(np.random.default_rng(1))
    grown = {}
    for side in (1, -1):
        canvas = Canvas(grid, np.ones(grid.shape, dtype=bool))
        canvas.grow(7, kidney(frame, np.random.default_rng(2)), 160.0, side=side)
        grown[side] = canvas.tissue
    assert (grown[1] == 7).sum() == round(160 / 0.09)
    assert (grown[1][:32] == 7).sum() == (grown[1] == 7).sum()  # the first axis begins on the right
    assert np.array_equal(grown[-1], grown[1][::-1])


def test_nothing_measured_on_a_kidney_tells_its_side(cases):
    """Paired differences, right minus left, of intensity, volume, mirrored position and extent: no |t| beyond 3.5."""
    differences = []
    for case in cases:
        sides = []
        for name in ("right kidney", "left kidney"):
            values, places = case["img"][case["label"] == CODES[name]], world_mm(case, name)
            place = places.mean(axis=0) * (1 if name.startswith("right") else -1, 1, 1)
            sides.append([values.mean(), values.std(), values.size, *place, *np.ptp(places, axis=0)])
        differences.append(np.subtract(*sides))
    differences = np.array(differences)
    t = differences.mean(axis=0) / (differences.std(axis=0, ddof=1) / np.sqrt(len(cases)))
    assert np.abs(t).max() < 3.5, t
    assert abs(differences[:, 0].mean()) < 4  # HU


def test_fat_parts_both_kidneys_from_every_other_organ(cases):
    for case in cases:
        for name in ("right kidney", "left kidney"):
            own = case["label"] == CODES[name]
            shell = ndimage.binary_dilation(own, structure=np.ones((3, 3, 3))) & ~own
            assert not case["label"][shell].any()


def test_organs_have_the_intensities_of_the_portal_venous_phase(cases):
    """Typical HU, averaged over voxels away from the surface; single cases vary around them."""
    typical = {"liver": 110, "spleen": 120, "right kidney": 180, "left kidney": 180, "aorta": 170, "pancreas": 100}
    found = {name: [] for name in typical}
    for number in range(6):
        case = make_case([1, number], (96, 80, 40))
        assert case["img"].dtype == np.int16
        assert case["label"].dtype == np.uint8
        assert abs(case["img"][0, 0].mean() + 1000) < 15  # air
        assert np.abs(case["img"][0]).std() > 10  # noise
        for name in typical:
            inner = ndimage.binary_erosion(case["label"] == CODES[name])
            found[name].append(case["img"][inner].mean())
    for name, expected in typical.items():
        assert abs(np.mean(found[name]) - expected) < 15, name


def test_no_window_of_intensities_finds_an_organ_even_when_chosen_by_the_truth(cases):
    for name, code in CODES.items():
        best = []
        for case in cases[:8]:
            every, own = (
                np.bincount(np.clip(values, -200, 400).ravel() + 200, minlength=601).cumsum()[::6]
                for values in (case["img"], case["img"][case["label"] == code])
            )
            taken, hit = every[None] - every[:, None], own[None] - own[:, None]
            best.append(np.max(2 * hit / (np.maximum(taken, 0) + own[-1])))
        assert np.mean(best) < 0.75, name


def test_another_grid_samples_the_same_anatomy():
    """Centres of the eight organs move by less than a coarse voxel; those of another case move further."""
    coarse, fine, other = make_case([0, 3], SMALL), make_case([0, 3], (80, 72, 36)), make_case([0, 4], SMALL)
    centres = [
        np.array([world_mm(c, name).mean(axis=0) for name in list(RANGES_ML)[:8]]) for c in (coarse, fine, other)
    ]
    assert np.abs(centres[0] - centres[1]).max() < 7.5
    assert np.abs(centres[2] - centres[1]).max() > 15


def test_default_spacing_holds_an_abdomen_with_square_pixels():
    assert default_spacing_mm((96, 80, 40)) == (3.75, 3.75, 5.0)
    x, y, z = default_spacing_mm((512, 512, 100))
    assert x == y
    assert (x * 512, z * 100) == pytest.approx((360, 200), abs=0.1)


def test_the_published_split_is_interleaved():
    assert (len(TRAINING), len(TESTING)) == (18, 12)
    order = case_order()
    assert sorted(order) == sorted(TRAINING + TESTING)
    assert len(set(order)) == 30
    for count in range(1, 31):
        training = sum(case in TRAINING for case in order[:count])
        assert abs(training - 0.6 * count) < 1


def test_files_have_the_layout_and_geometry_of_btcv(tmp_path):
    ids = write_btcv_cases(tmp_path, 3, shape=SMALL, seed=4, unlabelled=2)
    assert ids == case_order()[:3]
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.nii.gz")}
    assert names == {
        *(f"img/img{i}.nii.gz" for i in ids),
        *(f"label/label{i}.nii.gz" for i in ids),
        "unlabelled/img0041.nii.gz",
        "unlabelled/img0042.nii.gz",
    }
    assert all(is_phantom(tmp_path / name) for name in names)
    expected = make_case([4, int(ids[1])], SMALL)
    for key, dtype in (("img", np.int16), ("label", np.uint8)):
        image = nib.load(tmp_path / key / f"{key}{ids[1]}.nii.gz")
        assert image.get_data_dtype() == dtype
        assert np.array_equal(np.asanyarray(image.dataobj), expected[key])
        assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
        np.testing.assert_allclose(image.affine, expected["affine"], atol=1e-4)  # stored as float32
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1


def test_a_case_depends_on_seed_and_id_alone(tmp_path):
    few, more = write_btcv_cases(tmp_path / "a", 1, shape=SMALL), write_btcv_cases(tmp_path / "b", 2, shape=SMALL)
    assert more[:1] == few
    first, second = (nib.load(tmp_path / f / "img" / f"img{few[0]}.nii.gz").dataobj for f in "ab")
    assert np.array_equal(first, second)


def test_impossible_requests_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="at least 40 x 32 x 16, got"):
        make_case(0, (39, 40, 20))
    with pytest.raises(DataError, match="at least 40 x 32 x 16, got"):
        make_case(0, (96, 80))
    with pytest.raises(DataError, match=r"3 problems[\s\S]*got 31[\s\S]*got -1[\s\S]*seed"):
        write_btcv_cases(tmp_path, 31, unlabelled=-1, seed=-2)
    with pytest.raises(DataError, match="at least 40"):
        write_btcv_cases(tmp_path / "new", 1, shape=(8, 8, 8))
    assert not list(tmp_path.iterdir())

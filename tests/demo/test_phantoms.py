"""Phantoms look enough like BraTS to exercise every step, and are hard enough that learning pays."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from samseg_monai.data import BRATS_SCANS as SCANS
from samseg_monai.demo.brain_phantoms import brats_affine, default_spacing_mm, make_case, write_brats_cases
from samseg_monai.errors import DataError


@pytest.fixture(scope="module")
def cases():
    return [make_case([0, number]) for number in range(16)]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def box_ellipse(mask, *, loosen, rng):
    """Independent of the package: per slice the ellipse in the box, each side moved outward by up to ``loosen``."""
    filled = np.zeros(mask.shape, dtype=bool)
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    for k in np.flatnonzero(mask.any(axis=(0, 1))):
        i, j = np.nonzero(mask[..., k])
        low, high = np.array([i.min(), j.min()], float), np.array([i.max() + 1, j.max() + 1], float)
        size = high - low
        low, high = low - np.round(rng.uniform(0, loosen, 2) * size), high + np.round(rng.uniform(0, loosen, 2) * size)
        low, high = np.maximum(low, 0), np.minimum(high, mask.shape[:2])
        centre, half = (low + high) / 2, (high - low) / 2
        filled[..., k] = ((rows - centre[0]) / half[0]) ** 2 + ((columns - centre[1]) / half[1]) ** 2 <= 1
    return filled


def test_same_seed_same_bytes_and_another_seed_another_case():
    first, again, other = make_case([3, 1]), make_case([3, 1]), make_case([3, 2])
    for name in (*SCANS, "seg"):
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


def test_scans_are_skull_stripped_int16_on_one_brain(cases):
    for case in cases:
        brain = case["t1n"] > 0
        assert 0.25 < brain.mean() < 0.5
        for scan in SCANS:
            assert case[scan].dtype == np.int16
            assert case[scan].min() == 0
            assert np.array_equal(case[scan] > 0, brain)
        assert not brain[[0, -1]].any()
        assert not brain[:, [0, -1]].any()


def test_every_tumour_lies_in_the_brain_in_one_piece_with_three_labels(cases):
    for case in cases:
        tumour = case["seg"] > 0
        assert set(np.unique(case["seg"])) == {0, 1, 2, 3}
        assert not (tumour & (case["t1n"] == 0)).any()
        assert ndimage.label(tumour, structure=np.ones((3, 3, 3)))[1] == 1


def test_demo_tumours_fill_several_slices(cases):
    slices = [(case["seg"] > 0).sum(axis=(0, 1)) for case in cases]
    assert min((areas >= 30).sum() for areas in slices) >= 3


def test_most_tumours_touch_the_surface_of_the_brain(cases):
    touching = [(ndimage.binary_dilation(case["seg"] > 0) & (case["t1n"] == 0)).any() for case in cases]
    assert np.mean(touching) >= 0.7


def test_a_loose_box_gives_away_about_0_63_dice(cases):
    rng = np.random.default_rng(0)
    scores = [dice(box_ellipse(case["seg"] > 0, loosen=0.3, rng=rng), case["seg"] > 0) for case in cases]
    assert 0.58 < np.mean(scores) < 0.68


def test_no_threshold_finds_the_tumour_even_when_chosen_by_the_truth(cases):
    for scan in SCANS:
        best = []
        for case in cases:
            tumour, values = case["seg"] > 0, case[scan]
            levels = np.quantile(values[values > 0], np.linspace(0.5, 0.99, 30))
            best.append(max(dice(values > level, tumour) for level in levels))
        assert np.mean(best) < 0.6


def test_tumour_parts_stand_out_where_they_should(cases):
    """Rim against white and grey matter on t1c, oedema on t2f: visible on average, though single cases overlap."""
    for scan, label in (("t1c", 3), ("t2f", 2)):
        gaps = []
        for case in cases:
            values, seg = case[scan].astype(float), case["seg"]
            near = ndimage.binary_dilation(seg > 0, iterations=4) & (seg == 0) & (values > 0)
            gaps.append((values[seg == label].mean() - values[near].mean()) / values[near].std())
        assert np.mean(gaps) > 1


def test_real_size_has_the_official_grid():
    assert default_spacing_mm((240, 240, 155)) == (1.0, 1.0, 1.0)
    affine = brats_affine((240, 240, 155), (1, 1, 1))
    assert np.array_equal(affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    case = make_case(5, (240, 240, 155))
    brain = np.argwhere(case["t1n"] > 0)
    extent = brain.max(axis=0) - brain.min(axis=0) + 1
    assert np.all(extent >= (115, 140, 100))
    assert np.all(extent <= (160, 180, 145))
    assert case["seg"].shape == (240, 240, 155)


def test_files_have_the_layout_and_geometry_of_brats(tmp_path):
    ids = write_brats_cases(tmp_path, 2, shape=(32, 36, 12), seed=4, unlabelled=1)
    assert ids == ["BraTS-MEN-00000-000", "BraTS-MEN-00001-000"]
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.nii.gz"))
    assert len(names) == 2 * 5 + 4
    assert "unlabelled/BraTS-MEN-00002-000/BraTS-MEN-00002-000-t2f.nii.gz" in names
    image = nib.load(tmp_path / ids[1] / f"{ids[1]}-t1c.nii.gz")
    expected = make_case([4, 1], (32, 36, 12))
    assert np.array_equal(np.asanyarray(image.dataobj), expected["t1c"])
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_allclose(image.affine, expected["affine"], atol=1e-5)  # stored as float32
    assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1


def test_impossible_sizes_are_refused():
    with pytest.raises(DataError, match="at least 16 x 16 x 8, got"):
        make_case(0, (8, 64, 24))
    with pytest.raises(DataError, match="not be negative"):
        write_brats_cases(".", -1)

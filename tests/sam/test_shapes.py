"""Drawn shapes: the same seed draws the same image, masks are what is visible, boxes are tight."""

import numpy as np
import pytest

from samseg_monai.errors import ConfigError
from tools.pico.shapes import (
    KINDS,
    draw_field,
    draw_sample,
    jittered,
    pooling_matrix,
    smooth_noise,
    spline_matrix,
    tight_box,
)


@pytest.fixture(scope="module")
def samples():
    return [draw_sample(5, index, jitter=0.0) for index in range(60)]


def grid(size=161):
    y, x = np.mgrid[:size, :size].astype(np.float32) - size // 2
    return x, y


def test_same_seed_and_index_draw_the_same_sample():
    first, again = draw_sample(3, 7), draw_sample(3, 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    np.testing.assert_array_equal(first.boxes, again.boxes)


@pytest.mark.parametrize("seed, index", [(3, 8), (4, 7)])
def test_another_seed_or_index_draws_another_image(seed, index):
    assert np.abs(draw_sample(3, 7).image - draw_sample(seed, index).image).mean() > 0.1


@pytest.mark.parametrize("size, objects", [(256, 3), (64, 1), (128, 5)])
def test_shapes_and_types_are_as_documented(size, objects):
    sample = draw_sample(0, 0, size=size, objects=objects)
    assert sample.image.shape == (3, size, size) and sample.image.dtype == np.float32
    assert sample.masks.shape == (objects, size, size) and sample.masks.dtype == bool
    assert sample.boxes.shape == (objects, 4) and sample.boxes.dtype == np.float32


def test_boxes_without_jitter_are_tight(samples):
    for sample in samples:
        for mask, box in zip(sample.masks, sample.boxes, strict=True):
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_jitter_moves_each_side_by_at_most_its_share_and_stays_inside(samples):
    rng = np.random.default_rng(0)
    moved = 0
    for sample in samples:
        for box in sample.boxes:
            shaken = jittered(box, 0.05, 256, rng)
            sides = np.tile(box[2:] - box[:2], 2)
            assert (np.abs(shaken - box) <= 0.05 * sides + 1e-3).all()
            assert shaken.min() >= 0 and shaken.max() <= 256
            moved += int((shaken != box).sum())
    assert moved > 600  # of 720 sides; those on the border of the image may be clipped back


def test_different_objects_never_share_a_pixel(samples):
    pairs = 0
    for sample in samples:
        for i, j in ((0, 1), (0, 2), (1, 2)):
            if not np.array_equal(sample.masks[i], sample.masks[j]):
                assert not (sample.masks[i] & sample.masks[j]).any()
                pairs += 1
    assert pairs > 120


def test_objects_come_in_all_sizes_that_a_box_can_ask_for(samples):
    sides = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2]).max(1) for s in samples])
    assert sides.min() >= 8 and np.quantile(sides, 0.1) < 30 and np.quantile(sides, 0.9) > 90


def test_images_are_z_scored_on_the_whole(samples):
    images = np.stack([s.image for s in samples])
    assert np.isfinite(images).all()
    assert abs(images.mean()) < 0.25 and 0.8 < images.std() < 1.3


def test_most_images_are_grey_and_some_are_coloured(samples):
    coloured = sum(np.ptp(s.image, axis=0).max() > 0 for s in samples)
    assert 1 <= coloured <= 15


def test_objects_differ_from_what_lies_around_them(samples):
    def contrast(image, mask):
        x0, y0, x1, y1 = tight_box(mask).astype(int)
        window = np.zeros_like(mask)
        window[max(y0 - 4, 0) : y1 + 4, max(x0 - 4, 0) : x1 + 4] = True
        return abs(image[mask].mean() - image[window & ~mask].mean())

    contrasts = [contrast(s.image[0], mask) for s in samples for mask in s.masks]
    assert np.median(contrasts) > 0.5  # in standard deviations of the image
    assert np.quantile(contrasts, 0.1) < 0.4  # and some are hard


def test_there_are_seven_kinds_and_their_shares_add_up():
    assert len(KINDS) == 7
    assert sum(share for _, share in KINDS.values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_field_is_positive_inside_and_measures_pixels_near_the_outline(kind, seed):
    field = draw_field(kind, np.random.default_rng(seed), *grid(), 40.0)
    inside = field > 0
    assert field.dtype == np.float32
    assert 0.05 < inside.sum() / (np.pi * 40**2) < 1.7
    assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any()
    slope = np.hypot(*np.gradient(field))[np.abs(field) < 2]
    assert 0.5 < np.median(slope) < 1.9


def test_the_ellipse_has_the_area_of_an_ellipse():
    x, y = grid()
    field = draw_field("ellipse", np.random.default_rng(1), x, y, 50.0)
    minor = field.max()  # the field's peak is the short half axis
    assert (field > 0).sum() == pytest.approx(np.pi * 50 * minor, rel=0.02)


def test_a_bar_is_an_exact_distance():
    field = draw_field("bar", np.random.default_rng(2), *grid(), 40.0)
    outside = (field < -2) & (field > -20)
    assert np.hypot(*np.gradient(field))[outside] == pytest.approx(1, abs=0.02)


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(ConfigError, match=r"'star'.*ellipse, contour"):
        draw_field("star", np.random.default_rng(0), *grid(), 10.0)


@pytest.mark.parametrize("cells", [2, 9, 64])
def test_splines_are_a_partition_of_unity(cells):
    matrix = spline_matrix(256, cells)
    assert matrix.shape == (256, cells + 3) and matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(pooling_matrix(256, cells).sum(1), 1, atol=1e-5)


def test_smooth_noise_has_unit_deviation_and_the_asked_grain():
    rng, full = np.random.default_rng(0), slice(0, 256)
    coarse = np.stack([smooth_noise(rng, 256, 6, full, full) for _ in range(40)])
    fine = smooth_noise(rng, 256, 64, full, full)
    assert coarse.std() == pytest.approx(1, abs=0.15) and fine.std() == pytest.approx(1, abs=0.1)
    assert np.abs(np.diff(fine, axis=0)).mean() > 5 * np.abs(np.diff(coarse, axis=1)).mean()


def test_noise_in_a_window_has_the_windows_shape_and_the_same_grain():
    rng = np.random.default_rng(0)
    patches = [smooth_noise(rng, 256, 20, slice(31, 98), slice(200, 256)) for _ in range(30)]
    assert patches[0].shape == (67, 56)
    assert np.stack(patches).std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("arguments", [{"size": 32}, {"objects": 0}, {"jitter": 0.5}, {"jitter": -0.1}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="size >= 64"):
        draw_sample(0, 0, **arguments)

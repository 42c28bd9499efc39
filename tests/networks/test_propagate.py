"""A box on one slice, carried through the last mask: where it goes, where it stops, and what is told of it."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Resized
from torch import nn

from samseg_monai.bundles.build import compose, write_bundle
from samseg_monai.errors import ConfigError
from samseg_monai.inferers import SliceVolumeInferer
from samseg_monai.networks import SamSegmenter
from samseg_monai.report.runs import RunResult
from samseg_monai.settings import dump_settings, merged, read_settings
from samseg_monai.transforms import SimulatedPromptd
from samseg_monai.workflow import run_workflow
from tests.helpers.commands import samseg


class BrightInBox(nn.Module):
    """Finds what is bright within its boxes, and keeps these."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels, self.boxes = channels, []

    def forward(self, image, boxes):
        logits = torch.full((len(image), 1, *image.shape[-2:]), -5.0)
        for one, mask, rows in zip(image, logits, boxes if boxes.ndim == 3 else boxes[:, None], strict=True):
            for x0, y0, x1, y1 in rows[~rows.isnan().any(1)].round().int().tolist():
                mask[0, y0:y1, x0:x1] = torch.where(one[0, y0:y1, x0:x1] > 0.5, 5.0, mask[0, y0:y1, x0:x1])
        self.boxes += list(boxes)
        return logits if self.channels == 1 else torch.cat([-logits, logits - 9, logits], 1)


@pytest.fixture
def oblique():
    """A square that moves by a pixel and shrinks to its ends: slices 2 to 13 of 16."""
    image = torch.zeros(1, 1, 40, 40, 16)
    for z in range(2, 14):
        half = 6 - abs(z - 8)
        image[0, 0, 10 + z - half : 10 + z + half + 1, 20 - half : 21 + half, z] = 1
    return image


def prompt_at(image, *slices):
    prompt = torch.zeros_like(image, dtype=torch.uint8)
    for z in slices:
        rows, columns = (image[0, 0, ..., z] > 0).nonzero().unbind(1)
        prompt[0, 0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1, z] = 1
    return prompt


def told(caplog):
    return [record.getMessage() for record in caplog.records if "carried" in record.getMessage()]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_box_on_one_slice_finds_the_whole_object(oblique, channels, batch_size, caplog):
    found = SliceVolumeInferer([], batch_size=batch_size, propagate=20, carried_loosen=0.2, carried_stop=0)(
        oblique, BrightInBox(channels), prompt=prompt_at(oblique, 8)
    )
    mask = found[:, 0] > 0 if channels == 1 else found.argmax(1) > 0
    assert torch.equal(mask, oblique[:, 0] > 0)
    [line] = told(caplog)
    assert "slice 8 of the volume was carried to slice 2 of the volume (nothing was found)" not in line
    assert "carried to slice 1 of the volume (nothing was found) and slice 14 of the volume (nothing was found)" in line
    labels = SliceVolumeInferer([], propagate=20, carried_loosen=0.2, carried_stop=0, labels=True)
    if channels == 3:
        made = labels(oblique, BrightInBox(channels), prompt=prompt_at(oblique, 8))
        assert torch.equal(made[:, 0] > 0, mask)


def test_the_next_box_is_the_mask_s_loosened(oblique):
    network = BrightInBox()
    SliceVolumeInferer([], propagate=1, carried_loosen=0.0)(oblique, network, prompt=prompt_at(oblique, 8))
    assert [box.tolist() for box in network.boxes] == [[14, 12, 27, 25]] * 3
    network = BrightInBox()
    SliceVolumeInferer([], propagate=1, carried_loosen=0.2)(oblique, network, prompt=prompt_at(oblique, 8))
    assert network.boxes[1].tolist() == [14 - 3, 12 - 3, 27 + 3, 25 + 3]  # 13 pixels: 2.6, rounded


@pytest.mark.parametrize(
    ("given", "settings", "slices", "why"),
    [
        ((8,), {"propagate": 3}, range(5, 12), "3 slices, the most"),
        ((8,), {"propagate": 20, "carried_stop": 0.3}, range(5, 12), "little was found"),
        ((4, 12), {"propagate": 20, "carried_most": 99.0}, range(2, 14), "another prompt is nearer"),
        ((4,), {"propagate": 20}, range(2, 5), "a leak, 2.0 times the first"),
        ((8,), {"propagate": 0}, [8], ""),
    ],
)
def test_it_stops_where_it_was_told_to(oblique, given, settings, slices, why, caplog):
    inferer = SliceVolumeInferer([], carried_loosen=0.4, **{"carried_stop": 0.0, **settings})
    network = BrightInBox()
    found = inferer(oblique, network, prompt=prompt_at(oblique, *given))
    assert found.amax((0, 1, 2, 3)).gt(0).nonzero()[:, 0].tolist() == list(slices)
    assert all(why in line for line in told(caplog)) and len(told(caplog)) == bool(why)
    asked = len(network.boxes)
    assert asked <= 16  # no slice is asked for twice


def test_the_end_of_the_volume_is_an_end(caplog):
    image = torch.zeros(1, 1, 20, 20, 4)
    image[..., 5:10, 5:10, :] = 1
    found = SliceVolumeInferer([], propagate=9)(image, BrightInBox(), prompt=prompt_at(image, 1))
    assert torch.equal(found > 0, image > 0) and told(caplog)[0].count("the volume ends") == 2


def test_where_all_slices_are_given_nothing_is_told(oblique, caplog):
    every = prompt_at(oblique, *range(2, 14))
    every[0, 0, 15:25, 15:25, [0, 1, 14, 15]] = 1
    SliceVolumeInferer([], propagate=3, carried_stop=0)(oblique + 0.6, BrightInBox(), prompt=every)
    assert not told(caplog)


@pytest.mark.parametrize("several", [True, False])
def test_components_are_carried_each_in_a_box_of_its_own(several):
    image = torch.zeros(1, 1, 40, 40, 5)
    image[0, 0, 5:12, 5:12], image[0, 0, 25:32, 25:32], image[0, 0, 17:19, 17:19] = 1, 1, 1
    prompt = torch.zeros(1, 2, 40, 40, 5, dtype=torch.uint8)
    prompt[0, 0, 5:12, 5:12, 2] = prompt[0, 1, 25:32, 25:32, 2] = 1
    if several:  # in one channel, told apart as components
        prompt = prompt.amax(1, keepdim=True)
    network = BrightInBox()
    inferer = SliceVolumeInferer([], propagate=5, carried_loosen=0.1, per_component=several)
    found = inferer(image, network, prompt=prompt)[0, 0] > 0
    image[0, 0, 17:19, 17:19] = 0  # lies between the two boxes: one box around both would find it
    assert torch.equal(found, image[0, 0] > 0)


@pytest.mark.parametrize("variant", ["tiny", "tiny_t"])
@torch.no_grad()
def test_sam_is_asked_slice_by_slice_as_a_loop_by_hand_would(variant):
    torch.manual_seed(3)
    network = SamSegmenter(variant, image_size=64)
    network.load_base("random")
    image, prompt = torch.randn(1, 1, 32, 32, 5), torch.zeros(1, 1, 32, 32, 5)
    prompt[0, 0, 8:20, 6:22, 2] = 1
    resize = Compose(
        [Resized(["image", "prompt"], 64, size_mode="longest", mode=("bilinear", "nearest"), allow_missing_keys=True)]
    )
    how = {"batch_size": 1, "carried_loosen": 0.1, "carried_stop": 0.0}
    found = SliceVolumeInferer(resize, propagate=2, **how)(image, network, prompt=prompt)
    by_hand = prompt.clone()
    for step in (-1, 1):
        for z in (2, 2 + step):
            mask = SliceVolumeInferer(resize, batch_size=1)(image, network, prompt=by_hand)[0, 0, ..., z] > 0
            if not mask.any():
                break
            rows, columns = mask.nonzero().unbind(1)
            (y0, y1), (x0, x1) = ((int(v.min()), int(v.max()) + 1) for v in (rows, columns))
            y, x = (round(0.1 * side) for side in (y1 - y0, x1 - x0))
            by_hand[0, 0, max(0, y0 - y) : y1 + y, max(0, x0 - x) : x1 + x, z + step] = 1
    expected = SliceVolumeInferer(resize, batch_size=1)(image, network, prompt=by_hand)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_stops_are_told_in_slices_of_the_file(oblique, caplog):
    stored = np.diag([1.0, 1, 2, 1])  # the file's third axis is the network's, and runs the other way
    turned = np.diag([1.0, 1, -2, 1])
    turned[2, 3] = 2 * 15
    meta = {"original_affine": torch.tensor(stored)[None], "affine": torch.tensor(turned)[None]}
    inputs = MetaTensor(oblique, affine=torch.tensor(turned)[None], meta=meta)
    SliceVolumeInferer([], propagate=2)(inputs, BrightInBox(), prompt=prompt_at(oblique, 8))
    assert "the prompt of slice 7 was carried to slice 9 (2 slices, the most) and slice 5 (2" in told(caplog)[0]


def test_settings_that_cannot_be_are_refused(oblique):
    for wrong in ({"propagate": -1}, {"carried_loosen": -0.1}, {"carried_stop": 1.5}, {"carried_most": 0.5}):
        with pytest.raises(ConfigError, match="carried_stop"):
            SliceVolumeInferer([], **wrong)
    with pytest.raises(ConfigError, match="slices cannot be chosen"):
        SliceVolumeInferer([], propagate=1)(
            oblique, BrightInBox(), prompt=prompt_at(oblique, 8), slices=torch.ones(1, 16, dtype=torch.bool)
        )


def test_one_slice_of_a_label_is_prompted_where_it_is_largest(oblique):
    d = SimulatedPromptd("label", one_slice=True)({"label": oblique[0], "case": "a"})
    assert torch.equal(d["prompt"][0].bool().any(0).any(0).nonzero()[:, 0], torch.tensor([8]))
    assert not SimulatedPromptd("label", one_slice=True)({"label": 0 * oblique[0], "case": "a"})["prompt"].any()


def test_predict_and_evaluate_carry_boxes_and_say_so(phantoms, tmp_path, monkeypatch):
    small = {"run": {"sam_variant": "tiny", "image_size": 64, "crop_size": [32, 36]}}
    settings = read_settings(merged(dump_settings(compose("meningioma", "zero_shot")), small), "test")
    bundle = write_bundle(settings, tmp_path / settings.name)
    run = {
        "dataset_dir": str(phantoms),
        "output_dir": str(tmp_path / "run"),
        "sam_checkpoint": "random",
        "prompt::propagate": 3,
    }
    run_workflow([bundle / "configs" / "evaluate.json"], {**run, "save_predictions": True}, echo=False)
    result = RunResult.load(tmp_path / "run" / "evaluation")
    assert result.prompt_source == "GT box on the largest slice, carried up to 3 slices"
    assert result.boxes["propagate"] == 3 and result.boxes["carried_most"] == 1.5
    for path in (tmp_path / "run" / "evaluation" / "predictions").glob("*_prompt.nii.gz"):
        assert (np.asarray(nib.load(path).dataobj) > 0).any((0, 1)).sum() == 1

    case = next(iter(json.loads((phantoms / "datalist.json").read_text())["testing"]))["case"]
    (tmp_path / "boxes.json").write_text(json.dumps({case: [{"slice": 6, "box": [8, 8, 24, 24]}]}))
    words = [
        "predict",
        bundle,
        "--input",
        phantoms / case,
        "--output",
        tmp_path / "out",
        "--boxes",
        tmp_path / "boxes.json",
    ]
    assert samseg(monkeypatch, *words, "--propagate", "2", "--sam-checkpoint", "random", "--no-pictures") == 0
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["prompted_slices"] == "1" and "the prompt of slice 6 was carried to slice " in row["warnings"]

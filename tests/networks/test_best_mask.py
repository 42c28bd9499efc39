"""masks="best": of the masks behind SAM's single one, per box, the one that SAM itself rates highest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from samseg_monai.checkpoints import load_adapter, save_adapter
from samseg_monai.errors import ConfigError
from samseg_monai.export import obstacles
from samseg_monai.networks import EMPTY_LOGIT, SamSegmenter
from samseg_monai.networks.common import best_mask
from samseg_monai.sam.spec import get_spec
from samseg_monai.strategies import LoRA
from tests.helpers.reference_sam import reference_sam

SIZE = 64
BOXES = torch.tensor(
    [[4.0, 8.0, 40.0, 50.0], [20.5, 3.25, 61.0, 30.0], [1.0, 1.0, 12.0, 9.5], [30.0, 30.0, 60.0, 62.0]]
)


def pair(**options):
    """Ours and segment_anything's with the same weights, lively enough that boxes choose different masks."""
    torch.manual_seed(5)
    theirs = reference_sam(get_spec("tiny"), image_size=SIZE)
    for parameter in theirs.mask_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = SamSegmenter("tiny", image_size=SIZE, input_scale="sam", masks="best", **options)
    ours.sam.load_state_dict(theirs.state_dict(), strict=False)
    return ours, theirs


@torch.no_grad()
def test_it_chooses_what_a_user_of_sams_predictor_would():
    ours, theirs = pair()
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    predictor = SamPredictor(theirs)
    predictor.set_image(np.repeat(grey[..., None], 3, axis=2))
    rated = torch.stack([predictor.predict_torch(None, None, box[None])[1][0] for box in BOXES])  # (4, 3)
    for sam in (theirs, ours.sam):  # no mask is the best of every box
        sam.mask_decoder.iou_prediction_head.layers[-1].bias[1:] -= rated.median(0).values
    image, chosen = torch.tensor(grey)[None, None].float(), []
    for box in BOXES:
        masks, quality, _ = predictor.predict(box=box.numpy(), multimask_output=True, return_logits=True)
        chosen.append(int(quality.argmax()))
        found = ours(image, box[None])
        torch.testing.assert_close(found[0, 0], torch.tensor(masks[chosen[-1]]), rtol=0, atol=1e-4)
        other = torch.tensor(masks[(chosen[-1] + 1) % 3])
        assert not torch.allclose(found[0, 0], other, atol=1e-2)
    assert len(set(chosen)) > 1  # or a fixed mask would pass


@torch.no_grad()
def test_each_box_chooses_for_itself_and_several_are_joined():
    ours, _ = pair()
    image = 255 * torch.rand(2, 1, SIZE, SIZE)
    boxes = torch.stack([BOXES, BOXES.flip(0)])
    boxes[1, 2:] = torch.nan
    found = ours(image, boxes)
    for index in range(2):
        alone = [ours(image[index, None], box[None])[0] for box in boxes[index] if not box.isnan().any()]
        torch.testing.assert_close(found[index], torch.stack(alone).amax(0), rtol=0, atol=1e-4)
    assert (ours(image, torch.full((2, 4), torch.nan)) == EMPTY_LOGIT).all()


def test_the_mean_quality_of_the_views_decides():
    logits = torch.arange(4.0)[:, None] * 10 + torch.arange(3.0)  # two boxes, two views, three masks
    quality = torch.tensor([[0.9, 0.5, 0.1], [0.0, 0.6, 0.1], [0.1, 0.2, 0.9], [0.1, 0.8, 0.4]])
    found = best_mask(logits[..., None, None], quality, views=2)
    assert found.shape == (4, 1, 1, 1) and found.flatten().tolist() == [1.0, 11.0, 22.0, 32.0]


@torch.no_grad()
def test_several_scans_give_the_mean_of_one_mask():
    ours, _ = pair(scans=2)
    image = 255 * torch.rand(1, 2, SIZE, SIZE)
    low, quality = ours.sam.decode(ours.encode(image), boxes=BOXES[:1].expand(2, -1), multimask=True)
    best = int(quality.mean(0).argmax())
    mean = low[:, best].mean(0)[None, None]
    expected = torch.nn.functional.interpolate(mean, (SIZE, SIZE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours(image, BOXES[:1]), expected, rtol=0, atol=1e-4)


def test_nothing_learns_with_it(tmp_path):
    with pytest.raises(ConfigError, match="masks: got 'best' with 2 classes"):
        SamSegmenter("tiny", num_classes=2, masks="best")
    with pytest.raises(ConfigError, match="masks: got 'largest'; choose one of 'single', 'best'"):
        SamSegmenter("tiny", masks="largest")
    image, box = torch.rand(1, 1, SIZE, SIZE), BOXES[:1]
    network = SamSegmenter("tiny", LoRA(2), image_size=SIZE, masks="best")
    network(image, box)  # evaluation is for every strategy
    with pytest.raises(ConfigError, match="masks: got 'best' in training"):
        network.train()(image, box)
    SamSegmenter("tiny", image_size=SIZE, masks="best").train()(image, box)  # zero-shot: nothing is owned


def test_an_adapter_does_not_care_which_mask_is_read(tmp_path):
    trained = SamSegmenter("tiny", LoRA(2), image_size=SIZE)
    trained.load_base("random")
    save_adapter(trained, tmp_path)
    other = SamSegmenter("tiny", LoRA(2), image_size=SIZE, masks="best")
    other.load_base("random")
    assert "masks" not in load_adapter(other, tmp_path)


def test_an_export_would_give_the_single_mask_and_is_refused():
    found = obstacles(SamSegmenter("tiny", masks="best"))
    for fmt in ("pth", "torch", "onnx"):
        assert any("set masks to 'single'" in reason for reason in found[fmt]), fmt
    assert not any("masks" in reason for reason in obstacles(SamSegmenter("tiny"))["torch"])

"""Volumes through a slice network and back to the grid of the file."""

from __future__ import annotations

import logging
import math

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import PrepareBatchExtraInput, SupervisedEvaluator
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Invertd,
    Lambdad,
    LoadImaged,
    MapTransform,
    NormalizeIntensityd,
    OneOf,
    Orientationd,
    RandFlipd,
    Resized,
    ResizeWithPadOrCropd,
    ScaleIntensityd,
    SpatialPadd,
)
from torch import nn
from torch.nn.parallel import DataParallel

from samseg_monai import networks
from samseg_monai.data.slices import AllSlices, SliceDataset
from samseg_monai.errors import CacheError, ConfigError, PromptError
from samseg_monai.inferers import EMPTY_LOGIT, SliceVolumeInferer
from samseg_monai.transforms import BoxFromPromptd, SimulatedPromptd, resized_slices

KEYS = ["image", "prompt"]


class BoxNetwork(nn.Module):
    """A network whose logits depend on the image, its neighbourhood and the boxes; keeps what it was given."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.calls: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def forward(self, image: torch.Tensor, boxes: torch.Tensor | None = None) -> torch.Tensor:
        assert type(image) is torch.Tensor
        self.calls.append((image, boxes))
        logits = F.avg_pool2d(image.mean(dim=1, keepdim=True), 5, stride=1, padding=2).repeat(1, self.channels, 1, 1)
        logits = logits * torch.arange(1, self.channels + 1)[None, :, None, None]
        if boxes is not None:
            for row, box in enumerate(boxes if boxes.ndim == 3 else boxes[:, None]):
                for x0, y0, x1, y1 in box[~box.isnan().any(dim=1)].round().int().tolist():
                    logits[row, :, y0:y1, x0:x1] += 3
        return logits


def resize(size: int = 48, **settings) -> Resized:
    return Resized(KEYS, spatial_size=size, size_mode="longest", mode=["bilinear", "nearest"], **settings)


@pytest.fixture
def volumes() -> tuple[torch.Tensor, torch.Tensor]:
    """Two volumes of three scans, (2, 3, 22, 30, 7), and prompts on slices 1, 2, 4, 5 of the first, 3 of the second."""
    image = torch.randn(2, 3, 22, 30, 7, generator=torch.Generator().manual_seed(0))
    prompt = torch.zeros(2, 1, 22, 30, 7, dtype=torch.uint8)
    prompt[0, 0, 4:12, 6:20, [1, 2, 5]] = 1
    prompt[0, 0, 9:14, 22:29, 4] = 1
    prompt[1, 0, 2:20, 3:9, 3] = 1
    return image, prompt


def by_hand(image: torch.Tensor, prompt: torch.Tensor | None, network: nn.Module, size: int = 48) -> torch.Tensor:
    """The same without MONAI: slice by slice, resize and box by formula."""
    scale = size / max(image.shape[2:4])
    small = [round(side * scale) for side in image.shape[2:4]]
    result = torch.full((len(image), network.channels, *image.shape[2:]), -20.0)
    result[:, : network.channels - 1] *= -1  # channel 0 of two is the background
    for b in range(len(image)):
        for z in range(image.shape[-1]):
            boxes = None
            if prompt is not None:
                if not prompt[b, ..., z].any():
                    continue
                plane = F.interpolate(prompt[b : b + 1, ..., z].float(), size=small, mode="nearest")[0, 0]
                rows, columns = np.nonzero(plane.any(1).numpy())[0], np.nonzero(plane.any(0).numpy())[0]
                boxes = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32)
            x = F.interpolate(image[b : b + 1, ..., z], size=small, mode="bilinear", align_corners=False)
            logits = network(x, boxes)
            result[b, ..., z] = F.interpolate(logits, size=image.shape[2:4], mode="bilinear", align_corners=False)[0]
    return result


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("size", [48, 17])
def test_equals_a_loop_over_slices_by_hand(volumes, prompted, batch_size, size):
    image, prompt = volumes
    inferer = SliceVolumeInferer([resize(size)], batch_size=batch_size, prompted=prompted)
    logits = inferer(image, BoxNetwork(), prompt=prompt if prompted else None)
    expected = by_hand(image, prompt if prompted else None, BoxNetwork(), size)
    assert logits.shape == (2, 2, 22, 30, 7) and type(logits) is torch.Tensor
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # the two sum floats in another order


def test_padding_behind_the_resize_changes_nothing_where_the_network_does_not_look_past_the_edge(volumes):
    image, prompt = volumes
    pad = SpatialPadd(KEYS, spatial_size=(48, 48), method="end")

    class Pointwise(BoxNetwork):
        def forward(self, image, boxes=None):
            self.calls.append((image, boxes))
            return image.mean(dim=1, keepdim=True)

    network = Pointwise(1)
    padded = SliceVolumeInferer([resize(), pad])(image, network, prompt=prompt)
    assert {call[0].shape[2:] for call in network.calls} == {(48, 48)}
    torch.testing.assert_close(padded, SliceVolumeInferer([resize()])(image, network, prompt=prompt))
    centred = SliceVolumeInferer(Compose([resize(), Compose([SpatialPadd(KEYS, spatial_size=(64, 60))])]))
    torch.testing.assert_close(centred(image, network, prompt=prompt), padded)


def test_without_slice_transforms_the_network_sees_the_slices_themselves(volumes):
    image, prompt = volumes
    network = BoxNetwork()
    logits = SliceVolumeInferer(None, batch_size=2)(image, network, prompt=prompt)
    assert torch.equal(network.calls[0][0], image[0, ..., [1, 2]].permute(3, 0, 1, 2))
    assert network.calls[0][1].tolist() == [[6, 4, 20, 12]] * 2
    assert torch.equal(logits[0, ..., [1, 2]].permute(3, 0, 1, 2), BoxNetwork()(*network.calls[0]))


def test_slices_without_a_box_are_not_run_and_predicted_empty(volumes):
    image, prompt = volumes
    network = BoxNetwork(1)
    logits = SliceVolumeInferer([resize()], batch_size=2)(image, network, prompt=prompt)
    assert sum(len(images) for images, _ in network.calls) == 5
    assert not any(boxes.isnan().any() for _, boxes in network.calls)
    for b, z in [(0, 0), (0, 3), (0, 6), (1, 0), (1, 6)]:
        assert (logits[b, ..., z] == -20).all()
    assert (logits[0, ..., 1] > -20).all()


@pytest.mark.parametrize("per_component", [False, True])
def test_volume_without_any_prompt_is_empty_with_the_networks_own_channels(volumes, per_component):
    image = volumes[0][:1]
    inferer = SliceVolumeInferer([resize()], per_component=per_component)
    nothing = inferer(image, BoxNetwork(3), prompt=torch.zeros(1, 1, *image.shape[2:]))
    assert nothing.shape == (1, 3, 22, 30, 7)
    assert (nothing[:, 0] == 20).all() and (nothing[:, 1:] == -20).all()


def test_empty_slices_look_as_samsegmenter_makes_them():
    assert EMPTY_LOGIT == networks.EMPTY_LOGIT


def test_a_box_per_component_reaches_the_network(volumes):
    image, prompt = volumes
    prompt[0, 0, 0:2, 0:3, 1] = 1
    network = BoxNetwork()
    SliceVolumeInferer([resize(60)], per_component=True, max_boxes=3)(image, network, prompt=prompt)
    boxes = network.calls[0][1]
    assert boxes.shape == (4, 3, 4)
    assert boxes[0, :2].tolist() == [[12, 8, 40, 24], [0, 0, 6, 4]] and boxes[0, 2].isnan().all()
    assert boxes[1, 1:].isnan().all()


@pytest.mark.parametrize("per_component", [False, True])
def test_two_boxes_of_a_slice_reach_the_network_as_two(volumes, per_component):
    image, prompt = volumes
    second = torch.zeros_like(prompt)
    second[0, 0, 10:14, 18:22, 1] = 1  # it overlaps the first
    network = BoxNetwork()
    both = torch.cat([prompt, second], dim=1)
    logits = SliceVolumeInferer([resize(60)], per_component=per_component)(image, network, prompt=both)
    boxes = network.calls[0][1]
    assert boxes.shape == (4, 2, 4)
    assert boxes[0].tolist() == [[12, 8, 40, 24], [36, 20, 44, 28]] and boxes[1, 1].isnan().all()
    alone = SliceVolumeInferer([resize(60)])(image, BoxNetwork(), prompt=prompt)
    assert torch.equal(logits[1], alone[1]) and not torch.equal(logits[0], alone[0])


def test_prompt_lost_in_a_downscale_is_told(volumes, caplog):
    image, prompt = volumes
    prompt[:] = 0
    prompt[0, 0, 1, 1, 2] = 1
    with caplog.at_level(logging.WARNING):
        logits = SliceVolumeInferer([resize(5)])(image, BoxNetwork(1), prompt=prompt)
    assert (logits == -20).all() and "slices [2]" in caplog.text


def test_training_set_and_inferer_show_the_network_the_same(volumes):
    """Whatever deterministic slice transforms there are, also those that look at the whole slice."""
    image, prompt = volumes
    chain = [
        ScaleIntensityd("image", minv=0, maxv=255),
        NormalizeIntensityd("image", subtrahend=[1.0, 2.0, 3.0], divisor=[1.0, 2.0, 3.0], channel_wise=True),
        Resized(["image", "label", "prompt"], spatial_size=48, size_mode="longest", mode="nearest"),
        SpatialPadd(["image", "label", "prompt"], spatial_size=(48, 48), method="end"),
    ]
    case = {"case": "a", "image": image[0], "prompt": prompt[0], "label": prompt[0]}
    dataset = SliceDataset([case], None, [*chain, BoxFromPromptd()], picker=AllSlices(), progress=False)
    items = [dataset[z] for z in (1, 2, 4, 5)]
    network = BoxNetwork()
    SliceVolumeInferer(chain, batch_size=3)(image[:1], network, prompt=prompt[:1])
    assert [len(images) for images, _ in network.calls] == [3, 1]
    assert torch.equal(torch.cat([images for images, _ in network.calls]), torch.stack([i["image"] for i in items]))
    assert torch.equal(torch.cat([boxes for _, boxes in network.calls]), torch.stack([i["boxes"] for i in items]))


def test_batch_size_does_not_change_the_result_of_whole_slice_transforms(volumes):
    image, prompt = volumes
    chain = [ScaleIntensityd("image"), resize()]
    one, many = (SliceVolumeInferer(chain, batch_size=b)(image, BoxNetwork(), prompt=prompt) for b in (1, 8))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


def test_logits_come_back_bilinearly_whatever_mode_the_image_was_resized_by(volumes):
    image, prompt = volumes
    logits = []
    for mode in ("nearest", "bilinear"):
        chain = [Resized(KEYS, spatial_size=48, size_mode="longest", mode=mode)]
        ramp = torch.linspace(-1, 1, 48).expand(1, 35, 48)
        logits.append(
            SliceVolumeInferer(chain)(image, lambda x, boxes, r=ramp: r.repeat(len(x), 1, 1, 1), prompt=prompt)
        )
    torch.testing.assert_close(*logits)
    expected = F.interpolate(ramp[None], size=(22, 30), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(logits[0][0, ..., 1], expected)


def test_inputs_are_left_alone_by_transforms_that_write_in_place(volumes):
    image, prompt = volumes
    before = image.clone(), prompt.clone()
    network = BoxNetwork()
    SliceVolumeInferer([Lambdad(KEYS, func=lambda x: x.add_(1))])(image, network, prompt=prompt)
    assert torch.equal(network.calls[0][0][0], image[0, ..., 1] + 1)
    assert torch.equal(image, before[0]) and torch.equal(prompt, before[1])


def test_prediction_carries_metadata_and_history_of_the_input(volumes):
    crop = ResizeWithPadOrCropd("image", spatial_size=(20, 20, -1))
    case = {"image": MetaTensor(volumes[0][0], affine=torch.tensor(oblique_affine()))}
    batch = next(iter(DataLoader(Dataset([case] * 2, crop), batch_size=2)))["image"]
    logits = SliceVolumeInferer([resize()], prompted=False)(batch, BoxNetwork(1))
    assert isinstance(logits, MetaTensor) and logits.is_batch
    assert torch.equal(logits.affine, batch.affine)
    assert logits.applied_operations == batch.applied_operations and len(batch.applied_operations[0]) == 1


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (RandFlipd(KEYS), "RandFlipd is random"),
        (Compose([RandFlipd(KEYS)]), "RandFlipd is random"),
        (OneOf([resize(), resize(32)]), "OneOf is random"),
        (SimulatedPromptd(seed=1), "SimulatedPromptd is random"),
        (BoxFromPromptd(), "BoxFromPromptd is only for the training set"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_transforms_of_the_training_set_alone_are_refused(transform, message):
    with pytest.raises(ConfigError, match=message):
        SliceVolumeInferer([resize(), transform])


def test_forgotten_prompt_is_explained(volumes):
    with pytest.raises(ConfigError, match="PrepareBatchExtraInput"):
        SliceVolumeInferer([resize()])(volumes[0], BoxNetwork())


def test_prompt_of_another_shape_is_refused(volumes):
    image, prompt = volumes
    with pytest.raises(PromptError, match=r"\(2, N, 22, 30, 7\).*\(2, 1, 22, 30, 6\)"):
        SliceVolumeInferer([resize()])(image, BoxNetwork(), prompt=prompt[..., 1:])


def test_slices_instead_of_volumes_and_stray_inputs_are_refused(volumes):
    image, prompt = volumes
    with pytest.raises(ConfigError, match=r"\(2, 3, 22, 30\)"):
        SliceVolumeInferer([resize()])(image[..., 0], BoxNetwork(), prompt=prompt[..., 0])
    with pytest.raises(ConfigError, match=r"\['points'\]"):
        SliceVolumeInferer([resize()])(image, BoxNetwork(), prompt=prompt, points=torch.zeros(2, 4))
    with pytest.raises(PromptError, match=r"boxes must have shape \(2, 7, N, 4\)"):
        SliceVolumeInferer([resize()])(image, BoxNetwork(), boxes=torch.zeros(2, 1, 4))
    with pytest.raises(ConfigError, match="at least 1"):
        SliceVolumeInferer([resize()], batch_size=0)


def test_network_with_logits_of_another_size_is_refused(volumes):
    image, prompt = volumes
    with pytest.raises(ConfigError, match=r"\(35, 48\), got \(17, 24\)"):
        SliceVolumeInferer([resize()])(image, lambda x, boxes: F.avg_pool2d(x, 2), prompt=prompt)


class BrightIsTumour(nn.Module):
    """Says +10 where the first scan is bright and the box allows it, -10 elsewhere."""

    def forward(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        inside = torch.zeros_like(image[:, :1], dtype=torch.bool)
        for row, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
            inside[row, :, y0:y1, x0:x1] = True
        return torch.where(inside & (image[:, :1] > 0.5), 10.0, -10.0)


def oblique_affine() -> np.ndarray:
    angle = 0.2
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.9, 0.8, 2.5])  # left-handed: Orientationd has an axis to flip
    affine[:3, 3] = [31, -17, 5]
    return affine


def test_evaluator_brings_predictions_back_to_the_files_grid_and_misses_what_was_cropped(tmp_path):
    """Reorient, crop, prompt, infer, invert; against the uncropped reference, with a Dice known by hand."""
    label = np.zeros((40, 30, 5), dtype=np.uint8)
    label[10:26, 3:13, 1:4] = 1  # the crop keeps 5:25 of axis 1 (of 30) and 8:32 of axis 0 (of 40)
    affine = oblique_affine()
    for name, array in (("image", label.astype(np.float32)), ("label", label)):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    files = {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    case = {"case": "a", **files, "reference": files["label"]}
    cropped = ["image", "label"]
    volume_transforms = Compose(
        [
            LoadImaged([*cropped, "reference"], image_only=True),
            EnsureChannelFirstd([*cropped, "reference"]),
            Orientationd(cropped, axcodes="RAS", labels=None),
            ResizeWithPadOrCropd(cropped, spatial_size=(24, 20, -1)),
            SimulatedPromptd(loosen=(0.0, 0.3), seed=0),
        ]
    )
    resize_by_two = Resized(KEYS, spatial_size=48, size_mode="longest", mode="nearest")
    kept: list[dict] = []
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([case], volume_transforms), batch_size=1),
        network=BrightIsTumour(),
        inferer=SliceVolumeInferer([resize_by_two, SpatialPadd(KEYS, spatial_size=(64, 64), method="end")]),
        prepare_batch=PrepareBatchExtraInput(extra_keys={"prompt": "prompt"}),
        postprocessing=Compose(
            [
                Activationsd("pred", sigmoid=True),
                Invertd("pred", transform=volume_transforms, orig_keys="image", nearest_interp=False),
                AsDiscreted("pred", threshold=0.5),
                lambda d: kept.append(d) or d,
            ]
        ),
        decollate=True,
    )
    evaluator.run()
    assert len(kept) == 1
    pred, reference = kept[0]["pred"], kept[0]["reference"]
    assert isinstance(pred, MetaTensor) and pred.shape == reference.shape == (1, 40, 30, 5)
    np.testing.assert_allclose(pred.affine.numpy(), affine, atol=1e-5)
    expected = label.copy()
    expected[:, :5] = 0
    assert np.array_equal(pred[0].numpy(), expected)
    dice = 2 * (pred * reference).sum() / (pred.sum() + reference.sum())
    assert dice.item() == pytest.approx(2 * 8 / (8 + 10))  # 8 of the tumour's 10 columns are inside the crop


class EmbeddingNetwork(BoxNetwork):
    """A ``BoxNetwork`` on the scans' embedding: a frozen convolution of each scan, as large as the image."""

    encoder_frozen = True

    def __init__(self, channels: int = 3, weight: float = 0.7) -> None:
        super().__init__(channels)
        self.weight, self.encoded = weight, 0

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        assert type(image) is torch.Tensor and not torch.is_grad_enabled()
        self.encoded += len(image)
        return self.weight * F.avg_pool2d(image, 3, stride=1, padding=1).flatten(0, 1)[:, None]

    def embedding_identity(self) -> dict:
        return {"weight": self.weight}

    def forward(self, image, boxes=None, embedding=None):
        if embedding is None:
            with torch.no_grad():
                embedding = self.encode(image).unflatten(0, (len(image), -1))
        assert embedding.shape == (*image.shape[:2], 1, *image.shape[2:])  # (B, V, C, gh, gw)
        return super().forward(embedding[:, :, 0].float(), boxes)


@pytest.mark.parametrize("prompted", [True, False])
def test_a_second_pass_over_a_volume_never_encodes_and_gives_the_same(volumes, tmp_path, prompted):
    image, prompt = volumes
    settings = {"batch_size": 3, "prompted": prompted}
    given = {"prompt": prompt if prompted else None}
    plain = SliceVolumeInferer([resize()], **settings)(image, EmbeddingNetwork(), **given)
    network = EmbeddingNetwork()
    passes = []
    for _ in range(2):
        inferer = SliceVolumeInferer([resize()], embedding_dir=str(tmp_path), **settings)
        passes.append(inferer(image, network, **given))
        assert network.encoded == (5 if prompted else 14)  # slices of both volumes, each once
    assert torch.equal(*passes)
    # bf16 rounds an embedding by 2**-9 of itself; logits are three times its mean over 5 x 5 and at most 4 here
    torch.testing.assert_close(passes[0], plain, rtol=0, atol=3 * 4 * 2**-9)
    assert not torch.equal(passes[0], plain)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == network.encoded
    if prompted:  # other boxes need other slices, and only those are encoded
        inferer(image, network, prompt=torch.ones_like(prompt))
        assert network.encoded == 14


def test_embeddings_are_known_by_weights_transforms_and_volume_but_not_by_prompts_or_batches(volumes, tmp_path):
    image, prompt = volumes[0][:1], volumes[1][:1]

    def encoded(image=image, prompt=prompt, *, size=48, weight=0.7, wrap=lambda n: n, **settings) -> int:
        network = EmbeddingNetwork(weight=weight)
        inferer = SliceVolumeInferer([resize(size)], embedding_dir=tmp_path, **settings)
        inferer(image, wrap(network), prompt=prompt)
        return network.encoded

    assert encoded() == 4
    assert encoded(batch_size=1) == encoded(prompt=prompt.roll(1, 2)) == encoded(MetaTensor(image)) == 0
    assert encoded(labels=True, direct=True, per_component=True) == encoded(wrap=DataParallel) == 0
    changed = image.clone()
    changed[0, 0, 0, 0, 6] += 1
    assert encoded(changed) == encoded(size=40) == encoded(weight=0.8) == 4
    assert encoded() == 0
    wider = torch.cat([image.flatten(), torch.zeros(0)]).reshape(1, 3, 30, 22, 7)  # the same bytes in another shape
    assert encoded(wider, prompt.reshape(1, 1, 30, 22, 7)) > 0


def test_volume_without_a_box_needs_no_embedding(volumes, tmp_path):
    image, network = volumes[0], EmbeddingNetwork()
    inferer = SliceVolumeInferer([resize()], embedding_dir=tmp_path)
    nothing = inferer(image[:1], network, prompt=torch.zeros(1, 1, 22, 30, 7))
    assert (nothing[:, 1:] == -20).all() and list(tmp_path.rglob("*")) == []


def test_embeddings_that_would_not_stay_the_same_are_refused(volumes, tmp_path):
    image, prompt = volumes
    inferer = SliceVolumeInferer([resize()], embedding_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"BoxNetwork has no encode, .*, encoder_frozen; use a SamSegmenter"):
        inferer(image, BoxNetwork(), prompt=prompt)
    network = EmbeddingNetwork()
    network.encoder_frozen = False
    with pytest.raises(ConfigError, match=r"encoder of this EmbeddingNetwork learns.*leave embedding_dir out"):
        inferer(image, network, prompt=prompt)
    around_prompt = CropForegroundd(KEYS, source_key="prompt", allow_smaller=True)
    with pytest.raises(ConfigError, match="change the image according to the prompt"):
        SliceVolumeInferer([around_prompt], embedding_dir=tmp_path)(image, EmbeddingNetwork(), prompt=prompt)
    assert list(tmp_path.iterdir()) == []


def test_damaged_embedding_of_a_volume_is_told_and_mended_in_the_next_pass(volumes, tmp_path):
    image, network = volumes[0][:1], EmbeddingNetwork()
    inferer = SliceVolumeInferer([resize()], embedding_dir=tmp_path, prompted=False)
    first = inferer(image, network)
    data = next(tmp_path.glob("*/*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match=rf"row 0 of .*{data.name} is damaged; start again"):
        inferer(image, network)
    assert torch.equal(inferer(image, network), first) and network.encoded == 8


def test_samsegmenter_predicts_from_kept_embeddings_what_it_predicts_without(volumes, tmp_path):
    image, prompt = volumes
    torch.manual_seed(0)
    network = networks.SamSegmenter("tiny", scans=3)
    chain = [resize(network.image_size)]
    calls: list[int] = []
    encode = network.encode
    network.encode = lambda image: calls.append(len(image)) or encode(image)
    with torch.no_grad():
        plain = SliceVolumeInferer(chain)(image, network, prompt=prompt)
        calls.clear()
        kept = [SliceVolumeInferer(chain, embedding_dir=tmp_path)(image, network, prompt=prompt) for _ in range(2)]
    assert sum(calls) == 5 and torch.equal(*kept)
    found = plain > -20
    assert (kept[0] - plain).abs().max() < 0.02 * plain[found].abs().max()


@pytest.mark.parametrize("size", [48, 17])
def test_direct_equals_the_inverse_of_a_single_resize(volumes, size):
    image, prompt = volumes
    ways = [SliceVolumeInferer([resize(size)], direct=d)(image, BoxNetwork(), prompt=prompt) for d in (False, True)]
    torch.testing.assert_close(*ways, rtol=0, atol=1e-5)


def test_direct_takes_one_step_where_the_way_there_had_two_or_cannot_be_undone(volumes):
    image = volumes[0]

    class Halved(MapTransform):  # has no inverse
        def __call__(self, data):
            return {**data, "image": F.avg_pool2d(data["image"].as_subclass(torch.Tensor), 2)}

    def network(x):
        return torch.cat([x[:, :1], -x[:, :1]], 1)

    two_steps = [resize(60), Resized(KEYS, spatial_size=(20, 24), mode=["bilinear", "nearest"])]
    for chain in (two_steps, [Halved("image")]):
        logits = SliceVolumeInferer(chain, prompted=False, direct=True)(image, network)
        for z in range(7):
            x = Compose(chain)({"image": image[0, ..., z], "prompt": image[0, :1, ..., z]})["image"]
            expected = F.interpolate(
                network(torch.as_tensor(x)[None]).as_subclass(torch.Tensor), (22, 30), mode="bilinear"
            )
            torch.testing.assert_close(logits[0, ..., z], expected[0])
    stepwise = SliceVolumeInferer(two_steps, prompted=False)(image, network)
    direct = SliceVolumeInferer(two_steps, prompted=False, direct=True)(image, network)
    assert not torch.allclose(stepwise, direct, atol=1e-3)
    with pytest.raises(ConfigError, match="cannot be undone"):
        SliceVolumeInferer([Halved("image")], prompted=False)(image, network)
    with pytest.raises(ConfigError, match="only resize, got SpatialPad"):
        pad = SpatialPadd(KEYS, spatial_size=(64, 64))
        SliceVolumeInferer([resize(), pad], prompted=False, direct=True)(image, network)


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_labels_are_the_largest_logit_in_the_grid_of_the_volume(volumes, prompted, direct):
    image, prompt = volumes
    settings = {"prompted": prompted, "direct": direct, "batch_size": 3}
    given = {"prompt": prompt if prompted else None}

    class Classes(BoxNetwork):
        def forward(self, image, boxes=None):
            shifts = [F.avg_pool2d(image, 3, stride=1, padding=1).roll(k, 2).mean(1) for k in range(4)]
            return torch.stack(shifts, 1)

    logits = SliceVolumeInferer([resize()], **settings)(image, Classes(), **given)
    labels = SliceVolumeInferer([resize()], labels=True, **settings)(image, Classes(), **given)
    assert labels.shape == (2, 1, 22, 30, 7) and labels.dtype == torch.float32
    assert torch.equal(labels, logits.argmax(1, keepdim=True).float())
    assert labels.unique().tolist() == [0, 1, 2, 3]
    if prompted:
        assert not labels[0, ..., [0, 3, 6]].any() and labels[0, ..., 1].any()


def test_of_equal_logits_the_first_class_counts():
    logits = torch.randint(0, 3, (2, 9, 20, 20), generator=torch.Generator().manual_seed(0)).float()
    labels = SliceVolumeInferer([resize()], labels=True)._finished(logits)
    assert torch.equal(labels, logits.argmax(1, keepdim=True).float())


def test_labels_keep_metadata_and_need_more_than_one_channel(volumes):
    image, prompt = volumes
    batch = MetaTensor(image, affine=torch.tensor(oblique_affine()))
    inferer = SliceVolumeInferer([resize()], labels=True)
    labels = inferer(batch, BoxNetwork(2), prompt=prompt)
    assert isinstance(labels, MetaTensor) and torch.equal(labels.affine, batch.affine)
    for mask in (prompt, torch.zeros_like(prompt)):
        with pytest.raises(ConfigError, match=r"labels need a logit per class.*labels=False"):
            inferer(image, BoxNetwork(1), prompt=mask)
    nothing = inferer(image, BoxNetwork(3), prompt=torch.zeros_like(prompt))
    assert nothing.shape == (2, 1, 22, 30, 7) and not nothing.any()


def test_stretched_slices_are_asked_as_squares_and_come_back_with_their_boxes():
    """MedSAM's way: sides of 20 x 40 become 64 x 64, a box follows each axis, and so does the mask."""
    seen = []

    class BoxFilled(torch.nn.Module):
        def forward(self, image, boxes):
            seen.append((tuple(image.shape), boxes.clone()))
            rows, columns = (torch.arange(n) + 0.5 for n in image.shape[-2:])
            x0, y0, x1, y1 = boxes[0]
            inside = ((rows > y0) & (rows < y1))[:, None] & ((columns > x0) & (columns < x1))
            return 20.0 * inside[None, None] - 10.0

    volume, prompt = torch.rand(1, 1, 20, 40, 1), torch.zeros(1, 1, 20, 40, 1)
    prompt[:, :, 5:15, 10:30] = 1
    inferer = SliceVolumeInferer(resized_slices(["image", "label", "prompt"], 64, stretch=True))
    logits = inferer(volume, BoxFilled(), prompt=prompt)
    assert seen[0][0] == (1, 1, 64, 64) and seen[0][1].tolist() == [[16, 16, 48, 48]]
    assert torch.equal((logits > 0).float(), prompt)

"""Neighbouring slices as channels, the same in training, in volumes and in stored embeddings."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from samseg_monai.bundles.build import compose, render
from samseg_monai.data.slices import AllSlices, SliceDataset
from samseg_monai.errors import ConfigError, DataError
from samseg_monai.inferers import SliceVolumeInferer
from samseg_monai.networks import SamSegmenter
from samseg_monai.settings import dump_settings, read_settings
from samseg_monai.strategies import Selective
from samseg_monai.transforms import NeighbourSlicesd

SEEN = [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]  # of a volume of four slices


def volume():
    """Every slice holds its number."""
    return MetaTensor(torch.arange(4.0).expand(1, 64, 48, 4).clone(), affine=torch.diag(torch.tensor([2.0, 2, 5, 1])))


def test_a_slice_lies_between_its_neighbours():
    image = volume()
    found = NeighbourSlicesd("image")({"image": image})["image"]
    assert found[:, 0, 0].T.tolist() == SEEN
    assert torch.equal(found.affine, image.affine) and image.shape == (1, 64, 48, 4)
    assert NeighbourSlicesd("image", wanted=False)({"image": image})["image"] is image
    assert NeighbourSlicesd("image")({"image": image[..., :1]})["image"].shape == (3, 64, 48, 1)
    with pytest.raises(DataError, match=r"of one scan, .* 'image' has shape \(2, 64, 48, 4\)"):
        NeighbourSlicesd("image")({"image": image.repeat(2, 1, 1, 1)})


@torch.no_grad()
def test_training_volumes_and_stored_embeddings_see_the_same(tmp_path):
    torch.manual_seed(0)
    network = SamSegmenter("tiny", Selective(["sam.mask_decoder"]), scans=["t1"], scan_mode="neighbours", prompt="none")
    item = {"case": "a", "image": volume(), "label": torch.ones(1, 64, 48, 4)}
    transforms = [NeighbourSlicesd("image")]
    dataset = SliceDataset([item], transforms, picker=AllSlices(), embedding_dir=tmp_path, variants=1, progress=False)
    assert [dataset[z]["image"][:, 0, 0].tolist() for z in range(4)] == SEEN
    dataset.fill(network)
    image = NeighbourSlicesd("image")(item)["image"][None]
    found = SliceVolumeInferer([], prompted=False)(image, network)
    kept = SliceVolumeInferer([], prompted=False, embedding_dir=tmp_path)(image, network)
    for z in range(4):
        embedding = network.encode(dataset[z]["image"][None])
        torch.testing.assert_close(dataset[z]["embedding"].float(), embedding, atol=0.05, rtol=0.02)
        torch.testing.assert_close(network(dataset[z]["image"][None])[0], found[0, ..., z], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            network(dataset[z]["image"][None], embedding=dataset[z]["embedding"][None])[0],
            kept[0, ..., z],
            atol=1e-5,
            rtol=0,
        )


def test_only_slices_of_one_scan_have_neighbours():
    for scans in (1, 2, ["t1", "t2"], ["t1", "t2", "flair"]):
        with pytest.raises(ConfigError, match="scan_mode 'neighbours' is for the three of one scan's slices"):
            SamSegmenter("tiny", scans=scans, scan_mode="neighbours")
    settings = dump_settings(compose("hippocampus", "lora"))
    settings["run"]["scan_mode"] = "neighbours"
    metadata = render(read_settings(settings, "these"))["configs/metadata.json"]
    assert '"num_channels": 3' in metadata and "t1, slice before" in metadata
    settings["demo"], settings["task"]["kind"], settings["task"]["orientation"] = None, "images", None
    with pytest.raises(ConfigError, match="a 2-D image has none"):
        read_settings(settings, "these")
    plain = dump_settings(compose("hippocampus", "unet"))
    plain["run"]["scan_mode"] = "neighbours"
    with pytest.raises(ConfigError, match="this network has no SAM"):
        read_settings(plain, "these")

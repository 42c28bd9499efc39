"""Three-dimensional networks: what they learn from, that they predict as MONAI's patches do, and what is refused."""

from __future__ import annotations

import json
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import sliding_window_inference
from monai.networks.nets import DynUNet, UNet

from samseg_monai.bundles import build_bundle, load_bundle, pack_bundle
from samseg_monai.bundles.build import compose, render
from samseg_monai.bundles.check import AS_BUILT, check_bundle
from samseg_monai.bundles.running import problems_of_overrides
from samseg_monai.checkpoints import load_adapter, read_card, save_adapter
from samseg_monai.choices import IGNORE
from samseg_monai.errors import CheckpointError, ConfigError
from samseg_monai.export import obstacles
from samseg_monai.networks import PlainSegmenter
from samseg_monai.report.runs import RunResult
from samseg_monai.settings import dump_settings, merged, read_settings
from samseg_monai.training import SegmentationLoss
from samseg_monai.training.cost import RandomVolume
from samseg_monai.workflow import run_workflow

RECIPE = {
    "extends": "dynunet_3d",
    "network": {"filters": [4, 4, 4, 4]},
    "run": {"patch": [16, 16, 16], "epochs": 2, "val_interval": 1, "augmentation": "strong"},
    "demo": {"network": {"filters": [4, 4, 4, 4]}},
}


def trained(folder, hippocampi, **overrides):
    """A bundle of the hippocampus, trained for two epochs; its folder of configs, and what predictions are given."""
    (folder / "small.json").write_text(json.dumps(RECIPE))
    configs = build_bundle("hippocampus", str(folder / "small.json"), folder / "bundles") / "configs"
    shared = {"dataset_dir": str(hippocampi), "output_dir": str(folder / "run")}
    run_workflow([configs / "train.json"], {**shared, **overrides})
    return configs, shared


def config_of(strategy="dynunet_3d", task="hippocampus", **values):
    config = {**json.loads(render(compose(task, strategy))["configs/train.json"]), "device": "cpu"}
    parser = ConfigParser(config)
    for key, value in {"patch": [16, 16, 16], **values}.items():
        parser[key] = value
    return parser


def test_it_predicts_as_by_hand_on_the_grid_of_the_file(hippocampi, tmp_path):
    """Volumes larger than the patch along two axes and smaller along the third, one stored upside down."""
    configs, shared = trained(tmp_path, hippocampi)
    cases = tmp_path / "cases"
    cases.mkdir()
    source = nib.load(hippocampi / "images" / "volume_5.nii.gz")
    values = np.asarray(source.dataobj)
    nib.save(source, cases / "one.nii.gz")
    nib.save(nib.Nifti1Image(values[:, :, ::-1], np.diag([1.0, 1.0, -1.0, 1.0])), cases / "two.nii.gz")
    run_workflow([configs / "inference.json"], {**shared, "dataset_dir": str(cases)})
    net = DynUNet(3, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[4] * 4).eval()
    network = PlainSegmenter(net, image_size=[16] * 3, num_classes=2, scans=["image"])
    network.strategy.name = "dynunet_3d"
    network.load_base()
    load_adapter(network, tmp_path / "run")
    image = torch.from_numpy(values)[None, None]
    scored = (image - image.mean()) / image.std(correction=0)
    with torch.no_grad():
        logits = sliding_window_inference(scored, (16, 16, 16), 2, net, overlap=0.5, mode="gaussian")
    expected = logits.argmax(1)[0].numpy()
    assert len(np.unique(expected)) > 1
    found = np.asarray(nib.load(tmp_path / "run" / "predictions" / "one_seg.nii.gz").dataobj)
    turned = np.asarray(nib.load(tmp_path / "run" / "predictions" / "two_seg.nii.gz").dataobj)
    assert np.array_equal(found, expected) and np.array_equal(turned[:, :, ::-1], expected)


def test_a_run_is_evaluated_packed_and_says_what_it_is(hippocampi, tmp_path):
    configs, shared = trained(tmp_path, hippocampi, epochs=1)
    run_workflow([configs / "inference.json", configs / "evaluate.json"], shared)
    result = RunResult.load(tmp_path / "run" / "evaluation")
    assert {row["class"] for row in result.rows} >= {"anterior", "posterior"}
    assert sum(row["dice"] for row in result.rows) > 0
    judged = {**shared, "results_dir": str(tmp_path / "judged"), "calibration": True}
    run_workflow([configs / "inference.json", configs / "evaluate.json"], judged)
    again = RunResult.load(tmp_path / "judged").rows  # of logits, of which the classes are taken later
    assert [row["dice"] for row in again] == [row["dice"] for row in result.rows]
    assert result.card["image_size"] == [16, 16, 16] and "3-D DynUNet" in result.title
    path = pack_bundle(tmp_path / "run", tmp_path / "packed.zip")
    verdict = check_bundle(path)
    assert verdict.answer == AS_BUILT, verdict.problems
    loaded = load_bundle(path)
    segmentation, _ = loaded.predict(np.random.default_rng(0).normal(size=(12, 30, 20)).astype(np.float32))
    assert segmentation.shape == (12, 30, 20) and set(np.unique(segmentation)) <= {0, 1, 2}
    with zipfile.ZipFile(path) as content:
        page = next(content.read(name).decode() for name in content.namelist() if name.endswith("docs/README.md"))
    assert "patches of 16 x 16 x 16 voxels" in page and "one by one" not in page and "image_size" not in page


def test_patches_are_cut_around_what_was_judged_and_filled_up_with_what_counts_nowhere():
    """Of a volume of which nobody judged more than three voxels, near to a corner, and that is lower than a patch."""
    label = torch.full((1, 40, 40, 10), IGNORE, dtype=torch.uint8)
    label[0, 2, 3, 4], label[0, 4, 4, 4], label[0, 3, 2, 5] = 0, 1, 2
    empty = {"image": torch.zeros(1, 20, 20, 20), "label": torch.full((1, 20, 20, 20), IGNORE, dtype=torch.uint8)}
    whole = {"image": torch.rand(1, 40, 40, 10) + 1, "label": label}

    def load(item):
        return {**item, **{k: v.clone() for k, v in (whole if item["case"] == "whole" else empty).items()}}

    parser = config_of(augmentation="none")
    parser["train::dataset::data"] = [{"case": "whole"}, {"case": "empty"}]
    parser["train::dataset::volume_transforms"] = load
    parser["train::dataset::picker"] = {"_target_": "samseg_monai.data.slices.Patches", "n": 20}
    dataset = parser.get_parsed_content("train::dataset")
    assert len(dataset) == 20
    for item in dataset:
        assert item["image"].shape == (1, 16, 16, 16) and set(item["label"].unique().tolist()) == {0, 1, 2, IGNORE}
        outside = item["image"] == 0
        assert outside.sum() == 16 * 16 * 6 and (item["label"][outside] == IGNORE).all()
    loss = parser.get_parsed_content("train::criterion")
    logits = torch.randn(1, 3, 16, 16, 16, requires_grad=True)
    loss(logits, item["label"][None]).backward()
    assert ((logits.grad != 0).any(1) == (item["label"] != IGNORE)).all()


def test_patches_are_drawn_anew_in_every_epoch_and_the_same_again(tmp_path):
    def items(epoch, cache="memory"):
        parser = config_of(**{"slices::cache": cache, "slices::cache_dir": str(tmp_path)})
        parser["train::dataset::data"] = [{"case": "a"}, {"case": "b"}]
        parser["train::dataset::volume_transforms"] = RandomVolume(1, 2, (24, 30), 20)
        dataset = parser.get_parsed_content("train::dataset")
        dataset.set_epoch(epoch)
        assert len(dataset) == 4
        return [dataset[index] for index in (3, 1, 2, 0)]

    first, again, second = items(0), items(0, "disk"), items(1)
    for one, same, other in zip(first, again, second, strict=True):
        assert torch.equal(one["image"], same["image"]) and torch.equal(one["label"], same["label"])
        assert not torch.equal(one["image"], other["image"]) and set(one["label"].unique().tolist()) <= {
            0,
            1,
            2,
            IGNORE,
        }
    assert not torch.equal(first[0]["image"], first[2]["image"])  # two patches of one volume


@pytest.mark.parametrize("name", ["light", "strong"])
def test_augmentation_does_the_same_to_all_slices_of_a_patch(name):
    parser = config_of("unet_3d", "meningioma", augmentation=name)
    for transform in ("noise", "bias_field") if name == "strong" else ():
        parser[f"augmentations::{name}::{transform}::prob"] = 0.0
    plane = torch.randn(1, 30, 34, 1)
    label = (torch.arange(34)[None, None, :, None] > 20).byte().expand(1, 30, 34, 8)
    done = 0
    for seed in range(6):
        transforms = parser.get_parsed_content("augmentation_transforms")
        item = {"image": plane.expand(-1, -1, -1, 8).clone(), "label": label.clone()}
        for number, transform in enumerate(transforms):
            if hasattr(transform, "set_random_state"):
                transform.set_random_state(seed=100 * seed + number)
            item = transform(item)
        for key in ("image", "label"):
            torch.testing.assert_close(item[key], item[key][..., :1].expand(-1, -1, -1, 8), rtol=0, atol=1e-5)
        done += not torch.equal(item["label"].as_subclass(torch.Tensor), label)
    assert done >= 2


LOSSES = [{"dice": 1.0, "ce": 1.0}, {"dice": 0.5, "ce": 0.0, "focal": 1.0, "class_weights": {"a": 3.0}, "batch": True}]


@pytest.mark.parametrize("settings", LOSSES)
@pytest.mark.parametrize("classes", [["a"], ["a", "b"]])
def test_the_loss_of_a_patch_is_that_of_its_voxels_laid_out_in_a_plane(classes, settings):
    loss = SegmentationLoss(classes, **settings)
    logits = torch.randn(2, 1 if len(classes) == 1 else 3, 4, 5, 6)
    label = torch.randint(len(classes) + 1, (2, 1, 4, 5, 6))
    for judged in (torch.ones_like(label).bool(), torch.rand(label.shape) > 0.3):
        marked = torch.where(judged, label, IGNORE)
        flat = loss(logits.flatten(3), marked.flatten(3))
        torch.testing.assert_close(loss(logits, marked), flat)


def test_the_boundary_loss_of_a_patch_grows_with_the_distance_along_each_axis():
    label = torch.zeros(1, 1, 9, 9, 9)
    label[..., 3:6, 3:6, 3:6] = 1
    loss = SegmentationLoss(["a"], dice=1e-9, ce=0.0, boundary=1.0)

    def of(*voxel):
        logits = torch.full((1, 1, 9, 9, 9), -20.0)
        logits[(0, 0, *voxel)] = 20.0
        return loss(logits, label).item()

    for axis in range(3):
        near, far = [4, 4, 4], [4, 4, 4]
        near[axis], far[axis] = 6, 8
        assert of(4, 4, 4) < of(*near) < of(*far) == pytest.approx(of(*far[::-1]))


@torch.no_grad()
def test_smaller_volumes_are_padded_and_larger_ones_refused():
    net = UNet(3, 1, 3, channels=(4, 8), strides=(2,))
    network = PlainSegmenter(net, image_size=[8, 10, 6], num_classes=2)
    image = torch.randn(2, 1, 7, 10, 5)
    expected = net(torch.nn.functional.pad(image, (0, 1, 0, 0, 0, 1)))[:, :, :7, :, :5]
    assert torch.equal(network(image), expected)
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(image), expected)
    with pytest.raises(Exception, match="longer than image_size"):
        scripted(torch.zeros(1, 1, 8, 11, 6))
    for shape in ((2, 1, 8, 11, 6), (2, 2, 8, 10, 6), (2, 1, 8, 10)):
        with pytest.raises(ConfigError, match=r"expected \(B, 1, H, W, D\) with these at most 8, 10, 6"):
            network(torch.zeros(shape))
    assert "three dimensions" in obstacles(network)["torch"][0] and not obstacles(network)["ckpt_export"]
    for size, boxes, told in (([8, 8, 8], "crop", "takes none"), ([8, 8, 8, 8], "none", "three of a patch")):
        with pytest.raises(ConfigError, match=told):
            PlainSegmenter(net, image_size=size, boxes=boxes)


def test_an_adapter_of_another_patch_is_refused(tmp_path):
    def network(patch):
        made = PlainSegmenter(UNet(3, 1, 3, channels=(4, 8), strides=(2,)), image_size=patch, num_classes=2)
        made.load_base()
        return made

    save_adapter(network([8, 8, 8]), tmp_path)
    assert read_card(tmp_path)["image_size"] == [8, 8, 8]
    load_adapter(network((8, 8, 8)), tmp_path)
    with pytest.raises(CheckpointError, match=r"image_size: adapter \[8, 8, 8\], network \[8, 8, 16\]"):
        load_adapter(network([8, 8, 16]), tmp_path)


def settings_with(*, of="dynunet_3d", **changes):
    value = {**dump_settings(compose("hippocampus", of)), "demo": None}
    return read_settings(merged(value, changes), "test")


def test_what_has_no_meaning_for_volumes_is_refused_all_at_once():
    run = {
        "patch": [40, 40, 20], "slices": {"picker": {"name": "EveryNth", "n": 2}}, "store_size": 64,
        "validation": {"picker": {"name": "MaxArea"}}, "augmentation": "published", "prompt": {"source": "label"},
        "input_scale": "slice",
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        settings_with(run=run, strategy={"network": {"boxes": "crop"}}, task={"kind": "images", "orientation": None})
    told = str(error.value)
    for words in (
        "run::patch: got [40, 40, 20]; this DynUNet needs multiples of [8, 8, 8], not all of them the smallest",
        "spatial_dims: got 3, but 2-D images",
        "strategy::network::boxes: got 'crop'",
        "run::slices::picker: got 'EveryNth'",
        "run::validation::picker",
        "run::store_size: got 64",
        "run::augmentation: 'published'",
        "run::input_scale: 'slice' is what SAM's network makes",
    ):
        assert words in told, words
    with pytest.raises(ConfigError, match="prompt::source: got 'label', but this network takes no boxes"):
        settings_with(run={"prompt": {"source": "label"}})
    for strategy in ("decoder", "unet"):
        with pytest.raises(ConfigError, match="run::slices::picker: got 'Patches', which is for three-dim"):
            settings_with(of=strategy, run={"slices": {"picker": {"name": "Patches"}}})
    with pytest.raises(ConfigError, match=r"run::patch: got \[8, 8, 8\]; .* not all of them the smallest"):
        settings_with(run={"patch": [8, 8, 8]})


@pytest.mark.parametrize("overrides", [{"image_size": 64}, {"store_size": 64}, {"network_def::net::spatial_dims": 2}])
def test_keys_of_slices_are_unknown_to_a_bundle_of_volumes(overrides, tmp_path):
    configs = build_bundle("hippocampus", "unet_3d", tmp_path) / "configs"
    (key,) = overrides
    told = problems_of_overrides([configs / "train.json"], overrides)
    assert (key if "spatial_dims" not in key else "slices::picker: got 'Patches'") in " ".join(told)
    assert problems_of_overrides([configs / "train.json"], {"patch": [48, 48, 32]}) == []
    flat = build_bundle("hippocampus", "unet", tmp_path) / "configs"
    assert "no such key" in problems_of_overrides([flat / "train.json"], {"patch": [48, 48, 32]})[0]


def test_strides_and_kernels_of_each_axis():
    anisotropic = {
        "kernel_size": [[3, 3, 1], 3, 3], "strides": [1, [2, 2, 1], 2], "upsample_kernel_size": [[2, 2, 1], 2],
        "filters": [4, 4, 4],
    }  # fmt: skip
    settings = settings_with(run={"patch": [16, 16, 10]}, strategy={"network": anisotropic})
    parser = ConfigParser({**json.loads(render(settings)["configs/train.json"]), "device": "cpu"})
    network = parser.get_parsed_content("network_def").train()
    assert network(torch.randn(1, 1, 16, 16, 10)).shape == (1, 3, 16, 16, 10)
    with pytest.raises(ConfigError, match=r"multiples of \[4, 4, 2\]"):
        settings_with(run={"patch": [16, 16, 9]}, strategy={"network": anisotropic})
    with pytest.raises(ConfigError, match="lists of three values are for spatial_dims 3"):
        settings_with(of="dynunet", strategy={"network": anisotropic})

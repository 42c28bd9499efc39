"""The published training of SAM-LST: its loss computed anew, and its numbers as the bundle has them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from scipy.ndimage import zoom
from torch import nn

from samseg_monai.bundles import build_bundle
from samseg_monai.training import OnLogitGrid

CONFIG = Path(__file__).parents[2] / "bundles" / "abdomen_segmentation_ladder_paper" / "configs" / "train.json"
CLASSES = 9


@pytest.fixture(scope="module")
def parser() -> ConfigParser:
    """The bundle's training with 2,211 slices and a network of one layer in place of data and SAM."""
    parser = ConfigParser(ConfigParser.load_config_file(CONFIG))
    parser.update({"train::dataloader": [0] * math.ceil(2211 / 24), "network": nn.Linear(1, 1)})
    return parser


def value(parser: ConfigParser, key: str):
    return parser.get_parsed_content(key)


def case(seed: int, *, batch=3, grid=16, factor=4):
    """Logits, and a label ``factor`` times finer in which one class is absent from the whole batch."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, CLASSES, grid, grid, generator=rng)
    label = torch.randint(0, CLASSES - 1, (batch, 1, factor * grid, factor * grid), generator=rng)
    label[0] = 0  # a slice without any organ
    return logits, label


def published(logits: torch.Tensor, label: torch.Tensor | np.ndarray) -> float:
    """0.2 CE + 0.8 Dice, in numpy and float64: sums over the whole batch, mean over all classes."""
    z = logits.detach().double().numpy()
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    y = np.asarray(label)[:, 0]
    ce = -np.log(np.take_along_axis(p, y[:, None], axis=1)).mean()
    dice = 0.0
    for k in range(CLASSES):
        target = (y == k).astype(np.float64)
        both, squares = (p[:, k] * target).sum(), (p[:, k] ** 2).sum() + (target**2).sum()
        dice += 1 - (2 * both + 1e-5) / (squares + 1e-5)
    return 0.2 * ce + 0.8 * dice / CLASSES


@pytest.mark.parametrize("seed", range(3))
def test_the_bundles_loss_is_the_published_one(parser, seed):
    logits, label = case(seed)
    loss = value(parser, "train::criterion")
    # 4 x 4 pixels to one, from the first row to the last one and so with the columns
    expected = published(logits, zoom(label, (1, 1, 0.25, 0.25), order=0))
    assert float(loss(logits, label)) == pytest.approx(expected, abs=1e-6)
    assert float(loss(logits, label.to(torch.uint8))) == pytest.approx(expected, abs=1e-6)
    assert abs(expected - published(logits, label[..., ::4, ::4])) > 1e-4  # the choice of the pixel can be seen


def test_the_loss_is_taken_over_the_batch_as_a_whole(parser):
    """With one Dice per image the slice without organs would count as much as all others together."""
    logits, label = case(5, factor=1)
    loss = value(parser, "train::criterion")
    alone = np.mean([float(loss(logits[i : i + 1], label[i : i + 1])) for i in range(len(logits))])
    assert float(loss(logits, label)) == pytest.approx(published(logits, label), abs=1e-6)
    assert abs(alone - float(loss(logits, label))) > 1e-3


def test_perfect_logits_cost_nothing_and_gradients_are_those_of_the_formula(parser):
    logits, label = case(1)
    coarse = torch.from_numpy(zoom(label, (1, 1, 0.25, 0.25), order=0))
    perfect = 50.0 * F.one_hot(coarse[:, 0], CLASSES).movedim(-1, 1)
    # the class that is nowhere has 1e-5 / 1e-5: no cost for what is rightly left out
    assert float(value(parser, "train::criterion")(perfect, label)) == pytest.approx(0.0, abs=1e-6)
    logits.requires_grad_(True)
    value(parser, "train::criterion")(logits, label).backward()
    step = torch.zeros_like(logits)
    step[1, 2, 3, 4] = 1e-3
    slope = (published(logits + step, coarse) - published(logits - step, coarse)) / 2e-3
    assert float(logits.grad[1, 2, 3, 4]) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (50, 36), (16, 12)])
def test_finer_labels_are_thinned_out_to_the_pixel_under_the_centre(size):
    seen = []
    spy = OnLogitGrid(lambda logits, label: seen.append(label) or logits.sum())
    label = torch.arange(size[0] * size[1]).reshape(1, 1, *size).float()
    spy(torch.zeros(1, 2, 16, 12), label)
    rows, columns = ((np.arange(n) + 0.5) * s / n for n, s in zip((16, 12), size, strict=True))
    expected = label[0, 0][np.floor(rows).astype(int)][:, np.floor(columns).astype(int)]
    assert torch.equal(seen[0][0, 0], expected)
    assert (seen[0] is label) == (size == (16, 12))  # equal grids: handed on as it is


@pytest.mark.parametrize(("size", "points"), [((512, 512), (128, 128)), ((512, 448), (128, 112)), ((50, 36), (16, 12))])
def test_published_code_takes_the_pixels_between_the_corners(size, points):
    seen = []
    label = np.random.default_rng(0).integers(0, 9, size)
    spy = OnLogitGrid(lambda logits, label: seen.append(label) or logits.sum(), corners=True)
    spy(torch.zeros(1, 9, *points), torch.from_numpy(label)[None, None])
    published = zoom(label, [new / old for new, old in zip(points, size, strict=True)], order=0)
    assert np.array_equal(seen[0][0, 0].numpy(), published)


@pytest.mark.parametrize("fine", [True, False])
def test_labels_with_metadata_give_the_same_loss_and_leave_none_in_it(fine):
    logits, label = case(2, factor=4 if fine else 1)
    loss = OnLogitGrid(DiceCELoss(softmax=True, to_onehot_y=True))
    expected = loss(logits, label)
    found = loss(logits, MetaTensor(label.float(), affine=torch.eye(4)))
    assert float(found) == float(expected)
    if fine:
        assert type(found) is torch.Tensor


def test_numbers_of_the_protocol(parser):
    wanted = {
        "epochs": 200, "lr": 0.001, "batch_size": 24, "seed": 1234, "store_size": 224, "image_size": 512,
        "accumulation_steps": 1, "clip_norm": None, "val_interval": 0, "input_scale": "unit", "sam_variant": "vit_b",
        "low_res_training": "corners", "multiclass": True, "prompted": False, "crop_size": None,
    }  # fmt: skip
    assert {key: value(parser, key) for key in wanted} == wanted
    assert parser["schedule"] == {"warmup": 250, "decay": "poly", "power": 0.9, "epochs": None}
    assert parser["strategy"]["decoder"] == "upscaling" and parser["strategy"]["masks"] == "random"
    assert parser["slices"]["picker"]["_target_"].endswith(".AllSlices")
    assert (parser["loss"]["ce"], parser["loss"]["dice"], parser["loss"]["class_weights"]) == (0.2, 0.8, None)
    assert parser["loss"]["focal"] == parser["loss"]["boundary"] == 0 and parser["augmentation"] == "published"
    parser["trained_spacing"] = None  # measured on the data, which are not here
    [window] = value(parser, "volume_transforms")[0].described
    assert [window[key] for key in ("a_min", "a_max", "b_min", "b_max", "clip")] == [-125.0, 275.0, 0.0, 1.0, True]


def test_adamw_warms_up_for_250_steps_and_decays_as_published(parser):
    optimizer, schedule = (value(parser, f"train::{name}") for name in ("optimizer", "lr_scheduler"))
    assert type(optimizer) is torch.optim.AdamW
    [group] = optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (0.1, (0.9, 0.999), 0.001)
    rates = []
    for _ in range(200 * 93):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.001 / 250) and max(rates) == rates[249] == rates[250] == 0.001
    for it in (251, 1000, 18_599):
        assert rates[it] == pytest.approx(0.001 * (1 - (it - 250) / 18_600) ** 0.9, rel=1e-9)


def test_no_test_case_and_no_validation_is_looked_at_in_training(parser):
    assert parser["train"]["dataset"]["data"].count("'training'") == 1
    assert value(parser, "validate::section") == "training" and "testing" not in CONFIG.read_text()
    handlers = parser["train"]["named_handlers"]
    assert handlers["validation"]["_target_"] == "ValidationHandler" and handlers["last"]["_target_"].endswith(
        "LastAdapter"
    )
    assert value(parser, "train::named_handlers::validation::interval") > value(parser, "epochs")
    assert value(parser, "train::named_handlers::last::output_dir") == value(parser, "output_dir")


def test_samed_stops_at_epoch_160_of_a_schedule_of_200(tmp_path):
    configs = build_bundle("abdomen", "samed", tmp_path) / "configs"
    train = json.loads((configs / "train.json").read_text(encoding="utf-8"))
    assert (train["epochs"], train["lr"], train["schedule"]["warmup"], train["schedule"]["power"]) == (
        160,
        0.005,
        250,
        0.9,
    )
    inference = json.loads((configs / "inference.json").read_text(encoding="utf-8"))
    for config in (train, inference):  # its README: trained on slices of 224; its test.py: 512 to 224 to 512
        assert (config["image_size"], config["store_size"], config["low_res_training"]) == (512, 224, "corners")
    readme = (configs.parent / "docs" / "README.md").read_text(encoding="utf-8")  # nobody validates: all 18 learn
    assert "--output data/synapse/datalist.json\n" in readme and "datalist.json --validation 3" not in readme
    total = train["train"]["lr_scheduler"]["total"]
    parser = ConfigParser({"total": total.replace("len(@train::dataloader)", "93")} | train)  # 2,211 slices by 24
    assert parser.get_parsed_content("total") == 200 * 93
    parser["schedule"]["epochs"] = None
    parser.parse(reset=True)
    assert parser.get_parsed_content("total") == 160 * 93

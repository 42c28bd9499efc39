"""Networks of MONAI as recipes: every task has them, all that learns gets a gradient, and they train by their demo."""

import json

import pytest
import torch
from monai.bundle import ConfigParser

from samseg_monai.bundles import build_bundle, recipe_names
from samseg_monai.bundles.build import compose, read_recipe, render
from samseg_monai.report.names import strategy_text
from samseg_monai.report.runs import RunResult
from samseg_monai.settings import demonstrated
from samseg_monai.workflow import run_workflow

TASK_OF = {  # each trains on one: of one class and several, of volumes and images
    "unet_plus_plus": "abdomen", "vnet": "meningioma", "attention_unet": "hippocampus", "unetr": "brain_tumour_t1c",
    "swin_unetr": "abdomen", "segresnet": "meningioma", "dynunet": "brain_tumour_t1c",
    "unet_3d": "meningioma", "unet_plus_plus_3d": "hippocampus", "vnet_3d": "hippocampus",
    "attention_unet_3d": "abdomen", "unetr_3d": "hippocampus", "swin_unetr_3d": "hippocampus",
    "segresnet_3d": "meningioma", "dynunet_3d": "abdomen",
}  # fmt: skip
IDLE = {"unet_plus_plus": "final_conv_0_", "unetr": "norm_cross_attn"}  # parts of MONAI's networks that nothing uses
LARGE = {"vnet_3d"}  # it has no width to choose


def test_all_are_recipes_that_the_tables_know_by_their_title():
    recipes = {name: read_recipe("strategies", name) for name in recipe_names("strategies")}
    plain = {name: recipe["network"] for name, recipe in recipes.items() if "network" in recipe}
    assert {name for name, net in plain.items() if "boxes" not in net} == {*TASK_OF, "unet", "ellipse"}
    assert {name: strategy_text(name) for name in TASK_OF} == {name: recipes[name]["title"] for name in TASK_OF}
    flat = {name: name.removesuffix("_3d") for name in TASK_OF}
    assert all(recipes[name]["references"] == recipes[other]["references"] for name, other in flat.items())
    assert all(recipes[name]["references"] != recipes["unet"]["references"] for name in set(flat.values()) - {"unet"})
    assert {name for name, net in plain.items() if net.get("spatial_dims") == 3} == {n for n in flat if n != flat[n]}


@pytest.mark.parametrize("strategy", TASK_OF)
def test_the_demo_is_small_and_all_that_learns_gets_a_gradient(strategy):
    deep = strategy.endswith("_3d")
    for task in [TASK_OF[strategy]] if deep else recipe_names("tasks"):
        settings = compose(task, strategy)
        small = demonstrated(settings)
        assert small.run.epochs <= 12 and deep == settings.sees_volumes
        assert deep or (small.run.image_size == 64 and settings.run.image_size == 256)
        files = render(settings)
        parser = ConfigParser({**json.loads(files["configs/train.json"]), "device": "cpu"})
        parser.update(json.loads(files["configs/demo.json"]))
        network = parser.get_parsed_content("network_def").train()
        learnt = {name: p for name, p in network.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in network.parameters()) < 10_000_000 or strategy in LARGE
        sides = [30, *small.run.patch[1:]] if deep else [60, 64]
        logits = network(torch.randn(2, network.scans, *sides))
        assert logits.shape == (2, network.channels_out, *sides)
        logits.square().mean().backward()
        assert [name for name, p in learnt.items() if p.grad is None] == []
        still = {name for name, p in network.named_parameters() if name not in learnt}
        idle = IDLE.get(strategy.removesuffix("_3d"), "?")
        assert still == set(network.fixed) and all(idle in name for name in still)
        assert bool(still) == (idle != "?") and network.owned == list(network.state_dict())


@pytest.mark.parametrize(("strategy", "task"), TASK_OF.items())
def test_it_trains_by_its_demo_and_is_evaluated(strategy, task, phantoms_of, tmp_path):
    configs = build_bundle(task, strategy, tmp_path / "bundles") / "configs"
    demo = configs / "demo.json"
    shared = {"dataset_dir": str(phantoms_of(task)), "output_dir": str(tmp_path), "batch_size": 4, "crop_mm": "$None"}
    run_workflow([configs / "train.json", demo], {**shared, "epochs": 1, "val_interval": 1})
    assert json.loads((tmp_path / "run_card.json").read_text())["status"] == "completed"
    lines = [line.split(",") for line in (tmp_path / "history.csv").read_text().splitlines()]
    assert [0 < float(value) < 20 for *_, name, value in lines if name == "train_loss"] == [True]
    run_workflow([configs / "inference.json", configs / "evaluate.json", demo], shared)
    result = RunResult.load(tmp_path / "evaluation")
    assert result.rows and result.card["sam_variant"] == "no SAM" and "no SAM" in result.title

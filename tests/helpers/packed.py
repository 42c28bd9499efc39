"""Bundles as ``samseg bundle pack`` leaves them, without the training: a random network of the smallest size."""

from pathlib import Path

import torch
from monai.bundle import ConfigParser

from samseg_monai.bundles import write_bundle
from samseg_monai.bundles.build import LARGE_FILES, compose, read_recipe
from samseg_monai.checkpoints import save_model
from samseg_monai.settings import dump_settings, merged, read_settings

SMALL = {"image_size": 64, "patch": [64, 32, 32], "crop_mm": None, "crop_size": None}


def fits(task: str, strategy: str) -> bool:
    """An ellipse has one class, and a box; a 2-D image has neither neighbours nor a third dimension."""
    recipe = read_recipe("tasks", task)
    boxed = len(recipe["classes"]) == 1 and recipe.get("run", {}).get("prompt", {}).get("source") != "none"
    made = read_recipe("strategies", strategy)
    deep = made.get("network", {}).get("spatial_dims") == 3 or made["method"].get("depth", 1) > 1
    return (boxed or strategy != "ellipse") and not (deep and recipe.get("kind") == "images")


def settings_of(task: str, strategy: str, **run):
    """Settings of two recipes with the smallest network that they allow; ``run`` are values of the run."""
    built = compose(task, strategy)
    small = {**SMALL, **({"sam_variant": "tiny"} if built.has_sam else {}), **run}
    changes = {"run": small, "demo": None}
    if built.strategy.method.name == "lora":
        changes["strategy"] = {"method": {"rank": 2}}
    if built.strategy.network is not None and built.demo is not None:
        changes["strategy"] = {"network": built.demo.network}
    return read_settings(merged(dump_settings(built), changes), "test")


def packed(task: str, strategy: str, folder: Path, **run) -> Path:
    """Folder of a packed bundle below ``folder``, its network random and with something in its adapter."""
    settings = settings_of(task, strategy, **run)
    root = write_bundle(settings, folder / settings.name)
    (root / LARGE_FILES).unlink()
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    network.load_base("random", start=False)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in network.owned and not name.startswith("side.net."):
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(network, root / "models" / "model.pt")
    return root

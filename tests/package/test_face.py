"""The package in Python: names that are read when asked for, strategies by name; what the command says of itself."""

import ast
import inspect
import json
import subprocess
import sys
from importlib.metadata import version
from pydoc import locate
from types import SimpleNamespace

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import samseg_monai as sm
from samseg_monai import bundles
from samseg_monai.bundles import build_bundle, recipe_names
from samseg_monai.cli import app
from samseg_monai.sam.weights import KNOWN
from samseg_monai.strategies import STRATEGIES

HEAVY = {"torch", "monai", "numpy", "pandas", "matplotlib", "nibabel"}


@pytest.mark.parametrize("module", ["samseg_monai", "samseg_monai.cli"])
def test_importing_reads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded and not HEAVY & set(loaded)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "task new mine --datalist nowhere.json --dataset-dir nowhere",
            "--dataset-dir: nowhere: no such file or folder",
        ),
        ("task new a/b --datalist nowhere.json", "'a/b' is no name of a task"),
        ("bundle build --task nowhere.json --strategy lora", "nowhere.json: no such file"),
        ("bundle build --task meningiom --strategy lora", "did you mean meningioma?"),
        ("find-lr nowhere", "BUNDLE: nowhere: no such file or folder"),
        ("train-cost nowhere", "BUNDLE: nowhere: no such file or folder"),
        ("bench --batches 1,a", "--batches: expected whole numbers"),
        ("bbox nowhere.json", "DATALIST: nowhere.json: no such file or folder"),
        ("reproduce honours --brats data", "samseg compare honours"),
    ],
)
def test_mistakes_in_paths_and_names_are_told_before_anything_heavy_is_read(words, said):
    code = (
        "import sys\nfrom samseg_monai.cli import main\n"
        "try: main()\nexcept SystemExit as end: print('code', end.code, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True, check=True)
    assert said in done.stderr and done.stdout.startswith("code 1 ")
    assert not {"torch", "monai"} & set(done.stdout.split())


def test_every_name_of_the_face_is_there():
    assert len(sm.__all__) > 40
    for name in sm.__all__:
        value = getattr(sm, name)
        assert name == "__version__" or (callable(value) and value.__doc__), name
    assert set(sm.__all__) <= set(dir(sm))
    with pytest.raises(AttributeError, match="no attribute 'LoRa'"):
        sm.LoRa  # noqa: B018


@pytest.mark.parametrize("module", [sm, bundles])
def test_editors_are_told_the_same_names(module):
    block = next(node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If))
    told = {alias.name: line.module for line in block.body for alias in line.names}
    assert told == module._MODULES and set(told) == set(module.__all__) - {"__version__"}
    assert all(getattr(module, name).__name__ == name for name in told)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_created_by_name_as_its_recipe_says(name, tmp_path):
    config = json.loads((build_bundle("meningioma", name, tmp_path) / "configs" / "inference.json").read_text())
    recipe = {key: value for key, value in config["strategy"].items() if key not in ("side", "random_masks")}
    network = sm.create(name, backbone="tiny")
    assert type(network.strategy) is locate(recipe.pop("_target_"))
    built = {**network.strategy.newer, **network.strategy.arguments()}
    recipe.pop("rank", None)
    assert {key: built[key] for key in recipe} == recipe
    assert network.spec.name == "tiny" and name in sm.list_strategies()


def test_the_other_recipes_have_no_sam():
    others = set(recipe_names("strategies")) - set(STRATEGIES)
    nets = {"unet", "unet_plus_plus", "vnet", "attention_unet", "unetr", "swin_unetr", "segresnet", "dynunet"}
    deep = {f"{name}_3d" for name in nets}
    assert others == {"unet_box", "unet_crop", "ellipse", "medsam", *nets, *deep}  # of medsam the weights are others


def test_arguments_go_to_the_strategy_and_to_the_network():
    network = sm.create("lora", backbone="tiny_t", rank=3, targets=["q"], image_size=128, num_classes=2, prompt="none")
    assert (network.strategy.rank, network.strategy.targets, network.image_size) == (3, ("q",), 128)
    assert network(torch.zeros(1, 1, 100, 128)).shape == (1, 3, 100, 128)
    built = sm.create(sm.LoRA(2, dora=True), "tiny")
    assert built.strategy.name == "dora"
    assert sm.create("ladder", "tiny", masks="random").strategy.masks == "random"


@pytest.mark.parametrize(
    ("strategy", "arguments", "words"),
    [
        ("lore", {}, ["'lore' (did you mean 'lora'?)", "ladder", "zero_shot"]),
        ("unet", {}, ["PlainSegmenter"]),
        ("lora", {"rnak": 4, "imagesize": 9}, ["rnak: unknown (did you mean 'rank'?)", "'image_size'", "rank, alpha"]),
        ("zero_shot", {"rank": 4}, ["rank: unknown", "the strategy takes random_masks"]),
        ("zero_shot", {"backbone": "vit_x"}, ["vit_b, medsam, vit_l, vit_h, vit_t, pico"]),
        (sm.LoRA(2), {"rank": 4}, ["LoRA(rank=2", "rank: unknown"]),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(strategy, arguments, words):
    with pytest.raises(sm.ConfigError) as error:
        sm.create(strategy, **arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_a_created_network_loads_weights_and_segments():
    network = sm.create("lora", backbone="pico", rank=2)
    network.load_base()
    image = torch.zeros(1, 1, 256, 256)
    image[..., 80:160, 96:180] = 3
    with torch.no_grad():
        mask = network(image, torch.tensor([[90.0, 75, 185, 165]]))[0, 0] > 0
        with sm.disable_adapter(network):
            plain = network(image, torch.tensor([[90.0, 75, 185, 165]]))[0, 0] > 0
    assert torch.equal(mask, plain) and mask[80:160, 96:180].float().mean() > 0.8


def test_the_command_knows_its_version_and_its_commands():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"samseg-monai {sm.__version__}\n")
    told = CliRunner().invoke(app, ["--help"]).stdout
    assert all(word in told for word in ("--install-completion", "predict", "bundle", "info"))


def test_every_command_and_option_has_a_help_text():
    def walk(command, name):
        assert (command.help or "").strip(), name
        for option in command.params:
            assert getattr(option, "help", None), f"{name} {option.name}"
        for word, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {word}")

    walk(get_command(app), "samseg")


def test_info_tells_versions_devices_weights_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMSEG_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mobile_sam.pt").write_bytes(b"cut off")
    done = CliRunner().invoke(app, ["info"])
    assert done.exit_code == 0, done.output
    told = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert f"monai {version('monai')}" in told["versions:"] and torch.__version__.split("+")[0] in told["versions:"]
    assert "processor:" in told and "not here; sam_vit_b_01ec64.pth, 375 MB" in told["vit_b"]
    assert "7 bytes, but the published file has 40,728,226" in told["vit_t"]
    assert str(tmp_path) in told["SAMSEG_WEIGHTS_DIR:"] and str(tmp_path / "cache") in told["cache:"]
    assert not (tmp_path / "cache").exists()


def test_info_tells_gpus_and_that_published_files_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMSEG_WEIGHTS_DIR", str(tmp_path))
    size = KNOWN["vit_t"].size
    with (tmp_path / KNOWN["vit_t"].name).open("wb") as stream:
        stream.truncate(size)  # sparse: takes no room
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H100")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=80 * 10**9))
    told = CliRunner().invoke(app, ["info"]).stdout
    assert "GPU cuda:0: H100, 80 GB\n" in told and f"vit_t    {tmp_path / 'mobile_sam.pt'}\n" in told


def test_shells_can_complete_commands(monkeypatch):
    monkeypatch.setenv("_SAMSEG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "samseg pre")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = CliRunner().invoke(app, [], prog_name="samseg")
    assert done.stdout.split() == ["predict", "prepare"] or done.stdout.split() == ["prepare", "predict"]

"""What MONAI's model zoo asks of a bundle (``ci/verify_bundle.py`` of Project-MONAI/model-zoo), of every kind of ours.

Its full mode goes through directory, version, metadata, properties, the network's input and output, and TorchScript;
the steps themselves are commands of ``monai.bundle``. TorchScript of SAM it does not ask for: such networks are on its
lists of exclusions (vista2d, vista3d).
"""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, create_workflow, verify_metadata, verify_net_in_out

from samseg_monai.bundles import recipe_names
from samseg_monai.bundles.build import LARGE_FILES, read_recipe, render
from samseg_monai.errors import ConfigError
from samseg_monai.export import obstacles
from samseg_monai.networks import PlainSegmenter
from tests.docs.test_docs import commands
from tests.helpers.packed import fits, packed, settings_of

PAGE = Path(__file__).parents[2] / "docs" / "bundles.md"
UNSCRIPTED = dict.fromkeys(
    ("swin_unetr", "swin_unetr_3d"), "SwinUNETR as it is written; trace it"
)  # by MONAI's own code
NECESSARY = ("LICENSE", "configs/metadata.json", "configs/inference.json", "configs/logging.conf", "docs/README.md",
             "models/model.pt")  # fmt: skip


UNTRAINED_MASKS = (
    "zero_shot", "bias", "norm", "attention", "ssf", "fact", "adapter", "adaptformer", "medsa", "lora", "lora_late_50",
    "lora_late_25", "lora_late_8", "medsam",
)  # fmt: skip


PAIRS = [(t, s) for t in recipe_names("tasks") for s in recipe_names("strategies") if fits(t, s)]
RUN = [
    (t, s) for t, s in PAIRS if t == "hippocampus" or not s.endswith("_3d")
]  # of volumes one task, as they take long


def test_every_kind_of_bundle_is_among_them():
    assert len(PAIRS) >= 4 * 21 - 2 and len(RUN) >= 4 * 21 - 2


@pytest.mark.realdata
@pytest.mark.parametrize(("task", "strategy"), PAIRS)
def test_metadata_fit_the_schema_that_they_name(task, strategy, realdata, tmp_path):
    text = render(settings_of(task, strategy))["configs/metadata.json"]
    (tmp_path / "metadata.json").write_text(text, encoding="utf-8")
    name = json.loads(text)["schema"].rpartition("/")[2]
    (tmp_path / name).write_bytes((realdata / "monai" / name).read_bytes())
    verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(tmp_path / name))


@pytest.mark.parametrize(("task", "strategy"), RUN)
def test_a_packed_bundle_is_what_the_zoo_asks_for(task, strategy, phantoms_of, tmp_path):
    if strategy in UNTRAINED_MASKS and len(read_recipe("tasks", task)["classes"]) > 1:
        with pytest.raises(ConfigError, match="predictions would be noise"):  # no masks of several classes are learnt
            packed(task, strategy, tmp_path)
        return
    root = packed(task, strategy, tmp_path)
    assert [name for name in NECESSARY if not (root / name).is_file()] == []
    assert not (root / LARGE_FILES).exists()  # all of which would be downloaded first
    config, meta = str(root / "configs" / "inference.json"), str(root / "configs" / "metadata.json")
    metadata = json.loads(Path(meta).read_text(encoding="utf-8"))
    assert metadata["version"] in metadata["changelog"]
    where = {"config_file": config, "meta_file": meta, "bundle_root": str(root)}
    logging = str(root / "configs" / "logging.conf")
    data = {"dataset_dir": str(phantoms_of(root.name) / "unlabelled"), "output_dir": str(tmp_path / "out")}
    workflow = create_workflow(workflow_type="infer", logging_file=logging, **where, **data)
    assert workflow.check_properties() == []
    slabs = pytest.raises(ConfigError, match="neighbours in slabs of 4")  # MONAI gives it a single image
    deep = strategy.endswith("_3d")
    with slabs if strategy == "medsa" else nullcontext():
        verify_net_in_out("network_def", device="cpu", **where)
        verify_net_in_out("network_def", device="cpu", any=24 if deep else 40, **where)
    parser = ConfigParser()
    parser.read_config(config)
    network = parser.get_parsed_content("network_def")
    state = torch.load(root / "models" / "model.pt", weights_only=True)
    network.load_state_dict(state)
    scripted = root / "models" / "verify_model.ts"
    if network.prompt == "none" and isinstance(network, PlainSegmenter) and strategy not in UNSCRIPTED:
        ckpt_export("network_def", filepath=str(scripted), **where)
        exported = torch.jit.load(scripted)
        for size in ((2, 64, 32, 32), (1, 40, 23, 32)) if deep else ((2, 64, 64), (1, 40, 33)):
            image = torch.randn(size[0], network.scans, *size[1:])
            torch.testing.assert_close(exported(image), network(image))
        with pytest.raises(Exception, match="longer than image_size"):
            exported(torch.zeros(1, network.scans, 65, 64, *([32] if deep else [])))
        return
    told = "box" if network.prompt == "box" else UNSCRIPTED.get(strategy, "--use_trace True")
    with pytest.raises(ConfigError, match=told):
        ckpt_export("network_def", filepath=str(scripted), **where)
    assert bool(obstacles(network)["ckpt_export"]) == (network.prompt == "box") and not scripted.exists()


@pytest.mark.parametrize(("task", "strategy"), [("meningioma", "lora"), ("meningioma", "unet_box")])
def test_a_network_that_takes_boxes_is_not_traced_without_them(task, strategy, tmp_path):
    root = packed(task, strategy, tmp_path)
    where = {"config_file": str(root / "configs" / "inference.json"), "bundle_root": str(root)}
    with pytest.raises(ConfigError, match="boxes would be no input of the result"):
        ckpt_export("network_def", use_trace=True, input_shape=[1, 4, 64, 64], **where)
    assert not (root / "models" / "model.ts").exists()


@pytest.mark.realdata
def test_commands_of_the_page_run(realdata, tmp_path, monkeypatch):
    root = packed("abdomen", "ladder", tmp_path)
    name = json.loads((root / "configs" / "metadata.json").read_text(encoding="utf-8"))["schema"].rpartition("/")[2]
    (tmp_path / "schema.json").write_bytes((realdata / "monai" / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    run = [words for line in commands(PAGE) if (words := shlex.split(line))[:3] == ["python", "-m", "monai.bundle"]]
    assert [words[3] for words in run] == ["verify_metadata", "verify_net_in_out"]
    for _, _, _, command, *words in run:
        first = [words.pop(0)] if len(words) % 2 else []
        options = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
        getattr(monai.bundle, command)(*first, **options)

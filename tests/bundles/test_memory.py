"""Out of memory names the settings that save most: in the measured order, as they are typed, none that is set."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from samseg_monai.bundles import build_bundle
from samseg_monai.bundles.memory import BETTER, COSTS, MEASURED, kind_of, saving
from samseg_monai.bundles.running import configured
from samseg_monai.cli.places import overrides_of
from samseg_monai.faults import explain, out_of_memory

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "memory_settings.json").read_text(encoding="utf-8"))
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workflow of a built bundle that is about to run with overrides."""
    folder = tmp_path_factory.mktemp("bundles")

    def make(strategy, overrides=(), task="meningioma", config="train"):
        bundle = build_bundle(task, strategy, folder)
        return configured([bundle / "configs" / f"{config}.json"], dict(overrides))

    return make


def keys(text):
    """What is named, in its order, without values."""
    return re.findall(r"--([\w:]+) [^-]*?\(", text)


def typed(text):
    return re.findall(r"(--.*?) \(\d+%", text)


def test_what_is_told_is_what_was_measured():
    rows = {(row["learns"], row["setting"]): row for row in FOUND["rows"]}
    for kind, settings in MEASURED.items():
        for name, (left, time) in settings.items():
            assert left == pytest.approx(rows[kind, name]["memory_ratio"], abs=0.02), (kind, name)
            assert name == "batch_size" or time == pytest.approx(rows[kind, name]["ratio"], abs=0.05), (kind, name)
            assert name in {*BETTER, *COSTS}
        known = {name for learns, name in rows if learns == kind} - {"", "sam_variant", "autocast"}
        assert all(rows[kind, name]["memory_ratio"] > 0.97 for name in known - {*settings})
    base = {row["learns"] for row in FOUND["rows"]}
    assert base == set(MEASURED)


@pytest.mark.parametrize(
    ("strategy", "task", "kind"),
    [
        ("lora", "meningioma", "encoder"),
        ("full", "meningioma", "all of SAM"),
        ("ladder", "abdomen", "frozen encoder"),
        ("decoder", "meningioma", "frozen encoder"),
        ("unet", "meningioma", "without SAM"),
    ],
)
def test_each_kind_of_training_has_an_order_of_its_own(strategy, task, kind, run):
    found = run(strategy, {"batch_size": 4}, task)
    assert kind_of(found) == kind
    told = saving(found, on_gpu=False)
    left = [100 - int(percent) for percent in re.findall(r"\((\d+)% less memory", told)]
    assert 1 <= len(left) <= 3 and left == sorted(left)
    best = sorted(MEASURED[kind].values())[: len(left)]
    assert left == [round(100 * part) for part, _ in best]
    for words in typed(told):  # each can be typed as it stands, and is not named again
        again = run(strategy, {"batch_size": 4, **overrides_of(shlex.split(words))}, task)
        key = words.split()[0]
        assert key in ("--image_size", "--batch_size") or key not in saving(again, on_gpu=False)


def test_the_values_are_those_that_help(run):
    told = saving(run("lora", {"batch_size": 6, "accumulation_steps": 2, "strategy::blocks": [3]}), on_gpu=False)
    assert typed(told) == ["--image_size 512", "--checkpointing True", "--batch_size 3 --accumulation_steps 4"]
    told = saving(run("lora", {"image_size": 128, "checkpointing": True, "sam_variant": "vit_h"}), on_gpu=False)
    assert typed(told) == ['--strategy::blocks "[30, 31]"', "--rectangular True"]
    assert "--rectangular" not in saving(run("lora", {"crop_size": [64, 64], "image_size": 64}), on_gpu=False)
    told = saving(run("lora_late_25", {}), on_gpu=False)  # it refuses numbers of blocks beside the fraction
    assert typed(told) == ["--image_size 512", "--checkpointing True", "--rectangular True"]
    told = saving(run("lora", {"batch_size": 1, "checkpointing": True, "strategy::blocks": [1]}), on_gpu=True)
    assert typed(told) == ["--image_size 512", "--autocast bf16", "--rectangular True"]


def test_processes_and_slices_in_memory_are_told_by_what_they_take(run, monkeypatch):
    monkeypatch.setattr("samseg_monai.bundles.memory.peak_memory", lambda: 4e9)
    found = run("unet", {"batch_size": 1, "image_size": 128, "slices::num_workers": 8})
    assert typed(saving(found, on_gpu=False)) == ["--slices::num_workers 0"]
    assert "num_workers" not in saving(found, on_gpu=True)

    class Slices:
        def cache_bytes(self):
            return 3e9

    found.parser.ref_resolver.resolved_content["train::dataset"] = Slices()
    told = saving(found, on_gpu=False)
    assert told.startswith("what saves most here: --slices::cache disk --slices::cache_dir FOLDER (75% less memory, ")
    disk = run("unet", {"slices::cache": "disk", "slices::cache_dir": "x"})
    assert "slices::cache" not in saving(disk, on_gpu=False)


def test_a_validation_and_a_prediction_take_smaller_batches(run):
    told = saving(run("lora"), on_gpu=False, validating=True)
    assert "--val_batch_size 2 (8% less memory, in the same time)" in told and "--batch_size" not in told
    told = saving(run("lora", {"batch_size": 8}, config="inference"), on_gpu=False)
    assert told.startswith(
        "what saves most here: --image_size 512 (10% less memory, 30% of the time, small things are "
    )
    assert (
        "lost, other masks), or --batch_size 4 (" in told and "accumulation" not in told and "checkpointing" not in told
    )


def test_where_nothing_is_left_to_set_another_machine_is():
    class Found:
        kind, config = "train", {"strategy": {}}

        class parser:
            get = staticmethod(lambda name: None)
            ref_resolver = type("Resolver", (), {"resolved_content": {}})

    assert saving(Found(), on_gpu=False).startswith("end other programs")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_of_the_memory_is_told_with_the_settings(error, run):
    found = run("lora", {"batch_size": 4})
    on_gpu = []

    def memory(gpu):
        on_gpu.append(gpu)
        return saving(found, gpu)

    try:
        raise ValueError("wrapped by a library") from error
    except ValueError as wrapped:
        assert out_of_memory(wrapped)
        told = explain(wrapped, memory=memory)
    assert told.code == 1 and told.text.count("\n") == 0 and on_gpu == [isinstance(error, torch.OutOfMemoryError)]
    assert "; what saves most here: --" in told.text and len(typed(told.text)) == 3
    assert not out_of_memory(ValueError("no room"))

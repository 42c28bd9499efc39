"""Seconds per epoch, and to the same validation Dice: the ladder with stored embeddings against LoRA with decoder.

SAM-LST claims 30 to 40 % less training time than other ways of fine-tuning. LoRA of rank 4 on q and v with a trained
mask decoder is the nearest to SAMed here. Both bundles train on the same abdominal phantoms with pico SAM, prompt-free,
same slices, loss, batch and image size; the time to fill the bank of embeddings counts for the ladder. Validation
is not timed. One run each: epochs are repeated within it, seeds are not. Usage:

    python benchmarks/ladder_epoch.py --epochs 10
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from ignite.engine import Events
from measuring import record
from monai.bundle import ConfigWorkflow

from samseg_monai.bundles import build_bundle
from samseg_monai.data.datalists.synapse import prepare_synapse
from samseg_monai.demo.abdomen_phantoms import write_btcv_cases

LORA = {
    "strategy::rank": 4,
    "strategy::decoder": True,
    "lr": 0.001,
    "slices::picker": {"_target_": "samseg_monai.data.slices.AllSlices"},
    "low_res_training": True,
}


def train(strategy: str, data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one bundle; seconds of each epoch, of what came before, and validation Dice after each epoch."""
    bundle = build_bundle("abdomen", strategy, folder / "bundles")
    configs = [str(bundle / "configs" / name) for name in ("train.json", "demo.json")]
    shared = {
        "dataset_dir": str(data), "output_dir": str(folder / strategy), "epochs": options.epochs, "val_interval": 1,
        "batch_size": options.batch, "seed": 0, "image_size": options.size, "early_stop": None,
    }  # fmt: skip
    extra = LORA if strategy == "lora" else {"embeddings::cache_dir": str(folder / "embeddings")}
    workflow = ConfigWorkflow(config_file=configs, workflow_type="train", **shared, **extra)
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train::trainer")
    marks: dict[str, Any] = {"epochs": [], "dice": []}

    def begin(engine: Any) -> None:
        marks.setdefault("before", time.perf_counter() - began)
        marks["start"] = time.perf_counter()

    def iteration(engine: Any) -> None:
        marks["last"] = time.perf_counter()

    def validated(engine: Any) -> None:
        marks["epochs"].append(marks["last"] - marks["start"])
        marks["dice"].append(float(engine.state.metrics["val_dice"]))

    trainer.add_event_handler(Events.EPOCH_STARTED, begin)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, iteration)
    evaluator = workflow.parser.get_parsed_content("validate::evaluator")
    evaluator.add_event_handler(Events.COMPLETED, validated)
    began = time.perf_counter()
    workflow.run()
    return marks


def until(marks: dict[str, Any], target: float) -> tuple[float, int]:
    """Seconds of training (and of filling the bank) and epochs until validation Dice first reaches ``target``."""
    epoch = next(i for i, dice in enumerate(marks["dice"]) if dice >= target)
    return marks["before"] + sum(marks["epochs"][: epoch + 1]), epoch + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "phantoms"
        write_btcv_cases(data, options.cases)
        prepare_synapse(data, data / "datalist.json", validation=2, allow_missing=True, progress=False)
        runs = {strategy: train(strategy, data, folder, options) for strategy in ("ladder", "lora")}
    target = min(max(marks["dice"]) for marks in runs.values())
    reached = {strategy: until(marks, target) for strategy, marks in runs.items()}
    epoch = {strategy: statistics.median(marks["epochs"]) for strategy, marks in runs.items()}
    record(
        "ladder_epoch_vs_lora",
        {
            "ratio": round(epoch["lora"] / epoch["ladder"], 2),  # times faster, per epoch
            "ratio_to_same_dice": round(reached["lora"][0] / reached["ladder"][0], 2),
            "memory_ratio": None,  # both run in this process; see ladder_step
            "reference_s": round(epoch["lora"], 2),
            "ours_s": round(epoch["ladder"], 2),
            "less_time_percent": round(100 * (1 - epoch["ladder"] / epoch["lora"]), 1),
            "target_val_dice": round(target, 4),
            "seconds_to_target": {name: round(value[0], 1) for name, value in reached.items()},
            "epochs_to_target": {name: value[1] for name, value in reached.items()},
            "seconds_before_first_epoch": {name: round(marks["before"], 1) for name, marks in runs.items()},
            "val_dice": {name: [round(d, 4) for d in marks["dice"]] for name, marks in runs.items()},
            "data": f"{options.cases} abdominal phantoms, 2 of the training cases validate",
            "sam": "pico, not SAM",
            "image_size": options.size,
            "batch_size": options.batch,
            "seed": 0,
        },
    )


if __name__ == "__main__":
    main()

"""Train and test on MSD Task04 (hippocampus): U-Net without SAM, the ladder, and both of its halves alone.

Volumes are split by sorted name into 128 training, 30 validation (choose the epoch) and 40 test volumes; the set does
not tell which volumes share a subject. pico SAM, 128 pixels, no prompts; the CNN starts at random.
Writes ``results/hippocampus_<row>.json``: numbers only. Usage, for a folder with ``images`` and ``labels``:

    python benchmarks/hippocampus.py --src DIR --output RUNS --seed 0
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from measuring import machine

from samseg_monai.bundles import build_bundle
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.metrics import aggregate, read_rows
from samseg_monai.workflow import run_workflow

RESULTS = Path(__file__).parents[1] / "results"
LABELS = {"1": "anterior", "2": "posterior"}
COUNTS = (128, 30, 40)
# crop: the largest volume is 42 x 59; the ladder's CNN is half as wide as ResNet18, for the sake of two CPU cores
NARROW = {"_target_": "samseg_monai.adapters.ResNetSide", "width": 32}
LADDER: dict[str, Any] = {
    "crop_size": [48, 64], "rectangular": True, "low_res_training": False, "batch_size": 16,
    "epochs": 10, "val_interval": 5, "lr": 0.002, "embeddings::variants": 2,
}  # fmt: skip
UNET = {"epochs": 8, "val_interval": 4, "lr": 0.003}
SAM_ONLY = {"_target_": "samseg_monai.strategies.Ladder", "mix": "sam", "decoder": "masks", "masks": "sam"}
CNN_ONLY = {**SAM_ONLY, "side": NARROW, "mix": "side", "side_weights": "random"}
# row -> bundle and what it changes; the halves differ from the ladder by nothing but the mix
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", UNET),
    "ladder": ("ladder", {**LADDER, "strategy::side_weights": "random", "strategy::side": NARROW}),
    "sam_only": ("ladder", {**LADDER, "strategy": SAM_ONLY}),
    "cnn_only": ("ladder", {**LADDER, "strategy": CNN_ONLY}),
}


def train(row: str, options: argparse.Namespace) -> None:
    """Train and evaluate one row into its own folder."""
    strategy, changes = ROWS[row]
    bundle = build_bundle("hippocampus", strategy, options.output / "bundles") / "configs"
    shared = {"dataset_dir": str(options.src), "datalist": str(options.output / "datalist.json"), "seed": options.seed}
    overrides = {
        **shared,
        "output_dir": str(options.output / row),
        "slices::num_workers": 1,
        **changes,
    }
    if strategy == "ladder":  # all its rows see the same looks of the same slices
        overrides["embeddings::cache_dir"] = str(options.output / "embeddings")
    for config in ("train.json", "evaluate.json"):
        run_workflow([bundle / config, bundle / "demo.json"], overrides)


def collect(row: str, output: Path) -> dict[str, Any]:
    """Numbers of one finished row, from its own files."""
    run = output / row
    cards = {"train": run / "run_card.json", "test": run / "evaluation" / "run_card.json"}
    training, test = (json.loads(path.read_text(encoding="utf-8")) for path in cards.values())
    rows = read_rows(run / "evaluation" / "cases.csv")
    scores = aggregate(rows)
    return {
        "name": f"hippocampus_{row}",
        "dice_mean": scores["dice_mean"],
        **{f"dice_{name}": scores[f"{name}_dice_mean"] for name in LABELS.values()},
        "hd95_mm_mean": scores["hd95_mm_mean"],
        "n": scores["n"],
        "seed": training["seed"],
        "settings": {key: training["settings"].get(key) for key in ("epochs", "lr", "batch_size", "image_size")},
        "sam": "no SAM" if row == "unet" else "pico, not SAM",
        "gate": training.get("gate"),
        "strategy": training["strategy"],
        "trainable_parameters": training["trainable_parameters"],
        "status": training["status"],  # "running": cut off; the best epoch until then was tested
        "epochs": training.get("epochs"),
        "best_validation": training.get("best"),
        "seconds_training": training.get("seconds"),
        "seconds_test": test["seconds"],
        "prompt_source": test["prompt_source"],
        "policy": "honest",
        "split": "volumes by sorted name, 128 training, 30 validation, 40 test; subjects unknown",
        "data_hash": training["data_hash"],
        "versions": training["versions"],
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", type=Path, required=True, help="folder with images and labels")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--collect", action="store_true", help="only read runs that are finished")
    options = parser.parse_args()
    if not options.collect:
        prepare_folders(options.src, options.output / "datalist.json", labels=LABELS, counts=COUNTS)
    for row in options.rows:
        began = time.monotonic()
        if not options.collect:
            train(row, options)
        result = collect(row, options.output)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"hippocampus_{row}_seed{options.seed}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"{row}: Dice {result['dice_mean']:.4f}, {time.monotonic() - began:.0f} s, {path.name}")


if __name__ == "__main__":
    main()

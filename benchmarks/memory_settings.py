"""What each setting saves of a training's memory, and costs in time: the order in which "out of memory" names them.

Each row is measured in a process of its own by what ``samseg train-cost`` measures with; slices are random, of one
scan. ``memory_ratio`` and ``ratio`` are those of the peak, libraries included, and of a step (or predicted slice) with
the setting to those without it, in processor seconds.
"""

from __future__ import annotations

from typing import Any

from measuring import record

from samseg_monai.cli.costs import measured

ENCODER = {
    "batch_size": {"batch_size": 1},
    "image_size": {"image_size": 256},
    "checkpointing": {"checkpointing": True},
    "strategy::blocks": {"strategy::blocks": [10, 11]},
    "rectangular": {"rectangular": True},
    "autocast": {"autocast": "bf16"},
    "sam_variant": {"sam_variant": "vit_t"},
}
BASE = {"sam_variant": "vit_b", "image_size": 512, "batch_size": 2}
TRAINED = {**BASE, "val_batch_size": 1}
# what a run learns -> task, strategy, settings without, and each setting with
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "encoder": ("meningioma", "lora", {**TRAINED, "scans": ["t1c"]}, ENCODER),
    "all of SAM": (
        "meningioma", "full", {**TRAINED, "scans": ["t1c"]},
        {key: ENCODER[key] for key in ("batch_size", "checkpointing")},
    ),
    "frozen encoder": (
        "abdomen", "ladder", TRAINED,
        {
            **{key: ENCODER[key] for key in ("batch_size", "image_size", "checkpointing", "autocast", "sam_variant")},
            "embeddings::cache_dir": {"embeddings::cache_dir": "FOLDER"},
        },
    ),
    "without SAM": (
        "meningioma", "unet", {"image_size": 512, "batch_size": 4},
        {"batch_size": {"batch_size": 2}, "image_size": {"image_size": 256}},
    ),
    "prediction": (
        "meningioma", "zero_shot", {**BASE, "scans": ["t1c"]},
        {key: ENCODER[key] for key in ("batch_size", "image_size", "autocast", "sam_variant", "rectangular")},
    ),
}  # fmt: skip


def main() -> None:
    """Measure all rows and write ``results/memory_settings.json``."""
    rows = []
    for learns, (task, strategy, base, settings) in CASES.items():
        without: dict[str, Any] = {}
        for name, overrides in {"": {}, **settings}.items():
            job = {"task": task, "strategy": strategy, "steps": 1, "overrides": {**base, **overrides}}
            found = measured(job, limit=900)
            if "failed" in found:
                raise SystemExit(f"{learns}, {name or 'without'}: {found['told']}")
            unit = "step" if "seconds_per_step" in found else "slice"
            row = {"seconds": found[f"processor_seconds_per_{unit}"], "gb": found["peak_gb"]}
            without = without or row
            ratios = {"ratio": row["seconds"] / without["seconds"], "memory_ratio": row["gb"] / without["gb"]}
            rows.append({"learns": learns, "setting": name, "overrides": overrides, **row, **ratios})
            print(rows[-1], flush=True)
    record("memory_settings", {"base": {name: case[:3] for name, case in CASES.items()}, "rows": rows})


if __name__ == "__main__":
    main()

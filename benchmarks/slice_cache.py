"""How much memory the picked slices of BraTS-sized cases need: the promise is 680 cases of ``MaxArea`` in 1 GB.

Cases have the real size, 240 x 240 x 155 voxels and four scans, made of noise in place; they go through the crop and
normalisation of the meningioma task. Writes benchmarks/results/slice_cache.json:

    python benchmarks/slice_cache.py --cases 4
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.transforms import NormalizeIntensityd, ResizeWithPadOrCropd

from samseg_monai.data.slices import MaxArea, SliceDataset
from samseg_monai.files import write_json
from samseg_monai.transforms import SimulatedPromptd

SIZE = (240, 240, 155)  # voxels, BraTS 2023
SCANS = 4
CROP = (138, 202, -1)  # of the honours paper
CASES_OF_THE_PAPER = 680  # its training split
LIMIT_GB = 1.0
RESULT = Path(__file__).parent / "results" / "slice_cache.json"


class MakeCase:
    """Stands for loading: {"case", "seed"} to noise in four scans with a label ball in it."""

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(item["seed"])
        image = rng.random((SCANS, *SIZE), dtype=np.float32)
        centre = [rng.integers(size // 3, 2 * size // 3) for size in SIZE]
        distance = sum(
            (axis - middle) ** 2 for axis, middle in zip(np.ogrid[tuple(map(slice, SIZE))], centre, strict=True)
        )
        label = (distance < rng.integers(8, 30) ** 2).astype(np.uint8)[None]
        return {"case": item["case"], "image": torch.from_numpy(image), "label": torch.from_numpy(label)}


def resident_bytes() -> int:
    """Physical memory of this process, bytes; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def measure(cases: int) -> dict[str, Any]:
    """Build the dataset and take its memory: whole storages behind the tensors, which grow with the number of cases.

    The process grows by more, because the allocator keeps freed memory of the volumes; that part does not grow so.
    """
    transforms: list[Callable[[Any], Any]] = [
        MakeCase(),
        ResizeWithPadOrCropd(["image", "label"], spatial_size=CROP),
        NormalizeIntensityd("image", channel_wise=True),
        SimulatedPromptd(loosen=(0.0, 0.3), seed=0),
    ]
    items = [{"case": f"case-{i}", "seed": i} for i in range(cases)]
    SliceDataset(items[:1], transforms, picker=MaxArea(), num_threads=1, progress=False)  # what is paid once only
    gc.collect()
    before, start = resident_bytes(), time.perf_counter()
    dataset = SliceDataset(items, transforms, picker=MaxArea(), num_threads=1)
    seconds = time.perf_counter() - start
    gc.collect()
    assert len(dataset) == cases
    per_case = dataset.cache_bytes() / cases
    return {
        "name": "slice_cache",
        "cases_measured": cases,
        "bytes_per_case": round(per_case),
        "gb_for_680_cases": round(per_case * CASES_OF_THE_PAPER / 1e9, 4),
        "whole_volume_bytes_per_case": SCANS * int(np.prod(SIZE)) * 4,
        "process_growth_bytes": resident_bytes() - before,
        "seconds_per_case": round(seconds / cases, 2),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "monai": monai.__version__,
            "numpy": np.__version__,
        },
    }


def main() -> None:
    """Measure, write the result and fail if the promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=4, help="number of cases to build (default: 4)")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file to write")
    arguments = parser.parse_args()
    result = measure(arguments.cases)
    write_json(arguments.output, result)
    print(json.dumps(result, indent=2))
    if result["gb_for_680_cases"] >= LIMIT_GB:
        raise SystemExit(f"{CASES_OF_THE_PAPER} cases would need {result['gb_for_680_cases']} GB, more than {LIMIT_GB}")


if __name__ == "__main__":
    main()

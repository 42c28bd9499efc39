"""What a validation of BraTS-sized volumes costs: read anew, kept in memory, and of picked slices alone.

A phantom of 240 x 240 x 155 voxels and four scans is validated by the bundle's own evaluator (LoRA, random weights;
handlers that save and draw are left out), all ways in turn, in processor seconds of one thread. Writes
benchmarks/results/validation.json:

    python benchmarks/validation.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import alternate, record
from monai.bundle import ConfigWorkflow
from monai.data import CacheDataset

from samseg_monai.bundles import build_bundle
from samseg_monai.data.datalists.brats import prepare_brats_men
from samseg_monai.demo.brain_phantoms import write_brats_cases

SHAPE = (240, 240, 155)
NETWORKS: dict[str, dict[str, Any]] = {
    "pico, 256 px, 4 scans": {"sam_variant": "pico", "image_size": 256},
    "vit_t, 512 px, 1 scan": {"sam_variant": "vit_t", "image_size": 512, "scans": ["t1c"]},
}
PICKERS = "samseg_monai.data.slices"
WAYS: dict[str, dict[str, Any]] = {
    "read anew": {"slices::volume_cache_rate": 0.0},
    "kept": {},
    "every fourth slice": {"validation::picker": {"_target_": f"{PICKERS}.EveryNth", "n": 4}},
    "one slice": {"validation::picker": {"_target_": f"{PICKERS}.MaxArea"}},
}


def workflow(train: Path, data: Path, output: Path, overrides: dict[str, Any]) -> Any:
    """The parsed config of a training whose validation has metrics and no other handlers."""
    places = {"dataset_dir": str(data), "output_dir": str(output)}
    made = ConfigWorkflow(
        str(train), workflow_type="train", logging_file=False, **places, **{"validate::named_handlers": {}}, **overrides
    )
    made.initialize()
    torch.manual_seed(0)
    made.parser.get_parsed_content("network_def").load_base("random")
    return made.parser


def measure(train: Path, data: Path, folder: Path, names: list[str], repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        overrides = NETWORKS[name]
        parsers = {way: workflow(train, data, folder / "run", {**overrides, **more}) for way, more in WAYS.items()}
        runs = {way: parser.get_parsed_content("validate::evaluator") for way, parser in parsers.items()}
        seconds = alternate({way: engine.run for way, engine in runs.items()}, repeats, time.process_time)
        scores = [runs[way].state.metrics for way in ("read anew", "kept")]
        assert scores[0] == scores[1], scores  # not a bit differs
        kept = {way: parser.get_parsed_content("validate::dataset").cache_bytes for way, parser in parsers.items()}
        found[name] = {"seconds_per_case": seconds, "bytes_per_case": kept}
    return found


def loading(train: Path, data: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Getting a case without any network: MONAI's way of keeping it beside ours."""
    parser = workflow(train, data, folder / "run", {"slices::volume_cache_rate": 0.0})
    ours = workflow(train, data, folder / "run", {}).get_parsed_content("validate::dataset")
    plain = parser.get_parsed_content("validate::dataset")
    cached = CacheDataset(plain.data, plain.transform, progress=False)
    ways = {"read anew": plain, "KeptVolumes": ours, "CacheDataset": cached}

    def get(dataset: Any) -> Callable[[], Any]:
        return lambda: dataset[0]

    seconds = alternate({way: get(dataset) for way, dataset in ways.items()}, repeats, time.process_time)
    whole = sum(value.nbytes for value in cached._cache[0].values() if isinstance(value, torch.Tensor))
    sizes = {"KeptVolumes": ours.cache_bytes, "CacheDataset": whole}
    return {"seconds_per_case": seconds, "bytes_per_case": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    repeats = options.repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "data"
        write_brats_cases(data, 3, shape=SHAPE, seed=1, progress=False)
        prepare_brats_men(data, data / "datalist.json", fractions=(0.34, 0.33, 0.33), seed=0)
        train = build_bundle("meningioma", "lora", folder / "bundles") / "configs" / "train.json"
        loads = loading(train, data, folder, repeats)
        networks = measure(train, data, folder, options.networks, repeats)
    first = next(iter(networks.values()))["seconds_per_case"]
    record(
        "validation",
        {
            "volume": list(SHAPE),
            "repeats": repeats,
            "networks": networks,
            "loading": loads,
            "ratio": round(first["read anew"] / first["kept"], 2),
            "ratios": {way: round(first["read anew"] / seconds, 2) for way, seconds in first.items()},
            "memory_ratio": round(loads["bytes_per_case"]["KeptVolumes"] / loads["bytes_per_case"]["CacheDataset"], 3),
        },
    )


if __name__ == "__main__":
    main()

"""Seconds of ``samseg predict`` on one case by what they are spent on, with a bundle in a ZIP, imports done; memory.

The bundle is one of ViT-B with LoRA and all weights, random ones, as ``samseg bundle pack`` writes it; the case a CT of
512 x 512 voxels and 30 slices. Each run has a process of its own with one thread, which has predicted a tiny case with
a tiny network before, so that nothing is left to be imported. Runs of this checkout and of another one (``--before``)
alternate. In the first of each the encoder is at work; in the others, which are there for all else, it gives zeros.
Writes benchmarks/results/predict_one_case.json:

    python benchmarks/predict_one_case.py --before CHECKOUT
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZE, SLICES, REPEATS = 512, 30, 3
# function -> what its time is spent on, without what it calls of the others here; those with "!" keep all of it
PHASES = {
    "samseg_monai.bundles.archive:BundleFiles.changed": "check sums and unpack",
    "samseg_monai.bundles.archive:BundleFiles.copy": "check sums and unpack",
    "samseg_monai.bundles.door:write_bundle": "write and read configs",
    "samseg_monai.bundles.door:differences": "write and read configs",
    "samseg_monai.bundles.running:guard": "write and read configs",
    "samseg_monai.bundles.running:configured": "write and read configs",
    "samseg_monai.bundles.door:Opened.check": "compare network and weights!",
    "samseg_monai.networks.segmenter:SamSegmenter.__init__": "build the network",
    "samseg_monai.checkpoints:load_trained": "load the weights",
    "samseg_monai.data.files.cases:find_cases": "find the case",
    "samseg_monai.transforms.loading:LoadCased.__call__": "read the volume",
    "samseg_monai.handlers.cases:CaseDataset._transform": "transforms",
    "samseg_monai.sam.build:SamModel.embed": "encoder",
    "samseg_monai.inferers:SliceVolumeInferer.__call__": "resize, decode, enlarge",
    "monai.transforms:Invertd.__call__": "undo the transforms",
    "samseg_monai.transforms.saving:SaveVolumed._change": "save the volume",
    "samseg_monai.transforms.saving:SaveOverlayd._change": "draw the picture",
    "samseg_monai.handlers.predictions:PredictionTable._add": "table",
}
REST = "rest"


class Clock:
    """Seconds of wall and processor by phase: those of whoever is at work are not those of its caller."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._at_work, self._last, self._sealed = [REST], (time.perf_counter(), time.process_time()), False

    def _tick(self) -> None:
        now = time.perf_counter(), time.process_time()
        spent = self.spent.setdefault(self._at_work[-1], [0.0, 0.0])
        for index in range(2):
            spent[index] += now[index] - self._last[index]
        self._last = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Spend the time within on ``name``."""
        if self._sealed:
            yield
            return
        self._tick()
        self._at_work.append(name.rstrip("!"))
        self._sealed = name.endswith("!")
        try:
            yield
        finally:
            self._tick()
            self._at_work.pop()
            self._sealed = False

    def watch(self, place: str, name: str) -> None:
        """Put a function of a module, ``module:Class.method``, under this clock."""
        module, _, path = place.partition(":")
        owner: Any = __import__(module, fromlist=["x"])
        *outer, last = path.split(".")
        owner = functools.reduce(getattr, outer, owner)
        function: Callable[..., Any] = getattr(owner, last)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, last, timed)

    def stop(self) -> dict[str, list[float]]:
        """Seconds by phase."""
        self._tick()
        return {name: [round(value, 3) for value in values] for name, values in self.spent.items()}


def make_bundle(folder: Path, variant: str) -> Path:
    """A bundle that is packed as ``samseg bundle pack`` does it; its weights are random."""
    from samseg_monai.bundles import pack, write_bundle
    from samseg_monai.bundles.build import LARGE_FILES, compose
    from samseg_monai.bundles.door import WEIGHTS, Opened
    from samseg_monai.checkpoints import save_adapter, save_model
    from samseg_monai.settings import dump_settings, merged, read_settings

    run = {"sam_variant": variant, "image_size": SIZE if variant == "vit_b" else 64}
    changes = {"run": run, "demo": None, "strategy": {"method": {"rank": 4, "decoder": True}}}
    settings = read_settings(merged(dump_settings(compose("abdomen", "lora")), changes), "benchmark")
    root = write_bundle(settings, folder / settings.name)
    (root / LARGE_FILES).unlink()
    network = Opened(root, settings.name, settings, None).network()
    network.load_base("random", start=False)
    for name in WEIGHTS:
        save_model(network, root / name)
    save_adapter(network, root / "models")
    pack.write_sums(root)
    pack._zip(root, folder.with_suffix(".zip"))
    return folder.with_suffix(".zip")


def make_case(path: Path, size: int, slices: int) -> Path:
    """A CT of water and bones in air, with noise."""
    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(0)
    x, y = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j][..., None]
    z = np.linspace(-1, 1, slices)
    body, bones = x**2 + 2 * y**2 < 0.7 - 0.1 * z**2, (x**2 + (y - 0.4) ** 2) < 0.02 + 0.01 * z
    volume = np.where(bones, 700, np.where(body, 40, -1000)) + rng.normal(0, 20, (size, size, slices))
    nib.save(nib.Nifti1Image(volume.astype(np.int16), np.diag([0.8, 0.8, 3, 1])), path)
    return path


def child(folder: Path, *, encode: bool) -> dict[str, Any]:
    """One prediction in this process, behind one of a tiny network; with ``encode``, the encoder is at work in it."""
    import torch

    from samseg_monai.cli.predict import predict
    from samseg_monai.faults import peak_memory
    from samseg_monai.sam.build import SamModel

    torch.set_num_threads(1)
    how = {"whole_slice": False, "no_resample": False, "no_pictures": False, "verbose": False, "trust": False}

    def run(kind: str) -> None:
        predict(folder / f"{kind}.zip", folder / f"{kind}.nii.gz", folder / f"out_{kind}", **how)

    run("tiny")
    if not encode:
        SamModel.embed = _zeros  # type: ignore[method-assign]
    clock = Clock()
    for place, name in PHASES.items():
        clock.watch(place, name)
    clock._tick()
    clock.spent.clear()
    run("vit_b")
    return {"phases": clock.stop(), "peak_mb": round(peak_memory() / 1e6), "encode": encode}


def _zeros(self: Any, image: Any, taps: Any = ()) -> Any:
    sides = [side // self.spec.patch_size for side in image.shape[-2:]]
    return image.new_zeros(len(image), self.spec.prompt_dim, *sides)


def measured(checkout: Path, folder: Path, encode: bool) -> dict[str, Any]:
    """What ``child`` says in a fresh process with the package of another checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, "--child", str(folder), *["--encode"] * encode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of processor seconds by phase, of their sums, of the wall's clock and of the memory."""
    names = dict.fromkeys(name for run in runs for name in run["phases"])
    whole = [run for run in runs if run["encode"]]
    phases = {n: statistics.median(run["phases"].get(n, [0, 0])[1] for run in runs) for n in names}
    phases["encoder"] = statistics.median(run["phases"]["encoder"][1] for run in whole)
    total = sum(phases.values())
    return {
        "phases_s": {name: round(value, 2) for name, value in sorted(phases.items(), key=lambda item: -item[1])},
        "all_s": round(total, 2),
        "all_but_the_encoder_s": round(total - phases["encoder"], 2),
        "share_of_all_but_the_encoder": round(1 - phases["encoder"] / total, 3),
        "peak_mb": statistics.median(run["peak_mb"] for run in whole),
    }


def main() -> None:
    """Measure both checkouts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--folder", type=Path, help="keeps bundle and case for the next time")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--encode", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child, encode=given.encode)))
        return
    from measuring import record

    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        for kind, size, slices in (("tiny", 64, 2), ("vit_b", SIZE, SLICES)):
            if not (folder / f"{kind}.zip").exists():
                make_bundle(folder / kind, kind)
                make_case(folder / f"{kind}.nii.gz", size, slices)
        runs: dict[str, list[dict[str, Any]]] = {"now": []} if given.before is None else {"before": [], "now": []}
        for turn in range(given.repeats):
            for side, found in runs.items():
                found.append(measured(here if side == "now" else given.before.resolve(), folder, turn == 0))
                print(side, json.dumps(found[-1]), file=sys.stderr)
    result: dict[str, Any] = {side: summary(found) for side, found in runs.items()}
    if "before" in result:
        old, new = result["before"], result["now"]
        result["ratio"] = round(old["all_but_the_encoder_s"] / new["all_but_the_encoder_s"], 2)
        result["memory_ratio"] = round(new["peak_mb"] / old["peak_mb"], 3)
    facts = {"variant": "vit_b", "image_size": SIZE, "slices": SLICES, "repeats": given.repeats}
    record("predict_one_case", {**facts, "what": "processor seconds of one thread, medians", **result})


if __name__ == "__main__":
    main()

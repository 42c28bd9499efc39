"""A training step of Medical SAM Adapter, alone and in slabs, beside that of Houlsby's adapters: vit_t at 256 pixels.

    python -m benchmarks.adapter_step [--checkpoint FILE] [--repeats 7]

One thread, random slices without prompts, two classes, the mask decoder learns, too; the same slices for all, forward,
loss, backward and optimiser. Processor seconds of one process in turn; memory of fresh ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measuring import alternate, in_fresh_processes, record, resident_start_bytes
from samseg_monai.bundles.running import reuse_memory
from samseg_monai.faults import peak_memory
from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import Adapter

SIDES: dict[str, dict[str, Any]] = {
    "adapter": {"place": "serial"},
    "medsa, depth 1": {"place": "both", "scale": 0.1},
    "medsa, depth 4": {"place": "both", "scale": 0.1, "depth": 4},
}
SLICES = 8


def step(arguments: dict[str, Any], checkpoint: str) -> Callable[[], Any]:
    """One step of a network with these arguments of the strategy."""
    torch.manual_seed(0)
    how: dict[str, Any] = {"image_size": 256, "num_classes": 2, "prompt": "none"}
    network = SamSegmenter("vit_t", Adapter(64, decoder=True, **arguments), **how)
    network.load_base(checkpoint)
    network.train()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    image, label = torch.randn(SLICES, 1, 256, 256), torch.randint(3, (SLICES, 256, 256))

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(image), label).backward()
        optimizer.step()

    return run


def peak_bytes(arguments: dict[str, Any], checkpoint: str) -> int:
    """What two steps take beyond what the process holds before them."""
    torch.set_num_threads(1)
    reuse_memory()
    run = step(arguments, checkpoint)
    start = resident_start_bytes()
    run()
    run()
    return peak_memory() - start


def main() -> None:
    """Measure all sides, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="random", help="file of MobileSAM's weights")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    memory = dict(
        zip(SIDES, in_fresh_processes(peak_bytes, [(a, given.checkpoint) for a in SIDES.values()]), strict=True)
    )
    reuse_memory()
    found = alternate({n: step(a, given.checkpoint) for n, a in SIDES.items()}, given.repeats, time.process_time)
    flat, deep = "medsa, depth 1", "medsa, depth 4"
    record(
        "adapter_step_256",
        {
            "slices": SLICES,
            "repeats": given.repeats,
            "processor_seconds": found,
            "peak_mb": {name: size / 1e6 for name, size in memory.items()},
            "ratio": found[deep] / found[flat],
            "ratio_to_adapter": found[deep] / found["adapter"],
            "memory_ratio": memory[deep] / memory[flat],
        },
    )


if __name__ == "__main__":
    main()

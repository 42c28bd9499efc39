"""LoRA on the last blocks alone: what a step costs when gradients end at the first adapted block.

Nothing before the first tensor that learns is kept for the backward pass. Three training steps side by side: LoRA in
all blocks; in the last ones; and in the last ones with a gradient down to the image, so that every block is kept, as it
would be if the gradient did not end. Times are medians of alternating runs in one process; peak memory is that of the
step alone, above weights and input, from a fresh process each. Usage:

    python benchmarks/first_block.py --variant vit_b --size 512 --last 2
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from measuring import alternate, in_fresh_processes, record
from torch import Tensor

from samseg_monai.faults import peak_memory
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.spec import get_spec
from samseg_monai.strategies import LoRA

WHICH = ("all_blocks", "last_blocks", "last_blocks_to_image")


def build(which: str, variant: str, size: int, last: int, checkpointing: bool) -> SamSegmenter:
    """A segmenter in training mode with rank 4 in q and v of some blocks."""
    torch.manual_seed(0)
    depth = get_spec(variant).depth
    blocks = None if which == "all_blocks" else range(max(0, depth - last), depth)
    network = SamSegmenter(variant, LoRA(4, blocks=blocks), image_size=size, checkpointing=checkpointing)
    return network.train()


def inputs(which: str, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and boxes."""
    image = torch.randn(batch, 1, size, size, device=device, requires_grad=which == "last_blocks_to_image")
    return image, torch.tensor([[0.2, 0.2, 0.7, 0.8]], device=device).repeat(batch, 1) * size


def step(network: SamSegmenter, image: Tensor, boxes: Tensor) -> None:
    """Forward and backward pass."""
    network.zero_grad(set_to_none=True)
    network(image, boxes).square().mean().backward()
    if image.is_cuda:
        torch.cuda.synchronize()


def peak_bytes(which: str, options: argparse.Namespace) -> int:
    """Bytes that one step needs on top of what lies there before it."""
    device = torch.device(options.device)
    network = build(which, options.variant, options.size, options.last, options.checkpointing).to(device)
    given = inputs(which, options.batch, options.size, device)
    if device.type == "cuda":
        step(network, *given)  # workspaces of the libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(network, *given)
        return torch.cuda.max_memory_allocated() - before
    step(build(which, "tiny", 64, 1, options.checkpointing), *inputs(which, 1, 64, device))  # loads the libraries
    before = peak_memory()
    step(network, *given)
    return peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512, help="side of the square input, in pixels")
    parser.add_argument("--last", type=int, default=2, help="number of adapted blocks")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    runs = {}
    for which in WHICH:
        network = build(which, options.variant, options.size, options.last, options.checkpointing).to(device)
        runs[which] = partial(step, network, *inputs(which, options.batch, options.size, device))
    median = alternate(runs, options.repeats)
    runs.clear()
    peak = dict(zip(WHICH, in_fresh_processes(peak_bytes, [(which, options) for which in WHICH]), strict=True))
    ours, kept = "last_blocks", "last_blocks_to_image"
    record(
        "first_block_checkpointing" if options.checkpointing else "first_block",
        {
            "ratio": round(median[kept] / median[ours], 3),  # times faster than with every block kept
            "memory_ratio": round(peak[ours] / peak[kept], 3) if peak[kept] else None,
            "seconds": {which: round(value, 4) for which, value in median.items()},
            "peak_mib": {which: round(value / 2**20, 1) for which, value in peak.items()},
            **{key: getattr(options, key) for key in ("variant", "size", "last", "batch", "repeats", "checkpointing")},
        },
    )


if __name__ == "__main__":
    main()

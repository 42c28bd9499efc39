"""MobileSAM's TinyViT (vit_t) beside SAM's ViT-B (vit_b): image encoder alone and one LoRA step, seconds and memory.

``forward`` is the image encoder without gradient; ``lora_step`` is ``SamSegmenter`` with LoRA of rank 4 in the encoder
and a frozen decoder: one box, Dice + cross-entropy, backward, Adam. Batch 1, float32, random weights, at 512 and 1024
pixels. Times are medians of alternating runs after one warm-up. Peak memory is the resident set of one fresh process
for each: ``process_peak_mib`` with Python, libraries and weights, ``pass_peak_mib`` what a pass adds to it. Ratios are
vit_b / vit_t: how many times faster or smaller vit_t is. Usage:

    python benchmarks/vit_t.py --threads 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import RESULTS, alternate, in_fresh_processes, record, resident_peak_bytes

from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.build import build_sam
from samseg_monai.strategies import LoRA
from samseg_monai.training import SegmentationLoss
from samseg_monai.training.owned import count_trainable

VARIANTS = ("vit_b", "vit_t")
SMALL = {"vit_b": "tiny", "vit_t": "tiny_t"}  # the same layers, to load the libraries
REPEATS = {("forward", 512): 5, ("lora_step", 512): 5, ("forward", 1024): 3, ("lora_step", 1024): 2}
SIZES = (512, 1024)
RANK = 4


def make_forward(variant: str, size: int) -> Callable[[], None]:
    """The image encoder on one image, without gradient."""
    torch.manual_seed(0)
    encoder = build_sam(variant, image_size=size).image_encoder
    image = torch.randn(1, 3, size, size)

    def forward() -> None:
        with torch.no_grad():
            encoder(image)

    return forward


def make_step(variant: str, size: int) -> Callable[[], None]:
    """One training step of LoRA on one image with one box; the decoder is frozen."""
    network = segmenter(variant, size).train()
    loss = SegmentationLoss(["object"])
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    image, label = torch.randn(1, 1, size, size), torch.zeros(1, 1, size, size)
    low, high = size // 4, size // 2
    label[..., low:high, low:high] = 1
    box = torch.tensor([[low, low, high, high]]).float()

    def step() -> None:
        optimizer.zero_grad()
        loss(network(image, box), label).backward()
        optimizer.step()

    return step


def segmenter(variant: str, size: int) -> SamSegmenter:
    """The network of the LoRA step."""
    torch.manual_seed(0)
    return SamSegmenter(variant, LoRA(RANK), image_size=size)


MAKE = {"forward": make_forward, "lora_step": make_step}


def peak_bytes(kind: str, variant: str, size: int, threads: int) -> tuple[int, int]:
    """Peak resident bytes of this process after one pass, and those that the pass added."""
    torch.set_num_threads(threads)
    MAKE[kind](SMALL[variant], 64)()
    run = MAKE[kind](variant, size)
    before = resident_peak_bytes()
    run()
    peak = resident_peak_bytes()
    return peak, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", type=int, choices=SIZES, default=SIZES, help="rows of other sizes stay as they are"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="vit_t", help="of the file in results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [(kind, size) for size in options.sizes for kind in MAKE]
    seconds = {}
    for kind, size in cases:
        repeats = REPEATS[kind, size]
        seconds[kind, size] = alternate({variant: MAKE[kind](variant, size) for variant in VARIANTS}, repeats)
        print(f"{kind} at {size} px, seconds: {seconds[kind, size]}", flush=True)
    print("times measured; peak memory, which a busy machine does not change, is next", flush=True)
    rows = kept_rows(options.name, options.sizes)
    for kind, size in cases:
        found = in_fresh_processes(peak_bytes, [(kind, variant, size, options.threads) for variant in VARIANTS])
        rows.append(row(kind, size, seconds[kind, size], dict(zip(VARIANTS, found, strict=True))))
    trainable = {variant: count_trainable(segmenter(variant, 512)) for variant in VARIANTS}
    record(
        options.name,
        {
            "cases": sorted(rows, key=lambda found: found["image_size"]),
            "rank": RANK,
            "trainable": trainable,
            "batch_size": 1,
            "dtype": "float32",
            "weights": "random: the time of a pass does not depend on them",
        },
    )


def kept_rows(name: str, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of an earlier run at sizes that are not measured now: two variants are compared at one size only."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["cases"] if path.is_file() else []
    return [found for found in rows if found["image_size"] not in sizes]


def row(kind: str, size: int, seconds: dict[str, float], peaks: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """One case of the result file."""
    old, new = VARIANTS
    return {
        "case": f"{kind}_{size}",
        "image_size": size,
        "repeats": REPEATS[kind, size],
        "ratio": round(seconds[old] / seconds[new], 2),  # times faster
        "memory_ratio": round(peaks[old][1] / peaks[new][1], 2) if peaks[new][1] else None,  # of what a pass adds
        "seconds": {variant: round(value, 4) for variant, value in seconds.items()},
        "process_peak_mib": {variant: round(values[0] / 2**20, 1) for variant, values in peaks.items()},
        "pass_peak_mib": {variant: round(values[1] / 2**20, 1) for variant, values in peaks.items()},
    }


if __name__ == "__main__":
    main()

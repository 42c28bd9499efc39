"""The image encoder with 8-bit numbers in its linear layers against float32, segment_anything's and ours; bf16 beside.

Batch 1, one thread, random weights, on the CPU, without gradient. Times are medians of processor seconds of alternating
runs in one process; ``ratio`` is how many times faster int8 is than segment_anything's encoder, ``ratio_to_ours`` than
our own in float32. ``memory_ratio`` compares what a pass needs on top of weights and input, ours with int8 /
segment_anything's. ``linear`` tells what the linear layers are of it: their share of our time in float32, the
operations per second that their products reach in either (the rounding of their input included), and the ratio that is
left to reach if they took no time at all. ``error`` is that of the embedding, |int8 - float32| / |float32|; for that of
trained weights see ``docs/speed.md``. ``bf16`` is ``--autocast bf16``, and on a processor without bf16 no measure.
``--variant vit_t`` compares MobileSAM with itself: segment_anything has none. Usage:

    python benchmarks/encoder_int8.py --repeats 5

With ``--data`` (``images`` and ``labels`` of the slices of ``experiments/meningioma_t1c``) and ``--weights``, the file
of MobileSAM, it compares Dice instead, of zero-shot masks with the experiment's loose and tight boxes, float32 against
int8.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import alternate, in_fresh_processes, record
from PIL import Image
from sam_attention import OURS, REFERENCE, build
from torch import Tensor, nn

from samseg_monai.faults import peak_memory
from samseg_monai.networks import SamSegmenter
from samseg_monai.products import Int8Linear, int8_problem, round_to_int8
from samseg_monai.sam.build import build_sam

INT8, BF16 = "int8", "bf16"
BOXES = Path(__file__).parents[1] / "experiments" / "meningioma_t1c" / "boxes"


def encoder_of(which: str, variant: str, size: int) -> nn.Module:
    """One of the encoders; ours with the same weights in each way."""
    torch.manual_seed(0)
    if variant == "vit_t":
        encoder: nn.Module = build_sam("vit_t", image_size=size).image_encoder.eval()
    else:
        encoder = build(REFERENCE if which == REFERENCE else OURS, variant, size)
    if which == INT8:
        round_to_int8(encoder)
    return encoder


def make(which: str, variant: str, size: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """An encoder and one pass through it."""
    encoder = encoder_of(which, variant, size)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=which == BF16):
            return encoder(image).float()

    return encoder, run


def peak_bytes(which: str, variant: str, size: int) -> int:
    """Bytes that a pass needs on top of what lies there before it, which the rounded weights belong to."""
    torch.set_num_threads(1)
    make(which, "tiny", 64)[1]()  # loads the libraries
    encoder, run = make(which, variant, size)
    for layer in encoder.modules():
        if isinstance(layer, Int8Linear):
            layer(torch.zeros(1, layer.in_features))
    Path("/proc/self/clear_refs").write_text("5")  # what is resident now becomes the high-water mark
    before = peak_memory()
    run()
    return peak_memory() - before


def of_linear_layers(variant: str, size: int, repeats: int) -> dict[str, Any]:
    """Seconds and operations of all linear layers of a pass, on the inputs that they get, in either way."""
    encoder = encoder_of(OURS, variant, size)
    given: list[tuple[nn.Linear, Tensor]] = []
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, inputs: given.append((layer, inputs[0])))
    with torch.no_grad():
        encoder(torch.randn(1, 3, size, size))
    rounded = []
    for layer, x in given:
        other = nn.Linear(layer.in_features, layer.out_features)
        other.load_state_dict(layer.state_dict())
        other.__class__ = Int8Linear
        rounded.append((other, x))
    plain = [(type(layer).forward, layer, x) for layer, x in given]

    @torch.no_grad()
    def in_float32() -> None:
        for forward, layer, x in plain:
            forward(layer, x)

    @torch.no_grad()
    def in_int8() -> None:
        for layer, x in rounded:
            layer(x)

    seconds = alternate({OURS: in_float32, INT8: in_int8}, repeats, time.process_time)
    operations = sum(2 * x.numel() * layer.out_features for layer, x in given)
    return {
        "layers": len(given),
        "gflop": round(operations / 1e9, 2),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "gflops": {name: round(operations / value / 1e9, 1) for name, value in seconds.items()},
    }


def of_slices(data: Path, weights: Path, size: int, every: int) -> dict[str, Any]:
    """Dice with the labels, in float32 and int8, of every so-manyth slice; z-scores, SAM's single mask."""
    networks = {name: SamSegmenter("vit_t", image_size=size, compute={"int8": name == INT8}) for name in (OURS, INT8)}
    for network in networks.values():
        network.load_base(weights, download=False)
    laws = {law: json.loads((BOXES / f"{law}.json").read_text()) for law in ("loose", "tight")}
    cases = sorted(laws["loose"])[::every]
    dice: dict[str, dict[str, list[float]]] = {law: {OURS: [], INT8: []} for law in laws}
    agreement, error = [], []
    for case in cases:
        image, label = (
            torch.from_numpy(np.asarray(Image.open(data / part / f"{case}.png").convert("F")))
            for part in ("images", "labels")
        )
        scale = size / max(image.shape)
        image = ((image - image.mean()) / image.std(correction=0))[None, None]
        x = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False) if scale != 1 else image
        with torch.no_grad():
            embedding = {name: network.encode(x) for name, network in networks.items()}
            error.append(float((embedding[INT8] - embedding[OURS]).norm() / embedding[OURS].norm()))
            for law, boxes in laws.items():
                masks = {}
                for name, network in networks.items():
                    logits = network(x, torch.tensor(boxes[case]).float() * scale, embedding[name])
                    masks[name] = F.interpolate(logits, label.shape, mode="bilinear", align_corners=False)[0, 0] > 0
                    dice[law][name].append(_dice(masks[name], label > 0))
                agreement.append(_dice(*masks.values()))
    found = {}
    for law, values in dice.items():
        change = np.subtract(values[INT8], values[OURS])
        found[law] = {
            "dice": {name: round(float(np.mean(of)), 4) for name, of in values.items()},
            "change": {
                "mean": round(float(change.mean()), 5),
                "mean_size": round(float(abs(change).mean()), 5),
                "lowest": round(float(change.min()), 4),
                "highest": round(float(change.max()), 4),
            },
        }
    return {
        **found,
        "masks_agree": {"mean": round(float(np.mean(agreement)), 4), "least": round(min(agreement), 4)},
        "error": {"mean": round(float(np.mean(error)), 4), "largest": round(max(error), 4)},
        "slices": len(cases),
        "variant": "vit_t",
        "image_size": size,
        "weights": networks[OURS].base_sha256,
    }


def _dice(one: Tensor, other: Tensor) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()).clamp(min=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--every", type=int, default=1, help="of the slices")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if reason := int8_problem():
        parser.exit(1, f"{reason}\n")
    if options.data is not None:
        for size in options.sizes:
            record(f"int8_dice_{size}", of_slices(options.data, options.weights, size, options.every))
        return
    which = [OURS, INT8, *([REFERENCE] if options.variant != "vit_t" else [])]
    which += [BF16] * bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    base = REFERENCE if REFERENCE in which else OURS
    for size in options.sizes:
        runs = {name: make(name, options.variant, size)[1] for name in which}
        full = runs[OURS]()
        error = {name: float((runs[name]() - full).norm() / full.norm()) for name in (INT8, BF16) if name in runs}
        median = alternate(runs, options.repeats, time.process_time)
        found = in_fresh_processes(peak_bytes, [(name, options.variant, size) for name in (INT8, base)])
        linear = of_linear_layers(options.variant, size, options.repeats)
        share = linear["seconds"][OURS] / median[OURS]
        name = "encoder_int8" if options.variant == "vit_b" else f"encoder_int8_{options.variant}"
        record(
            f"{name}_{size}",
            {
                "ratio": round(median[base] / median[INT8], 2),
                "ratio_to_ours": round(median[OURS] / median[INT8], 2),
                "ratio_of_bf16_to_ours": round(median[OURS] / median[BF16], 2) if BF16 in median else None,
                "memory_ratio": round(found[0] / found[1], 3) if found[1] else None,
                "seconds": {key: round(value, 4) for key, value in median.items()},
                "peak_mib": {key: round(value / 2**20, 1) for key, value in zip((INT8, base), found, strict=True)},
                "linear": {**linear, "share": round(share, 3), "ratio_if_free": round(1 / (1 - share), 2)},
                "error": {key: round(value, 5) for key, value in error.items()},
                "clock": "processor seconds of one thread",
                "reference": "segment_anything, float32" if base == REFERENCE else "our own in float32",
                "variant": options.variant,
                "image_size": size,
                "batch_size": 1,
                "repeats": options.repeats,
                "weights": "random: the time of a pass does not depend on them, and the error does",
            },
        )


if __name__ == "__main__":
    main()

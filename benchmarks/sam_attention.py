"""Our image encoder (fused attention) against segment_anything's own: seconds and peak memory, side by side.

Times are medians of alternating runs in one process, so that a busy machine slows both alike. Peak memory is that of
the step alone, above weights, gradients and input: torch's own count on CUDA, on the CPU the resident set of one fresh
process per encoder. Ratios are ours / segment_anything's: below 1 is better. Usage:

    python benchmarks/sam_attention.py --size 512 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from measuring import alternate, in_fresh_processes, machine, resident_peak_bytes
from torch import nn

import samseg_monai
from samseg_monai.sam.build import official_encoder
from samseg_monai.sam.spec import get_spec
from samseg_monai.sam.vit import ImageEncoder

RESULT = Path(__file__).parent / "results" / "sam_attention.json"
WHICH = ("reference", "ours")
STEPS = ("forward", "forward_backward")


def build(which: str, variant: str, size: int) -> nn.Module:
    """One of the two encoders, random position tables (zeros could be skipped by a clever kernel)."""
    torch.manual_seed(0)
    spec = get_spec(variant)
    if which == "ours":
        encoder: nn.Module = ImageEncoder(spec, image_size=size)
    else:
        encoder = official_encoder(spec, size)
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, std=0.02)
    return encoder


def step(encoder: nn.Module, image: torch.Tensor, kind: str) -> None:
    """One pass; gradients stay allocated, as between the steps of a training run with accumulation."""
    with torch.set_grad_enabled(kind == "forward_backward"):
        out = encoder(image)
        if kind == "forward_backward":
            out.float().square().mean().backward()
    if image.is_cuda:
        torch.cuda.synchronize()


def peak_bytes(which: str, kind: str, options: argparse.Namespace) -> int:
    """Bytes that one step needs on top of what lies there before it."""
    device = torch.device(options.device)
    encoder = build(which, options.variant, options.size).to(device)
    for parameter in encoder.parameters():  # weights and gradients are equal for both: they would hide the difference
        parameter.grad = torch.empty_like(parameter).fill_(0.0)  # zeros_like would take its pages only when written
    image = torch.randn(options.batch, 3, options.size, options.size, device=device)
    if device.type == "cuda":
        step(encoder, image, kind)  # workspaces of the libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(encoder, image, kind)
        return torch.cuda.max_memory_allocated() - before
    small = build(which, "tiny", 64)
    step(small, torch.randn(1, 3, 64, 64), kind)  # loads the libraries
    before = resident_peak_bytes()
    step(encoder, image, kind)
    return resident_peak_bytes() - before


def compare(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Times and memory of one kind of step, as the rows of the result file."""
    device = torch.device(options.device)
    encoders = {which: build(which, options.variant, options.size).to(device) for which in WHICH}
    image = torch.randn(options.batch, 3, options.size, options.size, device=device)
    median = alternate({w: partial(step, encoder, image, kind) for w, encoder in encoders.items()}, options.repeats)
    peaks = in_fresh_processes(peak_bytes, [(which, kind, options) for which in WHICH])
    peak = dict(zip(WHICH, peaks, strict=True))
    return {
        "name": f"sam_attention_{kind}",
        "ratio": round(median["reference"] / median["ours"], 3),  # times faster
        "memory_ratio": round(peak["ours"] / peak["reference"], 3) if peak["reference"] else None,  # too small to see
        "reference_s": round(median["reference"], 4),
        "ours_s": round(median["ours"], 4),
        "reference_peak_mib": round(peak["reference"] / 2**20, 1),
        "ours_peak_mib": round(peak["ours"] / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512, help="side of the square input, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    cases = [compare(kind, options) for kind in STEPS]
    cuda = options.device.startswith("cuda")
    result = {
        **cases[-1],
        "name": "sam_attention",  # the row that training pays for
        "cases": cases,
        "variant": options.variant,
        "image_size": options.size,
        "batch_size": options.batch,
        "repeats": options.repeats,
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "samseg_monai": samseg_monai.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

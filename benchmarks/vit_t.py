"""MobileSAM's encoder (vit_t) against timm's TinyViT as it comes, and beside our own ViT-B: processor time and memory.

The reference is timm's ``TinyVit`` in MobileSAM's sizes: widths 64 to 320, depths 2, 2, 6, 2, windows 7, 7, 14, 7, no
head, no stochastic depth. timm's last merge halves the grid, MobileSAM's does not: the stride of that convolution is
set to 1. The neck behind it is segment_anything's, as in MobileSAM. It gets our random weights, and the run ends with
an error where its embedding is another one. ``before`` is an earlier ``tiny_vit.py`` of this package, if one is given.

``encoder`` is the encoder without gradient, ``lora_step`` one step of training LoRA of rank 4 in query and value of all
attention blocks: forward, backward and AdamW; what is behind the encoder is left out. Batch 1, float32, one thread, on
the CPU. Times are medians of processor seconds of alternating runs in one process. Peak memory is what a step needs on
top of weights and input: the resident set of one fresh process each. ``ratio`` is how many times faster ours is than
the reference, ``memory_ratio`` ours / the reference's; the shares of vit_b, of the encoder only, are vit_t / vit_b.
Needs timm. Usage:

    git show COMMIT:samseg_monai/sam/tiny_vit.py > before.py
    python benchmarks/vit_t.py --repeats 7 --before before.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import alternate, in_fresh_processes, record
from torch import Tensor, nn

from samseg_monai.adapters.lora import LoRALinear
from samseg_monai.faults import peak_memory
from samseg_monai.products import adopt
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.spec import get_spec
from samseg_monai.sam.tiny_vit import TinyViTSpec

OURS, REFERENCE, BEFORE, LARGER = "vit_t", "timm", "before", "vit_b"
CASES = {
    "vit_t_1024": ("encoder", 1024), "vit_t_512": ("encoder", 512),
    "vit_t_lora_step_1024": ("lora_step", 1024), "vit_t_lora_step_512": ("lora_step", 512),
}  # fmt: skip
RANK = 4


class Reference(nn.Module):
    """timm's TinyViT with the grid of MobileSAM, and SAM's neck behind it."""

    def __init__(self, spec: TinyViTSpec, neck: nn.Module) -> None:
        super().__init__()
        from timm.models.tiny_vit import TinyVit

        self.trunk = TinyVit(
            embed_dims=spec.widths, depths=spec.depths, num_heads=spec.num_heads, window_sizes=spec.windows,
            num_classes=0, global_pool="", drop_path_rate=0.0,
        )  # fmt: skip
        self.trunk.head = nn.Identity()
        self.trunk.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = neck

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) to (B, 256, h / 16, w / 16)."""
        return self.neck(self.trunk.forward_features(x))


class PlainLoRA(nn.Module):
    """LoRA in query and value with PyTorch's own products, for a layer whose rows are [q, k, v] of each head."""

    def __init__(self, base: nn.Linear, heads: int) -> None:
        super().__init__()
        self.base, self.heads = base, heads
        for part in "qv":
            setattr(self, f"a_{part}", nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5))
            setattr(self, f"b_{part}", nn.Parameter(torch.zeros(base.out_features // 3, RANK)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.base(x).unflatten(-1, (self.heads, 3, -1)).unbind(-2)
        q = q + F.linear(F.linear(x, self.a_q), self.b_q).unflatten(-1, (self.heads, -1))
        v = v + F.linear(F.linear(x, self.a_v), self.b_v).unflatten(-1, (self.heads, -1))
        return torch.stack([q, k, v], dim=-2).flatten(-3)


def build(which: str, size: int, before: str | None, variant: str = OURS) -> nn.Module:
    """One of the encoders with random weights, those of TinyViT equal and with no neutral normalisation."""
    torch.manual_seed(0)
    if which == LARGER:
        return build_sam(LARGER, image_size=size).image_encoder.eval()
    ours = build_sam(variant, image_size=size).image_encoder
    state = ours.state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_var", "bn.weight")):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith(("running_mean", "biases", "bn.bias")):
            nn.init.normal_(tensor, std=0.1)
    if which == OURS:
        return ours.eval()
    spec = get_spec(variant)
    assert isinstance(spec, TinyViTSpec)
    if which == BEFORE:
        assert before is not None
        other = load_module(before).TinyViT(spec, image_size=size)
        adopt(other)
    else:
        other = Reference(spec, build_sam(variant, image_size=size).image_encoder.get_submodule("neck"))
    # other names, the same order
    for target, tensor in zip(other.state_dict().values(), state.values(), strict=True):
        target.copy_(tensor)
    return other.eval()


def load_module(path: str) -> Any:
    """A file of Python as a module."""
    spec = importlib.util.spec_from_file_location(BEFORE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[BEFORE] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def make(which: str, kind: str, size: int, before: str | None, variant: str = OURS) -> Callable[[], Any]:
    """One pass, or one step of training."""
    encoder = build(which, size, before, variant)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    if kind == "encoder":
        return torch.no_grad()(lambda: encoder(image))
    encoder.requires_grad_(False)
    for module in [module for module in encoder.modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]:
        heads = 1 if which == LARGER else module.num_heads
        if which == REFERENCE:
            module.qkv = PlainLoRA(module.qkv, heads)
        else:
            module.qkv = LoRALinear(module.qkv, rank=RANK, parts=(0, 2), num_parts=3, groups=heads)
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        out = encoder(image)
        (out * out.detach().flip(-1)).mean().backward()
        optimizer.step()

    return step


def peak_bytes(which: str, kind: str, size: int, before: str | None) -> int:
    """Bytes that one step needs on top of what lies there before it."""
    torch.set_num_threads(1)
    make(OURS, kind, 64, before, "tiny_t")()  # loads the libraries
    run = make(which, kind, size, before)
    start = peak_memory()
    run()
    return peak_memory() - start


def measure(kind: str, size: int, which: list[str], repeats: int, before: str | None) -> dict[str, Any]:
    """One kind of work at one size."""
    runs = {name: make(name, kind, size, before) for name in which}
    median = alternate(runs, repeats, time.process_time)
    found = in_fresh_processes(peak_bytes, [(name, kind, size, before) for name in which])
    peak = dict(zip(which, found, strict=True))
    result: dict[str, Any] = {
        "ratio": round(median[REFERENCE] / median[OURS], 2),
        "memory_ratio": round(peak[OURS] / peak[REFERENCE], 3) if peak[REFERENCE] else None,
    }
    if LARGER in which:
        result["share_of_vit_b"] = round(median[OURS] / median[LARGER], 3)
        result["memory_share_of_vit_b"] = round(peak[OURS] / peak[LARGER], 3) if peak[LARGER] else None
    if BEFORE in which:
        result["ratio_to_before"] = round(median[BEFORE] / median[OURS], 2)
        result["memory_ratio_to_before"] = round(peak[OURS] / peak[BEFORE], 3) if peak[BEFORE] else None
    if kind == "encoder":
        embeddings = {name: runs[name]() for name in which if name != LARGER}
        for embedding in embeddings.values():
            torch.testing.assert_close(embedding, embeddings[OURS], atol=1e-4, rtol=0)
        result["largest_difference"] = float((embeddings[REFERENCE] - embeddings[OURS]).abs().max())
    return {
        **result,
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "peak_mib": {name: round(value / 2**20, 1) for name, value in peak.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--before", type=Path, help="an earlier tiny_vit.py of this package")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = None if options.before is None else str(options.before.resolve())
    which = [OURS, REFERENCE, *([BEFORE] if before else [])]
    for case in options.cases:
        kind, size = CASES[case]
        # vit_b's step of training is in sam_attention.py
        compared = [*which, LARGER] if kind == "encoder" else which
        result = measure(kind, size, compared, options.repeats, before)
        record(
            case,
            {
                **result,
                **({"rank": RANK} if kind == "lora_step" else {}),
                "clock": "processor seconds of one thread",
                "timm": version("timm"),
                "image_size": size,
                "batch_size": 1,
                "repeats": options.repeats,
                "dtype": "float32",
                "weights": "random, the same for all TinyViTs",
            },
        )


if __name__ == "__main__":
    main()

"""Our image encoder against segment_anything's own, and transformers' (with peft) if installed: processor time, memory.

``encoder_*`` is the encoder without gradient, ``lora_step_*`` one step of training LoRA of rank 4 in query and value of
all blocks: forward, backward and AdamW. What is behind the encoder is the same for all and left out. Batch 1, float32,
one thread, random weights, on the CPU. Times are medians of processor seconds of alternating runs in one process, so
that neither a busy machine nor a change of its clock favours one. Peak memory is what the step needs on top of weights
and input: the resident set of one fresh process each. ``ratio`` is how many times faster ours is than segment_anything
with the same allocator, that of the one process; ``ratio_own_processes`` that of each in a process of its own.
``memory_ratio`` is ours / segment_anything's. LoRA in transformers' encoder is peft's, in the whole fused layer, as it
knows no parts of one. ``share_of_roof`` compares the operations that segment_anything's encoder needs, whatever ours
really does, with what the fastest product of large matrices reaches here. Usage:

    python benchmarks/sam_attention.py --repeats 3
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from measuring import alternate, in_fresh_processes, in_own_processes, record, resident_start_bytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from samseg_monai.adapters.lora import LoRALinear
from samseg_monai.faults import peak_memory
from samseg_monai.products import fits, times
from samseg_monai.sam.build import build_sam, official_encoder
from samseg_monai.sam.spec import get_spec
from samseg_monai.sam.vit import ViTSpec

CASES = {
    "encoder_1024_fp32": ("encoder", 1024), "encoder_512_fp32": ("encoder", 512), "encoder_256_fp32": ("encoder", 256),
    "lora_step_1024": ("lora_step", 1024), "lora_step_512": ("lora_step", 512),
}  # fmt: skip
RANK = 4
OURS, REFERENCE, OTHER = "ours", "reference", "transformers"


class PlainLoRA(nn.Module):
    """LoRA in query and value of a fused layer with PyTorch's own products, for the encoders of others."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, width = base, base.out_features // 3
        for part in "qv":
            setattr(self, f"a_{part}", nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5))
            setattr(self, f"b_{part}", nn.Parameter(torch.zeros(width, RANK)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.base(x).chunk(3, dim=-1)
        q = q + F.linear(F.linear(x, self.a_q), self.b_q)
        v = v + F.linear(F.linear(x, self.a_v), self.b_v)
        return torch.cat([q, k, v], dim=-1)


def build(which: str, variant: str | ViTSpec, size: int) -> nn.Module:
    """One of the encoders, with random position tables (zeros could be skipped by a clever kernel)."""
    torch.manual_seed(0)
    spec = get_spec(variant)
    assert isinstance(spec, ViTSpec)
    if which == OURS:
        encoder: nn.Module = build_sam(spec, image_size=size).image_encoder
    elif which == REFERENCE:
        encoder = official_encoder(spec, size)
    else:
        encoder = transformers_encoder(spec, size)
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, std=0.02)
    return encoder.eval()


def transformers_encoder(spec: ViTSpec, size: int) -> nn.Module:
    """transformers' SAM encoder with scaled_dot_product_attention."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=spec.embed_dim, num_hidden_layers=spec.depth, num_attention_heads=spec.num_heads, image_size=size,
        global_attn_indexes=list(spec.global_attn_indexes), window_size=spec.window_size, mlp_dim=4 * spec.embed_dim,
        output_channels=spec.prompt_dim,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return SamVisionEncoder(config)


def make(which: str, kind: str, variant: str | ViTSpec, size: int) -> Callable[[], None]:
    """One pass, or one step of training."""
    encoder = build(which, variant, size)
    image = torch.randn(1, 3, size, size)

    def run() -> Tensor:
        out = encoder(image)
        return out if isinstance(out, Tensor) else out[0]

    if kind == "encoder":
        return torch.no_grad()(run)
    if which == OTHER:
        return trained(adapted_by_peft(encoder), run)
    encoder.requires_grad_(False)
    for module in [module for module in encoder.modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]:
        base = module.qkv
        module.qkv = (
            LoRALinear(base, rank=RANK, parts=(0, 2), num_parts=3) if which == OURS else PlainLoRA(base)
        )  # fmt: skip
    return trained(encoder, run)


def adapted_by_peft(encoder: nn.Module) -> nn.Module:
    """LoRA by peft in ``qkv`` of all blocks; ``encoder`` itself is changed."""
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"]), encoder)


def trained(encoder: nn.Module, run: Callable[[], Tensor]) -> Callable[[], None]:
    """One step of training what has a gradient."""
    learned = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        out = run()
        (out * out.detach().flip(-1)).mean().backward()
        optimizer.step()

    return step


def peak_bytes(which: str, kind: str, variant: str, size: int) -> int:
    """Bytes that one step needs on top of what lies there before it."""
    torch.set_num_threads(1)
    make(which, kind, "tiny", 64)()  # loads the libraries
    run = make(which, kind, variant, size)
    before = resident_start_bytes()
    run()
    return peak_memory() - before


def operations(variant: str, size: int) -> int:
    """Multiplications and additions of one image through segment_anything's encoder."""
    with torch.device("meta"):
        encoder, image = build(REFERENCE, variant, size), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(image)
    return counter.get_total_flops()


def roof() -> dict[str, float]:
    """Operations per second of a large product in float32 on one thread, by MKL and by oneDNN."""
    x, weight = torch.randn(4096, 3072), torch.randn(768, 3072)
    ways: dict[str, Callable[[], Any]] = {"mkl": lambda: F.linear(x, weight)}
    if fits(x, weight):
        ways["onednn"] = lambda: times(x, weight)
    seconds = alternate(ways, 7, time.process_time)
    return {name: 2 * math.prod((4096, 3072, 768)) / value for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    which = [OURS, REFERENCE]
    if all(find_spec(package) for package in ("transformers", "peft")):
        which.append(OTHER)
    else:
        print("transformers or peft is not installed: they are left out")
    reached = roof()
    for case in options.cases:
        kind, size = CASES[case]
        sides = {name: (name, kind, options.variant, size) for name in which}
        steps = {name: make(*side) for name, side in sides.items()}
        median = alternate(steps, options.repeats, time.process_time)
        del steps
        own = in_own_processes(make, sides, options.repeats, ours=[OURS])
        found = in_fresh_processes(peak_bytes, list(sides.values()))
        peak = dict(zip(which, found, strict=True))
        result: dict[str, Any] = {
            "ratio": round(median[REFERENCE] / median[OURS], 2),
            "ratio_own_processes": round(own[REFERENCE] / own[OURS], 2),
            "memory_ratio": round(peak[OURS] / peak[REFERENCE], 3) if peak[REFERENCE] else None,
            "seconds": {name: round(value, 3) for name, value in median.items()},
            "seconds_own_processes": {name: round(value, 3) for name, value in own.items()},
            "peak_mib": {name: round(value / 2**20, 1) for name, value in peak.items()},
        }
        if OTHER in which:
            result["ratio_to_transformers"] = round(median[OTHER] / median[OURS], 2)
            result["memory_ratio_to_transformers"] = round(peak[OURS] / peak[OTHER], 3) if peak[OTHER] else None
        if kind == "encoder":
            flops = operations(options.variant, size)
            result["tflop"] = round(flops / 1e12, 4)
            result["share_of_roof"] = round(flops / median[OURS] / max(reached.values()), 3)
        else:
            result["rank"] = RANK
        record(
            case,
            {
                **result,
                "roof_gflops": {name: round(value / 1e9, 1) for name, value in reached.items()},
                "clock": "processor seconds of one thread",
                "variant": options.variant,
                "image_size": size,
                "batch_size": 1,
                "repeats": options.repeats,
                "dtype": "float32",
                "weights": "random: the time of a pass does not depend on them",
            },
        )


if __name__ == "__main__":
    main()

"""What one NVIDIA GPU makes of the image encoder, a LoRA step and a ladder step, beside segment_anything's code.

Needs, beside this repository on PYTHONPATH, the packages torch >= 2.8, torchvision, numpy and segment-anything 1.0, and
no others; no weights, no network. It takes at most ``--budget`` seconds: what does not fit is left out by name, and a
variant that fails costs its own row alone. Usage:

    PYTHONPATH=. python benchmarks/gpu.py --output gpu_results

Results go to ``<output>/gpu.json``, anew after each row. Times are medians of synchronised passes after warming up.
Ratios are reference / ours, the reference being segment_anything's encoder in float32 with TF32 off at equal size and
batch (with the same LoRA layers and the same decoder in training). ``share`` is that of the dense bf16 peak of
``--peak`` TFLOP/s, 989 for the H100 SXM and H200 by NVIDIA's data sheet, counting the operations of segment_anything's
own encoder whatever ours really does; for training it is not stated.
Weights are random: the time of a pass does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from samseg_monai.adapters.ladder import GatedSide, ResNetSide
from samseg_monai.adapters.lora import LoRALinear
from samseg_monai.sam.attention import WAYS
from samseg_monai.sam.build import build_sam, official_encoder
from samseg_monai.sam.spec import get_spec
from samseg_monai.sam.vit import ImageEncoder, ViTSpec

PEAK_TFLOPS = 989.0
REFERENCE = "reference fp32"
RANK = 4
# what autocasts or stores in bf16, and the ways of attention: name -> (windows, whole image); None is the package's own
ATTENTION = {
    "auto": (None, None),
    "folded": ("folded", "folded"),
    "masked": ("masked", "masked"),
    "by_rows": ("by_rows", "by_rows"),
    "masked, by_rows": ("masked", "by_rows"),
}
TILES = ((64, 4), (128, 4), (128, 8), (64, 8), (32, 4))  # queries and warps of a program of "by_rows"


class Bench:
    """Rows of the result file, and the time that is left for more."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.end = time.monotonic() + options.budget
        self.rows: list[dict[str, Any]] = []
        self.facts = {**machine(self.device), "peak_tflops": options.peak}

    def write(self) -> None:
        """The file, with ratios to the references that are there."""
        place = ("kind", "model", "size", "batch")
        references = {tuple(row[key] for key in place): row for row in self.rows if row["name"] == REFERENCE}
        for row in self.rows:
            reference = references.get(tuple(row[key] for key in place))
            if reference and "ms" in row and "ms" in reference:
                row["ratio"] = round(reference["ms"] / row["ms"], 2)
                if reference.get("step_gib"):
                    row["memory_ratio"] = round(row["step_gib"] / reference["step_gib"], 3)
        folder = Path(self.options.output)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"name": "gpu", **self.facts, "rows": self.rows}, indent=2)
        (folder / "gpu.json").write_text(text + "\n")

    def row(self, name: str, make: Callable[[], Callable[[], Any]], **where: Any) -> None:
        """Build what ``make`` returns, warm it up and time it; whatever happens becomes one row."""
        row: dict[str, Any] = {"name": name, **where}
        needed = where.pop("needs_s", 15)
        row.pop("needs_s", None)
        flops = row.pop("flops", None)
        started = time.monotonic()
        if started + needed > self.end:
            row["left_out"] = "no time left"
        else:
            try:
                row |= self._measure(make)
                row["images_per_s"] = round(1000 * row["batch"] / row["ms"], 2)
                if flops:
                    row["share"] = round(flops * row["images_per_s"] / (self.options.peak * 1e12), 4)
            except Exception as error:  # noqa: BLE001
                # one variant must not cost the others
                row["error"] = f"{type(error).__name__}: {error}"[:600]
            row["took_s"] = round(time.monotonic() - started, 1)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.free()
        self.write()

    def note(self, where: dict[str, Any], rows: Iterator[dict[str, Any]]) -> None:
        """Rows that time nothing."""
        for row in rows:
            self.rows.append({"name": row["kind"], **where, "batch": 1, **row})
            print(json.dumps(self.rows[-1]), flush=True)
        self.free()
        self.write()

    def _measure(self, make: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
        run = make()
        first = self._seconds(run)  # with compiling, if any
        self._seconds(run)
        cuda = self.device.type == "cuda"
        before = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times = [self._seconds(run)]
        while len(times) < self.options.repeats and sum(times) < self.options.seconds:
            times.append(self._seconds(run))
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        return {
            "ms": round(1000 * statistics.median(times), 3),
            "fastest_ms": round(1000 * min(times), 3),
            "repeats": len(times),
            "first_s": round(first, 2),
            "peak_gib": round(peak / 2**30, 3),  # all that is there
            "step_gib": round((peak - before) / 2**30, 3),  # on top of weights, optimiser and input
        }

    def _seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def free(self) -> None:
        """Give back what the last row left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if cuda else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "cpus": os.cpu_count(),
    }


@contextmanager
def precision(device: torch.device, name: str) -> Iterator[None]:
    """``fp32`` without TF32, ``tf32``, or ``bf16`` by autocast over the first; ``bf16 weights`` leaves dtypes alone."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    with torch.autocast(device.type, dtype=torch.bfloat16) if name == "bf16" else nullcontext():
        yield


def encoder_of(which: str, variant: str, size: int, device: torch.device, attention: str = "auto") -> nn.Module:
    """Random encoder of one side; position tables are not zero, as those of a trained one."""
    torch.manual_seed(0)
    spec = get_spec(variant)
    with device:  # drawing hundreds of millions of numbers is quicker there
        encoder = official_encoder(spec, size) if which == "reference" else spec.encoder(image_size=size)
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, std=0.02)
    if isinstance(encoder, ImageEncoder):
        use(encoder, attention)
    return encoder.eval()


def use(encoder: ImageEncoder, attention: str) -> None:
    """Compute windows and global attention in the ways that ``ATTENTION`` names."""
    windows, whole = ATTENTION[attention]
    for block in encoder.blocks:
        chosen = windows if block.window_size else whole
        block.attn.way = None if chosen is None else WAYS[chosen]


def operations(variant: str, size: int) -> int:
    """Multiplications and additions of one image through the encoder, by PyTorch's own counter."""
    with torch.device("meta"):
        encoder = official_encoder(get_spec(variant), size)
        image = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(image)
    return counter.get_total_flops()


def compiled(encoder: nn.Module, how: str | None) -> Callable[[Tensor], Tensor]:
    """The encoder as it is, with each block compiled, or compiled as a whole in a mode of torch.compile."""
    if how is None:
        return encoder
    torch._dynamo.reset()
    backend = "inductor" if next(encoder.parameters()).is_cuda else "eager"
    if how == "blocks":
        for block in encoder.blocks if isinstance(encoder, ImageEncoder) else ():
            block.compile(dynamic=False, backend=backend)
        return encoder
    return torch.compile(encoder, mode=how if backend == "inductor" else None, dynamic=False, backend=backend)


def forward(
    which: str, variant: str, size: int, batch: int, kind: str, device: torch.device,
    attention: str = "auto", compile: str | None = None,
) -> Callable[[], Any]:  # fmt: skip
    """The encoder without gradient."""
    encoder = encoder_of(which, variant, size, device, attention)
    image = torch.randn(batch, 3, size, size, device=device)
    if kind == "bf16 weights":
        encoder, image = encoder.bfloat16(), image.bfloat16()
    call = compiled(encoder, compile)

    def run() -> Any:
        with torch.no_grad(), precision(device, kind):
            return call(image)

    return run


def lora_step(
    which: str, variant: str, size: int, batch: int, kind: str, device: torch.device,
    attention: str = "auto", compile: str | None = None,
) -> Callable[[], Any]:  # fmt: skip
    """LoRA of rank 4 on query and value of all blocks, one box per image, frozen decoder, AdamW."""
    torch.manual_seed(0)
    encoder = encoder_of(which, variant, size, device, attention)
    with device:
        sam = build_sam(variant, image_size=size)
    sam.image_encoder = encoder  # type: ignore[assignment]
    sam.requires_grad_(False).train()
    if kind == "bf16 weights":  # of what is frozen: the updates stay float32
        encoder.bfloat16()
    if hasattr(encoder, "blocks"):
        for block in encoder.blocks:
            block.attn.qkv = LoRALinear(block.attn.qkv, rank=RANK, parts=(0, 2), num_parts=3)
            for parameter in (*block.attn.qkv.lora_a.values(), *block.attn.qkv.lora_b.values()):
                parameter.data = parameter.data.float()
    learned = [parameter for parameter in sam.parameters() if parameter.requires_grad]
    ours = which != "reference"
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True if ours and device.type == "cuda" else None)
    image = torch.randn(batch, 3, size, size, device=device)
    boxes = torch.tensor([[size / 4, size / 4, size / 2, size / 2]], device=device).expand(batch, -1)
    label = torch.zeros(batch, 1, size // 4, size // 4, device=device)
    label[..., size // 16 : size // 8, size // 16 : size // 8] = 1
    call = compiled(encoder, compile)

    def run() -> None:
        optimizer.zero_grad()
        with precision(device, kind.removesuffix(" weights")):
            embedding = call(image)
        with precision(device, "tf32" if kind == "tf32" else "fp32"):
            low, _ = sam.decode(embedding.float(), boxes=boxes, multimask=False)
            loss_of(low, label).backward()
        optimizer.step()

    return run


def loss_of(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy and Dice."""
    overlap = 2 * (logits.sigmoid() * label).sum() / (logits.sigmoid().sum() + label.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, label) + 1 - overlap


def ladder_step(
    which: str, variant: str, size: int, batch: int, kind: str, device: torch.device, last: bool = False
) -> Callable[[], Any]:
    """ResNet18 beside the encoder, whose embedding ours has stored and the reference computes; AdamW."""
    torch.manual_seed(0)
    spec = get_spec(variant)
    with device:
        sam = build_sam(spec, image_size=size, num_masks=8).requires_grad_(False)
    sam.mask_decoder.output_upscaling.requires_grad_(True)
    side = GatedSide(ResNetSide(), spec.prompt_dim).to(device).train()
    ours = which != "reference"
    encoder = None if ours else encoder_of("reference", variant, size, device)
    image = torch.rand(batch, 3, size, size, device=device)
    if last:
        side, image = side.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    stored = torch.randn(batch, spec.prompt_dim, size // 16, size // 16).bfloat16()
    stored = stored.pin_memory() if device.type == "cuda" else stored
    label = torch.zeros(batch, 1, size // 4, size // 4, device=device)
    learned = [parameter for module in (sam, side) for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, fused=True if ours and device.type == "cuda" else None)

    def run() -> None:
        optimizer.zero_grad()
        with precision(device, kind):
            if encoder is None:
                embedding = stored.to(device, non_blocking=True).float()
            else:
                with torch.no_grad():
                    embedding = encoder(image)
            mixed = side(image, embedding, [])
            low, _ = sam.decode(mixed, boxes=None, multimask=None)
        loss_of(low.float(), label.expand_as(low)).backward()
        optimizer.step()

    return run


def attention_alone(
    way: str, batch: int, heads: int, side: int, learn: bool, device: torch.device, tile: tuple[int, int] | None = None
) -> Callable[[], Any]:
    """One way of attention in bf16 (float32 on a CPU), by itself; 64 channels per head."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = [
        (0.3 * torch.randn(batch, heads, side * side, channels, device=device)).to(dtype).requires_grad_(learn)
        for channels in (64, 64, 64, side, side)
    ]

    def run() -> None:
        with tiles(tile):
            work()

    def work() -> None:
        with torch.set_grad_enabled(learn):
            out = WAYS[way](*tensors, 1.0)
        if learn:
            torch.autograd.grad(out, tensors, torch.ones_like(out))

    return run


@contextmanager
def tiles(tile: tuple[int, int] | None) -> Iterator[None]:
    """Other sizes of programs for the kernels of "by_rows"."""
    if tile is None:
        yield
        return
    from samseg_monai.sam import attention_triton

    before = attention_triton.TILES
    attention_triton.TILES = dict.fromkeys(before, (tile, tile))
    try:
        yield
    finally:
        attention_triton.TILES = before


@torch.no_grad()
def correctness(variant: str, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Largest and mean difference of embeddings from segment_anything's in float32, which are about 1 in size."""
    reference = encoder_of("reference", variant, size, device)
    ours = encoder_of("ours", variant, size, device)
    ours.load_state_dict(reference.state_dict())
    assert isinstance(ours, ImageEncoder)
    image = torch.randn(1, 3, size, size, device=device)
    with precision(device, "fp32"):
        expected = reference(image)
    for attention in ATTENTION:
        for kind in ("fp32", "tf32", "bf16"):
            row: dict[str, Any] = {"kind": "correctness", "attention": attention, "precision": kind}
            try:
                use(ours, attention)
                with precision(device, kind):
                    difference = (ours(image).float() - expected).abs()
                row |= {"largest": float(difference.max()), "mean": float(difference.mean())}
                row["relative"] = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
            except Exception as error:  # noqa: BLE001
                # such as a kernel that a card has not
                row["error"] = f"{type(error).__name__}: {error}"[:600]
            yield row


def gradients(variant: str, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Largest relative difference of our gradients in float32 from segment_anything's, of all parameters."""
    reference = encoder_of("reference", variant, size, device)
    ours = encoder_of("ours", variant, size, device)
    ours.load_state_dict(reference.state_dict())
    assert isinstance(ours, ImageEncoder)
    image = torch.randn(1, 3, size, size, device=device)
    weights = torch.randn(1, get_spec(variant).prompt_dim, size // 16, size // 16, device=device)
    found: dict[str | None, dict[str, Tensor]] = {}
    for attention in (None, *ATTENTION):
        row: dict[str, Any] = {"kind": "gradients", "attention": attention, "precision": "fp32"}
        try:
            encoder = reference if attention is None else ours
            if attention is not None:
                use(ours, attention)
            encoder.zero_grad()
            with precision(device, "fp32"):
                (encoder(image) * weights).mean().backward()
            found[attention] = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
            if attention is not None:
                pairs = [(found[attention][name], grad) for name, grad in found[None].items()]
                row["relative"] = max(float((got - want).norm() / want.norm().clamp_min(1e-12)) for got, want in pairs)
                yield row
        except Exception as error:  # noqa: BLE001
            row["error"] = f"{type(error).__name__}: {error}"[:600]
            yield row


PARTS = ("correctness", "encoder", "lora", "compile", "attention", "ladder", "others")


def measure(bench: Bench) -> None:
    """All rows, what matters most first."""
    options, device = bench.options, bench.device
    main, large, small = options.variant, options.size, options.size // 2
    parts = set(options.parts)
    flops = {variant: operations(variant, large) for variant in (main, *options.others)}
    bench.facts["tflop_per_image"] = {variant: round(count / 1e12, 4) for variant, count in flops.items()}

    def encode(name: str, which: str, kind: str, batch: int, needs: float = 8, model: str = main, **how: Any) -> None:
        make = partial(forward, which, model, large, batch, kind, device, **how)
        place = {"kind": "encoder", "model": model, "size": large, "batch": batch, "precision": kind, **how}
        bench.row(name, make, flops=flops[model], needs_s=needs, **place)

    def train(name: str, which: str, kind: str, size: int, batch: int, needs: float = 8, **how: Any) -> None:
        make = partial(lora_step, which, main, size, batch, kind, device, **how)
        place = {"kind": "lora_step", "model": main, "size": size, "batch": batch, "precision": kind, **how}
        bench.row(name, make, needs_s=needs, **place)

    if "correctness" in parts:
        bench.note({"model": main, "size": large}, correctness(main, large, device))
        bench.note({"model": main, "size": small}, gradients(main, small, device))
    for batch in options.batches if "encoder" in parts else ():
        encode(REFERENCE, "reference", "fp32", batch)
        encode("reference bf16", "reference", "bf16", batch)
        for kind in ("fp32", "tf32"):
            for attention in ("folded", "masked", "by_rows", "masked, by_rows"):
                encode(f"ours {kind}", "ours", kind, batch, attention=attention)
        for kind in ("bf16", "bf16 weights"):
            for attention in ("auto", "folded", "masked, by_rows"):
                encode(f"ours {kind}", "ours", kind, batch, attention=attention)
    for size in (large, small) if "lora" in parts else ():
        for batch in options.train_batches:
            train(REFERENCE, "reference", "fp32", size, batch)
            for attention in ("masked", "by_rows"):
                train("ours tf32", "ours", "tf32", size, batch, attention=attention)
            train("ours bf16", "ours", "bf16", size, batch, attention="auto")
            train("ours bf16 weights", "ours", "bf16 weights", size, batch, attention="auto")
    for batch in options.batches if "compile" in parts else ():
        for how, needs in (("blocks", 25), ("default", 60), ("reduce-overhead", 60)):
            encode(f"ours bf16 weights compiled, {how}", "ours", "bf16 weights", batch, needs, compile=how)
    for batch in options.train_batches if "compile" in parts else ():
        for size in (large, small):
            train("ours bf16 compiled, blocks", "ours", "bf16", size, batch, 45, compile="blocks")

    spec = get_spec(main)
    assert isinstance(spec, ViTSpec)
    side = large // spec.patch_size
    places = {"windows": ((-(-side // spec.window_size)) ** 2, spec.window_size), "whole image": (1, side)}
    for place, (batch, side) in places.items() if "attention" in parts else ():
        for learn in (False, True):
            where = {"model": main, "size": large, "batch": batch}
            where["kind"] = f"attention, {place}, {'forward and backward' if learn else 'forward'}"
            for way in WAYS:
                make = partial(attention_alone, way, batch, spec.num_heads, side, learn, device)
                bench.row(way, make, needs_s=6, **where)
            for tile in TILES if device.type == "cuda" else ():
                make = partial(attention_alone, "by_rows", batch, spec.num_heads, side, learn, device, tile)
                bench.row(f"by_rows, {tile[0]} queries, {tile[1]} warps", make, needs_s=6, **where)

    for batch in options.ladder_batches if "ladder" in parts else ():
        for name, which, kind, last in (
            (REFERENCE, "reference", "fp32", False), ("ours fp32", "ours", "fp32", False),
            ("ours tf32", "ours", "tf32", False), ("ours tf32 channels_last", "ours", "tf32", True),
            ("ours bf16", "ours", "bf16", False), ("ours bf16 channels_last", "ours", "bf16", True),
        ):  # fmt: skip
            place = {"kind": "ladder_step", "model": main, "size": small, "batch": batch, "precision": kind}
            bench.row(name, partial(ladder_step, which, main, small, batch, kind, device, last), needs_s=6, **place)

    for model in options.others if "others" in parts else ():
        for batch in options.batches:
            encode(REFERENCE, "reference", "fp32", batch, 12, model)
            encode("ours bf16", "ours", "bf16", batch, 10, model)
            encode("ours bf16 weights", "ours", "bf16 weights", batch, 10, model)
        how = "default" if model.endswith("_t") else "blocks"
        encode(f"ours bf16 weights compiled, {how}", "ours", "bf16 weights", batch, 60, model, compile=how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu_results", help="folder of gpu.json")
    parser.add_argument("--budget", type=float, default=330, help="seconds after which nothing new begins")
    parser.add_argument("--seconds", type=float, default=0.6, help="of timed passes per row, at most")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes per row, at most")
    parser.add_argument("--peak", type=float, default=PEAK_TFLOPS, help="dense bf16 TFLOP/s of the card")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--others", nargs="*", default=["vit_l", "vit_h", "vit_t"])
    parser.add_argument("--size", type=int, default=1024, help="in pixels; training is measured at half of it, too")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="of the encoder")
    parser.add_argument("--train-batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--ladder-batches", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--smoke", action="store_true", help="try every row once at the smallest size, on the CPU")
    options = parser.parse_args()
    if options.smoke:
        options.device, options.variant, options.others, options.size = "cpu", "tiny", ["tiny_t"], 64
        options.batches, options.train_batches, options.ladder_batches = [1], [2], [2]
        options.repeats, options.seconds = 1, 0.0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU here, nothing to measure; --smoke tries the script on a CPU")
        return
    bench = Bench(options)
    bench.write()
    measure(bench)
    failed = [row for row in bench.rows if "error" in row]
    left = [row for row in bench.rows if "left_out" in row]
    print(f"{len(bench.rows)} rows, {len(failed)} failed, {len(left)} left out; {options.output}/gpu.json", flush=True)


if __name__ == "__main__":
    main()

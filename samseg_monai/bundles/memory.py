"""What to set where the memory did not suffice: the three settings that save most in this run, and what each costs.

How much a setting saves was measured, for each kind of run, as the peak of the memory with it by that without it
(``benchmarks/memory_settings.py``, ViT-B at 512 pixels, the whole process): larger images gain more of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from samseg_monai.faults import peak_memory, save_memory
from samseg_monai.sam.spec import SPECS

if TYPE_CHECKING:
    from samseg_monai.bundles.running import Running

MOST = 3  # settings that are named
WORTH = 0.02  # of the memory: what saves less is not named
WORKER = 1e8  # bytes of a process that reads data: 30 MB of its own, and the batches it holds
PREDICTION = "prediction"
# kind of run -> setting -> what is left of the memory, and of the time of a step or a predicted slice
MEASURED: dict[str, dict[str, tuple[float, float]]] = {
    "encoder": {
        "strategy::blocks": (0.57, 0.54), "image_size": (0.58, 0.27), "checkpointing": (0.62, 1.6),
        "batch_size": (0.71, 1.0), "rectangular": (0.82, 0.68),
    },
    "all of SAM": {"checkpointing": (0.63, 1.25), "batch_size": (0.75, 1.0)},
    "frozen encoder": {"image_size": (0.8, 0.33), "checkpointing": (0.92, 1.1), "batch_size": (0.88, 1.0)},
    "without SAM": {"image_size": (0.6, 0.18), "batch_size": (0.77, 1.0)},
    PREDICTION: {"image_size": (0.9, 0.3), "batch_size": (0.92, 1.0), "rectangular": (0.95, 0.62)},
}  # fmt: skip
BF16_ON_GPU = (0.64, 0.72)  # a LoRA step of four images at 1024 pixels: benchmarks/results/gpu.json

BETTER = {"checkpointing": "True", "rectangular": "True", "autocast": "bf16"}
COSTS = {
    "batch_size": ", in the same time",
    "val_batch_size": ", in the same time",
    "image_size": ", {:.0%} of the time, small things are lost",
    "strategy::blocks": ", {:.0%} of the time, less learns",
}


def kind_of(found: Running) -> str:
    """What takes the memory of a run, as ``MEASURED`` calls it."""
    config = found.config
    if found.kind != "train":
        return PREDICTION
    if "sam_variant" not in config:
        return "without SAM"
    if "embeddings" in config:
        return "frozen encoder"
    return "encoder" if "blocks" in config["strategy"] else "all of SAM"


def saving(found: Running, on_gpu: bool, *, validating: bool = False) -> str:
    """The settings that save most, best first, as they are typed, and what each costs.

    Args:
        found: the run, whose settings count: what is set already is not named.
        on_gpu: the memory of the GPU did not suffice, not that of the machine.
        validating: in the validation of a training.
    """
    used = _used(on_gpu)
    entries = [*_measured(found, on_gpu, validating), *(() if on_gpu else _of_data(found, used))]
    ranked = sorted((entry for entry in entries if 1 - entry[0] >= WORTH), key=lambda entry: entry[0])
    named = [f"{typed} ({1 - left:.0%} less memory{cost})" for left, typed, cost in ranked[:MOST]]
    if not named:
        return save_memory(on_gpu)
    return f"what saves most here: {', or '.join(named)}"


def _measured(found: Running, on_gpu: bool, validating: bool) -> Iterator[tuple[float, str, str]]:
    """What is left of the memory, what is typed, what it costs, for each setting that means something in this run."""
    kind = PREDICTION if validating else kind_of(found)
    for name, (left, time) in (MEASURED[kind] | ({"autocast": BF16_ON_GPU} if on_gpu else {})).items():
        key = "val_batch_size" if validating and name == "batch_size" else name
        typed = _typed(key, found.parser.get(key), found.config) if name.partition("::")[0] in found.config else None
        if typed is not None:
            other = ", other masks" if kind == PREDICTION and "batch" not in key else ""
            yield left, f"--{key} {typed}", COSTS.get(key, ", {:.0%} of the time").format(time) + other


def _typed(name: str, value: Any, config: Mapping[str, Any]) -> str | None:
    """A better value of a setting as it is typed; None where there is none, or it means nothing."""
    if name in ("batch_size", "val_batch_size"):
        steps = config.get("accumulation_steps") if name == "batch_size" else None
        more = f" --accumulation_steps {2 * steps}" if isinstance(steps, int) else ""
        return f"{value // 2}{more}" if isinstance(value, int) and value > 1 else None
    if name == "image_size":
        return f"{value // 32 * 16}" if isinstance(value, int) and value >= 256 else None
    if name == "strategy::blocks":
        variant = config["sam_variant"]
        depth = _depth(variant) if variant in SPECS else 0
        late = config["strategy"].get("last") is not None  # which chooses the blocks already, and refuses numbers
        return f'"[{depth - 2}, {depth - 1}]"' if value is None and not late and depth > 2 else None
    if name == "rectangular" and not _oblong(config):
        return None
    return None if value else BETTER[name]


def _depth(variant: str) -> int:
    spec: Any = SPECS[variant]
    return spec.depth if hasattr(spec, "depth") else sum(spec.depths)


def _oblong(config: Mapping[str, Any]) -> bool:
    """Whether slices are cropped to other than squares."""
    sides = config.get("crop_size") or config.get("crop_mm")
    return isinstance(sides, list) and min(sides) < 0.9 * max(sides)


def _of_data(found: Running, used: float) -> Iterator[tuple[float, str, str]]:
    """What data take of the machine's memory."""
    for name in ("slices::num_workers", "num_workers"):
        count = found.parser.get(name)
        if isinstance(count, int) and count:
            yield 1 - count * WORKER / used, f"--{name} 0", ", data are read between the steps"
    dataset: Any = found.parser.ref_resolver.resolved_content.get("train::dataset")
    if found.parser.get("slices::cache") == "memory" and hasattr(dataset, "cache_bytes"):
        typed = "--slices::cache disk --slices::cache_dir FOLDER"
        yield 1 - dataset.cache_bytes() / used, typed, ", slices are read from there"


def _used(on_gpu: bool) -> float:
    import torch

    if on_gpu and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) or 1e9
    return float(peak_memory()) or 1e9

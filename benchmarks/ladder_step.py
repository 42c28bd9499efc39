"""A training step of the ladder: embeddings from our cache against SAM's encoder in every step, as SAM-LST runs it.

The reference is the step of Chai et al. 2023 (arXiv:2306.12737) written with segment_anything's own modules in float32:
encoder without gradient, torchvision's ResNet18 up to layer3, the gate, prompt encoder without prompts, all maps of the
mask decoder, 0.2 cross-entropy + 0.8 Dice on quarter-resolution logits, backward, AdamW. Ours is ``SamSegmenter`` with
``Ladder(decoder="upscaling", masks="random")``, reading bf16 embeddings from our cache on disk within the
step. Both train the same 2,856,737 values. The CNN alone is measured, too: what its training takes bounds what stored
embeddings can save. Times are medians of processor seconds of alternating runs on one thread; ``ratio`` is that of one
process, with one allocator for all, ``ratio_own_processes`` that of each in a process of its own. Peak memory is what
one step needs above weights and input, the median of fresh processes. Usage:

    python benchmarks/ladder_step.py --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import alternate, in_fresh_processes, in_own_processes, record, resident_start_bytes
from monai.losses import DiceCELoss
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from samseg_monai.data.slices.cache import CachedCase
from samseg_monai.faults import peak_memory
from samseg_monai.networks import SamSegmenter
from samseg_monai.sam.backbone import SamSpec
from samseg_monai.sam.build import official_encoder
from samseg_monai.sam.spec import get_spec
from samseg_monai.sam.vit import ViTSpec
from samseg_monai.strategies import Ladder
from samseg_monai.training import OnLogitGrid
from samseg_monai.training.owned import count_trainable

CLASSES = 8
FLOOR = "cnn_alone"  # what no cache of embeddings can save: the published CNN, its gradients and its optimiser
WARM = ViTSpec("warm", 32, 2, 2, (1,), window_size=3, image_size=64)  # SAM's decoder behind next to no encoder
# what of the network's settings differs; "recomputed" trades time for memory
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {}, "bf16": {"autocast": "bf16_all"}, "fp32_recomputed": {"checkpointing": True},
}  # fmt: skip


class Published(nn.Module):
    """SAM-LST's network from segment_anything's modules."""

    def __init__(self, variant: str | SamSpec, size: int) -> None:
        super().__init__()
        spec = get_spec(variant)
        grid = size // spec.patch_size
        self.encoder = official_encoder(spec, size)
        self.prompt_encoder = PromptEncoder(spec.prompt_dim, (grid, grid), (size, size), spec.mask_in_chans)
        transformer = TwoWayTransformer(2, spec.prompt_dim, spec.decoder_heads, spec.decoder_mlp_dim)
        self.decoder = MaskDecoder(
            transformer_dim=spec.prompt_dim, transformer=transformer, num_multimask_outputs=CLASSES
        )
        self.cnn = resnet18()
        self.alpha = nn.Parameter(torch.zeros(1))
        for module in (self.encoder, self.prompt_encoder, self.decoder, self.cnn.layer4, self.cnn.fc):
            module.requires_grad_(False)
        self.decoder.output_upscaling.requires_grad_(True)

    def side(self, image: torch.Tensor) -> torch.Tensor:
        cnn = self.cnn
        return cnn.layer3(cnn.layer2(cnn.layer1(cnn.maxpool(cnn.relu(cnn.bn1(cnn.conv1(image)))))))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = image.expand(-1, 3, -1, -1)
        embedding, side = self.encoder(image), self.side(image)
        gate = torch.sigmoid(self.alpha)
        sparse, dense = self.prompt_encoder(None, None, None)
        mixed = gate * embedding + (1 - gate) * side
        return self.decoder.predict_masks(mixed, self.prompt_encoder.get_dense_pe(), sparse, dense)[0]


def make_step(which: str, options: argparse.Namespace, folder: str) -> tuple[nn.Module, Callable[[], None]]:
    """Network and one training step of it on fixed input."""
    torch.manual_seed(0)
    image = torch.rand(options.batch, 1, options.size, options.size)
    label = torch.randint(0, CLASSES + 1, (options.batch, 1, options.size, options.size)).float()
    loss = OnLogitGrid(
        DiceCELoss(softmax=True, to_onehot_y=True, squared_pred=True, batch=True, lambda_ce=0.2, lambda_dice=0.8)
    )
    cached: CachedCase | None = None
    if which in ("reference", FLOOR):
        network: nn.Module = Published(options.variant, options.size)
    else:
        strategy = Ladder(decoder="upscaling", masks="random", side_weights="random")
        ours = network = SamSegmenter(
            options.variant, strategy, image_size=options.size, num_classes=CLASSES, prompt="none",
            input_scale="unit", low_res_training=True, **WAYS[which],
        )  # fmt: skip
        cached = filled_cache(folder, ours, options)
    network.train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.001, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        stored = (
            None if cached is None else torch.stack([cached.read(row)["embedding"] for row in range(options.batch)])
        )
        if which == FLOOR:
            network.side(image.expand(-1, 3, -1, -1)).mean().backward()
        else:
            logits = network(image) if stored is None else network(image, embedding=stored)
            loss(logits, label).backward()
        optimizer.step()

    return network, step


def only_step(which: str, options: argparse.Namespace, folder: str) -> Callable[[], None]:
    """The step of ``make_step`` without the network."""
    return make_step(which, options, folder)[1]


def filled_cache(folder: str, network: SamSegmenter, options: argparse.Namespace) -> CachedCase:
    """Embeddings of the right size; what they hold does not change the time of a step."""
    grid = options.size // network.spec.patch_size
    rows = torch.randn(options.batch, network.spec.prompt_dim, grid, grid)
    cached = CachedCase(folder, {"benchmark": options.size})
    cached.ensure(lambda: [{"embedding": F.normalize(rows, dim=1).bfloat16()}])
    return cached


def peak_bytes(which: str, options: argparse.Namespace) -> int:
    """Bytes that one step needs on top of weights, optimiser and input."""
    with tempfile.TemporaryDirectory() as folder:
        _, warm = make_step(which, argparse.Namespace(**{**vars(options), "variant": WARM, "size": 64}), folder)
        warm()  # loads the libraries
    with tempfile.TemporaryDirectory() as folder:
        _, step = make_step(which, options, folder)
        before = resident_start_bytes()
        step()
        return peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--size", type=int, default=512, help="side of the square input, in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--processes", type=int, default=5, help="whose peaks of memory are compared by their median")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        built = {which: make_step(which, options, f"{folder}/{which}") for which in ("reference", FLOOR, *options.ways)}
        trainable = {which: count_trainable(network) for which, (network, _) in built.items() if which != FLOOR}
        steps = {which: step for which, (_, step) in built.items()}
        median = alternate(steps, options.repeats, time.process_time)
        del built, steps
        own = in_own_processes(
            only_step,
            {which: (which, options, f"{folder}/own/{which}") for which in median},
            options.repeats,
            options.ways,
        )
    # what the allocator keeps differs from process to process by a fifth
    peaks = {which: in_fresh_processes(peak_bytes, [(which, options)] * options.processes) for which in median}
    peak = {which: statistics.median(values) for which, values in peaks.items()}
    for which in options.ways:
        record(
            f"ladder_step_cached_{which}",
            {
                "ratio": round(median["reference"] / median[which], 2),  # times faster
                "ratio_own_processes": round(own["reference"] / own[which], 2),
                "memory_ratio": round(peak[which] / peak["reference"], 3),
                "reference_s": round(median["reference"], 4),
                "ours_s": round(median[which], 4),
                "reference_own_process_s": round(own["reference"], 4),
                "ours_own_process_s": round(own[which], 4),
                "reference_peak_mib": round(peak["reference"] / 2**20, 1),
                "ours_peak_mib": round(peak[which] / 2**20, 1),
                f"{FLOOR}_s": round(median[FLOOR], 4),
                f"{FLOOR}_ratio": round(median["reference"] / median[FLOOR], 2),  # nothing that trains it can be faster
                f"{FLOOR}_memory_ratio": round(peak[FLOOR] / peak["reference"], 3),
                "trainable": trainable,
                "variant": options.variant,
                "image_size": options.size,
                "batch_size": options.batch,
                "repeats": options.repeats,
                "clock": "processor seconds of one thread",
                "weights": "random: the time of a step does not depend on them",
            },
        )


if __name__ == "__main__":
    main()

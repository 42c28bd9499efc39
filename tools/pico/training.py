"""The pre-training loop: two threads, averaged weights, resumable, and the card that explains the file it leaves."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from samseg_monai.errors import TrainingError
from samseg_monai.files import write_json, write_whole
from samseg_monai.sam.build import build_sam
from samseg_monai.sam.weights import sha256_of
from tools.pico.evaluation import HELD_OUT_SEED, ShapeDataset, evaluate_dice, evaluate_pico
from tools.pico.objective import Batch, Recipe, learning_rate, training_loss

logger = logging.getLogger(__name__)

# Each takes its part of a batch and works alone (main() gives torch one thread): threads inside every small operation
# would spend most of their time waiting for each other, above all on a machine that does other work as well.
THREADS = 2


class Pretraining:
    """The state of a run: network, averaged network, optimiser, step, seconds spent."""

    def __init__(self, recipe: Recipe, *, variant: str = "pico") -> None:
        torch.manual_seed(recipe.seed)
        self.pool = ThreadPoolExecutor(THREADS)
        self.recipe, self.step, self.seconds = recipe, 0, 0.0
        self.sam = build_sam(variant).train()
        gaussian = self.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        gaussian.copy_(gaussian.half())  # never trained: rounded now, training sees the values that are saved
        self.average = build_sam(variant)
        self.average.load_state_dict(self.sam.state_dict())
        decayed = [p for p in self.sam.parameters() if p.ndim > 1]
        plain = [p for p in self.sam.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))

    def batches(self) -> Iterator[Batch]:
        """The batches that are left, drawn by one worker process while this one trains."""
        r = self.recipe
        images = ShapeDataset(
            r.seed, self.step * r.batch_size, r.steps * r.batch_size,
            size=self.sam.image_size, objects=r.objects, jitter=r.box_jitter,
        )  # fmt: skip
        yield from DataLoader(images, batch_size=r.batch_size, num_workers=1, prefetch_factor=4)

    def advance(self, batch: Batch) -> float:
        """One optimiser step; returns the loss. Raises TrainingError when it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        parameters = [p for p in self.sam.parameters() if p.requires_grad]
        parts = list(zip(*(tensor.chunk(THREADS) for tensor in batch), strict=True))
        results = list(self.pool.map(lambda part: self.gradients(part, parameters), parts))
        loss = sum(value for value, _ in results) / len(parts)
        if not math.isfinite(loss):
            raise TrainingError(f"pre-training: the loss of step {self.step} is {loss}; lower the learning rate")
        for parameter, *gradients in zip(parameters, *(grads for _, grads in results), strict=True):
            found = [g for g in gradients if g is not None]
            parameter.grad = sum(found[1:], start=found[0]) / len(parts) if found else None
        torch.nn.utils.clip_grad_norm_(self.sam.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.sam.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        return loss

    def gradients(self, part: Batch, parameters: list[torch.Tensor]) -> tuple[float, tuple]:
        """Loss of one part of a batch and its gradients, None for a parameter that it does not use."""
        loss = training_loss(self.sam, part, self.recipe)
        return loss.item(), torch.autograd.grad(loss, parameters, allow_unused=True)

    def save(self, path: Path) -> None:
        """Write all state; the old file stays whole until the new one is complete."""
        state = {
            "recipe": asdict(self.recipe), "step": self.step, "seconds": self.seconds, "sam": self.sam.state_dict(),
            "average": self.average.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        write_whole(path, lambda part: torch.save(state, part))

    def resume(self, path: Path) -> None:
        """Continue from ``path``. Raises TrainingError when it was written under another recipe."""
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            was, now = state["recipe"], asdict(self.recipe)
            raise TrainingError(f"{path.name}: its recipe is {was}, asked for is {now}; give the same or drop --resume")
        self.sam.load_state_dict(state["sam"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def write_weights(run: Pretraining, folder: Path, *, held_out: int) -> dict:
    """Write ``pico.safetensors`` (fp16) and ``pico.json`` (the card) to ``folder``; returns the card.

    Held-out Dice is measured in fp32 on the weights as rounded to fp16, which is what a user will load.
    """
    name = run.sam.spec.name
    rounded = {key: value.half().contiguous() for key, value in run.average.state_dict().items()}
    kept = build_sam(run.sam.spec)
    kept.load_state_dict({key: value.float() for key, value in rounded.items()})
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    save_file(rounded, weights, metadata={"format": "pt"})
    scores = evaluate_dice(kept, n=held_out, seed=HELD_OUT_SEED)
    first = min(64, held_out)
    card = {
        "name": name,
        "description": "A small SAM pre-trained on drawn shapes, for demos and tests; never for clinical use.",
        "status": "final" if run.step >= run.recipe.steps else "interim",
        "architecture": asdict(run.sam.spec),
        "parameters": sum(p.numel() for p in kept.parameters()),
        "input": "3 equal grey channels, z-scored per image (input_scale zscore), zero-padded to the square",
        "recipe": asdict(run.recipe),
        "command": "python -m tools.pico --output samseg_monai/sam",
        "steps_done": run.step,
        "images_seen": run.step * run.recipe.batch_size,
        "seconds": round(run.seconds),
        "held_out": {
            "seed": HELD_OUT_SEED,
            "images": held_out,
            "objects": held_out * run.recipe.objects,
            "box_jitter": run.recipe.box_jitter,
            "dice": round(scores["dice"], 4),
            "box_ellipse_dice": round(scores["box_ellipse_dice"], 4),
            "first_images": first,
            "dice_first_images": round(evaluate_pico(kept, n=first), 4),
        },
        "torch": torch.__version__,
        "numpy": np.__version__,
        "sha256": sha256_of(weights),
    }
    write_json(folder / f"{name}.json", card)
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def pretrain(run: Pretraining, output: Path, *, checkpoint: Path, minutes: float, held_out: int) -> dict:
    """Train ``run`` to the end of its recipe; every ``minutes`` a checkpoint and interim weights are written."""
    began, saved, recent, first = time.monotonic() - run.seconds, time.monotonic(), [], run.step
    start = time.monotonic()
    for batch in run.batches():
        recent.append(run.advance(batch))
        run.seconds = time.monotonic() - began
        if len(recent) == 50:
            pace = (run.step - first) / (time.monotonic() - start)
            logger.info(
                "step %d of %d  loss %.4f  %.1f images/s  %.0f min left", run.step, run.recipe.steps,
                sum(recent) / len(recent), pace * run.recipe.batch_size, (run.recipe.steps - run.step) / pace / 60,
            )  # fmt: skip
            recent = []
        if time.monotonic() - saved > 60 * minutes:
            run.save(checkpoint)
            card = write_weights(run, output, held_out=min(64, held_out))
            logger.info("interim weights written: held-out Dice %.4f (%d images)", card["held_out"]["dice"], 64)
            saved = time.monotonic()
    run.seconds = time.monotonic() - began
    run.save(checkpoint)
    return write_weights(run, output, held_out=held_out)

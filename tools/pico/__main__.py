"""Command line of the pre-training; see the package's docstring."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from samseg_monai.errors import ConfigError
from tools.pico.evaluation import HELD_OUT_SEED
from tools.pico.objective import Recipe
from tools.pico.training import Pretraining, pretrain

logger = logging.getLogger("tools.pico")


def main(argv: list[str] | None = None) -> None:
    """Command line of ``python -m tools.pico``."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m tools.pico", description="Pre-train pico SAM on drawn shapes")
    parser.add_argument("--output", type=Path, required=True, help="folder for pico.safetensors and pico.json")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch-size", type=int, default=recipe.batch_size, help="images per step")
    parser.add_argument("--lr", type=float, default=recipe.lr)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/pico-pretraining.pt"), help="state for --resume")
    parser.add_argument("--minutes", type=float, default=5.0, help="between two checkpoints")
    parser.add_argument("--held-out", type=int, default=512, help="images for the card's Dice")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not 0 <= given.seed < HELD_OUT_SEED:
        raise ConfigError(f"--seed is {given.seed}; use one from 0 to {HELD_OUT_SEED - 1}, the next stream is held out")
    torch.set_num_threads(1)
    run = Pretraining(Recipe(seed=given.seed, steps=given.steps, batch_size=given.batch_size, lr=given.lr))
    if given.resume and given.checkpoint.exists():
        run.resume(given.checkpoint)
    logger.info("pico SAM: %d parameters, from step %d", sum(p.numel() for p in run.sam.parameters()), run.step)
    card = pretrain(run, given.output, checkpoint=given.checkpoint, minutes=given.minutes, held_out=given.held_out)
    logger.info("done: held-out Dice %.4f, %s", card["held_out"]["dice"], given.output / "pico.safetensors")


if __name__ == "__main__":
    main()

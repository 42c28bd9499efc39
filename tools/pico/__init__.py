"""Pre-train pico SAM on procedurally drawn shapes with box prompts.

    python -m tools.pico --output samseg_monai/sam          (or: make pico)

writes ``pico.safetensors`` (fp16) and its card ``pico.json``. Every image comes from (seed, index), so nothing is
downloaded and an interrupted run continues where it stood with ``--resume``. The recipe follows SAM's (Kirillov et al.
2023, arXiv:2304.02643, section 3 and appendix A) at the size of two CPU cores: one box prompt per object, the single
mask learns from every object, of the three others only the best one of each object, and the quality head learns IoU.

``objective`` holds the recipe and its losses, ``evaluation`` the held-out Dice, ``training`` the loop and the card.
"""

from __future__ import annotations

from tools.pico.evaluation import HELD_OUT_SEED, evaluate_pico
from tools.pico.objective import Recipe
from tools.pico.training import Pretraining, pretrain, write_weights

__all__ = ["HELD_OUT_SEED", "Pretraining", "Recipe", "evaluate_pico", "pretrain", "write_weights"]

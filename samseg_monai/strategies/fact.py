"""Factor-tuning: low-rank updates of common factors in SAM's image encoder (Jie and Deng 2023, arXiv:2212.03145)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from samseg_monai.adapters.lora import FacTLinear, Factors
from samseg_monai.errors import AdapterError
from samseg_monai.strategies.base import Segmenter
from samseg_monai.strategies.lora import LoRA


class FacT(LoRA):
    """Low-rank updates of all chosen layers with two factors in common, and a small core of each layer's own (FacT-TT).

    Blocks of one width share their factors; in MobileSAM, whose stages differ in width, those of a stage do.

    Args:
        rank: of the updates.
        scale: factor of the updates, above 0.
        targets: as of ``LoRA``; the authors' code adapts lin1 and lin2, too, in four parts each.
        blocks, last, dropout: as of ``LoRA``; dropout is in the authors' code behind the core.
        decoder: also train what the task uses of the mask decoder; "hierarchical" with a second one behind it.
    Raises:
        AdapterError: as of ``LoRA``.
    """

    decoders = ("hierarchical",)

    def __init__(
        self,
        rank: int = 16,
        *,
        scale: float = 1.0,
        targets: Sequence[str] = ("q", "k", "v", "proj"),
        blocks: Sequence[int] | None = None,
        last: float | None = None,
        dropout: float = 0.0,
        decoder: bool | Literal["hierarchical"] = False,
    ) -> None:
        if not scale > 0:
            raise AdapterError(f"FacT cannot be built: scale must be greater than 0, got {scale}")
        super().__init__(
            rank,
            alpha=scale * rank,
            targets=targets,
            blocks=blocks,
            last=last,
            dropout=dropout,
            decoder=decoder,  # type: ignore[arg-type]
        )
        self.scale, self.name = scale, "fact"

    def install(self, segmenter: Segmenter) -> list[str]:
        """Replace the chosen layers and put the factors beside SAM; owned are both, and what ``decoder`` says."""
        owned = super().install(segmenter)
        layers = [layer for layer in segmenter.modules() if isinstance(layer, FacTLinear)]
        inputs = {layer.in_features: None for layer in layers}
        outputs = {layer.out_features // layer.num_parts: None for layer in layers}
        segmenter.factors = Factors(self.rank, inputs, outputs, like=layers[0].weight)
        for layer in layers:
            layer.shared = (segmenter.factors,)
        return [*owned, *(f"factors.{name}" for name in segmenter.factors.state_dict())]

    def _layer(self, base: nn.Linear, **rows: Any) -> FacTLinear:
        return FacTLinear(base, rank=self.rank, alpha=self.alpha, dropout=self.dropout, **rows)

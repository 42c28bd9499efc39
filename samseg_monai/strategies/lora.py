"""LoRA as a strategy: low-rank updates in the linear layers of SAM's image encoder, and the mask decoder if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from samseg_monai.adapters.lora import DoRALinear, LoRALinear
from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.sam.backbone import TARGETS, Rows
from samseg_monai.strategies.base import Segmenter, Strategy, decoder_names, unused_of_decoder


class LoRA(Strategy):
    """Low-rank updates in SAM's image encoder (Hu et al. 2021, arXiv:2106.09685; on SAM: Zhang and Liu 2023, SAMed).

    Args:
        rank: rank of each update.
        alpha: scaling is ``alpha / rank``; None means ``rank`` (scaling 1, as SAMed).
        targets: subset of q, k, v (attention inputs), proj (attention output), lin1, lin2 (MLP).
        blocks: encoder blocks to adapt, 0-based; None means all that have attention. Those before the first of them
            keep nothing for the backward pass: with the last blocks alone a step needs less memory and time.
        dropout: probability, 0 <= p < 1, on the input of the update during training.
        rank_stabilised: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732).
        decoder: also train what the task uses of the mask decoder.
        dora: learn the magnitude of each adapted row beside its direction (Liu et al. 2024, arXiv:2402.09353).
    Raises:
        AdapterError: listing what is wrong with the arguments; on installing also when they do not fit the encoder.
    """

    name = "lora"
    training_only = ("dropout",)

    def __init__(
        self,
        rank: int = 4,
        *,
        alpha: float | None = None,
        targets: Sequence[str] = ("q", "v"),
        blocks: Sequence[int] | None = None,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        decoder: bool = False,
        dora: bool = False,
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets = tuple(targets)
        self.blocks = None if blocks is None else tuple(blocks)
        self.rank_stabilised, self.decoder, self.dora = rank_stabilised, decoder, dora
        if dora:
            self.name = "dora"
        options = ", ".join(TARGETS)
        problems = [f"target {t!r} is unknown; the options are {options}" for t in self.targets if t not in TARGETS]
        if not self.targets or len(set(self.targets)) < len(self.targets):
            problems.append(f"targets must name different layers of {options}, got {self.targets}")
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            problems.append(f"blocks must be different block numbers, got {self.blocks}; None means all")
        raise_all(problems, AdapterError, "LoRA cannot be built")

    def install(self, segmenter: Segmenter) -> list[str]:
        """Replace the chosen layers of the encoder; owned are their updates, and with ``decoder`` the mask decoder."""
        encoder = segmenter.sam.image_encoder
        layers = [block for _, block in encoder.named_blocks()]
        able = [index for index, block in enumerate(layers) if set(self.targets) <= encoder.targets(block).keys()]
        chosen = able if self.blocks is None else self.blocks
        outside = [index for index in chosen if not 0 <= index < len(layers)]
        if outside:
            raise AdapterError(f"LoRA blocks {outside} are not in this encoder; it has blocks 0 .. {len(layers) - 1}")
        if unable := [index for index in chosen if index not in able]:
            raise AdapterError(f"LoRA blocks {unable} have no {', '.join(self.targets)}; blocks {able} have them")
        replacements = [
            replacement
            for index in chosen
            for replacement in self._layers(layers[index], encoder.targets(layers[index]))
        ]
        if not replacements:
            raise AdapterError(f"LoRA replaces no layer (targets {self.targets}, blocks {self.blocks}): nothing learns")
        for parent, child, layer in replacements:  # only now: an error above leaves the network as it was
            setattr(parent, child, layer)
        owned = {
            f"{prefix}.{name}"
            for prefix, layer in segmenter.named_modules()
            if isinstance(layer, LoRALinear)
            for name in layer.lora_names()
        }
        if self.decoder:
            owned |= set(decoder_names(segmenter)) - set(self.unused(segmenter))
        return [name for name in segmenter.state_dict() if name in owned]

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments; ``dora`` only where it is set, since older cards do not know it."""
        arguments = super().arguments()
        return arguments if self.dora else {key: value for key, value in arguments.items() if key != "dora"}

    def start(self, segmenter: Segmenter, *, download: bool = True) -> None:
        """Take the magnitudes of DoRA from the base weights, which are there only now."""
        for layer in segmenter.modules():
            if isinstance(layer, DoRALinear):
                layer.reset_magnitude()

    def unused(self, segmenter: Segmenter) -> list[str]:
        """With ``decoder``: the mask quality head, and the networks of masks that are not returned."""
        return unused_of_decoder(segmenter) if self.decoder else []

    def _layers(self, block: nn.Module, targets: Mapping[str, Rows]) -> list[tuple[nn.Module, str, LoRALinear]]:
        """Parent, attribute name and new layer for everything that is to be replaced in one encoder block."""
        parts: dict[tuple[str, int, int], list[int]] = {}
        for target in self.targets:
            rows = targets[target]
            parts.setdefault((rows.layer, rows.parts, rows.groups), []).append(rows.part)
        replacements = []
        for (path, num_parts, groups), chosen in parts.items():
            parent, _, child = path.rpartition(".")
            base = block.get_submodule(path)
            if not isinstance(base, nn.Linear):
                raise AdapterError(f"LoRA needs a linear layer at {path} of each block, got {type(base).__name__}")
            layer = (DoRALinear if self.dora else LoRALinear)(
                base,
                rank=self.rank,
                alpha=self.alpha,
                parts=chosen,
                num_parts=num_parts,
                groups=groups,
                dropout=self.dropout,
                rank_stabilised=self.rank_stabilised,
            )
            replacements.append((block.get_submodule(parent), child, layer))
        return replacements

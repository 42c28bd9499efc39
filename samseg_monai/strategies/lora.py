"""LoRA as a strategy: low-rank updates in linear layers of SAM's image encoder, and in the mask decoder if wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from segment_anything.modeling.transformer import Attention
from torch import nn

from samseg_monai.adapters.lora import DoRALinear, LoRALinear
from samseg_monai.choices import SECOND
from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.sam.backbone import TARGETS, Rows
from samseg_monai.strategies.base import OnEncoder, Segmenter, added_names, block_problems, chosen_blocks, head_names


class LoRA(OnEncoder):
    """Low-rank updates in SAM's image encoder (Hu et al. 2021, arXiv:2106.09685; on SAM: Zhang and Liu 2023, SAMed).

    Args:
        rank: rank of each update.
        alpha: scaling is ``alpha / rank``; None means ``rank`` (scaling 1, as SAMed).
        targets: subset of q, k, v (attention inputs), proj (attention output), lin1, lin2 (MLP).
        blocks: encoder blocks to adapt, 0-based; None means all that have attention. Those before the first of them
            keep nothing for the backward pass: with the last blocks alone a step needs less memory and time.
        last: adapt this fraction of the blocks with attention, 0 < last <= 1, from the end ("late" LoRA); at least
            that many, so that 0.08 is one of twelve. In place of ``blocks``.
        dropout: probability, 0 <= p < 1, on the input of the update during training.
        rank_stabilised: scale by ``alpha / sqrt(rank)`` (Kalajdzievski 2023, arXiv:2312.03732).
        decoder: True also trains what the task uses of the mask decoder. "lora" puts updates of the same rank into q
            and v of its attention layers instead; of several classes the mask head, which starts anew, learns whole.
            "samed" is True and the prompt encoder's ``no_mask_embed``, which stands for a mask that is not given.
            "hierarchical" is that with a second decoder behind it (Cheng et al. 2024, H-SAM), without prompts; "h_sam"
            computes what the authors' code does, and so takes their files.
        dora: learn the magnitude of each adapted row beside its direction (Liu et al. 2024, arXiv:2402.09353).
    Raises:
        AdapterError: listing what is wrong with the arguments; on installing also when they do not fit the encoder.
    """

    name = "lora"
    training_only = ("dropout",)
    newer: ClassVar[dict[str, Any]] = {"dora": False, "last": None}
    decoders: ClassVar[tuple[str, ...]] = ("lora", "samed", "hierarchical", "h_sam")

    def __init__(
        self,
        rank: int = 4,
        *,
        alpha: float | None = None,
        targets: Sequence[str] = ("q", "v"),
        blocks: Sequence[int] | None = None,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        decoder: bool | Literal["lora", "samed", "hierarchical", "h_sam"] = False,
        dora: bool = False,
        last: float | None = None,
    ) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets = tuple(targets)
        self.blocks = None if blocks is None else tuple(blocks)
        self.rank_stabilised, self.decoder, self.dora, self.last = rank_stabilised, decoder, dora, last
        late = "" if last is None else f"_late_{round(100 * last)}"
        published = {"samed": "samed", **dict.fromkeys(SECOND, "h_sam")}.get(str(decoder), "lora")
        self.name = f"{'dora' if dora else published}{late}"
        options = ", ".join(TARGETS)
        problems = [f"target {t!r} is unknown; the options are {options}" for t in self.targets if t not in TARGETS]
        if not self.targets or len(set(self.targets)) < len(self.targets):
            problems.append(f"targets must name different layers of {options}, got {self.targets}")
        problems += self.decoder_problems() + block_problems(self.blocks, last)
        raise_all(problems, AdapterError, "LoRA cannot be built")

    def install(self, segmenter: Segmenter) -> list[str]:
        """Replace the chosen layers; owned are their updates, and of the mask decoder what ``decoder`` says."""
        encoder, second = segmenter.sam.image_encoder, self.second_decoder(segmenter)
        replacements = [
            replacement
            for block in chosen_blocks(encoder, self.targets, self.blocks, self.last, "LoRA")
            for replacement in self._layers(block, encoder.targets(block))
        ]
        if not replacements:
            raise AdapterError(f"LoRA replaces no layer (targets {self.targets}, blocks {self.blocks}): nothing learns")
        if self.decoder == "lora":
            for layer in list(segmenter.sam.mask_decoder.transformer.modules()):
                if isinstance(layer, Attention):
                    replacements += [(layer, name, self._layer(getattr(layer, name))) for name in ("q_proj", "v_proj")]
        for parent, child, layer in replacements:  # only now: an error above leaves the network as it was
            setattr(parent, child, layer)
        owned = added_names(segmenter, LoRALinear, own=("weight", "bias"))
        if self.decoder != "lora":
            owned |= self.learnt_decoder(segmenter, second)
        elif segmenter.num_classes > 1:
            owned |= set(head_names(segmenter)) - set(self.unused(segmenter))
        return [name for name in segmenter.state_dict() if name in owned]

    def start(self, segmenter: Segmenter, *, download: bool = True) -> None:
        """Take the magnitudes of DoRA from the base weights, which are there only now."""
        for layer in segmenter.modules():
            if isinstance(layer, DoRALinear):
                layer.reset_magnitude()

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
            layer = self._layer(base, parts=chosen, num_parts=num_parts, groups=groups)
            replacements.append((block.get_submodule(parent), child, layer))
        return replacements

    def _layer(self, base: nn.Linear, **rows: Any) -> LoRALinear:
        return (DoRALinear if self.dora else LoRALinear)(
            base,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_stabilised=self.rank_stabilised,
            **rows,
        )

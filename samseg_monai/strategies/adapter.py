"""Bottleneck adapters in SAM's image encoder: behind its layers, beside its MLPs, and between the slices of a slab."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from samseg_monai.adapters.bottleneck import BottleneckLinear, DepthBranch
from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.strategies.base import OnEncoder, Segmenter, added_names, block_problems, chosen_blocks

# place -> layers of a block that one goes behind, or that it stands beside, the activation and the name of the strategy
PLACES = {
    "serial": (("proj", "lin2"), "gelu", "adapter"),
    "parallel": (("lin1", "lin2"), "relu", "adaptformer"),
    "both": (("proj", "lin1", "lin2"), "relu", "medsa"),
}


class Adapter(OnEncoder):
    """Bottlenecks of two linear layers in the blocks of SAM's frozen image encoder.

    ``place="serial"`` is Houlsby et al. 2019 (arXiv:1902.00751): one behind the attention's projection and one behind
    the MLP, each before the way around is added. ``place="parallel"`` with a scale of 0.1 is AdaptFormer (Chen et al.
    2022, arXiv:2205.13535): one beside the MLP, reading what the MLP reads. ``place="both"`` is Medical SAM Adapter (Wu
    et al. 2023, arXiv:2304.12620): one behind the attention's projection, and one beside the MLP that is scaled; with a
    ``depth`` of 2 or more also its space-depth transpose, by which a slice attends to its neighbours in a slab
    (``DepthBranch``), through a third. The paper's adapters in the mask decoder, which prompts condition, are left out:
    ``decoder`` trains the decoder itself. Here the second layer of each starts at zero, so that a fresh network is SAM,
    and no normalisation learns.

    Args:
        width: of the bottleneck.
        place: "serial", "parallel" or "both".
        scale: factor of what a bottleneck adds, above 0; of "both" that beside the MLP.
        blocks: encoder blocks with adapters, 0-based; None means all that have attention.
        last: this fraction of the blocks with attention has them, from the end; in place of ``blocks``.
        decoder: also train what the task uses of the mask decoder; "hierarchical" with a second one behind it.
        depth: with "both", slices of a slab; 1: every slice is alone.
    Raises:
        AdapterError: listing what is wrong with the arguments; on installing also when they do not fit the encoder.
    """

    newer: ClassVar[dict[str, Any]] = {"depth": 1}

    def __init__(
        self,
        width: int = 64,
        *,
        place: str = "serial",
        scale: float = 1.0,
        blocks: Sequence[int] | None = None,
        last: float | None = None,
        decoder: bool | Literal["hierarchical"] = False,
        depth: int = 1,
    ) -> None:
        self.width, self.place, self.scale, self.last, self.decoder = width, place, scale, last, decoder
        self.blocks, self.depth = None if blocks is None else tuple(blocks), depth
        problems = [] if place in PLACES else [f"place must be one of {', '.join(map(repr, PLACES))}, got {place!r}"]
        self.name = PLACES[place][2] if not problems else place
        if depth < 1 or (depth > 1 and place != "both"):
            problems.append(f"depth must be 1, or with place 'both' more, got {depth}")
        problems += block_problems(self.blocks, last) + self.decoder_problems()
        raise_all(problems, AdapterError, "Adapter cannot be built")

    def install(self, segmenter: Segmenter) -> list[str]:
        """Put the bottlenecks in; owned are their parameters, and with ``decoder`` the mask decoder."""
        encoder, targets = segmenter.sam.image_encoder, PLACES[self.place][0]
        second = self.second_decoder(segmenter)
        layers: dict[tuple[nn.Module, str], nn.Module] = {}
        for block in chosen_blocks(encoder, targets, self.blocks, self.last, "Adapter"):
            paths = [encoder.targets(block)[target].layer for target in targets]
            slots = [(block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]
            layers |= dict(zip(slots, self._layers(*(getattr(*slot) for slot in slots)), strict=True))
        if not layers:
            raise AdapterError(f"Adapter finds no block with {', '.join(targets)} in this encoder: nothing learns")
        for (parent, name), layer in layers.items():  # only now: an error above leaves the network as it was
            setattr(parent, name, layer)
            if self.depth > 1 and name == "proj":
                depth = {"depth": self.depth, "views": getattr(segmenter, "views", 1)}
                parent.depth = DepthBranch(layer, width=self.width, **depth)  # type: ignore[arg-type]
        owned = added_names(segmenter, BottleneckLinear, own=("weight", "bias"))
        owned |= added_names(segmenter, DepthBranch)
        owned |= self.learnt_decoder(segmenter, second)
        return [name for name in segmenter.state_dict() if name in owned]

    def _layers(self, *layers: nn.Linear) -> list[nn.Module]:
        """What stands in place of the layers of a block."""
        alone: dict[str, Any] = {"width": self.width, "activation": PLACES[self.place][1]}
        if self.place == "serial":
            return [BottleneckLinear(layer, scale=self.scale, **alone) for layer in layers]
        behind = [BottleneckLinear(layer, **alone) for layer in layers[:-2]]
        return [*behind, *BottleneckLinear.beside(*layers[-2:], scale=self.scale, **alone)]

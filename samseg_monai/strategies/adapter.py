"""Bottleneck adapters in SAM's image encoder: behind its layers, or beside its MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from samseg_monai.adapters.bottleneck import BottleneckLinear
from samseg_monai.errors import AdapterError, raise_all
from samseg_monai.strategies.base import OnEncoder, Segmenter, added_names, block_problems, chosen_blocks

# place -> layers of a block that one goes behind, or that it stands beside, and the activation of the paper's code
PLACES = {"serial": (("proj", "lin2"), "gelu"), "parallel": (("lin1", "lin2"), "relu")}


class Adapter(OnEncoder):
    """Bottlenecks of two linear layers in the blocks of SAM's frozen image encoder.

    ``place="serial"`` is Houlsby et al. 2019 (arXiv:1902.00751): one behind the attention's projection and one behind
    the MLP, each before the way around is added. ``place="parallel"`` with a scale of 0.1 is AdaptFormer (Chen et al.
    2022, arXiv:2205.13535): one beside the MLP, reading what the MLP reads. Here the second layer starts at zero, so
    that a fresh network is SAM, and no normalisation learns.

    Args:
        width: of the bottleneck.
        place: "serial" or "parallel".
        scale: factor of what a bottleneck adds, above 0.
        blocks: encoder blocks with adapters, 0-based; None means all that have attention.
        last: this fraction of the blocks with attention has them, from the end; in place of ``blocks``.
        decoder: also train what the task uses of the mask decoder; "hierarchical" with a second one behind it.
    Raises:
        AdapterError: listing what is wrong with the arguments; on installing also when they do not fit the encoder.
    """

    def __init__(
        self,
        width: int = 64,
        *,
        place: str = "serial",
        scale: float = 1.0,
        blocks: Sequence[int] | None = None,
        last: float | None = None,
        decoder: bool | Literal["hierarchical"] = False,
    ) -> None:
        self.width, self.place, self.scale, self.last, self.decoder = width, place, scale, last, decoder
        self.blocks = None if blocks is None else tuple(blocks)
        self.name = "adapter" if place == "serial" else "adaptformer"
        problems = [] if place in PLACES else [f"place must be one of {', '.join(map(repr, PLACES))}, got {place!r}"]
        problems += block_problems(self.blocks, last) + self.decoder_problems()
        raise_all(problems, AdapterError, "Adapter cannot be built")

    def install(self, segmenter: Segmenter) -> list[str]:
        """Put the bottlenecks in; owned are their parameters, and with ``decoder`` the mask decoder."""
        encoder, (targets, _) = segmenter.sam.image_encoder, PLACES[self.place]
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
        owned = added_names(segmenter, BottleneckLinear, own=("weight", "bias"))
        owned |= self.learnt_decoder(segmenter, second)
        return [name for name in segmenter.state_dict() if name in owned]

    def _layers(self, first: nn.Linear, last: nn.Linear) -> Sequence[nn.Module]:
        """What stands in place of two layers of a block."""
        arguments = {"width": self.width, "scale": self.scale, "activation": PLACES[self.place][1]}
        if self.place == "parallel":
            return BottleneckLinear.beside(first, last, **arguments)
        return [BottleneckLinear(layer, **arguments) for layer in (first, last)]  # type: ignore[arg-type]

"""Ladder side-tuning as a strategy, with the ablations of its paper (Chai et al. 2023, SAM-LST, arXiv:2306.12737)."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from samseg_monai.adapters.ladder import MIXES, GatedSide, ResNetSide
from samseg_monai.errors import AdapterError, WeightsError, raise_all
from samseg_monai.sam.weights import RANDOM, find_weights, read_state
from samseg_monai.strategies.base import OnEncoder, Segmenter, decoder_names, head_names, unused_of_decoder

DECODERS = ("upscaling", "masks", "full", "hierarchical")
MASKS = ("random", "sam")
_LEARNT = {
    "upscaling": ("output_upscaling.",),
    "masks": ("output_upscaling.", "mask_tokens.", "output_hypernetworks_mlps."),
    "full": ("",),
    "hierarchical": ("",),
}


class Ladder(OnEncoder):
    """A network beside SAM's frozen encoder, mixed into its embedding; parts of the mask decoder learn with it.

    As published, only the side network, the gate and ``output_upscaling`` learn (``decoder="upscaling"``), while mask
    tokens and hyper-networks stay random and frozen (``masks="random"``): 2,856,737 values with ResNet18 and ViT-B.

    Args:
        side: module (B, 3, H, W) to (B, C, H/16, W/16); None is ``ResNetSide``.
        mix: "gate" is the ladder, "side" the side network alone, "sam" SAM's embedding alone (the paper's ablations).
        decoder: what learns of the mask decoder: "upscaling"; "masks": also mask tokens and hyper-networks; "full": all
            that the task uses; "hierarchical": that with a second decoder behind it (H-SAM), not with mix "side".
        masks: what mask tokens and hyper-networks start from where their number is not SAM's: "random", or "sam":
            SAM's own four, repeated in turn.
        side_weights: what the side network starts from: None takes the published weights if it has any (ImageNet for
            ``ResNetSide``), "random" takes none, else a file.
    Raises:
        AdapterError: listing what is wrong with the arguments; on installing, when the side network does not fit.
    """

    training_only = ("side_weights", "masks")

    def __init__(
        self,
        side: nn.Module | None = None,
        *,
        mix: str = "gate",
        decoder: str = "masks",
        masks: str = "sam",
        side_weights: str | None = None,
    ) -> None:
        options = {"mix": (mix, MIXES), "decoder": (decoder, DECODERS), "masks": (masks, MASKS)}
        problems = [
            f"{key}: got {value!r}; choose one of {', '.join(map(repr, allowed))}"
            for key, (value, allowed) in options.items()
            if value not in allowed
        ]
        if mix == "sam" and side is not None:
            problems.append("side: got a network, but mix='sam' has none; leave it out")
        if mix == "side" and decoder == "hierarchical":
            problems.append("decoder: 'hierarchical' goes on from SAM's embedding, which mix='side' leaves out")
        raise_all(problems, AdapterError, "Ladder cannot be built")
        self.side = ResNetSide() if side is None and mix != "sam" else side
        self.mix, self.decoder, self.masks, self.side_weights = mix, decoder, masks, side_weights
        self.tile_masks = masks == "sam"
        self.name = {"gate": "ladder", "side": "cnn_only", "sam": "sam_only"}[mix]
        if mix == "gate" and decoder == "upscaling":
            self.name = "ladder_paper"

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as JSON values; a side network is named by its class, a file by its last part."""
        kind = type(self.side)
        named: dict[str, Any] = {"side": None if self.side is None else f"{kind.__module__}.{kind.__qualname__}"}
        if self.side_weights is not None:  # cards travel: they must not tell where files lie on a machine
            named["side_weights"] = Path(self.side_weights).name
        return {**super().arguments(), **named}

    def install(self, segmenter: Segmenter) -> list[str]:
        """Put the side network beside the encoder; owned are it, the gate and what learns of the mask decoder."""
        second = self.second_decoder(segmenter)
        if self.side is not None:
            spec = segmenter.sam.spec
            segmenter.side = GatedSide(self.side, spec.prompt_dim, mix=self.mix, patch_size=spec.patch_size)
            if hasattr(self.side, "checkpointing"):
                self.side.checkpointing = segmenter.sam.image_encoder.checkpointing  # type: ignore[assignment]
        owned = {name for name in segmenter.state_dict() if name.startswith("side.")} - set(self.unused(segmenter))
        owned |= set(self._learnt(segmenter)) | set(self.fixed(segmenter))
        owned |= set() if second is None else self.learnt_decoder(segmenter, second)
        return [name for name in segmenter.state_dict() if name in owned]

    def fixed(self, segmenter: Segmenter) -> list[str]:
        """Mask tokens and hyper-networks of a mask head that is not SAM's, where they do not learn."""
        if segmenter.num_classes == 1:
            return []
        kept = {*self._learnt(segmenter), *unused_of_decoder(segmenter)}
        return [name for name in head_names(segmenter) if name not in kept]

    def unused(self, segmenter: Segmenter) -> list[str]:
        """The mask quality head, for one class the hyper-networks of other masks, idle parts of the side network."""
        side = getattr(segmenter, "side", None)
        idle = side.idle if isinstance(side, GatedSide) else []
        return unused_of_decoder(segmenter) + [f"side.net.{name}" for name in idle]

    def start(self, segmenter: Segmenter, *, download: bool = True) -> None:
        """Load the side network's weights by name; see ``side_weights``.

        Raises:
            WeightsError: the file is absent, unreadable or lacks tensors of the side network (all are named). Counts
                of batches may lack: files older than torch 0.4.1 have none, and nothing depends on them.
        """
        published = getattr(self.side, "published", None)
        if self.side is None or self.side_weights == RANDOM or (self.side_weights is None and published is None):
            return
        path = find_weights(published or "side network", self.side_weights, download=download, key="side_weights")
        wanted, state = self.side.state_dict(), read_state(path)
        problems = [
            f"{name}: {'missing' if name not in state else f'shape {tuple(state[name].shape)}'}, "
            f"the network has {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if (name in state or not name.endswith("num_batches_tracked"))
            and (name not in state or state[name].shape != tensor.shape)
        ]
        raise_all(problems, WeightsError, f"{path} does not fit the side network {type(self.side).__name__}")
        # its layers behind the ladder's last one are of no use here
        self.side.load_state_dict({name: state.get(name, tensor) for name, tensor in wanted.items()})

    def facts(self, segmenter: Segmenter) -> dict[str, Any]:
        """``gate``: g of ``g * sam + (1 - g) * side``, where there is one.

        ``side_arguments``: how the side network was built, where that is not its class's default.
        """
        side = getattr(segmenter, "side", None)
        found: dict[str, Any] = {"gate": side.gate} if isinstance(side, GatedSide) and self.mix == "gate" else {}
        built = {} if self.side is None else _built_with(self.side)
        return {**found, "side_arguments": built} if built else found

    def _learnt(self, segmenter: Segmenter) -> list[str]:
        prefixes = tuple(f"sam.mask_decoder.{part}" for part in _LEARNT[self.decoder])
        unused = set(unused_of_decoder(segmenter))
        return [name for name in decoder_names(segmenter) if name.startswith(prefixes) and name not in unused]


def _built_with(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a module that are not its defaults, as far as its attributes of the same names tell."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        value = getattr(module, name, parameter.default)
        if isinstance(value, nn.Module):
            kind = type(value)
            found[name] = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **_built_with(value)}
        elif isinstance(value, (bool, int, float, str, tuple, list)) and value != parameter.default:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found

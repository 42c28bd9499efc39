"""What every strategy does: install itself once, name the tensors it owns, describe itself for the card.

A strategy installs itself into a segmenter once and returns the names of the tensors it owns, which are then the only
ones that learn and the only ones in an adapter file. The dotted path of the class in JSON is the registry.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import nn

from samseg_monai.errors import AdapterError
from samseg_monai.sam.build import SamModel
from samseg_monai.sam.weights import MASK_HEAD

PACKAGE = "samseg_monai.strategies"


class Segmenter(nn.Module):
    """What a strategy needs to know of the network it is installed into."""

    sam: SamModel
    num_classes: int
    strategy: Strategy | None
    base_sha256: str | None
    base_file: str | None


class Strategy:
    """How SAM learns: owns nothing until a subclass says what.

    Subclasses keep every constructor argument under its own name (``arguments`` reads them back for the card) and
    override ``_install``.

    Attributes:
        name: short name, for tables.
        training_only: arguments that do not change what a trained network computes.
        tile_masks: start a mask head of another size from SAM's own masks, repeated, instead of at random.
        random_masks: a mask head of another size may stay random though nothing of it learns.
    """

    name: str = "strategy"
    training_only: ClassVar[tuple[str, ...]] = ()
    tile_masks: bool = False
    random_masks: bool = False

    def install(self, segmenter: Segmenter) -> list[str]:
        """Install into ``segmenter`` and return the names of the owned tensors.

        Returns:
            Names of parameters and buffers in ``segmenter.state_dict()``, in its order.
        Raises:
            AdapterError: when a strategy is installed already, or this one does not fit the network.
        """
        if segmenter.strategy is not None:
            raise AdapterError(
                f"strategy {self.name!r} cannot be installed: {segmenter.strategy.name!r} is installed already; "
                "build a new network, or merge() this one first"
            )
        return self._install(segmenter)

    def _install(self, segmenter: Segmenter) -> list[str]:
        return []

    def unused(self, segmenter: Segmenter) -> list[str]:
        """Tensors that belong to the parts this strategy trains but that the task never uses; they stay frozen."""
        return []

    def fixed(self, segmenter: Segmenter) -> list[str]:
        """Owned tensors that belong into the adapter file, since no base file has them, but do not learn."""
        return []

    def start(self, segmenter: Segmenter, *, download: bool = True) -> None:
        """Load what the strategy's own parts start a training from; called after the base weights are loaded."""

    def facts(self, segmenter: Segmenter) -> dict[str, Any]:
        """What a reader of the run card wants to know of the parts that learnt, as JSON values."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments as JSON values."""
        names = list(inspect.signature(type(self)).parameters)
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def card(self) -> dict[str, Any]:
        """``{"_target_": dotted path, "arguments": {...}}``, from which the strategy can be built again."""
        module = type(self).__module__
        public = PACKAGE if module.startswith(f"{PACKAGE}.") else module
        return {"_target_": f"{public}.{type(self).__qualname__}", "arguments": self.arguments()}


class ZeroShot(Strategy):
    """SAM as it is: nothing learns. The baseline with the same prompts and the same evaluation.

    Args:
        random_masks: allow a number of masks that is not SAM's; their head is then random and the predictions are
            noise on purpose, as in the row "without fine-tuning" of table II of SAM-LST (Chai et al. 2023).
    """

    name = "zero_shot"

    def __init__(self, random_masks: bool = False) -> None:
        self.random_masks = random_masks


class Scratch(Strategy):
    """A network without SAM, trained as a whole from a random start: the baseline that a foundation model has to beat.

    Args:
        name: how tables call it, such as "unet".
    """

    def __init__(self, name: str = "scratch") -> None:
        self.name = name

    def _install(self, segmenter: Segmenter) -> list[str]:
        return list(segmenter.state_dict())

    def facts(self, segmenter: Segmenter) -> dict[str, Any]:
        """What the network tells of itself, if it has ``facts()``."""
        tell = getattr(getattr(segmenter, "net", None), "facts", None)
        return tell() if callable(tell) else {}


def decoder_names(segmenter: Segmenter) -> list[str]:
    """State-dict names of SAM's mask decoder within the segmenter."""
    return [f"sam.mask_decoder.{name}" for name in segmenter.sam.mask_decoder.state_dict()]


def head_names(segmenter: Segmenter) -> list[str]:
    """Those whose shape or number follows the number of masks: mask tokens, hyper-networks, quality head."""
    return [name for name in decoder_names(segmenter) if MASK_HEAD.match(name.removeprefix("sam."))]


def unused_of_prompts(segmenter: Segmenter) -> list[str]:
    """Parameters of the prompt encoder that no box, or (without prompts) no prompt at all, ever reaches.

    A box is the sum of its corners' codes and two learned embeddings (numbers 2 and 3 of four); without a mask prompt,
    ``no_mask_embed`` stands for it.
    """
    used = ["no_mask_embed."]
    if getattr(segmenter, "prompt", "none") == "box":
        used += ["point_embeddings.2.", "point_embeddings.3."]
    named = segmenter.sam.prompt_encoder.named_parameters()
    return [f"sam.prompt_encoder.{name}" for name, _ in named if not name.startswith(tuple(used))]


def unused_of_decoder(segmenter: Segmenter) -> list[str]:
    """The mask quality head, and the networks of masks that are not returned: no loss here looks at them."""
    decoder = "sam.mask_decoder"
    prefixes = [f"{decoder}.iou_prediction_head."]
    if segmenter.num_classes == 1:  # SAM's single mask is token 0: the networks behind it make no map
        extra = range(1, segmenter.sam.mask_decoder.num_mask_tokens)
        prefixes += [f"{decoder}.output_hypernetworks_mlps.{index}." for index in extra]
    return [name for name in decoder_names(segmenter) if name.startswith(tuple(prefixes))]

"""What every strategy does: install itself once, name the tensors it owns, describe itself for the card.

A strategy installs itself into a segmenter once and returns the names of the tensors it owns, which are then the only
ones that learn and the only ones in an adapter file. The dotted path of the class in JSON is the registry.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from torch import nn

from samseg_monai.adapters.hierarchical import HierarchicalDecoder, look_first
from samseg_monai.choices import SECOND
from samseg_monai.errors import AdapterError
from samseg_monai.products import adopt
from samseg_monai.sam.backbone import Backbone
from samseg_monai.sam.build import SamModel
from samseg_monai.sam.weights import MASK_HEAD
from samseg_monai.training.owned import count_trainable, keep_only

PACKAGE = "samseg_monai.strategies"
NO_MASK = "sam.prompt_encoder.no_mask_embed.weight"


class Segmenter(nn.Module):
    """What a strategy needs to know of the network it is installed into, and what the network then knows of it.

    Attributes:
        owned: names of the tensors that belong to the strategy and go into its adapter file; all learn but ``fixed``.
        unused: names that the strategy froze because the task never uses them.
        base_sha256: hash of the base weights' file, "random" after an explicit random start, None before loading.
        scan_names: what the channels of its input are called; None where nobody has said.
        cases: "training" and "validation" -> hashes of the cases (``datalists.case_hash``) that it learnt from and that
            chose its epoch; None where nobody has said.
        base_file: name of that file, without its folder; None of a random start or before loading.
        drawn: of a network that was built without values, on the device "meta": builds it with those it would have had.
    """

    sam: SamModel
    num_classes: int
    second: nn.Module | None
    factors: nn.Module
    strategy: Strategy | None = None
    owned: list[str]
    unused: list[str]
    fixed: list[str]
    base_sha256: str | None = None
    base_file: str | None = None
    scan_names: list[str] | None = None
    cases: dict[str, list[str]] | None = None
    drawn: Callable[[], nn.Module] | None = None

    def fill(self) -> None:
        """Draw the tensors that this network was built without and that no file has given, as if it had been built with
        them."""
        if self.drawn is None:
            return
        missing = [name for name, tensor in self.state_dict().items() if tensor.is_meta]
        if missing:
            state = self.drawn().state_dict()
            self.load_state_dict({name: state[name] for name in missing}, strict=False, assign=True)
        self.drawn = None

    @property
    def channels_out(self) -> int:
        """Number of logit maps: 1, or the number of classes and the background."""
        return 1 if self.num_classes == 1 else self.num_classes + 1

    def adopt(self, strategy: Strategy) -> None:
        """Install ``strategy``; its tensors learn from now on and all others stay frozen.

        Raises:
            AdapterError: another one is installed already, or this one does not fit; the network is then as it was.
        """
        if self.strategy is not None:
            raise AdapterError(
                f"strategy {strategy.name!r} cannot be installed: {self.strategy.name!r} is installed already; "
                "build a new network, or merge() that one first"
            )
        self.owned = strategy.install(self)
        self.unused, self.fixed = strategy.unused(self), strategy.fixed(self)
        self.strategy = strategy
        keep_only(self, set(self.owned) - set(self.fixed))

    def print_trainable_parameters(self) -> None:
        """Print how many values learn, of how many, by which strategy, and what base weights they start from."""
        learns, values = count_trainable(self), sum(parameter.numel() for parameter in self.parameters())
        base = self.base_file or {None: "not loaded yet", "random": "random"}.get(self.base_sha256, "a file")
        print(
            f"{learns:,} of {values:,} values learn ({learns / values:.3%}), by {self.strategy}; base weights: {base}"
        )


class Strategy:
    """How SAM learns: owns nothing until a subclass says what.

    Subclasses keep every constructor argument under its own name (``arguments`` reads them back for the card) and
    override ``install``, and further methods where they own more than new layers.

    Attributes:
        name: short name, for tables.
        training_only: arguments that do not change what a trained network computes.
        tile_masks: start a mask head of another size from SAM's own masks, repeated, instead of at random.
        random_masks: a mask head of another size may stay random though nothing of it learns.
        depth: slices of a volume that the network sees together, one behind the other in its batches.
        newer: arguments that older cards do not know, with the values that leave them out of new ones.
    """

    name: str = "strategy"
    training_only: ClassVar[tuple[str, ...]] = ()
    tile_masks: bool = False
    random_masks: bool = False
    depth: int = 1
    newer: ClassVar[dict[str, Any]] = {}

    def install(self, segmenter: Segmenter) -> list[str]:
        """Put this strategy's layers into ``segmenter``, which has none yet, or nothing at all.

        Returns:
            Names of the owned parameters and buffers in ``segmenter.state_dict()``, in its order.
        Raises:
            AdapterError: it does not fit; the network is as it was.
        """
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
        """Constructor arguments as JSON values; those of ``newer`` only where they are set."""
        names = list(inspect.signature(type(self)).parameters)
        values = {name: getattr(self, name) for name in names if self.newer.get(name, ...) != getattr(self, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def card(self) -> dict[str, Any]:
        """``{"_target_": dotted path, "arguments": {...}}``, from which the strategy can be built again."""
        module = type(self).__module__
        public = PACKAGE if module.startswith(f"{PACKAGE}.") else module
        return {"_target_": f"{public}.{type(self).__qualname__}", "arguments": self.arguments()}

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        told = (f"{k}={type(v).__name__ if isinstance(v, nn.Module) else repr(v)}" for k, v in values.items())
        return f"{type(self).__name__}({', '.join(told)})"


class OnEncoder(Strategy):
    """What strategies share that, with ``decoder``, train the mask decoder, too, and may put a second one behind it.

    Attributes:
        decoder: True trains what the task uses of the mask decoder. "samed" trains the prompt encoder's
            ``no_mask_embed``, too, which stands for a mask that is not given. "hierarchical" does, and puts a second
            decoder behind it (H-SAM, ``adapters.HierarchicalDecoder``), without prompts. "lora" and "h_sam" are for
            LoRA alone.
        decoders: what else than True and False it may be.
    """

    decoder: Any = False
    decoders: ClassVar[tuple[str, ...]] = ("hierarchical",)

    def decoder_problems(self) -> list[str]:
        """What is wrong with ``decoder``."""
        if isinstance(self.decoder, bool) or (isinstance(self.decoder, str) and self.decoder in self.decoders):
            return []
        options = ", ".join(map(repr, (False, True, *self.decoders)))
        return [f"decoder must be one of {options}, got {self.decoder!r}"]

    def unused(self, segmenter: Segmenter) -> list[str]:
        """With a ``decoder`` that learns: the mask quality head, and the networks of masks that are not returned."""
        return unused_of_decoder(segmenter) if self.decoder else []

    def second_decoder(self, segmenter: Segmenter) -> nn.Module | None:
        """The decoder that is to stand behind SAM's, not yet installed; AdapterError where none can."""
        if self.decoder not in SECOND:
            return None
        sam, spec = segmenter.sam, segmenter.sam.spec
        if sam.rectangular:
            raise AdapterError("rectangular: got true, but a second decoder is built for the whole square; use false")
        if segmenter.masks == "best":
            raise AdapterError("masks: got 'best', but a second decoder is built for SAM's single mask; use 'single'")
        second = HierarchicalDecoder(
            spec.prompt_dim,
            segmenter.channels_out,
            (sam.image_size // spec.patch_size) ** 2,
            heads=spec.decoder_heads,
            mlp_dim=spec.decoder_mlp_dim,
            even=self.decoder == "h_sam",
        )
        adopt(second)
        return second

    def learnt_decoder(self, segmenter: Segmenter, second: nn.Module | None) -> set[str]:
        """Names of what ``decoder`` lets learn, behind which ``second`` is installed, if there is one."""
        if not self.decoder:
            return set()
        segmenter.second = second
        if self.decoder == "h_sam":
            look_first(segmenter.sam.mask_decoder.transformer)
        added = [] if second is None else [f"second.{name}" for name in second.state_dict()]
        owned = {*decoder_names(segmenter), *added} - set(self.unused(segmenter))
        return owned | ({NO_MASK} if self.decoder in ("samed", *SECOND) else set())


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

    def install(self, segmenter: Segmenter) -> list[str]:
        return list(segmenter.state_dict())

    def fixed(self, segmenter: Segmenter) -> list[str]:
        """What MONAI's networks hold and never use: a gradient would be waited for by several GPUs in vain."""
        idle = {
            f"{prefix}.norm_cross_attn"  # UNETR's
            for prefix, module in segmenter.named_modules()
            if getattr(module, "with_cross_attention", None) is False
        }
        if type(getattr(segmenter, "net", None)).__name__ == "BasicUNetPlusPlus":  # of whose heads the last one answers
            idle |= {f"net.final_conv_0_{level}" for level in (1, 2, 3)}
        return [name for name in segmenter.state_dict() if name.rpartition(".")[0] in idle]

    def facts(self, segmenter: Segmenter) -> dict[str, Any]:
        """What the network tells of itself, if it has ``facts()``."""
        tell = getattr(getattr(segmenter, "net", None), "facts", None)
        return tell() if callable(tell) else {}


def block_problems(blocks: Sequence[int] | None, last: float | None) -> list[str]:
    """What is wrong with a choice of encoder blocks, by their numbers or as a fraction of the last ones."""
    problems = []
    if blocks is not None and (not blocks or len(set(blocks)) < len(blocks)):
        problems.append(f"blocks must be different block numbers, got {tuple(blocks)}; None means all")
    if last is not None and not 0 < last <= 1:
        problems.append(f"last must be a fraction of the blocks, 0 < last <= 1, got {last}; None means all")
    if blocks is not None and last is not None:
        problems.append(f"blocks and last choose the same thing, got {tuple(blocks)} and {last}; give one of them")
    return problems


def chosen_blocks(
    encoder: Backbone, targets: Collection[str], blocks: Sequence[int] | None, last: float | None, who: str
) -> list[nn.Module]:
    """The encoder's blocks that are adapted: all that have ``targets``, those with these numbers, or the last ones.

    Args:
        targets: names of ``sam.backbone.TARGETS``.
        last: fraction of the blocks with ``targets``, from the end; at least that many.
        who: name of the strategy, for errors.
    Raises:
        AdapterError: numbers of blocks that are not there, or lack a target.
    """
    layers = [block for _, block in encoder.named_blocks()]
    able = [index for index, block in enumerate(layers) if set(targets) <= encoder.targets(block).keys()]
    # 0.07 * 100 is a little more than 7
    late = able if last is None else able[len(able) - math.ceil(round(last * len(able), 6)) :]
    chosen = late if blocks is None else blocks
    if outside := [index for index in chosen if not 0 <= index < len(layers)]:
        raise AdapterError(f"{who} blocks {outside} are not in this encoder; it has blocks 0 .. {len(layers) - 1}")
    if unable := [index for index in chosen if index not in able]:
        raise AdapterError(f"{who} blocks {unable} have no {', '.join(targets)}; blocks {able} have them")
    return [layers[index] for index in chosen]


def added_names(segmenter: Segmenter, kind: type[nn.Module], own: Collection[str] = ()) -> set[str]:
    """State-dict names of the parameters of all layers of this ``kind``, but those called ``own``."""
    layers = {prefix: layer for prefix, layer in segmenter.named_modules() if isinstance(layer, kind)}
    return {f"{at}.{name}" for at, layer in layers.items() for name, _ in layer.named_parameters() if name not in own}


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

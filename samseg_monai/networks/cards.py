"""The facts of a network that an adapter's card keeps, and what does not agree between a card and a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samseg_monai.sam.weights import RANDOM, name_of

if TYPE_CHECKING:
    from samseg_monai.networks.plain import PlainSegmenter
    from samseg_monai.networks.segmenter import SamSegmenter

BOX_FACTS = ("boxes", "crop_margin", "crop_size")  # of a network without SAM that takes boxes
# What must be equal for an adapter to mean anything in another network.
MUST_AGREE = (
    "strategy",
    "sam_variant",
    "base_sha256",
    "num_classes",
    "image_size",
    "scans",
    "scan_mode",
    "input_scale",
    "prompt",
    *BOX_FACTS,
)


def card_facts(network: SamSegmenter | PlainSegmenter) -> dict[str, Any]:
    """What must agree, as JSON values, and ``base_file``: the name (no folder) of the base weights' file, or None."""
    others = ("strategy", "sam_variant", *BOX_FACTS)
    facts = {key: getattr(network, key) for key in MUST_AGREE if key not in others}
    box_facts: Any = getattr(network, "box_facts", dict)
    facts |= box_facts()
    strategy = None if network.strategy is None else network.strategy.card()
    named = {"base_file": getattr(network, "base_file", None)}
    return {"strategy": strategy, "sam_variant": network.spec.name, **facts, **named}


def card_differences(card: Mapping[str, Any], network: SamSegmenter | PlainSegmenter) -> list[str]:
    """One line for each fact that is not equal; arguments of the strategy that only training reads are left out."""
    ignored = () if network.strategy is None else network.strategy.training_only
    facts = card_facts(network)
    theirs, ours = _flat(card, ignored), _flat(facts, ignored)
    return [
        f"{key}: adapter {theirs.get(key)!r}, network {ours.get(key)!r}"
        + (_other_base(card, facts) if key == "base_sha256" else "")
        for key in {**ours, **theirs}
        if theirs.get(key) != ours.get(key)
    ]


def _flat(facts: Mapping[str, Any], ignored: tuple[str, ...]) -> dict[str, Any]:
    """The facts that must agree, with one entry per argument of the strategy."""
    flat = {key: facts.get(key) for key in MUST_AGREE if key != "strategy"}
    strategy = facts.get("strategy") or {}
    arguments = strategy.get("arguments", {})
    flat["strategy"] = strategy.get("_target_")
    return flat | {f"strategy {name}": value for name, value in arguments.items() if name not in ignored}


def _other_base(card: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Which file the adapter was trained on, and what to do; older cards do not name it."""
    wanted, held = card.get("base_sha256"), facts.get("base_sha256")
    if wanted == RANDOM:
        return "; the adapter was trained on a random start: set sam_checkpoint to 'random'"
    file, other = card.get("base_file") or name_of(wanted), facts.get("base_file") or name_of(held)
    trained = f"{file}, the file" if file else "the file"
    instead = f" and not to those of {other}" if other and other != file else ""
    return (
        f"; the adapter holds changes to the weights of {trained} with the first sha256{instead}: set sam_checkpoint "
        "to the path of that file, or train anew on this one"
    )

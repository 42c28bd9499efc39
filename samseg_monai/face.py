"""The face of the package in Python: a strategy by its name, on a backbone, ready to train."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import STRATEGIES, Strategy

_NETWORK = [name for name in inspect.signature(SamSegmenter).parameters if name not in ("sam_variant", "strategy")]


def list_strategies() -> list[str]:
    """Names that ``create`` knows; bundles have the same, and a few without SAM beside them."""
    return list(STRATEGIES)


def create(strategy: str | Strategy, backbone: str = "vit_b", **arguments: Any) -> SamSegmenter:
    """A SAM with a strategy installed, with random weights until ``load_base()`` is called.

        network = create("lora", backbone="vit_t", rank=4, image_size=512)
        network.load_base("mobile_sam.pt")

    Args:
        strategy: one of ``list_strategies()``, or a strategy that was built already.
        backbone: which SAM: vit_b, vit_l, vit_h (official), vit_t (MobileSAM), medsam or pico (a toy that comes
            with the package).
        arguments: of the strategy's class (``rank``, ``targets``, ...) and of ``SamSegmenter`` (``image_size``,
            ``num_classes``, ...). What both know (``masks``) is the strategy's.
    Raises:
        ConfigError: there is no such strategy, backbone or argument; the message has those that there are.
        AdapterError: the strategy does not fit the backbone, or its arguments are out of range.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            names = ", ".join(STRATEGIES)
            raise ConfigError(
                f"create: there is no strategy {strategy!r}{_nearest(strategy, STRATEGIES)}; choose one of {names}. "
                "Networks without SAM (unet, ellipse, ...) are PlainSegmenter and BoxEllipse"
            )
        kind, preset = STRATEGIES[strategy]
        own = list(inspect.signature(kind).parameters)
        _refuse_unknown(strategy, own, arguments)
        strategy = kind(**{**preset, **{name: arguments.pop(name) for name in own if name in arguments}})
    else:
        _refuse_unknown(repr(strategy), [], arguments)
    return SamSegmenter(backbone, strategy, **arguments)


def _refuse_unknown(strategy: str, own: list[str], arguments: dict[str, Any]) -> None:
    known = [*own, *_NETWORK]
    problems = [f"{name}: unknown{_nearest(name, known)}" for name in arguments if name not in known]
    takes = f"the strategy takes {', '.join(own)}; " if own else ""
    heading = f"create: {strategy} does not have these arguments; {takes}the network takes {', '.join(_NETWORK)}"
    raise_all(problems, ConfigError, heading)


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

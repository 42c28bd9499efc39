"""MONAI bundles: built from recipes, guarded while they run, packed to travel.

Names are read from their modules only when they are asked for: to build a bundle no network is needed, nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_FACE = {
    "build": ("build_bundle", "recipe_names", "write_bundle"),
    "loaded": ("LoadedBundle", "load_bundle"),
    "pack": ("pack_bundle",),
    "record": ("facts", "note_cases", "record_bundle", "seen_cases", "settings"),
    "running": (
        "bundle_root", "extra_inputs", "find_checkpoint", "guard", "in_order", "join_processes", "leave_processes",
        "rank_device",
    ),
}  # fmt: skip
_MODULES = {name: f"{__name__}.{module}" for module, names in _FACE.items() for name in names}
__all__ = [  # written out for the API pages, which read it without running it
    "LoadedBundle",
    "build_bundle",
    "bundle_root",
    "extra_inputs",
    "facts",
    "find_checkpoint",
    "guard",
    "in_order",
    "join_processes",
    "leave_processes",
    "load_bundle",
    "note_cases",
    "pack_bundle",
    "rank_device",
    "recipe_names",
    "record_bundle",
    "seen_cases",
    "settings",
    "write_bundle",
]

if TYPE_CHECKING:
    from samseg_monai.bundles.build import build_bundle, recipe_names, write_bundle
    from samseg_monai.bundles.loaded import LoadedBundle, load_bundle
    from samseg_monai.bundles.pack import pack_bundle
    from samseg_monai.bundles.record import facts, note_cases, record_bundle, seen_cases, settings
    from samseg_monai.bundles.running import (
        bundle_root,
        extra_inputs,
        find_checkpoint,
        guard,
        in_order,
        join_processes,
        leave_processes,
        rank_device,
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value

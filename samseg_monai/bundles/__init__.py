"""MONAI bundles: built from recipes, guarded while they run, packed to travel."""

from samseg_monai.bundles.build import build_bundle, recipe_names, write_bundle
from samseg_monai.bundles.loaded import LoadedBundle, load_bundle
from samseg_monai.bundles.pack import pack_bundle
from samseg_monai.bundles.record import facts, record_bundle, settings
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

__all__ = [
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
    "pack_bundle",
    "rank_device",
    "recipe_names",
    "record_bundle",
    "settings",
    "write_bundle",
]

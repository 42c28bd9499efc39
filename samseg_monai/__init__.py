"""Fine-tune the Segment Anything Model for medical images and ship the result as MONAI bundles.

    import samseg_monai as sm

    network = sm.create("lora", backbone="vit_t", rank=4)
    network.load_base()

Every name of ``__all__`` is there, and read from its module only when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# module -> names of the face; the block below is the same for editors, mypy and the API page
_FACE = {
    "face": ("create", "list_strategies"),
    "strategies": ("Strategy", "ZeroShot", "LoRA", "Adapter", "SSF", "FacT", "Ladder", "Selective", "Scratch"),
    "networks": ("SamSegmenter", "PlainSegmenter", "BoxEllipse", "disable_adapter"),
    "adapters": (
        "LoRALinear", "DoRALinear", "BottleneckLinear", "ScaleShift", "GatedSide", "ResNetSide", "FeatureMap",
    ),
    "checkpoints": ("save_adapter", "load_adapter", "save_model", "load_model", "load_trained", "read_card"),
    "inferers": ("SliceVolumeInferer",),
    "training": ("SegmentationLoss", "OnLogitGrid"),
    "metrics": ("CaseScores", "LesionRules", "score_case", "score_lesions"),
    "data.slices": ("SliceDataset", "AllSlices", "EveryNth", "Foreground", "MaxArea", "Patches", "RandomN"),
    "bundles": ("build_bundle", "pack_bundle", "load_bundle", "LoadedBundle"),
    "export": ("export_network",),
    "errors": (
        "SamsegError", "AdapterError", "BundleError", "CacheError", "CheckpointError", "ConfigError", "DataError",
        "PromptError", "TrainingError", "WeightsError",
    ),
}  # fmt: skip
_MODULES = {name: f"{__name__}.{module}" for module, names in _FACE.items() for name in names}
__all__ = ["__version__", *_MODULES]

# ruff: noqa: F401
if TYPE_CHECKING:
    from samseg_monai.adapters import (
        BottleneckLinear,
        DoRALinear,
        FeatureMap,
        GatedSide,
        LoRALinear,
        ResNetSide,
        ScaleShift,
    )
    from samseg_monai.bundles import LoadedBundle, build_bundle, load_bundle, pack_bundle
    from samseg_monai.checkpoints import load_adapter, load_model, load_trained, read_card, save_adapter, save_model
    from samseg_monai.data.slices import AllSlices, EveryNth, Foreground, MaxArea, Patches, RandomN, SliceDataset
    from samseg_monai.errors import (
        AdapterError,
        BundleError,
        CacheError,
        CheckpointError,
        ConfigError,
        DataError,
        PromptError,
        SamsegError,
        TrainingError,
        WeightsError,
    )
    from samseg_monai.export import export_network
    from samseg_monai.face import create, list_strategies
    from samseg_monai.inferers import SliceVolumeInferer
    from samseg_monai.metrics import CaseScores, LesionRules, score_case, score_lesions
    from samseg_monai.networks import BoxEllipse, PlainSegmenter, SamSegmenter, disable_adapter
    from samseg_monai.strategies import SSF, Adapter, FacT, Ladder, LoRA, Scratch, Selective, Strategy, ZeroShot
    from samseg_monai.training import OnLogitGrid, SegmentationLoss


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; see {__name__}.__all__ for what it has")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

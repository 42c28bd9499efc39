"""Regions that are scored: unions of classes, as the nested ones of BraTS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from samseg_monai.errors import ConfigError, raise_all

# The parts are called as in ``data.datalists.label_maps``, so that both codings of BraTS (enhancing 3 or 4) fit.
_CORE, _OEDEMA, _ENHANCING = "non-enhancing core", "oedema", "enhancing tumour"
BRATS_REGIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "WT": ((_CORE, _OEDEMA, _ENHANCING), ("tumour",)),
    "TC": ((_CORE, _ENHANCING),),
    "ET": ((_ENHANCING,),),
}


def regions_of(classes: Sequence[str], regions: str | Mapping[str, Sequence[str]] | None) -> dict[str, tuple[int, ...]]:
    """Name of each region -> positions of its classes among ``classes``.

    Args:
        classes: names of the network's classes.
        regions: None for every class by itself; ``"brats"`` for those of WT (whole tumour), TC (tumour core) and ET
            (enhancing tumour) whose parts are all among the classes (a class "tumour" is WT); or region -> classes.

    Raises:
        ConfigError: a region names an absent class or none, or no region of BraTS can be made of the classes.
    """
    position = {name: index for index, name in enumerate(classes)}
    if regions is None:
        return {name: (index,) for name, index in position.items()}
    if regions == "brats":
        possible = {
            region: next((parts for parts in ways if set(parts) <= set(classes)), ())
            for region, ways in BRATS_REGIONS.items()
        }
        regions = {region: parts for region, parts in possible.items() if parts}
        if not regions:
            raise ConfigError(
                f"no region of BraTS can be made of {', '.join(classes)}; name classes tumour, or some of "
                f"{', '.join((_CORE, _OEDEMA, _ENHANCING))}"
            )
    if not isinstance(regions, Mapping) or not regions:
        raise ConfigError(f"regions must be null, 'brats' or an object of region -> list of classes, got {regions!r}")
    problems = [
        f"{region}: {parts!r}"
        for region, parts in regions.items()
        if isinstance(parts, str) or not parts or not set(parts) <= set(classes)
    ]
    raise_all(problems, ConfigError, f"regions must be lists of the classes {', '.join(classes)}")
    return {region: tuple(position[name] for name in parts) for region, parts in regions.items()}

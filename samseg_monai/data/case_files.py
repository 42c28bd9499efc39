"""Group image files into cases: a folder of case folders, one case folder, a folder of files, or a list of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samseg_monai.data.volumes import SUFFIXES, stem_of
from samseg_monai.errors import DataError

LOG = logging.getLogger(__name__)
_MASK_ENDINGS = ("_seg", "-seg")


@dataclass
class Found:
    """``files``: case -> one path per scan, or the single path that holds them all; ``bad``: case -> reason."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, paths: list[Path]) -> None:
        """Add a case; a second one of the same name would overwrite the first one's result, so it is refused."""
        if case in self.files:
            name = f"{paths[0].parent.name}/{case}"
            self.bad[name] = f"another case is called {case} too ({self.files[case][0]}); rename one"
        else:
            self.files[case] = paths


def group_files(source: str | Path | Sequence[str | Path], scans: Sequence[str]) -> Found:
    """Find the cases of ``source`` by file names alone; nothing is read.

    Files named ``<case>-<scan>`` or ``<case>_<scan>`` belong together. Where no file is named so, each file is a case
    of its own (one scan, or as many channels as there are scans). Files ending in ``seg`` are masks, not images.

    Raises:
        DataError: ``source`` does not exist or holds no image at all.
    """
    found = Found()
    sources = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    loose = []
    for path in sources:
        if path.is_dir():
            _group_folder(path, scans, found)
        elif path.is_file():
            loose.append(path)
        else:
            found.bad[path.name] = f"no file or folder {path}"
    _group_named(loose, scans, found, listed=True)
    if not found.files and not found.bad:
        kinds = ", ".join(SUFFIXES)
        raise DataError(
            f"no image in {', '.join(map(str, sources)) or 'an empty list'}: expected case folders with "
            f"<case>-{scans[0]}.nii.gz, or files ending in {kinds}"
        )
    return found


def _group_folder(folder: Path, scans: Sequence[str], found: Found) -> None:
    """Files of ``folder`` if it has images, else those of its sub-folders."""
    files = _images(folder)
    if files:
        _group_named(files, scans, found)
        return
    for sub in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        inside = _images(sub)
        if inside:
            _group_named(inside, scans, found)
        else:
            LOG.warning("ignored %s: no image in it", sub)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and stem_of(path) is not None)


def _group_named(paths: Iterable[Path], scans: Sequence[str], found: Found, *, listed: bool = False) -> None:
    named: dict[tuple[Path, str], dict[str, Path]] = {}
    single = []
    for path in paths:
        stem = stem_of(path)
        if stem is None:
            found.bad[path.name] = f"is not an image this program reads; expected one of {', '.join(SUFFIXES)}"
            continue
        if stem.endswith(_MASK_ENDINGS) and not listed:
            LOG.info("ignored %s: named like a mask", path)
            continue
        scan = next((s for s in scans if stem.endswith((f"-{s}", f"_{s}"))), None)
        if scan is None:
            single.append(path)
        else:
            named.setdefault((path.parent, stem[: -len(scan) - 1]), {}).setdefault(scan, path)
    for (_, case), files in sorted(named.items()):
        missing = [scan for scan in scans if scan not in files]
        if missing:
            found.bad[case] = f"no file for {', '.join(missing)} beside {next(iter(files.values())).name}"
        else:
            found.add(case, [files[scan] for scan in scans])
    # Beside named scans, other files are scans this network does not use, or derived images.
    for path in single if listed or not named else []:
        found.add(str(stem_of(path)), [path])

"""Group images into cases: a folder of case folders, one case folder, a folder of files, or a list of them.

A folder that holds DICOM slices is one image, and its path stands for it wherever else a file's path would.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samseg_monai.data.dicom import holds_series, is_dicom
from samseg_monai.data.volumes import SUFFIXES, stem_of
from samseg_monai.errors import DataError
from samseg_monai.files import file_name

LOG = logging.getLogger(__name__)
_MASK_ENDINGS = ("_seg", "-seg")


@dataclass
class Found:
    """``files``: case -> one path per scan, or the single path that holds them all; ``bad``: case -> reason.

    A path is a file, or the folder of a DICOM series.
    """

    files: dict[str, list[Path]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, paths: list[Path]) -> None:
        """Add a case; a second one of the same name would overwrite the first one's result, so it is refused."""
        case = file_name(case)
        if case in self.files:
            name = f"{paths[0].parent.name}/{case}"
            self.bad[name] = f"another case is called {case} too ({self.files[case][0]}); rename one"
        else:
            self.files[case] = paths


def group_files(source: str | Path | Sequence[str | Path], scans: Sequence[str]) -> Found:
    """Find the cases of ``source`` by names, and by the first bytes of files whose names do not tell what they are.

    Files named ``<case>-<scan>`` or ``<case>_<scan>`` belong together. Where no file is named so, each file is a case
    of its own (one scan, or as many channels as there are scans). Files ending in ``seg`` are masks, not images.

    A folder with DICOM files is a case of one scan, named like the folder; sub-folders ``<case>/<scan>`` with DICOM
    files are the scans of one case.

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
            f"<case>-{scans[0]}.nii.gz, files ending in {kinds}, or folders of DICOM slices"
        )
    return found


def _group_folder(folder: Path, scans: Sequence[str], found: Found) -> None:
    """Images of ``folder`` if it has any, else those of its sub-folders."""
    if _group_content(folder, scans, found) or _group_scans(folder, scans, found):
        return
    for sub in _folders(folder):
        if _group_content(sub, scans, found) or _group_scans(sub, scans, found):
            continue
        if nested := [path.name for path in _folders(sub) if holds_series(path)]:
            found.bad[sub.name] = (
                f"its DICOM series lie one folder too deep ({', '.join(nested)}); give {sub} as the folder of cases, "
                f"or name the series' folders after the scans ({', '.join(scans)})"
            )
        else:
            LOG.warning("ignored %s: no image in it", sub)


def _group_content(folder: Path, scans: Sequence[str], found: Found) -> bool:
    """Add the files of ``folder`` itself, or the DICOM series that they are; False when there is no image."""
    files, case = _images(folder), _name_of(folder)
    images = [path.name for path in files if not str(stem_of(path)).endswith(_MASK_ENDINGS)]
    series = holds_series(folder)
    _group_named(files, scans, found)
    if series and images:
        found.bad[case] = f"holds DICOM files beside {images[0]}; put the DICOM series into a folder of its own"
    elif series and len(scans) > 1:
        found.bad[case] = (
            f"holds DICOM files, for a network that wants {len(scans)} scans; put each scan's series into a folder "
            f"of its own: {', '.join(f'{case}/{scan}' for scan in scans)}"
        )
    elif series:
        found.add(case, [folder])
    if files or series:
        for path in filter(holds_series, _folders(folder)):
            LOG.warning("ignored %s: a DICOM series below %s, which holds images itself", path, folder)
    return bool(files) or series


def _group_scans(folder: Path, scans: Sequence[str], found: Found) -> bool:
    """Add ``folder`` as a case whose sub-folders are DICOM series named after the scans; False when they are not."""
    series = {path.name: path for path in _folders(folder) if holds_series(path)}
    named = [scan for scan in scans if scan in series]
    # A lone scan's name among other folders is a case that happens to be called so.
    if not named or (len(scans) == 1 and len(series) > 1):
        return False
    case = _name_of(folder)
    if missing := [scan for scan in scans if scan not in series]:
        found.bad[case] = f"no folder of DICOM files for {', '.join(missing)} beside {named[0]}"
    else:
        found.add(case, [series[scan] for scan in scans])
    if unused := sorted(set(series) - set(scans)):
        LOG.info("ignored in %s: %s, which the network does not use", folder, ", ".join(unused))
    return True


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _name_of(folder: Path) -> str:
    """Name of a folder that may have been given as ``.`` or ``..``."""
    return Path(os.path.abspath(folder)).name


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and stem_of(path) is not None)


def _group_named(paths: Iterable[Path], scans: Sequence[str], found: Found, *, listed: bool = False) -> None:
    named: dict[tuple[Path, str], dict[str, Path]] = {}
    single = []
    for path in paths:
        stem = stem_of(path)
        if stem is None:
            expected = f"expected one of {', '.join(SUFFIXES)}, or the folder of a DICOM series"
            what = "is one slice of a DICOM series; give its folder" if is_dicom(path) else f"is no image; {expected}"
            found.bad[path.name] = what
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

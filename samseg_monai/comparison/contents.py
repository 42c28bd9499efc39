"""What the files of a datalist contain: by their hashes, each computed once for as long as its file stays as it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from samseg_monai.data.datalists import read_datalist
from samseg_monai.data.datalists.splits import SECTIONS
from samseg_monai.files import known_hash


class Contents:
    """Images and labels of one datalist; runs on the same data share it, so that a file is looked at once for all.

    Args:
        datalist: file.
        dataset_dir: folder that its paths are relative to.
    """

    def __init__(self, datalist: Path, dataset_dir: Path) -> None:
        self.datalist, self.dataset_dir = datalist, dataset_dir
        self._found: dict[tuple[str, ...], tuple[str, float]] = {}

    def sha256(self, sections: Sequence[str]) -> str:
        """Hexadecimal sha256 of the lines ``<path> <sha256>`` of all files of these sections; the same wherever the
        folder lies. A file that is not there has no hash in its line.

        Raises:
            DataError: the datalist is none.
        """
        return self._looked_at(sections)[0]

    def newest(self, sections: Sequence[str]) -> float:
        """Latest time of modification among them, in seconds since 1970; 0 where there is none."""
        return self._looked_at(sections)[1]

    def _looked_at(self, sections: Sequence[str]) -> tuple[str, float]:
        key = tuple(sections)
        if key not in self._found:
            digest, newest = hashlib.sha256(), 0.0
            for name in self._names(sections):
                for path in self._files(self.dataset_dir / name):
                    there = path.is_file()
                    newest = max(newest, path.stat().st_mtime if there else 0.0)
                    own = path.relative_to(self.dataset_dir / name).as_posix()
                    digest.update(f"{name}/{own} {known_hash(path) if there else ''}\n".encode())
            self._found[key] = digest.hexdigest(), newest
        return self._found[key]

    def _names(self, sections: Sequence[str]) -> list[str]:
        content = read_datalist(self.datalist)
        items = [item for section in sections if section in SECTIONS for item in content[section]]
        given = [item.get(key) for item in items for key in ("image", "label", "reference")]
        return sorted({str(one) for value in given for one in (value if isinstance(value, list) else [value]) if one})

    @staticmethod
    def _files(path: Path) -> Iterator[Path]:
        """The file, or all files of a DICOM series' folder."""
        if not path.is_dir():
            yield path
        for folder, names, files in os.walk(path):
            names.sort()
            yield from (Path(folder, name) for name in sorted(files))

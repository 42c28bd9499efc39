"""Look through a whole bundle: every file by its kind, the configs, the checksums, and the container itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from samseg_monai.errors import BundleError
from samseg_monai.lint.configs import lint_configs
from samseg_monai.lint.documents import check_large_files, check_logging
from samseg_monai.lint.files import OUTSIDE, Archive, BundleFiles, Folder, Unreadable
from samseg_monai.lint.finding import Finding
from samseg_monai.lint.names import RESULTS, words
from samseg_monai.lint.weights import check_pickle, check_safetensors, check_torch_file, kind_of

SUMS = "SHA256SUMS"
RECORD = "eval/bundle/"  # the bundle as it was when it ran
_PART = r"[\w+=@,()-][\w .+=@,()-]*(?<![ .])|\.\w[\w.-]*(?<!\.)"  # Windows drops spaces and dots at the end
_NAME = re.compile(rf"(?:{_PART})(?:/(?:{_PART}))*")
_TORCH = (".pt", ".pth", ".ckpt")
_PICKLES = (".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz")
_CODE = tuple(
    words(
        """
        .py .pyc .pyd .pyi .pyw .pyx .so .dll .dylib .exe .com .bat .cmd .ps1 .vbs .js .jar .sh .bash .zsh
        .fish .pl .rb .lua .ipynb .egg .whl .ts .onnx .engine .plan .mlmodel .cu .c .cpp .yaml .yml .toml .cfg
        .ini .conf .zip .tar .tgz .7z"""
    )
)
_TEXTS = (".md", ".txt", ".csv")
_IMAGES = {".png": b"\x89PNG\r\n", ".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff"}
_DATA = (".nii", ".nii.gz")
_RESULT = re.compile(r".*\.(mha|nrrd|db|bank|rows|lock|log|tmp|part)|.*/events\.out\.tfevents\.[\w.-]+", re.DOTALL)
_BARE = ("LICENSE", SUMS)
# Python looks for modules and for the entry points of packages in the folder of a bundle that runs
_FOLDERS = ("configs", "docs", "eval", "metrics", "models")


def lint_bundle(path: str | Path) -> list[Finding]:
    """Read a bundle, without executing or unpacking anything, and list every reason not to run it.

    Args:
        path: folder or ZIP of a bundle.

    Returns:
        Findings in the order of files; none for a bundle that only puts together components known to be harmless.

    Raises:
        BundleError: there is no such file or folder, or it is no bundle.
    """
    path = Path(path)
    if not os.path.isdir(path) and not os.path.isfile(path):  # neither raises, whatever the path
        raise BundleError(f"there is no bundle {path}; give the folder or the ZIP of one")
    files = Folder(path) if path.is_dir() else Archive(path)
    try:
        found = [*files.findings, *lint_configs(files), *_lint_sums(files)]
        for name in sorted(files.sizes):
            found += [Finding(name, *problem) for problem in _lint_file(files, name)]
    finally:
        files.close()
    return sorted(dict.fromkeys(found))


def _lint_file(files: BundleFiles, name: str) -> Iterator[tuple[str, str, str, str]]:
    """(where, rule, what, why) of everything wrong with one file, its JSON apart."""
    lower, inner = name.lower(), name.removeprefix(RECORD)
    if not _NAME.fullmatch(name) or name.startswith(OUTSIDE):
        yield "", "file", name, "lies outside the bundle's folder, or has a name that no bundle needs"
    elif "/" in name and name.partition("/")[0] not in _FOLDERS:
        yield "", "file", name, f"in a folder that no bundle needs; allowed are {', '.join(_FOLDERS)}"
    try:
        if lower.endswith(_TORCH):
            with files.open(name) as stream:
                yield from _ruled("pickle", check_torch_file(stream))
        elif lower.endswith(_PICKLES):
            yield "", "pickle", "a pickle or array file", "such files are read by unpickling them"
            with files.open(name) as stream:
                yield from _ruled("pickle", check_pickle(stream, ""))
        elif lower.endswith(".safetensors"):
            with files.open(name) as stream:
                yield from _ruled("file", check_safetensors(stream, files.sizes[name]))
        elif inner == "configs/logging.conf":
            yield from _ruled("logging", check_logging(files.text(name)))
        elif inner == "large_files.yml":
            yield from _ruled("download", check_large_files(files.text(name)))
        elif not lower.endswith(".json"):
            yield from _lint_other(files, name)
    except Unreadable as error:
        yield "", "file", str(error), "cannot be read, so it cannot be judged"


def _lint_other(files: BundleFiles, name: str) -> Iterator[tuple[str, str, str, str]]:
    """As ``_lint_file``, of files that neither MONAI nor this package acts upon: are they what their names say?"""
    lower, start = name.lower(), next(files.blocks(name), b"")[:16]
    suffix = lower[lower.rfind(".") :] if "." in lower else ""
    if lower.endswith(_CODE):
        yield "", "file", f"a {suffix} file", "code, an archive or a config in another language: no bundle needs it"
    elif kind := kind_of(start):
        yield "", "file", kind, "is not what its name says"
    elif suffix in _IMAGES:
        if not start.startswith(_IMAGES[suffix]):
            yield "", "file", f"a {suffix} file", "is not the image that its name says"
    elif suffix in _TEXTS or name in _BARE:
        text = files.text(name)
        if "\0" in text:
            yield "", "file", "NUL", "is not the text that its name says"
        if name.removeprefix(RECORD) == "name.txt" and not re.fullmatch(r"\w[\w.-]*\n?", text):
            yield "", "file", text, "no plain name: 'samseg bundle pack' makes a folder of it"
    elif not lower.endswith(_DATA) and not (name.startswith(RESULTS) and _RESULT.fullmatch(lower)):
        yield "", "file", f"a {suffix or 'bare'} file", "of a kind that no bundle needs"


def _ruled(rule: str, problems: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str, str]]:
    for where, what, why in problems:
        yield where, rule, what, why


def _lint_sums(files: BundleFiles) -> Iterator[Finding]:
    """Compare every file with ``SHA256SUMS``, if the bundle has it: missing, changed, added.

    Results of later runs and images are no part of what was packed.
    """
    if SUMS not in files.sizes:
        return
    try:
        lines = files.text(SUMS).splitlines()
    except Unreadable as error:
        yield Finding(SUMS, "", "sums", str(error), "cannot be read, so nothing can be compared")
        return
    listed: set[str] = set()
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None or match[2] in listed:
            yield Finding(SUMS, f"line {number}", "sums", line, "no line of sha256sum, or a file given twice")
            continue
        expected, name = match.groups()
        listed.add(name)
        if name not in files.sizes:
            yield Finding(name, "", "sums", f"line {number} of {SUMS}", "missing: not the bundle that was packed")
            continue
        try:
            got = files.sha256(name)
        except Unreadable as error:
            yield Finding(name, "", "sums", str(error), "cannot be read, so it cannot be compared")
            continue
        if got != expected:
            what = f"sha256 {got[:12]}..., not {expected[:12]}..."
            yield Finding(name, "", "sums", what, "changed since it was packed")
    for name in files.sizes:
        if name not in listed and name != SUMS and not name.startswith(RESULTS) and not name.lower().endswith(_DATA):
            yield Finding(name, "", "sums", f"not in {SUMS}", "added after it was packed")

"""A wheel of this package for a packed bundle, made from the installed files: without network and without pip.

The same package gives the same bytes, from a checkout as from an installed wheel. So a wheel that came with a bundle
can be compared with the package that looks at it, and nothing of it is ever imported or installed.
Format: packaging.python.org, "Binary distribution format" (PEP 427) and "Recording installed projects" (PEP 376).
"""

from __future__ import annotations

import base64
import hashlib
import io
import stat
import zipfile
from collections.abc import Iterator
from importlib import metadata

from samseg_monai import __version__
from samseg_monai.bundles.archive import DAMAGED, BundleFiles
from samseg_monai.bundles.build import RECIPES, wheel_name
from samseg_monai.errors import BundleError, visible

PROJECT = "samseg-monai"
WHEEL = wheel_name(__version__)  # its path in a bundle
SUFFIXES = {".py", ".typed", ".json", ".jinja", ".safetensors", ".css", ".js"}  # of the package's own files
MOST_BYTES = 64 << 20
INFO = f"samseg_monai-{__version__}.dist-info"


def build_wheel() -> bytes:
    """Content of the wheel.

    Raises:
        BundleError: the package runs without being installed, so that nothing tells what it requires.
    """
    content = _content()
    record = f"{INFO}/RECORD"
    rows = [f"{name},sha256={_digest(value)},{len(value)}" for name, value in content.items()]
    content[record] = "\n".join([*rows, f"{record},,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # packed once, by the bundle's ZIP
        for name, value in content.items():
            member = zipfile.ZipInfo(name)  # of 1980, whenever it is made
            member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(member, value)
    return buffer.getvalue()


def wheel_problems(files: BundleFiles) -> Iterator[str]:
    """How the wheel ``WHEEL`` of a bundle differs from the package that runs here.

    Raises: BundleError as ``build_wheel``, and where the wheel cannot be read.
    """
    built, theirs = build_wheel(), files.read(WHEEL, MOST_BYTES)
    if theirs == built:
        return
    own = zipfile.ZipFile(io.BytesIO(built))
    known = {member.filename: member for member in own.infolist()}
    found = []
    try:
        with zipfile.ZipFile(io.BytesIO(theirs)) as archive:
            members = {member.filename: member for member in archive.infolist()}
            found += [f"{name}: added" for name in sorted(members.keys() - known.keys())]
            found += [f"{name}: taken out" for name in sorted(known.keys() - members.keys())]
            for name in sorted(members.keys() & known.keys() - {f"{INFO}/RECORD"}):
                same = members[name].file_size == known[name].file_size and archive.read(name) == own.read(name)
                found += [] if same else [f"{name}: not that of the package installed here"]
    except DAMAGED as error:
        found.append(f"no wheel ({error})")
    yield from (visible(f"{WHEEL}: {line}") for line in found or ["the same files, packed in another way"])


def _content() -> dict[str, bytes]:
    """The package's own files and what installers want to know of it; files of an editor or a cache are left out."""
    package = RECIPES.parent
    paths = sorted(p for p in package.rglob("*") if p.suffix in SUFFIXES and p.is_file() and p.name[0] != ".")
    content = {p.relative_to(package.parent).as_posix(): p.read_bytes() for p in paths}
    made = f"Wheel-Version: 1.0\nGenerator: {PROJECT} {__version__}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return {
        **content,
        f"{INFO}/METADATA": _metadata().encode(),
        f"{INFO}/WHEEL": made.encode(),
        f"{INFO}/entry_points.txt": b"[console_scripts]\nsamseg = samseg_monai.cli:main\n",
        f"{INFO}/licenses/LICENSE": (RECIPES / "engine" / "LICENSE.jinja").read_bytes(),
    }


def _metadata() -> str:
    """What the installed package says of itself, in a form that does not depend on what has installed it."""
    try:
        installed = metadata.distribution(PROJECT)
    except metadata.PackageNotFoundError as error:
        raise BundleError(f"wheel: {PROJECT} is not installed here; run pip install in its source folder") from error
    if installed.version != __version__:
        raise BundleError(
            f"wheel: {PROJECT} {installed.version} is installed here, but {__version__} runs; install it again"
        )
    given = installed.metadata
    lines = ["Metadata-Version: 2.1", *(f"{key}: {given[key]}" for key in ("Name", "Version", "Summary"))]
    lines += ["License: Apache-2.0", f"Requires-Python: {given['Requires-Python']}"]
    lines += [f"Provides-Extra: {extra}" for extra in sorted(given.get_all("Provides-Extra") or ())]
    lines += [f"Requires-Dist: {need}" for need in sorted(need.replace("'", '"') for need in installed.requires or ())]
    return "\n".join([*lines, ""])


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

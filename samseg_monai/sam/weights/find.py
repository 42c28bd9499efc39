"""Where SAM's weights are: explicit path, ``SAMSEG_WEIGHTS_DIR``, the user cache, and last a checked, resumed download.

The official files are those of Kirillov et al. 2023 (arXiv:2304.02643), https://github.com/facebookresearch/segment-anything,
of MobileSAM (Zhang et al. 2023, arXiv:2306.14289), https://github.com/ChaoningZhang/MobileSAM, of MedSAM (Ma et al.
2024, https://doi.org/10.1038/s41467-024-44824-z), https://github.com/bowang-lab/MedSAM, and torchvision's ImageNet
weights of ResNet18, whose file name holds the first 8 digits of the sha256. The whole sha256 are not published by the
authors; they agree across independent public projects (MedSAM's in four, which tell it of its README's file; Zenodo's
has the same size).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
from filelock import FileLock
from tqdm import tqdm

from samseg_monai.errors import WeightsError
from samseg_monai.files import known_hash

logger = logging.getLogger(__name__)

ENVIRONMENT = "SAMSEG_WEIGHTS_DIR"
RANDOM = "random"  # the word that asks for a random start, in place of a file
BLOCK = 1 << 16  # bytes written at a time; a broken connection loses at most these
TIMEOUT_S = 30.0  # of silence, not of the whole download
ATTEMPTS = 5  # connections, each of which goes on where the one before broke off


@dataclass(frozen=True)
class WeightsFile:
    """One published file.

    Args:
        name: file name, also in the cache and in ``SAMSEG_WEIGHTS_DIR``.
        url: where it is published.
        size: bytes, as far as known; the hash decides.
        sha256: of its contents.
    """

    name: str
    url: str
    size: int
    sha256: str


def _official(name: str, size: int, sha256: str) -> WeightsFile:
    return WeightsFile(name, f"https://dl.fbaipublicfiles.com/segment_anything/{name}", size, sha256)


KNOWN: dict[str, WeightsFile] = {
    "vit_b": _official(
        "sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": _official(
        "sam_vit_l_0b3195.pth", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": _official(
        "sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
    "vit_t": WeightsFile(
        "mobile_sam.pt",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        40_728_226,
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    "medsam": WeightsFile(
        "medsam_vit_b.pth",
        "https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
        375_049_145,
        "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
    ),
    "resnet18": WeightsFile(
        "resnet18-f37072fd.pth",
        "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        46_830_571,
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    ),
}

PICO_FILE = Path(__file__).resolve().parent.parent / "pico.safetensors"


def cache_folder() -> Path:
    """The user cache of this package (honours ``XDG_CACHE_HOME``); it need not exist."""
    return Path(pooch.os_cache("samseg-monai"))


def weights_folders() -> list[Path]:
    """Where published files are looked for, in this order: ``SAMSEG_WEIGHTS_DIR`` if it is set, the user cache."""
    return [Path(folder).expanduser() for folder in [os.environ.get(ENVIRONMENT)] if folder] + [cache_folder()]


def find_weights(
    variant: str, checkpoint: str | Path | None = None, *, download: bool = True, key: str = "sam_checkpoint"
) -> Path:
    """Path of the weights of a network; downloads the official file only when it is nowhere on this machine.

    Args:
        variant: ``"vit_b"``, ``"vit_l"``, ``"vit_h"``, ``"vit_t"``, ``"medsam"``, ``"resnet18"`` (official files),
            ``"pico"`` (packaged), ``"tiny"`` (none).
        checkpoint: file to use instead, or a folder that holds the official file; ``"random"`` asks for a random start
            and is handed back as ``Path("random")``, which :func:`load_sam_weights` understands.
        download: False never touches the network.
        key: name of the setting that ``checkpoint`` comes from, for messages.

    Raises: WeightsError if ``checkpoint`` does not exist, if a file of the official name has another hash, or if the
        file is absent and cannot be downloaded; the text then has URL, name, hash and the three ways to provide it.
    """
    if checkpoint is not None:
        return _explicit(variant, checkpoint, key)
    if variant == "pico":
        if not PICO_FILE.is_file():
            raise WeightsError(
                f"{PICO_FILE} is not installed: run 'make pico', or set sam_checkpoint to a file or 'random'"
            )
        return PICO_FILE
    if variant not in KNOWN:
        raise WeightsError(
            f"{variant!r} has no published weights: set {key} to a file or to 'random'; "
            f"there are some for {', '.join([*KNOWN, 'pico'])}"
        )
    file = KNOWN[variant]
    folders = weights_folders()
    for folder in folders:
        if (folder / file.name).is_file():
            return _checked(folder / file.name, file, key)
    if not download:
        raise WeightsError(_absent(variant, file, folders, "downloading is switched off", key, online=False))
    return _download(variant, file, folders, key)


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file; computed again only when its size or modification time changed.

    Raises: WeightsError if the file does not exist.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    return known_hash(path)


def name_of(sha256: str | None) -> str | None:
    """Name of the published file with this hash; None of others."""
    return next((file.name for file in KNOWN.values() if file.sha256 == sha256), None)


def _explicit(variant: str, checkpoint: str | Path, key: str) -> Path:
    if str(checkpoint) == RANDOM:
        return Path(RANDOM)
    path = Path(checkpoint).expanduser()
    if path.is_dir() and variant in KNOWN and (path / KNOWN[variant].name).is_file():
        return _checked(path / KNOWN[variant].name, KNOWN[variant], key)
    if not path.is_file():
        where = "" if path.is_absolute() else f" ({path.absolute()})"
        raise WeightsError(
            f"{key} {str(checkpoint)!r} is not a file{where}: give the path of a weights file, "
            f"{RANDOM!r} for a random start, or leave it out"
        )
    return path


def _checked(path: Path, file: WeightsFile, key: str) -> Path:
    """A file that carries an official name must be the official file; this one may be cut, old or a copy of another."""
    got = sha256_of(path)
    if got != file.sha256:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} is not the official {file.name}: sha256 {got} ({size:,} bytes), expected {file.sha256} "
            f"({file.size:,} bytes). Delete it or copy it again from {file.url}; "
            f"to use a file of your own, name it in {key}"
        )
    return path


def _download(variant: str, file: WeightsFile, folders: list[Path], key: str) -> Path:
    """Fetch into the user cache. The lock makes the processes of one multi-GPU run wait for the first."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{file.name}.lock"):
            downloader = ResumingDownloader(folder / f"{file.name}.part")
            path = pooch.retrieve(
                file.url, known_hash=f"sha256:{file.sha256}", fname=file.name, path=folder, downloader=downloader
            )
    except (requests.RequestException, OSError, ValueError) as error:  # ValueError is pooch's word for a wrong hash
        raise WeightsError(_absent(variant, file, folders, f"the download failed: {error}", key)) from error
    return Path(path)


def _absent(variant: str, file: WeightsFile, folders: list[Path], reason: str, key: str, *, online: bool = True) -> str:
    looked = ", ".join(str(folder) for folder in folders)
    or_download = ", or run once with a network connection" if online else ""
    return (
        f"The weights of {variant!r} are not on this machine and {reason}\n"
        f"  file:      {file.name} ({file.size:,} bytes)\n"
        f"  URL:       {file.url}\n"
        f"  sha256:    {file.sha256}\n"
        f"  looked in: {looked}\n"
        "Provide it in one of three ways:\n"
        f"  1. set {key} to the path of the file, or to {RANDOM!r} for a random start on purpose\n"
        f"  2. put the file into a folder of yours and set the environment variable {ENVIRONMENT} to that folder\n"
        f"  3. put the file into {cache_folder()}{or_download}"
    )


class ResumingDownloader:
    """Callable ``(url, output_file, pooch)``, pooch's protocol, that keeps unfinished bytes in a ``.part`` file and
    goes on where an interrupted download stopped (HTTP ranges, RFC 9110 section 14).

    Bytes survive an error or a killed process; a server that knows no ranges is read from the start again. pooch
    compares the hash afterwards and throws a wrong file away, so a ``.part`` of something else costs one download.

    Raises: requests.RequestException (when called) if the last connection failed or the server refused.
    """

    def __init__(self, part: Path) -> None:
        self.part = part

    def __call__(self, url: str, output_file: Any, pooch: Any) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            before = self._have()
            try:
                self._fetch(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                # No byte gained means that there is no server to go on with: trying again only hides the error.
                if attempt == ATTEMPTS or self._have() <= before:
                    raise
                logger.warning("%s: connection lost at %d bytes (%s); going on", url, self._have(), error)
        shutil.move(self.part, output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _fetch(self, url: str) -> None:
        have = self._have()
        # identity: byte positions of a compressed transfer would not be those of the file
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            start, total = _range_of(response)
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                if have != total:  # the part is longer than the file, so it is not part of it
                    self.part.unlink()
                    self._fetch(url)
                return
            response.raise_for_status()
            if start not in (0, have):
                raise requests.exceptions.InvalidHeader(f"{url}: asked for bytes from {have}, got them from {start}")
            self._write(response, start, total)

    def _write(self, response: requests.Response, start: int, total: int | None) -> None:
        name = self.part.name.removesuffix(".part")
        # disable=None: a bar for people at a terminal only, none in log files
        with (
            self.part.open("ab" if start else "wb") as stream,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None) as bar,
        ):
            for block in response.iter_content(BLOCK):
                stream.write(block)
                bar.update(len(block))


def _range_of(response: requests.Response) -> tuple[int, int | None]:
    """First byte of the answer and bytes of the whole file (None when the server does not say)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match:
        return int(match[1] or 0), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None

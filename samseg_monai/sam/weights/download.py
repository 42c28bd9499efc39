"""A downloader for pooch that goes on where an interrupted download stopped (HTTP ranges, RFC 9110 section 14)."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

logger = logging.getLogger(__name__)

BLOCK = 1 << 16  # bytes written at a time; a broken connection loses at most these
TIMEOUT_S = 30.0  # of silence, not of the whole download


class ResumingDownloader:
    """Callable ``(url, output_file, pooch)``, pooch's protocol, that keeps unfinished bytes in a ``.part`` file.

    Bytes survive an error or a killed process; a server that knows no ranges is read from the start again. pooch
    compares the hash afterwards and throws a wrong file away, so a ``.part`` of something else costs one download.

    Args:
        part: file that keeps the bytes between tries.
        attempts: connections per call; each goes on where the one before broke off.
        timeout_s: seconds without a byte that end a connection.

    Raises: requests.RequestException (when called) if the last connection failed or the server refused.
    """

    def __init__(self, part: Path, *, attempts: int = 5, timeout_s: float = TIMEOUT_S) -> None:
        self.part = part
        self.attempts = attempts
        self.timeout_s = timeout_s

    def __call__(self, url: str, output_file: Any, pooch: Any) -> None:
        for attempt in range(1, self.attempts + 1):
            before = self._have()
            try:
                self._fetch(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                # No byte gained means that there is no server to go on with: trying again only hides the error.
                if attempt == self.attempts or self._have() <= before:
                    raise
                logger.warning("%s: connection lost at %d bytes (%s); going on", url, self._have(), error)
        shutil.move(self.part, output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _fetch(self, url: str) -> None:
        have = self._have()
        # identity: byte positions of a compressed transfer would not be those of the file
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout_s) as response:
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

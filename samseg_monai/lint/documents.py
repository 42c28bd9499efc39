"""``logging.conf`` and ``large_files.yml``: the two files beside the configs that MONAI acts upon."""

from __future__ import annotations

import configparser
import io
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from samseg_monai.lint.names import HOSTS

Problem = tuple[str, str, str]  # where, what, why

_STREAMS = {"(sys.stderr,)", "(sys.stdout,)", "(sys.stderr, )", "(sys.stdout, )", "()"}
_LOGGING = {"keys", "level", "handlers", "qualname", "propagate", "formatter", "format", "datefmt", "class", "args"}
_HANDLERS = {"StreamHandler", "NullHandler", "logging.StreamHandler", "logging.NullHandler"}
_FORMATTERS = {"logging.Formatter"}
_ENTRY = re.compile(r'(?:- |  )(path|url|hash_val|hash_type): "([^"\\]*)"')


def check_logging(text: str) -> Iterator[Problem]:
    """Say what in a ``logging.conf`` does more than write to the terminal.

    ``logging.config.fileConfig`` evaluates ``class`` and ``args`` of handlers and imports ``class`` of formatters; a
    handler may as well write files anywhere, or send what it is told to another machine.
    """
    parser = configparser.ConfigParser(interpolation=None)  # fileConfig would fill in %(name)s: never allowed below
    try:
        parser.read_file(io.StringIO(text, newline=None))  # as from a file: a carriage return ends a line, too
    except (configparser.Error, ValueError) as error:
        yield "", str(error), "no logging.conf: what a reader makes of it cannot be told"
        return
    sections = {name: dict(parser.items(name)) for name in parser.sections()}
    for section, options in {parser.default_section: dict(parser.defaults()), **sections}.items():
        for key, value in options.items():
            where = f"{section}.{key}"
            classes = _FORMATTERS if section.startswith("formatter") else _HANDLERS
            if key not in _LOGGING:
                yield where, value, "not an option that bundles need"
            elif key == "class" and value not in classes:
                yield where, value, f"is imported or evaluated; allowed is {', '.join(sorted(classes))}"
            elif key == "args" and value not in _STREAMS:
                yield where, value, "is evaluated; allowed is (sys.stderr,), (sys.stdout,) or ()"


def check_large_files(text: str) -> Iterator[Problem]:
    """Say which downloads of a ``large_files.yml`` come from elsewhere than SAM's and torchvision's own hosts, have no
    sha256, or do not go to ``models``. Lines that are not written as bundles have them are named, too."""
    entries: list[dict[str, str]] = []
    lines = text.splitlines()
    indent = "" if any(line.startswith("- ") for line in lines) else "  "
    for number, line in enumerate(lines, start=1):
        match = _ENTRY.fullmatch(line.rstrip().removeprefix(indent)) if line.startswith(indent) else None
        if match is None:
            if line.strip() and (number > 1 or line.rstrip() != "large_files:"):
                yield f"line {number}", line, 'not understood; entries are written as  - path: "..."'
            continue
        if line.startswith(f"{indent}- "):
            entries.append({})
        if not entries or match[1] in entries[-1]:
            yield f"line {number}", line, "belongs to no entry, or is given twice"
        else:
            entries[-1][match[1]] = match[2]
    for index, entry in enumerate(entries):
        where = f"large_files::{index}"
        url = urlsplit(entry.get("url", ""))
        if url.scheme != "https" or url.netloc not in HOSTS:
            yield where, entry.get("url", "no url"), f"not from https of {', '.join(sorted(HOSTS))}"
        if entry.get("hash_type") != "sha256" or not re.fullmatch(r"[0-9a-f]{64}", entry.get("hash_val", "")):
            yield where, f"hash {entry.get('hash_val', '')}", "no sha256: whatever the host sends would be taken"
        if not re.fullmatch(r"models/[\w-][\w.-]*", entry.get("path", "")):
            yield where, entry.get("path", "no path"), "does not go to the folder models"

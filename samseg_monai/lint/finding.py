"""What the linter reports, as a table for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

RULES = {
    "target": "a component that is not known to be harmless",
    "argument": "an argument that makes a harmless component load, download or run something",
    "expression": "a '$' expression beyond the allowed forms",
    "import": "a module that expressions may not use, or a name with two meanings",
    "reference": "a reference whose meaning depends on its place, or that reaches modules",
    "macro": "a '%' macro: text from another place or file",
    "path": "a path that leaves the bundle, or a URL",
    "key": "a key that is given twice or that Python treats specially",
    "format": "a format string that reaches double underscores",
    "config": "a config that cannot be read",
    "file": "a file that does not belong in a bundle, or is not what its name says",
    "link": "a link or special file",
    "pickle": "a pickle, or something in one, that may run code when it is read",
    "sums": "a file that is not the one listed in SHA256SUMS",
    "zip": "an archive that does not unpack to what it shows",
    "logging": "a logging.conf that does more than write to the terminal",
    "download": "a download from elsewhere, or without a hash",
}
_SHOWN = 100


@dataclass(frozen=True, order=True)
class Finding:
    """One reason not to run a bundle.

    Args:
        file: its path in the bundle.
        where: id in a config ("run::0"), entry, line or section; "" for the whole file.
        rule: key of ``RULES``.
        what: what was found, as it stands there, made printable and at most 300 characters long.
        why: what is wrong with it.
    """

    file: str
    where: str
    rule: str
    what: str
    why: str

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, visible(getattr(self, field.name), 300))


def visible(text: str, length: int) -> str:
    """``text`` without anything that a terminal would obey, shortened to ``length`` characters."""
    shown = text[: length + 1]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return plain if len(plain) <= length else plain[: length - 3] + "..."


def as_table(findings: Sequence[Finding]) -> str:
    """Aligned columns file, where, rule, what, why; one line each."""
    heads = tuple(field.name for field in fields(Finding))
    rows = [tuple(visible(getattr(finding, head), _SHOWN) for head in heads) for finding in findings]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def as_json(findings: Sequence[Finding]) -> str:
    """``{"findings": [{"file": ..., "where": ..., "rule": ..., "what": ..., "why": ...}]}``."""
    return json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2)


def as_lines(findings: Sequence[Finding]) -> list[str]:
    """One line each, for the text of an error."""
    return [f"{f.file}: {f.why}" + (f" ({f.where}: {f.what})" if f.where else f" ({f.what})") for f in findings]

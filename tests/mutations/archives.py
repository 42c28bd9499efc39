"""Bundles as ZIPs: names, sizes, links, check sums, encodings, records that contradict each other.

The oracle walks through the bytes by PKWARE's APPNOTE (4.3): members one after the other, one table, its end. By the
rules of ``archive`` the two records of a member have to say the same, and nothing may lie between them.
"""

from __future__ import annotations

import hashlib
import random
import re
import struct
import unicodedata
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

from samseg_monai.bundles.archive import SUMS, TEXT_BYTES, open_files
from samseg_monai.errors import BundleError, raise_all
from tests.mutations.harness import Trial, damaged, pick

NAMES = (
    "../x", "a/../../x", "/etc/x", "C:/x", "C:x", "a\\b", "a//b", "a/./b", "con", "aux.txt", "COM1", "lpt9.md", "a ",
    "a.",
    "docs/readme.md", "DOCS/README.md", "docs", "docs/README.md/x", "a\nb", "a\x1b[31m", "é.txt", "e\u0301.txt",
    "\u202ex",
    "x" * 501, "a:b", "a*b", "a?b", "a|b", "a<b", 'a"b', "", ".", "..", "a/b/c.txt", "._x", ".DS_Store", "nul", "K",
    "name\0x", "ok.txt", "SHA256SUMS2", "configs/x.json",
)  # fmt: skip


def member(name: bytes, data: bytes, **over: Any) -> dict[str, Any]:
    """Fields of a member; those that begin with ``l_`` are of the header before the data only."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packed.compress(data) + packed.flush() if over.get("method", 8) == 8 else data
    flags = 0x800 if not name.isascii() else 0
    return {"name": name, "body": body, "crc": zlib.crc32(data), "packed": len(body), "size": len(data), "method": 8,
            "flags": flags, "extra": b"", "attr": 0o100644 << 16, "comment": b"", "before": b"", **over}  # fmt: skip


def zipped(members: list[dict[str, Any]], *, after: bytes = b"", end: dict[str, Any] | None = None) -> bytes:
    """The file of such members."""
    content, table = b"", b""
    for m in members:
        content += m["before"]
        local = {
            key: m.get(f"l_{key}", m[key]) for key in ("name", "crc", "packed", "size", "method", "flags", "extra")
        }
        at = len(content)
        content += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, local["flags"], local["method"], 0, 33, local["crc"],
                               local["packed"], local["size"], len(local["name"]), len(local["extra"]))  # fmt: skip
        content += local["name"] + local["extra"] + m["body"]
        table += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0x314, 20, m["flags"], m["method"], 0, 33, m["crc"],
                             m["packed"],
                             m["size"], len(m["name"]), len(m["extra"]), len(m["comment"]), 0, 0, m["attr"],
                             m.get("at", at))  # fmt: skip
        table += m["name"] + m["extra"] + m["comment"]
    e = {"count": len(members), "size": len(table), "at": len(content), "comment": b"", **(end or {})}
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, e["count"], e["count"], e["size"], e["at"], len(e["comment"]))
    return content + table + record + e["comment"] + after


def make(folder: Path) -> Any:
    """A small bundle with sums."""
    files = {
        "configs/inference.json": b'{"a": 1}', "configs/metadata.json": b"{}", "docs/README.md": b"text\n" * 50,
        "models/card.json": b'{"x": [1, 2]}',
    }  # fmt: skip
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    files[SUMS] = sums.encode()
    path = folder / "b.zip"

    def trial(rng: random.Random) -> Trial:
        root = pick(rng, "b/", "b/", "", "out/b/")
        members = [member(f"{root}{name}".encode(), data) for name, data in files.items()]
        after, end, told = b"", {}, ""
        how, m = rng.randrange(14), rng.choice(members)
        if how < 4:
            name = rng.choice(NAMES)
            raw = name.encode("utf-8")
            extra = member(raw if rng.random() < 0.3 else root.encode() + raw, b"x")
            members.insert(rng.randrange(len(members) + 1), extra)
            told = f"a member {extra['name']!r:.60}"
        elif how == 4:
            key = pick(rng, "crc", "packed", "size", "method", "flags", "name", "extra")
            m[f"l_{key}"] = {"crc": 1, "packed": m["packed"] + 1, "size": m["size"] + 1, "method": 0, "flags": 1,
                             "name": m["name"][:-1] + b"X", "extra": b"\x55\x54\x05\0\x01abcd"}[key]  # fmt: skip
            told = f"{key} before the data of {m['name']!r}"
        elif how == 5:
            key = pick(rng, "crc", "packed", "size", "method", "flags", "attr", "extra", "comment", "before")
            m[key] = {
                "crc": m["crc"] ^ 1, "packed": pick(rng, 0, m["packed"] - 1, 2**31), "size": pick(rng, 0,
                m["size"] - 1, 2**31),
                "method": pick(rng, 0, 1, 12, 14, 99), "flags": pick(rng, 1, 8, 0x40, 0x800, 0x2000),
                "attr": pick(rng, 0o120777 << 16, 0o040755 << 16, 0o010644 << 16, 0, 0o100755 << 16),
                "extra": pick(rng, b"\x55\x54\x05\0\x01abcd", b"\x75\x70\x05\0\x01abcd", b"\x01\0", b"\x99\x99\0\0"),
                "comment": b"c", "before": b"\0" * 5,
            }[key]  # fmt: skip
            told = f"{key} of {m['name']!r} = {m[key]!r:.30}"
        elif how == 6:
            end = pick(rng, {"count": 1}, {"size": 1}, {"at": 0}, {"comment": b"hello"}, {"count": 99}, {"at": 2**31})
            told = f"end {end}"
        elif how == 7:
            after = pick(rng, b"\0", b"PK\x05\x06" + b"\0" * 18, b"x" * 100)
            told = "bytes behind the end"
        elif how == 8:
            m["at"] = pick(rng, 0, 1, 10**6)
            told = f"{m['name']!r} begins at {m['at']}"
        elif how == 9:
            members.append(dict(m))
            told = f"{m['name']!r} twice"
        elif how == 10:
            members.remove(m)
            told = f"{m['name']!r} gone"
        elif how == 11:
            m |= member(m["name"], b"changed")
            told = f"{m['name']!r} changed"
        content = zipped(members, after=after, end=end)
        if how == 12:
            told, content = damaged(content, rng)
        path.write_bytes(content)
        rule, expected = rule_of(content)
        return Trial(f"{root} {told}", lambda: _read(path), rule, lambda found: _differs(found, expected))

    return trial


def _read(path: Path) -> dict[str, bytes]:
    with closing(open_files(path)) as files:
        raise_all([*files.problems, *files.changed()], BundleError, "do not use it")
        return {name: files.read(name, TEXT_BYTES) for name in files.sizes}


def _differs(found: dict[str, bytes], expected: dict[str, bytes] | None) -> str:
    return "" if expected is None or found == expected else f"{set(found) ^ set(expected)} or their content"


def rule_of(content: bytes) -> tuple[str | None, dict[str, bytes] | None]:
    """Why a ZIP is refused, None for what only some writers do; and its files."""
    try:
        return _walk(content)
    except (struct.error, UnicodeDecodeError, zlib.error) as error:
        return f"damaged ({error})", None


def _walk(content: bytes) -> tuple[str | None, dict[str, bytes] | None]:
    if len(content) < 22 or content[-22:-18] != b"PK\x05\x06":
        return "no end, or more behind it", None
    disk, start, here, count, size, at, comment = struct.unpack("<4H2LH", content[-18:])
    if (disk, start, comment) != (0, 0, 0) or here != count or at + size != len(content) - 22:
        return "an end that names another table", None
    place, position, named = at, 0, []
    entries = []
    for _ in range(count):
        head = struct.unpack("<4s6H3L5H2L", content[place : place + 46])
        flags, method, crc, packed, length = head[3], head[4], *head[7:10]
        names, extras, comments = head[10:13]
        name = content[place + 46 : place + 46 + names]
        extra = content[place + 46 + names : place + 46 + names + extras]
        place += 46 + names + extras + comments
        if head[0] != b"PK\x01\x02" or comments or head[13] or len(name) < names:
            return "a table that is none, or comments", None
        entries.append((head[16], name, extra, flags, method, crc, packed, length, head[15]))
    if place != at + size:
        return "bytes within the table", None
    files: dict[str, bytes] = {}
    for offset, name, extra, flags, method, crc, packed, length, attr in sorted(entries):
        if offset != position:
            return "a member that overlaps another, or bytes before it", None
        local = struct.unpack("<4s5H3L2H", content[offset : offset + 30])
        start = offset + 30 + local[9] + local[10]
        if (local[0], local[2], local[3], content[offset + 30 : offset + 30 + local[9]]) != (
            b"PK\x03\x04",
            flags,
            method,
            name,
        ):
            return "two records that differ", None
        if flags & 8:
            return None if False else "sizes that do not follow the data", None
        if local[6:9] != (crc, packed, length) or flags & 1 or method not in (0, 8):
            return "two records that differ, encrypted, or another method", None
        for field in (extra, content[offset + 30 + local[9] : start]):
            while field:
                kind, more = struct.unpack("<HH", field[:4])
                if kind not in (1, 0x000A, 0x5455, 0x5855, 0x7855, 0x7875) or len(field) < 4 + more:
                    return f"an extra field {kind:x}", None
                field = field[4 + more :]
        position = start + packed
        if attr >> 16 and (attr >> 28) not in (0o10, 0o04, 0):
            return "a link or special file", None
        text = name.decode("utf-8" if flags & 0x800 else "cp437")
        if flags & ~(0x800 | 0x8 | 0x6):
            named.append(None)
        if problem := name_rule(text):
            return f"{text!r:.60} {problem}", None
        data = content[start : start + packed] if method == 0 else zlib.decompress(content[start : start + packed], -15)
        if not text.endswith("/"):
            if (len(data) != length or zlib.crc32(data) != crc) and not _left_behind(text):
                return f"{text}: a check sum or length that differs", None
            files[text] = data
        elif data:
            return None, None
    if position != at:
        return "bytes behind the last member", None
    rule, found = _bundle(files, [e[1].decode("utf-8" if e[3] & 0x800 else "cp437") for e in entries])
    return (None if named and rule == "" else rule), found


def _left_behind(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith("._") or last.lower() in (".ds_store", "thumbs.db")


def _bundle(files: dict[str, bytes], names: list[str]) -> tuple[str, dict[str, bytes] | None]:
    folded = [
        unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name.rstrip("/")).casefold()) for name in names
    ]
    if len(set(folded)) < len(folded):
        return "names that are one file elsewhere", None
    plain = {f for f, name in zip(folded, names, strict=True) if not name.endswith("/")}
    if any("/".join(f.split("/")[:n]) in plain for f in folded for n in range(1, f.count("/") + 1)):
        return "a folder that is a file", None
    files = {name: data for name, data in files.items() if not _left_behind(name)}
    roots = {
        m[1] for name in files if (m := re.fullmatch(r"((?:[^/]+/){0,2})configs/[^/]+\.json", name, re.IGNORECASE))
    }
    depth = min((root.count("/") for root in roots), default=0)
    roots = {root for root in roots if root.count("/") == depth}
    if len(roots) != 1:
        return "no bundle, or several", None
    root = roots.pop()
    if any(not name.startswith(root) for name in files):
        return "files beside the bundle", None
    found = {name[len(root) :]: data for name, data in files.items()}
    for line in found.get(SUMS, b"").decode("utf-8", "replace").splitlines():
        digest, name = line[:64], line[66:]
        if name not in found or hashlib.sha256(found[name]).hexdigest() != digest:
            return f"{name}: not what was packed", None
    return "", found


def name_rule(name: str) -> str:
    """Why a path means something else on another machine."""
    parts = name.rstrip("/").split("/")
    if name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        return "points outside"
    if not name.isprintable() or len(name) > 500 or set(name) & set('\\:<>"|?*'):
        return "has signs that no name has"
    if any(part in ("", ".") or part[-1] in ". " for part in parts):
        return "is another path elsewhere"
    device = re.compile(r"(con|prn|aux|nul|com[1-9¹²³0]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE)
    return "is a device" if any(device.fullmatch(part) for part in parts) else ""

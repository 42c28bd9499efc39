"""Files of the cache: cut, changed, of another key. A row comes back as it was written, or is an error."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import torch

from samseg_monai.data.slices.cache import CachedCase
from tests.mutations.harness import Trial, damaged


def make(folder: Path) -> Any:
    """Five rows of two tensors."""
    rows = {"image": torch.arange(60, dtype=torch.float32).reshape(5, 3, 4), "label": torch.arange(20).reshape(5, 4)}
    rows["label"] = rows["label"].to(torch.uint8)
    case = CachedCase(folder, {"a": 1})
    case.ensure(lambda: [rows])
    content = case.path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]

    def trial(rng: random.Random) -> Trial:
        row, told, changed = rng.randrange(5), "", content
        how = rng.random()
        if how < 0.6:
            told, changed = damaged(content, rng)
        elif how < 0.7:
            told, changed = "more bytes", content + b"\0" * rng.randrange(1, 9)
        elif how < 0.8:
            told, changed = "another key", content.replace(b'\\"a\\": 1', b'\\"a\\": 2')
        elif how < 0.9:
            at = rng.randrange(start, len(content))
            told, changed = f"data at {at}", content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        case.path.write_bytes(changed)
        same = changed == content
        # what is stored of a row is its bytes and their check sum, wherever else the file is damaged
        return Trial(f"row {row}: {told}", lambda: _read(case, row, rows), "" if same else None,
                     lambda found: _differs(found, rows, row, same))  # fmt: skip

    return trial


def _read(case: CachedCase, row: int, rows: dict[str, torch.Tensor]) -> Any:
    whole = case.is_whole(tell=False)
    if not whole:
        case.ensure(lambda: [rows])
    return whole, case.read(row)


def _differs(found: Any, rows: dict[str, torch.Tensor], row: int, same: bool) -> str:
    whole, values = found
    if same and not whole:
        return "a whole file is taken for damaged"
    equal = set(values) == set(rows) and all(torch.equal(values[name], rows[name][row]) for name in rows)
    return "" if equal else f"row {row} is {values}"[:300]

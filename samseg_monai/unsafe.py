"""What no settings may hold, whatever the key: expressions, references, places, control characters, too much of it."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

MOST_BYTES, MOST_LEVELS = 1_000_000, 30
TOO_MUCH = "all of it"


def unsafe(value: Any, where: str = "", level: int = 0) -> list[str]:
    """What no settings may hold, whatever the key: what MONAI would evaluate or merge, control characters, too much."""
    if level == 0:
        if _deeper(value, MOST_LEVELS):
            return [f"{TOO_MUCH}: more than {MOST_LEVELS} levels of lists and objects"]
        try:
            size = len(json.dumps(value))
        except (TypeError, ValueError) as error:
            return [f"{TOO_MUCH}: not JSON: {error}"]
        if size > MOST_BYTES:
            return [f"{TOO_MUCH}: {size:,} bytes, more than {MOST_BYTES:,}"]
    if isinstance(value, str):
        return [f"{where}: {problem}" for problem in _unsafe_text(value)]
    if isinstance(value, list):
        return [line for i, item in enumerate(value) for line in unsafe(item, f"{where}::{i}", level + 1)]
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        name = f"{where}::{key!r}" if not str(key).isidentifier() else f"{where}::{key}"
        name = name.removeprefix("::")
        if not isinstance(key, str) or key.startswith(("_", "+")) or _unsafe_text(key):
            found.append(f"{name}: no key may begin with '_', '+', '$', '@' or '%' or hold control characters")
        found += unsafe(item, name, level + 1)
    return found


def _unsafe_text(text: str) -> list[str]:
    if text.strip() != text:
        return [f"{text!r}: spaces at its ends"]
    if text.startswith(("$", "@", "%")):
        return [f"{text!r}: a setting is a value, and no text may begin with '$', '@' or '%'"]
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text):
        return [f"{text!r}: control characters"]
    if re.search(r"[@%](#|::)", text):
        return [f"{text!r}: MONAI takes '@' and '%' before '#' or '::' for a reference"]
    if "../" in text or "..\\" in text:
        return [f"{text!r}: a setting names no place"]
    return []


def _deeper(value: Any, levels: int) -> bool:
    items: Any = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(item, levels - 1) for item in items)

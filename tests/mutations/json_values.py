"""How JSON is mutated: a value in place of another, a key gone or renamed; now and then the text itself is damaged."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from tests.mutations.harness import damaged

WRONG = [
    None, True, False, 0, -1, 1, 3, 0.5, 1e400, float("nan"), 10**30, "", "x", "$1", "a/b", "../x", "\0", "\ud800",
    "x" * 5000, "x" * 300, " x", [], ["x"], [1], [1, 2], [[]], {}, {"x": "y"}, {"1": 2}, {"-5": "z"}, "volumes",
    "images", "samed",
    "none", "1", "=1+1", "\u202ea", "é",
]  # fmt: skip
KEYS = ["", "x", "-1", "99999999999", "²", "a" * 300, "$x", "_target_", "../k"]
TEXTS = ("[]", "null", "", '{"training": ' + "[" * 5000 + "]" * 5000 + "}", '{"a": 1, "a": 2}', '"x"', "{}", "{'a': 1}")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value that can be changed."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*at, key), *places(item, (*at, key)))]


def mutated(value: Any, rng: random.Random, wrong: list[Any] = WRONG) -> tuple[str, Any]:
    """A copy with one or two changes, and what they are."""
    value, told = copy.deepcopy(value), []
    for _ in range(rng.choice((1, 1, 2))):
        found = places(value)
        if not found:
            break
        *way, last = rng.choice(found)
        parent = value
        for key in way:
            parent = parent[key]
        name = "::".join(map(str, (*way, last)))
        if rng.random() < 0.2:
            del parent[last]
            told.append(f"{name} gone")
        elif isinstance(parent, dict) and rng.random() < 0.15:
            parent[key := rng.choice(KEYS)] = parent.pop(last)
            told.append(f"{name} -> {key[:20]}")
        else:
            old = parent[last]
            near = [type(old)(old + rng.choice((-1, 1, 0.5)))] if type(old) in (int, float) else []
            parent[last] = copy.deepcopy(rng.choice(near * 6 + wrong))
            told.append(f"{name} = {parent[last]!r:.40}")
    return "; ".join(told), value


def written(value: Any, rng: random.Random) -> tuple[str, bytes]:
    """The bytes of a JSON file, which in one of ten cases are damaged or in another encoding."""
    text = json.dumps(value)
    how = rng.random()
    if how < 0.03:
        return damaged(text.encode(), rng)
    if how < 0.05:
        chosen = rng.choice(TEXTS)
        return f"{chosen[:20]}", chosen.encode()
    if how < 0.07:
        return "byte order mark", b"\xef\xbb\xbf" + text.encode()
    if how < 0.08:
        return "UTF-16", text.encode("utf-16")
    return "", text.encode()


def parsed(content: bytes) -> tuple[str, Any]:
    """Why a file is no JSON object by the rules of ``read_json``, and the object."""
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            twice.append("a key twice")
        return dict(pairs)

    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error})"[:200], None
    if twice or not isinstance(value, dict):
        return "a key twice, or no object", None
    if depth(value) > 100:
        return "too deep", None
    if any(re.search("[\ud800-\udfff]", text) for text in texts(value)):
        return "half of a character", None
    return "", value


def texts(value: Any) -> Iterator[str]:
    """Every key and text in a JSON value."""
    if isinstance(value, str):
        yield value
    for item in value.items() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(list(item) if isinstance(item, tuple) else item)


def depth(value: Any) -> int:
    """Levels of lists and objects."""
    level, count = [value], 0
    while level:
        level = [item for group in level for item in (group.values() if isinstance(group, dict) else group)
                 if isinstance(item, (dict, list))]  # fmt: skip
        count += 1
    return count


def is_text(value: Any) -> bool:
    """A text that can be a name: some characters, none of them a control or half of one."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= 4096
        and not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in value)
    )


def is_number(value: Any) -> bool:
    """A number and no truth value."""
    return type(value) in (int, float)

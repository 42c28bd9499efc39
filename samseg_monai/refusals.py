"""Why settings are refused, in lines for a person: what none may hold (expressions, references, control characters, too
much of it), and what pydantic says of their types and ranges."""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from samseg_monai.errors import MOST_LINES

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


def for_users(message: str) -> str:
    """The values that are possible, without the networks that only tests use."""
    for name in ("tiny", "tiny_t"):
        message = message.replace(f', "{name}"', "").replace(f' or "{name}"', "")
    return message if " or " in message else re.sub(r', ("[^"]*")$', r" or \1", message)


def told(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Lines for a person: where, what was got, what is possible."""
    lines = []
    for detail in error.errors(include_url=False)[:MOST_LINES]:
        at, owner, field = _at(model, detail["loc"])
        got = repr(detail["input"])
        got = got if len(got) <= 80 else f"{got[:77]}..."
        known = list(owner.model_fields) if owner else []
        example = f"; for example {json.dumps(field.examples[0])}" if field is not None and field.examples else ""
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(at.rpartition("::")[2][:64], known, n=1)
            lines.append(
                f"{at}: no such key" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")
            )
        elif detail["type"] == "missing":
            lines.append(f"{at}: missing{example}")
        elif detail["type"] == "value_error":
            lines += [
                line if "::" in line or not at else f"{at}: {line}" for line in str(detail["ctx"]["error"]).splitlines()
            ]
        elif detail["type"] == "string_pattern_mismatch":
            lines.append(f"{at}: got {got}; that is no name or text of this kind{example}")
        else:
            message = for_users(detail["msg"].replace("Input should be", "expected").replace("'", '"'))
            lines.append(f"{at}: got {got}; {message}{example}")
    if error.error_count() > MOST_LINES:
        lines.insert(0, f"{TOO_MUCH}: {error.error_count():,} problems, of which the first are told")
    return list(dict.fromkeys(lines))


def _at(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None, Any]:
    """Id of pydantic's location without the names of alternatives, the model it is a key of, and the field."""
    parts: list[str] = []
    owners: list[type[BaseModel]] = [model]
    owner: type[BaseModel] | None = model
    field = None
    for part in loc:
        named = [kind for kind in owners if isinstance(part, str) and _tag(kind) == part]
        if named and len(owners) > 1:
            owners = named
            continue
        if isinstance(part, int):
            parts.append(str(part))
            continue
        owner = next((kind for kind in owners if part in kind.model_fields), owners[0] if owners else None)
        field = owner.model_fields.get(part) if owner else None
        if field is None and owner is None:
            continue  # the name of an alternative that is no key: "str", "list[...]"
        parts.append(part)
        owners = list(_models(field.annotation)) if field is not None else []
    return "::".join(parts), owner, field


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("name")
    values = get_args(field.annotation) if field is not None else ()
    return values[0] if len(values) == 1 else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
        for argument in get_args(annotation):
            yield from _models(argument)

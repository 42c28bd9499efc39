"""JSON of a bundle as MONAI 1.6.1 understands it: every way by which a value becomes running code.

Any JSON may be named on a command line, so all are looked through, whatever their names. What is judged: ``_target_``
and arguments that are looked up as code, ``$`` expressions and imports, references, macros, paths, keys. Keys may be
ids ("train::optimizer::_target_"), since a later config overrides an earlier one with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from samseg_monai.lint import expressions
from samseg_monai.lint.components import problem_of_target
from samseg_monai.lint.files import BundleFiles, Unreadable
from samseg_monai.lint.finding import Finding
from samseg_monai.lint.names import ARGUMENTS, FILENAME, FILENAMES, RESULTS
from samseg_monai.lint.paths import Texts, leaving

SCHEMAS = "https://github.com/Project-MONAI/"  # where metadata.json may say its schema is
BANK = {"format", "key", "rows", "row_shape"}  # what describes embeddings on disk; no call gives any of it to a config
_RELATIVE = re.compile(r"[@%]::")


class Pairs(list[tuple[str, Any]]):
    """A JSON object with every key as often as it stands there: MONAI warns of the second one and uses it."""


class Configs:
    """All JSON files of a bundle. What one file imports or names, all of them may use.

    Args:
        files: of the bundle; those that are no JSON become findings.
    """

    def __init__(self, files: BundleFiles) -> None:
        self.findings: list[Finding] = []
        self.modules: dict[str, str] = {}
        self.values: dict[str, set[str | None]] = {}
        self.merged: set[str] = set()
        contents = {name: self._read(files, name) for name in files.sizes if name.lower().endswith("json")}
        targets = [text for name, found in self.values.items() if name.endswith("_target_") for text in found]
        self.torchvision = any(str(target).startswith("torchvision.") for target in targets)
        banks = {name for name, content in contents.items() if {key for key, _ in _children(content)} == BANK}
        self.banks = {name for name in banks if name.startswith(RESULTS)}
        self.texts = Texts(self.values, self.merged)
        for name, content in contents.items():
            try:
                self._look(name, content, ())
            except RecursionError:
                self._add(name, (), "config", "nested too deep", "cannot be read, so it cannot be judged")

    def _add(self, file: str, parts: tuple[str, ...], rule: str, what: object, why: str) -> None:
        self.findings.append(Finding(file, "::".join(parts), rule, str(what), why))

    def _read(self, files: BundleFiles, name: str) -> Any:
        try:
            content = json.loads(files.text(name), object_pairs_hook=Pairs)
            self._collect(name, content, ())
        except (Unreadable, ValueError, RecursionError) as error:
            self._add(name, (), "config", str(error) or "nested too deep", "cannot be read, so it cannot be judged")
            return None
        return content

    def _collect(self, file: str, value: Any, parts: tuple[str, ...]) -> None:
        """Take down imports and texts by id, of all files, before anything is judged."""
        children = _children(value)
        if isinstance(value, list) and len(children) < len(value):
            self.values["::".join((*parts, ""))] = {None}
        for key, child in children:
            inner = parts + _ids(key)
            if key.startswith("+"):
                self.merged.add("::".join(inner))
            if isinstance(child, (str, list)):
                self._collect(file, child, inner)
            if not isinstance(child, str):
                self.values["::".join((*inner[:-1], ""))] = {None}
        if not isinstance(value, str):
            return
        self.values.setdefault("::".join(parts), set()).add(value)
        if not expressions.is_import(value):
            return
        try:
            name, module = expressions.imported(value)
        except ValueError as error:
            self._add(file, parts, "import", value, str(error))
            return
        if parts[:1] != ("imports",) or len(parts) != 2:
            self._add(file, parts, "import", value, "stands elsewhere than in the list 'imports'")
        if self.modules.setdefault(name, module) != module:
            self._add(file, parts, "import", value, f"gives {name} a second meaning beside {self.modules[name]}")

    def _look(self, file: str, value: Any, parts: tuple[str, ...]) -> None:
        seen: set[str] = set()
        for key, child in _children(value):
            inner = parts + _ids(key)
            if isinstance(value, Pairs):
                self._look_at_pair(file, inner, child)
                if how := leaving(key):
                    self._add(file, inner, "path", key, how)
                if key in seen:
                    self._add(file, inner, "key", key, "given twice: the first value is never used")
                seen.add(key)
            if isinstance(child, (str, list)):
                self._look(file, child, inner)
        if isinstance(value, str) and not expressions.is_import(value):
            for rule, what, why in self._of_string(value, parts):
                if rule != "path" or not self._may_lead_out(file, parts, what):
                    self._add(file, parts, rule, what, why)

    def _look_at_pair(self, file: str, parts: tuple[str, ...], value: Any) -> None:
        key = parts[-1]
        if key == "_target_":
            if why := problem_of_target(value):
                self._add(file, parts, "target", value, why)
        elif key in ARGUMENTS:
            allowed, why = ARGUMENTS[key]
            for entry in value if type(value) is list else [value]:
                if not any(_same(entry, known) for known in allowed):
                    self._add(file, parts, "argument", entry, f"allowed is {_listed(allowed)}: {why}")
        elif key == "weights" and value is not None and (self.torchvision or isinstance(value, str)):
            why = "a network of torchvision downloads for anything but null; in bundles without one, lists are allowed"
            self._add(file, parts, "argument", value, why)
        elif key in FILENAMES and value is not None and not (isinstance(value, str) and FILENAME.fullmatch(value)):
            self._add(file, parts, "argument", value, "not the plain name of a .csv, .json, .pt or .pth file")
        elif "__" in key:
            self._add(file, parts, "key", key, "double underscores")

    def _may_lead_out(self, file: str, parts: tuple[str, ...], path: str) -> bool:
        """Tell what may name a place outside: embeddings, the data they are of; metadata, MONAI's schema of it."""
        return file in self.banks or (parts == ("schema",) and path.startswith(SCHEMAS))

    def _of_string(self, text: str, parts: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
        """(rule, what, why) of everything wrong with one string."""
        if text.startswith("%"):
            yield "macro", text, "is replaced by a text from elsewhere; write that text here"
        if _RELATIVE.search(text.replace("#", "::")):
            yield "reference", text, "a relative id: the keys around it become part of the text; write the whole id"
        for name in expressions.references(text):
            if {"", "imports"} & set(name.split("::")):
                yield "reference", f"@{name}", "reaches the imported modules, or the whole config"
        if text.startswith("$"):
            for problem in expressions.problems(text, self.modules):
                yield "expression", text, problem
            for what, why in self.texts.leaving(text):
                yield "path", what, why
        elif how := leaving(text):
            yield "path", text, how
        if "{" in text and "__" in text:
            yield "format", text, "a format string may reach what double underscores hide"


def _children(value: Any) -> list[tuple[str, Any]]:
    """Key, or index as a text, and value; numbers in a list are left out, since nothing can be wrong with them."""
    if isinstance(value, Pairs):
        return value
    if not isinstance(value, list):
        return []
    return [(str(i), child) for i, child in enumerate(value) if isinstance(child, (str, list))]


def _ids(key: str) -> tuple[str, ...]:
    return tuple(key.lstrip("+").replace("#", "::").split("::"))


def _same(value: Any, known: object) -> bool:
    """Compare as MONAI does with the names of readers, but never 0 with False."""
    return value is known or (isinstance(value, str) and isinstance(known, str) and value.lower() == known.lower())


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(value if isinstance(value, str) else json.dumps(value) for value in values)


def lint_configs(files: BundleFiles) -> list[Finding]:
    """Judge every JSON file of a bundle."""
    return Configs(files).findings

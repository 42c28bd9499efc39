"""Strings that lead out of the bundle: absolute paths, home folders, ``..``, other drives, URLs.

Paths of an expression are put together as far as its constants and the plain strings it refers to tell: of
``$@root + '/x'`` only what ``root`` is decides whether ``/x`` is absolute. What cannot be told counts as empty, except
the bundle's own folder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from samseg_monai.lint.expressions import REFS, parse
from samseg_monai.lint.names import BUILTINS, NUMBERS

ROOT = "<bundle>"  # stands for bundle_root()
_UNKNOWN = ""  # for text that only running would tell
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_PARENT = re.compile(r"(^|[/\\])\.\.($|[/\\])")
_DEPTH, _MOST, _LONGEST = 8, 64, 4096  # of references behind references, of alternatives, of one text


def leaving(text: str) -> str | None:
    """Say how ``text`` leads out of the bundle; None if it does not."""
    text = text.strip()
    if _URL.match(text):
        return "a URL: a bundle brings what it needs, or names it in large_files.yml"
    if _ABSOLUTE.match(text):
        return "an absolute path leaves the bundle"
    if _PARENT.search(text):
        return "'..' leaves the bundle"
    return None


class Texts:
    """The texts that expressions of a bundle may give.

    Args:
        strings: what each id of the configs may be, where it is a string.
    """

    def __init__(self, strings: Mapping[str, set[str]]) -> None:
        self.strings = strings
        self._known: dict[tuple[str, int], set[str]] = {}

    def leaving(self, expression: str) -> Iterator[tuple[str, str]]:
        """Texts that an expression may give, or hand to a call, and that lead out of the bundle: (text, how)."""
        try:
            statements = parse(expression)
        except ValueError:
            return  # reported as no allowed expression
        try:
            for node in (node for statement in statements for node in ast.walk(statement)):
                if any(self._inside(part) - {_UNKNOWN} for part in _opaque(node)):
                    yield ast.unparse(node), "a text put together in a way that is not followed"
            for whole in (whole for statement in statements for whole in _wholes(statement, top=True)):
                for text in sorted(self._of(whole, _DEPTH)):
                    if how := leaving(text):
                        yield text, how
        except (OverflowError, RecursionError):
            yield expression, "too many texts, or too long ones, to be followed"

    def _of(self, node: ast.AST, depth: int) -> set[str]:
        """Texts that ``node`` may be. Raises OverflowError if they are too many or too long."""
        found = {_UNKNOWN}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = {node.value}
        elif isinstance(node, ast.BinOp) and _is_sum(node):
            left, right = (self._of(side, depth) for side in (node.left, node.right))
            found = {first + second for first in left for second in right}
        elif isinstance(node, ast.IfExp):
            found = self._of(node.body, depth) | self._of(node.orelse, depth)
        elif isinstance(node, ast.BoolOp):
            found = set().union(*(self._of(value, depth) for value in node.values))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "bundle_root":
            found = {ROOT}
        elif (name := _reference(node)) is not None:
            found = self._referred(name, depth)
        elif isinstance(node, ast.Subscript):
            found = self._members(node.value, depth)
        if len(found) > _MOST or max(map(len, found)) > _LONGEST:
            raise OverflowError
        return found

    def _members(self, node: ast.AST, depth: int) -> set[str]:
        """Texts that the items of ``node`` may be: a list, tuple or dictionary that is written out or referred to."""
        found = {_UNKNOWN}
        if isinstance(node, (ast.List, ast.Tuple)):
            found = found.union(*(self._of(item, depth) for item in node.elts))
        elif isinstance(node, ast.Dict):
            found = found.union(*(self._of(item, depth) for item in node.values))
        elif name := _reference(node):
            items = [key for key in self.strings if key.rpartition("::")[0] == name]
            found = found.union(*(self._referred(key, depth) for key in items))
        return found

    def _inside(self, node: ast.AST) -> set[str]:
        return self._of(node, _DEPTH) | self._members(node, _DEPTH)

    def _referred(self, name: str, depth: int) -> set[str]:
        """Texts that the id ``name`` may be."""
        if (name, depth) not in self._known:
            texts = self.strings.get(name, {_UNKNOWN}) if depth else {_UNKNOWN}
            self._known[name, depth] = set().union(*(self._meant(text, depth - 1) for text in texts))
        return self._known[name, depth]

    def _meant(self, text: str, depth: int) -> set[str]:
        if text.startswith("@"):
            return self._referred(text[1:].replace("#", "::"), depth)
        if not text.startswith("$"):
            return {text}
        try:
            [statement] = parse(text)
        except ValueError:
            return {_UNKNOWN}
        return self._of(statement.value, depth) if isinstance(statement, ast.Expr) else {_UNKNOWN}


def _wholes(node: ast.AST, *, top: bool) -> Iterator[ast.AST]:
    """The largest parts whose text is followed, and those within what is not."""
    if _reference(node) is not None:
        return
    followed = isinstance(node, (ast.Constant, ast.IfExp, ast.BoolOp)) or _is_sum(node)
    if followed and top:
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _wholes(child, top=not followed or (isinstance(node, ast.IfExp) and child is node.test))


def _opaque(node: ast.AST) -> list[ast.expr]:
    """Operands that must hold no texts: what becomes of them is not followed."""
    if isinstance(node, ast.BinOp) and not _is_sum(node):
        return [node.left, node.right]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS - NUMBERS:
        return node.args
    return [node.iter] if isinstance(node, ast.comprehension) else []


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _reference(node: ast.AST) -> str | None:
    """Id that ``node`` stands for, as MONAI has put it there; None for anything else."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == REFS:
        return node.slice.value if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str) else None
    return None

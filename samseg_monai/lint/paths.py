"""Strings that lead out of the bundle: absolute paths, home folders, ``..``, other drives, URLs.

Paths of an expression are put together as far as its constants and the strings it refers to tell: of ``$@root + '/x'``
only what ``root`` is decides whether ``/x`` is absolute. A text that only running would tell must stand alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping

from samseg_monai.lint.expressions import REFS, parse, references, shown
from samseg_monai.lint.names import BUILTINS, NUMBERS, PASSING, TEXTLESS

Text = str | None  # None: no text at all, whose sum with a text is an error

ROOT = "<bundle>"  # stands for bundle_root()
_ANY = "\0"  # stands for what only running would tell
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_PARENT = re.compile(r"(^|[/\\])\.\.($|[/\\])")
_DEPTH, _MOST, _LONGEST = 8, 64, 4096  # of references behind references, of alternatives, of one text
_UNFOLLOWED = "a text put together in a way that is not followed"


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
        values: texts that each id of the configs may be; ``parent::`` stands for those that are no text: {None}.
        merged: ids of lists and dictionaries that a key with ``+`` adds to, which shifts the ids of what it adds.
    """

    def __init__(self, values: Mapping[str, set[Text]], merged: Collection[str]) -> None:
        self.values = values
        self.merged = merged
        self.items: dict[str, list[str]] = {}
        for name in values:
            self.items.setdefault(name.rpartition("::")[0], []).append(name)
        self._known: dict[tuple[str, int], set[Text]] = {}

    def leaving(self, expression: str) -> Iterator[tuple[str, str]]:
        """Texts that an expression may give, or hand to a call, and that lead out of the bundle: (text, how)."""
        try:
            statements = parse(expression)
        except ValueError:
            return  # reported as no allowed expression
        try:
            for node in (node for statement in statements for node in ast.walk(statement)):
                if any(_texts(self._inside(part)) for part in _opaque(node)) or self._is_cut(node):
                    yield shown(node), _UNFOLLOWED
            for whole in (whole for statement in statements for whole in _wholes(statement, top=True)):
                for text in sorted(text for text in self._of(whole, _DEPTH) if text):
                    if len(text) > 1 and _ANY in text:
                        yield shown(whole), _UNFOLLOWED
                    elif how := leaving(text):
                        yield text, how
        except (OverflowError, RecursionError):
            yield expression, "too many texts, or too long ones, to be followed"

    def _of(self, node: ast.AST, depth: int) -> set[Text]:
        """Texts that ``node`` may be. Raises OverflowError if they are too many or too long."""
        found: set[Text] = {None}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = {node.value}
        elif isinstance(node, ast.BinOp):
            found = self._of_operation(node, depth)
        elif isinstance(node, ast.IfExp):
            found = self._of(node.body, depth) | self._of(node.orelse, depth)
        elif isinstance(node, ast.BoolOp):
            found = set().union(*(self._of(value, depth) for value in node.values))
        elif isinstance(node, ast.Call):
            found = self._of_call(node, depth)
        elif (name := _reference(node)) is not None:
            found = self._referred(name, depth)
        elif isinstance(node, ast.Subscript):
            whole = self._of(node.value, depth)
            cut = isinstance(node.slice, ast.Slice) and whole == {None}
            found = {None} if cut else {_ANY} if _ANY in whole else self._members(node.value, depth)
        elif isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and node.attr == "type"):
            found = {_ANY}
        if len(found) > _MOST or max(len(text or "") for text in found) > _LONGEST:
            raise OverflowError
        return found

    def _of_operation(self, node: ast.BinOp, depth: int) -> set[Text]:
        left, right = (self._of(side, depth) for side in (node.left, node.right))
        if isinstance(node.op, ast.Add):
            return {None if None in (a, b) else f"{a}{b}" for a in left for b in right}
        return {_ANY} if left | right != {None} and _is_stretched(node) else {None}

    def _of_call(self, node: ast.Call, depth: int) -> set[Text]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "bundle_root":
            return {ROOT}
        if name in PASSING and not node.keywords:  # gives one of its arguments, or an item of its only one
            given = [self._of(part, depth) for part in node.args] if len(node.args) > 1 else []
            return set().union(*given) if given else set().union(*(self._members(a, depth) for a in node.args), {None})
        return {None} if name in TEXTLESS else {_ANY}

    def _members(self, node: ast.AST, depth: int) -> set[Text]:
        """Texts that the items of ``node`` may be: a list, tuple or dictionary that is written out or referred to."""
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return {None}.union(*(self._of(item, depth) for item in node.elts))
        if isinstance(node, ast.Dict):
            return {None}.union(*(self._of(item, depth) for item in node.values))
        name = _reference(node)
        items = self.items.get(name, ()) if name else ()
        return set().union(*(self._referred(key, depth) for key in items)) if items else {_ANY}

    def _inside(self, node: ast.AST) -> set[Text]:
        """Texts in an operand: itself, its items, its keys."""
        keys = [key for key in node.keys if key is not None] if isinstance(node, ast.Dict) else []
        found = self._of(node, _DEPTH).union(*(self._of(key, _DEPTH) for key in keys))
        return found if isinstance(node, ast.Constant) else found | self._members(node, _DEPTH)

    def _is_cut(self, node: ast.AST) -> bool:
        """Tell whether ``node`` takes a part of a text, or stretches one that only running would tell."""
        if isinstance(node, ast.BinOp) and _is_stretched(node):
            return any(_ANY in self._of(side, _DEPTH) and not _is_bound(side) for side in (node.left, node.right))
        if not isinstance(node, ast.Subscript) or _reference(node) is not None:
            return False
        whole = self._of(node.value, _DEPTH)
        listed = isinstance(node.value, ast.Call) or _is_bound(node)  # what calls give to be cut are lists
        return _texts(whole) or (isinstance(node.slice, ast.Slice) and not listed and _ANY in whole)

    def _referred(self, name: str, depth: int) -> set[Text]:
        """Texts that the id ``name`` may be."""
        if (name, depth) not in self._known:
            parts = name.split("::")
            texts = self.values.get(name) or self.values.get("::".join((*parts[:-1], ""))) or {_ANY}
            texts = texts if depth else {_ANY}
            if any("::".join(parts[:n]) in self.merged for n in range(1, len(parts))):
                texts = texts | {_ANY}
            self._known[name, depth] = set().union(*(self._meant(text, depth - 1) for text in texts))
        return self._known[name, depth]

    def _meant(self, text: Text, depth: int) -> set[Text]:
        if not text or not text.startswith("$"):
            names = references(text) if text else []
            return self._referred(names[0], depth) if names else {text}
        try:
            [statement] = parse(text)
        except ValueError:
            return {_ANY}
        return self._of(statement.value, depth) if isinstance(statement, ast.Expr) else {_ANY}


def _texts(found: set[Text]) -> bool:
    return bool(found - {None, "", _ANY})


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


def _is_stretched(node: ast.BinOp) -> bool:
    return isinstance(node.op, (ast.Mult, ast.Mod))


def _is_bound(node: ast.AST) -> bool:
    """Tell whether ``node`` is, or belongs to, what a lambda or a comprehension gets."""
    while isinstance(node, (ast.Attribute, ast.Subscript)) and _reference(node) is None:
        node = node.value
    return isinstance(node, ast.Name)


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _reference(node: ast.AST) -> str | None:
    """Id that ``node`` stands for, as MONAI has put it there; None for anything else."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == REFS:
        return node.slice.value if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str) else None
    return None

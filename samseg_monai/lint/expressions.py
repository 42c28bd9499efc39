"""``$`` expressions, parsed exactly as MONAI does before it evaluates them, and compared with the allowed forms.

Allowed are constants, references, names bound in the expression, comparisons, arithmetic, conditions, subscripts,
lists, tuples, sets, dictionaries, comprehensions and lambdas of these; calls of ``CALLS`` and ``BUILTINS``;
``METHODS`` and ``ATTRIBUTES`` of whatever such an expression gives. Modules themselves are no values: whoever has one
has all that it imports. MONAI 1.6.1 (``reference_resolver.py``, ``config_item.py``) turns ``#`` into ``::``, takes the
first statement as an import if it is one, and puts ``__local_refs['id']`` in place of ``@id``, also within string
literals; therefore the text is checked after the same replacements.
"""

from __future__ import annotations

import ast
import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping

from samseg_monai.lint.names import ATTRIBUTES, BUILTINS, CALLS, GLOBALS, IMPORTS, METHODS, VALUES

REFS = "__local_refs"
LONGEST, DEEPEST = 2000, 100
_ID = re.compile(r"@(?:\w*)(?:::\w*)*")
_PLAIN = (ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop, ast.IfExp, ast.List, ast.Tuple,
          ast.Set, ast.Slice, ast.expr_context)  # fmt: skip
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)


def references(text: str) -> list[str]:
    """Ids that MONAI resolves in a string: those in an expression, or the one that is the whole string."""
    text = text.replace("#", "::")
    found = _ID.findall(text)
    return [item[1:] for item in found if text.startswith("$") or text == item]


def evaluated(text: str) -> str:
    """The Python source that MONAI evaluates for ``text``, which starts with ``$``."""
    text = text.replace("#", "::")
    for item in sorted(_ID.findall(text), key=len, reverse=True):
        text = text.replace(item, f"{REFS}['{item[1:]}']")
    return text[1:]


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> list[ast.stmt]:
    """Statements of a ``$`` string as MONAI sees them. Raises ValueError if it is no Python."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters; at most {LONGEST} are looked through")
    try:
        tree = ast.parse(evaluated(text))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no Python expression ({error})") from error
    level: list[ast.AST] = [tree]
    for _ in range(DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return tree.body


def shown(node: ast.AST) -> str:
    """Source of ``node`` as a person would write it: with ``@id``."""
    return re.sub(rf"{REFS}\['([\w:]*)'\]", r"@\1", ast.unparse(node))


def is_import(text: str) -> bool:
    """Tell whether MONAI imports something for this string."""
    try:
        return text.startswith("$") and isinstance(parse(text)[0], (ast.Import, ast.ImportFrom))
    except (ValueError, IndexError):
        return False


def imported(text: str) -> tuple[str, str]:
    """Name and module that an import statement binds. Raises ValueError if it is not ``import module as name``."""
    statements = parse(text)
    node = statements[0]
    if len(statements) > 1 or not isinstance(node, ast.Import) or len(node.names) > 1 or "@" in text or "#" in text:
        raise ValueError("only 'import module as name' is allowed")
    [alias] = node.names
    name = alias.asname or alias.name
    if alias.name not in IMPORTS:
        raise ValueError(f"{alias.name} is not among the modules that expressions may use")
    if "__" in name or name in BUILTINS or GLOBALS.get(name, alias.name) != alias.name:
        raise ValueError(f"gives {name} another meaning")
    return name, alias.name


def problems(text: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Say what of a ``$`` string, which is no import, is beyond the allowed forms.

    Args:
        text: the whole string, ``$`` included.
        modules: module of every name that the bundle imports.
    """
    if REFS in unicodedata.normalize("NFKC", text):  # as Python does with every name
        yield f"reaches {REFS}"
        return
    try:
        statements = parse(text)
    except ValueError as error:
        yield str(error)
        return
    if len(statements) != 1 or not isinstance(statements[0], ast.Expr):
        yield "no single expression"
        return
    yield from _Checker({**GLOBALS, **modules}).check(statements[0].value, frozenset())


class _Checker:
    """Walks an expression; ``bound`` are the names that lambdas and comprehensions around a node bind."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self.modules = modules

    def check(self, node: ast.AST, bound: frozenset[str]) -> Iterator[str]:
        """What is beyond the allowed forms, from the outside to the inside."""
        specific = getattr(self, f"_{type(node).__name__.lower()}", None)
        if isinstance(node, _PLAIN):
            yield from self._all(ast.iter_child_nodes(node), bound)
        elif specific is None:
            yield f"{type(node).__name__} is not among the allowed forms"
        else:
            yield from specific(node, bound)

    def _all(self, nodes: Iterator[ast.AST] | list[ast.expr], bound: frozenset[str]) -> Iterator[str]:
        for node in nodes:
            yield from self.check(node, bound)

    def _constant(self, node: ast.Constant, bound: frozenset[str]) -> Iterator[str]:
        if not isinstance(node.value, (str, int, float, type(None))):
            yield f"a constant of type {type(node.value).__name__}"
        elif isinstance(node.value, str) and "__" in node.value:
            yield f"double underscores in {node.value!r}"

    def _binop(self, node: ast.BinOp, bound: frozenset[str]) -> Iterator[str]:
        if not isinstance(node.op, _ARITHMETIC):
            yield f"{type(node.op).__name__} is not among the allowed operators"
        yield from self._all([node.left, node.right], bound)

    def _dict(self, node: ast.Dict, bound: frozenset[str]) -> Iterator[str]:
        if None in node.keys:
            yield "** in a dictionary"
        yield from self._all([key for key in node.keys if key is not None] + node.values, bound)

    def _subscript(self, node: ast.Subscript, bound: frozenset[str]) -> Iterator[str]:
        if isinstance(node.value, ast.Name) and node.value.id == REFS and isinstance(node.slice, ast.Constant):
            return  # a reference: MONAI has put it there, with an id of word characters
        if isinstance(node.value, ast.Constant):
            yield "a part of a constant"
        yield from self._all([node.value, node.slice], bound)

    def _name(self, node: ast.Name, bound: frozenset[str]) -> Iterator[str]:
        if node.id not in bound and node.id not in VALUES:
            yield from _unknown(node.id, self.modules)

    def _attribute(self, node: ast.Attribute, bound: frozenset[str]) -> Iterator[str]:
        dotted = self._dotted(node, bound)
        if dotted is None:
            if node.attr not in ATTRIBUTES:
                yield f"attribute {node.attr}"
            yield from self.check(node.value, bound)
        elif dotted not in VALUES:
            yield f"{dotted} is not among the allowed values"

    def _call(self, node: ast.Call, bound: frozenset[str]) -> Iterator[str]:
        dotted = self._dotted(node.func, bound)
        if dotted is not None:
            if dotted not in CALLS and dotted not in BUILTINS:
                yield f"calls {dotted}"
        elif isinstance(node.func, ast.Attribute):
            if node.func.attr not in METHODS:
                yield f"calls the method {node.func.attr}"
            yield from self.check(node.func.value, bound)
        else:
            yield f"calls what {shown(node.func)} gives"
            yield from self.check(node.func, bound)
        if any(keyword.arg is None or "__" in keyword.arg for keyword in node.keywords):
            yield "** or double underscores in the arguments of a call"
        yield from self._all(node.args + [keyword.value for keyword in node.keywords], bound)

    def _lambda(self, node: ast.Lambda, bound: frozenset[str]) -> Iterator[str]:
        arguments = node.args
        if arguments.vararg or arguments.kwarg:
            yield "a lambda with * or **"
        defaults = arguments.defaults + [default for default in arguments.kw_defaults if default is not None]
        yield from self._all(defaults, bound)
        names = [a.arg for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
        yield from self._binding(names)
        yield from self.check(node.body, bound | set(names))

    def _listcomp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, bound: frozenset[str]) -> Iterator[str]:
        for generator in node.generators:
            yield from self.check(generator.iter, bound)
            target = generator.target
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names = [part.id for part in parts if isinstance(part, ast.Name)]
            if len(names) < len(parts) or generator.is_async:
                yield "a comprehension that assigns to more than names"
            yield from self._binding(names)
            bound = bound | set(names)
            yield from self._all(generator.ifs, bound)
        yield from self.check(node.elt, bound)

    _generatorexp = _listcomp
    _setcomp = _listcomp

    def _binding(self, names: list[str]) -> Iterator[str]:
        """A name of its own for each value: one that is taken would pass for what it usually means."""
        for name in names:
            if name in self.modules or name in BUILTINS or "__" in name:
                yield f"gives {name} another meaning"

    def _dotted(self, node: ast.expr, bound: frozenset[str]) -> str | None:
        """Full dotted name of what a chain of names means; None where it begins with a value."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in bound:
            return None
        return ".".join([self.modules.get(node.id, node.id), *reversed(parts)])


def _unknown(name: str, modules: Mapping[str, str]) -> Iterator[str]:
    if name in modules:
        yield f"the module {modules[name]} as a value: all that it imports could be reached"
    else:
        yield f"{name} is not among the allowed values"

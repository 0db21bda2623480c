"""No two files of the project import each other in a circle, inside functions either."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping

from sources import modules

# `revox.load` is found in revox.api when it is asked for, so that `import revox` loads nothing.
EXEMPT = {("revox", "revox.api")}


def imports(name: str, tree: ast.Module, known: Iterable[str], is_package: bool = False) -> set[str]:
    """The modules of `known` that a module imports, in functions too; for type checkers only: not counted."""
    known = set(known)
    found = set()
    for node in _at_run_time(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                base = ".".join([*parts[: len(parts) - node.level + is_package], *base.split(".")]).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return (found & known) - {name}


def _at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from _at_run_time(node)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which can be reached from every other of its group (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            place = stack.index(name)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_no_files_import_each_other_in_a_circle():
    trees = modules()
    packages = {name.rpartition(".")[0] for name in trees} | {"revox", "lab"}
    graph = {
        name: {other for other in imports(name, tree, trees, name in packages) if (name, other) not in EXEMPT}
        for name, tree in trees.items()
    }
    assert circles(graph) == []


def test_an_import_inside_a_function_closes_a_circle_and_one_for_types_does_not():
    sources = {
        "a": "import b",
        "b": "def f():\n    from c import thing",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a",
    }
    graph = {name: imports(name, ast.parse(text), sources) for name, text in sources.items()}
    assert circles(graph) == []
    graph["c"] = imports("c", ast.parse("def f():\n    import a"), sources)
    assert circles(graph) == [["a", "b", "c"]]


def test_a_relative_import_is_resolved():
    known = {"pack", "pack.inner", "pack.inner.x", "pack.y"}
    assert imports("pack.inner.x", ast.parse("from ..y import z"), known) == {"pack.y"}
    assert imports("pack.inner.x", ast.parse("from . import w"), known) == {"pack.inner"}
    assert imports("pack.inner", ast.parse("from . import x"), known, True) == {"pack.inner.x"}

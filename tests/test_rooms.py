"""Packages of the source import only from packages below them, and modules, classes and functions are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dsmq

ROOT = Path(dsmq.__file__).parent
# What each room may import from, besides itself. A module outside all rooms is a room of its own.
BASE = {"environment", "errors", "logs", "system", "terminal", "threads", "tokens"}
MAY_IMPORT = {
    "wire": {"errors"},
    "settings": {"environment", "errors", "setting_types", "terminal", "tokens", "wire"},
    "setting_types": {"environment", "terminal", "tokens", "wire"},
    "store": BASE,
    "broker": {"store", "wire", "settings", *BASE},
    "ops": {"broker", "store", "wire", "settings", *BASE},
    "client": {"wire", "errors", "system"},
    "aio": {"client", "wire", "errors", "system"},
    "logs": {"errors", "system", "terminal"},
    "errors": set(),
}
MOST_LEVELS, MOST_CLIENT_LEVELS = 9, 8
MAX_MODULE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 450, 300, 40


NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for path, name in NAMES.items() if name != "__init__"}


def imported(path: Path) -> Iterator[str]:
    """Yield what a file imports from dsmq, also within functions, but not only for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("dsmq."):
            prefix = str(node.module)[5:]
            for alias in node.names:
                name = f"{prefix}.{alias.name}".strip(".")
                yield name if name in MODULES else prefix


@cache
def imports() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    return {name: {other for other in imported(path) if other} - {name} for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("here", MAY_IMPORT)
def test_room_imports_only_from_rooms_below(here: str) -> None:
    allowed = MAY_IMPORT[here] | {here}
    for module in (name for name in MODULES if room(name) == here):
        assert {room(other) for other in imports()[module]} <= allowed, module


def test_imports_are_acyclic_and_at_most_the_levels_allowed() -> None:
    @cache
    def level(module: str) -> int:
        return 1 + max(map(level, imports()[module]), default=0)

    try:
        levels = {module: level(module) for module in MODULES}
    except RecursionError:
        pytest.fail("a circle of imports")
    assert max(levels.values()) <= MOST_LEVELS, levels
    assert levels["aio"] <= MOST_CLIENT_LEVELS, levels


def test_modules_classes_and_functions_are_short() -> None:
    found = []
    for name, path in MODULES.items():
        text = path.read_text()
        found += [(name, lines)] if (lines := text.count("\n")) > MAX_MODULE_LINES else []
        for node in ast.walk(ast.parse(text)):
            limit = {ast.ClassDef: MAX_CLASS_LINES}.get(type(node), MAX_FUNCTION_LINES)  # type: ignore[call-overload]
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                # A signature that lists its options for help() may be long.
                start = node.lineno if isinstance(node, ast.ClassDef) else node.body[0].lineno
                lines = (node.end_lineno or 0) - start + 1
                found += [(f"{name}.{node.name}", lines)] if lines > limit else []
    assert not found

"""The table of rooms in docs/architecture.md: every file is in it, and imports from above only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flax_tied_lora"
# They meet in the `Context` that rules are called with.
ONE_ROOM = {"_rules/", "_losses/", "_evaluate.py"}


def rooms() -> dict[str, int]:
    """Returns the files and folders of the table, and the row that each is in."""
    lines = (ROOT / "docs/architecture.md").read_text().splitlines()
    rows = [re.findall("`([^`]+)`", x.split("|")[1]) for x in lines if x.startswith("| `")]
    names = [name for row in rows for name in row]
    assert len(set(names)) == len(names)
    return {name: i for i, row in enumerate(rows) for name in row}


def room(*path: str) -> str:
    """Returns the room of a file or module, by its path within the package."""
    return f"{path[0]}/" if (PACKAGE / path[0]).is_dir() else f"{path[0].removesuffix('.py')}.py"


def imported(file: Path) -> set[str]:
    """Returns the rooms that a file imports from, types included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax_tied_lora"):
            _, *path = (node.module or "").split(".")
            paths = [path] if path else [[alias.name] for alias in node.names]
            found |= {room(*p) for p in paths}
    return found


def test_every_file_is_in_the_table():
    files = {room(*f.relative_to(PACKAGE).parts) for f in PACKAGE.rglob("*.py")} - {"__init__.py"}
    assert files == set(rooms())


def test_a_module_imports_from_those_above_it():
    order = rooms()
    wrong = [
        (str(file.relative_to(PACKAGE)), other)
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != PACKAGE / "__init__.py"
        for own in [room(*file.relative_to(PACKAGE).parts)]
        for other in imported(file)
        if order[other] > order[own] and not {own, other} <= ONE_ROOM
    ]
    assert not wrong

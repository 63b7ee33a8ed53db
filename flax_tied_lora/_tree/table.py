"""Tables for people: aligned columns, the same module of all layers in one row."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# The number of a layer in a path: `layers/3/attn`, `h_3.mlp`.
_LAYER = re.compile(r"(?<=[/_.])\d+(?=[/.]|$)")


def table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Returns left-aligned columns, a line a row."""
    cells = [tuple(cell(c) for c in row) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Returns a value as it is shown: numbers in groups of three digits."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value) if value != "" else "-"


def folded(rows: Iterable[tuple[Any, ...]], sums: Iterable[int]) -> list[tuple[Any, ...]]:
    """Returns rows that differ only in the layer as one, its first cell telling how many they are.

    Args:
      rows: of equal length; the first cell is a path.
      sums: the columns to add up; rows may differ there too.
    """
    added = set(sums)
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for row in rows:
        key = tuple(_unnumbered(c) for i, c in enumerate(row) if i not in added)
        groups.setdefault(key, []).append(row)
    return [like[0] if len(like) == 1 else _one(like, added) for like in groups.values()]


def _one(rows: list[tuple[Any, ...]], added: set[int]) -> tuple[Any, ...]:
    first, *others = (
        sum(row[i] for row in rows) if i in added else _unnumbered(rows[0][i])
        for i in range(len(rows[0]))
    )
    return f"{first} ({len(rows)})", *others


def _unnumbered(cell: Any) -> Any:
    return _LAYER.sub("*", cell) if isinstance(cell, str) else cell

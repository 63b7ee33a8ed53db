"""Sizes of axes that are no numbers: those that a program of `jax.export` leaves open."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jax import export

# What the choice of a form takes an open size for. Its value makes no difference to a result.
SUPPOSED = 1024


def is_open(size: Any) -> bool:
    """Returns whether a size is no number: it can neither be split nor compared with any other."""
    return export.is_symbolic_dim(size)


def supposed(*sizes: Any) -> int:
    """Returns the product of sizes as a number, for estimates of what a form costs."""
    return math.prod(SUPPOSED if is_open(n) else n for n in sizes)


def numbers(sizes: Iterable[Any]) -> list[int]:
    """Returns those of some sizes that are numbers."""
    return [n for n in sizes if not is_open(n)]

"""Leaves with the values of another that they are not tied to: a loader made a copy of one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._ties.sources import equal, is_table
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import is_tracer
from flax_tied_lora._tree.processes import spread


def tables(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves whose names say that they are tables."""
    return {path: leaf for path, leaf in leaves.items() if is_table(path)}


def twin_of(
    leaves: Mapping[str, Any], key: str, tied: Collection[str], among: Mapping[str, Any]
) -> str | None:
    """Returns a matrix that is not tied to one and has its values, as they are or transposed.

    One of the two has to be a table: of other matrices equal values are chance, or a start. What
    other processes hold parts of is not compared.

    Args:
      key: path of the one.
      tied: paths of all that are tied to it, itself included.
      among: the leaves that it is compared with: all with a table, tables with any other.
    """
    mine = _values(leaves[key])
    if mine is None:
        return None
    for path, leaf in among.items():
        if path in tied:
            continue
        other = _values(leaf)
        if other is None or other.dtype != mine.dtype:
            continue
        for transposed in (False, True):
            if (other.shape[::-1] if transposed else other.shape) != mine.shape:
                continue
            mine, other = np.asarray(mine), np.asarray(other)
            # A row tells nearly all that differ, without a look at the rest.
            first = other[:, :1] if transposed else other[:1]
            if equal(mine[:1], first, transposed, constant=True) and equal(mine, other, transposed):
                return path
    return None


def _values(leaf: Any) -> Any:
    leaf = unboxed(leaf)
    if not isinstance(leaf, jax.Array | np.ndarray) or is_tracer(leaf) or spread(leaf):
        return None
    return leaf if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating) else None

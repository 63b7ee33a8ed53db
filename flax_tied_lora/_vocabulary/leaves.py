"""Which leaves have an entry for each token of the vocabulary, and along which axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._planning.tokens import input_embeddings
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.sources import EMBEDDINGS, HEADS, is_table
from flax_tied_lora._tree.paths import (
    describe,
    is_marker,
    layer_index,
    leaf_name,
    module_of,
    nearby,
)

WHAT = "grow_vocabulary"


def vocabulary_axes(
    leaves: Mapping[str, Any], groups: Sequence[TieGroup], sites: CallSites | None,
    named: Mapping[str, int | None],
) -> tuple[str, dict[str, int]]:  # fmt: skip
    """Returns the path of the input embedding, and for every leaf to grow its vocabulary axis.

    The input embedding and all that is tied to it; other tables and output projections that are
    called so; biases of the logits. A leaf that has an axis of this size and is none of these is
    an error, unless it is a kernel or a bias inside of a numbered layer, such as ``layers/0/mlp``:
    a guess either way would give a model that fails late, or not at all.

    Args:
      leaves: the params, by path; markers count as none.
      groups: all tie groups, those of one too.
      named: what the user says of leaves: the axis, or None for one to leave as it is.

    Raises:
      ValueError: a name is of no leaf or has no such axis; it is not clear which table is the input
        embedding, or whether a leaf belongs to the vocabulary.
      TypeError: an axis is no int.
    """
    _check_named(leaves, named)
    by_path = {m.path: (g, m.transposed) for g in groups for m in g.members}
    table = _table(leaves, groups, sites, named)
    axis = named.get(table) or 0
    size = leaves[table].shape[axis]
    axes = {p: a for p, a in named.items() if a is not None}
    for path, leaf in leaves.items():
        if path not in named and not is_marker(leaf):
            guess = 0 if path == table else _axis(path, tuple(leaf.shape), leaves[table], axis)
            if guess is not None:
                axes[path] = guess
    for path, of_leaf in list(axes.items()):
        group, transposed = by_path[path]
        for member in group.members:
            of_tied = of_leaf if member.transposed == transposed else 1 - of_leaf
            contradicted = axes.setdefault(member.path, of_tied) != of_tied
            if contradicted or named.get(member.path, 0) is None:
                raise ValueError(
                    f"{WHAT}: {member.path!r} is tied to {path!r}, whose vocabulary is its axis "
                    f"{of_leaf}, so that of {member.path!r} is axis {of_tied}; "
                    f"leaves={dict(named)} says otherwise. Leave one of them out"
                )
    _check_sizes(leaves, axes, table, size)
    _check_none_left(leaves, {*axes, *named}, table, size)
    return table, axes


def _check_named(leaves: Mapping[str, Any], named: Mapping[str, int | None]) -> None:
    for path, axis in named.items():
        leaf = leaves.get(path)
        if leaf is None:
            raise ValueError(
                f"{WHAT}: {path!r} in leaves is no leaf of the params; leaves with such a name: "
                f"{', '.join(map(repr, nearby(path, leaves)))}"
            )
        if is_marker(leaf):
            raise ValueError(
                f"{WHAT}: {path!r} in leaves is stored as {leaf.key!r}, which it is tied to; name "
                "that one"
            )
        if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise TypeError(
                f"{WHAT}: leaves[{path!r}] is {axis!r}; expected the number of its vocabulary "
                "axis, or None to leave it as it is"
            )
        if axis is not None and not 0 <= axis < len(leaf.shape):
            raise ValueError(
                f"{WHAT}: leaves[{path!r}] is {axis}, and the leaf is {describe(leaf)}; expected "
                f"an axis from 0 to {len(leaf.shape) - 1}"
            )


def _table(
    leaves: Mapping[str, Any], groups: Sequence[TieGroup], sites: CallSites | None,
    named: Mapping[str, int | None],
) -> str:  # fmt: skip
    """Returns the path of the input embedding: one that is named, or the only one."""
    grown = [p for p, axis in named.items() if axis is not None]
    tables = [p for p in grown if is_table(p)]
    if grown:
        return (tables or grown)[0]
    groups = [g for g in groups if not any(p in named for p in g.paths)]
    candidates = [g.key for g in input_embeddings(leaves, groups, sites)]
    if len(candidates) != 1:
        raise ValueError(
            f"{WHAT}: the input embedding could be "
            f"{', '.join(map(repr, candidates)) or 'no leaf'}; say which, and its vocabulary axis: "
            'leaves={"path/of/leaf": 0}'
        )
    return candidates[0]


def _axis(path: str, shape: tuple[int, ...], table: Any, axis: int) -> int | None:
    """Returns a leaf's vocabulary axis by its name and shape; None if it has none by these."""
    size, module = table.shape[axis], leaf_name(module_of(path))
    if is_table(path) and module in EMBEDDINGS and shape[:1] == (size,):
        return 0
    if _in_layer(path):
        return None
    if "bias" in leaf_name(path) and shape in ((size,), (1, size)):
        return len(shape) - 1
    if len(shape) != 2 or is_table(path):
        return None
    if shape[1] == size and (module in HEADS or shape[0] in table.shape):
        return 1
    return 0 if shape[0] == size and module in HEADS else None


def _in_layer(path: str) -> bool:
    """Returns whether a leaf is inside of one of several layers, where this size is chance."""
    return layer_index(module_of(module_of(path)), None) is not None


def _check_sizes(leaves: Mapping[str, Any], axes: Mapping[str, int], table: str, size: int) -> None:
    for path, axis in axes.items():
        leaf = leaves[path]
        if not is_marker(leaf) and leaf.shape[axis] != size:
            raise ValueError(
                f"{WHAT}: {path!r} {describe(leaf)} has {leaf.shape[axis]} entries along axis "
                f"{axis}; expected {size}, as {table!r} {describe(leaves[table])} has. Check leaves"
            )


def _check_none_left(leaves: Mapping[str, Any], decided: set[str], table: str, size: int) -> None:
    left = [
        p for p, x in leaves.items()
        if p not in decided and not is_marker(x) and size in getattr(x, "shape", ())
        and (is_table(p) or not _in_layer(p))
    ]  # fmt: skip
    if left:
        shown = ", ".join(f"{p!r} {describe(leaves[p])}" for p in left[:3])
        axis = tuple(leaves[left[0]].shape).index(size)
        raise ValueError(
            f"{WHAT}: {shown} ({len(left)} such leaves) have an axis of {size}, as the input "
            f"embedding {table!r} has, and their names do not say whether it is the vocabulary; "
            f"say so: leaves={{{left[0]!r}: {axis}}}, or None in place of the axis for a leaf that "
            "is to stay as it is"
        )

"""Where ties are known from: identity, declaration, model config, equal values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._names.model_config import config_field, is_forced, says_tied
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import (
    describe,
    is_marker,
    is_tracer,
    layer_index,
    leaf_name,
    module_of,
    nearby,
)
from flax_tied_lora._tree.processes import gathered, spread
from flax_tied_lora._tree.quantized_array import QuantizedArray, array_of, plain_array

SAME_ARRAY = "same array"
DECLARED = "declared"
CONFIG = "model config"
EQUAL_VALUES = "equal values"
DATA_FLOW = "data flow"
SOURCES = (SAME_ARRAY, DECLARED, CONFIG, EQUAL_VALUES, DATA_FLOW)

# Modules that model families call their input embedding and their output projection by.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "tok_embeddings", "embed")
HEADS = ("lm_head", "output", "embed_out")
_SAMPLE = 64


class Link(NamedTuple):
    """Two leaves that are one array.

    Attributes:
      first, second: their paths.
      transposed: whether one is the transpose of the other.
      source: how that is known.
    """

    first: str
    second: str
    transposed: bool
    source: str


def is_table(path: str) -> bool:
    """Returns whether a leaf's name says that rows are picked from it: Flax's ``embedding``."""
    return "embedding" in leaf_name(path)


def same_arrays(leaves: Mapping[str, Any]) -> list[Link]:
    """Returns the ties of leaves that are the same object."""
    by_identity: dict[int, list[str]] = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array | np.ndarray | QuantizedArray) and leaf.ndim:
            by_identity.setdefault(id(leaf), []).append(path)
    groups = by_identity.values()
    return [Link(first, other, False, SAME_ARRAY) for first, *others in groups for other in others]


def declared(leaves: Mapping[str, Any], entry: Any) -> list[Link]:
    """Returns the ties that the user declares with one entry.

    Raises:
      ValueError: a leaf does not exist, or the shapes do not fit.
      TypeError: the entry is no pair of paths and no `TieGroup`.
    """
    if isinstance(entry, TieGroup):
        first, *others = entry.members
        for member in entry.members:
            _existing(leaves, member.path)
        source = CONFIG if CONFIG in entry.found else (*entry.found, DECLARED)[0]
        links = [Link(first.path, m.path, m.transposed != first.transposed, source) for m in others]
        for link in links:
            _check_shapes(leaves, link.first, link.second, link.transposed)
        return links
    if not (
        isinstance(entry, Sequence)
        and len(entry) in (2, 3)
        and all(isinstance(e, str) for e in entry)
    ):
        raise TypeError(
            f"find_ties: a declared tie is {entry!r}; expected a pair of leaf paths, or a TieGroup"
        )
    first, second, *how = entry
    for path in (first, second):
        _existing(leaves, path)
    if first == second:
        raise ValueError(f"find_ties: {first!r} is declared tied to itself; name two leaves")
    if how and how[0] not in ("same", "transposed"):
        raise ValueError(
            f"find_ties: {how[0]!r} in a declared tie; expected 'same' or 'transposed'"
        )
    return [Link(first, second, _orientation(leaves, first, second, how), DECLARED)]


def _existing(leaves: Mapping[str, Any], path: str) -> None:
    if path not in leaves:
        raise ValueError(
            f"find_ties: {path!r} is declared tied but is no leaf of the params; leaves with such "
            f"a name: {', '.join(map(repr, nearby(path, leaves)))}"
        )


def _orientation(leaves: Mapping[str, Any], first: str, second: str, how: Sequence[str]) -> bool:
    a, b = tuple(leaves[first].shape), tuple(leaves[second].shape)
    if how:
        transposed = how[0] == "transposed"
        _check_shapes(leaves, first, second, transposed)
        return transposed
    fits_same, fits_transposed = a == b, len(a) == 2 and a == b[::-1]
    if fits_same and fits_transposed:
        raise ValueError(
            f"find_ties: {first!r} and {second!r} are both {describe(leaves[first])}, so either "
            f"orientation fits; say which: ({first!r}, {second!r}, 'same') or (..., 'transposed')"
        )
    _check_shapes(leaves, first, second, fits_transposed)
    return fits_transposed


def _check_shapes(leaves: Mapping[str, Any], first: str, second: str, transposed: bool) -> None:
    a, b = tuple(leaves[first].shape), tuple(leaves[second].shape)
    if (a[::-1] if transposed and len(a) == 2 else a) != b or (transposed and len(a) != 2):
        other = f"; a transposed member would be {list(a[::-1])}" if len(a) == 2 else ""
        raise ValueError(
            f"find_ties: {second!r} {list(b)} is declared tied to {first!r} {list(a)}{other}. "
            "Check ties=..., or leave one of them out"
        )


def from_config(leaves: Mapping[str, Any], config: Any, links: Sequence[Link]) -> list[Link]:
    """Returns ties with that of embedding and output projection, or without, as a config says.

    Raises:
      ValueError: it does not say whether they are tied, or not which leaves they are.
    """
    tied, size = says_tied(config), config_field(config, "vocab_size")
    if not isinstance(tied, bool):
        raise ValueError(
            f"find_ties: the config's tie_word_embeddings is {tied!r}; expected True or False. "
            "Of a model of several parts, give the config of its part for text"
        )
    tables, heads = _vocabulary_leaves(leaves, size)
    if not tied:
        pairs = {frozenset((table, head)) for table in tables for head in heads}
        return [link for link in links if frozenset((link.first, link.second)) not in pairs]
    if len(tables) > 1 and heads:
        raise ValueError(
            "find_ties: the config says tie_word_embeddings, and each of "
            f"{', '.join(map(repr, tables))} could be the input embedding; say which with "
            "ties=[(embedding, head), ...]"
        )
    if not tables:
        raise ValueError(
            "find_ties: the config says tie_word_embeddings, and no leaf looks like the input "
            f"embedding (a leaf called 'embedding' of vocab_size={size} rows in one "
            f"of {', '.join(EMBEDDINGS)}); say which with ties=[(embedding, head), ...]"
        )
    # A projection's kernel is [width, vocabulary] in Flax.
    found = [
        Link(table, head, tuple(leaves[table].shape)[::-1] == tuple(leaves[head].shape), CONFIG)
        for table in tables for head in heads
    ]  # fmt: skip
    # Such a config says True of checkpoints with a head of their own too, and values tell.
    return [*links, *(link for link in found if not (is_forced(config) and differ(leaves, link)))]


def differ(leaves: Mapping[str, Any], link: Link) -> bool | None:
    """Returns whether two leaves have other values; None where there are none to compare."""
    pair = [unboxed(leaves[path]) for path in (link.first, link.second)]
    if not all(isinstance(x, jax.Array | np.ndarray) and not is_tracer(x) for x in pair):
        return None
    return pair[0] is not pair[1] and not equal(pair[0], pair[1], link.transposed, constant=True)


def _vocabulary_leaves(leaves: Mapping[str, Any], size: Any) -> tuple[list[str], list[str]]:
    """Returns the leaves that are input embeddings, and those that are output projections."""
    matrices = {
        p: tuple(x.shape) for p, x in leaves.items()
        if not is_marker(x) and len(getattr(x, "shape", ())) == 2
    }  # fmt: skip
    tables = [
        p for p, shape in matrices.items()
        if is_table(p) and (shape[0] == size or leaf_name(module_of(p)) in EMBEDDINGS)
        and (size is None or shape[0] >= size)
    ]  # fmt: skip
    shapes = {matrices[p] for p in tables}
    heads = [
        p for p, shape in matrices.items()
        if p not in tables and (shape in shapes or shape[::-1] in shapes)
        # Within a layer such a shape is chance: a fused q, k, v kernel of a small model.
        and (leaf_name(module_of(p)) in HEADS or (size in shape and layer_index(p, None) is None))
    ]  # fmt: skip
    named = [p for p in tables if leaf_name(module_of(p)) in EMBEDDINGS]
    return named or tables, heads


def by_value(leaves: Mapping[str, Any]) -> list[Link]:
    """Returns the ties of leaves with equal values; arrays of one repeated value never count.

    Shapes are compared first, then a sample, and what is left as a whole.
    """
    links: list[Link] = []
    by_shape: dict[Any, list[str]] = {}
    for path, leaf in leaves.items():
        stored = array_of(leaf)
        concrete = isinstance(stored, np.ndarray | jax.Array) and not is_tracer(stored)
        if concrete and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
            by_shape.setdefault((tuple(sorted(leaf.shape)), str(leaf.dtype)), []).append(path)
    for paths in by_shape.values():
        by_sample: dict[Any, list[str]] = {}
        for path in paths if len(paths) > 1 else ():
            leaf = plain_array(leaves[path])
            shape, row, column = tuple(leaf.shape), *_sample(leaf)
            keys = {(shape, row, column): False}
            if len(shape) == 2:
                keys.setdefault((shape[::-1], column, row), True)
            hits = [(other, flip) for key, flip in keys.items() for other in by_sample.get(key, ())]
            for other, flip in hits:
                if equal(plain_array(leaves[other]), leaf, flip):
                    links.append(Link(other, path, flip, EQUAL_VALUES))
                    break
            by_sample.setdefault((shape, row, column), []).append(path)
    return links


def _sample(leaf: Any) -> tuple[bytes, bytes]:
    """Returns the first entries of the first row and of the first column."""
    index = (0,) * (leaf.ndim - 2)
    row, column = leaf[(*index, 0)][:_SAMPLE], leaf[(*index, slice(_SAMPLE), 0)]
    row, column = gathered((row, column))
    return np.asarray(row).tobytes(), np.asarray(column).tobytes()


def equal(a: Any, b: Any, transposed: bool, *, constant: bool = False) -> bool:
    """Returns whether two arrays have the same values.

    Args:
      transposed: whether the second is compared as its transpose.
      constant: whether arrays of one repeated value count.
    """
    # Arrays that other processes hold parts of are compared where they are.
    xp: Any = jnp if spread((a, b)) else np
    left, right = xp.asarray(a), xp.asarray(b).T if transposed else xp.asarray(b)
    if not bool(xp.array_equal(left, right)):
        return False
    return constant or not bool(xp.all(left == left[(0,) * left.ndim]))

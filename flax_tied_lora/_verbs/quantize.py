"""Params stored quantised: `quantize`, `dequantize`, and what they take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._algebra.site_filter import OTHER
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._ties.sources import is_table
from flax_tied_lora._tree.foreign import refuse_models
from flax_tied_lora._tree.paths import flatten, is_marker, leaf_name, matches, module_of, nearby
from flax_tied_lora._tree.quantized_array import (
    QTYPES,
    QuantizedArray,
    dequantized_leaves,
    is_quantized,
)

# Shorter blocks have more scales than they save.
SHORTEST = 16
_Tree = TypeVar("_Tree")
QType = Literal["int8", "int4", "nf4"]
# What modules call arrays that are added or scaled with, some of which have two axes.
_ADDED = ("bias", "b", "scale")


def quantize(
    params: _Tree,
    qtype: QType = "int8",
    *,
    block_size: int = 64,
    exclude_modules: str | Collection[str] | None = None,
    sites: CallSites | None = None,
) -> _Tree:
    """Returns params whose matrices are stored as small integers and scales (QLoRA).

    Works on plain params, before `wrap`, and on an `Adapted`, whose adapters stay as they are. A
    model runs on an `Adapted` of the result through `adapt`, on adapted leaves and on others: a
    lookup dequantises the rows that it picks, a projection its matrix a chunk at a time, and what
    was wrapped stands on it as on floating-point params. A leaf that is in several places is
    quantised once, and is in them all.

    Follows ``bitsandbytes``' blocks (QLoRA, arXiv:2305.14314, without quantised scales); the
    arithmetic is qwix's (``qwix.quantize``, ``qwix.dequantize``).

    Args:
      params: a pytree of arrays with key paths, or an `Adapted`.
      qtype: ``"int8"``; ``"int4"``; or ``"nf4"``, the 16 quantiles of a normal distribution, more
        exact than ``"int4"`` at the same size.
      block_size: entries that share a scale, at most; along the width of a table, and for a kernel
        along its last axis but one, else its last. Where an axis is no multiple of it, the largest
        even divisor is taken. A scale has the leaf's dtype.
      exclude_modules: modules or leaves to leave as they are, as in `LoraConfig`.
      sites: call sites of the model, from `trace`: then what is looked up or multiplied with is
        quantised, and nothing else. Without them, names decide: no ``bias``, no ``scale``.

    Returns:
      The same pytree with a `QuantizedArray` in place of every floating-point leaf of two axes or
      more; leaves whose axes have no divisor of 16 or more stay as they are.

    Raises:
      ImportError: qwix is not installed.
      ValueError: an unknown ``qtype``, a block size below 16, ``exclude_modules`` that names
        nothing, nothing to quantise, or params that are quantised already.
      TypeError: an `nnx.Module`; `tied_lora.nnx.quantize` takes one.
    """
    if qtype not in QTYPES:
        raise ValueError(f"quantize: qtype={qtype!r}; expected one of {', '.join(QTYPES)}")
    if not isinstance(block_size, int) or block_size < SHORTEST:
        raise ValueError(f"quantize: block_size={block_size!r}; expected an int of at least 16")
    if isinstance(params, Adapted):
        kept = quantize(
            params.params, qtype, block_size=block_size, exclude_modules=exclude_modules,
            sites=sites,
        )  # fmt: skip
        return dataclasses.replace(params, params=kept)
    refuse_models(
        "quantize", params,
        ", whose other state is not to be quantised; use flax_tied_lora.nnx.quantize(module)",
    )  # fmt: skip
    leaves, treedef = flatten(params)
    excluded = _excluded(leaves, exclude_modules)
    made: dict[int, Any] = {}  # by the array, so that what is shared stays shared
    quantized = {}
    for path, leaf in leaves.items():
        if is_quantized(leaf):
            raise ValueError(
                f"quantize: {path!r} is quantised already; quantize(dequantize(params)) to have it "
                "in another form"
            )
        if path in excluded or not _is_matrix(path, leaf, sites):
            continue
        axis_and_block = _blocks(path, leaf.shape, block_size)
        if axis_and_block is not None:
            if id(leaf) not in made:
                made[id(leaf)] = QuantizedArray.of(leaf, qtype, *axis_and_block)
            quantized[path] = made[id(leaf)]
    if not quantized:
        raise ValueError(
            "quantize: no leaf to quantise: none has two axes, one of them a multiple of 16, and "
            "is not excluded"
        )
    return jax.tree.unflatten(treedef, [quantized.get(p, x) for p, x in leaves.items()])


def _excluded(leaves: Mapping[str, Any], names: Any) -> set[str]:
    if names is None:
        return set()
    paths = [p for p in leaves if matches(names, p) or matches(names, module_of(p))]
    if not paths:
        raise ValueError(
            f"quantize: exclude_modules={names!r} names no leaf; there are, among others, "
            f"{', '.join(map(repr, nearby(str(names), leaves)))}"
        )
    return set(paths)


def _is_matrix(path: str, leaf: Any, sites: CallSites | None) -> bool:
    if is_marker(leaf) or not hasattr(leaf, "dtype"):
        return False
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    if sites is None:
        return leaf_name(path) not in _ADDED
    return all(site.role != OTHER for site in sites.of(path))


def _blocks(path: str, shape: Sequence[int], block_size: int) -> tuple[int, int] | None:
    """Returns the axis along which the blocks of a leaf lie, and their length."""
    last = len(shape) - 1
    order = (last, last - 1) if is_table(path) else (last - 1, last)
    options = []
    for axis in order:
        even = [b for b in range(SHORTEST, block_size + 1, 2) if shape[axis] % b == 0]
        if even:
            options.append((axis, max(even)))
    if not options or is_table(path):  # a lookup takes whole rows
        return options[0] if options else None
    return max(options, key=lambda option: option[1])


def dequantize(params: _Tree) -> _Tree:
    """Returns params, or an `Adapted`, with floating-point arrays in place of quantised ones.

    What is shared stays shared.
    """
    if isinstance(params, Adapted):
        return dataclasses.replace(params, params=dequantize(params.params))
    refuse_models("dequantize", params)
    leaves, treedef = flatten(params)
    return jax.tree.unflatten(treedef, list((leaves | dequantized_leaves(leaves)).values()))


def stored_bytes(params: Any) -> int:
    """Returns how many bytes params take as they are stored, scales included.

    What is in several places counts once.

    Args:
      params: a pytree of arrays, or an `Adapted`, whose adapters do not count.
    """
    tree = params.params if isinstance(params, Adapted) else params
    refuse_models("stored_bytes", tree)
    arrays = {id(x): x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")}
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays.values())

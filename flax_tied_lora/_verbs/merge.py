"""`merge` and `base`: plain params from an `Adapted`, with its deltas or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flax_tied_lora._adapters.adapted import Adapted, Params, check_adapted, check_slots
from flax_tied_lora._adapters.plain import plain
from flax_tied_lora._adapters.terms import weights_of
from flax_tied_lora._adapters.untie import untied_leaves, untied_names
from flax_tied_lora._tree.paths import flatten


def base(adapted: Adapted[Params]) -> Params:
    """Returns the unadapted params, for example for a reference model.

    Nothing is copied but the transposed members of tie groups, which outside `jax.jit` are
    transposed copies, and what is stored quantised, which is dequantised.

    Raises:
      TypeError: not an `Adapted`.
      ValueError: the adapters' first values were taken out of the params (PiSSA, OLoRA).
    """
    check_adapted("base", adapted)
    for group, adapter in adapted.plan.adapters():
        if adapter.residual:
            raise ValueError(
                f"base: init_lora_weights={adapted.plan.config.init_lora_weights!r} took the first "
                f"values of its factors out of {group.key!r}, so what is stored is a residual; "
                "keep the params that you gave to wrap"
            )
    return plain(adapted, {})


def merge(
    adapted: Adapted[Params],
    *,
    dtype: DTypeLike | None = None,
    untie: Mapping[str, str] | None = None,
) -> Params:
    """Returns plain params with each delta added to its weight once, and the ties intact.

    Members that are stored as the canonical leaf are the same array again.

    Args:
      adapted: what to merge; of stacked adapters one that is selected. It stays as it is.
      dtype: of the merged leaves; by default each keeps its own. In bfloat16 a small delta is
        partly lost in rounding: a merge to float32 keeps it.
      untie: for a leaf with separate adapters, which one array cannot hold: name of an adapter ->
        path of the leaf that it is merged into, for example
        ``{"lm_head": "lm_head/kernel"}``. A new leaf called ``kernel`` is the transpose of a table;
        it has no box. The model's config must then say untied, too
        (``tie_word_embeddings=False``).

    Raises:
      TypeError: not an `Adapted`; ``dtype`` is not floating point; ``untie`` is no dict.
      ValueError: the adapters are stacked, and not one is selected; a leaf has separate adapters
        and ``untie`` does not say where they go; or what it names is unknown, or in the way.
    """
    check_adapted("merge", adapted)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"merge: dtype={dtype!r}; expected a floating-point dtype")
    if untie is not None and not isinstance(untie, Mapping):
        raise TypeError(f"merge: untie={untie!r}; expected a dict, name of an adapter -> leaf path")
    one = adapted.slot is not None and jnp.ndim(adapted.slot) == 0
    check_slots(
        "merge",
        adapted,
        "stacked adapters are merged one by one, merge(tied_lora.select(stacked, 0))",
        stacked=one,
    )
    leaves, _ = flatten(adapted.params)
    weights = weights_of(adapted.eval(), leaves, dtype)
    merged, new, unused = {}, {}, dict(untie or {})
    for group in adapted.plan.adapted:
        kind = jnp.dtype(dtype or weights[group.key].dtype)
        if not group.separate:
            dense = weights[group.key].replace(dtype=kind).dense()
            merged[group.key] = _as_weak(leaves[group.key], dense) if dtype is None else dense
            continue
        members = {m.path for m in group.members}
        for path, array in untied_leaves(group, weights, unused, kind).items():
            if path in new or (path in leaves and path not in members):
                raise ValueError(
                    f"merge: untie puts a new leaf at {path!r}, where another leaf is in the way; "
                    "name another path"
                )
            (merged if path in members else new)[path] = array
        for name in untied_names(group, unused):
            del unused[name]
    if unused:
        raise ValueError(
            f"merge: untie names {', '.join(map(repr, unused))}, for which there is no separate "
            "adapter; leave it out"
        )
    return _with_leaves(plain(adapted, merged), new)


def _as_weak(leaf: Any, array: Any) -> Any:
    """Returns an array whose dtype gives way to others', as the leaf's does if it is weak."""
    weak = isinstance(leaf, jax.Array) and leaf.weak_type
    return leaf.at[...].set(array) if weak else array


def _with_leaves(params: Any, new: Mapping[str, Any]) -> Any:
    """Returns nested dicts with leaves added under their paths."""
    for path, array in new.items():
        if not isinstance(params, Mapping):
            raise ValueError(
                f"merge: untie puts a new leaf at {path!r}, and the params are a "
                f"{type(params).__name__}; expected dicts. Give them the leaf before wrap, tied"
            )
        params = _with_leaf(params, path.split("/"), array, path)
    return params


def _with_leaf(tree: Any, names: list[str], array: Any, path: str) -> Any:
    first, rest = names[0], names[1:]
    below = tree.get(first, {}) if isinstance(tree, Mapping) else None
    if below is None or (not rest and first in tree) or (rest and not isinstance(below, Mapping)):
        raise ValueError(
            f"merge: untie puts a new leaf at {path!r}, where another leaf is in the way; name "
            "another path"
        )
    kind: Any = type(tree)  # dict, FrozenDict
    return kind({**tree, first: _with_leaf(below, rest, array, path) if rest else array})

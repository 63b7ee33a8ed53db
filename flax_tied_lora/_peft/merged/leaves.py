"""The leaves of plain or merged params, each made when its turn comes.

`tied_lora.merge` makes all of them at once; to write a model to files, one at a time is enough.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.terms import weights_of
from flax_tied_lora._adapters.untie import untied_leaves
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._names.axis_map import at_least_float32
from flax_tied_lora._names.layout import TorchWeight, index_of, to_torch_array
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, GroupPlan, Plan
from flax_tied_lora._tree.foreign import refuse_models
from flax_tied_lora._tree.paths import flatten, is_marker, is_tracer
from flax_tied_lora._tree.processes import refuse_spread
from flax_tied_lora._tree.quantized_array import plain_array
from flax_tied_lora._verbs.merge import merge

# Which slice of a leaf: (axis, index) pairs; () is all of it.
SliceIndex = tuple[tuple[int, int], ...]


class Leaf(NamedTuple):
    """A leaf that is not made yet.

    Attributes:
      shape, dtype: of the leaf as it is written.
      identity: equal for leaves that are one array, as it is or transposed.
      get: makes a slice of the leaf, given the dtype that it is to be rounded to; a leaf that no
        adapter changes is as it is stored.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    identity: Any
    get: Callable[[SliceIndex, np.dtype], np.ndarray]

    def torch(self, weight: TorchWeight) -> np.ndarray:
        """Returns a PyTorch parameter that the leaf is, or that is a slice of it; rounded once."""
        wide = self.dtype if weight.is_exact else at_least_float32(self.dtype)
        return to_torch_array(self.get(weight.part, wide), weight.of_slice, self.dtype)


def leaves_of(
    adapted: Any, dtype: np.dtype | None, untie: Mapping[str, str] | None
) -> dict[str, Leaf]:
    """Returns the leaves of params, or of an `Adapted` with its adapters merged, by path.

    Args:
      adapted: `Adapted`, or plain params.
      dtype: of the floating-point leaves; None leaves them as they are.
      untie: as in `tied_lora.merge`.

    Raises:
      TypeError, ValueError: as `tied_lora.merge`; or a leaf is no array, or has no values here.
    """
    source = adapted.params if isinstance(adapted, Adapted) else adapted
    refuse_models("save_merged", source)
    arrays = flatten(source)[0]
    if not arrays:
        raise ValueError("save_merged: the params have no leaves; expected those of a model")
    for path, leaf in arrays.items():
        _check(path, leaf, isinstance(adapted, Adapted))
    if isinstance(adapted, Adapted):
        for kind, by_key in {**adapted.adapters, "scaling": adapted.scaling}.items():
            for key, factors in by_key.items():
                refuse_spread("save_merged", f"{kind}/{key}", factors)
        return _Merged(adapted, arrays, dtype, dict(untie or {})).leaves()
    if untie:
        raise ValueError(
            f"save_merged: untie={dict(untie)} is for an Adapted with separate adapters, found "
            "plain params; give them a leaf for each copy, and leave untie out"
        )
    return {path: _plain(leaf, dtype, id(leaf)) for path, leaf in arrays.items()}


def _check(path: str, leaf: Any, adapted: bool) -> None:
    if is_marker(leaf):
        if not adapted:
            raise ValueError(
                f"save_merged: {path!r} was taken out of these params by wrap; give the Adapted "
                "itself, or base(adapted) for the unadapted params"
            )
        return
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"save_merged: leaf {path!r} is a {type(leaf).__name__}, expected an array"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct) or is_tracer(leaf):
        raise ValueError(
            f"save_merged: leaf {path!r} is abstract, expected an array with values; save outside "
            "jax.jit, from params that were initialised or restored"
        )
    refuse_spread("save_merged", path, leaf)


@dataclasses.dataclass(frozen=True)
class _Merged:
    """What the leaves of an `Adapted` are made of."""

    adapted: Adapted
    arrays: Mapping[str, Any]
    dtype: np.dtype | None
    untie: dict[str, str]
    kept: dict[str, dict[str, Weight]] = dataclasses.field(default_factory=dict)

    def leaves(self) -> dict[str, Leaf]:
        # Abstractly, so that what merge refuses is refused before anything is written.
        merged = jax.eval_shape(
            lambda a: merge(a, dtype=self.dtype, untie=self.untie or None), self.adapted.eval()
        )
        shapes = flatten(merged)[0]
        groups = {m.path: g for g in self.adapted.plan.groups for m in g.members}
        separate = [g for g in self.adapted.plan.adapted if g.separate]
        for group in separate:
            for path in jax.eval_shape(functools.partial(self._separate_leaves, group, None)):
                groups[path] = group
        return {path: self._leaf(path, shape, groups.get(path)) for path, shape in shapes.items()}

    def _leaf(self, path: str, shape: Any, group: GroupPlan | None) -> Leaf:
        if group is None:
            return _plain(self.arrays[path], self.dtype, path)
        if not group.adapters:
            member = next(m for m in group.members if m.path == path)
            transposed = is_marker(self.arrays[path]) and member.transposed
            return _plain(self.arrays[group.key], self.dtype, group.key, transposed)
        identity = path if group.separate else group.key
        get = functools.partial(self._get, group, path)
        return Leaf(tuple(shape.shape), np.dtype(shape.dtype), identity, get)

    def _get(self, group: GroupPlan, path: str, part: SliceIndex, dtype: np.dtype) -> np.ndarray:
        if group.separate:
            array = _on_host(self._separate_leaves(group, dtype)[path])
            return array[index_of(part, array.ndim)]
        weight = self._weights(group, bool(part))[path].replace(dtype=dtype)
        for axis, index in sorted(part, reverse=True):
            weight = _slice(weight, axis, index)
        return np.asarray(weight.dense())

    def _weights(self, group: GroupPlan, again: bool) -> dict[str, Weight]:
        """Returns a group's symbolic weights.

        Args:
          again: whether they will be asked for again; then they are kept, unless they hold copies.
        """
        if group.key in self.kept:
            return self.kept[group.key]
        of_group = dataclasses.replace(
            self.adapted.eval(), plan=Plan.of((group,), self.adapted.plan.config)
        )
        weights = weights_of(of_group, self.arrays, self.dtype)
        no_copies = all(a.kind in (LORA, TRAINABLE_TOKENS) for a in group.adapters)
        if again and no_copies and isinstance(self.arrays[group.key], jax.Array):
            self.kept[group.key] = weights
        return weights

    def _separate_leaves(self, group: GroupPlan, dtype: np.dtype | None) -> dict[str, Any]:
        """Returns the merged leaves of a group whose names have separate adapters."""
        weights = self._weights(group, False)
        return untied_leaves(group, weights, self.untie, dtype or weights[group.key].dtype)


def _plain(leaf: Any, dtype: np.dtype | None, identity: Any, transposed: bool = False) -> Leaf:
    """Returns a leaf that no adapter changes; ``dtype`` is for floating-point ones."""
    stored = np.dtype(leaf.dtype)
    is_float = jax.numpy.issubdtype(stored, jax.numpy.floating)

    def get(part: SliceIndex, dtype: np.dtype) -> np.ndarray:
        array = _on_host(leaf)
        array = array.T if transposed else array
        return array[index_of(part, array.ndim)]

    shape = tuple(leaf.shape)[::-1] if transposed else tuple(leaf.shape)
    return Leaf(shape, dtype if dtype is not None and is_float else stored, identity, get)


def _on_host(leaf: Any) -> np.ndarray:
    """Returns a leaf as a NumPy array that nothing else keeps in memory."""
    leaf = plain_array(leaf)
    if isinstance(leaf, jax.Array):
        on_cpu = len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"
        # A JAX array keeps the NumPy array that it was converted to, so a copy is converted.
        return np.asarray(leaf if on_cpu else leaf.copy())
    return np.asarray(leaf)


def _slice(weight: Weight, axis: int, index: int) -> Weight:
    """Returns a slice of a weight, without that axis; its factors are sliced, not their product."""
    kept = [i for i in range(len(weight.shape)) if i != axis]
    aval = jax.ShapeDtypeStruct(tuple(weight.shape[i] for i in kept), weight.dtype)
    return weight.rearrange(aval, lambda factor: factor.at(axis, index), [(i,) for i in kept])

"""The leaves of plain or merged params, each made when its turn comes.

`tied_lora.merge` makes all of them at once; a model that is written to files needs one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.merge import untied_leaves
from flax_tied_lora._adapters.terms import weights_of
from flax_tied_lora._algebra.factor import Factor
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._names.layout import TorchWeight, to_torch_array
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, GroupPlan, Plan
from flax_tied_lora._tree.paths import flatten, is_marker, is_tracer
from flax_tied_lora._tree.processes import refuse_spread
from flax_tied_lora._tree.quantized_array import plain_array
from flax_tied_lora._verbs.merge import merge

# A slice of a leaf: (axis, index) pairs; () is all of it.
Part = tuple[tuple[int, int], ...]


class Leaf(NamedTuple):
    """A leaf that is not made yet.

    Attributes:
      shape, dtype: of the leaf as it is written.
      one: what it is; equal for leaves that are one array, as they are or transposed.
      get: makes a slice of it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    one: Any
    get: Callable[[Part], np.ndarray]

    def torch(self, weight: TorchWeight) -> np.ndarray:
        """Returns a PyTorch parameter that the leaf is, or that is a slice of it."""
        taken = [axis for axis, _ in weight.part]
        dims = tuple(tuple(a - sum(t < a for t in taken) for a in axes) for axes in weight.dims)
        part = self.get(weight.part)
        array = part if part.dtype == self.dtype else part.astype(self.dtype)
        return to_torch_array(array, dataclasses.replace(weight, dims=dims, part=()))


def leaves_of(
    adapted: Any, dtype: np.dtype | None, untie: Mapping[str, str] | None
) -> dict[str, Leaf]:
    """Returns the leaves of params, or of an `Adapted` with its adapters merged, by path.

    Args:
      adapted: `Adapted`, or plain params.
      dtype: of the floating-point leaves; None leaves each its own.
      untie: as in `tied_lora.merge`.

    Raises:
      TypeError, ValueError: what `tied_lora.merge` raises; leaves that are no arrays, or are not
        here to be written.
    """
    source = adapted.params if isinstance(adapted, Adapted) else adapted
    arrays = flatten(source)[0]
    if not arrays:
        raise ValueError("save_merged: the params have no leaves; expected those of a model")
    for path, leaf in arrays.items():
        _check(path, leaf, isinstance(adapted, Adapted))
    if isinstance(adapted, Adapted):
        for kind, own in {**adapted.adapters, "scaling": adapted.scaling}.items():
            for key, arrays_of_key in own.items():
                refuse_spread("save_merged", f"{kind}/{key}", arrays_of_key)
    if not isinstance(adapted, Adapted):
        if untie:
            raise ValueError(
                f"save_merged: untie={dict(untie)} is for an Adapted with separate adapters, found "
                "plain params; give them a leaf for each copy, and leave untie out"
            )
        return {path: _plain(leaf, dtype, id(leaf)) for path, leaf in arrays.items()}
    return _Merged(adapted, arrays, dtype, dict(untie or {})).leaves()


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
        # Abstractly: all that merge has to say is said before anything is written.
        whole = jax.eval_shape(
            lambda a: merge(a, dtype=self.dtype, untie=self.untie or None), self.adapted.eval()
        )
        shapes = flatten(whole)[0]
        groups = {m.path: g for g in self.adapted.plan.groups for m in g.members}
        separate = [g for g in self.adapted.plan.adapted if g.separate]
        for group in separate:
            for path in jax.eval_shape(functools.partial(self._parts, group)):
                groups[path] = group
        return {path: self._leaf(path, shape, groups.get(path)) for path, shape in shapes.items()}

    def _leaf(self, path: str, shape: Any, group: GroupPlan | None) -> Leaf:
        if group is None:
            return _plain(self.arrays[path], self.dtype, path)
        if not group.adapters:
            array, turned = self.arrays[group.key], is_marker(self.arrays[path])
            transposed = turned and next(m for m in group.members if m.path == path).transposed
            return _plain(array, self.dtype, group.key, transposed)
        one = path if group.separate else group.key
        get = functools.partial(self._get, group, path, np.dtype(shape.dtype))
        return Leaf(tuple(shape.shape), np.dtype(shape.dtype), one, get)

    def _get(self, group: GroupPlan, path: str, dtype: np.dtype, part: Part) -> np.ndarray:
        if group.separate:
            array = _on_host(self._parts(group)[path])
            return array[_index(part, array.ndim)]
        weight = self._weights(group, bool(part))[path].replace(dtype=dtype)
        for axis, index in sorted(part, reverse=True):
            weight = _slice(weight, axis, index)
        return np.asarray(weight.dense())

    def _weights(self, group: GroupPlan, again: bool) -> dict[str, Weight]:
        """Returns the group's weights; kept, if they are asked for again and hold no copies."""
        if group.key in self.kept:
            return self.kept[group.key]
        one = dataclasses.replace(
            self.adapted.eval(), plan=Plan.of((group,), self.adapted.plan.config)
        )
        weights = weights_of(one, self.arrays, self.dtype)
        light = all(a.kind in (LORA, TRAINABLE_TOKENS) for a in group.adapters)
        if again and light and isinstance(self.arrays[group.key], jax.Array):
            self.kept[group.key] = weights
        return weights

    def _parts(self, group: GroupPlan) -> dict[str, Any]:
        weights = self._weights(group, False)
        return untied_leaves(
            group, weights, dict(self.untie), self.dtype or weights[group.key].dtype
        )


def _plain(leaf: Any, dtype: np.dtype | None, one: Any, transposed: bool = False) -> Leaf:
    own = np.dtype(leaf.dtype)
    cast = dtype if dtype is not None and jax.numpy.issubdtype(own, jax.numpy.floating) else own

    def get(part: Part) -> np.ndarray:
        array = _on_host(leaf)
        array = array.T if transposed else array
        return array[_index(part, array.ndim)]

    shape = tuple(leaf.shape)[::-1] if transposed else tuple(leaf.shape)
    return Leaf(shape, cast, one, get)


def _on_host(leaf: Any) -> np.ndarray:
    """Returns an array in NumPy; JAX keeps the host's copy of an array, so a copy is asked."""
    leaf = plain_array(leaf)
    if isinstance(leaf, jax.Array):
        here = len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"
        return np.asarray(leaf if here else leaf.copy())
    return np.asarray(leaf)


def _index(part: Part, ndim: int) -> tuple[Any, ...]:
    index: list[Any] = [slice(None)] * ndim
    for axis, i in part:
        index[axis] = i
    return tuple(index)


def _slice(weight: Weight, axis: int, index: int) -> Weight:
    """Returns a slice of a weight, without that axis; its factors are sliced, not their product."""

    def move(factor: Factor) -> Factor:
        array, axes = factor.array, factor.axes
        if axis in axes:
            array = lax.index_in_dim(array, index, axes.index(axis), keepdims=False)
            axes = tuple(a for a in axes if a != axis)
        return Factor(array, axes).relabel(lambda a: a - (a > axis))

    kept = [i for i in range(len(weight.shape)) if i != axis]
    aval = jax.ShapeDtypeStruct(tuple(weight.shape[i] for i in kept), weight.dtype)
    return weight.rearrange(aval, move, [(i,) for i in kept])

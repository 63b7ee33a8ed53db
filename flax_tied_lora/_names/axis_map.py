"""A map on one axis of a leaf, and arrays moved by several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """A map from an axis of a Flax leaf to the same axis in PyTorch, and back.

    `Scale`, `Offset`, `Permutation`, `Interleaved` and `Padding` are the maps that there are. A
    line of a table of names takes one for an axis, or several, which are applied in order on the
    way to PyTorch, and in the other order on the way back.
    """

    @property
    def factor(self) -> float:
        """What every entry is multiplied by on the way to PyTorch; never 0."""
        return 1.0

    @property
    def offset(self) -> float:
        """What is added to every entry on the way to PyTorch."""
        return 0.0

    def order(self, size: int) -> np.ndarray | None:
        """Returns for each entry of PyTorch's axis which of the leaf's it is; None: it is the same.

        Args:
          size: of the leaf's axis.

        Returns:
          int64, as long as PyTorch's axis; -1 for an entry that the leaf lacks, which is 0.

        Raises:
          ValueError: the map is not for an axis of this size.
        """
        return None

    def torch_size(self, size: int) -> int:
        """Returns the size of PyTorch's axis, given the leaf's; raises as `order`."""
        order = self.order(size)
        return size if order is None else len(order)

    def leaf_size(self, size: int) -> int:
        """Returns the size of the leaf's axis, given PyTorch's."""
        return size

    def to_torch(self, array: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns an array with an axis of the leaf as PyTorch has it, in the same dtype.

        Raises:
          ValueError: the map is not for an axis of this size, or scales integers.
        """
        return scaled(to_torch_order(array, [(axis, self)]), self.factor, self.offset)

    def from_torch(self, array: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns an array with PyTorch's axis as the leaf has it: the inverse of `to_torch`.

        What PyTorch lacks is 0, and what the leaf lacks is left out. Raises as `to_torch`.
        """
        array = from_torch_order(array, [(axis, self)])
        return scaled(array, 1 / self.factor, -self.offset / self.factor)


# Maps of an array's axes, in the order in which they are applied on the way to PyTorch.
Maps = Sequence[tuple[int, AxisMap]]


def factor_of(maps: Iterable[tuple[int, AxisMap]]) -> float:
    """Returns what all maps together multiply by."""
    return math.prod(axis_map.factor for _, axis_map in maps)


def offset_of(maps: Iterable[tuple[int, AxisMap]]) -> float:
    """Returns what all maps together add."""
    return math.fsum(axis_map.offset for _, axis_map in maps)


def torch_sizes(sizes: Sequence[int], maps: Maps) -> tuple[int, ...]:
    """Returns the sizes of axes in PyTorch, given the leaf's; raises as `AxisMap.order`."""
    result = list(sizes)
    for axis, axis_map in maps:
        result[axis] = axis_map.torch_size(result[axis])
    return tuple(result)


def to_torch_order(array: np.ndarray, maps: Maps) -> np.ndarray:
    """Returns an array with its axes in PyTorch's order and size, not scaled."""
    for axis, axis_map in maps:
        order = axis_map.order(array.shape[axis])
        if order is None:
            continue
        array = np.take(array, np.maximum(order, 0), axis)
        array[_along(axis, order < 0)] = 0
    return array


def from_torch_order(array: np.ndarray, maps: Maps) -> np.ndarray:
    """Returns an array with its axes in the leaf's order and size, not scaled."""
    for axis, axis_map in reversed(maps):
        size = axis_map.leaf_size(array.shape[axis])
        order = axis_map.order(size)
        if order is None:
            continue
        there = order >= 0
        result = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
        result[_along(axis, order[there])] = array[_along(axis, there)]
        array = result
    return array


def order_of(size: int, maps: Iterable[AxisMap]) -> np.ndarray:
    """Returns `AxisMap.order` of several maps of one axis, applied one after the other."""
    entries = np.arange(1, size + 1)
    return to_torch_order(entries, [(0, axis_map) for axis_map in maps]) - 1


def scaled(array: np.ndarray, factor: float, offset: float = 0.0) -> np.ndarray:
    """Returns an array times a number plus another, computed in float32 or wider, rounded once.

    Raises:
      ValueError: the array is not floating point.
    """
    if factor == 1 and not offset:
        return array
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise ValueError(f"found {array.dtype}, which is not scaled; expected floating point")
    wide = at_least_float32(array.dtype)
    return (array.astype(wide) * wide.type(factor) + wide.type(offset)).astype(array.dtype)


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """Returns float32 for a narrower floating-point dtype, and any other as it is."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return np.dtype(np.float32) if narrow else dtype


def _along(axis: int, index: np.ndarray) -> tuple[slice | np.ndarray, ...]:
    return (*[slice(None)] * axis, index)

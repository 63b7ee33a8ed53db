"""Which axes of a Flax leaf are which axes of a PyTorch parameter, and arrays moved so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flax_tied_lora._names.axis_map import (
    AxisMap,
    factor_of,
    from_torch_order,
    offset_of,
    order_of,
    scaled,
    to_torch_order,
    torch_sizes,
)

KINDS = ("linear", "conv1d", "embedding", "conv", "vector", "parameter")
# Of two axes, and the table of names does not say whether a linear layer's or an embedding's.
MATRIX = "matrix"


@dataclasses.dataclass(frozen=True)
class TorchWeight:
    """A PyTorch parameter, and where in a Flax leaf its elements are.

    Attributes:
      module: name of the module that holds it: ``transformer.h.0.attn.c_attn``.
      parameter: ``weight``, ``bias``, or another attribute's name.
      kind: "linear" [out, in], "conv1d" [in, out] (GPT-2's Conv1D), "embedding" [rows, columns],
        "conv", "vector" (a bias, a norm's scale), "parameter", or "matrix" where the table of names
        does not say whether it is a linear layer's or an embedding's.
      dims: for each axis of the parameter the leaf's axes that it holds, flattened in this order;
        () for an axis of size 1.
      part: (axis of the leaf, index) pairs: the parameter is this slice of the leaf.
      maps: (axis of the leaf, map) pairs, in the order in which they are applied on the way to
        PyTorch: what an axis of the parameter is where it is not the leaf's as it stands.
    """

    module: str
    parameter: str = "weight"
    kind: str = "linear"
    dims: tuple[tuple[int, ...], ...] = ()
    part: tuple[tuple[int, int], ...] = ()
    maps: tuple[tuple[int, AxisMap], ...] = ()

    @property
    def name(self) -> str:
        """The parameter's name in a state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def ndim(self) -> int:
        """How many axes the Flax leaf has."""
        return len(self.part) + sum(map(len, self.dims))

    @property
    def of_slice(self) -> TorchWeight:
        """The same parameter, of the leaf's slice alone: a leaf without the axes of ``part``."""
        sliced = [axis for axis, _ in self.part]
        return self.renumbered(lambda axis: axis - sum(s < axis for s in sliced), part=())

    @property
    def factor(self) -> float:
        """What the leaf's values are multiplied by."""
        return factor_of(self.maps)

    @property
    def offset(self) -> float:
        """What is added to the leaf's values."""
        return offset_of(self.maps)

    @property
    def is_exact(self) -> bool:
        """Whether the leaf's values are the parameter's, neither scaled nor shifted."""
        return self.factor == 1 and not self.offset

    @property
    def maps_by_axis(self) -> tuple[tuple[tuple[AxisMap, ...], ...], ...]:
        """For each axis of the parameter, and each of the leaf's that it holds, its maps."""
        return tuple(
            tuple(tuple(axis_map for a, axis_map in self.maps if a == axis) for axis in axes)
            for axes in self.dims
        )

    def renumbered(self, axis_of: Callable[[int], int], **changes: Any) -> TorchWeight:
        """Returns the same parameter, of a leaf whose axes have other numbers."""
        dims = tuple(tuple(map(axis_of, axes)) for axes in self.dims)
        maps = tuple((axis_of(axis), axis_map) for axis, axis_map in self.maps)
        return dataclasses.replace(self, dims=dims, maps=maps, **changes)

    def order(self, axis: int, size: int) -> np.ndarray:
        """Returns which of the leaf's entries along an axis each of PyTorch's is; -1: none."""
        return order_of(size, [axis_map for a, axis_map in self.maps if a == axis])

    def shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the parameter's shape, given the leaf's.

        Raises:
          ValueError: a map is not for an axis of this size.
        """
        sizes = _sizes(self, leaf_shape)
        return tuple(math.prod(sizes[axis] for axis in axes) for axes in self.dims)


def torch_view(leaf: Any, weight: TorchWeight, dtype: Any = None) -> np.ndarray:
    """Returns a parameter's elements as a view of the leaf, or a copy where NumPy needs one.

    Args:
      dtype: of the elements; None: the leaf's. A wider leaf is rounded once, after it was scaled.
    """
    array = np.asarray(leaf)
    _check_ndim(array.shape, weight)
    shape = weight.shape(array.shape)
    for axis, i in weight.part:
        if not -1 < i < array.shape[axis]:
            raise ValueError(
                f"{weight.name} is slice {i} of axis {axis} of a leaf {list(array.shape)}, "
                f"which has only {array.shape[axis]}"
            )
    of_slice = weight.of_slice
    array = to_torch_order(array[index_of(weight.part, array.ndim)], of_slice.maps)
    array = _scaled(array, weight, weight.factor, weight.offset).astype(
        dtype or array.dtype, copy=False
    )
    return array.transpose(_order(of_slice)).reshape(shape)


def to_torch_array(leaf: Any, weight: TorchWeight, dtype: Any = None) -> np.ndarray:
    """Returns a leaf (or the slice of it that ``weight`` is) in PyTorch's layout.

    Exactly; a `Scale` rounds once.

    >>> import numpy as np
    >>> q_proj = TorchWeight("q_proj", dims=((1, 2), (0,)))  # from [width, heads, head_dim]
    >>> to_torch_array(np.zeros((6, 2, 4)), q_proj).shape
    (8, 6)

    Args:
      leaf: the array.
      weight: what it is in PyTorch.
      dtype: of the result; by default the leaf's.

    Raises:
      ValueError: the leaf has another number of axes than the weight's layout, or sizes that its
        maps are not for.
    """
    return np.ascontiguousarray(torch_view(leaf, weight, dtype)).reshape(
        weight.shape(np.shape(leaf))  # ascontiguousarray gives a scalar an axis
    )


def from_torch_array(array: Any, weight: TorchWeight, shape: Sequence[int]) -> np.ndarray:
    """Returns a PyTorch parameter in the leaf's layout: the inverse of `to_torch_array`.

    What only the leaf has (`Padding`) is 0.

    Args:
      array: the parameter.
      weight: where it belongs.
      shape: of the leaf. For a slice of a fused leaf the result lacks the axes of ``weight.part``;
        `from_torch_arrays` puts the slices together.

    Raises:
      ValueError: the parameter has another shape than the leaf and the layout ask for.
    """
    array = np.asarray(array)
    _check_ndim(shape, weight)
    expected = weight.shape(shape)
    if array.shape != expected:
        raise ValueError(
            f"{weight.name} has shape {list(array.shape)}, expected {list(expected)} for a Flax "
            f"leaf {list(shape)}: check that the file and the params are of the same model"
        )
    of_slice, sizes = weight.of_slice, _sizes(weight, shape)
    order = [axis for axes in weight.dims for axis in axes]
    array = array.reshape([sizes[axis] for axis in order]).transpose(np.argsort(_order(of_slice)))
    array = from_torch_order(array, of_slice.maps)
    return _scaled(array, weight, 1 / weight.factor, -weight.offset / weight.factor)


def from_torch_arrays(
    arrays: Sequence[Any], weights: Sequence[TorchWeight], shape: Sequence[int]
) -> np.ndarray:
    """Returns a leaf put together from all its PyTorch parameters, one or, where it is fused, more.

    Args:
      arrays: the parameters, as `Names.to_torch` lists them.
      weights: what `Names.to_torch` returned for the leaf.
      shape: of the leaf.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    slices = [from_torch_array(a, w, shape) for a, w in zip(arrays, weights, strict=True)]
    if not weights[0].part:
        return slices[0]
    dtypes = {s.dtype for s in slices}
    if len(dtypes) > 1:
        raise ValueError(
            f"{', '.join(w.name for w in weights)} are one Flax leaf and have different dtypes "
            f"({', '.join(sorted(map(str, dtypes)))}): convert them to one first"
        )
    leaf = np.empty(tuple(shape), slices[0].dtype)
    for value, weight in zip(slices, weights, strict=True):
        leaf[index_of(weight.part, leaf.ndim)] = value
    return leaf


def index_of(part: Iterable[tuple[int, int]], ndim: int) -> tuple[int | slice, ...]:
    """Returns what to index a leaf with for one slice of it, given as (axis, index) pairs."""
    index: list[int | slice] = [slice(None)] * ndim
    for axis, i in part:
        index[axis] = i
    return tuple(index)


def _check_ndim(shape: Sequence[int], weight: TorchWeight) -> None:
    """Raises ValueError where a leaf has another number of axes than the layout."""
    if len(shape) != weight.ndim:
        raise ValueError(
            f"{weight.name} has a layout for a Flax leaf of {weight.ndim} axes, found a leaf "
            f"{list(shape)}: correct the layout of its line in the table of names"
        )


def _order(of_slice: TorchWeight) -> list[int]:
    """Returns the axes of a slice in PyTorch's order."""
    return [axis for axes in of_slice.dims for axis in axes]


def _sizes(weight: TorchWeight, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the sizes of the leaf's axes as PyTorch has them."""
    try:
        return torch_sizes(shape, weight.maps)
    except ValueError as error:
        raise ValueError(
            f"{weight.name} of a Flax leaf {list(shape)}: {error}; correct the maps of its line in "
            "the table of names"
        ) from error


def _scaled(array: np.ndarray, weight: TorchWeight, factor: float, offset: float) -> np.ndarray:
    try:
        return scaled(array, factor, offset)
    except ValueError as error:
        name = "an Offset" if offset else "a Scale"
        raise ValueError(f"{weight.name} has {name} in the table of names: {error}") from error

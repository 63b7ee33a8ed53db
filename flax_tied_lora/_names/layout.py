"""Which axes of a Flax leaf are which axes of a PyTorch parameter, and arrays moved so."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

KINDS = ("linear", "conv1d", "embedding", "conv", "vector", "parameter")
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<index>\d+)|\{(?P<field>[A-Za-z_]\w*)\}"
                    r"|(?P<open>\()|(?P<close>\)))\s*")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TorchWeight:
    """A PyTorch parameter, and where in a Flax leaf its elements are.

    Attributes:
      module: name of the module that holds it: ``transformer.h.0.attn.c_attn``.
      parameter: ``weight``, ``bias``, or another attribute's name.
      kind: "linear" [out, in], "conv1d" [in, out] (GPT-2's Conv1D), "embedding" [rows, columns],
        "conv", "vector" (a bias, a norm's scale) or "parameter".
      dims: for each axis of the parameter the leaf's axes that it holds, flattened in this order;
        () for an axis of size 1.
      part: (axis of the leaf, index) pairs: the parameter is this slice of the leaf.
    """

    module: str
    parameter: str = "weight"
    kind: str = "linear"
    dims: tuple[tuple[int, ...], ...] = ()
    part: tuple[tuple[int, int], ...] = ()

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
        dims = tuple(tuple(a - sum(s < a for s in sliced) for a in axes) for axes in self.dims)
        return dataclasses.replace(self, dims=dims, part=())

    def shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the parameter's shape, given the leaf's."""
        return tuple(math.prod(leaf_shape[axis] for axis in axes) for axes in self.dims)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout as a line of a table has it.

    Attributes:
      ndim: how many axes the Flax leaf has.
      dims: as in `TorchWeight`.
      part: as in `TorchWeight`, but with a placeholder's name where that holds the index.
    """

    ndim: int
    dims: tuple[tuple[int, ...], ...]
    part: tuple[tuple[int, int | str], ...]


def parse_layout(text: str) -> Layout:
    """Returns a layout, given its text: ``"in heads dim -> (heads dim) in"``.

    On the left the leaf's axes, in order: a name, or for an axis of which the parameter is one
    slice, its index or the placeholder (``{expert}``) that holds it. On the right the parameter's
    axes: a name, several in brackets that are one axis, or 1 for an axis of size 1.

    Raises:
      ValueError: what is wrong with it.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"layout {text!r} has no '->' between the Flax and the PyTorch axes")
    names: dict[str, int] = {}
    part: list[tuple[int, int | str]] = []
    for axis, (what, value) in enumerate(_tokens(left, text)):
        if what == "name":
            if value in names:
                raise ValueError(f"layout {text!r} has {value!r} twice on the left")
            names[value] = axis
        elif what in ("index", "field"):
            part.append((axis, int(value) if what == "index" else value))
        else:
            raise ValueError(f"layout {text!r} has brackets on the left: they belong on the right")
    dims = tuple(
        tuple(_axis(names, n, text) for n in group) for group in _groups(_tokens(right, text), text)
    )
    used = [axis for group in dims for axis in group]
    missing = [n for n, axis in names.items() if used.count(axis) != 1]
    if missing:
        raise ValueError(f"layout {text!r} must have {missing[0]!r} once on the right")
    return Layout(len(names) + len(part), dims, tuple(part))


def _tokens(side: str, text: str) -> Iterable[tuple[str, str]]:
    start = 0
    while start < len(side.rstrip()):
        token = _TOKEN.match(side, start)
        if not token:
            raise ValueError(f"layout {text!r} has {side[start:].strip()!r}, which is no axis")
        start = token.end()
        assert token.lastgroup
        yield token.lastgroup, token[token.lastgroup]


def _groups(tokens: Iterable[tuple[str, str]], text: str) -> Iterable[list[str]]:
    group: list[str] | None = None
    for what, value in tokens:
        match what:
            case "open" if group is None:
                group = []
            case "close" if group is not None:
                yield group
                group = None
            case "name" if group is not None:
                group.append(value)
            case "name":
                yield [value]
            case "index" if value == "1" and group is None:
                yield []
            case _:
                raise ValueError(f"layout {text!r}: {value!r} is out of place on the right")
    if group is not None:
        raise ValueError(f"layout {text!r} has a bracket that is not closed")


def _axis(names: dict[str, int], name: str, text: str) -> int:
    if name not in names:
        raise ValueError(f"layout {text!r} has {name!r} on the right and not on the left")
    return names[name]


def torch_view(leaf: Any, weight: TorchWeight) -> np.ndarray:
    """Returns a parameter's elements as a view of the leaf, or a copy where NumPy needs one."""
    array = np.asarray(leaf)
    _check_ndim(array.shape, weight)
    shape = weight.shape(array.shape)
    for axis, i in weight.part:
        if not -1 < i < array.shape[axis]:
            raise ValueError(
                f"{weight.name} is slice {i} of axis {axis} of a leaf {list(array.shape)}, "
                f"which has only {array.shape[axis]}"
            )
    return array[index_of(weight.part, array.ndim)].transpose(_order(weight)).reshape(shape)


def to_torch_array(leaf: Any, weight: TorchWeight) -> np.ndarray:
    """Returns a leaf (or the slice of it that ``weight`` is) in PyTorch's layout, exactly.

    >>> import numpy as np
    >>> q_proj = TorchWeight("q_proj", dims=((1, 2), (0,)))  # from [width, heads, head_dim]
    >>> to_torch_array(np.zeros((6, 2, 4)), q_proj).shape
    (8, 6)

    Raises:
      ValueError: the leaf has another number of axes than the weight's layout.
    """
    return np.ascontiguousarray(torch_view(leaf, weight)).reshape(
        weight.shape(np.shape(leaf))  # ascontiguousarray gives a scalar an axis
    )


def from_torch_array(array: Any, weight: TorchWeight, shape: Sequence[int]) -> np.ndarray:
    """Returns a PyTorch parameter in the leaf's layout, exactly: the inverse of `to_torch_array`.

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
    order = [axis for axes in weight.dims for axis in axes]
    return array.reshape([shape[axis] for axis in order]).transpose(np.argsort(_order(weight)))


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


def _order(weight: TorchWeight) -> list[int]:
    """Returns the leaf's axes in PyTorch's order, counted without those of ``part``."""
    return [axis for axes in weight.of_slice.dims for axis in axes]

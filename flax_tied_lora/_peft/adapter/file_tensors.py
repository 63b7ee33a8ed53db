"""Which tensors of PEFT's file an adapter is, and where in the adapter's arrays each of them is.

One description serves both directions. PEFT keeps a pair for each module: ``lora_A`` [r, in] and
``lora_B`` [out, r]; for an embedding ``lora_embedding_A`` [r, rows] and ``lora_embedding_B``
[columns, r]. A tied adapter is in the file once for each module that it is for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_tied_lora._algebra.factor import RANK
from flax_tied_lora._names.axis_map import (
    Maps,
    factor_of,
    from_torch_order,
    offset_of,
    scaled,
    to_torch_order,
    torch_sizes,
)
from flax_tied_lora._names.axis_maps import Padding
from flax_tied_lora._names.layout import MATRIX, TorchWeight
from flax_tied_lora._peft.adapter.parameters import TorchAdapter
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._planning.plan import (
    BIAS,
    LORA,
    MAGNITUDE,
    MODULES_TO_SAVE,
    AdapterPlan,
    GroupPlan,
)

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of the file, and which slice of which array of an adapter it is.

    Attributes:
      name: of the tensor in the file.
      array: name of the adapter's array; "" for the only one.
      index: of the slice in the array.
      order: how the slice is transposed.
      maps: what its axes, transposed, are in PyTorch.
      factor: what its values are multiplied by there.
      sizes: shape of the transposed slice in PyTorch.
      shape: of the tensor, in which some of these axes are flattened into one.
    """

    name: str
    array: str
    index: tuple[Any, ...]
    order: tuple[int, ...]
    maps: Maps
    factor: float
    sizes: tuple[int, ...]
    shape: tuple[int, ...]

    def get(self, array: Any) -> np.ndarray:
        """Returns the tensor, given the adapter's array."""
        transposed = np.asarray(array)[self.index].transpose(self.order)
        values = to_torch_order(transposed, self.maps)
        values = scaled(values, self.factor, offset_of(self.maps))
        return np.ascontiguousarray(values).reshape(self.shape)

    def slice_of(self, tensor: Any) -> np.ndarray:
        """Returns the slice of the adapter's array that the tensor is."""
        values = from_torch_order(np.asarray(tensor).reshape(self.sizes), self.maps)
        values = scaled(values, 1 / self.factor, -offset_of(self.maps))
        return values.transpose(np.argsort(self.order))


def file_tensors(adapters: Sequence[TorchAdapter]) -> list[list[FileTensor]]:
    """Returns the tensors that each of an `Adapted`'s adapters is in PEFT's file.

    Raises:
      AdapterFileError: an adapter's rows and columns are not the inputs and outputs of its module.
    """
    with_factors = {m for a in adapters if a.adapter.kind == LORA for m in a.modules}
    try:
        return [_tensors(a.group, a.adapter, a.weights, with_factors) for a in adapters]
    except ValueError as error:
        raise AdapterFileError(f"adapter file: {error}") from error


def _tensors(
    group: GroupPlan, adapter: AdapterPlan, weights: Sequence[TorchWeight], with_factors: set[str]
) -> list[FileTensor]:
    """Returns the tensors of one adapter.

    Args:
      with_factors: the modules that have factors, whose biases PEFT keeps under another name.
    """
    tensors: list[FileTensor] = []
    for weight in weights:
        module = PREFIX + weight.module if weight.module else PREFIX.rstrip(".")
        if adapter.kind == LORA:
            tensors += _factor_tensors(group, adapter, weight, module)
        elif adapter.kind == MODULES_TO_SAVE:
            name = f"{module}.{weight.parameter}"
            tensors.append(_tensor(group, adapter, weight, name, weight.dims))
        elif adapter.kind == BIAS:
            inner = ".base_layer" if weight.module in with_factors else ""
            name = f"{module}{inner}.{weight.parameter}"
            tensors.append(_tensor(group, adapter, weight, name, weight.dims))
        else:
            rows, *columns = weight.dims if weight.kind != "conv1d" else weight.dims[::-1]
            if rows != (group.token_axis,):
                raise ValueError(
                    f"{adapter.key!r}: tokens are along axis {group.token_axis} of the leaf, and "
                    f"{weight.name!r} has them along {rows}"
                )
            name = f"{module}.token_adapter.trainable_tokens_delta"
            tensors.append(_tensor(group, adapter, weight, name, ((RANK,), *columns)))
    return tensors


def _factor_tensors(
    group: GroupPlan, adapter: AdapterPlan, weight: TorchWeight, module: str
) -> list[FileTensor]:
    """Returns the tensors of an adapter's factors for one module, and of its DoRA magnitude."""
    if weight.kind == "embedding":
        inputs, outputs = weight.dims[:1], weight.dims[1:]
        names = f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    elif weight.kind in ("linear", "conv1d", "conv"):
        inputs, outputs = weight.dims[1:], weight.dims[:1]
        if weight.kind == "conv1d":
            inputs, outputs = outputs, inputs
        names = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    elif weight.kind == MATRIX:
        raise ValueError(
            f"{adapter.key!r} is {weight.name!r} in PyTorch, and neither its line in the table of "
            "names nor call sites say whether that is an embedding or a linear layer, which PEFT's "
            'files keep apart; give its line a kind, (path, name, layout, "embedding") or (..., '
            '"linear"), or wrap with the call sites of the model: sites = tied_lora.trace('
            "model.apply, ...); wrap(params, config, sites=sites)"
        )
    else:
        raise ValueError(
            f"{adapter.key!r} is {weight.name!r} in PyTorch, a {weight.kind}, for which PEFT's "
            "files are not written or read here; merge it, or leave it out of the targets"
        )
    sides = {axis for axes in inputs for axis in axes}, {axis for axes in outputs for axis in axes}
    sliced = {axis for axis, _ in weight.part} | set(group.batch)
    rows, cols = set(group.rows) - sliced, set(group.cols) - sliced
    if (rows, cols) == sides:
        input_factor, output_factor = "lora_a", "lora_b"
    elif (cols, rows) == sides and not adapter.dora:
        input_factor, output_factor = "lora_b", "lora_a"
    else:
        raise ValueError(
            f"{adapter.key!r} has rows {group.rows} and columns {group.cols}, and {weight.name!r} "
            f"has inputs {inputs} and outputs {outputs} of the leaf's axes; wrap with the model's "
            "call sites (sites=...), so that rows are what is summed over"
        )
    # PEFT's factors of a convolution are convolutions: lora_B has a kernel of size 1.
    units = [()] * (len(inputs) - 1) if weight.kind == "conv" else []
    tensors = [
        _tensor(group, adapter, weight, names[0], ((RANK,), *inputs), input_factor),
        _tensor(group, adapter, weight, names[1], (*outputs, (RANK,), *units), output_factor),
    ]
    if adapter.dora:
        _check_norms(adapter, weight, sides[1])
        name = f"{module}.lora_magnitude_vector"
        lead = [()] if units else []
        dims = (*lead, *outputs, *units)
        tensors.append(_tensor(group, adapter, weight, name, dims, "lora_magnitude"))
    return tensors


def _check_norms(adapter: AdapterPlan, weight: TorchWeight, outputs: set[int]) -> None:
    """Refuses DoRA where PyTorch's norms are not ours times a number."""
    for axis, axis_map in weight.maps:
        # What else there is keeps the entries of each norm, and a column of zeros has none.
        grows = isinstance(axis_map, Padding) and axis_map.torch > axis_map.leaf
        if isinstance(axis_map, Padding) and (axis not in outputs or grows):
            raise ValueError(
                f"{adapter.key!r} has use_dora, and {weight.name!r} has {axis_map} along axis "
                f"{axis} of the leaf, so that the norms in PyTorch are of other entries; merge it, "
                "or wrap without use_dora"
            )


def _tensor(
    group: GroupPlan, adapter: AdapterPlan, weight: TorchWeight, name: str,
    dims: Sequence[Sequence[Any]], array: str = "",
) -> FileTensor:  # fmt: skip
    """Returns a tensor of the file.

    Args:
      dims: for each of its axes the axes of the leaf (or RANK) that it holds; () for size 1.
      array: name of the adapter's array that it is a slice of.
    """
    axes, shape = group.axes(adapter)[array], group.shapes(adapter)[array]
    part = dict(weight.part)
    if adapter.span is not None and adapter.span[0] in part:
        part[adapter.span[0]] -= adapter.span[1]
    remaining = [axis for axis in axes if axis not in part]
    order = [axis for flattened in dims for axis in flattened]
    maps = [(order.index(axis), axis_map) for axis, axis_map in weight.maps if axis in order]
    leaf_size = dict(zip(axes, shape, strict=True))
    size = dict(zip(order, torch_sizes([leaf_size[axis] for axis in order], maps), strict=True))
    # Factors share what the whole weight is scaled by; a norm has no sign.
    factor = factor_of(maps) if array else weight.factor
    factor = abs(weight.factor) if array == MAGNITUDE else factor
    return FileTensor(
        name=name,
        array=array,
        index=tuple(part.get(axis, slice(None)) for axis in axes),
        order=tuple(remaining.index(axis) for axis in order),
        maps=tuple(maps),
        factor=factor,
        sizes=tuple(size[axis] for axis in order),
        shape=tuple(math.prod(size[axis] for axis in flattened) for flattened in dims),
    )

"""Where the arrays of an adapter are in PEFT's file, tensor by tensor, and in which layout.

One description serves both directions. PEFT keeps a pair for each module: ``lora_A`` [r, in] and
``lora_B`` [out, r]; for an embedding ``lora_embedding_A`` [r, rows] and ``lora_embedding_B``
[columns, r]. A tied adapter is in the file once for each module that it is for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from flax_tied_lora._algebra.factor import RANK
from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION
from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._names.mapping import Names, UnmappedError
from flax_tied_lora._planning.plan import BIAS, LORA, MODULES_TO_SAVE, AdapterPlan, GroupPlan

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of the file, and which part of which array of an adapter it is.

    Attributes:
      module: PyTorch's name of the module.
      name: of the tensor in the file.
      array: name of the adapter's array; "" for the only one.
      index: of the part in the array.
      order: transposition of the part.
      sizes: the transposed part's shape.
      shape: the tensor's.
    """

    module: str
    name: str
    array: str
    index: tuple[Any, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]

    def get(self, array: Any) -> np.ndarray:
        """Returns the tensor, given the adapter's array."""
        part = np.asarray(array)[self.index].transpose(self.order)
        return np.ascontiguousarray(part).reshape(self.shape)

    def put(self, array: np.ndarray, tensor: Any) -> None:
        """Writes the tensor into the adapter's array."""
        part = np.asarray(tensor).reshape(self.sizes).transpose(np.argsort(self.order))
        array[self.index] = part


def modules_of(
    group: GroupPlan, adapter: AdapterPlan, names: Names, leaves: Collection[str]
) -> list[TorchWeight]:
    """Returns the PyTorch parameters that an adapter is for, their axes the canonical leaf's.

    Args:
      leaves: paths of the params.

    Raises:
      UnmappedError: a leaf has no PyTorch name.
      ValueError: the adapter is for call sites that are no module's in PyTorch.
    """
    found: list[TorchWeight] = []
    for member in group.members:
        if not adapter.covers(member.path):
            continue
        shape = group.shape[::-1] if member.transposed else group.shape
        own = list(names.to_torch(member.path, shape))
        if len(own) == 1 and not adapter.members:
            own += tied_to(member.path, own[0], names, leaves)
        found += [_turned(w) if member.transposed else w for w in own]
    if adapter.span is not None:
        found = [w for w in found if _is_inside(w, adapter.span)]
        if not found:
            raise ValueError(
                f"{adapter.key!r} is for a part of {group.key!r} that is no module of its own in "
                "PyTorch; merge it, or wrap without parts"
            )
    if adapter.sites is not None:
        found = [w for w in found if _meant(w, adapter)]
        if not found:
            raise ValueError(
                f"{adapter.key!r} is for call sites of {group.key!r} that are no module of their "
                "own in PyTorch"
            )
    return list({w.name: w for w in found}.values())


def _is_inside(weight: TorchWeight, span: tuple[int, int, int]) -> bool:
    axis, start, stop = span
    return any(a == axis and start <= i < stop for a, i in weight.part)


def _meant(weight: TorchWeight, adapter: AdapterPlan) -> bool:
    sites = adapter.sites
    assert sites is not None
    if sites.scope is not None:
        tail = sites.scope.replace("/", ".")
        return f".{tail}.".endswith(f".{weight.module}.") or weight.module == adapter.name
    return sites.role == (LOOKUP if weight.kind == "embedding" else PROJECTION)


def weights_of(
    path: str, shape: Sequence[int], names: Names, leaves: Collection[str]
) -> list[TorchWeight]:
    """Returns all PyTorch parameters that a leaf is; none where it has no PyTorch name."""
    try:
        own = names.to_torch(path, shape)
    except UnmappedError:
        return []
    return [*own, *(tied_to(path, own[0], names, leaves) if len(own) == 1 else ())]


def tied_to(
    path: str, own: TorchWeight, names: Names, leaves: Collection[str]
) -> list[TorchWeight]:
    """Returns the PyTorch parameters that are one tensor with a leaf's own."""
    found = []
    for name in dict.fromkeys(n for tie in names.ties if tie.path == path for n in tie.names):
        leaf, tied = names.to_flax(name)
        # Llama's and Mistral's Flax classes have a leaf for the head, tied or not; BART's decoder
        # has a table of its own only in the class without an encoder.
        if leaf == path or leaf not in leaves:
            found.append(
                dataclasses.replace(
                    own, module=tied.module, parameter=tied.parameter, kind=tied.kind
                )
            )
    return found


def leaf_of(name: str, names: Names, leaves: Collection[str]) -> tuple[str, TorchWeight]:
    """Returns the leaf of a PyTorch parameter, one of these leaves if it can be.

    Raises:
      UnmappedError: no line is for it.
    """
    path, weight = names.to_flax(name)
    if path not in leaves:
        for tie in names.ties:
            if name in tie.names and tie.path in leaves:
                own = names.own_weight(tie)
                return tie.path, dataclasses.replace(
                    own, module=weight.module, parameter=weight.parameter, kind=weight.kind
                )
    return path, weight


def _turned(weight: TorchWeight) -> TorchWeight:
    return dataclasses.replace(
        weight, dims=tuple(tuple(1 - axis for axis in axes) for axes in weight.dims)
    )


def slots_of(
    group: GroupPlan, adapter: AdapterPlan, weights: Sequence[TorchWeight], adapted: set[str]
) -> list[Slot]:
    """Returns the tensors that an adapter is in PEFT's file.

    Args:
      weights: the parameters that it is for.
      adapted: the modules that have factors, whose biases PEFT keeps under another name.

    Raises:
      ValueError: the factors' sides are not those of the PyTorch module.
    """
    slots: list[Slot] = []
    for weight in weights:
        module = PREFIX + weight.module if weight.module else PREFIX.rstrip(".")
        if adapter.kind == LORA:
            slots += _factor_slots(group, adapter, weight, module)
        elif adapter.kind == MODULES_TO_SAVE:
            slots.append(_slot(group, adapter, weight, f"{module}.{weight.parameter}", weight.dims))
        elif adapter.kind == BIAS:
            inner = ".base_layer" if weight.module in adapted else ""
            name = f"{module}{inner}.{weight.parameter}"
            slots.append(_slot(group, adapter, weight, name, weight.dims))
        else:
            rows, *columns = weight.dims if weight.kind != "conv1d" else weight.dims[::-1]
            if rows != (group.token_axis,):
                raise ValueError(
                    f"{adapter.key!r}: tokens are along axis {group.token_axis} of the leaf, and "
                    f"{weight.name!r} has them along {rows}"
                )
            name = f"{module}.token_adapter.trainable_tokens_delta"
            slots.append(_slot(group, adapter, weight, name, ((RANK,), *columns)))
    return slots


def _factor_slots(
    group: GroupPlan, adapter: AdapterPlan, weight: TorchWeight, module: str
) -> list[Slot]:
    if weight.kind == "embedding":
        inputs, outputs = weight.dims[:1], weight.dims[1:]
        names = f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    elif weight.kind in ("linear", "conv1d", "conv"):
        inputs, outputs = weight.dims[1:], weight.dims[:1]
        if weight.kind == "conv1d":
            inputs, outputs = outputs, inputs
        names = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    else:
        raise ValueError(
            f"{adapter.key!r} is {weight.name!r} in PyTorch, a {weight.kind}, for which PEFT's "
            "files are not written or read here; merge it, or leave it out of the targets"
        )
    sides = {axis for axes in inputs for axis in axes}, {axis for axes in outputs for axis in axes}
    sliced = {axis for axis, _ in weight.part} | set(group.batch)
    rows, cols = set(group.rows) - sliced, set(group.cols) - sliced
    if (rows, cols) == sides:
        near, far = "lora_a", "lora_b"
    elif (cols, rows) == sides and not adapter.dora:
        near, far = "lora_b", "lora_a"
    else:
        raise ValueError(
            f"{adapter.key!r} has rows {group.rows} and columns {group.cols}, and {weight.name!r} "
            f"has inputs {inputs} and outputs {outputs} of the leaf's axes; wrap with the model's "
            "call sites (sites=...), so that rows are what is summed over"
        )
    units = [()] * (len(inputs) - 1) if weight.kind == "conv" else []
    slots = [
        _slot(group, adapter, weight, names[0], ((RANK,), *inputs), near),
        _slot(group, adapter, weight, names[1], (*outputs, (RANK,), *units), far),
    ]
    if adapter.dora:
        name = f"{module}.lora_magnitude_vector"
        lead = [()] if units else []
        slots.append(
            _slot(group, adapter, weight, name, (*lead, *outputs, *units), "lora_magnitude")
        )
    return slots


def _slot(
    group: GroupPlan, adapter: AdapterPlan, weight: TorchWeight, name: str,
    dims: Sequence[Sequence[Any]], array: str = "",
) -> Slot:  # fmt: skip
    axes, shape = group.axes(adapter)[array], group.shapes(adapter)[array]
    part = dict(weight.part)
    if adapter.span is not None and adapter.span[0] in part:
        part[adapter.span[0]] -= adapter.span[1]
    index = tuple(part.get(axis, slice(None)) for axis in axes)
    left = [axis for axis in axes if axis not in part]
    size = dict(zip(axes, shape, strict=True))
    order = [axis for group_ in dims for axis in group_]
    return Slot(
        weight.module,
        name,
        array,
        index,
        tuple(left.index(axis) for axis in order),
        tuple(size[axis] for axis in order),
        tuple(math.prod(size[axis] for axis in group_) for group_ in dims),
    )

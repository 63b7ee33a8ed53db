"""Which PyTorch parameters a leaf is, and which ones an adapter is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION
from flax_tied_lora._names.layout import MATRIX, TorchWeight, to_torch_array
from flax_tied_lora._names.mapping import Names, UnmappedError
from flax_tied_lora._planning.plan import AdapterPlan, GroupPlan
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import is_marker
from flax_tied_lora._tree.quantized_array import plain_array


@dataclasses.dataclass(frozen=True)
class TorchAdapter:
    """An adapter, and the PyTorch parameters that it is for."""

    group: GroupPlan
    adapter: AdapterPlan
    weights: tuple[TorchWeight, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the parameters' modules, each once."""
        return list(dict.fromkeys(w.module for w in self.weights))


def parameters_of_adapter(
    group: GroupPlan, adapter: AdapterPlan, names: Names, paths: Collection[str]
) -> list[TorchWeight]:
    """Returns the PyTorch parameters that an adapter is for, in axes of the group's stored leaf.

    Args:
      paths: of all leaves of the params.

    Raises:
      UnmappedError: a leaf has no PyTorch name.
      ValueError: the adapter is for call sites, or a part of a leaf, that no PyTorch module has.
    """
    weights: list[TorchWeight] = []
    for member in group.members:
        if not adapter.covers(member.path):
            continue
        shape = group.shape[::-1] if member.transposed else group.shape
        of_member = [with_kind(w, group, member.path) for w in names.to_torch(member.path, shape)]
        if len(of_member) == 1 and not adapter.members:
            of_member += _tied_parameters(member.path, of_member[0], names, paths)
        weights += [_transposed(w) if member.transposed else w for w in of_member]
    if adapter.span is not None:
        weights = [w for w in weights if _is_inside(w, adapter.span)]
        if not weights:
            raise ValueError(
                f"{adapter.key!r} is for a part of {group.key!r} that is no module of its own in "
                "PyTorch; merge it, or wrap without parts"
            )
    if adapter.sites is not None:
        weights = [w for w in weights if _is_meant(w, adapter)]
        if not weights:
            raise ValueError(
                f"{adapter.key!r} is for call sites of {group.key!r} that are no module of their "
                "own in PyTorch"
            )
    return list({w.name: w for w in weights}.values())


def with_kind(weight: TorchWeight, group: GroupPlan | None, path: str) -> TorchWeight:
    """Returns a parameter whose kind the table of names leaves open, with that of its call sites.

    Args:
      group: of the leaf, where the plan has one.
      path: of the leaf.
    """
    role = None if group is None else dict(group.roles).get(path)
    if weight.kind != MATRIX or role is None:
        return weight
    return dataclasses.replace(weight, kind="embedding" if role == LOOKUP else "linear")


def parameters_of_leaf(
    path: str, shape: Sequence[int], names: Names, paths: Collection[str]
) -> list[TorchWeight]:
    """Returns all PyTorch parameters that a leaf is, by its line first; [] where it has no name."""
    try:
        weights = names.to_torch(path, shape)
    except UnmappedError:
        return []
    tied = _tied_parameters(path, weights[0], names, paths) if len(weights) == 1 else ()
    return [*weights, *tied]


def parameters_of_leaves(leaves: Mapping[str, Any], names: Names) -> dict[str, list[TorchWeight]]:
    """Returns `parameters_of_leaf` of every leaf that is stored, by path."""
    return {
        path: parameters_of_leaf(path, unboxed(leaf).shape, names, leaves)
        for path, leaf in leaves.items()
        if not is_marker(leaf)
    }


def leaf_of_parameter(name: str, names: Names, paths: Collection[str]) -> tuple[str, TorchWeight]:
    """Returns the path of a PyTorch parameter's leaf, one of the given ones if it can be.

    Raises:
      UnmappedError: no line of the table of names fits it.
    """
    path, weight = names.to_flax(name)
    if path not in paths:
        for tie in names.ties:
            if name in tie.names and tie.path in paths:
                return tie.path, _renamed(names.own_weight(tie), weight)
    return path, weight


def torch_array(leaf: Any, weight: TorchWeight) -> np.ndarray:
    """Returns a leaf, or the slice of it, as a PyTorch parameter on the host, dequantised."""
    return to_torch_array(jax.device_get(plain_array(unboxed(leaf))), weight)


def _tied_parameters(
    path: str, weight: TorchWeight, names: Names, paths: Collection[str]
) -> list[TorchWeight]:
    """Returns the other PyTorch parameters that are one tensor with a leaf's."""
    result = []
    for name in dict.fromkeys(n for tie in names.ties if tie.path == path for n in tie.names):
        leaf, tied = names.to_flax(name)
        # Llama's and Mistral's Flax classes have a leaf for the head, tied or not; BART's decoder
        # has its own table only in the class without an encoder.
        if leaf == path or leaf not in paths:
            result.append(_renamed(weight, tied))
    return result


def _renamed(weight: TorchWeight, other: TorchWeight) -> TorchWeight:
    """Returns a parameter's place in a leaf, under the name and kind of another."""
    kind = weight.kind if other.kind == MATRIX else other.kind
    return dataclasses.replace(weight, module=other.module, parameter=other.parameter, kind=kind)


def _transposed(weight: TorchWeight) -> TorchWeight:
    return weight.renumbered(lambda axis: 1 - axis)


def _is_inside(weight: TorchWeight, span: tuple[int, int, int]) -> bool:
    axis, start, stop = span
    return any(a == axis and start <= i < stop for a, i in weight.part)


def _is_meant(weight: TorchWeight, adapter: AdapterPlan) -> bool:
    """Returns whether a parameter's module is what an adapter for some call sites serves."""
    sites = adapter.sites
    assert sites is not None
    if sites.scope is not None:
        tail = sites.scope.replace("/", ".")
        return f".{tail}.".endswith(f".{weight.module}.") or weight.module == adapter.name
    if weight.kind == MATRIX:
        return True  # refused where it matters
    return sites.role == (LOOKUP if weight.kind == "embedding" else PROJECTION)

"""The ties of a merged model: which tensors are stored once, and what `untie` changes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from flax_tied_lora._algebra.site_filter import PROJECTION
from flax_tied_lora._names.layout import MATRIX, TorchWeight
from flax_tied_lora._names.line import make_line
from flax_tied_lora._names.mapping import LOOKUPS, Names, UnmappedError
from flax_tied_lora._peft.input_embedding import ParametersByName
from flax_tied_lora._peft.merged.leaves import Leaf
from flax_tied_lora._planning.naming import ROLES
from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._tree.paths import leaf_name


def parameters_by_name(
    leaves: Mapping[str, Leaf], names: Names
) -> dict[str, tuple[str, TorchWeight]]:
    """Returns ``{PyTorch name: (path of its leaf, where in the leaf)}`` of all leaves.

    Raises:
      UnmappedError: a leaf has no PyTorch name.
    """
    return {
        weight.name: (path, weight)
        for path, leaf in leaves.items()
        for weight in names.to_torch(path, leaf.shape)
    }


def without_tied_copies(leaves: Mapping[str, Leaf], names: Names) -> dict[str, Leaf]:
    """Returns the leaves without those that the names tie to another one.

    Raises:
      ValueError: two leaves are tied by the names, and are not equal.
    """
    kept, parameters = dict(leaves), parameters_by_name(leaves, names)
    for tie in names.ties:
        for name in tie.names if tie.path in leaves else ():
            path, other = parameters.get(name, (tie.path, None))
            if path == tie.path or path not in kept or other is None or other.part:
                continue
            weight = names.own_weight(tie)
            if weight.shape(leaves[tie.path].shape) != other.shape(leaves[path].shape):
                continue  # state_entries raises the error
            one_array = leaves[path].identity == leaves[tie.path].identity
            one_array = one_array and weight.maps_by_axis == other.maps_by_axis
            if not one_array and not np.array_equal(
                leaves[tie.path].torch(weight), leaves[path].torch(other), equal_nan=True
            ):
                raise ValueError(
                    f"save_merged: {path!r} is not {tie.path!r}, which the names tie it to; tie "
                    f"them, wrap(..., ties=[({tie.path!r}, {path!r})]), or say "
                    "tie_word_embeddings=False in names_of and in the config"
                )
            del kept[path]
    return kept


def heads_of(names: Names, paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns ``{path: names of the output projections that the names tie to the leaf}``."""
    paths = set(paths)
    heads = {
        tie.path: [n for n in tie.names if _is_head(names, n)]
        for tie in names.ties
        if tie.path in paths
    }
    return {path: of_leaf for path, of_leaf in heads.items() if of_leaf}


def _is_head(names: Names, name: str) -> bool:
    return name.endswith(".weight") and names.to_flax(name)[1].kind == "linear"


def heads_beside(parameters: ParametersByName, leaves: Mapping[str, Leaf], table: str) -> list[str]:
    """Returns the names of output projections that are tensors beside the table.

    Raises:
      ValueError: one of them and the table are one array in the params.
    """
    path, weight = parameters[table]
    shape, heads = weight.shape(leaves[path].shape), []
    for name, (other, head) in parameters.items():
        linear = head.kind == "linear" or (
            head.kind == MATRIX and not head.module.endswith(LOOKUPS)
        )
        fits = linear and head.shape(leaves[other].shape) == shape
        if name == table or not fits or re.search(r"\d", name):
            continue
        if leaves[other].identity == leaves[path].identity:
            raise ValueError(
                f"save_merged: {other!r} and {path!r} are one array in the params, and the names "
                "say that they are two; give names_of and the config tie_word_embeddings=True"
            )
        heads.append(name)
    return heads


def lookups_beside(parameters: ParametersByName, names: Names) -> dict[str, str]:
    """Returns ``{name of a lookup: name of the stored table that it shares}``."""
    return {
        name: table.name
        for tie in names.ties
        if (table := names.own_weight(tie)).name in parameters and table.kind != "linear"
        for name in tie.names
        if name not in parameters and not _is_head(names, name)
    }


def untied_names(
    names: Names, leaves: Mapping[str, Leaf], untie: Mapping[str, str], plan: Plan
) -> Names:
    """Returns names in which output projections are not tied, and `untie`'s leaves have names.

    Raises:
      ValueError: a new leaf is for something else than the output projection.
      UnmappedError: a new leaf has no PyTorch name.
    """
    members = {m.path for g in plan.groups for m in g.members}
    heads = [name for of_leaf in heads_of(names, leaves).values() for name in of_leaf]
    ties = (
        dataclasses.replace(tie, names=tuple(n for n in tie.names if n not in heads))
        for tie in names.ties
    )
    result = dataclasses.replace(names, ties=tuple(tie for tie in ties if tie.names))
    for adapter, path in untie.items():
        if path not in members:
            _check_projection(adapter, path, plan)
        try:
            result.to_torch(path, leaves[path].shape)
        except UnmappedError:
            if len(set(heads)) != 1 or re.search(r"\d", path):
                raise
            layout = "in out -> out in" if leaf_name(path) == "kernel" else "out in -> out in"
            table = next(names.own_weight(tie) for tie in names.ties if heads[0] in tie.names)
            maps = {name: m[0] for name, m in zip(("out", "in"), table.maps_by_axis, strict=True)}
            line = make_line((path, heads[0], layout, "linear", maps))
            result = dataclasses.replace(result, extra=(*result.extra, line))
    return result


def _check_projection(name: str, path: str, plan: Plan) -> None:
    """Checks that an adapter, whose merged leaf gets the path, is the output projection's."""
    sites = [a.sites for _, a in plan.adapters() if a.name == name]
    role = sites[0].role if sites and sites[0] is not None else ROLES.get(name)
    if role != PROJECTION:
        raise ValueError(
            f"save_merged: untie={{{name!r}: {path!r}}} gives a copy to something else than the "
            "output projection, and a PyTorch model has one table for all of its lookups; name "
            'the projection: untie={"lm_head": ...}'
        )

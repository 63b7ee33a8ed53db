"""The ties of a merged model: what is stored once, and what `untie` gives a name of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from flax_tied_lora._algebra.site_filter import PROJECTION
from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._names.line import make_line
from flax_tied_lora._names.mapping import Names, UnmappedError
from flax_tied_lora._peft.merged.leaves import Leaf
from flax_tied_lora._peft.tables import Parameters
from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._planning.targets import ROLES
from flax_tied_lora._tree.paths import leaf_name


def parameters(leaves: Mapping[str, Leaf], names: Names) -> dict[str, tuple[str, TorchWeight]]:
    """Returns for each PyTorch name that a leaf is, or a slice of it, the leaf and the slice.

    Raises:
      UnmappedError: a leaf has none.
    """
    return {
        weight.name: (path, weight)
        for path, leaf in leaves.items()
        for weight in names.to_torch(path, leaf.shape)
    }


def stored_once(leaves: Mapping[str, Leaf], names: Names) -> dict[str, Leaf]:
    """Returns the leaves without those that the names tie to another one.

    Raises:
      ValueError: two leaves are tied by the names, and are not equal.
    """
    kept, made = dict(leaves), parameters(leaves, names)
    for tie in names.ties:
        for name in tie.names if tie.path in leaves else ():
            path, other = made.get(name, (tie.path, None))
            if path == tie.path or path not in kept or other is None or other.part:
                continue
            own = names.own_weight(tie)
            if own.shape(leaves[tie.path].shape) != other.shape(leaves[path].shape):
                continue  # state_entries says so
            if leaves[path].one != leaves[tie.path].one and not np.array_equal(
                leaves[tie.path].torch(own), leaves[path].torch(other), equal_nan=True
            ):
                raise ValueError(
                    f"save_merged: {path!r} is not {tie.path!r}, which the names tie it to; tie "
                    f"them, wrap(..., ties=[({tie.path!r}, {path!r})]), or say "
                    "tie_word_embeddings=False in names_of and in the config"
                )
            del kept[path]
    return kept


def heads_of(names: Names, paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns for each of some leaves the output projections that the names tie to it."""
    paths = set(paths)
    return {
        tie.path: found
        for tie in names.ties
        if tie.path in paths and (found := [n for n in tie.names if _is_head(names, n)])
    }


def _is_head(names: Names, name: str) -> bool:
    return name.endswith(".weight") and names.to_flax(name)[1].kind == "linear"


def heads_beside(made: Parameters, leaves: Mapping[str, Leaf], table: str) -> list[str]:
    """Returns the names of tensors that are output projections beside the table.

    Raises:
      ValueError: one of them and the table are one array in the params.
    """
    path, own = made[table]
    shape, heads = own.shape(leaves[path].shape), []
    for name, (other, weight) in made.items():
        fits = weight.kind == "linear" and weight.shape(leaves[other].shape) == shape
        if name == table or not fits or re.search(r"\d", name):
            continue
        if leaves[other].one == leaves[path].one:
            raise ValueError(
                f"save_merged: {other!r} and {path!r} are one array in the params, and the names "
                "say that they are two; give names_of and the config tie_word_embeddings=True"
            )
        heads.append(name)
    return heads


def lookups_beside(made: Parameters, names: Names) -> dict[str, str]:
    """Returns the names of lookups that share a stored table, each with the table's name."""
    return {
        name: own.name
        for tie in names.ties
        if (own := names.own_weight(tie)).name in made and own.kind == "embedding"
        for name in tie.names
        if name not in made and not _is_head(names, name)
    }


def untied_names(
    names: Names, leaves: Mapping[str, Leaf], untie: Mapping[str, str], plan: Plan
) -> Names:
    """Returns the names without the ties of output projections, each with a leaf of its own.

    Raises:
      ValueError: a new leaf is for something else than the output projection.
      UnmappedError: a new leaf has no PyTorch name.
    """
    before = {m.path for g in plan.groups for m in g.members}
    heads = [name for found in heads_of(names, leaves).values() for name in found]
    ties = (
        dataclasses.replace(tie, names=tuple(n for n in tie.names if n not in heads))
        for tie in names.ties
    )
    result = dataclasses.replace(names, ties=tuple(tie for tie in ties if tie.names))
    for part, path in untie.items():
        if path not in before:
            _check_projection(part, path, plan)
        try:
            result.to_torch(path, leaves[path].shape)
        except UnmappedError:
            if len(set(heads)) != 1 or re.search(r"\d", path):
                raise
            layout = "in out -> out in" if leaf_name(path) == "kernel" else "out in -> out in"
            line = make_line((path, heads[0], layout, "linear"))
            result = dataclasses.replace(result, extra=(*result.extra, line))
    return result


def _check_projection(part: str, path: str, plan: Plan) -> None:
    sites = [a.sites for _, a in plan.adapters() if a.name == part]
    role = sites[0].role if sites and sites[0] is not None else ROLES.get(part)
    if role != PROJECTION:
        raise ValueError(
            f"save_merged: untie={{{part!r}: {path!r}}} gives a copy to something else than the "
            "output projection, and a PyTorch model has one table for all of its lookups; name "
            'the projection: untie={"lm_head": ...}'
        )

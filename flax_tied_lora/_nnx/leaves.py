"""The params of an NNX module by path; one Variable may have several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._tree.paths import describe, is_leaf, nearby, path_name

# What can be adapted: nnx.Param, and not what another LoRA trains.
PARAM = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
_Path = tuple[Any, ...]


def name_of(path: Sequence[Any]) -> str:
    """Returns the name of a Variable's path: its entries joined by ``/``."""
    return "/".join(map(str, path))


def named(state: Any) -> tuple[list[str], list[Any], Any]:
    """Returns the names of a state's leaves, the leaves, and its structure."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)
    return [path_name(path) for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def variables_of(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the params of a module, each Variable once, by the first of its paths."""
    paths = nnx.to_flat_state(nnx.state(module, PARAM)).paths
    wanted = set(paths)
    return {name_of(p): x for p, x in nnx.iter_graph(module) if p in wanted}


def aliases_of(module: nnx.Module) -> dict[str, str]:
    """Returns the other paths of Variables that a module reaches by several, and the first of each.

    A shared submodule gives each Variable in it a path more.
    """
    shared = {paths[0]: paths[1:] for paths in nnx.find_duplicates(module)}

    def others(path: _Path, via: frozenset[_Path] = frozenset()) -> list[_Path]:
        """Returns all paths of a node but its first; ``via`` keeps cycles from going round."""
        if not path or path in via:
            return []
        found, via = [], via | {path}
        for own in (path, *shared.get(path, ())):
            if own[: len(path)] == path and own != path:
                continue  # by way of itself
            found.append(own)
            found += [(*above, own[-1]) for above in others(own[:-1], via)]
        return found[1:]

    return {
        name_of(other): name_of(path)
        for path in nnx.to_flat_state(nnx.state(module, PARAM)).paths
        for other in others(path)
    }


def params_of(module: nnx.Module) -> dict[str, Any]:
    """Returns the params of a module as nested dicts of arrays, under every path that they have."""
    leaves = {name: x.get_raw_value() for name, x in variables_of(module).items()}
    return nested(leaves | {name: leaves[first] for name, first in aliases_of(module).items()})


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts of leaves by path."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        here = tree
        for entry in above:
            here = here.setdefault(entry, {})
        here[last] = leaf
    return tree


def check_aliases(what: str, plan: Plan, aliases: Mapping[str, str]) -> None:
    """Refuses a plan that treats the paths of one Variable differently.

    Raises:
      ValueError: it does.
    """
    places = {m.path: (g, m) for g in plan.groups for m in g.members}
    for other, first in aliases.items():
        group, member = places.get(first, (None, None))
        another, same = places.get(other, (None, None))
        apart = group is not another or (
            group is not None
            and (
                member.transposed != same.transposed  # type: ignore[union-attr]
                or any(a.covers(first) != a.covers(other) for a in group.adapters)
            )
        )
        if apart:
            raise ValueError(
                f"{what}: {other!r} and {first!r} are one nnx.Variable, and would get adapters of "
                "their own; tie them (ensure_weight_tying=None or True, no tie_word_embeddings="
                "False), or give the module a second one before: nnx.Param(variable.get_value()), "
                "or nnx.clone of a shared submodule. The array may stay one"
            )


def shown_as(plan: Plan, aliases: Mapping[str, str]) -> dict[str, str]:
    """Returns for the first path of a Variable the one that its group is shown by, if another."""
    shown: dict[str, str] = {}
    for group in plan.groups:
        for member in group.members:
            shown.setdefault(aliases.get(member.path, member.path), member.path)
    return {first: name for first, name in shown.items() if first != name}


def set_leaves(what: str, module: nnx.Module, leaves: Mapping[str, Any]) -> None:
    """Sets the params of a module, by path; those that are the same array are not touched.

    Raises:
      ValueError: there is no such param, or one Variable would be two arrays.
    """
    variables, aliases = variables_of(module), aliases_of(module)
    for name, leaf in leaves.items():
        first = aliases.get(name, name)
        if first not in variables:
            raise ValueError(
                f"{what}: the module has no nnx.Param at {name!r}, where a leaf belongs; expected "
                f"one of {', '.join(map(repr, nearby(name, variables)))}. Give the module one"
            )
        if first != name and leaf is not leaves.get(first, leaf):
            raise ValueError(
                f"{what}: {name!r} and {first!r} are one nnx.Variable, and would be two arrays; "
                "give the module two Variables before wrap"
            )
    for name, variable in variables.items():
        leaf = leaves.get(name)
        if leaf is not None and leaf is not variable.get_raw_value():
            _check_shape(what, name, variable, leaf)
            variable.set_value(leaf)


def _check_shape(what: str, name: str, variable: nnx.Variable, leaf: Any) -> None:
    found, expected = leaf.shape, variable.get_raw_value().shape
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"{what}: {name!r} is {describe(leaf)}; the module has "
            f"{describe(variable.get_raw_value())} there. Use the module that it was made for"
        )

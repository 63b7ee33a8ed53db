"""The params of an NNX module by path; one Variable may have several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._tree.paths import describe, named_leaves, nearby, path_name

# What can be adapted: nnx.Param, and not what another LoRA trains.
PARAM = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
_Path = tuple[Any, ...]


def name_of(path: Sequence[Any]) -> str:
    """Returns the name of a Variable's path: its entries joined by ``/``."""
    return "/".join(map(str, path))


def named(state: Any) -> tuple[list[str], list[Any], Any]:
    """Returns the names of a state's leaves, the leaves, and its structure."""
    pairs, treedef = named_leaves(state)
    return [path_name(path) for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def variables_of(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the params of a module, each Variable once, by the first of its paths."""
    paths = nnx.to_flat_state(nnx.state(module, PARAM)).paths
    wanted = set(paths)
    return {name_of(p): x for p, x in nnx.iter_graph(module) if p in wanted}


def aliases_of(module: nnx.Module) -> dict[str, str]:
    """Returns ``{other path: first path}`` of the Variables that a module reaches by several paths.

    A shared submodule gives each Variable in it another path.
    """
    shared = {paths[0]: paths[1:] for paths in nnx.find_duplicates(module)}

    def others(path: _Path, via: frozenset[_Path] = frozenset()) -> list[_Path]:
        """Returns all paths of a node but its first; ``via`` are the nodes that led to it."""
        if not path or path in via:
            return []
        paths, via = [], via | {path}
        for known in (path, *shared.get(path, ())):
            if known[: len(path)] == path and known != path:
                continue  # by way of the node itself
            paths.append(known)
            paths += [(*parent, known[-1]) for parent in others(known[:-1], via)]
        return paths[1:]

    return {
        name_of(other): name_of(path)
        for path in nnx.to_flat_state(nnx.state(module, PARAM)).paths
        for other in others(path)
    }


def params_of(module: nnx.Module) -> dict[str, Any]:
    """Returns the params of a module as nested dicts, each array under every path that it has."""
    leaves = {name: x.get_raw_value() for name, x in variables_of(module).items()}
    return _nested(leaves | {name: leaves[first] for name, first in aliases_of(module).items()})


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts of leaves by path."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def check_aliases(what: str, plan: Plan, aliases: Mapping[str, str]) -> None:
    """Checks that a plan treats all paths of one Variable alike.

    Raises:
      ValueError: it does not.
    """
    members = {m.path: (g, m) for g in plan.groups for m in g.members}
    for other, first in aliases.items():
        group, member = members.get(first, (None, None))
        other_group, other_member = members.get(other, (None, None))
        differ = group is not other_group or (
            group is not None
            and (
                member.transposed != other_member.transposed  # type: ignore[union-attr]
                or any(a.covers(first) != a.covers(other) for a in group.adapters)
            )
        )
        if differ:
            raise ValueError(
                f"{what}: {other!r} and {first!r} are one nnx.Variable, and would get adapters of "
                "their own; tie them (ensure_weight_tying=None or True, no tie_word_embeddings="
                "False), or give the module a second one before: nnx.Param(variable.get_value()), "
                "or nnx.clone of a shared submodule. The array may stay one"
            )


def shown_as(plan: Plan, aliases: Mapping[str, str]) -> dict[str, str]:
    """Returns ``{first path of a Variable: path that its group has it by}`` where these differ."""
    shown: dict[str, str] = {}
    for group in plan.groups:
        for member in group.members:
            shown.setdefault(aliases.get(member.path, member.path), member.path)
    return {first: name for first, name in shown.items() if first != name}


def set_leaves(what: str, module: nnx.Module, leaves: Mapping[str, Any]) -> None:
    """Sets the params of a module, by path; a Variable that has the array already is not touched.

    Raises:
      ValueError: the module has no such param, or one Variable would be two arrays.
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
    current = variable.get_raw_value()
    if tuple(leaf.shape) != tuple(current.shape):
        raise ValueError(
            f"{what}: {name!r} is {describe(leaf)}; the module has "
            f"{describe(current)} there. Use the module that it was made for"
        )

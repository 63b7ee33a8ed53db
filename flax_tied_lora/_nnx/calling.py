"""A method of a module, run with symbolic weights.

The module is taken apart outside of the trace and put together within, so that what the method
changes (running statistics, counts of random streams, caches, sown values, static fields) is
changed in a copy that belongs to the trace. What has changed is then written to the module itself.
A Variable that comes back as it went in is not touched, so that a module that is closed over can be
called wherever it changes nothing, as NNX has it; an adapted weight is never written at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._interpreter.inner import is_same
from flax_tied_lora._nnx.leaves import name_of, named
from flax_tied_lora._verbs.adapt import Evaluated, evaluated

_TAG = "flax_tied_lora"


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Stands for a leaf that came back as it went in.

    Attributes:
      index: of the leaf among those that went in.
    """

    index: int


@dataclasses.dataclass
class _After:
    """What a call left behind, as far as it is known while it is traced.

    Attributes:
      graphdef, treedef: of the module, the objects among the arguments and those in the result.
      names: of the state's leaves.
      same: whether the graph is what it was.
      result: what the call returned, around its objects and its other leaves.
    """

    graphdef: Any
    treedef: Any
    names: list[str]
    same: bool
    result: _Apart


@dataclasses.dataclass
class _Apart:
    """A pytree, taken apart into the NNX objects in it and its other leaves."""

    objects: tuple[Any, ...]
    rest: list[Any]
    _treedef: Any
    _places: list[int]

    @classmethod
    def of(cls, tree: Any, kinds: tuple[type, ...]) -> _Apart:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, kinds))
        places = [i for i, x in enumerate(leaves) if isinstance(x, kinds)]
        rest = [x for i, x in enumerate(leaves) if i not in places]
        return cls(tuple(leaves[i] for i in places), rest, treedef, places)

    def filled(self, objects: Sequence[Any], rest: Sequence[Any]) -> Any:
        """Returns the pytree of other objects and leaves."""
        leaves = list(rest)
        for i, value in zip(self._places, objects, strict=True):
            leaves.insert(i, value)
        return jax.tree.unflatten(self._treedef, leaves)


def run(
    module: nnx.Module, adapted: Adapted, shown: Mapping[str, str], function: Callable[..., Any],
    evaluation: Context, args: Any, kwargs: Any,
) -> tuple[Any, Evaluated]:  # fmt: skip
    """Returns ``function(module, *args, **kwargs)`` on adapted weights; the module is updated.

    Args:
      module: with its frozen params.
      adapted: the groups that are adapted or tied, and what is stored quantised, by leaf path; its
        params are those of the module.
      shown: for paths of Variables, by which of their paths they are shown instead.

    Raises:
      ValueError: the call assigns to an adapted weight.
    """
    given = _Apart.of((args, kwargs), (nnx.Pytree, nnx.Variable))
    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as context:
            graphdef, state = context.split((module, given.objects))
        names, before, treedef = named(state)
        index = {name: i for i, name in enumerate(names)}
        # The module is the first object; where a Variable has several paths, it is shown by one.
        own = {n.partition("/")[2]: i for n, i in index.items() if n.partition("/")[0] == "0"}
        places = {shown.get(name, name): i for name, i in own.items()}
        traced: list[_After] = []

        def inside(params: Mapping[str, Any]) -> Any:
            values = list(before)
            for name, i in places.items():
                values[i] = params.get(name, values[i])
            with nnx.merge_context(_TAG, inner=True) as context:
                here, objects = context.merge(graphdef, jax.tree.unflatten(treedef, values))
            inner_args, inner_kwargs = given.filled(objects, given.rest)
            result = function(here, *inner_args, **inner_kwargs)
            known = {id(x): i for i, x in enumerate(values)}
            result = _in_variables(lambda x: _Kept(known[id(x)]) if id(x) in known else x, result)
            result = _Apart.of(result, (nnx.Pytree,))
            same = nnx.graphdef((here, objects)) == graphdef
            with nnx.split_context(_TAG) as context:
                new_graphdef, new_state = context.split((here, objects, result.objects))
            new_names, leaves, new_treedef = named(new_state)
            leaves = [
                _Kept(index[name]) if name in index and x is values[index[name]] else x
                for name, x in zip(new_names, leaves, strict=True)
            ]
            traced[:] = [_After(new_graphdef, new_treedef, new_names, same, result)]
            return result.rest, leaves

        done = evaluated(inside, evaluation, (adapted,), {})
        (after,), (rest, leaves) = traced, done.result
        leaves = _kept(leaves, after.names, index, places, done)
        changed = {n for n, x in zip(after.names, leaves, strict=True) if not isinstance(x, _Kept)}
        rest, leaves = (
            [before[x.index] if isinstance(x, _Kept) else x for x in xs] for xs in (rest, leaves)
        )
        new = jax.tree.unflatten(after.treedef, done.returned(leaves))
        objects = ()
        if after.same and not after.result.objects:
            _update((module, given.objects), new, changed)
        else:
            with nnx.merge_context(_TAG, inner=False) as context:
                _, _, objects = context.merge(after.graphdef, new)
    return after.result.filled(objects, done.returned(rest)), done


def _in_variables(change: Callable[[Any], Any], tree: Any) -> Any:
    """Returns a pytree with the arrays of its Variables changed, but those of modules."""
    return jax.tree.map(
        lambda x: jax.tree.map(change, x) if isinstance(x, nnx.Variable) else x, tree,
        is_leaf=lambda x: isinstance(x, nnx.Variable | nnx.Pytree),
    )  # fmt: skip


def _kept(
    leaves: Sequence[Any], names: Sequence[str], index: Mapping[str, int],
    places: Mapping[str, int], done: Evaluated,
) -> list[Any]:  # fmt: skip
    """Returns the state's leaves, with adapted weights that came back marked as kept.

    Raises:
      ValueError: one did not come back as it was.
    """
    weights = {places[name]: w for name, w in done.weights[0].items() if name in places}

    def kept(name: str, x: Any) -> Any:
        weight = weights.get(index.get(name, -1))
        # Its random keys were folded on the way through the program.
        return _Kept(index[name]) if weight is not None and is_same(x, weight) else x

    found = [kept(name, x) for name, x in zip(names, leaves, strict=True)]
    back = {x.index for x in found if isinstance(x, _Kept)}
    for name, i in places.items():
        if i in weights and i not in back:
            raise ValueError(
                f"adapt: the call assigns to {name!r}, which is adapted: its weight is frozen, and "
                "the sum of it and its delta has no place in it. Take it out of target_modules"
            )
    return found


def _update(node: Any, state: Any, changed: set[str]) -> None:
    """Writes what has changed, and nothing else."""
    flat = [
        (path, x) for path, x in nnx.to_flat_state(state)
        if any(f"{leaf}/".startswith(f"{name_of(path)}/") for leaf in changed)
    ]  # fmt: skip
    if flat:
        nnx.update(node, nnx.from_flat_state(flat))

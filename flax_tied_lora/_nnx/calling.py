"""`call_module`: a function of a module, evaluated with symbolic weights.

The module is split outside of the trace and merged within it, so that what the function changes
(running statistics, counts of random streams, caches, sown values, static fields) is changed in a
copy that belongs to the trace. What has changed is then written to the module itself. A Variable
that comes back as it went in is not touched, so that a module that a transformed function closes
over can be called where the call changes nothing, as elsewhere in NNX. An adapted weight is never
written.
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
class _Unchanged:
    """Stands for a leaf that came back as it went in.

    Attributes:
      index: of the leaf among those that went in.
    """

    index: int


@dataclasses.dataclass
class _Outcome:
    """What is static of a call's outcome, and known once the call is traced.

    Attributes:
      graphdef, treedef: of the module, the objects among the arguments and those in the result.
      names: of the state's leaves.
      same_graph: whether module and arguments have the graph that they had.
      result: what the call returned, split.
    """

    graphdef: Any
    treedef: Any
    names: list[str]
    same_graph: bool
    result: _Split


@dataclasses.dataclass
class _Split:
    """A pytree, split into the NNX objects in it and its other leaves."""

    objects: tuple[Any, ...]
    others: list[Any]
    _treedef: Any
    _places: list[int]

    @classmethod
    def of(cls, tree: Any, kinds: tuple[type, ...]) -> _Split:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, kinds))
        places = [i for i, x in enumerate(leaves) if isinstance(x, kinds)]
        others = [x for i, x in enumerate(leaves) if i not in places]
        return cls(tuple(leaves[i] for i in places), others, treedef, places)

    def merged(self, objects: Sequence[Any], others: Sequence[Any]) -> Any:
        """Returns the pytree with other objects and leaves in it."""
        leaves = list(others)
        for i, value in zip(self._places, objects, strict=True):
            leaves.insert(i, value)
        return jax.tree.unflatten(self._treedef, leaves)


def call_module(
    module: nnx.Module, adapted: Adapted, shown: Mapping[str, str], function: Callable[..., Any],
    evaluation: Context, args: Any, kwargs: Any,
) -> tuple[Any, Evaluated]:  # fmt: skip
    """Returns ``function(module, *args, **kwargs)`` on adapted weights; the module is updated.

    Args:
      module: with its frozen params.
      adapted: the module's params that are adapted, tied or stored quantised, by path.
      shown: ``{first path of a Variable: its path in adapted}`` where these differ.

    Returns:
      The result, and how it was evaluated.

    Raises:
      ValueError: the call assigns to an adapted weight.
    """
    arguments = _Split.of((args, kwargs), (nnx.Pytree, nnx.Variable))
    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as context:
            graphdef, state = context.split((module, arguments.objects))
        names, before, treedef = named(state)
        index = {name: i for i, name in enumerate(names)}
        # "0/" begins the names of the module's leaves: it is the first of what was split.
        of_module = {n.removeprefix("0/"): i for n, i in index.items() if n.startswith("0/")}
        places = {shown.get(name, name): i for name, i in of_module.items()}
        outcomes: list[_Outcome] = []

        def traced_call(params: Mapping[str, Any]) -> Any:
            values = list(before)
            for name, i in places.items():
                values[i] = params.get(name, values[i])
            with nnx.merge_context(_TAG, inner=True) as context:
                inner, objects = context.merge(graphdef, jax.tree.unflatten(treedef, values))
            inner_args, inner_kwargs = arguments.merged(objects, arguments.others)
            result = function(inner, *inner_args, **inner_kwargs)
            known = {id(x): i for i, x in enumerate(values)}
            result = _in_variables(
                lambda x: _Unchanged(known[id(x)]) if id(x) in known else x, result
            )
            result = _Split.of(result, (nnx.Pytree,))
            same_graph = nnx.graphdef((inner, objects)) == graphdef
            with nnx.split_context(_TAG) as context:
                new_graphdef, new_state = context.split((inner, objects, result.objects))
            new_names, leaves, new_treedef = named(new_state)
            leaves = [
                _Unchanged(index[name]) if name in index and x is values[index[name]] else x
                for name, x in zip(new_names, leaves, strict=True)
            ]
            outcomes[:] = [_Outcome(new_graphdef, new_treedef, new_names, same_graph, result)]
            return result.others, leaves

        done = evaluated(traced_call, evaluation, (adapted,), {})
        (outcome,), (others, leaves) = outcomes, done.result
        leaves = _with_weights_unchanged(leaves, outcome.names, index, places, done)
        named_leaves = zip(outcome.names, leaves, strict=True)
        changed = {n for n, x in named_leaves if not isinstance(x, _Unchanged)}
        others, leaves = (
            [before[x.index] if isinstance(x, _Unchanged) else x for x in xs]
            for xs in (others, leaves)
        )
        new_state = jax.tree.unflatten(outcome.treedef, done.returned(leaves))
        objects = ()
        if outcome.same_graph and not outcome.result.objects:
            _update((module, arguments.objects), new_state, changed)
        else:
            with nnx.merge_context(_TAG, inner=False) as context:
                _, _, objects = context.merge(outcome.graphdef, new_state)
    return outcome.result.merged(objects, done.returned(others)), done


def _in_variables(change: Callable[[Any], Any], tree: Any) -> Any:
    """Returns a pytree with the arrays of its Variables changed, except in modules."""
    return jax.tree.map(
        lambda x: jax.tree.map(change, x) if isinstance(x, nnx.Variable) else x, tree,
        is_leaf=lambda x: isinstance(x, nnx.Variable | nnx.Pytree),
    )  # fmt: skip


def _with_weights_unchanged(
    leaves: Sequence[Any], names: Sequence[str], index: Mapping[str, int],
    places: Mapping[str, int], done: Evaluated,
) -> list[Any]:  # fmt: skip
    """Returns the state's leaves, with adapted weights that came back marked as unchanged.

    Raises:
      ValueError: an adapted weight did not come back as it was.
    """
    weights = {places[name]: w for name, w in done.weights[0].items() if name in places}

    def marked(name: str, x: Any) -> Any:
        weight = weights.get(index.get(name, -1))
        # `is_same`, as the random keys of a weight are folded on its way through the program.
        return _Unchanged(index[name]) if weight is not None and is_same(x, weight) else x

    result = [marked(name, x) for name, x in zip(names, leaves, strict=True)]
    unchanged = {x.index for x in result if isinstance(x, _Unchanged)}
    for name, i in places.items():
        if i in weights and i not in unchanged:
            raise ValueError(
                f"adapt: the call assigns to {name!r}, which is adapted: its weight is frozen, and "
                "the sum of it and its delta has no place in it. Take it out of target_modules"
            )
    return result


def _update(node: Any, state: Any, changed: set[str]) -> None:
    """Writes the leaves of a state that have changed to the objects, and no others."""
    flat = [
        (path, x) for path, x in nnx.to_flat_state(state)
        if any(f"{leaf}/".startswith(f"{name_of(path)}/") for leaf in changed)
    ]  # fmt: skip
    if flat:
        nnx.update(node, nnx.from_flat_state(flat))

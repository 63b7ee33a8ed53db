"""`per_example`: a function of a batch, called with an adapter of its own for each example."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._adapters.adapted import Adapted, is_adapted
from flax_tied_lora._interpreter.tracing import filling
from flax_tied_lora._tree.paths import describe, path_name
from flax_tied_lora._verbs.adapt import is_opaque

_P = ParamSpec("_P")
_R = TypeVar("_R")


def per_example(fn: Callable[_P, _R], in_axes: Any = 0, out_axes: Any = 0) -> Callable[_P, _R]:
    """Returns ``fn`` mapped over a batch whose examples have selected adapters each.

    The result takes the arguments of ``fn``, with what `select` returned for [examples] slots where
    the `Adapted` goes. ``fn`` sees one example at a time, in a batch of one, and that example's
    adapter: `jax.vmap` makes batched products of it, so the frozen weights meet the whole batch at
    once, and only factors are gathered.

    Args:
      fn: a function of adapted params, as `adapt` returns it, or one that calls such a function.
        Its arguments and results have a batch axis.
      in_axes: as in `jax.vmap`, where the batch axis of arguments is: an integer, None for what all
        examples share, or a tuple with one of them, or a pytree of them, for each positional
        argument. Keyword arguments have it first. What has no axes (a cache's index, flags) is
        shared. Of [examples] typed random keys each example gets one.
      out_axes: the same for results. A result without axes is shared if no example has a part in
        it, as a cache's index, else there is one for each example.

    Raises:
      ValueError: no argument has an adapter for each example, or an array has another number of
        examples.

    Example::

      run = jax.jit(tied_lora.per_example(tied_lora.adapt(model.apply)))
      logits = run({"params": tied_lora.select(stacked, [0, 2, 1])}, tokens)  # tokens [3, length]
    """
    whole: Callable[..., Any] = fn

    @functools.wraps(fn, updated=())
    def mapped_fn(*args: Any, **kwargs: Any) -> Any:
        nodes, axes, outer = _arguments(in_axes, args, kwargs)
        sizes = {x.slot.shape[0] for _, x in nodes if _is_selected(x)}
        if len(sizes) != 1:
            raise ValueError(
                f"per_example: adapters for {' and '.join(map(str, sorted(sizes)))} examples"
                if sizes
                else "per_example: no argument has an adapter for each example; pass "
                "tied_lora.select(stacked, slots), with slots [examples], where the params went"
            )
        (count,) = sizes
        _check_sizes(nodes, axes, count)
        values = [x for _, x in nodes]
        places = [i for i, x in enumerate(values) if axes[i] is not None or _is_selected(x)]
        fill = filling(outer, values, places)
        results = _Results(out_axes)

        def one(number: Any, mapped: Sequence[Any]) -> Any:
            parts = [
                _of_example(values[i], axes[i], x, number)
                for i, x in zip(places, mapped, strict=True)
            ]
            args, kwargs = fill(parts)
            return results.of_example(whole(*args, **kwargs), number)

        mapped = [values[i].slot if _is_selected(values[i]) else values[i] for i in places]
        mapped_axes = [0 if axes[i] is None else axes[i] for i in places]
        mapped_results = jax.vmap(one, in_axes=(0, mapped_axes))(jnp.arange(count), mapped)
        return results.of_batch(mapped_results)

    return mapped_fn


def _is_selected(x: Any) -> bool:
    return isinstance(x, Adapted) and x.slot is not None and jnp.ndim(x.slot) == 1


def _arguments(
    in_axes: Any, args: Sequence[Any], kwargs: Any
) -> tuple[list[tuple[str, Any]], list[int | None], Any]:
    """Returns the parts of the arguments with their paths, the batch axis of each, and the rest."""
    if not isinstance(in_axes, tuple):
        in_axes = (in_axes,) * len(args)
    if len(in_axes) != len(args):
        raise ValueError(
            f"per_example: in_axes is for {len(in_axes)} positional arguments, and there are "
            f"{len(args)}; expected one entry for each, or one integer for all"
        )
    axes: list[int | None] = []
    nodes: list[tuple[str, Any]] = []

    def take(path: Any, axis: Any, part: Any) -> Any:
        # What all examples share stays the object that it is.
        leaf = is_opaque if axis is None else is_adapted
        pairs, treedef = jax.tree_util.tree_flatten_with_path(part, is_leaf=leaf)
        for inner, x in pairs:
            name = path_name((*path, *inner))
            axes.append(None)
            nodes.append((name, x))
            if axis is not None and not is_adapted(x) and getattr(x, "ndim", 0):
                axes[-1] = _axis(f"argument {name!r}", x, axis)
        return jax.tree.unflatten(treedef, [_Place()] * len(pairs))

    def is_entry(x: Any) -> bool:
        return x is None or is_adapted(x)  # as `adapter_axes` gives it

    taken = [
        jax.tree_util.tree_map_with_path(
            lambda p, axis, part, i=i: take((jax.tree_util.SequenceKey(i), *p), axis, part),
            axes_of_arg, arg, is_leaf=is_entry,
        )
        for i, (axes_of_arg, arg) in enumerate(zip(in_axes, args, strict=True))
    ]  # fmt: skip
    # In the order in which a dict is flattened.
    named = {k: take((jax.tree_util.DictKey(k),), 0, x) for k, x in sorted(kwargs.items())}
    return nodes, axes, jax.tree.structure((tuple(taken), named))


def _axis(what: str, x: Any, axis: int) -> int:
    """Returns an axis counted from the first one."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"per_example: {what} is {describe(x)}, which has no axis {axis}; say in in_axes or "
            "out_axes which axis is the batch, None if it has none"
        )
    return axis % x.ndim


class _Place:
    """Where a part of the arguments was."""


def _check_sizes(nodes: Sequence[tuple[str, Any]], axes: Sequence[int | None], count: int) -> None:
    for (path, x), axis in zip(nodes, axes, strict=True):
        if axis is not None and x.shape[axis] != count:
            raise ValueError(
                f"per_example: argument {path!r} is {describe(x)}; axis {axis} has "
                f"{x.shape[axis]} entries, and there are {count} examples. Say in in_axes which "
                "axis is the batch, None if it has none"
            )


def _of_example(whole: Any, axis: int | None, mapped: Any, number: Any) -> Any:
    """Returns one example's part of an argument, in a batch of one."""
    if isinstance(whole, Adapted):
        rng = None if whole.rng is None else jax.random.fold_in(whole.rng, number)
        return dataclasses.replace(whole, slot=mapped, rng=rng)
    if axis is None or jnp.issubdtype(mapped.dtype, jax.dtypes.prng_key):
        return mapped
    return lax.expand_dims(mapped, [axis])


@dataclasses.dataclass
class _Results:
    """Results on their way out of a mapped function: which are mapped, and along which axis."""

    axes: Any
    leaves: list[Any] = dataclasses.field(default_factory=list)
    places: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    treedef: Any = None

    def of_example(self, results: Any, number: jax.Array) -> list[Any]:
        """Returns the results that examples differ in, without their batch of one."""
        pairs, self.treedef = jax.tree_util.tree_flatten_with_path(results)
        axes: list[int | None] = []
        jax.tree.map(
            lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part))),
            self.axes, results, is_leaf=lambda x: x is None,
        )  # fmt: skip
        self.leaves[:], self.places[:], mapped = [], [], []
        for i, ((path, x), axis) in enumerate(zip(pairs, axes, strict=True)):
            shared, outside = _shared_among(x, number) if isinstance(x, jax.Array) else (True, x)
            self.leaves.append(outside if shared else None)
            if axis is None and not shared:
                raise ValueError(
                    f"per_example: result {path_name(path)!r} differs between examples, and "
                    "out_axes has None for it; give the axis of its batch"
                )
            if axis is not None and getattr(x, "ndim", 0):
                axis = _axis(f"result {path_name(path)!r}", x, axis)
                if x.shape[axis] != 1:
                    raise ValueError(
                        f"per_example: result {path_name(path)!r} of one example is "
                        f"{describe(x)}; axis {axis} is not a batch of one. Say in out_axes which "
                        "axis is the batch, None if it has none"
                    )
                x = lax.squeeze(x, [axis])
            elif shared:
                continue
            self.places.append((i, axis if axis is not None else 0))
            mapped.append(x)
        return mapped

    def of_batch(self, mapped: Sequence[Any]) -> Any:
        """Returns all results, the mapped ones with their batch where it belongs."""
        for (i, axis), x in zip(self.places, mapped, strict=True):
            self.leaves[i] = jnp.moveaxis(x, 0, axis)
        return jax.tree.unflatten(self.treedef, self.leaves)


def _shared_among(x: jax.Array, number: jax.Array) -> tuple[bool, jax.Array]:
    """Returns whether all examples of a `jax.vmap` share an array, and if so the array unmapped.

    Args:
      x: the array.
      number: of the example, which differs.
    """
    looks: list[tuple[bool, jax.Array]] = []

    @jax.custom_batching.custom_vmap
    def look(x: Any, number: Any) -> Any:
        return x

    @look.def_vmap
    def _(size: int, batched: Sequence[bool], x: Any, number: Any) -> Any:
        # The first to call is this `vmap`; one around it may follow.
        looks.append((not batched[0], x))
        return x, batched[0]

    look(x, number)
    return looks[0]

"""`trace`: which leaf is read where, how, and in what role, found on shapes alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._algebra.term import Dense
from flax_tied_lora._algebra.weight import Origin, Weight
from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._interpreter.evaluate import evaluate
from flax_tied_lora._interpreter.sites import CallSites, numbered, with_batch
from flax_tied_lora._interpreter.tracing import Calls, filling
from flax_tied_lora._tree.collector import collector_paused
from flax_tied_lora._tree.paths import named_leaves, path_name
from flax_tied_lora._tree.quantized_array import is_quantized


@collector_paused()
def trace(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> CallSites:
    """Returns the call sites of every parameter leaf in ``fn(*args, **kwargs)``.

    Nothing is computed: arrays may be given as `jax.ShapeDtypeStruct`. The params are the
    ``params`` collection of any argument, or the argument that is called so; where there is none,
    the one argument that is a pytree with floating-point arrays and not an array itself. A leaf's
    path is its path within the params.

    Args:
      fn: a function that takes plain params, for example ``model.apply``.
      *args: its arguments.
      **kwargs: its keyword arguments.

    Raises:
      ValueError: no params are found among the arguments, or several of them could be.

    Example::

      sites = tied_lora.trace(model.apply, {"params": params}, tokens)
      sites |= tied_lora.trace(model.apply, {"params": params}, tokens, method=model.encode)
      adapted = tied_lora.wrap(params, config, sites=sites)
    """
    places, treedef = named_leaves((args, kwargs), is_quantized)
    names = _parameter_names(fn, args, [path for path, _ in places], [leaf for _, leaf in places])
    leaves = [leaf for _, leaf in places]
    if not any(names):
        raise ValueError(
            "trace: found no params among the arguments: expected a 'params' collection, an "
            "argument named params, or a pytree of floating-point arrays"
        )
    traced = [i for i, (n, x) in enumerate(zip(names, leaves, strict=True)) if n or _abstract(x)]
    calls = Calls(fn, filling(treedef, leaves, traced))
    closed, _ = calls.jaxpr([_shape(leaves[i]) for i in traced])
    context = Context(on_dense="allow")

    def symbolic(*arrays: Any) -> None:
        weights = [
            _whole(names[i], array) if names[i] else array
            for i, array in zip(traced, arrays, strict=True)
        ]
        context.reads.clear()
        outputs = evaluate(context, closed, weights)
        for x in outputs:  # rows that were picked, and handed back
            if isinstance(x, Weight) and all(o.picked for o in x.origins):
                context.returned(x)

    jax.eval_shape(symbolic, *(_shape(leaves[i]) for i in traced))
    ndims = {names[i]: len(leaves[i].shape) for i in traced}
    return CallSites(tuple(r.site for r in with_batch(numbered(context.reads), ndims)))


def _whole(name: str, array: Any) -> Weight:
    axes = tuple((i,) for i in range(array.ndim))
    return Weight((Dense.of(array),), None, tuple(array.shape), array.dtype, (Origin(name, axes),))


def _abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _shape(leaf: Any) -> Any:
    if is_quantized(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf if _abstract(leaf) else jax.typeof(leaf)


def _is_parameter(leaf: Any) -> bool:
    known = isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    if not known and not is_quantized(leaf):
        return False
    return len(leaf.shape) > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _parameter_names(
    fn: Callable[..., Any], args: Sequence[Any], paths: Sequence[Any], leaves: Sequence[Any]
) -> list[str]:
    """Returns each leaf's path within the params, "" for what is no parameter."""
    entries = [path_name(path).split("/") for path in paths]
    called_params = _position_of_params(fn, args)

    def within(start: Callable[[list[str]], int | None]) -> list[str]:
        cuts = [start(e) for e in entries]
        return [
            "/".join(e[cut:]) if cut is not None and cut < len(e) and _is_parameter(leaf) else ""
            for e, cut, leaf in zip(entries, cuts, leaves, strict=True)
        ]

    # ["0", "<argument>", ...]: an argument; ["1", "<keyword>", ...]: a keyword argument.
    def collection(e: list[str]) -> int | None:
        called = e[:2] in (["1", "params"], ["0", called_params])
        if called and len(e) > 2:
            return 3 if e[2] == "params" and len(e) > 3 else 2
        return 3 if len(e) > 3 and e[2] == "params" else None

    names = within(collection)
    if any(names):
        return names
    candidates: dict[str, list[str]] = {}
    for argument in dict.fromkeys(tuple(e[:2]) for e in entries):
        of_argument = within(lambda e, a=argument: 2 if tuple(e[:2]) == a and len(e) > 2 else None)
        if any(of_argument):
            candidates["argument " + argument[1]] = of_argument
    if len(candidates) > 1:
        raise ValueError(
            f"trace: {' and '.join(candidates)} have floating-point arrays, and either could be "
            "the params: call the one that is so in the function, "
            "trace(lambda params, ...: fn(...), ...)"
        )
    return next(iter(candidates.values()), [""] * len(entries))


def _position_of_params(fn: Callable[..., Any], args: Sequence[Any]) -> str:
    """Returns the number of the positional argument that a function calls params; "" for none."""
    try:
        names = [
            p.name for p in inspect.signature(fn).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
    except (TypeError, ValueError):
        return ""
    return str(names.index("params")) if "params" in names[: len(args)] else ""

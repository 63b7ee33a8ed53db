"""Call sites of a module: `trace`, `explain`."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._nnx.checks import check_adapted_module, check_module
from flax_tied_lora._nnx.leaves import aliases_of, named, params_of
from flax_tied_lora._nnx.module import AdaptedModule, evaluated_call
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs.explain import Explanation, explained
from flax_tied_lora._verbs.trace import trace as _trace

Method = str | Callable[..., Any] | None


def trace(module: nnx.Module, *args: Any, method: Method = None, **kwargs: Any) -> CallSites:
    """Returns the call sites of every param in a call of a module.

    Nothing is computed and the module is not changed: it and the arguments may be abstract.

    Args:
      module: a plain module, or an adapted one, whose frozen module is meant.
      *args: the call's arguments.
      method: what is called: the name of a method (``"encode"``, ``"embed.attend"``), or a function
        of the module and the arguments; default ``__call__``.
      **kwargs: the call's keyword arguments.

    Example::

      sites = tied_lora.nnx.trace(model, tokens)
      adapted = tied_lora.nnx.wrap(model, config, sites=sites)
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    check_module("trace", module)
    function = _function("trace", module, method)
    graphdef, state = nnx.split(module)
    names, values, treedef = named(state)
    own, _ = flatten(params_of(module))
    leaves = dict(zip(names, values, strict=True))
    rest = {name: leaf for name, leaf in leaves.items() if name not in own}

    def run(variables: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        values = {**rest, **variables["params"]}
        here = nnx.merge(graphdef, jax.tree.unflatten(treedef, [values[n] for n in names]))
        return function(here, *args, **kwargs)

    given = {name: leaf for name, leaf in leaves.items() if name in own}
    return _trace(run, {"params": given}, rest, args, kwargs)


def explain(module: AdaptedModule, *args: Any, method: Method = None, **kwargs: Any) -> Explanation:
    """Returns every call site of every adapted group in a call, and how each is served.

    Nothing is computed and the module is not changed: it and the arguments may be abstract. A
    Variable with several paths is shown by the one that is its group's key.

    Args:
      module: an adapted module.
      *args, method, **kwargs: as in `trace`.

    Raises:
      TypeError: not an adapted module.

    Example::

      tied_lora.nnx.explain(adapted, tokens).assert_tied()
    """
    check_adapted_module("explain", module)
    function = _function("explain", module.module, method)
    graphdef, state = nnx.split(module)

    def meet(given: Any, named: Any) -> Any:
        state, *rest = given
        here = nnx.merge(graphdef, state)
        _, done = evaluated_call(here, function, Context("allow", counts=True), rest, named)
        return done.context.reads, done.adapteds

    found, aliases = explained(meet, (state, *args), kwargs), aliases_of(module.module)
    groups = []
    for group in found.groups:
        # Which of its paths a Variable was read by cannot be told.
        members = {aliases.get(m.path, m.path): m for m in reversed(group.members)}
        kept = tuple(m for m in group.members if m in members.values())
        groups.append(dataclasses.replace(group, members=kept))
    return dataclasses.replace(found, groups=tuple(groups))


def _function(what: str, module: nnx.Module, method: Method) -> Callable[..., Any]:
    if method is None:
        return lambda module, *args, **kwargs: module(*args, **kwargs)
    if callable(method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"{what}: method is a {type(method).__name__}; expected a method's name, or a function "
            "of the module and the arguments"
        )
    find = operator.attrgetter(method)
    if not callable(find(module)):
        raise TypeError(f"{what}: {method!r} of {type(module).__name__} is no method")
    return lambda module, *args, **kwargs: find(module)(*args, **kwargs)

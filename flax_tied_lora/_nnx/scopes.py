"""Scopes of a module's calls: where in the graph, and in which method, an operation is.

Linen enters a scope of JAX's for each call of a method; NNX enters none. So for the time of a call
the modules of a copy, which belongs to the trace, are of subclasses of their classes, in which each
method enters its scope first. The classes themselves are not touched.
"""

from __future__ import annotations

import contextvars
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from flax_tied_lora._planning.plan import Plan

# An attribute of the copy, so that it goes into `nnx.scan` and `nnx.remat` with the module.
_PATH = "_flax_tied_lora_path"
# The path of the module whose method runs.
_INSIDE: contextvars.ContextVar[str] = contextvars.ContextVar("inside", default="")
# Each class's subclass with scopes, and back.
_SCOPED: dict[type, type] = {}
_PLAIN: dict[type, type] = {}


def with_scopes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of a module whose operations have scopes, as those of Linen's modules do.

    ``Model/embed.attend`` is in the method ``attend`` of the module at ``embed``; the first name is
    that of the class. The module has to belong to the trace. It is then as it was before.
    """

    def scoped(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        root = type(module).__name__
        for path, node in list(nnx.iter_graph(module)):
            if isinstance(node, nnx.Module):
                # Past the bookkeeping that NNX has of attributes.
                object.__setattr__(node, _PATH, "/".join(map(str, (root, *path))))
                object.__setattr__(node, "__class__", _scoped(type(node)))
        result = None
        try:
            result = function(module, *args, **kwargs)
        finally:
            for node in _modules((module, args, kwargs, result)):
                vars(node).pop(_PATH, None)
                object.__setattr__(node, "__class__", _PLAIN.get(type(node), type(node)))
        return result

    return scoped


def where_needed(plan: Plan, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with scopes if an adapter of a plan goes by them."""
    filters = [a.sites for _, a in plan.adapters() if a.sites is not None]
    by_scope = any(f.scope is not None for known in filters for f in (known, *known.others))
    return with_scopes(function) if by_scope else function


def _modules(tree: Any) -> Iterator[nnx.Module]:
    """Yields the modules in a pytree and in its objects."""
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Pytree)):
        if isinstance(x, nnx.Pytree):
            for _, node in list(nnx.iter_graph(x)):
                if isinstance(node, nnx.Module):
                    yield node


def _scoped(kind: type) -> type:
    """Returns the subclass of a class whose methods enter scopes; the class, if there can be none.

    A class that is told of its subclasses may keep count of them.
    """
    if kind in _SCOPED:
        return _SCOPED[kind]
    own = [k for k in kind.__mro__ if k not in nnx.Object.__mro__ and k is not nnx.Module]
    if type(kind) is not type(nnx.Module) or any("__init_subclass__" in vars(k) for k in own):
        return kind
    found = {name: value for k in reversed(own) for name, value in vars(k).items()}
    body = {name: _in_scope(name, value) for name, value in found.items() if _runs(name, value)}
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    is_pytree = not jax.tree_util.all_leaves([object.__new__(kind)])
    scoped = types.new_class(
        kind.__name__, (kind,), {"pytree": is_pytree}, lambda x: x.update(body)
    )
    _SCOPED[kind], _PLAIN[scoped] = scoped, kind
    return scoped


def _runs(name: str, value: Any) -> bool:
    """Returns whether an attribute of a class is a method, or what a transformation made of one."""
    if name.startswith("__") and name != "__call__":
        return False
    return (
        callable(value) and hasattr(value, "__get__") and not isinstance(value, type | staticmethod)
    )


def _in_scope(name: str, method: Any) -> Callable[..., Any]:
    @functools.wraps(method, updated=())
    def entering(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = method.__get__(self, type(self))
        path, inside = getattr(self, "__dict__", {}).get(_PATH, ""), _INSIDE.get()
        if not path:  # made within the call; or a function of the class, called with anything
            return bound(*args, **kwargs)
        # A method that a module calls of itself is on Linen's name stack once more.
        scope = path.rpartition("/")[2] if path == inside else path.removeprefix(inside + "/")
        before = _INSIDE.set(path)
        try:
            with jax.named_scope(scope if name == "__call__" else f"{scope}.{name}"):
                return bound(*args, **kwargs)
        finally:
            _INSIDE.reset(before)

    return entering

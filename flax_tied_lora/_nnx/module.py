"""`AdaptedModule`: an `nnx.Module` around a module, which is called like the module was."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic

import jax
import jax.numpy as jnp
from flax import nnx
from typing_extensions import TypeVar

from flax_tied_lora._adapters.adapted import Adapted, summary
from flax_tied_lora._interpreter.context import Context, OnDense
from flax_tied_lora._interpreter.materialised import warn_of_dense
from flax_tied_lora._interpreter.sites import numbered
from flax_tied_lora._nnx.calling import call_module
from flax_tied_lora._nnx.leaves import aliases_of, params_of, shown_as
from flax_tied_lora._nnx.scopes import where_needed
from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._tree.keys import typed_key
from flax_tied_lora._tree.paths import TiedLeaf, flatten
from flax_tied_lora._tree.quantized_array import is_quantized
from flax_tied_lora._verbs.adapt import Evaluated, warn_of_unread
from flax_tied_lora._verbs.wrap import stored_once

# The wrapper's attributes; all others are the module's.
_OF_WRAPPER = frozenset(
    {"module", "adapters", "lora_scaling", "lora_dropout", "lora_slot", "plan", "on_dense"}
)
# What NNX asks every node for: it asks the module inside, too, so the wrapper has none.
_OF_EVERY_NODE = frozenset({"set_view"})


class Scaling(nnx.Variable):
    """The scaling of a pair of factors: an array that is not trained."""


class Slot(nnx.Variable):
    """Which of the stacked adapters is used: an integer; -1 for none."""


class LoRADropout(nnx.Module):
    """The state of the factors' dropout: a random stream, and whether it is off."""

    def __init__(self, key: jax.Array):
        self.rngs = nnx.RngStream(key, tag="lora_dropout")
        self.deterministic = True

    def key(self) -> jax.Array | None:
        """Returns a random key for a call, or None where dropout is off."""
        return None if self.deterministic else self.rngs()

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode, for `nnx.view`."""
        if deterministic is not None:
            self.deterministic = deterministic


# What is adapted: any `nnx.Module`.
Adaptable = TypeVar("Adaptable", bound=nnx.Module, default=Any)


class AdaptedModule(nnx.Module, Generic[Adaptable]):
    """An `nnx.Module` with adapters: called like the module was, with its attributes and methods.

    It is an `nnx.Module`, so `nnx.jit`, `nnx.grad`, `nnx.Optimizer`, `nnx.split` and all other
    functions of NNX take it. Methods of the module, and of its submodules
    (``adapted.embed.attend(x)``), run with the adapters; attributes are the module's
    (``adapted.config``).

    Attributes:
      module: the module with its frozen params; call it for results without adapters.
      adapters: ``{kind: {key: ...}}`` as in `Adapted`, each array an `nnx.LoRAParam`.
      lora_scaling: ``{key: number}``, static; of stacked adapters ``{key: Scaling}``.
      lora_dropout: the state of the factors' dropout; None where the config has no dropout.
      lora_slot: which of the stacked adapters is used, a `Slot`; None where they are not stacked.
      plan: what was adapted; static.
      on_dense: as in `adapt`; static.
    """

    def __init__(
        self, module: Adaptable, adapters: Mapping[str, Any], scaling: Mapping[str, Any],
        dropout: LoRADropout | None, slot: Slot | None, plan: Plan,
    ):  # fmt: skip
        self.module = module
        self.adapters = nnx.data(adapters)
        self.lora_scaling = nnx.data(scaling)
        self.lora_dropout = nnx.data(dropout)
        self.lora_slot = nnx.data(slot)
        self.plan = plan
        self.on_dense: OnDense = "warn"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's result, with the adapters."""
        return _call(self, lambda module, *a, **k: module(*a, **k), args, kwargs, expect_all=True)

    def train(self, rng: jax.Array | None = None, **attributes: Any) -> None:
        """Sets the module to training mode, and the factors' dropout on.

        Args:
          rng: a key for the factors' dropout, in place of the one that `wrap` was given.
          **attributes: as in `nnx.Module.train`.
        """
        self.module.train(**attributes)
        if self.lora_dropout is not None:
            if rng is not None:
                key = typed_key("AdaptedModule.train", rng)
                self.lora_dropout.rngs = nnx.RngStream(key, tag="lora_dropout")
            self.lora_dropout.deterministic = False

    def eval(self, **attributes: Any) -> None:
        """Sets the module to evaluation mode, and the factors' dropout off."""
        self.module.eval(**attributes)
        if self.lora_dropout is not None:
            self.lora_dropout.deterministic = True

    def __getattr__(self, name: str) -> Any:
        if name in _OF_WRAPPER | _OF_EVERY_NODE or _is_dunder(name) or "module" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _attribute(self, self.module, lambda module: getattr(module, name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_WRAPPER or _is_dunder(name) or name.startswith("_pytree__"):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def __str__(self) -> str:
        return summary(as_adapted(self))


class AdaptedSubmodule:
    """A submodule, or a container of some, of an adapted module: methods run with the adapters.

    It is no `nnx.Module`; the frozen submodule is ``adapted.module.<path>``.
    """

    def __init__(self, owner: AdaptedModule, find: Callable[[Any], Any], name: str):
        vars(self).update(_owner=owner, _find=find, _name=name)

    def _inner(self, step: Callable[[Any], Any], name: str) -> Any:
        find, owner = self._find, self._owner
        name = f"{self._name}{name}"
        return _attribute(owner, self._frozen, lambda module: step(find(module)), name)

    @property
    def _frozen(self) -> Any:
        """The submodule itself."""
        return self._find(self._owner.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        find = self._find
        return _call(self._owner, lambda m, *a, **k: find(m)(*a, **k), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if _is_dunder(name):
            raise AttributeError(name)
        return self._inner(lambda x: getattr(x, name), f".{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._frozen, name, value)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        return self._inner(lambda x: x[key], f"[{key!r}]")

    def __len__(self) -> int:
        return len(self._frozen)

    def __iter__(self) -> Iterator[Any]:
        frozen = self._frozen
        if isinstance(frozen, Mapping | nnx.Dict):
            return iter(frozen)
        return (self[i] for i in range(len(frozen)))

    def __contains__(self, key: Any) -> bool:
        return key in self._frozen

    def __repr__(self) -> str:
        return f"{self._name} of an AdaptedModule: {self._frozen!r}"


def _call(
    owner: AdaptedModule, function: Callable[..., Any], args: Sequence[Any], kwargs: Any, *,
    expect_all: bool = False,
) -> Any:  # fmt: skip
    """Returns ``function(module, *args, **kwargs)`` with the adapters of a module.

    Args:
      expect_all: whether to warn of an adapter that is not used.
    """
    result, done = evaluated_call(owner, function, Context(owner.on_dense), args, kwargs)
    if owner.on_dense == "warn":
        warn_of_dense(numbered(done.context.reads), stacklevel=4)
    warn_of_unread(done.context.reads, done.adapteds, stacklevel=4, expect_all=expect_all)
    kinds = (nnx.Pytree, nnx.Variable)  # are not flattened
    return jax.tree.map(
        lambda x: owner if x is owner.module else x, result, is_leaf=lambda x: isinstance(x, kinds)
    )


def evaluated_call(
    owner: AdaptedModule, function: Callable[..., Any], context: Context, args: Any, kwargs: Any
) -> tuple[Any, Evaluated]:
    """Returns ``function(module, *args, **kwargs)`` with the adapters, and how it was evaluated."""
    shown = shown_as(owner.plan, aliases_of(owner.module))
    leaves, function = _symbolic_leaves(owner), where_needed(owner.plan, function)
    return call_module(owner.module, leaves, shown, function, context, tuple(args), dict(kwargs))


def _attribute(owner: AdaptedModule, parent: Any, find: Callable[[Any], Any], name: str) -> Any:
    """Returns an attribute or an item of the module, in which methods run with the adapters.

    Args:
      parent: what it is an attribute or an item of.
      find: returns it, given the module; also used on a copy within a trace.
      name: how it is reached from the module.
    """
    value = find(owner.module)
    if inspect.ismethod(value) and isinstance(value.__self__, nnx.Pytree):

        def method(self: AdaptedModule, *args: Any, **kwargs: Any) -> Any:
            return _call(self, lambda m, *a, **k: find(m)(*a, **k), args, kwargs)

        method.__name__, method.__doc__ = value.__name__, value.__doc__
        return types.MethodType(method, owner)
    if _holds_modules(value):
        return AdaptedSubmodule(owner, find, name)
    attribute = inspect.getattr_static(type(parent), name.rpartition(".")[2], None)
    if isinstance(attribute, property) and any(
        isinstance(x, jax.Array) for x in jax.tree.leaves(value)
    ):
        return _call(owner, find, (), {})  # computed from weights
    return value


def _holds_modules(value: Any) -> bool:
    """Returns whether a value is a module, or a container with one in it."""
    if isinstance(value, nnx.Module):
        return True
    if isinstance(value, nnx.Pytree | list | tuple | dict):
        return any(isinstance(x, nnx.Module) for _, x in nnx.iter_graph(value))
    return False


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _arrays(tree: Any) -> Any:
    """Returns a pytree of Variables as one of arrays."""
    return jax.tree.map(
        lambda x: x.get_raw_value() if isinstance(x, nnx.Variable) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def _symbolic_leaves(owner: AdaptedModule) -> Adapted:
    """Returns an `Adapted` with the params, by path, that a call replaces by symbolic weights.

    They are those of the plan's groups, and those that are stored quantised.
    """
    leaves, _ = flatten(params_of(owner.module))
    params = {path: leaf for path, leaf in leaves.items() if is_quantized(leaf)}
    for group in owner.plan.groups:
        for member in group.members:
            if member.path not in leaves:
                raise ValueError(
                    f"adapt: the module has no nnx.Param at {member.path!r} any more, which is "
                    "adapted; wrap the module again after changing its structure"
                )
            params[member.path] = (
                leaves[member.path] if member is group.members[0]
                else TiedLeaf(group.key, member.transposed)
            )  # fmt: skip
    rng = None if owner.lora_dropout is None else owner.lora_dropout.key()
    return _as_adapted(owner, params, rng)


def as_adapted(owner: AdaptedModule) -> Adapted:
    """Returns an adapted module's arrays and plan; see `nnx.adapted`."""
    leaves, treedef = flatten(params_of(owner.module))
    return _as_adapted(owner, stored_once(leaves, treedef, owner.plan), None)


def _as_adapted(owner: AdaptedModule, params: Any, rng: jax.Array | None) -> Adapted:
    adapters, scaling = _arrays(owner.adapters), _arrays(owner.lora_scaling)
    scaling = jax.tree.map(jnp.asarray, scaling)
    return Adapted(params, adapters, scaling, rng, owner.plan, _arrays(owner.lora_slot))

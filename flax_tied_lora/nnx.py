"""LoRA for `nnx.Module`: wrapped, called and trained as NNX has it.

`wrap` returns an `nnx.Module` that is called like the module was; its factors are `nnx.LoRAParam`.
Shared Variables and shared submodules are ties.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx

from flax_tied_lora import _merge, _quantize
from flax_tied_lora._adapted import Adapted
from flax_tied_lora._axes import SITES_LINE
from flax_tied_lora._config import LoraConfig
from flax_tied_lora._explain import Explanation, explained
from flax_tied_lora._factors import key_number, typed_key
from flax_tied_lora._nnx.leaves import aliases_of, check_aliases, named, params_of, set_leaves
from flax_tied_lora._nnx.making import boxed, with_aliases
from flax_tied_lora._nnx.module import AdaptedModule as AdaptedModule
from flax_tied_lora._nnx.module import LoRADropout as LoRADropout
from flax_tied_lora._nnx.module import Scaling as Scaling
from flax_tied_lora._nnx.module import Slot as Slot
from flax_tied_lora._nnx.module import as_adapted, evaluated_call
from flax_tied_lora._paths import flatten
from flax_tied_lora._sites import CallSites
from flax_tied_lora._trace import trace as _trace
from flax_tied_lora._wrap import wrap_as

Method = str | Callable[..., Any] | None


def wrap(
    module: nnx.Module,
    config: LoraConfig,
    *,
    sites: CallSites | None = None,
    ties: Any = "auto",
    rng: Any = None,
) -> AdaptedModule:
    """Returns a module with LoRA factors for every tie group that the config targets.

    Targets are matched against the paths of the module's `nnx.Param` Variables. A Variable that is
    reached by several paths (a shared Variable, a Variable of a shared submodule) is one tie group
    with one pair of factors, named by any of them. The module is left as it is: the result has
    Variables of its own, and shares their arrays.

    Args:
      module: any `nnx.Module`, abstract ones (`nnx.eval_shape`) too.
      config, sites, ties: as in `tied_lora.wrap`; sites are from `trace`.
      rng: a key, an `nnx.Rngs` or an `nnx.RngStream` for the factors and their dropout.

    Raises:
      TypeError: not an `nnx.Module`, or adapted already.
      ValueError: as `tied_lora.wrap`; or the paths of one Variable would get adapters of their own.

    Example::

      adapted = tied_lora.nnx.wrap(model, config)
      optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=nnx.LoRAParam)
      logits = adapted(tokens)
    """
    _check_module("wrap", module)
    rng = rng() if isinstance(rng, nnx.Rngs | nnx.RngStream) else rng
    module = nnx.clone(module)
    params = params_of(module)
    ties = with_aliases(params, aliases_of(module), ties)
    try:
        adapted = wrap_as(config, params, None, sites=sites, ties=ties, rng=rng)
    except ValueError as error:
        if sites is None and SITES_LINE in str(error):
            error.add_note("For an nnx.Module: sites = tied_lora.nnx.trace(module, tokens)")
        raise
    return _assembled("wrap", module, adapted, rng)


def from_adapted(module: nnx.Module, adapted: Adapted) -> AdaptedModule:
    """Returns a module with the adapters of an `Adapted` of its params, and with these params.

    For what `peft.load_adapter`, `checkpoint.restore`, `arithmetic` and `select` return; the params
    that they take are `params`'s.

    Raises:
      TypeError: not an `nnx.Module` and an `Adapted`.
      ValueError: the module has no such params.

    Example::

      loaded = tied_lora.peft.load_adapter(path, tied_lora.nnx.params(model), names)
      adapted = tied_lora.nnx.from_adapted(model, loaded)
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    _check_module("from_adapted", module)
    _merge.check_adapted("from_adapted", adapted)
    return _assembled("from_adapted", nnx.clone(module), adapted, adapted.rng)


def _assembled(what: str, module: nnx.Module, adapted: Adapted, rng: Any) -> AdaptedModule:
    """Returns a module with adapters; the module is given the frozen params."""
    plan = adapted.plan
    check_aliases(what, plan, aliases_of(module))
    leaves, _ = flatten(adapted.params)
    for group in plan.groups:
        for member in group.members[1:]:
            leaves[member.path] = leaves[group.key]
    # A transposed member keeps an array of its own: a Variable has one layout.
    turned = {m.path for g in plan.groups for m in g.members if m.transposed}
    set_leaves(what, module, {name: leaf for name, leaf in leaves.items() if name not in turned})
    dropout = None
    if plan.config.lora_dropout:
        key = jax.random.key(0) if rng is None else typed_key(what, rng)
        dropout = LoRADropout(jax.random.fold_in(key, key_number("lora_dropout")))
        dropout.deterministic = adapted.rng is None
    scaling = {key: Scaling(array) for key, array in adapted.scaling.items()}
    slot = None if adapted.slot is None else Slot(adapted.slot)
    return AdaptedModule(module, boxed(module, adapted), scaling, dropout, slot, plan)


def params(module: nnx.Module) -> dict[str, Any]:
    """Returns the params of a module as nested dicts, each Variable under every path that it has.

    The form in which `peft`, `checkpoint` and `names` take params; for an adapted module, the
    frozen ones. What is no `nnx.Param`, and what another LoRA trains (`nnx.LoRAParam`), is not in
    it.

    Raises:
      TypeError: not an `nnx.Module`.
    """
    module = module.module if isinstance(module, AdaptedModule) else module
    _check_module("params", module)
    return params_of(module)


def adapted(module: AdaptedModule) -> Adapted:
    """Returns an adapted module's params, adapters and plan as an `Adapted`; nothing is copied.

    For `peft.save_adapter`, `checkpoint.save`, `arithmetic`. `from_adapted` is the way back.

    Raises:
      TypeError: not an adapted module.
    """
    _check_adapted("adapted", module)
    return as_adapted(module)


def merge(
    module: AdaptedModule, *, dtype: Any = None, untie: Mapping[str, str] | None = None
) -> Any:
    """Returns the plain module with each delta added to its weight once, and the ties intact.

    Args:
      module: what to merge. It stays as it is.
      dtype, untie: as in `tied_lora.merge`; a leaf that is untied has to be a Variable already.

    Raises:
      TypeError, ValueError: as `tied_lora.merge`; or ``untie`` names no Variable of its own.
    """
    _check_adapted("merge", module)
    leaves, _ = flatten(_merge.merge(as_adapted(module), dtype=dtype, untie=untie))
    plain = nnx.clone(module.module)
    set_leaves("merge", plain, leaves)
    return plain


def base(module: AdaptedModule) -> Any:
    """Returns the plain module without the adapters, for example for a reference model.

    Its Variables are its own, their arrays are shared.

    Raises:
      TypeError: not an adapted module.
      ValueError: the adapters' first values were taken out of the params (PiSSA, OLoRA).
    """
    _check_adapted("base", module)
    leaves, _ = flatten(_merge.base(as_adapted(module)))
    plain = nnx.clone(module.module)
    set_leaves("base", plain, leaves)
    return plain


def quantize(
    module: Any, qtype: str = "int8", *, block_size: int = 64,
    exclude_modules: str | Collection[str] | None = None, sites: CallSites | None = None,
) -> Any:  # fmt: skip
    """Returns a module whose matrices are stored quantised, to be wrapped; or an adapted one's.

    Quantised are `nnx.Param` Variables; adapters and all other state stay as they are. A module
    runs on them once it is wrapped, and not before. The module is left as it is, and `base` and
    `merge` return a floating-point one.

    Args:
      module: an `nnx.Module`, or an adapted one.
      qtype, block_size, exclude_modules: as in `tied_lora.quantize`.
      sites: from `trace`, as in `tied_lora.quantize`.

    Raises:
      TypeError: not an `nnx.Module`.
      ImportError, ValueError: as `tied_lora.quantize`.

    Example::

      adapted = tied_lora.nnx.wrap(tied_lora.nnx.quantize(model, "nf4"), config)
    """
    made = nnx.clone(module) if isinstance(module, nnx.Module) else module
    frozen = made.module if isinstance(made, AdaptedModule) else made
    _check_module("quantize", frozen)
    stored = _quantize.quantize(
        params_of(frozen), qtype, block_size=block_size, exclude_modules=exclude_modules,
        sites=sites,
    )  # fmt: skip
    set_leaves("quantize", frozen, flatten(stored)[0])
    return made


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
    _check_module("trace", module)
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
    _check_adapted("explain", module)
    function = _function("explain", module.module, method)
    graphdef, state = nnx.split(module)

    def meet(given: Any, named: Any) -> Any:
        state, *rest = given
        here = nnx.merge(graphdef, state)
        _, done = evaluated_call(here, function, "allow", rest, named)
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


def _check_module(what: str, module: Any) -> None:
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"{what}: expected an nnx.Module, got {type(module).__name__}. tied_lora.{what} takes "
            "params of other kinds, an nnx.State too"
            if what in ("wrap", "trace")
            else f"{what}: expected an nnx.Module, got {type(module).__name__}"
        )
    for path, node in nnx.iter_graph(module):
        if isinstance(node, AdaptedModule):
            where = "/".join(map(str, path))
            raise TypeError(
                f"{what}: {f'{where!r} in this module' if where else 'this module'} is adapted "
                "already; use tied_lora.nnx.base(module) for other adapters, or "
                "tied_lora.nnx.merge(module) to build on these"
            )
    if not params_of(module):
        raise ValueError(
            f"{what}: {type(module).__name__} has no nnx.Param; expected an initialised module"
        )


def _check_adapted(what: str, module: Any) -> None:
    if not isinstance(module, AdaptedModule):
        raise TypeError(
            f"{what}: expected an AdaptedModule, as tied_lora.nnx.wrap returns it, got "
            f"{type(module).__name__}"
        )

"""`adapt`: turns a function of params into one of adapted params."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

import jax

from flax_tied_lora._adapters.adapted import Adapted, is_adapted
from flax_tied_lora._adapters.plain import plain
from flax_tied_lora._adapters.terms import quantized_weights, weights_of
from flax_tied_lora._algebra.quantized import Quantized
from flax_tied_lora._algebra.term import Dense
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter.context import Context, OnDense
from flax_tied_lora._interpreter.evaluate import evaluate
from flax_tied_lora._interpreter.materialised import warn_of_dense
from flax_tied_lora._interpreter.sites import Read, numbered
from flax_tied_lora._interpreter.tracing import Calls, filling
from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._tree.collector import collector_paused
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs.frozen_gradient import watched


class UnreadTargetWarning(UserWarning):
    """An adapted leaf was read nowhere in a call."""

    __module__ = "flax_tied_lora"


# Groups of which a call handed a weight back, by plan: of copies of a module, too.
_HANDED_BACK: weakref.WeakKeyDictionary[Plan, set[str]] = weakref.WeakKeyDictionary()

_P = ParamSpec("_P")
_R = TypeVar("_R")


# What the first argument is of no longer says what may stand there; all else stays as it is.
@overload
def adapt(
    fn: Callable[Concatenate[Any, _P], _R], *, on_dense: OnDense = "warn"
) -> Callable[Concatenate[Any, _P], _R]: ...
@overload
def adapt(fn: Callable[_P, _R], *, on_dense: OnDense = "warn") -> Callable[_P, _R]: ...
def adapt(fn: Callable[..., Any], *, on_dense: OnDense = "warn") -> Callable[..., Any]:
    """Returns a function like ``fn`` that takes an `Adapted` wherever ``fn`` took params.

    The result equals that of ``fn`` on the merged params, values and gradients, without the merged
    weights ever being made: ``fn`` is traced with plain params, and its program is evaluated with
    each adapted weight as its parts. Only the adapted weights are traced. All other arguments reach
    ``fn`` as they are, and results that are no arrays come back as they are. Inside `jax.jit`
    this costs tracing only. For a type checker the result has the signature of ``fn``, in which the
    first argument may be anything.

    Args:
      fn: any function of params: a model's ``apply``, a loss, a training step.
      on_dense: what to do where a weight meets an operation without a low-rank rule, so that its
        sum is materialised: ``"warn"`` once for each such place, ``"error"``, or ``"allow"``.

    Raises:
      ValueError: the call has no `Adapted` among its arguments; or (`DensifyError`) a weight had to
        be materialised and ``on_dense="error"``.

    Example::

      apply = tied_lora.adapt(model.apply)
      logits = apply({"params": adapted}, tokens)
    """
    if on_dense not in ("warn", "error", "allow"):
        raise ValueError(f"adapt: on_dense={on_dense!r}; expected 'warn', 'error' or 'allow'")
    if not callable(fn):
        raise TypeError(f"adapt: expected a function, got {type(fn).__name__}")

    @functools.wraps(fn, updated=())
    def adapted_fn(*args: Any, **kwargs: Any) -> Any:
        result, reads, adapteds = call(fn, Context(on_dense), args, kwargs)
        if on_dense == "warn":
            warn_of_dense(numbered(reads))
        warn_of_unread(reads, adapteds)
        return result

    return adapted_fn


def is_opaque(x: Any) -> bool:
    """Returns whether a part of the arguments is adapted, or holds nothing that is.

    The latter is passed on as the object that it is: a model object that keeps state is no copy.
    """
    return is_adapted(x) or not any(map(is_adapted, jax.tree.leaves(x, is_leaf=is_adapted)))


def call(
    fn: Callable[..., Any], context: Context, args: Sequence[Any], kwargs: Any
) -> tuple[Any, list[Read], list[Adapted]]:
    """Returns what ``fn`` returns on adapted arguments, the call sites met, and the arguments."""
    run = evaluated(fn, context, args, kwargs)
    return run.returned(run.result), run.context.reads, run.adapteds


@dataclasses.dataclass
class Evaluated:
    """The outcome of a function of adapted arguments.

    Attributes:
      result: what it returned, with symbolic weights where it handed them back.
      weights: those that went in, by leaf path, of each adapted argument.
      context: of the evaluation, with the call sites met.
      adapteds: the adapted arguments.
    """

    result: Any
    weights: list[dict[str, Weight]]
    context: Context
    adapteds: list[Adapted]

    def returned(self, tree: Any) -> Any:
        """Returns a part of the result with the weights in it materialised."""
        return jax.tree.map(
            lambda x: self.context.returned(x) if isinstance(x, Weight) else x, tree,
            is_leaf=lambda x: isinstance(x, Weight),
        )  # fmt: skip


@collector_paused()
def evaluated(
    fn: Callable[..., Any], context: Context, args: Sequence[Any], kwargs: Any
) -> Evaluated:
    """Returns the outcome of ``fn``; weights that it hands back are still symbolic."""
    nodes, outer = jax.tree.flatten((tuple(args), dict(kwargs)), is_leaf=is_opaque)
    places = [i for i, x in enumerate(nodes) if is_adapted(x)]
    adapteds = [nodes[i] for i in places]
    if not adapteds:
        kinds = ", ".join(sorted({type(x).__name__ for x in (*args, *kwargs.values())})) or "none"
        raise ValueError(
            f"adapt: no Adapted among the arguments (found {kinds}), so nothing would be adapted; "
            "pass what wrap returns where the params went. A transformers Flax model needs it as "
            "params=adapted"
        )
    named = [
        _weights(adapted, mark_of(number, adapteds), context)
        for number, adapted in enumerate(adapteds)
    ]
    weights = [w for of_argument in named for w in of_argument.values()]
    fill = filling(outer, nodes, places)

    def arguments(values: Sequence[Any]) -> Any:
        rest = iter(values)
        arrays = [{path: next(rest) for path in of_argument} for of_argument in named]
        return fill([plain(a, by_path) for a, by_path in zip(adapteds, arrays, strict=True)])

    closed, outputs = Calls(fn, arguments).jaxpr([_aval(w) for w in weights])
    values = evaluate(context, closed, weights)
    return Evaluated(outputs.filled(values), named, context, adapteds)


def _weights(adapted: Adapted, mark: str, context: Context) -> dict[str, Weight]:
    """Returns the weights of an adapted argument by leaf path, and tells the context of them."""
    leaves, _ = flatten(adapted.params)
    weights = weights_of(watched(adapted, leaves), leaves)
    for group in adapted.plan.adapted:
        for member in group.members:
            context.leaves[member.path + mark] = group.info(member)  # type: ignore[index]
    weights |= quantized_weights(adapted, leaves, weights)
    return {path: _marked(weight, mark) for path, weight in weights.items()}


def _marked(weight: Weight, mark: str) -> Weight:
    """Returns a weight under the names that tell its leaves from another argument's."""
    if not mark:
        return weight
    named = tuple(dataclasses.replace(o, leaf=o.leaf + mark) for o in weight.origins)
    terms = tuple(t.renamed(lambda name: name + mark) for t in weight.terms)
    return weight.replace(origins=named, terms=terms)


def _aval(weight: Weight) -> Any:
    """Returns the aval of an adapted leaf, with the sharding that its array has."""
    base = next(t for t in weight.terms if isinstance(t, Dense | Quantized))
    if isinstance(base, Quantized):
        return base.aval(weight.shape, weight.dtype)
    if base.factor.in_order():
        return jax.typeof(base.factor.array)
    return jax.eval_shape(lambda term: term.array, base)


def mark_of(number: int, adapteds: Sequence[Adapted]) -> str:
    """Returns what tells apart leaves of the same name in several adapted arguments."""
    return f" (adapted argument {number})" if len(adapteds) > 1 else ""


def warn_of_unread(
    reads: Sequence[Read], adapteds: Sequence[Adapted], stacklevel: int = 3, *,
    expect_all: bool = True,
) -> None:  # fmt: skip
    """Warns of each adapter that no call site was served by, in a call that reads them all.

    A weight that an earlier call handed back with its delta may be among the arguments of this one.

    Args:
      expect_all: whether it is such a call.
    """
    read = {r.site.leaf for r in reads}
    handed_back = {r.site.leaf for r in reads if r.site.operation == "return"}
    served = {key for r in reads for key in r.groups}
    for number, adapted in enumerate(adapteds):
        mark = mark_of(number, adapteds)
        known = _HANDED_BACK.setdefault(adapted.plan, set())
        for group in adapted.plan.adapted:
            names = {m.path + mark for m in group.members}
            if handed_back & names:
                known.add(group.key)
            if group.key in known or not expect_all:
                continue
            if not read & names:
                warnings.warn(
                    f"adapt: {group.key!r} is adapted and read nowhere in this call: its adapter "
                    "has no effect here. Take it out of target_modules, or check that the model "
                    "uses it",
                    UnreadTargetWarning,
                    stacklevel=stacklevel,
                )
                continue
            for adapter in group.separate:
                if adapter.key + mark not in served:
                    warnings.warn(
                        f"adapt: {adapter.key!r} is for call sites that are not in this call, so "
                        "it has no effect here; explain shows the call sites, and what they are "
                        "served by",
                        UnreadTargetWarning,
                        stacklevel=stacklevel,
                    )

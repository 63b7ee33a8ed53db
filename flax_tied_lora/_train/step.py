"""A training step that writes adapters and optimizer state, and never the frozen params."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_tied_lora._adapters.adapted import Adapted, Params
from flax_tied_lora._adapters.dropout import warn_without_dropout
from flax_tied_lora._adapters.split import combine, split
from flax_tied_lora._train.gradients import DROPOUT_ON, check_trained, of_adapters
from flax_tied_lora._tree.paths import is_tracer
from flax_tied_lora._tree.places import in_places, on_one_mesh, place_of


def step(
    loss_fn: Callable[..., Any], optimizer: Any, *, has_aux: bool = False, donate: bool = True
) -> Step:
    """Returns a training step, compiled, that returns a new `Adapted`, a new state and the loss.

    It is called ``adapted, state, loss = step(adapted, state, *args)``, and compiled when it is
    first called. The frozen params are an argument of the compiled program and no result, since XLA
    would write a copy of them at each step: those of the `Adapted` that comes back are the arrays
    that went in. Adapters and optimizer state are donated: their memory is that of the new ones. On
    a mesh both stay where they are.

    Where dropout is on (`Adapted.train`), the key of the `Adapted` moves on: each step has masks of
    its own, and what it returns has the key for the next one.

    Args:
      loss_fn: as in `value_and_grad`: ``loss_fn(adapted, *args, **kwargs)``, a scalar.
      optimizer: of Optax, or anything with ``init`` and ``update``. Its state starts as
        ``optimizer.init(adapted.adapters)``. One that asks for extra arguments is given
        ``value``, ``grad`` and ``value_fn``.
      has_aux: whether ``loss_fn`` returns ``(scalar, anything)``; then so is the third result.
      donate: False to leave the adapters and state that a step is given as they are, for one that
        is to be taken again from the same `Adapted`.

    Returns:
      A `Step`. All arguments after the first two, keywords too, are the loss's, and traced.

    Warns:
      NoDropoutWarning: the config has a ``lora_dropout`` that is not on.

    Raises:
      TypeError: no function and optimizer; or, in a call, no `Adapted`.
      ValueError: in a call, adapters or state that an earlier step was given.

    Example::

      step = tied_lora.train.step(loss_fn, optimizer)
      state = optimizer.init(adapted.adapters)
      for tokens in batches:
          adapted, state, loss = step(adapted, state, tokens)
    """
    if not callable(loss_fn):
        raise TypeError(f"step: loss_fn is a {type(loss_fn).__name__}; expected a function")
    if not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"step: the optimizer is a {type(optimizer).__name__}; expected one of Optax, or "
            "anything with init and update"
        )
    return Step(loss_fn, optimizer, has_aux, donate)


# What Optax gives the loss and its gradient to, for those that ask for them.
_TAKES_MORE = (optax.GradientTransformationExtraArgs, optax.MultiSteps)


class Step:
    """A training step; `step` makes it."""

    def __init__(self, loss_fn: Callable[..., Any], optimizer: Any, has_aux: bool, donate: bool):
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._has_aux = has_aux
        self._donate = donate
        # One program for each set of places: the compiler is told that what comes back stays there.
        self._compiled = functools.cache(self._jitted)

    def __call__(
        self, adapted: Adapted[Params], opt_state: Any, *args: Any, **kwargs: Any
    ) -> tuple[Adapted[Params], Any, Any]:
        """Returns the `Adapted` and the optimizer's state after a step, and the loss before it."""
        check_trained("step", adapted)
        if adapted.rng is None:
            warn_without_dropout("step", adapted.plan, DROPOUT_ON, stacklevel=2)
        run, operands = self._prepared(adapted, opt_state, args, kwargs)
        adapters, opt_state, rng, value = run(*operands)
        return dataclasses.replace(adapted, adapters=adapters, rng=rng), opt_state, value

    def lower(
        self, adapted: Adapted, opt_state: Any, *args: Any, **kwargs: Any
    ) -> jax.stages.Lowered:
        """Returns the step's program for such arguments, as `jax.jit`'s ``lower`` does.

        Example::

          report = step.lower(adapted, state, tokens).compile().memory_analysis()
          report.output_size_in_bytes  # of adapters, optimizer state and loss
        """
        check_trained("step", adapted)
        run, operands = self._prepared(adapted, opt_state, args, kwargs)
        return run.lower(*operands)

    def _prepared(
        self, adapted: Adapted, opt_state: Any, args: Any, kwargs: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        """Returns the compiled function for these places, and what it is called with."""
        adapters, frozen = split(adapted)
        if self._donate:
            adapters, opt_state = _to_donate((adapters, opt_state), (frozen, args, kwargs))
        adapters, opt_state, rng = on_one_mesh((adapters, opt_state, adapted.rng))
        frozen = dataclasses.replace(frozen, rng=rng)
        leaves, treedef = jax.tree.flatten((adapters, opt_state, rng))
        run = self._compiled(treedef, tuple(map(place_of, leaves)))
        return run, (adapters, opt_state, frozen, args, kwargs)

    def _jitted(self, treedef: Any, places: Sequence[Any]) -> Any:
        out: Any = (*jax.tree.unflatten(treedef, places), None) if any(places) else None
        optimizer, has_aux = self._optimizer, self._has_aux
        gradients = of_adapters(self._loss_fn, has_aux=has_aux)

        def step(adapters: Any, opt_state: Any, frozen: Adapted, args: Any, kwargs: Any) -> Any:
            rng = frozen.rng
            if rng is not None:
                rng, own = jax.random.split(rng)
                frozen = frozen.train(own)
            value, grads = gradients(combine(adapters, frozen), *args, **kwargs)
            grads = in_places(grads, places[: len(jax.tree.leaves(grads))])

            def value_fn(adapters: Any) -> Any:
                again = self._loss_fn(combine(adapters, frozen), *args, **kwargs)
                return again[0] if has_aux else again

            extra: dict[str, Any] = {}
            if isinstance(optimizer, _TAKES_MORE):
                loss = value[0] if has_aux else value
                extra = {"value": loss, "grad": grads, "value_fn": value_fn}
            updates, opt_state = optimizer.update(grads, opt_state, adapters, **extra)
            return optax.apply_updates(adapters, updates), opt_state, rng, value

        donated = (0, 1) if self._donate else ()
        return jax.jit(step, donate_argnums=donated, out_shardings=out)


def _to_donate(given: Any, kept: Any) -> Any:
    """Returns what is donated, with a copy of each array that is needed twice.

    An optimizer may hold the adapters that it was initialised with; an array's memory can be given
    away once, and not while it is read.

    Raises:
      ValueError: an array was given away before.
    """
    seen = {id(x) for x in jax.tree.leaves(kept)}

    def own(x: Any) -> Any:
        if not isinstance(x, jax.Array) or is_tracer(x):
            return x
        if x.is_deleted():
            raise ValueError(
                "step: these adapters, or this optimizer state, were given to an earlier step, "
                "which had their memory for the new ones. Go on from what it returned, adapted, "
                "state, loss = step(adapted, state, ...); or step(..., donate=False) keeps them"
            )
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(own, given)

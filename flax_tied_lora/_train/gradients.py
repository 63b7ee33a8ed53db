"""`value_and_grad`: a loss, and its gradient with respect to the adapters only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax

from flax_tied_lora._adapters.adapted import Adapted, Adapters
from flax_tied_lora._adapters.dropout import warn_without_dropout
from flax_tied_lora._tree.boxes import in_place

_P = ParamSpec("_P")
_R = TypeVar("_R")

DROPOUT_ON = "adapted.train(key) turns it on, with a key of its own for each step"


def value_and_grad(
    loss_fn: Callable[Concatenate[Adapted, _P], _R], *, has_aux: bool = False
) -> Callable[Concatenate[Adapted, _P], tuple[_R, Adapters]]:
    """Returns a function that gives a loss and its gradient with respect to the adapters.

    Like `jax.value_and_grad`, but only ``adapted.adapters`` is differentiated: the frozen params
    are not. The gradient of a tied factor is the sum over all call sites of its group.

    `train.step` takes these gradients, and is compiled. A step of your own that is compiled returns
    the adapters and not the `Adapted`, the frozen params in which would be copied: see `split`.

    Outside of `jax.jit` a gradient is sharded like its factor; within, on Auto mesh axes, that has
    to be asked for (docs/meshes.md).

    Args:
      loss_fn: called ``loss_fn(adapted, *args, **kwargs)``; returns a scalar.
      has_aux: whether it returns ``(scalar, anything)``.

    Returns:
      A function of the same arguments that returns ``(value, grads)``, the gradients in the
      structure of ``adapted.adapters``, ready for Optax.

    Warns:
      NoDropoutWarning: the config has a ``lora_dropout`` that is not on: `Adapted.train`.

    Raises:
      TypeError: the first argument is not an `Adapted`.

    Example::

      apply = tied_lora.adapt(model.apply)

      def loss_fn(adapted, tokens):
          logits = apply({"params": adapted}, tokens[:, :-1])
          return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

      loss, grads = tied_lora.value_and_grad(loss_fn)(adapted, tokens)
      updates, state = optimizer.update(grads, state, adapted.adapters)
      adapted = adapted.replace(adapters=optax.apply_updates(adapted.adapters, updates))
    """
    gradients = of_adapters(loss_fn, has_aux=has_aux)

    def value_and_grads(
        adapted: Adapted, *args: _P.args, **kwargs: _P.kwargs
    ) -> tuple[_R, Adapters]:
        check_trained("value_and_grad", adapted)
        if adapted.rng is None:
            warn_without_dropout("value_and_grad", adapted.plan, DROPOUT_ON, stacklevel=2)
        return gradients(adapted, *args, **kwargs)

    return value_and_grads


def of_adapters(loss_fn: Callable[..., Any], *, has_aux: bool) -> Callable[..., tuple[Any, Any]]:
    """Returns the function that `value_and_grad` returns, without its checks."""

    def run(adapted: Adapted, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        def of_adapters(adapters: Any) -> Any:
            return loss_fn(adapted.replace(adapters=adapters), *args, **kwargs)

        value, grads = jax.value_and_grad(of_adapters, has_aux=has_aux)(adapted.adapters)
        # The gradients of a compiled loss have the sharding that the compiler chose.
        return value, jax.tree.map(in_place, adapted.adapters, grads)

    return run


def check_trained(what: str, adapted: Any) -> None:
    """Refuses what has no adapters to train.

    Raises:
      TypeError: not an `Adapted`.
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(
            f"{what}: the first argument is a {type(adapted).__name__}; expected an Adapted, as "
            "wrap returns it"
        )

"""A training step of an adapted module that writes what changes, and never the frozen params."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from flax_tied_lora._adapters.dropout import warn_without_dropout
from flax_tied_lora._nnx.module import AdaptedModule
from flax_tied_lora._tree.places import in_places, place_of


def step(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Step:
    """Returns a training step, compiled, that updates a module and its optimizer.

    It is called ``loss = step(model, optimizer, *args)``, and compiled when it is first called.
    ``@nnx.jit`` alone returns all of a module's state from the compiled program, so that XLA writes
    a copy of the frozen params at each step; here what comes back is what has changed (adapters,
    optimizer state, running statistics, random streams). It is a loop of
    ``@nnx.jit(graph_updates=False)``, with gradients that on a mesh stay where their Variable is.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)``, a scalar. Variables that it changes are
        changed; new ones, and changes of static fields, stay within the compiled program.
      has_aux: whether it returns ``(scalar, anything)``; then so does the step.

    Returns:
      A `Step`. What is differentiated is the optimizer's ``wrt``.

    Warns:
      NoDropoutWarning: the config has a ``lora_dropout`` that is not on.

    Raises:
      TypeError: no function; or, in a call, no module and `nnx.Optimizer`.

    Example::

      optimizer = nnx.Optimizer(adapted, optax.adamw(1e-3), wrt=nnx.LoRAParam)
      step = tied_lora.nnx.step(loss_fn)
      for tokens in batches:
          loss = step(adapted, optimizer, tokens)
    """
    if not callable(loss_fn):
        raise TypeError(f"step: loss_fn is a {type(loss_fn).__name__}; expected a function")
    return Step(loss_fn, has_aux)


class Step:
    """A training step of a module; `step` makes it."""

    def __init__(self, loss_fn: Callable[..., Any], has_aux: bool):
        self._loss_fn = loss_fn
        self._has_aux = has_aux
        self._compiled = functools.cache(self._jitted)

    def __call__(self, model: Any, optimizer: nnx.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss before a step, and takes it."""
        run = self._prepared(model, optimizer)
        dropout = getattr(model, "lora_dropout", None)
        if isinstance(model, AdaptedModule) and dropout is not None and dropout.deterministic:
            remedy = "adapted.train() turns it on"
            warn_without_dropout("nnx.step", model.plan, remedy, stacklevel=2)
        return run(model, optimizer, *args, **kwargs)

    def lower(self, model: Any, optimizer: nnx.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Returns the step's program for such arguments, as `nnx.jit`'s ``lower`` does.

        Example::

          report = step.lower(adapted, optimizer, tokens).compile().memory_analysis()
          report.output_size_in_bytes  # of all that changes
        """
        return self._prepared(model, optimizer).lower(model, optimizer, *args, **kwargs)

    def _prepared(self, model: Any, optimizer: Any) -> Any:
        """Returns the compiled function for the places of what is trained."""
        if not isinstance(model, nnx.Module) or not isinstance(optimizer, nnx.Optimizer):
            raise TypeError(
                f"nnx.step: found a {type(model).__name__} and a {type(optimizer).__name__}; "
                "expected an adapted module and an nnx.Optimizer of it"
            )
        trained = jax.tree.leaves(nnx.state(model, optimizer.wrt))
        return self._compiled(tuple(map(place_of, trained)))

    def _jitted(self, places: Sequence[Any]) -> Any:
        loss_fn, has_aux = self._loss_fn, self._has_aux

        def of_model(model: Any, args: Any, kwargs: Any) -> Any:
            return loss_fn(model, *args, **kwargs)

        # Optimizer state is all written anew, so it is donated; of a module most stays.
        @nnx.jit(graph_updates=False, donate_argnums=1)
        def step(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            trained = nnx.DiffState(0, optimizer.wrt)
            gradients = nnx.value_and_grad(of_model, argnums=trained, has_aux=has_aux)
            value, grads = gradients(model, args, kwargs)
            optimizer.update(model, in_places(grads, places))
            return value

        return step

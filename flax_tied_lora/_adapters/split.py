"""An `Adapted` in two: the adapters, which training changes, and all else, which it only reads."""

from __future__ import annotations

import dataclasses

from flax_tied_lora._adapters.adapted import Adapted, Adapters, Params


def split(adapted: Adapted[Params]) -> tuple[Adapters, Adapted[Params]]:
    """Returns the adapters, and all else: what a training step changes, and what it only reads.

    A compiled function writes all that it returns, an argument that it hands back too. So a step
    takes both and returns the adapters alone; the frozen half stays where it is. Nothing is copied
    here.

    Args:
      adapted: as `wrap` returns it.

    Returns:
      ``(adapters, frozen)``: the trainable pytree ``adapted.adapters``, and an `Adapted` without
      adapters that holds params, scaling, dropout's key, slot and plan. Both are pytrees; `combine`
      puts them together.

    Raises:
      TypeError: not an `Adapted`.

    Example::

      adapters, frozen = tied_lora.split(adapted)

      @functools.partial(jax.jit, donate_argnums=(0, 1))
      def step(adapters, state, frozen, tokens):
          adapted = tied_lora.combine(adapters, frozen)
          loss, grads = tied_lora.value_and_grad(loss_fn)(adapted, tokens)
          updates, state = optimizer.update(grads, state, adapters)
          return optax.apply_updates(adapters, updates), state, loss
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(
            f"split: expected an Adapted, as wrap returns it, got {type(adapted).__name__}"
        )
    return adapted.adapters, dataclasses.replace(adapted, adapters=None)


def combine(adapters: Adapters, frozen: Adapted[Params]) -> Adapted[Params]:
    """Returns the `Adapted` that `split` took apart, with these adapters; nothing is copied.

    Args:
      adapters: of the structure and shapes that the plan has.
      frozen: the other half.

    Raises:
      TypeError: ``frozen`` is not an `Adapted`.
      ValueError: the adapters are not of its plan's groups and shapes.

    Example::

      adapted = tied_lora.combine(*tied_lora.split(adapted))
    """
    if not isinstance(frozen, Adapted):
        raise TypeError(
            f"combine: frozen is a {type(frozen).__name__}; expected combine(adapters, frozen), "
            "the two as split returns them"
        )
    return frozen.replace(adapters=adapters)

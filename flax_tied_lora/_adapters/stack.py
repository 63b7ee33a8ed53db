"""Many adapters over one frozen base: stacked in slots, replaced there, and selected."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted, check_adapted, check_slots, shapes_of
from flax_tied_lora._adapters.common_plan import common_plan, fitted
from flax_tied_lora._adapters.compatible import check_same_base, check_single, refuse_residual
from flax_tied_lora._tree.boxes import is_box, with_slots
from flax_tied_lora._tree.paths import describe, is_tracer


def adapter_axes(adapted: Adapted, axis: int | None = 0) -> Adapted:
    """Returns the ``in_axes`` of `jax.vmap` for stacked or selected adapters over one frozen base.

    Of stacked adapters all are mapped over, of selected ones the slots: each example gets its own.

    Example::

      stacked = tied_lora.stack([adapted_1, adapted_2])
      logits = jax.vmap(run, in_axes=(tied_lora.adapter_axes(stacked), 0))(stacked, tokens)
    """
    check_adapted("adapter_axes", adapted)
    make: Any = Adapted  # Of axes, which stand for all that is below them.
    if adapted.slot is not None:
        return make(None, None, None, None, adapted.plan, axis)
    return make(None, axis, axis, None, adapted.plan)


def stack(
    adapteds: Sequence[Adapted], *, capacity: int | None = None, rank: int | None = None
) -> Adapted:
    """Returns one `Adapted` with the adapters of several, stacked along a new first axis of slots.

    All must be of the same base. Ranks, alphas, targets and replaced tokens may differ: factors are
    filled up with zeros to the largest rank of their group, and where one of them has no adapter
    for a weight, its slot leaves the weight as it is. The frozen params are those of the first.

    Args:
      adapteds: what to stack.
      capacity: number of slots; default as many as there are adapters. Further ones are empty, and
        adapt nothing until `put` fills them.
      rank: of all factors, at least the largest: room for what `put` brings later. A matrix that
        can have a lower rank only gets that.

    Raises:
      ValueError: none given, more than there are slots, one that is stacked already, or a rank
        above ``rank``; the bases differ; a weight has DoRA in one and LoRA in another; or empty
        slots where the factors started from the weight (PiSSA, OLoRA).
      TypeError: not an `Adapted`, or a number that is no int.

    Example::

      stacked = tied_lora.stack([polite, legal], capacity=8, rank=16)
      stacked = tied_lora.put(stacked, 2, medical)
    """
    adapteds = list(adapteds)
    if not adapteds:
        raise ValueError("stack: expected at least one Adapted")
    for each in adapteds:
        check_adapted("stack", each)
        check_single("stack", each)
    for other in adapteds[1:]:
        check_same_base("stack", adapteds[0], other)
    slots = len(adapteds) if capacity is None else _count("stack: capacity", capacity)
    if slots < len(adapteds):
        raise ValueError(f"stack: {len(adapteds)} adapters do not fit in capacity={slots}")
    rank = None if rank is None else _count("stack: rank", rank)
    plan = common_plan("stack", [a.plan for a in adapteds], rank)
    contents = [fitted("stack", a, plan) for a in adapteds]
    if slots > len(contents):
        refuse_residual("stack", adapteds[0])
        contents += [fitted("stack", None, plan, adapteds[0].params)] * (slots - len(contents))

    def stacked(*arrays: Any) -> Any:
        kind = functools.reduce(np.promote_types, (x.dtype for x in arrays))
        return jnp.stack([jnp.asarray(x, kind) for x in arrays])

    adapters, scaling = jax.tree.map(with_slots, jax.tree.map(stacked, *contents), is_leaf=is_box)
    return dataclasses.replace(adapteds[0], adapters=adapters, scaling=scaling, plan=plan)


def put(stacked: Adapted, slot: Any, adapted: Adapted | None) -> Adapted:
    """Returns stacked adapters with another one in a slot; a compiled function runs on.

    Shapes, dtypes and plan stay the stack's: factors of a lower rank are filled up with zeros, and
    weights that the adapter leaves out stay as they are.

    Args:
      stacked: as `stack` returns it.
      slot: from 0; may be traced.
      adapted: what goes there, of the same base; None to empty the slot.

    Raises:
      ValueError: not stacked, a slot that is not there, another base; or an adapter for which the
        stack has no room: of another weight or kind, a higher rank, or other tokens.
      TypeError: not an `Adapted`, or the slot is no integer.
    """
    check_adapted("put", stacked)
    count = slots_of("put", stacked)
    slot = _integers("put: slot", slot, count, empty=False)
    if slot.ndim:
        raise ValueError(f"put: slot is {list(slot.shape)}; expected one integer")
    if adapted is None:
        refuse_residual("put", stacked)
    else:
        check_adapted("put", adapted)
        check_single("put", adapted)
        check_same_base("put", stacked, adapted)
    new = fitted("put", adapted, stacked.plan, stacked.params)
    new, old = jax.tree.map(with_slots, new, is_leaf=is_box), (stacked.adapters, stacked.scaling)
    # In two programs: in one with arrays of a mesh of several processes scalings would be spread
    # over it, and each process keeps its own.
    adapters, scaling = (_placed(_written(o, n, slot), o) for o, n in zip(old, new, strict=True))
    return dataclasses.replace(stacked, adapters=adapters, scaling=scaling)


def select(stacked: Adapted, slots: Any) -> Adapted:
    """Returns the adapter of a slot, or one for each example of a batch. Nothing is copied.

    With one slot the result is used as any `Adapted` is. With one for each example it goes through
    `per_example`, or `jax.vmap` with `adapter_axes`.

    Args:
      stacked: as `stack` returns it.
      slots: an integer, or [examples] of them; may be traced. -1 is no adapter: the base as it is.
        So is, of traced ones, a slot that is not there.

    Raises:
      ValueError: not stacked, or a slot that is not there; or the factors started from the weight
        (PiSSA, OLoRA), so that no adapter is not the base.
      TypeError: not an `Adapted`, or no integers.
    """
    check_adapted("select", stacked)
    refuse_residual("select", stacked)
    count = slots_of("select", stacked)
    return dataclasses.replace(stacked, slot=_integers("select: slots", slots, count, empty=True))


def slots_of(what: str, stacked: Adapted) -> int:
    """Returns the number of slots of stacked adapters.

    Raises:
      ValueError: they are not stacked.
    """
    check_slots(what, stacked, "stack the adapters first: tied_lora.stack([...])", stacked=True)
    return next(shape[0] for _, _, shape, _ in shapes_of(stacked))


def _count(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise (ValueError if isinstance(value, int) else TypeError)(
            f"{what} is {value!r}; expected an int from 1"
        )
    return value


def _integers(what: str, value: Any, count: int, *, empty: bool) -> jax.Array:
    """Returns slots as int32, those that can be read having been checked."""
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer) or value.ndim > 1:
        raise TypeError(f"{what}: found {describe(value)}; expected an integer or a vector of them")
    lowest = -1 if empty else 0
    if not is_tracer(value):
        odd = [int(i) for i in np.ravel(value) if not lowest <= i < count]
        if odd:
            rest = ", or -1 for no adapter" if empty else ""
            raise ValueError(
                f"{what} is {odd[0]}, and there are slots 0 to {count - 1}{rest}; "
                "stack with capacity=... for more"
            )
    return jnp.asarray(value, jnp.int32)


@jax.jit
def _written(old: Any, new: Any, slot: jax.Array) -> Any:
    return jax.tree.map(lambda xs, x: xs.at[slot].set(x.astype(xs.dtype)), old, new)


def _placed(new: Any, old: Any) -> Any:
    """Returns arrays placed as others are, so that nothing is compiled again for them."""

    def place(array: Any, like: Any) -> Any:
        if is_tracer(array) or is_tracer(like) or array.sharding == like.sharding:
            return array
        return jax.device_put(array, like.sharding)

    return jax.tree.map(place, new, old)

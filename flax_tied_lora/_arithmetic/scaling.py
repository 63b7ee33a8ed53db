"""Adapters scaled, switched and padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from flax_tied_lora._adapters.adapted import Adapted, check_adapted
from flax_tied_lora._adapters.compatible import (
    check_same_base,
    check_same_groups,
    refuse_residual,
)
from flax_tied_lora._adapters.ranks import with_ranks
from flax_tied_lora._arithmetic.combining import check_number
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan
from flax_tied_lora._tree.paths import matches, module_of, nearby


def scale(adapted: Adapted, factor: Any) -> Adapted:
    """Returns a copy with its deltas scaled up or down.

    Only the scaling leaf changes, so a compiled function runs on; the factor may be traced. Follows
    ``scale_layer`` of ``peft.tuners.lora.layer.LoraLayer``. With DoRA it is the delta within the
    norm that is scaled.

    Args:
      adapted: as `wrap` returns it, or stacked.
      factor: a number, negative or zero too; for stacked adapters also an array, one for each. Or a
        dict from the name of an adapter to one of them: its key, its leaf or its module, whole or
        the last parts (``"q_proj"``; of a fused leaf's part ``"qkv_proj:q"``), or the name of a
        separate adapter. Others stay as they are.

    Raises:
      ValueError: a name that fits no adapter, or two that fit one; a number for all where something
        is trained that is no delta, which would stay as it is; factors that start from the weight.
      TypeError: not an `Adapted`, or no number.

    Example::

      weaker = arithmetic.scale(adapted, 0.5)
      without_head = arithmetic.scale(adapted, {"embed_tokens": 0.0})
    """
    check_adapted("scale", adapted)
    refuse_residual("scale", adapted)
    others = [f"{a.key!r} in {a.kind}" for _, a in adapted.plan.adapters() if a.kind != LORA]
    if not isinstance(factor, Mapping) and others:
        raise ValueError(
            f"scale: {', '.join(others[:3])} is trained in full, and has no scaling; name what is "
            'to be scaled: scale(adapted, {"q_proj": 0.5})'
        )
    factors = _by_key(adapted, factor) if isinstance(factor, Mapping) else None
    scaling = dict(adapted.scaling)
    for key in scaling if factors is None else factors:
        by = factor if factors is None else factors[key]
        check_number("scale: the factor", by)
        old = jnp.asarray(scaling[key])
        new = jnp.asarray(by).astype(old.dtype)
        if new.shape not in ((), old.shape):
            raise ValueError(
                f"scale: the factor for {key!r} is {list(new.shape)}; expected a number"
                + (f", or {list(old.shape)}, as the adapters are stacked" if old.ndim else "")
            )
        scaling[key] = old * new
    return dataclasses.replace(adapted, scaling=scaling)


def _by_key(adapted: Adapted, factors: Mapping[str, Any]) -> dict[str, Any]:
    adapters = list(adapted.plan.adapters(LORA))
    names: dict[str, str] = {}
    for name in factors:
        keys = [a.key for _, a in adapters if name == a.key]
        keys = keys or [a.key for g, a in adapters if _is_named(name, g, a)]
        if not keys:
            close = nearby(str(name), [a.key for _, a in adapters])
            raise ValueError(
                f"scale: {name!r} names no adapter; nearby: {', '.join(map(repr, close))}"
            )
        for key in keys:
            if key in names:
                raise ValueError(
                    f"scale: {names[key]!r} and {name!r} both name {key!r}; leave one out"
                )
            names[key] = name
    return {key: factors[name] for key, name in names.items()}


def _is_named(name: str, group: GroupPlan, adapter: AdapterPlan) -> bool:
    if adapter.name == name or name in adapter.targets:
        return True
    paths = [m.path for m in group.members if adapter.covers(m.path)]
    if adapter.separate and not adapter.members:
        return False  # other call sites of the leaf are another adapter's
    modules = [p for path in paths for p in (path, module_of(path)) if p]
    return any(matches((name,), p) for m in modules for p in (m, adapter.named(m)))


def switch(adapted: Adapted, other: Adapted) -> Adapted:
    """Returns the first with the adapters of the second, for a compiled function to run on.

    The plan and the params stay the first's, so nothing recompiles whatever alpha the second was
    trained with; factors of a lower rank are filled up with zeros.

    Args:
      adapted: what the function was compiled for. `padded` makes room in it.
      other: of the same groups and base.

    Raises:
      ValueError: different bases or groups, or a higher rank than the first has.
      TypeError: not an `Adapted`.

    Example::

      served = arithmetic.padded(adapted, 16)
      served = arithmetic.switch(served, of_rank_8)
    """
    for each in (adapted, other):
        check_adapted("switch", each)
    check_same_groups("switch", adapted, other)
    check_same_base("switch", adapted, other)
    ranks = {a.key: a.rank for _, a in adapted.plan.adapters(LORA)}
    for _, adapter in other.plan.adapters(LORA):
        if adapter.rank > ranks[adapter.key]:
            raise ValueError(
                f"switch: {adapter.key!r} has rank {adapter.rank}, and there is room for "
                f"{ranks[adapter.key]}; make room first: arithmetic.padded(adapted, {adapter.rank})"
            )
    fitted = with_ranks("switch", other, ranks)
    return dataclasses.replace(adapted, adapters=fitted.adapters, scaling=fitted.scaling)


def padded(adapted: Adapted, rank: int) -> Adapted:
    """Returns the same deltas with factors of a higher rank, filled up with zeros.

    For serving: where both factors are zero neither has a gradient, so what is filled up learns
    nothing. The config's alpha grows along, so that the scaling stays.

    Args:
      adapted: as `wrap` returns it, or stacked.
      rank: of all factors.

    Raises:
      ValueError: less than the rank of an adapter, or more than its matrix can have.
      TypeError: not an `Adapted`, or no int.
    """
    check_adapted("padded", adapted)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"padded: rank is {rank!r}; expected an int")
    return with_ranks("padded", adapted, {a.key: rank for _, a in adapted.plan.adapters(LORA)})

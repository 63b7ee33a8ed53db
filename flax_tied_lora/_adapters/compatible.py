"""What adapters must have in common to be combined, switched or stacked: groups, base, form."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from flax_tied_lora._adapters.adapted import Adapted, check_slots
from flax_tied_lora._adapters.fingerprint import differences, fingerprint
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan
from flax_tied_lora._tree.paths import flatten, is_marker, is_tracer
from flax_tied_lora._tree.quantized_array import array_of


def check_same_groups(what: str, first: Adapted, other: Adapted) -> None:
    """Refuses adapters of other groups, kinds or call sites; ranks may differ.

    Raises:
      ValueError: they are.
    """
    one, two = ({a.key: _layout(g, a) for g, a in x.plan.adapters()} for x in (first, other))
    odd = sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
    if odd:
        raise ValueError(
            f"{what}: the adapters are of different groups: {', '.join(map(repr, odd[:3]))} "
            f"{'differ' if odd[0] in one and odd[0] in two else 'is in one of them only'}; wrap "
            "them with the same targets"
        )


def _layout(group: GroupPlan, adapter: AdapterPlan) -> Any:
    return layout_of(group), dataclasses.replace(adapter, rank=0, module="", targets=())


def layout_of(group: GroupPlan) -> Any:
    """Returns all that has to be equal for adapters of a group to be of one weight."""
    return dataclasses.replace(group, found=(), adapters=(), roles=())


def check_same_base(what: str, first: Adapted, other: Adapted) -> None:
    """Refuses adapters of another base.

    The shape and a sample of every leaf are compared, where it is not the same array and can be
    read.

    Raises:
      ValueError: the bases differ.
    """
    one, two = flatten(first.params)[0], flatten(other.params)[0]
    for path in one if one.keys() == two.keys() else ():
        if is_marker(one[path]) != is_marker(two[path]):
            raise ValueError(
                f"{what}: {path!r} is tied in one of the adapters' bases only; wrap them with the "
                "same ties"
            )
    same = {p for p in one if p in two and one[p] is two[p]}
    known = [{p: _readable(x) for p, x in tree.items() if p not in same} for tree in (one, two)]
    lines = differences(*(fingerprint(tree, first.plan) for tree in known))
    if lines:
        raise ValueError(
            f"{what}: the adapters are of different bases: {'; '.join(lines[:3])}; expected the "
            "same params in all"
        )


def _readable(leaf: Any) -> Any:
    traced = is_tracer(array_of(leaf))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if traced else leaf


def check_single(what: str, adapted: Adapted) -> None:
    """Refuses stacked and abstract adapters.

    Raises:
      ValueError: they are.
    """
    check_slots(what, adapted, "take stacked adapters one by one")
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(adapted.adapters)):
        raise ValueError(f"{what}: the adapters are abstract (ShapeDtypeStruct); expected arrays")


def refuse_residual(what: str, adapted: Adapted) -> None:
    """Refuses factors that started from the weight: their base is not the params' any more.

    Raises:
      ValueError: there are some.
    """
    for group, adapter in adapted.plan.adapters(LORA):
        if adapter.residual:
            raise ValueError(
                f"{what}: init_lora_weights={adapted.plan.config.init_lora_weights!r} took the "
                f"first values of its factors out of {group.key!r}, so they are no delta of "
                "the params; arithmetic.extract(params, merge(adapted), config) makes one of them"
            )

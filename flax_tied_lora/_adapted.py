"""`Adapted`: frozen params, trainable adapters and the plan that says how they belong together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from flax_tied_lora._factor import pytree
from flax_tied_lora._factors import typed_key, unboxed
from flax_tied_lora._paths import TiedLeaf, describe, flatten
from flax_tied_lora._plan import GroupPlan, Plan
from flax_tied_lora._table import folded, table

LORA = "lora"
_SCALING = "lora_scaling"
_PARAMS = "params"


@pytree("plan")
class Adapted:
    """Params with adapters: a pytree that takes the place of params wherever `adapt` is used.

    Attributes:
      params: the frozen params. Of a tie group one array is stored, and a leafless `TiedLeaf`
        stands where the others were.
      adapters: the trainable pytree: ``{"lora": {group key: {"lora_a": ..., "lora_b": ...}}}``.
      scaling: ``{group key: scalar}``; an array leaf, so that switching, stacking and rescaling
        adapters recompiles nothing.
      rng: key for dropout, or None for no dropout; see `train`.
      plan: what was adapted; static.
    """

    params: Any
    adapters: Any
    scaling: Any
    rng: Any
    plan: Plan

    def replace(self, **changes: Any) -> Adapted:
        """Returns a copy with some fields replaced, usually ``adapters``.

        Raises:
          ValueError: the adapters are not of this plan's groups and shapes.
          TypeError: an unknown field.
        """
        adapters = changes.get("adapters")
        if isinstance(adapters, Mapping):
            _check_groups(self.plan, adapters)
            _check_factors("Adapted.replace", self.plan, adapters[LORA], stacked=True)
        return dataclasses.replace(self, **changes)

    def train(self, rng: jax.Array) -> Adapted:
        """Returns a copy in which dropout is on, at the config's ``lora_dropout``.

        Give each step a key of its own. Within a step the key is folded by group, call site and
        loop step. Without a key there is no dropout.

        Args:
          rng: a key of `jax.random.key` or `jax.random.PRNGKey`.

        Raises:
          TypeError: ``rng`` is no key.
        """
        return dataclasses.replace(self, rng=typed_key("Adapted.train", rng))

    def eval(self) -> Adapted:
        """Returns a copy in which dropout is off."""
        return dataclasses.replace(self, rng=None)

    def variables(self) -> dict[str, Any]:
        """Returns plain Flax collections: ``params``, ``lora_scaling``, and the adapters'."""
        return {_PARAMS: self.params, _SCALING: self.scaling, **self.adapters}

    @classmethod
    def from_variables(cls, variables: Mapping[str, Any], plan: Plan) -> Adapted:
        """Returns what `variables` was made from, with dropout off.

        Raises:
          ValueError: a collection is missing, or the groups and shapes are not the plan's.
        """
        for name in (_PARAMS, _SCALING, LORA):
            if name not in variables:
                raise ValueError(
                    f"Adapted.from_variables: no collection {name!r}; found "
                    f"{', '.join(map(repr, variables))}"
                )
        adapters = {k: v for k, v in variables.items() if k not in (_PARAMS, _SCALING)}
        _check_groups(plan, adapters)
        _check_groups(plan, variables, _SCALING)
        _check_factors("Adapted.from_variables", plan, adapters[LORA])
        return cls(variables[_PARAMS], adapters, variables[_SCALING], None, plan)

    def __repr__(self) -> str:
        return f"Adapted({len(self.plan.adapted)} groups adapted, rank {self.plan.config.r})"

    def __str__(self) -> str:
        return summary(self)


def _check_factors(what: str, plan: Plan, lora: Mapping[str, Any], stacked: bool = False) -> None:
    """Refuses factors of other shapes than the plan's; stacked ones have axes in front."""
    for group in plan.adapted:
        pair = lora[group.key]
        if not isinstance(pair, Mapping):
            continue
        for name, shape in group.factor_shapes().items():
            if name not in pair:
                raise ValueError(
                    f"{what}: {group.key!r} has no {name}, found {', '.join(map(repr, pair))}; "
                    "expected lora_a and lora_b"
                )
            factor = unboxed(pair[name])
            found = getattr(factor, "shape", None)
            own = found[-len(shape) :] if found is not None and stacked else found
            if own is not None and tuple(own) != shape:
                raise ValueError(
                    f"{what}: {name} of {group.key!r} is {describe(factor)}; the plan has "
                    f"{list(shape)}"
                )


def _check_groups(plan: Plan, adapters: Mapping[str, Any], collection: str = LORA) -> None:
    found = adapters.get(collection)
    if not isinstance(found, Mapping):
        raise ValueError(
            f"these are not the plan's adapters: expected a collection {collection!r}, found "
            f"{sorted(adapters)[:5]}"
        )
    wanted = {group.key for group in plan.adapted}
    if set(found) != wanted:
        odd = {"missing": sorted(wanted - set(found)), "unknown": sorted(set(found) - wanted)}
        parts = [f"{what} {', '.join(map(repr, n[:3]))}" for what, n in odd.items() if n]
        raise ValueError(f"these are not the plan's adapters: in {collection!r} {'; '.join(parts)}")


def summary(adapted: Adapted) -> str:
    """Returns a table of the groups, and the number of trainable parameters, each counted once."""
    leaves, _ = flatten(adapted.params)
    rows = folded((_row(group) for group in adapted.plan.groups), sums=[5])
    trainable = sum(_factor_size(g) for g in adapted.plan.adapted)
    frozen = sum(
        math.prod(x.shape)
        for x in leaves.values()
        if not isinstance(x, TiedLeaf) and hasattr(x, "shape")
    )
    header = ("group", "also read as", "tied by", "shape", "rank", "trainable")
    share = 100 * trainable / max(frozen + trainable, 1)
    return (
        f"{table(header, rows)}\n"
        f"trainable: {trainable:,} of {frozen + trainable:,} parameters ({share:.2f} %)"
    )


def _row(group: GroupPlan) -> tuple[Any, ...]:
    others = ", ".join(
        m.path + (" (transposed)" if m.transposed else "") for m in group.members[1:]
    )
    shape = " x ".join(map(str, group.shape))
    return group.key, others, ", ".join(group.found), shape, group.rank, _factor_size(group)


def _factor_size(group: GroupPlan) -> int:
    if not group.rank:
        return 0
    return sum(math.prod(shape) for shape in group.factor_shapes().values())

"""`labels` and `labels_by`: labels for the trainable arrays, by kind, by layer, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._config.patterns import pattern_value
from flax_tied_lora._planning.plan import LORA, AdapterPlan, GroupPlan, Plan
from flax_tied_lora._tree.paths import layer_index, module_of, nearby

# A table's projection sums over its columns, so the factor next to the inputs is lora_b.
_SWAPPED = {"lora_a": "lora_b", "lora_b": "lora_a"}


def labels(adapted: Adapted | Plan) -> dict[str, Any]:
    """Returns what each trainable array is, for `optax.partition` and `optax.masked`.

    Args:
      adapted: or its plan.

    Returns:
      A pytree like ``adapted.adapters`` with a string in place of each array:

      * ``"lora_a"``, ``"lora_b"``: PEFT's A (next to the inputs) and B (next to the outputs);
      * ``"embedding"``: either factor of a table that is looked up, tied or not. An adapter for the
        table's projections alone is a head's instead: the factor next to the inputs, as wide as
        the table, is its ``"lora_a"``;
      * ``"lora_magnitude"``: of DoRA;
      * ``"modules_to_save"``, ``"trainable_tokens"``, ``"bias"``.

    Raises:
      TypeError: neither an `Adapted` nor a `Plan`.

    Example::

      frozen_a = optax.partition(
          {"lora_a": optax.set_to_zero(), "lora_b": optax.adam(1e-3)}, train.labels(adapted)
      )
    """
    return by_adapter(checked_plan("labels", adapted), label_of)


def labels_by(
    adapted: Adapted | Plan, rules: Mapping[int | str, Hashable], default: Hashable = "default"
) -> dict[str, Any]:
    """Returns a label for each trainable array, by its layer or its name.

    With learning rates as labels::

      rates = train.labels_by(adapted, {0: 1e-5, "q_proj": 5e-5}, default=1e-4)
      optimizer = optax.partition({r: optax.adamw(r) for r in (1e-5, 5e-5, 1e-4)}, rates)

    Args:
      adapted: or its plan.
      rules: ``{rule: label}``; the first rule that fits gives the label. An int is the index of a
        layer, counted as by ``layers_to_transform``; a string is a regex for a leaf's or module's
        path, or for its last parts, as in ``rank_pattern``. A tie group fits by any of its members;
        a separate adapter also by its name (``"lm_head"``) or key; a part of a fused leaf also by
        ``"qkv_proj:q"``.
      default: label of an array that no rule fits.

    Returns:
      A pytree like ``adapted.adapters``.

    Raises:
      TypeError: ``adapted``, a rule or a label is of another type.
      ValueError: a rule is no valid regex, or fits no adapter.
    """
    plan = checked_plan("labels_by", adapted)
    _check_rules(rules, default)
    fitted: set[int | str] = set()

    def label(group: GroupPlan, adapter: AdapterPlan, name: str) -> Hashable:
        names = _names(group, adapter)
        # A rule that never applies because an earlier one does is no mistake: note all that fit.
        fitting = [rule for rule in rules if any(_fits(rule, n) for n in names)]
        fitted.update(fitting)
        return rules[fitting[0]] if fitting else default

    result = by_adapter(plan, label)
    for rule in rules:
        if rule not in fitted:
            keys = [adapter.key for _, adapter in plan.adapters()]
            close = nearby(str(rule), keys) if isinstance(rule, str) else keys[:5]
            raise ValueError(
                f"labels_by: the rule {rule!r} fits no adapter; there are "
                f"{', '.join(map(repr, close))}. An int is the index of a layer in the path, which "
                "layers stacked in one array have not; a string is a regex for the end of the path"
            )
    return result


def checked_plan(what: str, adapted: Any) -> Plan:
    """Returns the plan of an `Adapted`, or a plan as it is; ``what`` names the error's function."""
    plan = adapted.plan if isinstance(adapted, Adapted) else adapted
    if not isinstance(plan, Plan):
        raise TypeError(
            f"{what}: found a {type(adapted).__name__}; expected an Adapted, as wrap returns it, "
            "or its plan. The adapters alone do not say which of them are tables"
        )
    return plan


def by_adapter(
    plan: Plan, label: Callable[[GroupPlan, AdapterPlan, str], Hashable]
) -> dict[str, Any]:
    """Returns labels in the structure of the plan's adapters."""
    result: dict[str, Any] = {LORA: {}}
    for group, adapter in plan.adapters():
        named = {name: label(group, adapter, name) for name in group.axes(adapter)}
        collection = result.setdefault(adapter.kind, {})
        collection[adapter.key] = named if adapter.kind == LORA else named[""]
    return result


def label_of(group: GroupPlan, adapter: AdapterPlan, name: str) -> str:
    """Returns the label of one array of an adapter; see `labels`."""
    if adapter.kind != LORA:
        return adapter.kind
    if name not in _SWAPPED or not group.is_table:
        return name
    return _SWAPPED[name] if group.is_head(adapter) else "embedding"


def _check_rules(rules: Any, default: Any) -> None:
    if not isinstance(rules, Mapping):
        raise TypeError(f"labels_by: rules is a {type(rules).__name__}; expected a dict")
    for rule in rules:
        if not isinstance(rule, int | str) or isinstance(rule, bool):
            raise TypeError(
                f"labels_by: found the rule {rule!r}; expected the index of a layer or a regex"
            )
        if isinstance(rule, str):
            try:
                re.compile(rf"({rule})")
            except re.error as error:
                raise ValueError(f"labels_by: the rule {rule!r} is no regex: {error}") from error
    for label in (*rules.values(), default):
        if not isinstance(label, Hashable) or not jax.tree_util.all_leaves([label]):
            raise TypeError(f"labels_by: found the label {label!r}; expected a string or a number")


def _names(group: GroupPlan, adapter: AdapterPlan) -> list[str]:
    """Returns the paths and names that a rule may have for an adapter."""
    paths = adapter.members if adapter.separate else [m.path for m in group.members]
    paths = [*paths, *map(module_of, paths)]
    names = [adapter.key, adapter.name, *paths, *map(adapter.named, paths)]
    return [name for name in dict.fromkeys(names) if name]


def _fits(rule: int | str, name: str) -> bool:
    if isinstance(rule, int):
        return layer_index(module_of(name), None) == rule
    return pattern_value({rule: True}, name, False)

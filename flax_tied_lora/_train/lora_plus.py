"""`lora_plus`: an optimizer with the learning rates of LoRA+ (arXiv:2402.12354)."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._planning.plan import (
    BIAS,
    LORA,
    MODULES_TO_SAVE,
    TRAINABLE_TOKENS,
    AdapterPlan,
    GroupPlan,
    Plan,
)
from flax_tied_lora._train.labels import by_adapter, checked_plan, label_of
from flax_tied_lora._tree.paths import leaf_name


def lora_plus(
    adapted: Adapted | Plan,
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
    *,
    embedding_learning_rate: optax.ScalarOrSchedule = 1e-6,
    weight_decay: float = 0.0,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer with LoRA+'s learning rates (arXiv:2402.12354).

    Follows ``peft.optimizers.create_loraplus_optimizer``, group by group:

    ====================================================  =======================  ============
    what                                                  learning rate            weight decay
    ====================================================  =======================  ============
    ``lora_a``; copies and rows of two axes or more       learning_rate            yes
    either factor of a table, tied or not                 embedding_learning_rate  yes
    ``lora_b``; magnitudes; copies of one axis            ratio * learning_rate    yes
    biases, and copies of a norm's scale                  ratio * learning_rate    no
    ====================================================  =======================  ============

    PEFT's default for tables, 1e-6, all but freezes them. A tied table is stepped once, with the
    table's rate; where PEFT ties two adapters, it also steps the shared memory with the head's.

    Args:
      adapted: or its plan.
      learning_rate: a number or schedule.
      ratio: PEFT's ``loraplus_lr_ratio``; the paper recommends 1 or more.
      embedding_learning_rate: PEFT's ``loraplus_lr_embedding``, a number or schedule; a schedule in
        ``learning_rate`` does not change it.
      weight_decay: PEFT's ``loraplus_weight_decay``.
      optimizer: called ``optimizer(learning_rate, weight_decay=...)`` for each row of the table;
        without the keyword where it has no such argument. Give it other options with
        `functools.partial`.

    Raises:
      TypeError: ``adapted`` is neither an `Adapted` nor a `Plan`.
      ValueError: ``ratio`` or ``weight_decay`` is out of range, or the optimizer cannot decay
        weights, or is bound to a ``weight_decay`` already.

    Example::

      optimizer = train.lora_plus(adapted, optax.cosine_decay_schedule(1e-4, 1000))
      state = optimizer.init(adapted.adapters)
    """
    plan = checked_plan("lora_plus", adapted)
    _check_number("ratio", ratio, above_zero=True)
    _check_number("weight_decay", weight_decay, above_zero=False)
    groups = by_adapter(plan, _rates_group)
    faster = _times(learning_rate, ratio)
    rates = {
        "lora_a": (learning_rate, weight_decay),
        "embedding": (embedding_learning_rate, weight_decay),
        "lora_b": (faster, weight_decay),
        "no_decay": (faster, 0.0),
    }
    used = set(jax.tree.leaves(groups))
    transforms: dict[Hashable, optax.GradientTransformation] = {
        name: _transform(optimizer, rate, decay)
        for name, (rate, decay) in rates.items()
        if name in used
    }
    return optax.partition(transforms, groups)


def _rates_group(group: GroupPlan, adapter: AdapterPlan, name: str) -> str:
    label = label_of(group, adapter, name)
    if label == "embedding":
        return label
    if adapter.kind in (MODULES_TO_SAVE, TRAINABLE_TOKENS) and len(group.shape) > 1:
        return "lora_a"
    if label == "lora_a":
        return label
    # PEFT goes by the name: what has "bias" in it, and the weight of a LayerNorm.
    decays = "bias" not in adapter.key and (adapter.kind == LORA or leaf_name(group.key) != "scale")
    return "lora_b" if decays and adapter.kind != BIAS else "no_decay"


def _transform(optimizer: Callable[..., Any], rate: Any, decay: float) -> Any:
    if "weight_decay" in getattr(optimizer, "keywords", {}):
        raise ValueError(
            "lora_plus: the optimizer is bound to a weight_decay of its own; give it to lora_plus, "
            "which does not decay biases"
        )
    parameters = inspect.signature(optimizer).parameters
    if "weight_decay" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return optimizer(rate, weight_decay=decay)
    if decay:
        raise ValueError(
            f"lora_plus: weight_decay={decay}, but the optimizer has no argument weight_decay; "
            "take one that has it, as optax.adamw, or leave it at 0"
        )
    return optimizer(rate)


def _times(rate: Any, ratio: Any) -> Any:
    if callable(rate):
        return lambda count: rate(count) * ratio
    return ratio * rate


def _check_number(name: str, value: Any, *, above_zero: bool) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    least = math.ulp(0) if above_zero else 0
    if not number or not least <= float(value) < math.inf:
        raise ValueError(
            f"lora_plus: {name}={value!r}; expected a finite number "
            f"{'above 0' if above_zero else 'from 0'}"
        )

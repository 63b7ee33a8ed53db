"""Dropout that a config asks for and that is not on."""

from __future__ import annotations

import warnings

from flax_tied_lora._planning.plan import Plan


class NoDropoutWarning(UserWarning):
    """The config has a ``lora_dropout``, and gradients are taken without it."""

    __module__ = "flax_tied_lora"


def warn_without_dropout(what: str, plan: Plan, remedy: str, stacklevel: int) -> None:
    """Warns that a config's dropout is not on, if it has any; Python shows it once for each line.

    Args:
      what: the function that takes gradients.
      remedy: how dropout is turned on.
      stacklevel: of the line that called this function's caller, as `warnings.warn` has it.
    """
    rate = plan.config.lora_dropout
    if rate:
        warnings.warn(
            f"{what}: the config has lora_dropout={rate}, and no dropout is on: {remedy}. Train "
            "without it by a config of lora_dropout=0",
            NoDropoutWarning,
            stacklevel=stacklevel + 1,
        )

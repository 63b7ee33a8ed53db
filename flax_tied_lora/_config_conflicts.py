"""Which fields of a `LoraConfig` contradict each other; each error names both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flax_tied_lora import _config_checks as check

if TYPE_CHECKING:
    from flax_tied_lora._config import LoraConfig


def refuse_contradictions(config: LoraConfig) -> None:
    """Raises a ValueError where two checked fields cannot both hold."""
    _refuse_no_targets(config)
    _refuse_layers_of_a_regex(config)
    _refuse_named_twice(config)
    _refuse_odd_ranks(config)
    if config.target_parameters:
        for field in ("lora_dropout", "use_dora", "fan_in_fan_out"):
            if getattr(config, field):  # as PEFT's ParamWrapper
                raise ValueError(
                    f"LoraConfig: {field}={getattr(config, field)} does not go with "
                    f"target_parameters={config.target_parameters}, whose inputs nobody sees; "
                    "leave one of the two out"
                )


def _refuse_no_targets(config: LoraConfig) -> None:
    others = ("target_parameters", "modules_to_save", "trainable_token_indices")
    if config.target_modules == () and not any(getattr(config, name) for name in others):
        raise ValueError(
            "LoraConfig: target_modules is empty, so nothing would be adapted; list some names, or "
            f"give one of {', '.join(others)}"
        )


def _refuse_layers_of_a_regex(config: LoraConfig) -> None:
    for field in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, field) is not None:
            raise ValueError(
                f"LoraConfig: {field} needs target_modules as a list, found the string "
                f"{config.target_modules!r}; list the names, or put the layers into the regex"
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            f"LoraConfig: layers_pattern={config.layers_pattern!r} needs layers_to_transform, "
            "found None; say which layers, or leave layers_pattern out"
        )


def _refuse_named_twice(config: LoraConfig) -> None:
    excluded = check.as_tuple(config.exclude_modules)
    both = [t for t in check.as_tuple(config.target_modules) if t in excluded]
    if both:
        raise ValueError(
            f"LoraConfig: {', '.join(both)} named in both target_modules and exclude_modules; "
            "drop one of them"
        )
    tokens = config.trainable_token_indices
    saved = {_dotted(name) for name in config.modules_to_save or ()}
    tables = [str(name) for name in tokens] if isinstance(tokens, Mapping) else []
    both = [name for name in tables if _dotted(name) in saved]
    if both:
        raise ValueError(
            f"LoraConfig: {', '.join(both)} named in both trainable_token_indices and "
            "modules_to_save, which trains all of its rows already; drop one of them"
        )


def _refuse_odd_ranks(config: LoraConfig) -> None:
    if config.init_lora_weights != "orthogonal":
        return
    ranks = {"r": config.r} | {f"rank_pattern[{k!r}]": v for k, v in config.rank_pattern.items()}
    for field, rank in ranks.items():
        if rank % 2:
            raise ValueError(
                f"LoraConfig: {field}={rank} with init_lora_weights='orthogonal'; expected an even "
                f"rank, such as {rank + 1}: half of it goes to each factor"
            )


def _dotted(name: str) -> str:
    return name.replace("/", ".")

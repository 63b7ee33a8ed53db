"""A config as a dict and as JSON, under the keys of PEFT's ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax_tied_lora._config import regexes
from flax_tied_lora._config.axes_and_parts import OWN_FIELDS, OWN_KEY
from flax_tied_lora._config.checks import not_carried_out
from flax_tied_lora._config.patterns import is_name

# Fields of PEFT's config that this library does not carry out, with PEFT's defaults: no fields of
# `LoraConfig`, but keys of every file. One that is carried out moves from here to `LoraConfig`.
NOT_CARRIED_OUT: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "runtime_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
_NEVER_STORED = "runtime_config"  # by PEFT neither


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the fields of a config as plain Python values, as PEFT's file has them."""
    values = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    ours = {name: values.pop(name) for name in OWN_FIELDS}
    values |= {k: _plain(v) for k, v in NOT_CARRIED_OUT.items() if k != _NEVER_STORED}
    return values | ({OWN_KEY: ours} if any(ours.values()) else {})


def from_dict(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config's fields from what `to_dict` returned, or from PEFT's file.

    Raises:
      TypeError: not a mapping.
      NotImplementedError: a field that is not carried out is at another value than PEFT's default.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"LoraConfig.from_dict: expected a mapping, found {fields!r}")
    ours = fields.get(OWN_KEY, {})
    if not isinstance(ours, Mapping):
        raise TypeError(f"LoraConfig.from_dict: {OWN_KEY}={ours!r}; expected a mapping")
    found = {}
    for name, value in fields.items():
        if name in NOT_CARRIED_OUT:
            _refuse_unless_default(name, value)
        elif name != OWN_KEY:
            found[str(name)] = value
    return found | {str(name): value for name, value in ours.items()}


def from_others(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `from_dict` does, where somebody else may have written the regexes.

    Raises:
      ValueError: matching one of them may take without bound; and all that `from_dict` raises.
    """
    found = from_dict(fields)
    for field, pattern in _regexes(found):
        if why := regexes.problem(pattern):
            raise ValueError(
                f"LoraConfig: {field}={pattern!r} in a file or a dict may take hours to match: "
                f"{why}. List the names in its place; or if you trust it, "
                f"give it yourself, LoraConfig({field}=...)"
            )
    return found


def _regexes(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(field)
        if isinstance(value, str) and _is_regex(value):
            yield field, value
    for field in ("layers_pattern", "rank_pattern", "alpha_pattern", "axes", "parts"):
        value = fields.get(field)
        for pattern in value if isinstance(value, Mapping | list | tuple) else ():
            if isinstance(pattern, str) and not is_name(pattern) and _is_regex(pattern):
                yield field, pattern


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False  # which `LoraConfig` says better
    return True


def from_json(text: str) -> Any:
    """Returns what a JSON text holds.

    Raises:
      ValueError: not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"LoraConfig.from_json: not JSON: {error}") from error


def _refuse_unless_default(field: str, value: Any) -> None:
    default = NOT_CARRIED_OUT[field]
    same = isinstance(value, type(default)) and value == default
    if value is not None and not same:
        raise not_carried_out(field, value, default)


def _plain(value: Any) -> Any:
    """Returns tuples as lists and mappings as dicts, as JSON has them."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value

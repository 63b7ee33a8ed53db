"""The targets of several configs as those of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._config.axes_and_parts import OWN_FIELDS
from flax_tied_lora._config.checks import as_tuple
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._planning.all_linear import ALL_LINEAR

# The fields that say what is adapted. Of the targets a union can be made, of the others none.
_WHERE = ("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying")


def _union(field: str, mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    union: dict[str, Any] = {}
    for pattern, value in (item for m in mappings for item in m.items()):
        if union.setdefault(pattern, value) != value:
            raise ValueError(
                f"combine: {field} of {pattern!r} is {union[pattern]} in one config and {value} in "
                "another; wrap the adapters with the same"
            )
    return union


def united_targets(configs: Sequence[LoraConfig]) -> dict[str, Any]:
    """Returns the fields by which a config targets what any of several does.

    Raises:
      ValueError: there is no such config.
    """
    targets = [c.target_modules for c in configs]
    parameters = tuple(dict.fromkeys(p for c in configs for p in as_tuple(c.target_parameters)))
    fields = {"target_modules": targets[0], "target_parameters": parameters or None}
    fields |= {field: _union(field, [getattr(c, field) for c in configs]) for field in OWN_FIELDS}
    compared = [*_WHERE, "target_modules"]
    different = [
        f for f in compared if any(getattr(c, f) != getattr(configs[0], f) for c in configs)
    ]
    if not different:
        return fields
    regexes = [isinstance(t, str) and t.lower() != ALL_LINEAR for t in targets]
    if different == ["target_modules"] and all(regexes):
        joined = "|".join(f"({t})" for t in dict.fromkeys(targets))
        return fields | {"target_modules": joined}
    if different == ["target_modules"] and not any(isinstance(t, str) for t in targets):
        union = dict.fromkeys(name for t in targets for name in as_tuple(t))
        return fields | {"target_modules": tuple(union) or None}
    values = " and ".join(dict.fromkeys(repr(getattr(c, different[0])) for c in configs))
    raise ValueError(
        f"combine: the configs have different {different[0]}, {values}, and no config says what "
        "any of them does; wrap the adapters with the same one (of target_modules, lists or "
        "regexes may differ)"
    )

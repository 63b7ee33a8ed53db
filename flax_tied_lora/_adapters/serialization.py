"""Flax's serialization (``flax.serialization``): how an `Adapted` is a state dict, and back.

Without it an `Adapted` would be a leaf to Flax, taken and given back unread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax.serialization import from_state_dict, register_serialization_state, to_state_dict

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._tree.keys import is_key
from flax_tied_lora._tree.paths import TiedLeaf, describe
from flax_tied_lora._tree.quantized_array import QuantizedArray

_FIELDS = ("params", "adapters", "scaling", "rng", "slot")


def _of_adapted(adapted: Adapted) -> dict[str, Any]:
    values = {name: getattr(adapted, name) for name in _FIELDS}
    rng = values["rng"]
    values["rng"] = jax.random.key_data(rng) if is_key(rng) else rng
    return {name: to_state_dict(value) for name, value in values.items()}


def _adapted_from(adapted: Adapted, state: Any) -> Adapted:
    _check_fields("Adapted", _FIELDS, state)
    values = {
        name: from_state_dict(getattr(adapted, name), state[name], name)
        for name in ("params", "adapters", "scaling")
    }
    _check_shapes(adapted.scaling, values["scaling"])
    rng = state["rng"]
    if rng is not None:
        impl = None if adapted.rng is None else jax.random.key_impl(adapted.rng)
        rng = jax.random.wrap_key_data(rng, impl=impl)
    rest = dataclasses.replace(adapted, params=values["params"], scaling=values["scaling"], rng=rng)
    return rest.replace(adapters=values["adapters"], slot=state["slot"])


def _of_marker(marker: TiedLeaf) -> dict[str, Any]:
    return {"tied_to": marker.key, "transposed": marker.transposed}


def _marker_from(marker: TiedLeaf, state: Any) -> TiedLeaf:
    if not isinstance(state, Mapping) or state != _of_marker(marker):
        raise ValueError(
            f"from_state_dict: found {_shown(state)} where the target has {marker!r}: its ties are "
            "others; wrap the params with the same ties as those that were saved"
        )
    return marker


def _of_quantized(array: QuantizedArray) -> dict[str, Any]:
    return {"values": array.values, "scales": array.scales, "qtype": array.qtype,
            "axis": array.axis}  # fmt: skip


def _quantized_from(array: QuantizedArray, state: Any) -> QuantizedArray:
    _check_fields("QuantizedArray", ("values", "scales", "qtype", "axis"), state)
    found = QuantizedArray(**state)
    if (found.qtype, found.axis, found.shape) != (array.qtype, array.axis, array.shape):
        raise ValueError(
            f"from_state_dict: found {found!r} where the target has {array!r}; quantise the params "
            "as those that were saved"
        )
    return found


def _check_fields(what: str, fields: tuple[str, ...], state: Any) -> None:
    if not isinstance(state, Mapping) or set(state) != set(fields):
        raise ValueError(
            f"from_state_dict: found {_shown(state)} for {what}; expected a dict with "
            f"{', '.join(fields)}, as to_state_dict makes it"
        )


def _check_shapes(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for key, array in wanted.items():
        if getattr(array, "shape", None) != getattr(found[key], "shape", None):
            raise ValueError(
                f"from_state_dict: the scaling of {key!r} is {describe(found[key])}; the target "
                f"has {describe(array)}"
            )


def _shown(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a dict with {', '.join(map(str, state)) or 'nothing'}"
    return describe(state) if hasattr(state, "shape") else repr(state)[:80]


for _kind, _to_state, _from_state in (
    (Adapted, _of_adapted, _adapted_from),
    (TiedLeaf, _of_marker, _marker_from),
    (QuantizedArray, _of_quantized, _quantized_from),
):
    register_serialization_state(_kind, _to_state, _from_state, override=True)

"""The base's own embeddings in an adapter's file: PEFT puts them there where tokens were added."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._names.layout import TorchWeight, from_torch_array, to_torch_array
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.config_out import Placed
from flax_tied_lora._peft.adapter.folder import AdapterFiles
from flax_tied_lora._peft.adapter.named import Content, is_base
from flax_tied_lora._peft.adapter.slots import PREFIX, weights_of
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._peft.tables import table_of
from flax_tied_lora._planning.plan import LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS, Plan
from flax_tied_lora._tree.boxes import in_place, unboxed
from flax_tied_lora._tree.paths import flatten, is_marker
from flax_tied_lora._tree.processes import gathered
from flax_tied_lora._tree.quantized_array import plain_array

# Name, shape, dtype, and what makes the tensor.
Entry = tuple[str, tuple[int, ...], Any, Any]

# What PEFT calls the module that it puts another one in the place of.
_INSIDE = {LORA: ".base_layer", TRAINABLE_TOKENS: ".token_adapter.base_layer"}


def is_resized(adapted: Adapted, names: Names, base_model: str | None) -> bool:
    """Returns whether a base model in a local directory has another vocabulary than the params.

    Follows ``get_peft_model_state_dict`` of ``peft.utils.save_and_load``.
    """
    config = Path(base_model, "config.json") if base_model else None
    if config is None or not config.is_file():
        return False
    try:
        size = json.loads(config.read_text()).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return False
    rows = _rows(flatten(adapted.params)[0], names)
    return None not in (size, rows) and size != rows


def base_entries(
    adapted: Adapted, placed: Sequence[Placed], names: Names, written: Collection[str]
) -> Iterator[Entry]:
    """Yields the base's tensors that have an entry for each token: tables, heads, their biases.

    A tied table is there once, by the name of its first module without a copy of its own: in
    PyTorch it is one parameter.

    Args:
      placed: every adapter.
      written: names of the tensors that are in the file already.
    """
    leaves, _ = flatten(adapted.params)
    size = _rows(leaves, names)
    if size is None:
        raise AdapterFileError(
            "save_adapter: save_embedding_layers=True, and by the names no leaf is the input "
            "embedding; expected one of the family's names, or a tie, in names_of"
        )
    kinds: dict[str, set[str]] = {}
    for p in placed:
        for module in p.modules:
            kinds.setdefault(module, set()).add(p.adapter.kind)
    for path, own in _made(leaves, names).items():
        array = unboxed(leaves[path])
        for weight in own:
            shape = weight.shape(array.shape)
            there = kinds.get(weight.module, set())
            if size not in shape or re.search(r"\d", weight.name) or MODULES_TO_SAVE in there:
                continue
            inside = next((_INSIDE[k] for k in _INSIDE if k in there), "")
            name = f"{PREFIX}{weight.module}{inside}.{weight.parameter}"
            name = name if weight.module else PREFIX + weight.parameter
            if name not in written:
                get = functools.partial(_tensor, gathered(array), weight)
                yield name, shape, np.dtype(array.dtype), get
            break


def _tensor(array: Any, weight: TorchWeight) -> np.ndarray:
    return to_torch_array(jax.device_get(plain_array(array)), weight)


def _made(leaves: Mapping[str, Any], names: Names) -> dict[str, list[TorchWeight]]:
    """Returns for each stored leaf the PyTorch parameters that it is, its own ones first."""
    found = {
        path: weights_of(path, unboxed(leaf).shape, names, leaves)
        for path, leaf in leaves.items()
        if not is_marker(leaf)
    }
    return {path: own for path, own in found.items() if own}


def _rows(leaves: Mapping[str, Any], names: Names) -> int | None:
    """Returns how many rows the input embedding has; None where the names have none."""
    made = {w.name: (path, w) for path, own in _made(leaves, names).items() for w in own}
    table = table_of(made, names)
    if table is None:
        return None
    path, weight = made[table]
    return weight.shape(unboxed(leaves[path]).shape)[0]


def check_base(files: AdapterFiles, content: Content, params: Any, plan: Plan) -> None:
    """Refuses a file whose base embeddings are not those of the params.

    Raises:
      AdapterFileError: they are others.
    """
    leaves, _ = flatten(params)
    # A tied leaf is what its group stores, whatever a loader put in its place.
    stored = _stored(plan)
    for name, path, weight in content.base:
        key, transposed = stored.get(path, (path, False))
        leaf = unboxed(leaves[key])
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        leaf = leaf.T if transposed else leaf
        if not is_base(files, name, leaf, weight):
            shape, ours = files.tensors.shape(name), weight.shape(leaf.shape)
            raise AdapterFileError(
                f"{files.directory}: {name} {list(shape)} is the base's own embedding, and "
                f"it is not {path!r} {list(ours)} of the params; load it into them first "
                '(names.from_state_dict), or pass base_embeddings="load" to take it from the file, '
                f'or base_embeddings="ignore"{_hint(shape, ours)}'
            )


def with_base(files: AdapterFiles, content: Content, adapted: Adapted) -> Adapted:
    """Returns an `Adapted` whose embeddings are those of the file.

    Raises:
      AdapterFileError: one is of another shape than the params', or two that are one leaf here
        differ.
    """
    leaves, treedef = flatten(adapted.params)
    stored, seen = _stored(adapted.plan), dict[str, tuple[str, np.ndarray]]()
    for name, path, weight in content.base:
        key, transposed = stored.get(path, (path, False))
        old = leaves[key]
        shape = tuple(old.shape[::-1] if transposed else old.shape)
        found, ours = tuple(files.tensors.shape(name)), weight.shape(shape)
        if found != ours:
            raise AdapterFileError(
                f"{files.directory}: {name} is {list(found)}, and {path!r} of the params is "
                f"{list(ours)} in PyTorch; expected the same{_hint(found, ours)}"
            )
        array = from_torch_array(files.tensors[name], weight, shape)
        array = array.T if transposed else array
        other, before = seen.setdefault(key, (name, array))
        if not np.array_equal(before, array, equal_nan=True):
            raise AdapterFileError(
                f"{files.directory}: {name} differs from {other}, and both are {key!r} here; "
                "expected copies of one table; the model that wrote them was not tied"
            )
        leaves[key] = in_place(old, jnp.asarray(array.astype(old.dtype)))
    params = jax.tree.unflatten(treedef, list(leaves.values()))
    return adapted.replace(params=params)


def _stored(plan: Plan) -> Mapping[str, tuple[str, bool]]:
    """Returns for each member of a tie group where it is stored, and whether transposed."""
    return {m.path: (g.key, m.transposed) for g in plan.groups for m in g.members}


def _hint(found: Sequence[int], ours: Sequence[int]) -> str:
    if len(found) != len(ours) or found[1:] != tuple(ours[1:]) or found[0] < ours[0]:
        return ""
    return f"; where tokens were added: grow_vocabulary(params, {found[0]}) first"

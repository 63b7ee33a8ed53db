"""The base's embeddings in an adapter's file, where PEFT keeps them if tokens were added."""

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
from flax_tied_lora._names.layout import TorchWeight, from_torch_array
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.file_content import Content, is_base
from flax_tied_lora._peft.adapter.file_tensors import PREFIX
from flax_tied_lora._peft.adapter.folder import AdapterFiles
from flax_tied_lora._peft.adapter.parameters import (
    TorchAdapter,
    parameters_of_leaves,
    torch_array,
)
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._peft.files.safetensors_write import TensorSource
from flax_tied_lora._peft.input_embedding import input_embedding
from flax_tied_lora._planning.plan import LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS, Plan
from flax_tied_lora._tree.boxes import in_place, unboxed
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._tree.processes import gathered

# Where PEFT keeps the module that it has put an adapter in the place of, by kind of adapter.
_INSIDE = {LORA: ".base_layer", TRAINABLE_TOKENS: ".token_adapter.base_layer"}


def is_resized(adapted: Adapted, names: Names, base_model: str | None) -> bool:
    """Returns whether a base model in a local directory has a vocabulary of another size.

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


def refuse_other_vocabulary(
    adapted: Adapted, adapters: Sequence[TorchAdapter], names: Names
) -> None:
    """Refuses adapters of a table that has other rows than the config of the names says.

    Raises:
      AdapterFileError: there is one, which PEFT could not load into that config's model.
    """
    size = _rows(flatten(adapted.params)[0], names)
    if None in (size, names.vocab_size) or size == names.vocab_size:
        return
    for a in adapters:
        odd = [w for w in a.weights if size in w.shape(a.group.shape)]
        odd = [w for w in odd if not re.search(r"\d", w.name)]
        if a.adapter.kind in (LORA, MODULES_TO_SAVE) and odd:
            axis = "row" if odd[0].kind == "embedding" else "out"
            line = (
                f"({a.group.key!r}, {odd[0].name!r}, None, {odd[0].kind!r}, "
                f'{{"{axis}": Padding(leaf={size}, torch={names.vocab_size})}})'
            )
            raise AdapterFileError(
                f"save_adapter: {a.group.key!r} {list(a.group.shape)} is adapted, and is "
                f"{odd[0].name} with {size} rows in PyTorch, where the config that names_of was "
                f"given has vocab_size={names.vocab_size}. Where rows are padding, say so: "
                f"names_of(..., extra=[{line}]). Where tokens were added, give names_of the config "
                "of the grown model, or save_embedding_layers=True"
            )


def base_entries(
    adapted: Adapted, adapters: Sequence[TorchAdapter], names: Names, written: Collection[str]
) -> Iterator[TensorSource]:
    """Yields the base's tensors that have an entry for each token: tables, heads, their biases.

    A tied table, one parameter in PyTorch, is written once, under the name of its first module that
    is not copied whole.

    Args:
      adapters: every adapter of ``adapted``.
      written: names of the tensors that the file has already.

    Raises:
      AdapterFileError: the names do not say which leaf is the input embedding.
    """
    leaves, _ = flatten(adapted.params)
    size = _rows(leaves, names)
    if size is None:
        raise AdapterFileError(
            "save_adapter: save_embedding_layers=True, and by the names no leaf is the input "
            "embedding; expected one of the family's names, or a tie, in names_of"
        )
    kinds_of: dict[str, set[str]] = {}
    for a in adapters:
        for module in a.modules:
            kinds_of.setdefault(module, set()).add(a.adapter.kind)
    for path, weights in parameters_of_leaves(leaves, names).items():
        for weight in weights:
            kinds = kinds_of.get(weight.module, set())
            has_tokens = size in weight.shape(unboxed(leaves[path]).shape)
            if not has_tokens or re.search(r"\d", weight.name) or MODULES_TO_SAVE in kinds:
                continue
            inside = next((_INSIDE[k] for k in _INSIDE if k in kinds), "")
            name = f"{PREFIX}{weight.module}{inside}.{weight.parameter}"
            name = name if weight.module else PREFIX + weight.parameter
            if name not in written:
                yield leaf_source(name, leaves[path], weight)
            break


def leaf_source(name: str, leaf: Any, weight: TorchWeight) -> TensorSource:
    """Returns a leaf of the params, or a slice of it, as a tensor to be written."""
    array = unboxed(leaf)
    get = functools.partial(torch_array, gathered(array), weight)
    return TensorSource(name, weight.shape(array.shape), np.dtype(array.dtype), get)


def _rows(leaves: Mapping[str, Any], names: Names) -> int | None:
    """Returns how many rows the input embedding has; None where the names know of none."""
    parameters = {
        w.name: (path, w)
        for path, weights in parameters_of_leaves(leaves, names).items()
        for w in weights
    }
    table = input_embedding(parameters, names)
    if table is None:
        return None
    path, weight = parameters[table]
    return weight.shape(unboxed(leaves[path]).shape)[0]


def check_base(files: AdapterFiles, content: Content, params: Any, plan: Plan) -> None:
    """Checks that the base embeddings in a file are those of the params.

    Raises:
      AdapterFileError: they differ.
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
            theirs, ours = files.tensors.shape(name), weight.shape(leaf.shape)
            raise AdapterFileError(
                f"{files.directory}: {name} {list(theirs)} is the base's own embedding, and "
                f"it is not {path!r} {list(ours)} of the params; load it into them first "
                '(names.from_state_dict), or pass base_embeddings="load" to take it from the file, '
                f'or base_embeddings="ignore"{_hint(theirs, ours)}'
            )


def with_base(files: AdapterFiles, content: Content, adapted: Adapted) -> Adapted:
    """Returns an `Adapted` whose embeddings are those of the file.

    Raises:
      AdapterFileError: one has another shape than in the params, or two that are one leaf of the
        params differ.
    """
    leaves, treedef = flatten(adapted.params)
    stored, seen = _stored(adapted.plan), dict[str, tuple[str, np.ndarray]]()
    for name, path, weight in content.base:
        key, transposed = stored.get(path, (path, False))
        old = leaves[key]
        shape = tuple(old.shape[::-1] if transposed else old.shape)
        theirs, ours = tuple(files.tensors.shape(name)), weight.shape(shape)
        if theirs != ours:
            raise AdapterFileError(
                f"{files.directory}: {name} is {list(theirs)}, and {path!r} of the params is "
                f"{list(ours)} in PyTorch; expected the same{_hint(theirs, ours)}"
            )
        array = from_torch_array(files.tensors[name], weight, shape)
        array = array.T if transposed else array
        other, first = seen.setdefault(key, (name, array))
        if not np.array_equal(first, array, equal_nan=True):
            raise AdapterFileError(
                f"{files.directory}: {name} differs from {other}, and both are {key!r} here; "
                "expected copies of one table; the model that wrote them was not tied"
            )
        leaves[key] = in_place(old, jnp.asarray(array.astype(old.dtype)))
    params = jax.tree.unflatten(treedef, list(leaves.values()))
    return adapted.replace(params=params)


def _stored(plan: Plan) -> Mapping[str, tuple[str, bool]]:
    """Returns ``{member: (path where its group is stored, whether it is the transpose)}``."""
    return {m.path: (g.key, m.transposed) for g in plan.groups for m in g.members}


def _hint(theirs: Sequence[int], ours: Sequence[int]) -> str:
    """Returns a remedy for an error where the file's table has more rows than the params'."""
    if len(theirs) != len(ours) or theirs[1:] != tuple(ours[1:]) or theirs[0] < ours[0]:
        return ""
    return f"; where tokens were added: grow_vocabulary(params, {theirs[0]}) first"

"""Numbers of replaced rows, here and in PyTorch, where the table of names moves a table's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._peft.adapter.parameters import TorchAdapter
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import flatten, matches

# {PyTorch module: (path of its leaf, where in the leaf)}
Tables = Mapping[str, tuple[str, TorchWeight]]


def torch_rows(torch_adapter: TorchAdapter) -> list[int]:
    """Returns the rows that an adapter replaces, as PyTorch numbers them.

    Raises:
      AdapterFileError: PyTorch's parameter has no such row.
    """
    group, tokens = torch_adapter.group, torch_adapter.adapter.tokens
    weight, axis = torch_adapter.weights[0], group.token_axis
    if not any(a == axis for a, _ in weight.maps):
        return list(tokens)
    order = weight.order(axis, group.shape[axis])
    place = {row: i for i, row in enumerate(order.tolist())}
    for row in tokens:
        if row not in place:
            raise AdapterFileError(
                f"save_adapter: row {row} of {group.key!r} is trained, and {weight.name!r} has no "
                "such row, by its maps in the table of names; expected rows that PyTorch has"
            )
    return [place[row] for row in tokens]


def with_leaf_rows(config: LoraConfig, tables: Tables, params: Any) -> LoraConfig:
    """Returns a file's config with the numbers that the replaced rows have here.

    Args:
      tables: the modules whose rows are replaced.

    Raises:
      AdapterFileError: the leaf has no such row.
    """
    wanted: Any = config.trainable_token_indices
    moved = {module: place for module, place in tables.items() if place[1].maps}
    if wanted is None or not moved:
        return config
    leaves, _ = flatten(params)

    def rows(tokens: Iterable[int], path: str, weight: TorchWeight) -> Sequence[int]:
        shape = unboxed(leaves[path]).shape
        axis = weight.dims[0 if weight.kind != "conv1d" else 1][0]
        order = weight.order(axis, shape[axis]).tolist()
        for token in tokens:
            if not 0 <= token < len(order) or order[token] < 0:
                raise AdapterFileError(
                    f"{weight.name} has row {token} trained, and the leaf {path!r} {list(shape)} "
                    "has no such row, by its maps in the table of names"
                )
        return [order[token] for token in tokens]

    if not isinstance(wanted, Mapping):
        changed: Any = rows(wanted, *next(iter(moved.values())))
    else:
        changed = {
            name: rows(tokens, *place) if (place := _named(name, moved)) else tokens
            for name, tokens in wanted.items()
        }
    return dataclasses.replace(config, trainable_token_indices=changed)


def _named(name: str, tables: Tables) -> tuple[str, TorchWeight] | None:
    return next((place for module, place in tables.items() if matches((name,), module)), None)

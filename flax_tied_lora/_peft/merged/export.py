"""A merged model as transformers reads it: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._names.state_dict import state_entries
from flax_tied_lora._peft.files.errors import AdapterFileError, operating_system
from flax_tied_lora._peft.files.safetensors_write import write_safetensors
from flax_tied_lora._peft.input_embedding import input_embedding
from flax_tied_lora._peft.merged.config import (
    T5_LIKE,
    check_sizes,
    config_text,
    plain_config,
    settled_tie,
)
from flax_tied_lora._peft.merged.leaves import leaves_of
from flax_tied_lora._peft.merged.ties import (
    heads_beside,
    heads_of,
    lookups_beside,
    parameters_by_name,
    untied_names,
    without_tied_copies,
)

CONFIG = "config.json"
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def save_merged(
    directory: str | os.PathLike[str],
    adapted: Any,
    names: Names,
    config: Any,
    *,
    dtype: DTypeLike | None = None,
    untie: Mapping[str, str] | None = None,
    max_shard_size: int | str | None = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes a model, its adapters merged, as a directory that transformers' PyTorch models load.

    ``config.json`` and ``model.safetensors``, or shards of it and their index, are written; the
    tokenizer and ``generation_config.json`` are for you to copy from the base model. Each tensor is
    made when its turn comes: beside the params, memory is needed for one tensor, and for
    materialising its delta. Everything is written, the config last, or nothing; other files stay.

    A tie stays a tie: the table is stored once, and the config says ``tie_word_embeddings: true``.

    Args:
      directory: where to write; made if it does not exist.
      adapted: `Adapted`, or plain params.
      names: of the model, from `names.names_of`.
      config: of the PyTorch model: a transformers config, or a dict as in its ``config.json``. It
        is written as it is, but for three fields. ``tie_word_embeddings`` is filled in where it is
        missing, and set to false with ``untie``; otherwise a config that contradicts the names is
        an error. ``dtype`` (``torch_dtype``, where the config has that) becomes the dtype of the
        tensors, the widest of several. ``architectures`` loses the "Flax" in front of its names.
      dtype: float32, bfloat16, float16 or float64, for all floating-point tensors; by default each
        keeps its leaf's. Deltas are materialised in float32 or wider, and rounded once.
      untie: as in `flax_tied_lora.merge`, for separate adapters of one table: the output
        projection's copy is stored under its PyTorch name, and ties of the two in ``names`` are
        ignored. Not for T5, whose PyTorch model scales the logits of a tied head only.
      max_shard_size: bytes of tensors in a file at most, or "5GB"; None: one file.
      overwrite: whether to replace an existing model; False: it is an error.

    Raises:
      UnmappedError: a leaf has no PyTorch name; the error shows a line to add.
      ValueError: params, names and config contradict each other about the tie (a guess would give
        a model with a random head, or without its trained one); or the config's vocabulary or width
        is not the table's; or as `flax_tied_lora.merge`.
      TypeError: the config, the names or the dtype is of another kind.
      AdapterFileError: the directory holds a model or an adapter, or the operating system refuses.
    """
    fields = plain_config(config)
    if not isinstance(names, Names):
        raise TypeError(
            f"save_merged: names is a {type(names).__name__}; expected what "
            "flax_tied_lora.names.names_of returns"
        )
    leaves = leaves_of(adapted, _dtype(dtype), untie)
    if untie and isinstance(adapted, Adapted):
        names = untied_names(names, leaves, untie, adapted.plan)
    leaves = without_tied_copies(leaves, names)
    parameters = parameters_by_name(leaves, names)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves.items()}
    entries = state_entries(shapes, names)

    table = input_embedding(parameters, names)
    tied = fields.get("tie_word_embeddings")
    if table is not None:
        path, weight = parameters[table]
        check_sizes(fields, table, weight.shape(leaves[path].shape))
        heads = heads_beside(parameters, leaves, table)
        tied = settled_tie(fields, bool(heads_of(names, leaves)), table, heads, bool(untie))
    sources = {entry.name: entry for entry in entries}
    if tied is False and fields["model_type"] not in T5_LIKE:
        # transformers 4.57 ties BART's lookups only where it ties the head, too.
        for lookup, shared in lookups_beside(parameters, names).items():
            sources[lookup] = sources[shared]._replace(name=lookup)
            parameters[lookup] = parameters[shared]
    text = config_text(fields, tied, {np.dtype(entry.dtype) for entry in entries})

    def get(name: str) -> np.ndarray:
        path, weight = parameters[name]
        return leaves[path].torch(weight)

    directory = Path(directory)
    _check_no_adapter(directory)
    write_safetensors(
        directory,
        [(e.name, e.shape, e.dtype, functools.partial(get, e.name)) for e in sources.values()],
        max_shard_size=max_shard_size,
        texts={CONFIG: text},
        overwrite=overwrite,
    )


def _dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        result = np.dtype(jax.numpy.dtype(dtype))
    except TypeError:
        result = None
    if result is None or str(result) not in _DTYPES:
        raise TypeError(f"save_merged: dtype={dtype!r}; expected one of {', '.join(_DTYPES)}")
    return result


def _check_no_adapter(directory: Path) -> None:
    """Refuses a directory with an adapter, which transformers would apply to the merged model."""
    adapter = directory / "adapter_config.json"
    with operating_system(directory, "look into the directory"):
        exists = adapter.exists()
    if exists:
        raise AdapterFileError(
            f"{adapter}: found an adapter; expected a directory without one, since transformers "
            "would load it on top of the merged weights; give another directory"
        )

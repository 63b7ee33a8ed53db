"""`save_adapter`: an `Adapted` as a directory that PEFT loads."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._adapters.merge import check_adapted
from flax_tied_lora._adapters.terms import shapes_of
from flax_tied_lora._names.layout import TorchWeight, to_torch_array
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.base_tensors import base_entries, is_resized
from flax_tied_lora._peft.adapter.config_out import Placed, config_of
from flax_tied_lora._peft.adapter.folder import write_adapter
from flax_tied_lora._peft.adapter.slots import PREFIX, Slot, modules_of, slots_of, weights_of
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._planning.plan import LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import flatten, is_marker
from flax_tied_lora._tree.processes import gathered


def save_adapter(
    directory: str | os.PathLike[str], adapted: Adapted, names: Names, *,
    base_model_name_or_path: str | None = None, dtype: DTypeLike | None = None,
    overwrite: bool = False, save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:  # fmt: skip
    """Writes adapters as PEFT's ``save_pretrained`` does: config and safetensors, no base.

    ``PeftModel.from_pretrained``, vLLM and SGLang load the directory. A tied adapter is in the file
    for each of its modules, and the config says ``ensure_weight_tying`` where PEFT then ties them,
    too. Targets and patterns are written as they are where PEFT, on PyTorch's names, understands
    the same by them, and as full names where it does not.

    Of several processes with one mesh all have to call it; the first writes, for all.

    Args:
      directory: where to write; all or nothing is written.
      adapted: what `wrap` returned, trained.
      names: of the model, from `names.names_of`.
      base_model_name_or_path: of the base model; default: the config's.
      dtype: of the factors in the file; default: their own, float32.
      overwrite: whether to replace an adapter that is there.
      save_embedding_layers: whether the frozen embeddings, an output projection of its own, and
        biases of the logits go into the file, too: where tokens were added (`grow_vocabulary`), a
        resized model in PyTorch has other rows for them. ``"auto"``: if the base model is a local
        directory whose ``config.json`` has another ``vocab_size``. (PEFT's "auto" also does where
        the embedding has factors.)

    Raises:
      TypeError: not an `Adapted`.
      ValueError: an option is unknown.
      UnmappedError: a leaf has no PyTorch name; it shows the line to add.
      AdapterFileError: what cannot be said in PEFT's file; or the directory cannot be written.
    """
    check_adapted("save_adapter", adapted)
    if not isinstance(names, Names):
        raise TypeError(f"save_adapter: names is a {type(names).__name__}; expected names_of(...)")
    if save_embedding_layers not in (True, False, "auto"):
        raise ValueError(
            f"save_adapter: save_embedding_layers={save_embedding_layers!r}; expected True, False "
            "or 'auto'"
        )
    for key, name, found, expected in shapes_of(adapted):
        if found != expected:
            raise AdapterFileError(
                f"save_adapter: {name} of {key!r} is {list(found)}, expected {list(expected)}: "
                "stacked adapters are saved one by one"
            )
    # Factors are small: where they are spread over processes, each has them whole here.
    adapted = adapted.replace(
        adapters=gathered(adapted.adapters), scaling=gathered(adapted.scaling)
    )
    placed = place(adapted, names)
    modules = modules_by_kind(adapted, names)
    config = config_of(adapted, placed, modules, names, base_model_name_or_path)
    entries = []
    for p, slots in zip(placed, all_slots(placed), strict=True):
        own = adapted.adapters[p.adapter.kind][p.adapter.key]
        for slot in slots:
            array = unboxed(own[slot.array] if slot.array else own)
            kind = np.dtype(dtype or array.dtype)
            get = functools.partial(_tensor, slot, array, kind)
            entries.append((slot.name, slot.shape, kind, get))
    entries += _beside(adapted, placed, names, {entry[0] for entry in entries})
    base_model = config["base_model_name_or_path"]
    if save_embedding_layers == "auto":
        save_embedding_layers = is_resized(adapted, names, base_model)
    if save_embedding_layers:
        entries += base_entries(adapted, placed, names, {entry[0] for entry in entries})
    text = json.dumps(config, indent=2, allow_nan=False)
    write_adapter(directory, text, sorted(entries, key=lambda e: e[0]), overwrite=overwrite)


def _tensor(slot: Slot, array: Any, dtype: np.dtype) -> np.ndarray:
    return slot.get(jax.device_get(array)).astype(dtype)


def _beside(
    adapted: Adapted, placed: Sequence[Placed], names: Names, written: Collection[str]
) -> Iterator[tuple[str, tuple[int, ...], Any, Any]]:
    """Yields what else is in a saved module, which PEFT copies whole: the bias of a tied head."""
    saved = {m for p in placed if p.adapter.kind == MODULES_TO_SAVE for m in p.modules}
    leaves, _ = flatten(adapted.params)
    for path, leaf in leaves.items() if saved else ():
        if is_marker(leaf):
            continue
        array = unboxed(leaf)
        for weight in weights_of(path, array.shape, names, leaves):
            name = PREFIX + weight.name
            if weight.module in saved and name not in written:
                get = functools.partial(_own, gathered(array), weight)
                yield name, weight.shape(array.shape), np.dtype(array.dtype), get


def _own(array: Any, weight: TorchWeight) -> np.ndarray:
    return to_torch_array(jax.device_get(array), weight)


def place(adapted: Adapted, names: Names) -> list[Placed]:
    """Returns every adapter with the PyTorch parameters that it is for.

    Raises:
      AdapterFileError: PEFT's file has no place for one.
    """
    plan = adapted.plan
    leaves, _ = flatten(adapted.params)
    placed = []
    for group, adapter in plan.adapters():
        weights = modules_of(group, adapter, names, leaves)
        if len(weights) > 1 and weights[0].parameter == "weight" and names.family.endswith("t5"):
            raise AdapterFileError(
                f"save_adapter: {group.key!r} is T5's shared table, whose encoder and decoder "
                "have no embedding modules of their own that PEFT could adapt; save_merged writes "
                "a model"
            )
        if adapter.dora and len(weights) > 1 and not weights[0].part:
            raise AdapterFileError(
                f"save_adapter: use_dora on {group.key!r}, which is tied: one magnitude of its "
                "columns here, two of different sizes in PEFT; save_merged writes a model"
            )
        how = plan.config.init_lora_weights
        if adapter.residual and (len(weights) > 1 or weights[0].kind == "embedding"):
            raise AdapterFileError(
                f"save_adapter: init_lora_weights={how!r} on {group.key!r}: PEFT leaves tables as "
                "they are, and would read another base; save_merged writes a model"
            )
        if adapter.residual and "niter" in str(how):
            raise AdapterFileError(
                f"save_adapter: init_lora_weights={how!r} took a random part out of the base, "
                "which PEFT would draw anew; use 'pissa', or save_merged writes a model"
            )
        if adapter.kind == TRAINABLE_TOKENS and not adapter.separate:
            weights = weights[:1]  # PEFT ties the others to the embedding's by itself
        placed.append(Placed(group, adapter, tuple(weights)))
    _check_together(placed)
    saved = {
        w.module for p in placed if p.adapter.kind == MODULES_TO_SAVE
        for w in p.weights if w.parameter == "weight"
    }  # fmt: skip
    return [_inside(p, saved) for p in placed]


def _inside(placed: Placed, saved: Collection[str]) -> Placed:
    """Returns a copied bias with those of its modules that have a copied weight, if any have."""
    if placed.adapter.kind != MODULES_TO_SAVE:
        return placed
    found = tuple(w for w in placed.weights if w.module in saved)
    return dataclasses.replace(placed, weights=found or placed.weights)


def _check_together(placed: list[Placed]) -> None:
    lora = {m for p in placed if p.adapter.kind == LORA for m in p.modules}
    for p in placed:
        both = [m for m in p.modules if m in lora]
        if p.adapter.kind == TRAINABLE_TOKENS and both:
            raise AdapterFileError(
                f"save_adapter: {both[0]!r} has factors and trainable tokens, which PEFT "
                "refuses on one layer; save_merged writes a model"
            )


def all_slots(placed: list[Placed]) -> list[list[Slot]]:
    """Returns the tensors of every adapter.

    Raises:
      AdapterFileError: an adapter's sides are not those of its module.
    """
    lora = {m for p in placed if p.adapter.kind == LORA for m in p.modules}
    try:
        return [slots_of(p.group, p.adapter, p.weights, lora) for p in placed]
    except ValueError as error:
        raise AdapterFileError(f"adapter file: {error}") from error


def modules_by_kind(adapted: Adapted, names: Names) -> Mapping[str, str]:
    """Returns the kind of every module of the model that has a weight, by PyTorch's name.

    Leaves without a PyTorch name, which no adapter is for, are left out.
    """
    leaves, _ = flatten(adapted.params)
    shapes = {p: x.shape for p, x in leaves.items() if not is_marker(x)}
    for group in adapted.plan.groups:
        for member in group.members[1:]:
            shapes[member.path] = group.shape[::-1] if member.transposed else group.shape
    return {
        w.module: w.kind
        for path, shape in shapes.items()
        for w in weights_of(path, shape, names, shapes)
        if w.parameter == "weight"
    }

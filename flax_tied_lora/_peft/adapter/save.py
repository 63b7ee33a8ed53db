"""`save_adapter`: an `Adapted` as a directory that PEFT loads."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from flax_tied_lora._adapters.adapted import Adapted, check_adapted, shapes_of
from flax_tied_lora._adapters.plain_factors import plain as plain_form
from flax_tied_lora._names.axis_maps import Padding, Scale
from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.as_written import note_of
from flax_tied_lora._peft.adapter.base_tensors import (
    base_entries,
    is_resized,
    leaf_source,
    refuse_other_vocabulary,
)
from flax_tied_lora._peft.adapter.file_tensors import PREFIX, FileTensor, file_tensors
from flax_tied_lora._peft.adapter.folder import write_adapter
from flax_tied_lora._peft.adapter.model_card import model_card
from flax_tied_lora._peft.adapter.parameters import (
    TorchAdapter,
    parameters_of_adapter,
    parameters_of_leaf,
    parameters_of_leaves,
    with_kind,
)
from flax_tied_lora._peft.adapter.plain_form import partners, zero_factors
from flax_tied_lora._peft.adapter.saved_config import config_of
from flax_tied_lora._peft.adapter.served import check_served, checked_readers
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._peft.files.safetensors_write import TensorSource
from flax_tied_lora._planning.plan import LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS
from flax_tied_lora._planning.tying import WeightTyingWarning
from flax_tied_lora._ties.lost import from_names, refuse_lost
from flax_tied_lora._ties.sources import Link
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import flatten, is_marker
from flax_tied_lora._tree.processes import gathered


def save_adapter(  # noqa: PLR0913 - the directory's options are many
    directory: str | os.PathLike[str], adapted: Adapted, names: Names, *,
    base_model_name_or_path: str | None = None, dtype: DTypeLike | None = None,
    overwrite: bool = False, save_embedding_layers: bool | Literal["auto"] = "auto",
    plain: bool = False, for_: str | Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Writes adapters as PEFT's ``save_pretrained`` does: config and safetensors, no base.

    ``PeftModel.from_pretrained`` loads the directory, and servers do, which know less than PEFT:
    docs/serving-elsewhere.md has what each of them takes. A tied adapter is written
    once for each of its modules, and the config says ``ensure_weight_tying`` where that makes PEFT
    tie them, too. Targets and patterns are written as they are where they mean the same modules to
    PEFT, which matches them against PyTorch's names, and as full names where they do not.

    Where several processes share a mesh, all of them have to call this; the first one writes.

    Args:
      directory: where to write; everything is written, or nothing.
      adapted: what `wrap` returned, trained.
      names: of the model, from `names.names_of`.
      base_model_name_or_path: of the base model; default: the config's.
      dtype: of the factors in the file; default: as they are, float32.
      overwrite: whether to replace an existing adapter.
      save_embedding_layers: whether the frozen embeddings, an untied output projection, and biases
        of the logits are written, too: where tokens were added (`grow_vocabulary`), a resized model
        in PyTorch has other rows for them. ``"auto"``: if the base model is a local directory whose
        ``config.json`` has another ``vocab_size``. (PEFT's "auto" also writes them where the
        embedding has factors.)
      plain: whether to write what any reader of ``lora_A``, ``lora_B``, ``r`` and ``lora_alpha``
        serves right: `arithmetic.plain` of the adapters, every module by its full name, and factors
        of zeros for modules that servers fuse with adapted ones (query, key and value; gate and
        up). It is loaded again as this plain adapter, and is the same function. Factors that
        started from the weight want ``arithmetic.plain(adapted, params)`` first.
      for_: by whom it will be read, one or several of ``"peft"``, ``"vllm"``, ``"sglang"``,
        ``"llama.cpp"``, ``"mlx"`` and ``"tensorrt-llm"``: what one of them would not serve as it
        was trained is refused. None: what a well-known one would serve wrongly without a word is
        warned of (`ServingWarning`).

    Raises:
      TypeError: not an `Adapted`.
      ValueError: an option or reader is unknown; leaves that `names` has as one tensor have other
        values.
      UnmappedError: a leaf has no PyTorch name; it shows the line to add.
      AdapterFileError: an adapter has no form in PEFT's file, or its table another number of rows
        than the config of the names says; a reader would not serve it as it was trained; or the
        directory cannot be written.
    """
    check_adapted("save_adapter", adapted)
    readers = checked_readers(for_)
    if not isinstance(names, Names):
        raise TypeError(f"save_adapter: names is a {type(names).__name__}; expected names_of(...)")
    if save_embedding_layers not in (True, False, "auto"):
        raise ValueError(
            f"save_adapter: save_embedding_layers={save_embedding_layers!r}; expected True, False "
            "or 'auto'"
        )
    for key, name, shape, expected in shapes_of(adapted):
        if shape != expected:
            raise AdapterFileError(
                f"save_adapter: {name} of {key!r} is {list(shape)}, expected {list(expected)}: "
                "stacked adapters are saved one by one"
            )
    leaves, _ = flatten(adapted.params)
    ties = from_names(leaves, names)
    refuse_lost("save_adapter", leaves, ties)
    _warn_of_halves(adapted, ties)
    # Factors are small enough for each process to hold those that are spread over processes.
    adapted = adapted.replace(
        adapters=gathered(adapted.adapters), scaling=gathered(adapted.scaling)
    )
    if plain:
        adapted = _plain(adapted)
    adapters = _torch_adapters(adapted, names)
    modules = _kinds_of_modules(adapted, names)
    config = config_of(adapted, adapters, modules, names, base_model_name_or_path)
    others = partners({m for a in adapters for m in a.modules}, leaves, names)
    check_served(readers, adapters, config, {} if plain else others, names)
    entries: list[TensorSource] = []
    for a, tensors in zip(adapters, file_tensors(adapters), strict=True):
        arrays = adapted.adapters[a.adapter.kind][a.adapter.key]
        for tensor in tensors:
            array = unboxed(arrays[tensor.array] if tensor.array else arrays)
            stored = np.dtype(dtype or array.dtype)
            get = functools.partial(_values, tensor, array, stored)
            entries.append(TensorSource(tensor.name, tensor.shape, stored, get))
    if plain:
        entries += zero_factors(others, config["r"], np.dtype(dtype or np.float32))
        config |= {"target_modules": sorted({m for a in adapters for m in a.modules} | {*others})}
    entries += _rest_of_saved(adapted, adapters, names, {entry.name for entry in entries})
    base_model = config["base_model_name_or_path"]
    if save_embedding_layers == "auto":
        save_embedding_layers = is_resized(adapted, names, base_model)
    if save_embedding_layers:
        entries += base_entries(adapted, adapters, names, {entry.name for entry in entries})
    else:
        refuse_other_vocabulary(adapted, adapters, names)
    text = json.dumps(config, indent=2, allow_nan=False)
    entries.sort(key=lambda entry: entry.name)
    note = {} if plain else note_of(adapted.plan.config.to_dict(), config)
    metadata = {"format": "pt", **note}
    card = model_card(config, adapters)
    write_adapter(directory, text, entries, metadata=metadata, readme=card, overwrite=overwrite)


def _warn_of_halves(adapted: Adapted, ties: Sequence[Link]) -> None:
    """Warns of a leaf that the names tie to an adapted one, and that is apart and not adapted."""
    groups = {m.path: group for group in adapted.plan.groups for m in group.members}
    for tie in ties:
        ours = [groups.get(path) for path in (tie.first, tie.second)]
        there = [group is not None and bool(group.adapters) for group in ours]
        if ours[0] is ours[1] or there[0] == there[1]:
            continue
        own, other = (tie.first, tie.second) if there[0] else (tie.second, tie.first)
        warnings.warn(
            f"save_adapter: in PyTorch {own!r} and {other!r} are one tensor; here they are two "
            f"arrays, and {own!r} alone is adapted, so its module alone is in the file. If the "
            f"model reads {own!r} in both places, wrap with ties=model.config, or take {other!r} "
            "out of the params",
            WeightTyingWarning,
            stacklevel=3,
        )


def _plain(adapted: Adapted) -> Adapted:
    try:
        return plain_form(adapted)
    except ValueError as error:
        raise AdapterFileError(f"save_adapter: plain=True: {error}") from error


def _values(tensor: FileTensor, array: Any, dtype: np.dtype) -> np.ndarray:
    return tensor.get(jax.device_get(array)).astype(dtype)


def _rest_of_saved(
    adapted: Adapted, adapters: Sequence[TorchAdapter], names: Names, written: Collection[str]
) -> Iterator[TensorSource]:
    """Yields the other parameters of saved modules, which PEFT copies whole: a tied head's bias."""
    saved = {m for a in adapters if a.adapter.kind == MODULES_TO_SAVE for m in a.modules}
    leaves, _ = flatten(adapted.params)
    for path, weights in parameters_of_leaves(leaves, names).items():
        for weight in weights:
            name = PREFIX + weight.name
            if weight.module in saved and name not in written:
                yield leaf_source(name, leaves[path], weight)


def _torch_adapters(adapted: Adapted, names: Names) -> list[TorchAdapter]:
    """Returns every adapter with the PyTorch parameters that it is for.

    Raises:
      AdapterFileError: PEFT's file has no place for one.
    """
    plan = adapted.plan
    leaves, _ = flatten(adapted.params)
    adapters = []
    for group, adapter in plan.adapters():
        weights = parameters_of_adapter(group, adapter, names, leaves)
        if len(weights) > 1 and weights[0].name == "shared.weight" and names.family.endswith("t5"):
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
        init = plan.config.init_lora_weights
        if adapter.residual and (len(weights) > 1 or weights[0].kind == "embedding"):
            raise AdapterFileError(
                f"save_adapter: init_lora_weights={init!r} on {group.key!r}: PEFT leaves tables as "
                "they are, and would read another base; save_merged writes a model"
            )
        if adapter.residual and _moves(weights[0], init):
            raise AdapterFileError(
                f"save_adapter: init_lora_weights={init!r} on {group.key!r}, whose maps in the "
                "table of names change what PEFT would take out of its base; save_merged writes a "
                "model"
            )
        if adapter.residual and "niter" in str(init):
            raise AdapterFileError(
                f"save_adapter: init_lora_weights={init!r} took a random part out of the base, "
                "which PEFT would draw anew; use 'pissa', or save_merged writes a model"
            )
        if adapter.kind == TRAINABLE_TOKENS and not adapter.separate:
            weights = weights[:1]  # PEFT ties the others to the embedding's by itself
        adapters.append(TorchAdapter(group, adapter, tuple(weights)))
    _check_one_kind(adapters)
    saved = {
        w.module for a in adapters if a.adapter.kind == MODULES_TO_SAVE
        for w in a.weights if w.parameter == "weight"
    }  # fmt: skip
    return [_beside_its_weight(a, saved) for a in adapters]


def _moves(weight: TorchWeight, init: object) -> bool:
    """Returns whether a weight's singular vectors (PiSSA), or its QR (OLoRA), are others there."""
    maps = [axis_map for _, axis_map in weight.maps]
    if init == "olora":
        return not all(isinstance(m, Scale) for m in maps)
    return any(isinstance(m, Padding) for m in maps)


def _beside_its_weight(torch_adapter: TorchAdapter, saved: Collection[str]) -> TorchAdapter:
    """Returns a copied bias with those of its modules that have a copied weight, if any have."""
    if torch_adapter.adapter.kind != MODULES_TO_SAVE:
        return torch_adapter
    weights = tuple(w for w in torch_adapter.weights if w.module in saved)
    return dataclasses.replace(torch_adapter, weights=weights or torch_adapter.weights)


def _check_one_kind(adapters: list[TorchAdapter]) -> None:
    """Refuses factors and trainable tokens on one module."""
    with_factors = {m for a in adapters if a.adapter.kind == LORA for m in a.modules}
    for a in adapters:
        both = [m for m in a.modules if m in with_factors]
        if a.adapter.kind == TRAINABLE_TOKENS and both:
            raise AdapterFileError(
                f"save_adapter: {both[0]!r} has factors and trainable tokens, which PEFT "
                "refuses on one layer; save_merged writes a model"
            )


def _kinds_of_modules(adapted: Adapted, names: Names) -> Mapping[str, str]:
    """Returns the kind of every module of the model that has a weight, by PyTorch's name.

    Leaves without a PyTorch name, which have no adapter, are left out.
    """
    leaves, _ = flatten(adapted.params)
    shapes = {p: x.shape for p, x in leaves.items() if not is_marker(x)}
    groups = {m.path: group for group in adapted.plan.groups for m in group.members}
    for group in adapted.plan.groups:
        for member in group.members[1:]:
            shapes[member.path] = group.shape[::-1] if member.transposed else group.shape
    return {
        w.module: with_kind(w, groups.get(path), path).kind
        for path, shape in shapes.items()
        for w in parameters_of_leaf(path, shape, names, shapes)
        if w.parameter == "weight"
    }

"""`load_adapter`: a directory that PEFT wrote, as an `Adapted` of a model's params."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted, Params
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._interpreter.sites import CallSites
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.base_tensors import check_base, with_base
from flax_tied_lora._peft.adapter.config_out import Placed
from flax_tied_lora._peft.adapter.folder import CONFIG, AdapterFiles, read_adapter
from flax_tied_lora._peft.adapter.named import Content, content_of
from flax_tied_lora._peft.adapter.parts_in import with_parts
from flax_tied_lora._peft.adapter.save import all_slots
from flax_tied_lora._peft.adapter.slots import PREFIX, Slot, modules_of
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS
from flax_tied_lora._ties.find import Ties, ties_among
from flax_tied_lora._tree.boxes import in_place
from flax_tied_lora._tree.paths import flatten
from flax_tied_lora._verbs.wrap import wrap_as

TiedCopies = Literal["same", "apart"]
BaseEmbeddings = Literal["check", "load", "ignore"]


def load_adapter(
    directory: str | os.PathLike[str], params: Params, names: Names, *,
    sites: CallSites | None = None, ties: Ties = "auto", tied_copies: TiedCopies = "same",
    base_embeddings: BaseEmbeddings = "check",
) -> Adapted[Params]:  # fmt: skip
    """Returns params with the adapter that PEFT's ``save_pretrained`` or `save_adapter` wrote.

    What is adapted follows from the tensors in the file; ranks, scalings and all else from its
    config, which the plan keeps as it is written. A fused leaf whose parts are modules of their own
    in PyTorch has one pair of factors where theirs agree on what they share, and else one for each
    (`LoraConfig.parts`). A config without ``ensure_weight_tying`` means
    False, as in PEFT. Tensors are read one at a time.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``, or shards.
      params: of the base model; they stay as they are.
      names: of the model, from `names.names_of`.
      sites, ties: as in `wrap`.
      tied_copies: an adapter that is tied is in the file once for each module. ``"same"``: the
        copies must agree. ``"apart"``: each module keeps its own, as with
        ``ensure_weight_tying=False``.
      base_embeddings: PEFT may put the base's own embeddings into the file. ``"check"``: they must
        be those of ``params``; ``"load"``: they take the place of those, which
        `grow_vocabulary` made as many as they are; ``"ignore"``: they may be others.

    Returns:
      An `Adapted`, its factors float32.

    Raises:
      AdapterFileError: a file is missing or damaged, or of another kind or model; copies of a tied
        adapter or base embeddings differ. Nothing is changed.
      TypeError: the params are wrapped already, or names is no `Names`.
      ValueError: a declared tie does not fit; an option is unknown.
    """
    for name, value, known in (
        ("tied_copies", tied_copies, ("same", "apart")),
        ("base_embeddings", base_embeddings, ("check", "load", "ignore")),
    ):
        if value not in known:
            raise ValueError(f"load_adapter: {name}={value!r}; expected one of {known}")
    if not isinstance(names, Names):
        raise TypeError(f"load_adapter: names is a {type(names).__name__}; expected names_of(...)")
    if isinstance(params, Adapted):
        raise TypeError(
            "load_adapter: params is an Adapted; pass base(adapted), or merge(adapted) to "
            "build on its adapters"
        )
    with read_adapter(directory) as files:
        config = _config(files)
        content = content_of(files, config, params, names)
        flag = False if tied_copies == "apart" else config.ensure_weight_tying
        asked = dataclasses.replace(config, ensure_weight_tying=flag)
        if ties != "auto":  # What is wrong with these is not the file's fault.
            ties_among(flatten(params)[0], ties, sites=sites)
        try:
            adapted = wrap_as(asked, params, content.hits, sites=sites, ties=ties)
            cut = with_parts(files, content, asked, adapted.plan, names)
            if cut is not asked:
                adapted = wrap_as(cut, params, content.hits, sites=sites, ties=ties)
        except ValueError as error:
            raise AdapterFileError(
                f"{files.directory}: {error}; expected an adapter that fits the params"
            ) from error
        if base_embeddings == "check":
            check_base(files, content, params, adapted.plan)
        elif base_embeddings == "load":
            adapted = with_base(files, content, adapted)
        return _filled(files, adapted, content, names)


def _config(files: AdapterFiles) -> LoraConfig:
    fields = {"ensure_weight_tying": False, **files.config}
    if fields["ensure_weight_tying"] is None:
        fields["ensure_weight_tying"] = False
    try:
        return LoraConfig.from_dict(fields)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AdapterFileError(
            f"{files.directory / CONFIG}: {error}; expected the config of a LoRA adapter of PEFT "
            "0.21 with what is carried out here"
        ) from error


def _filled(files: AdapterFiles, adapted: Adapted, content: Content, names: Names) -> Adapted:
    """Returns the adapted params with the file's tensors in the adapters' place."""
    leaves, _ = flatten(adapted.params)
    placed = [
        _in_file(Placed(group, adapter, tuple(modules_of(group, adapter, names, leaves))), content)
        for group, adapter in adapted.plan.adapters()
    ]
    slots = all_slots(placed)
    _check_names(files, content, [s for own in slots for s in own])
    adapters: dict[str, dict[str, Any]] = {k: dict(v) for k, v in adapted.adapters.items()}
    for p, own in zip(placed, slots, strict=True):
        kind, key = p.adapter.kind, p.adapter.key
        _check_rank(files, adapted.plan.config, p)
        arrays = {}
        for name, shape in p.group.shapes(p.adapter).items():
            mine = [s for s in own if s.array == name]
            arrays[name] = _assembled(files, key, shape, mine)
        old = adapters[kind][key]
        new = arrays.get("", arrays)
        adapters[kind][key] = jax.tree.map(
            lambda a, b: in_place(a, jnp.asarray(b)), old, new,
            is_leaf=lambda x: hasattr(x, "unbox") or hasattr(x, "shape"),
        )  # fmt: skip
    return adapted.replace(adapters=adapters)


def _in_file(placed: Placed, content: Content) -> Placed:
    """Returns an adapter with those of its modules that the file has tensors for."""
    found = tuple(w for w in placed.weights if w.name in content.adapted)
    if len(found) > 1:
        # BART's encoder and decoder read their own modules, never this one: PEFT leaves it behind.
        content.unread |= {w.module for w in found if w.module.rpartition(".")[2] == "shared"}
        found = tuple(w for w in found if w.module not in content.unread)
    if placed.adapter.kind == TRAINABLE_TOKENS:
        found = tuple(w for w in placed.weights if w.module in content.tokens)
    return dataclasses.replace(placed, weights=found or placed.weights)


def _check_names(files: AdapterFiles, content: Content, slots: list[Slot]) -> None:
    wanted, known = {s.name for s in slots}, {content.canonical(n): n for n in files.tensors}
    missing = sorted(wanted - set(known))
    if missing:
        raise AdapterFileError(
            f"{files.directory}: found no {missing[0]} ({len(missing)} missing); expected it "
            "beside the other tensors of its module; save the adapter again"
        )
    base = {name for name, _, _ in content.base} | content.unused
    odd = sorted(
        n for c, n in known.items()
        if c not in wanted and n not in base and not _of_unread(c, content)
    )  # fmt: skip
    if odd:
        raise AdapterFileError(
            f"{files.directory}: found {odd[0]} ({len(odd)} such tensors), which the config makes "
            "no use of; expected tensors of what it targets; the two are not of one adapter"
        )


def _of_unread(name: str, content: Content) -> bool:
    return any(name.startswith(f"{PREFIX}{module}.") for module in content.unread)


def _check_rank(files: AdapterFiles, config: LoraConfig, placed: Placed) -> None:
    if placed.adapter.kind != LORA:
        return
    for what in (config.rank_for, config.scaling_for):
        values = {m: what(m) for m in placed.modules}
        if len(set(values.values())) > 1:
            raise AdapterFileError(
                f"{files.directory / CONFIG}: {placed.group.key!r} is one leaf here, and the "
                f"config gives its modules different ranks or alphas: {values}; merge the adapter "
                "in PyTorch"
            )


def _assembled(
    files: AdapterFiles, key: str, shape: tuple[int, ...], slots: list[Slot]
) -> np.ndarray:
    """Returns an array put together from its tensors; what is there more than once must agree."""
    array = np.zeros(shape, np.float32)
    done = np.zeros(shape, bool) if len(slots) > 1 else None
    for slot in slots:
        name = _stored_name(files, slot.name)
        _check_tensor(files, name, slot)
        with np.errstate(over="ignore"):  # of float64
            tensor = files.tensors[name].astype(np.float32)
        if not np.isfinite(tensor).all():
            raise AdapterFileError(
                f"{files.directory}: {name} has NaN or infinite values; expected finite float32; "
                "the training that made them diverged, or the file is damaged: take an earlier save"
            )
        if (
            done is not None
            and done[slot.index].any()
            and not np.array_equal(slot.get(array), tensor)
        ):
            other = next(s.name for s in slots if s.array == slot.array and s is not slot)
            raise AdapterFileError(
                f"{files.directory}: {name} differs from {other}, and both are {key!r} here; "
                'expected copies of one tied adapter; tied_copies="apart" keeps those of a tied '
                "table apart"
            )
        slot.put(array, tensor)
        if done is not None:
            done[slot.index] = True
    return array


def _stored_name(files: AdapterFiles, name: str) -> str:
    if name in files.tensors:
        return name
    # Older PEFT had ".weight" behind a magnitude.
    return f"{name}.weight" if f"{name}.weight" in files.tensors else name


def _check_tensor(files: AdapterFiles, name: str, slot: Slot) -> None:
    shape, dtype = files.tensors.shape(name), files.tensors.dtype(name)
    if tuple(shape) != slot.shape:
        raise AdapterFileError(
            f"{files.directory}: {name} is {list(shape)}; expected {list(slot.shape)}, by the "
            "config's rank and the params; check that the adapter is for this model; where tokens "
            "were added, grow_vocabulary(params, ...) first"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise AdapterFileError(
            f"{files.directory}: {name} is {dtype}; expected floating point; save the adapter "
            "unquantised"
        )

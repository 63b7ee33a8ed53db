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
from flax_tied_lora._names.layout import MATRIX, TorchWeight
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.as_written import with_written
from flax_tied_lora._peft.adapter.base_tensors import check_base, with_base
from flax_tied_lora._peft.adapter.file_content import Content, content_of
from flax_tied_lora._peft.adapter.file_tensors import PREFIX, FileTensor, file_tensors
from flax_tied_lora._peft.adapter.folder import CONFIG, AdapterFiles, read_adapter
from flax_tied_lora._peft.adapter.fused_parts import with_parts
from flax_tied_lora._peft.adapter.parameters import TorchAdapter, parameters_of_adapter
from flax_tied_lora._peft.adapter.row_numbers import with_leaf_rows
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._planning.plan import LORA, TRAINABLE_TOKENS, AdapterPlan, GroupPlan
from flax_tied_lora._planning.tying import says_untied
from flax_tied_lora._ties.find import Ties, ties_among
from flax_tied_lora._ties.lost import from_names, not_in, refuse_lost
from flax_tied_lora._ties.sources import differ
from flax_tied_lora._tree.boxes import in_place
from flax_tied_lora._tree.foreign import refuse_models
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

    The tensors in the file say what is adapted; its config, which the plan keeps as it is written,
    gives ranks, scalings and everything else. A fused leaf whose parts are separate modules in
    PyTorch has one pair of factors where the modules agree on the factor that they share, and
    otherwise a pair for each (`LoraConfig.parts`). A config without ``ensure_weight_tying`` means
    False, as in PEFT. Tensors are read one at a time.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``, or shards.
      params: of the base model; they stay as they are.
      names: of the model, from `names.names_of`.
      sites, ties: as in `wrap`.
      tied_copies: a tied adapter is in the file once for each module. ``"same"``: the copies must
        agree. ``"apart"``: each module keeps its copy, as with ``ensure_weight_tying=False``.
      base_embeddings: PEFT may put the base's embeddings into the file. ``"check"``: they must be
        those of ``params``; ``"load"``: they replace those of ``params``, which need as many rows
        (`grow_vocabulary`); ``"ignore"``: they may differ.

    Returns:
      An `Adapted`, its factors float32.

    Raises:
      AdapterFileError: a file is missing or damaged, or of another kind or model; copies of a tied
        adapter, or base embeddings, differ. Nothing is changed.
      TypeError: the params are wrapped already, or names is no `Names`.
      ValueError: a declared tie does not fit, or leaves that `names` has as one tensor have other
        values (``ties=model.config`` drops one); an option is unknown.
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
    refuse_models(
        "load_adapter", params,
        "; pass its state, nnx.state(module, nnx.Param), and put what this returns around the "
        "module by tied_lora.nnx.from_adapted",
    )  # fmt: skip
    ties = _with_names(params, names, sites, ties)
    with read_adapter(directory) as files:
        config = _config(files)
        content = content_of(files, config, params, names)
        config = with_leaf_rows(config, content.tokens, params)
        flag = False if tied_copies == "apart" else config.ensure_weight_tying
        asked = dataclasses.replace(config, ensure_weight_tying=flag)
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


def _with_names(params: Any, names: Names, sites: CallSites | None, ties: Any) -> Any:
    """Returns ties to which those of the names are added, where a loader made two arrays of one.

    Raises:
      ValueError: these have other values; or a declared tie does not fit.
    """
    leaves, _ = flatten(params)
    groups = ties_among(leaves, ties, sites=sites)  # an error in these is not the file's fault
    if says_untied(ties):
        return ties
    links = not_in(from_names(leaves, names), groups)
    refuse_lost("load_adapter", leaves, links)
    same = [link for link in links if differ(leaves, link) is False]
    if not same or ties != "auto":
        return ties
    return [(x.first, x.second, "transposed" if x.transposed else "same") for x in same]


def _config(files: AdapterFiles) -> LoraConfig:
    """Returns the config of a file, in which no ``ensure_weight_tying`` means False."""
    written = with_written(files.config, files.tensors.metadata)
    fields = {"ensure_weight_tying": False, **written}
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
    paths = flatten(adapted.params)[0].keys()
    torch_adapters = [
        _with_tensors(group, adapter, parameters_of_adapter(group, adapter, names, paths), content)
        for group, adapter in adapted.plan.adapters()
    ]
    tensors = file_tensors(torch_adapters)
    _check_names(files, content, {t.name for of_adapter in tensors for t in of_adapter})
    adapters: dict[str, dict[str, Any]] = {k: dict(v) for k, v in adapted.adapters.items()}
    for a, of_adapter in zip(torch_adapters, tensors, strict=True):
        kind, key = a.adapter.kind, a.adapter.key
        _check_rank(files, adapted.plan.config, a)
        arrays = {
            name: _assembled(files, key, shape, [t for t in of_adapter if t.array == name])
            for name, shape in a.group.shapes(a.adapter).items()
        }
        old = adapters[kind][key]
        new = arrays.get("", arrays)
        adapters[kind][key] = jax.tree.map(
            lambda a, b: in_place(a, jnp.asarray(b)), old, new,
            is_leaf=lambda x: hasattr(x, "unbox") or hasattr(x, "shape"),
        )  # fmt: skip
    return adapted.replace(adapters=adapters)


def _with_tensors(
    group: GroupPlan, adapter: AdapterPlan, weights: list[TorchWeight], content: Content
) -> TorchAdapter:
    """Returns an adapter with those of its PyTorch parameters that the file has tensors for.

    Modules that the model never calls are left out, and noted in ``content.unread``.
    """
    if adapter.kind == TRAINABLE_TOKENS:
        in_file = [w for w in weights if w.module in content.tokens]
    else:
        in_file = [w for w in weights if w.name in content.adapted]
        if len(in_file) > 1:
            # BART's encoder and decoder read their own modules, and PEFT leaves "shared" untrained.
            unread = {w.module for w in in_file if w.module.rpartition(".")[2] == "shared"}
            content.unread |= unread
            in_file = [w for w in in_file if w.module not in content.unread]
    in_file = [_of_file(w, content) for w in in_file or weights]
    return TorchAdapter(group, adapter, tuple(in_file))


def _of_file(weight: TorchWeight, content: Content) -> TorchWeight:
    """Returns a parameter whose kind nothing else says, with that of the file's tensors."""
    if weight.kind != MATRIX:
        return weight
    kind = "embedding" if weight.module in content.embeddings else "linear"
    return dataclasses.replace(weight, kind=kind)


def _check_names(files: AdapterFiles, content: Content, wanted: set[str]) -> None:
    """Checks that the file has the tensors of all adapters, and no others."""
    known = {content.canonical(n): n for n in files.tensors}
    missing = sorted(wanted - set(known))
    if missing:
        raise AdapterFileError(
            f"{files.directory}: found no {missing[0]} ({len(missing)} missing); expected it "
            "beside the other tensors of its module; save the adapter again"
        )
    expected = {name for name, _, _ in content.base} | content.unused
    extra = sorted(
        n for c, n in known.items()
        if c not in wanted and n not in expected and not _is_unread(c, content)
    )  # fmt: skip
    if extra:
        raise AdapterFileError(
            f"{files.directory}: found {extra[0]} ({len(extra)} such tensors), which the config "
            "makes no use of; expected tensors of what it targets; the two are not of one adapter"
        )


def _is_unread(name: str, content: Content) -> bool:
    return any(name.startswith(f"{PREFIX}{module}.") for module in content.unread)


def _check_rank(files: AdapterFiles, config: LoraConfig, torch_adapter: TorchAdapter) -> None:
    """Checks that the config gives all modules of an adapter one rank and one scaling."""
    if torch_adapter.adapter.kind != LORA:
        return
    key = torch_adapter.group.key
    for value_for in (config.rank_for, config.scaling_for):
        values = {m: value_for(m) for m in torch_adapter.modules}
        if len(set(values.values())) > 1:
            raise AdapterFileError(
                f"{files.directory / CONFIG}: {key!r} is one leaf here, and the "
                f"config gives its modules different ranks or alphas: {values}; merge the adapter "
                "in PyTorch"
            )


def _assembled(
    files: AdapterFiles, key: str, shape: tuple[int, ...], tensors: list[FileTensor]
) -> np.ndarray:
    """Returns an adapter's array from its tensors; those that are the same slice must agree."""
    array = np.zeros(shape, np.float32)
    filled = np.zeros(shape, bool) if len(tensors) > 1 else None
    tolerance = 0 if len({t.factor for t in tensors}) == 1 else 1e-6  # scaled otherwise, rounded
    for tensor in tensors:
        name = _stored_name(files, tensor.name)
        _check_tensor(files, name, tensor)
        with np.errstate(over="ignore"):  # of float64
            values = files.tensors[name].astype(np.float32)
        if not np.isfinite(values).all():
            raise AdapterFileError(
                f"{files.directory}: {name} has NaN or infinite values; expected finite float32; "
                "the training that made them diverged, or the file is damaged: take an earlier save"
            )
        values = tensor.slice_of(values)
        if (
            filled is not None
            and filled[tensor.index].any()
            and not np.allclose(array[tensor.index], values, tolerance, 0)
        ):
            other = next(t.name for t in tensors if t is not tensor)
            raise AdapterFileError(
                f"{files.directory}: {name} differs from {other}, and both are {key!r} here; "
                'expected copies of one tied adapter; tied_copies="apart" keeps those of a tied '
                "table apart"
            )
        array[tensor.index] = values
        if filled is not None:
            filled[tensor.index] = True
    return array


def _stored_name(files: AdapterFiles, name: str) -> str:
    """Returns a tensor's name in the file, given its name in PEFT 0.21."""
    if name in files.tensors:
        return name
    # Older PEFT ends the name of a magnitude with ".weight".
    return f"{name}.weight" if f"{name}.weight" in files.tensors else name


def _check_tensor(files: AdapterFiles, name: str, tensor: FileTensor) -> None:
    shape, dtype = files.tensors.shape(name), files.tensors.dtype(name)
    if tuple(shape) != tensor.shape:
        raise AdapterFileError(
            f"{files.directory}: {name} is {list(shape)}; expected {list(tensor.shape)}, by the "
            "config's rank and the params; check that the adapter is for this model; where tokens "
            "were added, grow_vocabulary(params, ...) first"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise AdapterFileError(
            f"{files.directory}: {name} is {dtype}; expected floating point; save the adapter "
            "unquantised"
        )

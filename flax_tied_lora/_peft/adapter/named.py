"""What the tensors of an adapter's file are: which leaves they adapt, and how."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._names.layout import TorchWeight, to_torch_array
from flax_tied_lora._names.mapping import Names, UnmappedError
from flax_tied_lora._peft.adapter.folder import AdapterFiles
from flax_tied_lora._peft.adapter.slots import PREFIX, leaf_of
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._planning.build import Named
from flax_tied_lora._planning.matches import Hit
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import flatten, matches
from flax_tied_lora._tree.processes import gathered
from flax_tied_lora._tree.quantized_array import plain_array

_FACTOR = re.compile(
    r"(?P<module>.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|lora_magnitude_vector"
    r"(\.weight)?)"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_BASE = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.base_layer\.weight")


# Kinds of input and output embeddings.
_WITH_TABLES = ("embedding", "linear")


@dataclasses.dataclass
class Content:
    """What is in a file.

    Attributes:
      hits: what is adapted how, in `wrap`'s terms.
      adapted: names of the PyTorch parameters that have factors or a copy, or are a bias.
      tokens: modules that have trainable tokens.
      unused: tensors that PEFT writes and does not read.
      unread: modules that have an adapter and are never called.
      base: tensors that are the base's own: name in the file, leaf, and where in it.
    """

    hits: Named
    adapted: set[str] = dataclasses.field(default_factory=set)
    tokens: set[str] = dataclasses.field(default_factory=set)
    unused: set[str] = dataclasses.field(default_factory=set)
    unread: set[str] = dataclasses.field(default_factory=set)
    base: list[tuple[str, str, TorchWeight]] = dataclasses.field(default_factory=list)

    @staticmethod
    def canonical(name: str) -> str:
        """Returns a tensor's name as PEFT 0.21 spells it."""
        return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def content_of(files: AdapterFiles, config: LoraConfig, params: Any, names: Names) -> Content:
    """Returns what the tensors of a file are, by their names.

    Raises:
      AdapterFileError: a name is none of PEFT's, or of no leaf of the params.
    """
    leaves, _ = flatten(params)
    content = Content(Named({}, {}, {}, set()))
    lora: set[str] = set()
    if not len(files.tensors):
        raise AdapterFileError(
            f"{files.directory}: found no tensors; expected an adapter's; save the adapter again"
        )
    for name in files.tensors:
        if not name.startswith(PREFIX):
            raise AdapterFileError(
                f"{files.directory}: found a tensor {name!r}; expected names that start with "
                f"{PREFIX!r}, as PEFT writes them"
            )
        if factor := _FACTOR.fullmatch(name.removeprefix(PREFIX)):
            lora.add(factor["module"])
    for module in sorted(lora):
        path, weight = _leaf(files, f"{module}.weight", names, leaves)
        _add(
            content.hits.lora,
            path,
            _hit(config.target_modules, module, path, weight, names, leaves),
        )
        content.adapted.add(weight.name)
    for name in files.tensors:
        inner = name.removeprefix(PREFIX)
        if _FACTOR.fullmatch(inner):
            continue
        if inner.endswith(_TOKENS):
            module = inner.removesuffix(_TOKENS)
            if config.trainable_token_indices is None:
                raise AdapterFileError(
                    f"{files.directory}: found {name}, and the config has "
                    "trainable_token_indices=None; expected it to say which rows these are"
                )
            path, weight = _leaf(files, f"{module}.weight", names, leaves)
            _add(
                content.hits.tokens,
                path,
                _hit(config.trainable_token_indices, module, path, weight, names, leaves),
            )
            content.tokens.add(module)
            continue
        if base := _BASE.fullmatch(inner):
            path, weight = _leaf(files, f"{base['module']}.weight", names, leaves)
            content.base.append((name, path, weight))
            continue
        own = inner.replace(".base_layer.", ".")
        if _is_inside_a_copy(name, files):
            content.unused.add(name)
            continue
        path, weight = _leaf(files, own, names, leaves)
        module, _, parameter = own.rpartition(".")
        hit = _hit(config.modules_to_save, module, path, weight, names, leaves)
        saved = any(_is_saved(config, m) for m in _with_tied(config, module, names))
        # A bias of a tied head is another module's in Flax.
        elsewhere = hit.leaf != path and parameter != "weight"
        if elsewhere and config.bias != "all" and is_base(files, name, leaves[path], weight):
            content.base.append((name, path, weight))  # PEFT keeps heads whole, trained or not.
            continue
        if _is_bias(config, own) and (elsewhere or not saved):
            content.hits.biases.add(path)
        elif saved:
            hit = Hit(module, module, leaf=path) if elsewhere else hit
            _add(content.hits.saved, path, hit)
        elif (parameter == "weight" and weight.kind in _WITH_TABLES) or _is_of_logits(files, name):
            # save_embedding_layers=True writes the embeddings of a model that are not adapted.
            content.base.append((name, path, weight))
            continue
        else:
            raise AdapterFileError(
                f"{files.directory}: found {name}, and the config has bias={config.bias!r} and "
                f"modules_to_save={config.modules_to_save}; expected no such tensor"
            )
        content.adapted.add(weight.name)
    return content


def _is_inside_a_copy(name: str, files: AdapterFiles) -> bool:
    """Returns whether a bias is there again: PEFT's `bias` finds those of `modules_to_save` so."""
    module, what, parameter = name.rpartition(".modules_to_save.")
    if not what:
        module, what, parameter = name.rpartition(".original_module.")
    return bool(what) and f"{module}.{parameter}" in files.tensors


def _is_bias(config: LoraConfig, name: str) -> bool:
    """Returns whether PEFT trains a parameter as a bias: with "all", what has the word in it."""
    return {"none": False, "all": "bias" in name}.get(config.bias, name.endswith(".bias"))


def is_base(files: AdapterFiles, name: str, leaf: Any, weight: TorchWeight) -> bool:
    """Returns whether a tensor of the file is what the params have in its place."""
    leaf = unboxed(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct) or files.tensors.shape(name) != weight.shape(
        leaf.shape
    ):
        return False
    ours, theirs = (
        to_torch_array(jax.device_get(gathered(plain_array(leaf))), weight),
        files.tensors[name],
    )
    return np.array_equal(ours.astype(np.float32), theirs.astype(np.float32), equal_nan=True)


def _is_of_logits(files: AdapterFiles, name: str) -> bool:
    """Returns whether a tensor is a bias of the logits: as long as a table that is in the file."""
    tables = {
        files.tensors.shape(n)[0] for n in files.tensors
        if n.endswith(".weight") and len(files.tensors.shape(n)) == 2 and not re.search(r"\d", n)
    }  # fmt: skip
    return "bias" in name.rpartition(".")[2] and files.tensors.shape(name)[-1:] in {
        (size,) for size in tables
    }


def _is_saved(config: LoraConfig, module: str) -> bool:
    """Returns whether a module is one of `modules_to_save`, or inside of one."""
    parts = module.split(".")
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    saved = config.modules_to_save or ()
    return any(a.endswith(n) for n in saved for a in around)


def _with_tied(config: LoraConfig, module: str, names: Names) -> set[str]:
    """Returns a module, and what PEFT ties to it if it is told to."""
    found = {module}
    if config.ensure_weight_tying:
        for path, modules in names.tied.items():
            group = {names.to_torch(path, 2)[0].module, *modules}
            found |= group if module in group else set()
    return found


def _add(hits: dict[str, list[Hit]], path: str, hit: Hit) -> None:
    hits.setdefault(path, []).append(hit)


def _hit(
    written: Any, module: str, path: str, weight: TorchWeight, names: Names,
    leaves: Mapping[str, Any],
) -> Hit:  # fmt: skip
    """Returns the hit of a module: by its leaf, or by its role where that is another module's.

    Args:
      written: the field of the config that names it, by which separate adapters are called.
    """
    listed = () if isinstance(written, str) else written or ()
    named = (n for n in listed if isinstance(n, str) and matches((n,), module) is not None)
    target = next(named, module)
    own = {w.module for w in names.to_torch(path, unboxed(leaves[path]).shape)}
    if module in own:
        return Hit(target, module, leaf=path)
    role = LOOKUP if weight.kind == "embedding" else PROJECTION
    return Hit(target, module, role=role)


def _leaf(
    files: AdapterFiles, name: str, names: Names, leaves: Mapping[str, Any]
) -> tuple[str, TorchWeight]:
    try:
        path, weight = leaf_of(name, names, leaves)
    except UnmappedError as error:
        raise AdapterFileError(
            f"{files.directory}: found a tensor of {name}; expected the model's modules: {error}"
        ) from error
    if path not in leaves:
        raise AdapterFileError(
            f"{files.directory}: {name} would be the leaf {path!r}, which the params do not have; "
            "expected a leaf of the params; check that adapter, names and params are of one model"
        )
    return path, weight

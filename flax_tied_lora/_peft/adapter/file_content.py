"""What the tensors of an adapter's file are: which leaves they adapt, and how."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_tied_lora._algebra.site_filter import LOOKUP, PROJECTION
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._names.layout import MATRIX, TorchWeight
from flax_tied_lora._names.mapping import Names, UnmappedError
from flax_tied_lora._peft.adapter.file_tensors import PREFIX
from flax_tied_lora._peft.adapter.folder import AdapterFiles
from flax_tied_lora._peft.adapter.parameters import leaf_of_parameter, torch_array
from flax_tied_lora._peft.adapter.saved_config import is_saved
from flax_tied_lora._peft.files.errors import AdapterFileError
from flax_tied_lora._planning.build import Named
from flax_tied_lora._planning.matches import Hit
from flax_tied_lora._tree.boxes import unboxed
from flax_tied_lora._tree.paths import Listed, flatten, matches
from flax_tied_lora._tree.processes import gathered

_FACTOR = re.compile(
    r"(?P<module>.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|lora_magnitude_vector"
    r"(\.weight)?)"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_BASE = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.base_layer\.weight")
# Kinds of input and output embeddings.
_EMBEDDING_KINDS = ("embedding", "linear", MATRIX)


@dataclasses.dataclass
class Content:
    """What is in a file.

    Attributes:
      hits: what is adapted how, in `wrap`'s terms.
      embeddings: modules that have an embedding's factors.
      adapted: names of the PyTorch parameters that have factors or a copy, or are a bias.
      tokens: modules that have trainable tokens: their leaves' paths, and where in the leaf.
      unused: tensors that PEFT writes and does not read.
      unread: modules that have an adapter and are never called.
      base: tensors that are the base's own: (name in the file, leaf's path, where in the leaf).
    """

    hits: Named = dataclasses.field(default_factory=lambda: Named({}, {}, {}, set()))
    embeddings: set[str] = dataclasses.field(default_factory=set)
    adapted: set[str] = dataclasses.field(default_factory=set)
    tokens: dict[str, tuple[str, TorchWeight]] = dataclasses.field(default_factory=dict)
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
    return _Reading(files, config, names, flatten(params)[0]).content()


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A file whose tensors are told apart by their names; ``result`` is filled on the way."""

    files: AdapterFiles
    config: LoraConfig
    names: Names
    leaves: Mapping[str, Any]
    result: Content = dataclasses.field(default_factory=Content)

    def content(self) -> Content:
        inner_names = {name: name.removeprefix(PREFIX) for name in self.files.tensors}
        modules = {
            name: factor["module"]
            for name, inner in inner_names.items()
            if (factor := _FACTOR.fullmatch(inner))
        }
        self.result.embeddings |= {m for n, m in modules.items() if ".lora_embedding_" in n}
        for module in sorted(set(modules.values())):
            self._add_factors(module)
        for name, inner in inner_names.items():
            if name in modules:
                continue
            if inner.endswith(_TOKENS):
                self._add_tokens(name, inner.removesuffix(_TOKENS))
            elif base := _BASE.fullmatch(inner):
                self._add_base(name, *self._leaf(f"{base['module']}.weight"))
            elif _is_inside_a_copy(name, self.files):
                self.result.unused.add(name)
            else:
                self._add_parameter(name, inner.replace(".base_layer.", "."))
        return self.result

    def _add_factors(self, module: str) -> None:
        path, weight = self._leaf(f"{module}.weight")
        hit = self._hit(self.config.target_modules, module, path, weight)
        self.result.hits.lora.setdefault(path, []).append(hit)
        self.result.adapted.add(weight.name)

    def _add_tokens(self, name: str, module: str) -> None:
        indices = self.config.trainable_token_indices
        if indices is None:
            raise AdapterFileError(
                f"{self.files.directory}: found {name}, and the config has "
                "trainable_token_indices=None; expected it to say which rows these are"
            )
        path, weight = self._leaf(f"{module}.weight")
        hit = self._hit(indices, module, path, weight)
        self.result.hits.tokens.setdefault(path, []).append(hit)
        self.result.tokens[module] = path, weight

    def _add_base(self, name: str, path: str, weight: TorchWeight) -> None:
        self.result.base.append((name, path, weight))

    def _add_parameter(self, name: str, parameter: str) -> None:
        """Adds a tensor that is a whole parameter: a saved copy, a bias, or the base's own."""
        config = self.config
        path, weight = self._leaf(parameter)
        module, _, attribute = parameter.rpartition(".")
        hit = self._hit(config.modules_to_save, module, path, weight)
        modules = _with_tied(config, module, self.names)
        is_copy = any(is_saved(m, config.modules_to_save) for m in modules)
        # The bias of a tied head belongs to another module in Flax.
        is_elsewhere = hit.leaf != path and attribute != "weight"
        if (
            is_elsewhere
            and config.bias != "all"
            and is_base(self.files, name, self.leaves[path], weight)
        ):
            self._add_base(name, path, weight)  # PEFT keeps heads whole, trained or not.
        elif _is_bias(config, parameter) and (is_elsewhere or not is_copy):
            self.result.hits.biases.add(path)
            self.result.adapted.add(weight.name)
        elif is_copy:
            hit = Hit(module, module, leaf=path) if is_elsewhere else hit
            self.result.hits.saved.setdefault(path, []).append(hit)
            self.result.adapted.add(weight.name)
        elif (attribute == "weight" and weight.kind in _EMBEDDING_KINDS) or _is_logits_bias(
            self.files, name
        ):
            # save_embedding_layers=True writes the embeddings of a model that are not adapted.
            self._add_base(name, path, weight)
        else:
            raise AdapterFileError(
                f"{self.files.directory}: found {name}, and the config has bias={config.bias!r} "
                f"and modules_to_save={config.modules_to_save}; expected no such tensor"
            )

    def _hit(self, written: Any, module: str, path: str, weight: TorchWeight) -> Hit:
        """Returns the hit of a module: by its leaf, or by its role where that is another module's.

        Args:
          written: the config's field that names the module; separate adapters are named by it.
        """
        listed = written if isinstance(written, Listed | Mapping) else ()  # not token ids
        target = matches(listed, module) or module
        weights = self.names.to_torch(path, unboxed(self.leaves[path]).shape)
        if module in {w.module for w in weights}:
            return Hit(target, module, leaf=path)
        # Of names that share a tensor only those of lookups have a kind that may be open.
        role = LOOKUP if weight.kind in ("embedding", MATRIX) else PROJECTION
        return Hit(target, module, role=role)

    def _leaf(self, parameter: str) -> tuple[str, TorchWeight]:
        """Returns the path of a parameter's leaf, and where in the leaf it is."""
        directory = self.files.directory
        try:
            path, weight = leaf_of_parameter(parameter, self.names, self.leaves)
        except UnmappedError as error:
            raise AdapterFileError(
                f"{directory}: found a tensor of {parameter}; expected the model's modules: {error}"
            ) from error
        if path not in self.leaves:
            raise AdapterFileError(
                f"{directory}: {parameter} would be the leaf {path!r}, which the params do not "
                "have; expected a leaf of the params; check that adapter, names and params are of "
                "one model"
            )
        return path, weight


def is_base(files: AdapterFiles, name: str, leaf: Any, weight: TorchWeight) -> bool:
    """Returns whether a tensor of the file equals what the params have in its place.

    Where the names scale or shift it, up to what that rounds.
    """
    leaf = unboxed(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return False
    if files.tensors.shape(name) != weight.shape(leaf.shape):
        return False
    ours, theirs = torch_array(gathered(leaf), weight), files.tensors[name]
    tolerance = 0 if weight.is_exact else 2 * float(jnp.finfo(leaf.dtype).eps)
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    return np.allclose(ours, theirs, tolerance, tolerance * abs(weight.offset), equal_nan=True)


def _is_inside_a_copy(name: str, files: AdapterFiles) -> bool:
    """Returns whether a tensor is a second copy of a bias that the file has under its usual name.

    PEFT's `bias` finds the biases inside `modules_to_save` again.
    """
    module, copy, parameter = name.rpartition(".modules_to_save.")
    if not copy:
        module, copy, parameter = name.rpartition(".original_module.")
    return bool(copy) and f"{module}.{parameter}" in files.tensors


def _is_bias(config: LoraConfig, name: str) -> bool:
    """Returns whether PEFT trains a parameter as a bias: with "all", any with the word in it."""
    return {"none": False, "all": "bias" in name}.get(config.bias, name.endswith(".bias"))


def _is_logits_bias(files: AdapterFiles, name: str) -> bool:
    """Returns whether a tensor is a bias of the logits: as long as a table in the file."""
    sizes = {
        files.tensors.shape(n)[0] for n in files.tensors
        if n.endswith(".weight") and len(files.tensors.shape(n)) == 2 and not re.search(r"\d", n)
    }  # fmt: skip
    shape = files.tensors.shape(name)
    return "bias" in name.rpartition(".")[2] and len(shape) > 0 and shape[-1] in sizes


def _with_tied(config: LoraConfig, module: str, names: Names) -> set[str]:
    """Returns a module, and the modules that PEFT ties to it if the config tells it to tie."""
    modules = {module}
    if config.ensure_weight_tying:
        for path, others in names.tied.items():
            group = {names.to_torch(path, 2)[0].module, *others}
            modules |= group if module in group else set()
    return modules

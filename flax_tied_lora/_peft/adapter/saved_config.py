"""The config of a saved adapter: as the user wrote it, or with full names where PEFT needs them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._config.axes_and_parts import OWN_KEY
from flax_tied_lora._config.checks import as_tuple
from flax_tied_lora._config.regexes import problem
from flax_tied_lora._names.layout import MATRIX
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.parameters import TorchAdapter
from flax_tied_lora._peft.adapter.row_numbers import torch_rows
from flax_tied_lora._planning.plan import LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS
from flax_tied_lora._tree.paths import Listed, layer_index, matches

PEFT_VERSION = "0.21.2"
# The names of the layers that PEFT can tie (peft.utils.constants).
_EMBEDDINGS = ("embed_tokens", "lm_head")
_LISTED = ("target_modules", "exclude_modules")
# What may be one counts as one: names in full are written then, which mean the same to PEFT.
_LINEAR = ("linear", "conv1d", MATRIX)


def config_of(
    adapted: Adapted, adapters: Sequence[TorchAdapter], modules: Mapping[str, str], names: Names,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the fields of ``adapter_config.json``.

    Args:
      adapters: every adapter of ``adapted``.
      modules: kind of every module of the model that has a weight, by PyTorch's name.
      base_model_name_or_path: of the base; None: as the config has it.
    """
    config = adapted.plan.config
    fields = config.to_dict()
    fields.pop(OWN_KEY, None)  # PEFT warns of fields that it does not know
    lora = [a for a in adapters if a.adapter.kind == LORA]
    saved = [a for a in adapters if a.adapter.kind == MODULES_TO_SAVE]
    tokens = [a for a in adapters if a.adapter.kind == TRAINABLE_TOKENS]
    flag = config.ensure_weight_tying
    if flag is None:
        # Where the embeddings have names that PEFT does not know, it warns and ties nothing: the
        # file has the copies all the same.
        flag = any(len(a.modules) > 1 and not a.weights[0].part for a in (*lora, *saved))
    fields["ensure_weight_tying"] = flag
    heads = {head for tied in names.tied.values() for head in tied}

    wanted = [m for a in lora for m in a.modules]
    if _is_slow(fields) or _targeted(fields, modules, heads, names, flag) != set(wanted):
        fields |= {
            "target_modules": wanted, "exclude_modules": None, "layers_to_transform": None,
            "layers_pattern": None,
        }  # fmt: skip
    fields["target_parameters"] = None
    tied = _tied(modules, heads, names) if flag else set()
    fields["modules_to_save"] = _modules_to_save(config.modules_to_save, saved, modules, tied)
    rows = {a.modules[0]: torch_rows(a) for a in tokens}
    written = fields["trainable_token_indices"]
    if rows and not isinstance(written, Mapping):
        (fields["trainable_token_indices"],) = rows.values()
    if isinstance(written, Mapping) and rows != {
        m: indices for n, indices in written.items() for m in modules if f".{m}".endswith(f".{n}")
    }:
        fields["trainable_token_indices"] = dict(sorted(rows.items()))
    _put_ranks(fields, adapted, lora)
    kinds = {w.kind for a in lora for w in a.weights}
    if kinds:
        fields["fan_in_fan_out"] = "conv1d" in kinds
    if base_model_name_or_path is not None:
        fields["base_model_name_or_path"] = base_model_name_or_path
    fields["inference_mode"] = True  # as PEFT saves it
    fields["peft_version"] = fields["peft_version"] or PEFT_VERSION
    return dict(sorted(fields.items()))


def _is_slow(fields: Mapping[str, Any]) -> bool:
    """Returns whether there is a regex that `load_adapter` would refuse."""
    regexes = [fields[f] for f in _LISTED if isinstance(fields[f], str)]
    return any(map(problem, [*regexes, *as_tuple(fields["layers_pattern"])]))


def _targeted(
    fields: Mapping[str, Any], modules: Mapping[str, str], heads: set[str], names: Names, flag: bool
) -> set[str]:
    """Returns the modules that PEFT would adapt; follows ``check_target_module_exists``."""
    targets = fields["target_modules"]
    if targets is None:
        return set()
    listed = {f: Listed(fields[f] or ()) for f in _LISTED if not isinstance(fields[f], str)}
    fields = {**fields, **listed}
    named = {m for m in modules if _is_target(fields, m, modules[m], heads)}
    if isinstance(targets, str):
        embedding = any(re.fullmatch(targets, name) for name in _EMBEDDINGS)
    else:
        embedding = any(t.rpartition(".")[2] in _EMBEDDINGS for t in targets)
    return named | _tied(modules, heads, names) if flag and embedding else named


def _tied(modules: Mapping[str, str], heads: set[str], names: Names) -> set[str]:
    """Returns the modules that PEFT ties, if it is told to tie and one of them is named."""
    embeddings = {names.to_torch(path, 2)[0].module for path in names.tied}
    return (embeddings | heads) & set(modules)


def _is_target(fields: Mapping[str, Any], module: str, kind: str, heads: set[str]) -> bool:
    targets, excluded = fields["target_modules"], fields["exclude_modules"]
    if excluded and matches(excluded, module) is not None:
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return kind in _LINEAR and module not in heads and module != "lm_head"
        return re.fullmatch(targets, module) is not None
    if matches(targets, module) is None:
        return False
    wanted = fields["layers_to_transform"]
    if wanted is None:
        return True
    patterns = as_tuple(fields["layers_pattern"]) or None
    return layer_index(module, patterns) in ([wanted] if isinstance(wanted, int) else wanted)


def _modules_to_save(
    written: Any, saved: Sequence[TorchAdapter], modules: Mapping[str, str], tied: set[str]
) -> list[str] | None:
    """Returns the field: as it was written if PEFT means the same modules by it, else in full."""
    wanted = {m for a in saved for m in a.modules}
    if not wanted:
        return None if written is None else list(written)
    named = {m for m in modules if is_saved(m, written)}
    if any(n.rpartition(".")[2] in _EMBEDDINGS for n in written):
        named |= tied
    return list(written) if named == wanted else sorted(wanted)


def is_saved(module: str, modules_to_save: Iterable[str] | None) -> bool:
    """Returns whether a module is one of `modules_to_save` to PEFT, or inside of one."""
    parts = module.split(".")
    ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(a.endswith(n) for n in modules_to_save or () for a in ancestors)


def _put_ranks(fields: dict[str, Any], adapted: Adapted, lora: Sequence[TorchAdapter]) -> None:
    """Sets the patterns of ranks and alphas, where the written ones mean others to PEFT."""
    config = adapted.plan.config
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for a in lora:
        rank = a.adapter.rank
        divisor = math.sqrt(rank) if config.use_rslora else rank
        scaling = float(np.asarray(adapted.scaling[a.adapter.key]))
        for module in a.modules:
            ranks[module] = rank
            written = config.alpha_for(module)
            same = math.isclose(written / divisor, scaling, rel_tol=1e-6)
            alphas[module] = written if same else scaling * divisor
    slow = any(map(problem, [*config.rank_pattern, *config.alpha_pattern]))
    if slow or any(config.rank_for(m) != rank for m, rank in ranks.items()):
        fields["rank_pattern"] = {m: rank for m, rank in ranks.items() if rank != config.r}
    if slow or any(config.alpha_for(m) != alpha for m, alpha in alphas.items()):
        fields["alpha_pattern"] = {
            m: alpha for m, alpha in alphas.items() if alpha != config.lora_alpha
        }

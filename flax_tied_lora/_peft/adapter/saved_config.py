"""The config of a saved adapter: as the user wrote it, or with full names where PEFT needs them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._config.axes_and_parts import OWN_KEY
from flax_tied_lora._config.checks import as_tuple
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._config.regexes import problem
from flax_tied_lora._names.layout import MATRIX
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.parameters import TorchAdapter
from flax_tied_lora._peft.adapter.row_numbers import torch_rows
from flax_tied_lora._planning.plan import LORA, MODULES_TO_SAVE, TRAINABLE_TOKENS
from flax_tied_lora._tree.paths import Listed, layer_index, matches

PEFT_VERSION = "0.21.2"
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

    _put_targets(fields, [m for a in lora for m in a.modules], modules, heads)
    fields["target_parameters"] = None
    fields["modules_to_save"] = _modules_to_save(config.modules_to_save, saved, modules)
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
    fields["task_type"] = config.task_type or _task_type(modules, names)
    fields["peft_version"] = fields["peft_version"] or PEFT_VERSION
    return dict(sorted(fields.items()))


def _is_slow(fields: Mapping[str, Any]) -> bool:
    """Returns whether there is a regex that `load_adapter` would refuse."""
    regexes = [fields[f] for f in _LISTED if isinstance(fields[f], str)]
    return any(map(problem, [*regexes, *as_tuple(fields["layers_pattern"])]))


def _task_type(modules: Mapping[str, str], names: Names) -> str | None:
    """Returns what a model with a head for tokens is to PEFT's classes; None for any other.

    Args:
      modules: of the model, without those that share another's leaf.
    """
    last = {m.rpartition(".")[2] for m in modules}
    if last & {"score", "classifier", "qa_outputs", "classification_head"} or "lm_head" not in last:
        return None
    return "SEQ_2_SEQ_LM" if names.family.endswith(("t5", "bart")) else "CAUSAL_LM"


def _put_targets(
    fields: dict[str, Any], wanted: list[str], modules: Mapping[str, str], heads: set[str]
) -> None:
    """Sets the fields that say what is adapted, by which every module with factors is named.

    As they were written where PEFT means these modules by them; with those that it would add by
    tying, in full, after them; or in full altogether. Readers other than PEFT tie nothing.
    """
    if not _is_slow(fields):
        named = _targeted(fields, modules, heads)
        if named == set(wanted):
            return
        if _all_name_something(fields["target_modules"], modules):
            longer = [*fields["target_modules"], *(m for m in wanted if m not in named)]
            if _targeted({**fields, "target_modules": longer}, modules, heads) == set(wanted):
                fields["target_modules"] = longer
                return
    fields |= {
        "target_modules": wanted, "exclude_modules": None, "layers_to_transform": None,
        "layers_pattern": None,
    }  # fmt: skip


def _all_name_something(targets: Any, modules: Mapping[str, str]) -> bool:
    """Returns whether targets are a list of names, each of which PEFT finds a module by."""
    if not isinstance(targets, list | tuple):
        return False
    listed = [Listed([name]) for name in targets]
    return all(any(matches(one, m) is not None for m in modules) for one in listed)


def _targeted(fields: Mapping[str, Any], modules: Mapping[str, str], heads: set[str]) -> set[str]:
    """Returns the modules that a config names; follows PEFT's ``check_target_module_exists``."""
    if fields["target_modules"] is None:
        return set()
    listed = {f: Listed(fields[f] or ()) for f in _LISTED if not isinstance(fields[f], str)}
    fields = {**fields, **listed}
    return {m for m in modules if _is_target(fields, m, modules[m], heads)}


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
    written: Any, saved: Sequence[TorchAdapter], modules: Mapping[str, str]
) -> list[str] | None:
    """Returns the field: as it was written, with what PEFT would add by tying, or in full."""
    wanted = {m for a in saved for m in a.modules}
    if not wanted:
        return None if written is None else list(written)
    named = {m for m in modules if is_saved(m, written)}
    if named <= wanted and all(any(is_saved(m, [name]) for m in modules) for name in written):
        return [*written, *sorted(wanted - named)]
    return sorted(wanted)


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
    config = _with_one_scale(fields, config, alphas)
    if slow or any(config.rank_for(m) != rank for m, rank in ranks.items()):
        fields["rank_pattern"] = {m: rank for m, rank in ranks.items() if rank != config.r}
    if slow or any(config.alpha_for(m) != alpha for m, alpha in alphas.items()):
        fields["alpha_pattern"] = {
            m: alpha for m, alpha in alphas.items() if alpha != config.lora_alpha
        }


def _with_one_scale(
    fields: dict[str, Any], config: LoraConfig, alphas: dict[str, float]
) -> LoraConfig:
    """Multiplies all alphas where all scalings are the written ones times one number.

    Not every reader knows patterns, and every one knows ``lora_alpha``.
    """
    written = {m: config.alpha_for(m) for m in alphas}
    scales = [alpha / written[m] if written[m] else 0 for m, alpha in alphas.items()]
    by = scales[0] if scales else 1
    if by in (0, 1) or not all(math.isclose(by, scale, rel_tol=1e-6) for scale in scales):
        return config
    fields["lora_alpha"] = config.lora_alpha * by
    fields["alpha_pattern"] = {name: alpha * by for name, alpha in config.alpha_pattern.items()}
    scaled = dataclasses.replace(
        config, lora_alpha=fields["lora_alpha"], alpha_pattern=fields["alpha_pattern"]
    )
    alphas |= {m: scaled.alpha_for(m) for m in alphas}
    return scaled

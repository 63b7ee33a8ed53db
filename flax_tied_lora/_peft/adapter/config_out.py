"""The config of a saved adapter: as it was written where PEFT reads it so, else in full names."""

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
from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._planning.plan import (
    LORA,
    MODULES_TO_SAVE,
    TRAINABLE_TOKENS,
    AdapterPlan,
    GroupPlan,
)
from flax_tied_lora._tree.paths import layer_index, matches

VERSION = "0.21.2"
# What PEFT calls the layers that it knows how to tie (peft.utils.constants).
_EMBEDDINGS = ("embed_tokens", "lm_head")
_LINEAR = ("linear", "conv1d")


@dataclasses.dataclass(frozen=True)
class Placed:
    """An adapter and the PyTorch parameters that it is for."""

    group: GroupPlan
    adapter: AdapterPlan
    weights: tuple[TorchWeight, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the modules, each once."""
        return list(dict.fromkeys(w.module for w in self.weights))


def config_of(
    adapted: Adapted, placed: Sequence[Placed], modules: Mapping[str, str], names: Names,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the fields of ``adapter_config.json``.

    Args:
      placed: every adapter.
      modules: kind of every module of the model that has a weight, by PyTorch's name.
      base_model_name_or_path: of the base; None: the config's own.
    """
    config = adapted.plan.config
    fields = config.to_dict()
    fields.pop(OWN_KEY, None)  # PEFT warns of what it does not know
    lora = [p for p in placed if p.adapter.kind == LORA]
    saved = [p for p in placed if p.adapter.kind == MODULES_TO_SAVE]
    tied = [p for p in (*lora, *saved) if len(p.modules) > 1 and not p.weights[0].part]
    flag = config.ensure_weight_tying
    if flag is None:
        # Where PEFT knows its embeddings by other names it warns, and ties nothing: the file has
        # the copies, and says what they are.
        flag = bool(tied)
    fields["ensure_weight_tying"] = flag
    heads = {m for modules_ in names.tied.values() for m in modules_}

    wanted = [m for p in lora for m in p.modules]
    if _targeted(fields, modules, heads, names, flag) != set(wanted):
        fields |= {
            "target_modules": wanted, "exclude_modules": None, "layers_to_transform": None,
            "layers_pattern": None,
        }  # fmt: skip
    fields["target_parameters"] = None
    ties = _tied(modules, heads, names) if flag else set()
    fields["modules_to_save"] = _saved(config.modules_to_save, saved, modules, ties)
    tokens = [p for p in placed if p.adapter.kind == TRAINABLE_TOKENS]
    rows = {p.modules[0]: list(p.adapter.tokens) for p in tokens}
    written = fields["trainable_token_indices"]
    if isinstance(written, Mapping) and rows != {
        m: own for n, own in written.items() for m in modules if f".{m}".endswith(f".{n}")
    }:
        fields["trainable_token_indices"] = dict(sorted(rows.items()))
    _put_ranks(fields, adapted, lora)
    kinds = {w.kind for p in lora for w in p.weights}
    if kinds:
        fields["fan_in_fan_out"] = "conv1d" in kinds
    if base_model_name_or_path is not None:
        fields["base_model_name_or_path"] = base_model_name_or_path
    fields["inference_mode"] = True  # as PEFT saves it
    fields["peft_version"] = fields["peft_version"] or VERSION
    return dict(sorted(fields.items()))


def _targeted(
    fields: Mapping[str, Any], modules: Mapping[str, str], heads: set[str], names: Names, flag: bool
) -> set[str]:
    """Returns the modules that PEFT adapts; follows ``check_target_module_exists``."""
    targets = fields["target_modules"]
    if targets is None:
        return set()
    found = {m for m in modules if _is_target(fields, m, modules[m], heads)}
    if isinstance(targets, str):
        embedding = any(re.fullmatch(targets, name) for name in _EMBEDDINGS)
    else:
        embedding = any(t.rpartition(".")[2] in _EMBEDDINGS for t in targets)
    return found | _tied(modules, heads, names) if flag and embedding else found


def _tied(modules: Mapping[str, str], heads: set[str], names: Names) -> set[str]:
    """Returns the modules that PEFT ties, told to, where one of them is named."""
    own = {names.to_torch(path, 2)[0].module for path in names.tied}
    return (own | heads) & set(modules)


def _is_target(fields: Mapping[str, Any], module: str, kind: str, heads: set[str]) -> bool:
    targets, excluded = fields["target_modules"], fields["exclude_modules"]
    if excluded and matches(_as_matched(excluded), module) is not None:
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return kind in _LINEAR and module not in heads and module != "lm_head"
        return re.fullmatch(targets, module) is not None
    if matches(tuple(targets), module) is None:
        return False
    wanted = fields["layers_to_transform"]
    if wanted is None:
        return True
    patterns = as_tuple(fields["layers_pattern"]) or None
    return layer_index(module, patterns) in ([wanted] if isinstance(wanted, int) else wanted)


def _as_matched(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)


def _saved(
    written: Any, saved: Sequence[Placed], modules: Mapping[str, str], tied: set[str]
) -> list[str] | None:
    wanted = {m for p in saved for m in p.modules}
    if not wanted:
        return None if written is None else list(written)
    found = {m for m in modules if any(a.endswith(n) for n in written for a in _ancestors(m))}
    if any(n.rpartition(".")[2] in _EMBEDDINGS for n in written):
        found |= tied
    if found == wanted:
        return list(written)
    return sorted(wanted)


def _ancestors(module: str) -> Iterable[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


def _put_ranks(fields: dict[str, Any], adapted: Adapted, lora: Sequence[Placed]) -> None:
    """Sets ranks and alphas: as they were written, where these patterns mean the same to PEFT."""
    config = adapted.plan.config
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for p in lora:
        rank = p.adapter.rank
        root = math.sqrt(rank) if config.use_rslora else rank
        scaling = float(np.asarray(adapted.scaling[p.adapter.key]))
        for module in p.modules:
            ranks[module] = rank
            written = config.alpha_for(module)
            same = math.isclose(written / root, scaling, rel_tol=1e-6)
            alphas[module] = written if same else scaling * root
    if any(config.rank_for(m) != rank for m, rank in ranks.items()):
        fields["rank_pattern"] = {m: rank for m, rank in ranks.items() if rank != config.r}
    if any(config.alpha_for(m) != alpha for m, alpha in alphas.items()):
        fields["alpha_pattern"] = {m: a for m, a in alphas.items() if a != config.lora_alpha}

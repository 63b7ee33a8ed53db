"""Fused leaves whose parts are separate modules in PyTorch, with separate factors in the file."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._names.layout import MATRIX, TorchWeight
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.file_content import Content
from flax_tied_lora._peft.adapter.file_tensors import PREFIX
from flax_tied_lora._peft.adapter.folder import AdapterFiles
from flax_tied_lora._planning.plan import LORA, GroupPlan, Plan


def with_parts(
    files: AdapterFiles, content: Content, config: LoraConfig, plan: Plan, names: Names
) -> LoraConfig:
    """Returns the config with parts for each leaf that one pair of factors cannot serve.

    That is a leaf whose PyTorch modules lie along an axis of rows or columns, and either have
    different factors for the axes that they share, or are not all adapted. The hits of such a leaf
    in ``content`` are given their part.
    """
    parts: dict[str, Any] = {}
    for group, adapter in plan.adapters(LORA):
        hits = content.hits.lora.get(group.key, [])
        weights = _modules_along_an_axis(group, names)
        if not weights or adapter.separate or len(group.members) > 1:
            continue
        modules = {w.module: w.module.rpartition(".")[2] for w in weights}
        adapted = [h.module for h in hits]
        if len(set(modules.values())) < len(modules) or not set(adapted) <= set(modules):
            continue
        if set(adapted) == set(modules) and _is_one_pair(files, group, weights):
            continue
        parts[re.escape(group.key)] = weights[0].part[0][0], tuple(modules.values())
        content.hits.lora[group.key] = [
            dataclasses.replace(h, part=modules[h.module]) for h in hits
        ]
    return dataclasses.replace(config, parts={**config.parts, **parts}) if parts else config


def _modules_along_an_axis(group: GroupPlan, names: Names) -> list[TorchWeight]:
    """Returns a leaf's modules in order, if they lie along an axis of rows or columns; else []."""
    weights = names.to_torch(group.key, group.shape)
    if len(weights) < 2 or any(
        len(w.part) != 1 or w.kind not in ("linear", MATRIX) for w in weights
    ):
        return []
    axes = {w.part[0][0] for w in weights}
    ordered = sorted(weights, key=lambda w: w.part[0][1])
    (axis,) = axes if len(axes) == 1 else (-1,)
    whole = axis >= 0 and [w.part[0][1] for w in ordered] == list(range(group.shape[axis]))
    return ordered if whole and axis not in group.batch else []


def _is_one_pair(files: AdapterFiles, group: GroupPlan, weights: list[TorchWeight]) -> bool:
    """Returns whether the modules have equal values of the factor that they share."""
    side = "B" if weights[0].part[0][0] in group.rows else "A"
    if len({w.maps_by_axis[0 if side == "B" else 1] for w in weights}) > 1:
        return False
    tensors = [f"{PREFIX}{w.module}.lora_{side}.weight" for w in weights]
    if any(name not in files.tensors for name in tensors):
        return True  # the missing tensor is reported where the leaf is filled
    first = files.tensors[tensors[0]]
    return all(np.array_equal(first, files.tensors[name]) for name in tensors[1:])

"""What PEFT makes of an adapter's file and a base: merged in PyTorch's layout, in NumPy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.helpers.damage import CONFIG, WEIGHTS
from tests.helpers.small_adapters import PREFIX


def merged_in_torch(
    directory: Path, base: Mapping[str, np.ndarray], conv1d: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Returns a PyTorch state dict with the adapter of a file merged into it.

    Args:
      base: the state dict of the base model.
      conv1d: modules whose weight is [in, out].
    """
    tensors = {n.removeprefix(PREFIX): x for n, x in load_file(directory / WEIGHTS).items()}
    config = json.loads((directory / CONFIG).read_text())
    scaling = config["lora_alpha"] / config["r"]
    merged = dict(base)
    for name, x in tensors.items():
        module, _, what = name.partition(".lora_")
        weight = f"{module}.weight"
        if what == "A.weight":
            delta = scaling * tensors[f"{module}.lora_B.weight"] @ x
            merged[weight] = _with_delta(tensors, module, base[weight], delta, module in conv1d)
        elif what == "embedding_A":
            delta = scaling * (tensors[f"{module}.lora_embedding_B"] @ x).T
            merged[weight] = base[weight] + delta
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            module = name.removesuffix(".token_adapter.trainable_tokens_delta")
            merged[f"{module}.weight"] = _with_rows(base[f"{module}.weight"], x, config, module)
        elif not what:
            merged[name.replace(".base_layer.", ".")] = x
    return merged


def _with_delta(
    tensors: Any, module: str, base: np.ndarray, delta: np.ndarray, transposed: bool
) -> np.ndarray:
    weight = (base.T if transposed else base) + delta
    magnitude = tensors.get(f"{module}.lora_magnitude_vector")
    if magnitude is not None:
        weight *= (magnitude / np.linalg.norm(weight, axis=1))[:, None]
    return weight.T if transposed else weight


def _with_rows(base: np.ndarray, rows: np.ndarray, config: Any, module: str) -> np.ndarray:
    indices = config["trainable_token_indices"]
    if isinstance(indices, dict):
        indices = next(ids for n, ids in indices.items() if f".{module}".endswith(f".{n}"))
    result = base.copy()
    result[indices] = rows
    return result

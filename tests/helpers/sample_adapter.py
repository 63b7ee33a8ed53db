"""A small adapter in a directory, made with the safetensors library and not with ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from flax_tied_lora._peft.adapter.folder import read_adapter, write_adapter
from tests.helpers.damage import CONFIG, WEIGHTS, equal, snapshot

Sources = list[tuple[str, tuple[int, ...], Any, Callable[[], Any]]]

FIELDS = {
    "alpha_pattern": {},
    "base_model_name_or_path": "a/model",
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {"q_proj": 4},
    "target_modules": ["q_proj", "v_proj"],
}
TEXT = json.dumps(FIELDS, indent=2)
OTHER_TEXT = json.dumps(FIELDS | {"lora_alpha": 99})
FOREIGN = {
    "README.md": b"mine",
    "notes.txt": b"mine too",
    ".hidden": b"",
    "model.safetensors": b"x",
}
PREFIX = "base_model.model.model.layers.0.self_attn"


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns tensors of several dtypes, one of them without axes and one without elements."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((2, 6))
    return {
        f"{PREFIX}.v_proj.lora_B.weight": rng.standard_normal((6, 2)).astype(np.float32),
        f"{PREFIX}.q_proj.lora_A.weight": half.astype(ml_dtypes.bfloat16),
        f"{PREFIX}.q_proj.lora_B.weight": half.T.copy().astype(np.float16),
        f"{PREFIX}.v_proj.lora_A.weight": rng.standard_normal((2, 3, 2)).astype(np.float32),
        "counts": rng.integers(-5, 5, (3,)),
        "nothing": np.zeros((0, 4), np.float32),
        "one": np.array(3.5, np.float32),
    }


def save(directory: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes an adapter and returns its tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(TEXT)
    save_file(tensors(seed), directory / WEIGHTS, metadata={"format": "pt"})
    return tensors(seed)


def sources(arrays: Mapping[str, Any]) -> Sources:
    """Returns arrays as our writer takes them."""
    return [(name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()]


def values(files: Any) -> dict[str, np.ndarray]:
    """Returns all tensors of an adapter that was read, and closes it."""
    with files:
        return dict(files.tensors)


def write(directory: Path, text: str = TEXT, seed: int = 1, **kwargs: Any) -> None:
    """Saves another adapter there with our writer."""
    write_adapter(directory, text, sources(tensors(seed)), **{"overwrite": True, **kwargs})


def found(directory: Path) -> tuple[int, int]:
    """Returns which adapter a reader finds: its alpha, and which tensors."""
    files = read_adapter(directory)
    alpha = files.config["lora_alpha"]
    held = values(files)
    seeds = [seed for seed in (0, 1) if equal(held, tensors(seed))]
    assert len(seeds) == 1
    return alpha, seeds[0]


def foreign(directory: Path) -> dict[str, bytes]:
    """Returns the files that are none of an adapter's."""
    return {name: data for name, data in snapshot(directory).items() if name in FOREIGN}

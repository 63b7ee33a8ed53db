"""Adapters for 4 x 4 projections and a tied table, in files that safetensors itself writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.helpers.damage import CONFIG, WEIGHTS

PREFIX = "base_model.model."
FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def factors(*modules: str, rank: int = 2, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Returns the factors of 4 x 4 projections, by PEFT's names."""
    found = {}
    for i, module in enumerate(modules):
        found[f"{PREFIX}{module}.lora_A.weight"] = draw(10 + i, rank, 4).astype(dtype)
        found[f"{PREFIX}{module}.lora_B.weight"] = draw(20 + i, 4, rank).astype(dtype)
    return found


def tied_factors() -> dict[str, np.ndarray]:
    a, b = draw(30, 2, 12), draw(31, 4, 2)
    return {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
        f"{PREFIX}lm_head.lora_A.weight": b.T.copy(),
        f"{PREFIX}lm_head.lora_B.weight": a.T.copy(),
    }


def put(directory: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps({**FIELDS, **fields}))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory

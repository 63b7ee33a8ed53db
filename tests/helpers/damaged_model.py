"""A tiny model with an adapter of every kind, to be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_tied_lora as tied_lora
from flax_tied_lora.names import names_of
from flax_tied_lora.peft import load_adapter, save_adapter
from tests.helpers import damage_shards
from tests.helpers.damage import snapshot
from tests.helpers.damage_cases import CASES

assert damage_shards.CASES is CASES  # importing it has added its own

ROWS, WIDTH = 7, 4
NAMES = names_of(
    None,
    [
        ("embed/embedding", "embed_tokens.weight"),
        ("block_{}/q/kernel", "layers.{}.q_proj.weight"),
        ("block_{}/q/bias", "layers.{}.q_proj.bias"),
        ("block_{}/kv", "layers.{}.k_proj.weight", "0 in out -> out in"),
        ("block_{}/kv", "layers.{}.v_proj.weight", "1 in out -> out in"),
        ("norm/scale", "norm.weight"),
    ],
    tied={"embed/embedding": ("lm_head",)},
)
SHAPES = {
    "embed": {"embedding": (ROWS, WIDTH)},
    "block_0": {"q": {"kernel": (WIDTH, 6), "bias": (6,)}, "kv": (2, WIDTH, 6)},
    "block_1": {"q": {"kernel": (WIDTH, 6), "bias": (6,)}, "kv": (2, WIDTH, 6)},
    "norm": {"scale": (WIDTH,)},
}
PREFIX = "base_model.model."
Q, HEAD, TABLE = (f"{PREFIX}{m}" for m in ("layers.0.q_proj", "lm_head", "embed_tokens"))


def draw(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


PARAMS = jax.tree.map(
    lambda shape: jax.numpy.asarray(draw(shape)), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def model(params: Any, tokens: Any) -> Any:
    x = params["embed"]["embedding"][tokens]
    for i in range(2):
        block = params[f"block_{i}"]
        x = x @ block["q"]["kernel"] @ block["kv"][0].T + x @ block["kv"][1] @ block["kv"][0].T
    return x @ params["embed"]["embedding"].T


SITES = tied_lora.trace(model, PARAMS, np.arange(3))
FIELDS = {
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["embed", "q"],
    "bias": "lora_only",
    "modules_to_save": ["norm"],
}


def load(directory: Path, **options: Any) -> tied_lora.Adapted:
    return load_adapter(directory, PARAMS, NAMES, sites=SITES, **options)


def make(directory: Path) -> dict[str, bytes]:
    """Saves an adapter of every kind; returns its files."""
    adapted = tied_lora.wrap(PARAMS, tied_lora.LoraConfig(**FIELDS), sites=SITES)
    move = lambda x: x + draw(x.shape)  # noqa: E731
    adapted = adapted.replace(adapters=jax.tree.map(move, adapted.adapters))
    save_adapter(directory, adapted, NAMES)
    return snapshot(directory)

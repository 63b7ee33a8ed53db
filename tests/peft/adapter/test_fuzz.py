"""Adapters damaged at random: each loads, or ends in the one error, and nothing changes."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load as tensors_of
from safetensors.numpy import save

from flax_tied_lora._planning.tying import WeightTyingWarning
from flax_tied_lora.peft import AdapterFileError
from tests.helpers.damage import CONFIG, WEIGHTS, put, random_damage, reshard, snapshot
from tests.helpers.damaged_model import PARAMS, PREFIX, load, make


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    return make(tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def adapter(files, tmp_path) -> Path:
    put(files, tmp_path / "adapter")
    return tmp_path / "adapter"


Damage = Callable[[dict[str, bytes], int], tuple[str, dict[str, bytes]]]


def fuzz(
    files: dict[str, bytes], directory: Path, seeds: range, damage: Damage = random_damage
) -> dict[str, int]:
    """Loads damaged adapters; returns how many loaded, and how many were refused."""
    outcomes = {"loaded": 0, "refused": 0}
    params = jax.tree.map(np.copy, PARAMS)
    for seed in seeds:
        what, damaged = damage(files, seed)
        put(damaged, directory)
        try:
            with warnings.catch_warnings():
                # The config may say of a tie what the tensors do not.
                warnings.simplefilter("ignore", WeightTyingWarning)
                adapted = load(directory)
            shapes = {k: g.shapes(a) for g, a in adapted.plan.adapters() for k in [a.key]}
            assert shapes, what
            adapted.replace(adapters=adapted.adapters)
            outcomes["loaded"] += 1
        except AdapterFileError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    jax.tree.map(np.testing.assert_array_equal, PARAMS, params)
    return outcomes


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_random_damage(adapter, tmp_path, sharded):
    """Two thousand damaged adapters, half of them with shards."""
    if sharded:
        reshard(adapter)
    outcomes = fuzz(
        snapshot(adapter), tmp_path / "damaged", range(1000 * sharded, 1000 + 1000 * sharded)
    )
    assert outcomes["loaded"] > 30
    assert outcomes["refused"] > 500


_VALUES: dict[str, list[Any]] = {
    "r": [1, 3, 4, 40],
    "lora_alpha": [1, 0.5, 1e30],
    "bias": ["none", "all", "lora_only"],
    "modules_to_save": [None, ["norm"], ["q_proj"], ["embed_tokens"], ["lm_head"], ["layers"], []],
    "target_modules": [None, "all-linear", ".*q_proj", ["q_proj"], ["lm_head"], ["nothing"], []],
    "rank_pattern": [{"q_proj": 1}, {"lm_head": 3}, {"nothing": 2}],
    "alpha_pattern": [{"q_proj": 1}, {"embed_tokens": 3}, {".*": 2}],
    "trainable_token_indices": [[0], [6, 1], [99], {"embed_tokens": [2]}, {"lm_head": [0, 1]}],
    "ensure_weight_tying": [None, True, False],
    "use_dora": [True, False],
    "use_rslora": [True, False],
    "init_lora_weights": [True, False, "gaussian", "pissa", "olora", "orthogonal", "pissa_niter_4"],
    "target_parameters": [["kv"], ["norm.weight"]],
    "layers_to_transform": [0, [1], [5]],
    "exclude_modules": [["q_proj"], ".*"],
    "fan_in_fan_out": [True],
    "lora_dropout": [0.5],
}
_NAMES = [
    f"{PREFIX}{module}.{end}"
    for module in ("embed_tokens", "lm_head", "norm", "layers.0.q_proj", "layers.1.v_proj", "")
    for end in (
        "lora_A.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "weight",
        "bias", "base_layer.weight", "base_layer.bias", "token_adapter.trainable_tokens_delta",
        "modules_to_save.weight", "original_module.weight", "base_layer.lora_B.weight", "",
    )
]  # fmt: skip
_SHAPES = [(), (0,), (2,), (4,), (6,), (2, 4), (4, 2), (7, 4), (4, 7), (2, 7), (6, 4), (2, 4, 6)]


def other_contents(files: dict[str, bytes], seed: int) -> tuple[str, dict[str, bytes]]:
    """Returns sound files of an adapter that is another than it was."""
    rng = random.Random(seed)
    config, tensors = json.loads(files[CONFIG]), tensors_of(files[WEIGHTS])
    done = []
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        kind, name = rng.randrange(7), rng.choice(sorted(tensors) or [f"{PREFIX}x"])
        done.append(f"{kind} {name}")
        if kind < 3:
            field = rng.choice(sorted(_VALUES))
            config[field] = rng.choice(_VALUES[field])
            done[-1] = f"{field}={config[field]!r}"
        elif kind == 3:
            tensors.pop(name, None)
        elif kind == 4 and name in tensors:
            tensors[rng.choice(_NAMES)] = tensors.pop(name)
        elif kind == 5:
            tensors[rng.choice(_NAMES)] = np.ones(rng.choice(_SHAPES), np.float32)
        else:
            dtype = rng.choice(["float16", "float64", "int8", "bool"])
            tensors[name] = np.ones(rng.choice(_SHAPES), dtype)
    content = {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors, {"format": "pt"})}
    return f"seed {seed}: {', '.join(done)}", content


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_contents(files, tmp_path, count):
    outcomes = fuzz(files, tmp_path / "other", range(count), other_contents)
    assert outcomes["loaded"] > count / 20
    assert outcomes["refused"] > count / 2

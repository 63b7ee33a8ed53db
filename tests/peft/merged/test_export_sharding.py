"""Merged models whose leaves are spread over the devices of one process, in files."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from flax_tied_lora._peft.merged.export import save_merged
from flax_tied_lora.names import to_state_dict
from tests.helpers.merged_models import CONFIG, NAMES, gpt2
from tests.peft.merged.test_export import stored


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"trainable_token_indices": {"wte": [2, 7]}},
        {"modules_to_save": ["wte"], "bias": "all", "target_modules": ["c_fc"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_leaves_spread_over_devices(kind, fields, tmp_path):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))

    def place(x: Any) -> Any:
        spec = ["x" if n % 2 == 0 and i == 0 else None for i, n in enumerate(x.shape)]
        if len(spec) == 2 and x.shape[1] % 2 == 0:
            spec[1] = "y"
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    one = gpt2(**fields)
    with jax.set_mesh(mesh):
        params = jax.tree.map(place, one.params)
        own = tied_lora.wrap(params, one.plan.config).adapters
        adapters = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), one.adapters, own)
        spread = one.replace(params=params, adapters=adapters)
        save_merged(tmp_path, spread, NAMES, CONFIG)
    factor = spread.adapters["lora"]["transformer/h/0/mlp/c_fc/kernel"]["lora_a"]
    assert factor.addressable_shards[0].data.size < factor.size
    expected = to_state_dict(tied_lora.merge(one), NAMES)
    found = stored(tmp_path)
    assert set(found) == set(expected)
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)

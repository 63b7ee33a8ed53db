"""Records that somebody has edited, with a checksum that is right: an error, or the same values."""

from __future__ import annotations

import json
import random
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.edited_json import edited
from tests.helpers.saved_base import base_params

OPTIMIZER = optax.adam(0.1)
CONFIGS = {
    "adapters": tied_lora.LoraConfig(r=2, target_modules=["embed", "dense"], use_dora=True),
    "tokens and copies": tied_lora.LoraConfig(
        r=2, target_modules=["embed"], modules_to_save=["dense"], trainable_token_indices=[1, 5]
    ),
    "separate": tied_lora.LoraConfig(
        r=2, target_modules=["embed", "head"], ensure_weight_tying=False
    ),
}
TIES = [("embed/embedding", "head/kernel")]
EDITS = 120


def same(found, expected):
    """Whether two pytrees have the same leaves, by name; of typed keys the same data."""
    found, expected = by_name(found), by_name(expected)
    return found.keys() == expected.keys() and all(
        np.array_equal(_plain(found[name]), _plain(expected[name])) for name in found
    )


def by_name(tree):
    # A quantised leaf that an edit has made none is a dict of the same arrays.
    return {
        jax.tree_util.keystr(path, simple=True): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _plain(x):
    is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def campaign(path, restore, edits=EDITS):
    """Edits a record many times; returns how often it could be restored all the same."""
    file = path / "tied_lora" / "metadata"
    record = json.loads(file.read_text())["record"]
    expected, rng, restored = restore(), random.Random(0), 0
    for number in range(edits):
        change = edited(rng, record)
        text = json.dumps(change, sort_keys=True)
        file.write_text(json.dumps({"record": change, "crc32": zlib.crc32(text.encode())}))
        try:
            found = restore()
        except CheckpointError:
            continue
        restored += 1
        assert same(found, expected), f"silently other values after edit {number}"
    return restored


def adapters_campaign(tmp_path, name, edits=EDITS):
    adapted = tied_lora.wrap(base_params(), CONFIGS[name], ties=TIES)
    state = OPTIMIZER.init(adapted.adapters)
    extra = {"rng": jax.random.key(1), "at": [np.ones(2), 3]}
    checkpoint.save(tmp_path / "a", adapted, opt_state=state, extra=extra)

    def restore():
        found = checkpoint.restore(tmp_path / "a", base_params(), opt_state=OPTIMIZER)
        return found.adapted.adapters, found.adapted.scaling, found.opt_state, found.extra

    return campaign(tmp_path / "a", restore, edits)


separate = pytest.mark.filterwarnings("ignore::flax_tied_lora.WeightTyingWarning")


@separate
@pytest.mark.parametrize("name", CONFIGS)
def test_records_of_adapters(tmp_path, name):
    assert adapters_campaign(tmp_path, name) < EDITS / 2


def params_campaign(tmp_path, with_target, edits=EDITS):
    params = {**base_params(), "more": jnp.ones((16, 16))}
    params = tied_lora.quantize(params, exclude_modules=["embed", "head"])
    checkpoint.save_params(tmp_path / "p", params, ties=TIES)

    def restore():
        found = checkpoint.restore_params(tmp_path / "p", params if with_target else None)
        # What is tied is known from the record alone: an edit may make another tie of it.
        return {name: leaf for name, leaf in found.items() if name != "head"}

    return campaign(tmp_path / "p", restore, edits)


@pytest.mark.parametrize("with_target", [False, True])
def test_records_of_params(tmp_path, with_target):
    assert params_campaign(tmp_path, with_target) < EDITS / 2


@separate
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_many_records_of_adapters(tmp_path, name):
    adapters_campaign(tmp_path, name, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("with_target", [False, True])
def test_many_records_of_params(tmp_path, with_target):
    params_campaign(tmp_path, with_target, 2000)

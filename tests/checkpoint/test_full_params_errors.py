"""Full params that cannot be saved, or be read into what is given: each says what differs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_base import TIES, base_params, changed, without, wrapped


def test_params_that_are_adapted(tmp_path):
    with pytest.raises(CheckpointError, match=r"save tied_lora.merge\(adapted\)"):
        checkpoint.save_params(tmp_path / "a", wrapped())
    assert not list(tmp_path.iterdir())


def test_params_into_a_target_that_does_not_fit(tmp_path):
    checkpoint.save_params(tmp_path / "p", base_params(), ties=TIES)
    for target, message in (
        (without("head"), "the target has no 'head/kernel', which .* as a member of the tie group"),
        (without("dense"), "params in .*'dense.bias' is only in the checkpoint"),
        (changed("dense/bias", jnp.ones(3)), r"'dense.bias' is float32\[16\] in the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.restore_params(tmp_path / "p", target)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(CheckpointError, match="sharding is not like the params of"):
        checkpoint.restore_params(tmp_path / "p", sharding={"dense": place})
    with pytest.raises(CheckpointError, match=re.escape("restore: ")):
        checkpoint.restore_params(tmp_path / "nowhere")

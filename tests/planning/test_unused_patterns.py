"""What a config says of names that are not adapted: each is warned of."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.deep_model import adapted_keys, kernels


def test_target_that_names_nothing_beside_one_that_does():
    with pytest.warns(tied_lora.UnmatchedTargetWarning, match="'k_proj' .*nearby: .*q_proj"):
        assert adapted_keys(["q_proj", "k_proj"]) == kernels("q_proj")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_no_target_warns(field):
    params = {"a": {"kernel": jnp.ones((4, 4))}}
    config = tied_lora.LoraConfig(r=2, target_modules=["a"], **{field: {"zzz": 1}})
    with pytest.warns(tied_lora.UnmatchedTargetWarning, match=f"'zzz' in {field}.*'a'"):
        tied_lora.wrap(params, config)
    config = tied_lora.LoraConfig(r=2, target_modules=["a"], **{field: {"a": 1}})
    tied_lora.wrap(params, config)

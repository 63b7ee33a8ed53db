"""A model object with adapters in slots, and with separate ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.fused_model import PARAMS, X, fn, parts, plain
from tests.helpers.small_models import wrapped


class Scorer:
    """A model object, as transformers' Flax models are, with params of its own."""

    def __init__(self):
        self.params = PARAMS

    def __call__(self, tokens, params=None):
        return fn(self.params if params is None else params, tokens)


def test_a_model_object_with_slots():
    adapters = [parts("qkv:q", "embed_tokens"), parts("qkv:v", seed=3)]
    stacked = tied_lora.stack(adapters)
    model = tied_lora.AdaptedModel(Scorer(), tied_lora.select(stacked, 0))
    for slot, adapted in enumerate(adapters):
        expected = plain(tied_lora.merge(adapted), X)
        found = model.replace(tied_lora.select(stacked, slot))(X)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    (compiled,) = model._compiled.values()
    assert compiled._cache_size() == 1
    each = model.replace(tied_lora.select(stacked, [1, 0]))
    found = jax.jit(tied_lora.per_example(lambda model, tokens: model(tokens)))(each, X)
    np.testing.assert_allclose(found[0], plain(tied_lora.merge(adapters[1]), X)[0], atol=1e-4)
    np.testing.assert_allclose(found[1], plain(tied_lora.merge(adapters[0]), X)[1], atol=1e-4)


def test_a_model_object_with_separate_adapters_is_merged_untied():
    sites = tied_lora.trace(fn, PARAMS, X)
    with pytest.warns(tied_lora.WeightTyingWarning):
        adapted = wrapped(
            PARAMS, ["embed_tokens", "lm_head"], sites=sites, ensure_weight_tying=False
        )
    untie = {"lm_head": "lm_head/kernel"}
    found = tied_lora.AdaptedModel(Scorer(), adapted).merge(untie=untie)
    jax.tree.map(np.testing.assert_array_equal, found, tied_lora.merge(adapted, untie=untie))

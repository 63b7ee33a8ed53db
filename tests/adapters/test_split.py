"""`split` and `combine`: the two halves of an `Adapted`."""

from __future__ import annotations

import jax
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, TiedLM, init, wrapped

MODEL = TiedLM()
ADAPTED = wrapped(init(MODEL), ["embed_tokens", "up"], lora_dropout=0.5)


def test_there_and_back_is_the_same_arrays():
    adapted = tied_lora.select(tied_lora.stack([ADAPTED, ADAPTED]), 1).train(jax.random.key(0))
    adapters, frozen = tied_lora.split(adapted)
    again = tied_lora.combine(adapters, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    pairs = zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True)
    assert all(a is b for a, b in pairs)
    apart = len(jax.tree.leaves(adapters)) + len(jax.tree.leaves(frozen))
    assert apart == len(jax.tree.leaves(adapted))


def test_the_frozen_half_alone_is_refused_where_adapters_are_needed():
    _, frozen = tied_lora.split(ADAPTED)
    with pytest.raises(ValueError, match=r"no adapters.*combine\(adapters, frozen\)"):
        tied_lora.adapt(MODEL.apply)({"params": frozen}, TOKENS)
    assert "2 groups adapted" in repr(frozen)
    assert "embed_tokens/embedding" in str(frozen)


def test_what_is_refused():
    adapters, frozen = tied_lora.split(ADAPTED)
    with pytest.raises(TypeError, match="split: expected an Adapted, as wrap returns it, got dict"):
        tied_lora.split({})
    with pytest.raises(TypeError, match=r"combine: frozen is a dict; expected combine\(adapters,"):
        tied_lora.combine(frozen, adapters)
    with pytest.raises(ValueError, match="not the plan's adapters"):
        tied_lora.combine({"lora": {}}, frozen)

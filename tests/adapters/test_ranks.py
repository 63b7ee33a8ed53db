"""Adapters of another rank: the same deltas, and a config that says all of their ranks."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._adapters.ranks import with_patterns, with_ranks
from tests.helpers.small_models import TiedLM, init, wrapped

TABLE, UP = "embed_tokens/embedding", "up/kernel"
ADAPTED = wrapped(init(TiedLM()), ["embed_tokens", "up"])


@pytest.mark.parametrize("rslora", [False, True])
def test_a_larger_rank_is_the_same_delta(rslora):
    adapted = wrapped(init(TiedLM()), ["embed_tokens", "up"], use_rslora=rslora)
    wide = with_ranks("padded", adapted, {TABLE: 5, UP: 2})
    assert {a.key: a.rank for _, a in wide.plan.adapters()} == {TABLE: 5, UP: 2}
    merged = [tied_lora.merge(a) for a in (wide, adapted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *merged)
    config = wide.plan.config
    for name, rank, key in (("embed_tokens", 5, TABLE), ("up", 2, UP)):
        assert config.rank_for(name) == rank
        by = math.sqrt(rank) if rslora else rank
        assert config.alpha_for(name) / by == pytest.approx(float(adapted.scaling[key]))


def test_the_same_ranks_are_the_same_object():
    assert with_ranks("padded", ADAPTED, {TABLE: 2, UP: 2}) is ADAPTED


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        (1, "'up/kernel' has rank 2, found rank 1"),
        (9, r"\[8, 8\], which has rank 8"),
    ],
)
def test_ranks_that_are_refused(rank, says):
    with pytest.raises(ValueError, match=f"^padded: .*{says}"):
        with_ranks("padded", ADAPTED, {TABLE: 2, UP: rank})


def test_the_commonest_values_are_no_patterns():
    adapters = [a for _, a in ADAPTED.plan.adapters()]
    config = with_patterns("combine", ADAPTED.plan.config, adapters, {TABLE: 4.0, UP: 4.0})
    assert (config.r, config.lora_alpha) == (2, 4.0)
    assert not config.rank_pattern
    assert not config.alpha_pattern
    config = with_patterns("combine", ADAPTED.plan.config, adapters, {TABLE: 4.0, UP: 6.0})
    assert (config.alpha_for("up"), config.alpha_for("embed_tokens")) == (6.0, 4.0)

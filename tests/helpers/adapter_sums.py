"""Adapters of small models, their deltas, and sums of those, for the tests of arithmetic."""

from __future__ import annotations

import functools
import warnings

import chex
import jax
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init, wrapped

TABLE, UP = "embed_tokens/embedding", "up/kernel"
MODEL = TiedLM()
PARAMS = init(MODEL)
BOTH = ["embed_tokens", "up"]
W = PARAMS["embed_tokens"]["embedding"]
# Two leaves for one table: the same array, and its transpose by declaration.
TIED = {**PARAMS, "head": {"kernel": W}, "tail": {"kernel": W.T}}
TIES = [(TABLE, "tail/kernel")]
STACKED = init(StackedLM())
SITES = tied_lora.trace(StackedLM().apply, {"params": STACKED}, TOKENS)
TIED_SITES = tied_lora.trace(MODEL.apply, {"params": PARAMS}, TOKENS)
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def one(seed=1, targets=BOTH, params=PARAMS, **options):
    return wrapped(params, targets, seed=seed, **options)


def delta(adapted):
    """What merging adds, in float64."""
    merged, base = tied_lora.merge(adapted), tied_lora.base(adapted)
    return jax.tree.map(lambda m, b: np.asarray(m, np.float64) - np.asarray(b), merged, base)


def weighted(adapteds, weights):
    return jax.tree.map(
        lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *map(delta, adapteds)
    )


def rewrapped(adapted, **options):
    """What `wrap` makes of the config that came out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tied_lora.wrap(tied_lora.base(adapted), adapted.plan.config, **options)


def says_what_it_is(adapted, **options):
    """The config, saved and wrapped again, gives the same plan, shapes and scaling."""
    again = rewrapped(adapted, **options)
    assert again.plan is adapted.plan
    chex.assert_trees_all_equal_shapes_and_dtypes(again, adapted)
    assert {k: float(v) for k, v in again.scaling.items()} == pytest.approx(
        {k: float(v) for k, v in adapted.scaling.items()}, rel=1e-6
    )


def flax_logits(adapted):
    return tied_lora.adapt(MODEL.apply, on_dense="error")({"params": adapted}, TOKENS)


def separate(seed, **options):
    with pytest.warns(tied_lora.WeightTyingWarning):
        return one(seed, ["embed_tokens", "lm_head"], sites=TIED_SITES,
                   ensure_weight_tying=False, **options)  # fmt: skip


def other_values():
    return {**PARAMS, "up": {**PARAMS["up"], "kernel": PARAMS["up"]["kernel"] + 1}}

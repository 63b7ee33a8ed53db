"""arithmetic: scale, switch and padded; stack for adapters of different ranks."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig, arithmetic
from tests.helpers.adapter_sums import (
    BOTH,
    PARAMS,
    SITES,
    STACKED,
    TABLE,
    TIED,
    TIES,
    UP,
    close,
    delta,
    flax_logits,
    one,
    other_values,
    says_what_it_is,
    weighted,
)
from tests.helpers.small_models import randomised

# scale


@pytest.mark.parametrize("factor", [0.25, -1, 0, np.float32(2), jnp.asarray(3.0)])
def test_scaled_delta(factor):
    adapted = one()
    scaled = arithmetic.scale(adapted, factor)
    close(delta(scaled), weighted([adapted], [float(factor)]))
    assert scaled.plan is adapted.plan
    assert scaled.adapters is adapted.adapters
    chex.assert_trees_all_equal_shapes_and_dtypes(scaled, adapted)


@pytest.mark.parametrize("name", [TABLE, "embed_tokens", "embedding", "tail/kernel", "tail"])
def test_scale_by_name(name):
    adapted = one(params=TIED, ties=TIES)
    scaled = arithmetic.scale(adapted, {name: 0.5})
    assert float(scaled.scaling[TABLE]) == 0.5 * float(adapted.scaling[TABLE])
    assert scaled.scaling[UP] is adapted.scaling[UP]


def test_scale_stacked_and_dora():
    stacked = tied_lora.stack([one(1), one(2)])
    scaled = arithmetic.scale(stacked, {"up": jnp.asarray([0.5, 2.0])})
    assert scaled.scaling[UP].tolist() == [0.75, 3.0]
    assert arithmetic.scale(stacked, 2).scaling[UP].tolist() == [3.0, 3.0]
    dora = one(1, ["up"], use_dora=True)
    none = tied_lora.merge(arithmetic.scale(dora, 0.0))["up"]["kernel"]
    kernel, magnitude = PARAMS["up"]["kernel"], dora.adapters["lora"][UP]["lora_magnitude"]
    close(none, kernel * (magnitude / jnp.linalg.norm(kernel, axis=0))[None])


def test_scale_beside_a_full_copy_is_by_name():
    adapted = one(1, ["up"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=f"'{TABLE}' in modules_to_save is trained in full"):
        arithmetic.scale(adapted, 0.5)
    assert float(arithmetic.scale(adapted, {"up": 2}).scaling[UP]) == 3.0


@pytest.mark.parametrize(
    ("factor", "kind", "message"),
    [
        ("a", TypeError, "the factor is 'a'; expected a number"),
        (True, TypeError, "True; expected a number"),
        (float("inf"), ValueError, "inf; expected a finite"),
        (jnp.ones(2), ValueError, r"is \[2\]; expected a number"),
        ({"down": 1.0}, ValueError, "'down' names no adapter; nearby: "),
        ({"up": 1.0, UP: 2.0}, ValueError, f"'up' and '{UP}' both name '{UP}'"),
    ],
)
def test_scale_errors(factor, kind, message):
    with pytest.raises(kind, match=message):
        arithmetic.scale(one(), factor)


def test_scale_refuses_what_is_no_adapter_and_no_delta():
    with pytest.raises(TypeError, match="scale: expected an Adapted"):
        arithmetic.scale(PARAMS, 1.0)
    with pytest.raises(ValueError, match="scale: init_lora_weights='olora'"):
        arithmetic.scale(one(1, ["up"], init_lora_weights="olora"), 0.5)


# padded, switch, stack


@pytest.mark.parametrize("rslora", [False, True])
def test_padded_is_the_same_adapter(rslora):
    adapted = one(use_rslora=rslora, rank_pattern={"up": 3})
    more = arithmetic.padded(adapted, 7)
    close(delta(more), delta(adapted))
    assert {a.rank for _, a in more.plan.adapters()} == {7}
    assert more.scaling is adapted.scaling
    says_what_it_is(more)
    assert arithmetic.padded(more, 7) is more


def test_padded_heads_layers_stacks_and_copies():
    adapted = one(1, ["q_proj", "o_proj"], STACKED, sites=SITES)
    more = arithmetic.padded(adapted, 5)
    close(delta(more), delta(adapted))
    says_what_it_is(more, sites=SITES)
    stacked = arithmetic.padded(tied_lora.stack([adapted, adapted]), 5)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], stacked.adapters), more.adapters)
    assert stacked.plan is more.plan
    mixed = one(1, ["up"], use_dora=True, modules_to_save=["embed_tokens"])
    close(delta(arithmetic.padded(mixed, 3)), delta(mixed))
    odd = arithmetic.padded(one(init_lora_weights="orthogonal"), 3)
    says_what_it_is(odd)


@pytest.mark.parametrize(
    ("rank", "kind", "message"),
    [
        (1, ValueError, f"padded: '{TABLE}' has rank 2, found rank 1.*how='svd'"),
        (9, ValueError, rf"rank 9 for '{TABLE}' \[12, 8\], which has rank 8 at most"),
        (2.0, TypeError, "rank is 2.0; expected an int"),
    ],
)
def test_padded_errors(rank, kind, message):
    with pytest.raises(kind, match=message):
        arithmetic.padded(one(), rank)


def test_switching_and_scaling_compile_once():
    count = 0

    def run(adapted):
        nonlocal count
        count += 1
        return flax_logits(adapted)

    compiled = jax.jit(run)
    served = arithmetic.padded(one(1), 4)
    close(compiled(served), flax_logits(one(1)))
    for other in (one(2, lora_alpha=7), one(3, r=4), one(4, r=1, use_rslora=True)):
        served = arithmetic.switch(served, other)
        close(compiled(served), flax_logits(other))
        close(compiled(arithmetic.scale(served, 0.5)), flax_logits(arithmetic.scale(other, 0.5)))
    assert count == 1


def test_switch_errors():
    with pytest.raises(
        ValueError, match=rf"'{TABLE}' has rank 3.*room for 2.*padded\(adapted, 3\)"
    ):
        arithmetic.switch(one(1), one(2, r=3))
    with pytest.raises(ValueError, match=f"different groups: '{TABLE}' is in one of them only"):
        arithmetic.switch(one(1), one(2, ["up"]))
    with pytest.raises(ValueError, match=f"different groups: '{UP}' differ"):
        arithmetic.switch(one(1, ["up"]), one(2, ["up"], use_dora=True))
    with pytest.raises(ValueError, match=f"switch: .*different bases: '{UP}' has other values"):
        arithmetic.switch(one(1), one(2, params=other_values()))
    with pytest.raises(TypeError, match="switch: expected an Adapted"):
        arithmetic.switch(one(1), PARAMS)


def test_stack_of_different_ranks():
    several = [one(1), one(2, r=4, lora_alpha=9), one(3, rank_pattern={"up": 5})]
    stacked = tied_lora.stack(several)
    assert {a.key: a.rank for _, a in stacked.plan.adapters()} == {TABLE: 4, UP: 5}
    many = jax.vmap(flax_logits, in_axes=(tied_lora.adapter_axes(stacked),))(stacked)
    close(many, jnp.stack([flax_logits(a) for a in several]))
    with pytest.raises(ValueError, match=r"stack: .*different bases"):
        tied_lora.stack([several[0], one(2, params=other_values())])
    copied = tied_lora.stack([several[0], one(2, params=jax.tree.map(jnp.copy, PARAMS))])
    assert copied.params is several[0].params


def test_stack_under_jit_and_abstract():
    adapteds = [one(1), one(2, r=3)]
    stacked = jax.jit(lambda a, b: tied_lora.stack([a, b]))(*adapteds)
    chex.assert_trees_all_equal(stacked.adapters, tied_lora.stack(adapteds).adapters)
    abstract = jax.eval_shape(lambda: randomised(PARAMS))
    config = LoraConfig(r=2, target_modules=BOTH)
    with pytest.raises(ValueError, match="adapters are abstract"):
        arithmetic.combine([tied_lora.wrap(abstract, config)], [1.0])

"""arithmetic.combine: a weighted sum of adapters as one adapter."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig, arithmetic
from tests.helpers.adapter_sums import (
    BOTH,
    MODEL,
    PARAMS,
    SITES,
    STACKED,
    TABLE,
    TIED,
    TIES,
    UP,
    W,
    close,
    delta,
    flax_logits,
    one,
    rewrapped,
    says_what_it_is,
    separate,
    weighted,
)
from tests.helpers.small_models import TOKENS


@pytest.mark.parametrize(
    ("params", "options", "targets"),
    [
        (PARAMS, {}, BOTH),
        (TIED, {"ties": TIES}, BOTH),
        (STACKED, {"sites": SITES}, ["embed_tokens", "q_proj", "o_proj"]),
    ],
    ids=["one leaf", "tied leaves", "heads and layers"],
)
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_combined_is_the_weighted_sum(params, options, targets, how):
    ranks = [2, 1] if how == "cat" else [2, 2]
    adapteds = [one(s, targets, params, r=r, lora_alpha=s, **options)
                for s, r in zip((1, 5), ranks, strict=True)]  # fmt: skip
    weights = [0.7, -1.5]
    rank = None if how == "cat" else 4
    combined = arithmetic.combine(adapteds, weights, how, rank)
    close(delta(combined), weighted(adapteds, weights))
    assert {a.rank for _, a in combined.plan.adapters()} == {sum(ranks)}
    assert set(map(float, combined.scaling.values())) == {1.0}
    assert combined.params is adapteds[0].params
    says_what_it_is(combined, **options)


def test_side_by_side_is_never_wider_than_the_matrix():
    adapteds, weights = [one(s, r=5) for s in (1, 2)], [1.0, -0.5]
    combined = arithmetic.combine(adapteds, weights, "cat")
    assert {a.rank for _, a in combined.plan.adapters()} == {8}
    close(delta(combined), weighted(adapteds, weights))
    says_what_it_is(combined)


def test_combined_in_the_model():
    adapteds = [one(1), one(2, r=1)]
    combined = arithmetic.combine(adapteds, [0.5, 2], "cat")
    params = jax.tree.map(
        lambda b, d: jnp.asarray(b + d, b.dtype), PARAMS, weighted(adapteds, [0.5, 2])
    )
    close(flax_logits(combined), MODEL.apply({"params": params}, TOKENS))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_svd_is_the_closest_of_a_rank(rank):
    adapteds, weights = [one(1), one(2, lora_alpha=1), one(3)], [1.0, 2.0, -0.5]
    combined = arithmetic.combine(adapteds, weights, "svd", rank)
    for path in (("embed_tokens", "embedding"), ("up", "kernel")):
        found, whole = (d[path[0]][path[1]] for d in (delta(combined), weighted(adapteds, weights)))
        u, s, vh = np.linalg.svd(whole, full_matrices=False)
        np.testing.assert_allclose(found, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5)
    assert combined.plan.config.r == rank


def test_svd_keeps_the_largest_rank_by_default_and_fills_up():
    adapteds = [one(1), one(2, r=3)]
    assert arithmetic.combine(adapteds, [1, 1]).plan.config.r == 3
    full = arithmetic.combine(adapteds[:1], [2.0], "svd", 6)
    assert full.adapters["lora"][UP]["lora_a"].shape == (8, 6)
    close(delta(full), weighted(adapteds[:1], [2.0]))
    assert not np.any(full.adapters["lora"][UP]["lora_b"][2:])


def test_linear_adds_up_factors():
    adapteds, weights = [one(1), one(2, lora_alpha=8)], [0.5, -2.0]
    combined = arithmetic.combine(adapteds, weights, "linear")
    for key in (TABLE, UP):
        scales = [w * float(a.scaling[key]) for a, w in zip(adapteds, weights, strict=True)]
        pairs = [a.adapters["lora"][key] for a in adapteds]
        for name, signs in (("lora_a", (1, -1)), ("lora_b", (1, 1))):
            expected = sum(
                sign * abs(s) ** 0.5 * np.asarray(p[name], np.float64)
                for sign, s, p in zip(signs, scales, pairs, strict=True)
            )
            close(np.asarray(combined.adapters["lora"][key][name], np.float64), expected)
    assert combined.plan.config.r == 2
    says_what_it_is(combined)
    # Of a single adapter there are no cross terms.
    alone = arithmetic.combine(adapteds[:1], [-3.0], "linear")
    close(delta(alone), weighted(adapteds[:1], [-3.0]))


def test_ranks_of_groups_differ_and_the_config_says_so():
    adapteds = [
        one(1, rank_pattern={"up": 3}, alpha_pattern={"up": 6}, use_rslora=True),
        one(2),
    ]
    combined = arithmetic.combine(adapteds, [1.0, 0.25], "cat")
    assert {a.key: a.rank for _, a in combined.plan.adapters()} == {TABLE: 4, UP: 5}
    close(delta(combined), weighted(adapteds, [1.0, 0.25]))
    assert not combined.plan.config.use_rslora
    says_what_it_is(combined)


def test_ranks_of_many_layers():
    params = {f"layers_{i}": {"up": {"kernel": jnp.ones((9, 9))}} for i in range(12)}
    params["up"] = {"kernel": jnp.ones((9, 9))}
    first = one(1, ["up"], params, rank_pattern={"layers_1/up": 1, r"layers_\d+/up": 3})
    second = one(2, ["layers_1/up", "layers_2/up"], params)
    combined = arithmetic.combine([first, second], [1, 1], "cat")
    ranks = {a.key: a.rank for _, a in combined.plan.adapters()}
    assert [ranks[f"layers_{i}/up/kernel"] for i in range(4)] == [3, 3, 5, 3]
    assert ranks["up/kernel"] == 2
    for _, adapter in combined.plan.adapters():
        assert combined.plan.config.rank_for(adapter.module) == adapter.rank
        assert combined.plan.config.scaling_for(adapter.module) == 1
    shapes = lambda a: jax.tree.map(jnp.shape, a.adapters)  # noqa: E731
    assert shapes(rewrapped(combined)) == shapes(combined)


def test_adapters_of_different_targets():
    adapteds = [one(1, ["up"]), one(2, ["embed_tokens"])]
    for how in ("linear", "cat", "svd"):
        combined = arithmetic.combine(adapteds, [2.0, 3.0], how)
        assert combined.plan.config.target_modules == ("up", "embed_tokens")
        close(delta(combined), weighted(adapteds, [2.0, 3.0]))
        assert [g.key for g in combined.plan.adapted] == [
            g.key for g in rewrapped(combined).plan.adapted
        ]
    regexes = [one(1, ".*up"), one(2, "embed.*")]
    combined = arithmetic.combine(regexes, [1, 1], "cat")
    assert combined.plan.config.target_modules == "(.*up)|(embed.*)"
    assert set(combined.adapters["lora"]) == {TABLE, UP}
    says_what_it_is(combined)


def test_a_tie_that_only_one_adapts_stays():
    adapteds = [one(1, ["up"], TIED, ties=TIES), one(2, ["embed_tokens"], TIED, ties=TIES)]
    combined = arithmetic.combine(adapteds, [1.0, 1.0], "cat")
    merged = tied_lora.merge(combined)
    np.testing.assert_array_equal(merged["tail"]["kernel"].T, merged["embed_tokens"]["embedding"])
    close(delta(combined), weighted(adapteds, [1.0, 1.0]))


def test_separate_adapters():
    adapteds = [separate(1), separate(2)]
    keys = set(adapteds[0].adapters["lora"])
    assert len(keys) == 2
    assert f"{TABLE}:lm_head" in keys
    combined = arithmetic.combine(adapteds, [0.5, -1.0], "cat")
    assert set(combined.adapters["lora"]) == keys
    untied = {"lm_head": "lm_head/kernel"}
    merged, *rest = (tied_lora.merge(a, untie=untied) for a in (combined, *adapteds))
    for path, base in ((("embed_tokens", "embedding"), W), (("lm_head", "kernel"), W.T)):
        found, first, second = (np.asarray(m[path[0]][path[1]] - base) for m in (merged, *rest))
        close(found, 0.5 * first - second)
    for name in ("embed_tokens", "lm_head"):
        silent = arithmetic.scale(combined, {name: 0.0})
        assert {k for k, v in silent.scaling.items() if not v} == {f"{TABLE}:{name}"}


def test_dtypes_and_boxes_are_the_first_ones():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.normal(), ("in", None))
            return nn.Dense(6, kernel_init=kernel, name="up")(x)

    params = Boxed().init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    adapteds = [tied_lora.wrap(params, LoraConfig(r=1, target_modules=["up"])) for _ in range(2)]
    adapteds = [a.replace(adapters=jax.tree.map(lambda x: x + 1, a.adapters)) for a in adapteds]
    for how in ("linear", "cat", "svd"):
        pair = arithmetic.combine(adapteds, [1, 1], how).adapters["lora"][UP]
        assert pair["lora_a"].names == ("in", None)
    assert arithmetic.padded(adapteds[0], 3).adapters["lora"][UP]["lora_a"].value.shape == (4, 3)
    half = one().replace(adapters=jax.tree.map(lambda x: x.astype(jnp.bfloat16), one().adapters))
    assert (
        arithmetic.combine([half], [1.0], "svd").adapters["lora"][UP]["lora_a"].dtype == "bfloat16"
    )


def test_combine_under_jit_with_traced_weights():
    adapteds = [one(1), one(2)]
    for how in ("linear", "cat", "svd"):
        mix = jax.jit(lambda w, how=how: arithmetic.combine(adapteds, [w[0], w[1]], how))
        weights = jnp.asarray([0.5, -2.0])
        close(delta(mix(weights)), delta(arithmetic.combine(adapteds, [0.5, -2.0], how)))
    assert arithmetic.combine(adapteds, np.asarray([1.0, 2.0])).plan.config.r == 2

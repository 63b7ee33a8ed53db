"""arithmetic.extract: adapters from the difference of two checkpoints."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig, arithmetic
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init, randomised, wrapped

TABLE, UP = "embed_tokens/embedding", "up/kernel"
PARAMS = init(TiedLM())
BOTH = ["embed_tokens", "up"]
W = PARAMS["embed_tokens"]["embedding"]
TIED = {**PARAMS, "head": {"kernel": W}, "tail": {"kernel": W.T}}
TIES = [(TABLE, "tail/kernel")]
STACKED = init(StackedLM())
SITES = tied_lora.trace(StackedLM().apply, {"params": STACKED}, TOKENS)
TIED_SITES = tied_lora.trace(TiedLM().apply, {"params": PARAMS}, TOKENS)
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-5)


def config(*targets, **options):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(targets), **options})


def changed(params, **leaves):
    """Params in which module "x" has the entries given, others as they were."""
    return {**params, **{m: {**params.get(m, {}), **new} for m, new in leaves.items()}}


@pytest.mark.parametrize(
    ("params", "options", "targets"),
    [
        (PARAMS, {}, BOTH),
        (TIED, {"ties": TIES}, BOTH),
        (STACKED, {"sites": SITES}, ["embed_tokens", "q_proj", "o_proj"]),
    ],
    ids=["one leaf", "tied leaves", "heads and layers"],
)
def test_what_was_merged_is_found_again(params, options, targets):
    adapted = wrapped(params, targets, use_rslora=True, **options)
    merged = tied_lora.merge(adapted)
    found, errors = arithmetic.extract(params, merged, adapted.plan.config, **options)
    assert found.plan is adapted.plan
    chex.assert_trees_all_equal_shapes_and_dtypes(found, adapted)
    close(tied_lora.merge(found), merged)
    assert set(errors) == set(adapted.adapters["lora"])
    assert max(errors.values()) < 1e-5
    chex.assert_trees_all_equal(tied_lora.base(found), params)


def test_a_tied_group_gets_one_pair():
    merged = tied_lora.merge(wrapped(TIED, BOTH, ties=TIES))
    found, _ = arithmetic.extract(TIED, merged, config(*BOTH), ties=TIES)
    assert set(found.adapters["lora"]) == {TABLE, UP}
    again = tied_lora.merge(found)
    np.testing.assert_array_equal(again["tail"]["kernel"].T, again["embed_tokens"]["embedding"])
    # Equal copies are a tie kept, too: a checkpoint that was read back has no aliases.
    copies = jax.tree.map(lambda x: jnp.asarray(np.array(x)), merged)
    close(
        arithmetic.extract(TIED, copies, config(*BOTH), ties=TIES).adapted.adapters, found.adapters
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_the_closest_of_a_rank_and_the_error_left(rank):
    tuned = changed(PARAMS, up={"kernel": randomised(PARAMS, 7)["up"]["kernel"]})
    found, errors = arithmetic.extract(PARAMS, tuned, config("up", r=rank))
    whole = np.asarray(tuned["up"]["kernel"], np.float64) - np.asarray(PARAMS["up"]["kernel"])
    u, s, vh = np.linalg.svd(whole)
    got = np.asarray(tied_lora.merge(found)["up"]["kernel"]) - np.asarray(PARAMS["up"]["kernel"])
    np.testing.assert_allclose(got, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-5)
    left = np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
    assert errors == {UP: pytest.approx(left, rel=1e-5)}
    # Half of the singular values in either factor: the extracted adapter trains evenly.
    pair = found.adapters["lora"][UP]
    norms = [np.linalg.norm(pair["lora_a"], axis=0), np.linalg.norm(pair["lora_b"], axis=1)]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_batch_axes_are_taken_one_by_one():
    tuned = randomised(STACKED, 7)
    with pytest.warns(arithmetic.LeftOutWarning):
        found, errors = arithmetic.extract(STACKED, tuned, config("q_proj"), sites=SITES)
    path = "layers/layer/q_proj/kernel"
    before, after, got = (
        np.asarray(p["layers"]["layer"]["q_proj"]["kernel"]).reshape(3, 8, 8)
        for p in (STACKED, tuned, tied_lora.merge(found))
    )
    u, s, vh = np.linalg.svd(after - before)
    expected = np.einsum("lik,lk,lkj->lij", u[..., :2], s[:, :2], vh[:, :2])
    np.testing.assert_allclose(got - before, expected, atol=1e-5)
    assert errors[path] == pytest.approx(np.sqrt(np.sum(s[:, 2:] ** 2) / np.sum(s**2)), rel=1e-5)


def test_nothing_changed():
    found, errors = arithmetic.extract(PARAMS, PARAMS, config(*BOTH))
    assert errors == {TABLE: 0.0, UP: 0.0}
    chex.assert_trees_all_equal(tied_lora.merge(found), PARAMS)


# What is no pair of factors


def test_copies_rows_and_biases_are_taken_as_they_are():
    tuned = randomised(PARAMS, 7)
    with pytest.warns(arithmetic.LeftOutWarning, match=r"left out: 'up/kernel' \(by"):
        found, errors = arithmetic.extract(
            PARAMS, tuned, config(target_modules=[], modules_to_save=["embed_tokens"], bias="all")
        )
    merged = tied_lora.merge(found)
    np.testing.assert_array_equal(
        merged["embed_tokens"]["embedding"], tuned["embed_tokens"]["embedding"]
    )
    np.testing.assert_array_equal(merged["up"]["bias"], tuned["up"]["bias"])
    assert errors == {TABLE: 0.0, "up/bias": 0.0}


def test_rows():
    tuned = changed(PARAMS, embed_tokens={"embedding": W.at[jnp.asarray([3, 5])].add(1.0)})
    both = config(target_modules=[], trainable_token_indices=[5, 3])
    found, errors = arithmetic.extract(PARAMS, tuned, both)
    close(tied_lora.merge(found), tuned)
    assert errors == {TABLE: 0.0}
    one = config(target_modules=[], trainable_token_indices=[5])
    with pytest.warns(arithmetic.LeftOutWarning, match=f"'{TABLE}' outside its trainable tokens"):
        found, errors = arithmetic.extract(PARAMS, tuned, one)
    assert errors == {TABLE: pytest.approx(0.5**0.5)}
    close(tied_lora.merge(found)["embed_tokens"]["embedding"], W.at[5].add(1.0))


def test_rows_beside_factors_on_one_table():
    adapted = wrapped(PARAMS, ["embed_tokens"], trainable_token_indices=[2, 7])
    merged = tied_lora.merge(adapted)
    found, errors = arithmetic.extract(PARAMS, merged, adapted.plan.config)
    # The rows take all of their change, so that the factors' rank is spent on the others.
    assert errors[TABLE] < 1e-5
    close(tied_lora.merge(found), merged)


def test_leaves_apart():
    """Separate adapters of two leaves: the tuned members differ, and each has its own pair."""
    options = {"ties": TIES[:1], "sites": TIED_SITES}
    params = {**PARAMS, "tail": {"kernel": W.T}}
    apart = config("embed_tokens", "tail", ensure_weight_tying=False, r=3)
    tuned = changed(params, tail={"kernel": W.T + jnp.ones((8, 12))})
    sites = tied_lora.trace(
        lambda p, t: (p["embed_tokens"]["embedding"][t] @ p["up"]["kernel"]) @ p["tail"]["kernel"],
        params, TOKENS,
    )  # fmt: skip
    options["sites"] = sites
    with pytest.warns(tied_lora.WeightTyingWarning):
        found, errors = arithmetic.extract(params, tuned, apart, **options)
    assert set(errors) == {f"{TABLE}:embed_tokens", f"{TABLE}:tail"}
    assert errors[f"{TABLE}:embed_tokens"] == 0.0
    assert errors[f"{TABLE}:tail"] < 1e-5
    untie = {"tail": "tail/kernel"}
    close(tied_lora.merge(found, untie=untie), tuned)


def test_what_is_not_targeted_is_named():
    tuned = changed(PARAMS, up={"bias": PARAMS["up"]["bias"] + 1})
    with pytest.warns(
        arithmetic.LeftOutWarning, match=r"not targeted.*left out: 'up/bias' \(by \d"
    ):
        arithmetic.extract(PARAMS, tuned, config("up"))
    many = {f"layer_{i}": {"up": {"kernel": jnp.ones((4, 4))}} for i in range(8)}
    more = jax.tree.map(lambda x: 2 * x, many)
    with pytest.warns(arithmetic.LeftOutWarning, match=r"\(by 1e\+02 %\), and 2 more"):
        arithmetic.extract(many, more, config("layer_0/up"))
    counted = {**PARAMS, "count": jnp.arange(4)}
    with pytest.warns(arithmetic.LeftOutWarning, match=r"'count' \(by 1e\+02 %\)"):
        arithmetic.extract(counted, {**counted, "count": jnp.arange(4) + 1}, config("up"))
    # A tied member that nobody targets counts as well as any leaf.
    twice = {**jax.tree.map(lambda x: 2 * x, TIED), "up": TIED["up"]}
    with pytest.warns(arithmetic.LeftOutWarning, match="'embed_tokens/embedding'"):
        arithmetic.extract(TIED, twice, config("up"), ties=TIES)


def test_dtypes_and_boxes():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.normal(), ("in", None))
            return nn.Dense(6, kernel_init=kernel, use_bias=False, name="up")(x)

    params = Boxed().init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    tuned = jax.tree.map(lambda x: x + 1, params)
    found, errors = arithmetic.extract(params, tuned, config("up", r=1))
    assert found.adapters["lora"][UP]["lora_a"].names == ("in", None)
    assert errors[UP] < 1e-5
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    merged = tied_lora.merge(wrapped(half, BOTH), dtype=jnp.float32)
    found, errors = arithmetic.extract(half, merged, config(*BOTH))
    assert found.adapters["lora"][UP]["lora_a"].dtype == jnp.float32
    assert max(errors.values()) < 1e-5


# Errors

APART = jax.tree.map(lambda x: x, TIED)
APART["tail"] = {"kernel": W.T.at[0, 0].add(0.5)}
ERRORS = {
    "members differ": (
        (TIED, APART, config("embed_tokens")), {"ties": TIES}, ValueError,
        f"'{TABLE}' and 'tail/kernel' are tied in the base .*declared.*differ by up to 0.5",
    ),
    "members of an untargeted tie differ": (
        (TIED, APART, config("up")), {"ties": TIES}, ValueError,
        f"'{TABLE}' and 'tail/kernel' are tied",
    ),
    "leaf missing": (
        (TIED, PARAMS, config("up")), {}, ValueError, "missing 'head/kernel', 'tail/kernel'"
    ),
    "leaf unknown": ((PARAMS, TIED, config("up")), {}, ValueError, "unknown 'head/kernel'"),
    "other shape": (
        (PARAMS, changed(PARAMS, up={"kernel": jnp.ones((8, 9))}), config("up")), {}, ValueError,
        r"'up/kernel' is float32\[8, 9\] in tuned_params, and float32\[8, 8\] in base_params",
    ),
    "wrapped": (
        (PARAMS, wrapped(PARAMS, ["up"]), config("up")), {}, TypeError, "tuned_params is an Adapted"
    ),
    "params of an adapted": (
        (TIED, wrapped(TIED, ["up"], ties=TIES).params, config("up")), {"ties": TIES}, TypeError,
        "'head/kernel' in tuned_params is a marker",
    ),
    "abstract": (
        (PARAMS, jax.eval_shape(lambda: PARAMS), config("up")), {}, TypeError,
        "in tuned_params is abstract",
    ),
    "no config": ((PARAMS, PARAMS, {"r": 2}), {}, TypeError, "config is a dict"),
    "dora": ((PARAMS, PARAMS, config("up", use_dora=True)), {}, ValueError, "use_dora"),
    "pissa": (
        (PARAMS, PARAMS, config("up", init_lora_weights="pissa")), {}, ValueError, "'pissa' starts"
    ),
    "rank too large": (
        (PARAMS, PARAMS, config("up", r=9)), {}, ValueError, "rank 9 for 'up/kernel'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    arguments, options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        arithmetic.extract(*arguments, **options)


def test_call_sites_of_one_leaf_cannot_be_told_apart():
    apart = config("embed_tokens", "lm_head", ensure_weight_tying=False)
    with (
        pytest.warns(tied_lora.WeightTyingWarning),
        pytest.raises(ValueError, match=f"'{TABLE}:embed_tokens' is for some call sites"),
    ):
        arithmetic.extract(PARAMS, PARAMS, apart, sites=TIED_SITES)


def test_traced_values_are_refused():
    run = jax.jit(lambda tuned: arithmetic.extract(PARAMS, tuned, config("up")).adapted)
    with pytest.raises(TypeError, match="is traced; extract reads the values"):
        run(PARAMS)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharded(kind):
    """Factors stay placed like their leaf, and the two checkpoints need not be."""
    mesh = jax.make_mesh((2, 2), ("d", "e"), (kind, kind))
    there = jax.NamedSharding(mesh, jax.P("d", "e"))
    kernel = jax.device_put(PARAMS["up"]["kernel"], there)
    params = changed(PARAMS, up={"kernel": kernel})
    tuned = jax.device_put(changed(PARAMS, up={"kernel": PARAMS["up"]["kernel"] + 1}))
    tuned = jax.device_put(tuned, jax.devices()[5])
    found, errors = arithmetic.extract(params, tuned, config(*BOTH))
    assert errors == {TABLE: 0.0, UP: pytest.approx(0, abs=1e-5)}
    close(np.asarray(tied_lora.merge(found)["up"]["kernel"]), tuned["up"]["kernel"])
    twice = [arithmetic.combine([found, found], [1, 1], how) for how in ("linear", "cat", "svd")]
    for each in (found, *twice, arithmetic.padded(found, 3)):
        pair = each.adapters["lora"][UP]
        assert pair["lora_a"].sharding.spec == jax.P("d", None)
        assert pair["lora_b"].sharding.spec == jax.P(None, "e")

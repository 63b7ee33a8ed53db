"""Parts of fused leaves: adapters of their own, in everything that adapters go through."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig, arithmetic, checkpoint
from tests.helpers.oracle import array, check, numbers, perturbed

PARAMS = {"qkv": {"kernel": array(8, 12, seed=1)}, "moe": {"kernel": array(3, 8, 6, seed=2)}}
X = array(4, 8, seed=3)
QKV = {"qkv": (-1, {"q": 6, "k": 4, "v": 2})}


def fn(params, x):
    q, k, v = jnp.split(x @ params["qkv"]["kernel"], [6, 10], axis=-1)
    return q, k * 2.0, jnp.tanh(v), x @ params["moe"]["kernel"][1]


@functools.cache
def sites():
    return tied_lora.trace(fn, PARAMS, X)


def wrapped(targets=("qkv:q", "qkv:v"), *, random=True, **fields):
    fields = {"r": 2, "lora_alpha": 3, "parts": QKV, **fields}
    adapted = tied_lora.wrap(
        PARAMS, LoraConfig(target_modules=list(targets), **fields), sites=sites()
    )
    return perturbed(adapted) if random else adapted


def keys(adapted):
    return [a.key for _, a in adapted.plan.adapters()]


def own_matrices(adapted, names):
    """Returns what each part's own pair adds to its columns, as separate modules would have it."""
    spans = {"q": (0, 6), "k": (6, 10), "v": (10, 12)}
    whole = np.zeros((8, 12), np.float32)
    for name in names:
        key = f"qkv/kernel:{name}"
        pair = adapted.adapters["lora"][key]
        start, stop = spans[name]
        delta = np.asarray(pair["lora_a"]) @ np.asarray(pair["lora_b"])
        whole[:, start:stop] = float(adapted.scaling[key]) * delta
    return whole


@pytest.mark.parametrize(("targets", "fields", "parts"), [
    (["qkv"], {}, "qkv"),
    (["qkv/kernel"], {}, "qkv"),
    (["qkv:q", "qkv:v"], {}, "qv"),
    (["qkv"], {"exclude_modules": ["qkv:k"]}, "qv"),
    (["qkv/kernel:k"], {}, "k"),
    ([r"qkv:[kv]"], {}, None),
    (["qkv", "qkv:q"], {}, "qkv"),
])  # fmt: skip
def test_which_parts(targets, fields, parts):
    if parts is None:  # a regex
        config = LoraConfig(r=1, target_modules=targets[0], parts=QKV)
        assert keys(tied_lora.wrap(PARAMS, config)) == ["qkv/kernel:k", "qkv/kernel:v"]
        return
    assert keys(wrapped(targets, random=False, **fields)) == [f"qkv/kernel:{p}" for p in parts]


def test_a_part_of_a_parameter():
    config = LoraConfig(
        r=1, target_parameters=["moe.kernel:up"], axes={"moe": (1, 2)},
        parts={"moe/kernel": (2, ["gate", "up"])},
    )  # fmt: skip
    assert keys(tied_lora.wrap(PARAMS, config)) == ["moe/kernel:up"]


def test_each_has_its_rank_and_alpha_and_the_modules_where_it_has_none():
    adapted = wrapped(
        ["qkv"], rank_pattern={"qkv:v": 1, "qkv": 3}, alpha_pattern={"qkv:q": 9}, random=False
    )
    ranks = {a.name: (a.rank, float(adapted.scaling[a.key])) for _, a in adapted.plan.adapters()}
    assert ranks == {"q": (3, 3.0), "k": (3, 1.0), "v": (1, 3.0)}
    assert "LoRA, rank 1 (v only)" in str(adapted)
    assert f"trainable: {3 * 14 + 3 * 12 + 10}" in str(adapted)


def test_low_rank_and_as_separate_modules():
    adapted = wrapped(rank_pattern={"qkv:v": 1}, alpha_pattern={"qkv:v": 5})
    [read] = [r for r in check(fn, adapted, X).reads if r.served == "low rank"]
    assert (read.site.leaf, read.groups) == ("qkv/kernel", ("qkv/kernel",))
    tied_lora.explain(fn, adapted, X).assert_tied()
    change = tied_lora.merge(adapted)["qkv"]["kernel"] - PARAMS["qkv"]["kernel"]
    np.testing.assert_allclose(change, own_matrices(adapted, "qv"), atol=1e-5)
    assert not np.any(change[:, 6:10])  # k stays as it is


@pytest.mark.parametrize(("part", "axis", "names"), [
    ("batch", 0, ["a", "b", "c"]), ("rows", 1, {"a": 3, "b": 5}), ("columns", 2, ["a", "b"]),
])  # fmt: skip
def test_along_every_axis(part, axis, names):
    adapted = wrapped(["moe:a", "moe:b"], parts={"moe": (axis, names)})
    explained = check(lambda p, x: jnp.einsum("td,edf->etf", x, p["moe"]["kernel"]), adapted, X)
    assert {r.served for r in explained.reads} == {"low rank"}
    change = np.asarray(tied_lora.merge(adapted)["moe"]["kernel"] - PARAMS["moe"]["kernel"])
    assert np.any(change[2]) == (part != "batch")


def test_head_and_tail_of_a_tied_table():
    params = {"embed": {"embedding": array(12, 8)}, "head": {"kernel": array(8, 12)}}

    def fn(p, ids):
        x = p["embed"]["embedding"][ids]
        return x @ p["head"]["kernel"], x @ p["head"]["kernel"][:, :4]

    ties = [("embed/embedding", "head/kernel")]
    config = LoraConfig(
        r=2, target_modules=["embed"], parts={"embed": (0, {"common": 4, "rare": 8})},
        exclude_modules=["embed:rare"],
    )  # fmt: skip
    adapted = perturbed(tied_lora.wrap(params, config, ties=ties))
    assert keys(adapted) == ["embed/embedding:common"]
    assert {r.served for r in check(fn, adapted, numbers(5, below=12)).reads} == {"low rank"}


def test_training_with_dropout_stacking_and_a_checkpoint(tmp_path, standard_promotion):
    adapted = wrapped(random=False, lora_dropout=0.5)
    optimizer = optax.adam(1e-2)
    apply = tied_lora.adapt(fn, on_dense="error")

    def loss(adapted, x):
        return jnp.sum(jnp.stack([jnp.sum(jnp.square(y)) for y in apply(adapted, x)]))

    @jax.jit
    def step(adapted, state, key):
        value, grads = tied_lora.value_and_grad(loss)(adapted.train(key), X)
        updates, state = optimizer.update(grads, state)
        return adapted.replace(adapters=optax.apply_updates(adapted.adapters, updates)), value

    trained, _ = step(adapted, optimizer.init(adapted.adapters), jax.random.key(1))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), trained.adapters, adapted.adapters)
    assert all(own["lora_b"] for own in moved["lora"].values())
    masks = [
        float(loss(perturbed(adapted).train(jax.random.key(i)), X)) for i in (0, 0, 1)
    ]  # fmt: skip
    assert masks[0] == masks[1] != masks[2]

    checkpoint.save(tmp_path / "saved", trained)
    restored = checkpoint.restore(tmp_path / "saved", PARAMS).adapted
    assert restored.plan is trained.plan
    jax.tree.map(np.testing.assert_array_equal, restored.adapters, trained.adapters)

    stacked = tied_lora.stack([perturbed(trained, 1), perturbed(trained, 2)])
    both = jax.vmap(apply, (tied_lora.adapter_axes(stacked), None))(stacked.eval(), X)
    for i in range(2):
        alone = apply(perturbed(trained, i + 1).eval(), X)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-4), both, alone)


def test_the_plan_is_json():
    plan = wrapped(random=False).plan
    assert tied_lora.Plan.from_json(plan.to_json()) is plan


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_factors_that_start_from_their_part(how):
    adapted = wrapped(random=False, init_lora_weights=how)
    merged = tied_lora.merge(adapted)["qkv"]["kernel"]
    np.testing.assert_allclose(merged, PARAMS["qkv"]["kernel"], atol=1e-5)
    stored = adapted.params["qkv"]["kernel"] - PARAMS["qkv"]["kernel"]
    assert np.any(stored[:, :6]) == np.any(stored[:, 10:]) == (how != "orthogonal")
    assert not np.any(stored[:, 6:10])


def test_arithmetic():
    one, two = wrapped(), perturbed(wrapped(["qkv:q"]), 7)
    both = arithmetic.combine([one, two], [0.5, 2.0], how="cat")
    assert {a.name: a.rank for _, a in both.plan.adapters()} == {"q": 4, "v": 2}
    expected = 0.5 * own_matrices(one, "qv") + 2.0 * own_matrices(two, "q")
    change = tied_lora.merge(both)["qkv"]["kernel"] - PARAMS["qkv"]["kernel"]
    np.testing.assert_allclose(change, expected, atol=1e-4)
    with pytest.raises(ValueError, match="'qkv/kernel:q' is for a part of 'qkv/kernel'"):
        arithmetic.extract(PARAMS, PARAMS, one.plan.config)
    other = wrapped(["qkv:q"], parts={"qkv": (1, {"q": 8, "k": 4})})
    with pytest.raises(ValueError, match=r"parts of .qkv. is .* in one config and .* in another"):
        arithmetic.combine([one, other], [1.0, 1.0])


@pytest.mark.parametrize(("targets", "fields", "words"), [
    (["qkv:z"], {}, "names no leaf.*The parts of 'qkv/kernel' are 'q', 'k', 'v'"),
    (["moe:z"], {}, "names no leaf.*The parts of 'moe/kernel' are none"),
    (["qkv"], {"parts": {"qkv": (2, ["q"])}}, "which has no axis 2; expected 0 to 1"),
    (["qkv"], {"parts": {"qkv": (1, list("qabcd"))}}, "12 along axis 1 is not 5 times"),
    (["qkv"], {"parts": {"qkv": (1, {"q": 5})}}, "sizes add up to 5; expected 12"),
    (["qkv"], {"r": 3}, r"rank 3 for 'qkv/kernel:v' float32\[8, 2\], which has rank 2 at most"),
    (["qkv"], {"use_dora": True}, "use_dora scales all of 'qkv/kernel', and parts"),
])  # fmt: skip
def test_bad_parts(targets, fields, words):
    with pytest.raises(ValueError, match=f"wrap: .*{words}"):
        wrapped(targets, **fields)


def test_parts_of_separate_adapters_are_refused():
    params = {"embed": {"embedding": array(12, 8)}}

    def tied(p, ids):
        return p["embed"]["embedding"][ids] @ p["embed"]["embedding"].T

    config = LoraConfig(
        r=1, target_modules=["embed"], ensure_weight_tying=False,
        parts={"embed": (0, ["a", "b"])},
    )  # fmt: skip
    traced = tied_lora.trace(tied, params, jnp.array([1]))
    with (
        pytest.warns(tied_lora.WeightTyingWarning),
        pytest.raises(ValueError, match="in parts 'a', 'b', and ensure_weight_tying=False"),
    ):
        tied_lora.wrap(params, config, sites=traced)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parts_of_a_sharded_leaf(kind):
    """What is left of a sharded axis may be too little to shard: then it is replicated."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P(None, "x")))
    params = {"qkv": {"kernel": put(PARAMS["qkv"]["kernel"])}}
    adapted = tied_lora.wrap(params, LoraConfig(r=2, target_modules=["qkv"], parts=QKV))
    own = adapted.adapters["lora"]
    specs = {name: own[f"qkv/kernel:{name}"]["lora_b"].sharding.spec for name in "qkv"}
    assert specs == {"q": jax.P(None, None), "k": jax.P(None, "x"), "v": jax.P(None, None)}
    b = jax.tree.map(lambda x: x + 1.0, own["qkv/kernel:k"]["lora_b"])
    factors = {**own, "qkv/kernel:k": {**own["qkv/kernel:k"], "lora_b": b}}
    adapted = adapted.replace(adapters={"lora": factors})
    data = jax.device_put(X, jax.NamedSharding(mesh, jax.P()))
    out = jax.jit(tied_lora.adapt(lambda p, x: x @ p["qkv"]["kernel"]))(adapted, data)
    merged = jax.jit(tied_lora.merge)(adapted)["qkv"]["kernel"]
    np.testing.assert_allclose(out, X @ np.asarray(merged), atol=1e-4)
    assert np.any(np.asarray(merged)[:, 6:10] != PARAMS["qkv"]["kernel"][:, 6:10])

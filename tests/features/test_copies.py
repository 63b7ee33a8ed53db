"""Full copies (``modules_to_save``) and biases (``bias``): read in place of the frozen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.oracle import array, check
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init, wrapped

TABLE = "embed_tokens/embedding"
IDS = jnp.array([3, 0, 3, 11])
DTYPES = [jnp.float32, jnp.bfloat16]


def params_of(dtype=jnp.float32):
    """A table tied to a transposed kernel, two layers with biases, and a norm of one axis."""
    w = array(12, 8, seed=1, dtype=dtype)
    dense = {
        name: {
            "kernel": array(8, 8, seed=s, dtype=dtype),
            "bias": array(8, seed=s + 1, dtype=dtype),
        }
        for name, s in (("up", 2), ("down", 4))
    }
    return {
        "embed_tokens": {"embedding": w},
        "lm_head": {"kernel": w.T, "bias": array(12, seed=8, dtype=dtype)},
        "norm": {"scale": array(8, seed=6, dtype=dtype)}, **dense,
    }  # fmt: skip


def model(params, ids):
    x = params["embed_tokens"]["embedding"][ids]
    x = x * params["norm"]["scale"][None]
    for name in ("up", "down"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["lm_head"]["kernel"] + params["lm_head"]["bias"][None]


def adapted(targets=None, dtype=jnp.float32, **options):
    return wrapped(params_of(dtype), targets, ties=[(TABLE, "lm_head/kernel")], **options)


def shapes(tree):
    return jax.tree.map(lambda x: x.shape, tree)


# Copies


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["up"], {"up/bias": (8,), "up/kernel": (8, 8)}),
        (["norm"], {"norm/scale": (8,)}),
        (["up/bias"], {"up/bias": (8,)}),
        (["embed_tokens"], {TABLE: (12, 8)}),
        (["lm_head"], {TABLE: (12, 8), "lm_head/bias": (12,)}),
        (["embed_tokens", "lm_head"], {TABLE: (12, 8), "lm_head/bias": (12,)}),
    ],
)
def test_copies(modules, expected, dtype):
    own = adapted(dtype=dtype, modules_to_save=modules)
    assert own.adapters["lora"] == {}
    assert shapes(own.adapters["modules_to_save"]) == expected
    assert {x.dtype for x in jax.tree.leaves(own.adapters)} == {jnp.dtype(jnp.float32)}
    explained = check(model, own, IDS)
    read = {r.site.leaf: r.served for r in explained.reads}
    assert set(read.values()) == {"copy"}
    assert set(read) == {m.path for g in own.plan.adapted for m in g.members}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_is_what_merge_returns(dtype):
    own = adapted(dtype=dtype, modules_to_save=["embed_tokens", "norm"])
    merged, copies = tied_lora.merge(own), own.adapters["modules_to_save"]
    np.testing.assert_array_equal(merged["embed_tokens"]["embedding"], copies[TABLE].astype(dtype))
    np.testing.assert_array_equal(merged["lm_head"]["kernel"], copies[TABLE].T.astype(dtype))
    np.testing.assert_array_equal(merged["norm"]["scale"], copies["norm/scale"].astype(dtype))
    wide = tied_lora.merge(own, dtype=jnp.float32)
    np.testing.assert_array_equal(wide["embed_tokens"]["embedding"], copies[TABLE])


def test_with_lora_beside_it():
    explained = check(model, adapted(["up"], modules_to_save=["lm_head", "norm"]), IDS)
    assert {r.site.leaf.split("/")[0]: r.served for r in explained.reads} == {
        "embed_tokens": "copy", "norm": "copy", "up": "low rank", "lm_head": "copy"
    }  # fmt: skip


def test_a_copy_starts_as_the_leaf_and_is_never_the_leaf():
    params = params_of()
    config = tied_lora.LoraConfig(
        target_modules=["down"], modules_to_save=["up", "norm", "lm_head"], bias="all"
    )
    new = tied_lora.wrap(params, config, ties=[(TABLE, "lm_head/kernel")])
    frozen = {"up/kernel": params["up"]["kernel"], "up/bias": params["up"]["bias"],
              "norm/scale": params["norm"]["scale"], TABLE: params["embed_tokens"]["embedding"],
              "lm_head/bias": params["lm_head"]["bias"]}  # fmt: skip
    for key, copy in new.adapters["modules_to_save"].items():
        np.testing.assert_array_equal(copy, frozen[key])
        assert copy.unsafe_buffer_pointer() != frozen[key].unsafe_buffer_pointer()
    [(key, bias)] = new.adapters["bias"].items()
    assert key == "down/bias"
    assert bias.unsafe_buffer_pointer() != params["down"]["bias"].unsafe_buffer_pointer()
    np.testing.assert_array_equal(model(tied_lora.merge(new), IDS), model(params, IDS))


def test_adapters_may_be_donated():
    """Nothing that is trained shares a buffer with what is frozen."""
    config = tied_lora.LoraConfig(
        r=2, target_modules=["down"], modules_to_save=["embed_tokens", "norm"], bias="all"
    )
    own = tied_lora.wrap(params_of(), config, ties=[(TABLE, "lm_head/kernel")])
    before = jax.tree.map(np.asarray, own.params)

    def step(adapters, params, scaling, ids):
        def loss(adapters):
            whole = tied_lora.Adapted(params, adapters, scaling, None, own.plan)
            return jnp.mean(jnp.square(tied_lora.adapt(model)(whole, ids)))

        value, grads = jax.value_and_grad(loss)(adapters)
        return jax.tree.map(lambda x, g: x - 0.01 * g, adapters, grads), value

    step = jax.jit(step, donate_argnums=0)
    adapters, values = own.adapters, []
    for _ in range(3):
        adapters, value = step(adapters, own.params, own.scaling, IDS)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 3
    assert own.adapters["modules_to_save"][TABLE].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, own.params, before)


def test_a_copy_is_trained_and_the_frozen_leaf_is_not():
    own = adapted(modules_to_save=["norm"])
    grads = jax.grad(lambda a: jnp.sum(tied_lora.adapt(model)(a, IDS)), allow_int=True)(own)
    assert np.any(grads.adapters["modules_to_save"]["norm/scale"])
    assert not np.any(grads.params["norm"]["scale"])


def test_in_a_model_with_stacked_layers():
    model = StackedLM()
    own = wrapped(init(model), ["lm_head"], modules_to_save=["q_proj", "embed_tokens"])
    copies = own.adapters["modules_to_save"]
    assert "layers/layer/q_proj/bias" in copies
    explained = check(lambda p, t: model.apply({"params": p}, t), own, jnp.asarray(TOKENS))
    assert {r.served for r in explained.reads} == {"copy", "low rank"}


def test_integer_leaves_cannot_be_trained():
    params = {"mask": {"ids": jnp.arange(4)}, "up": {"kernel": jnp.ones((4, 4))}}
    config = tied_lora.LoraConfig(target_modules=["up"], modules_to_save=["mask"])
    with pytest.raises(ValueError, match=r"'mask' in modules_to_save means 'mask/ids' int32\[4\]"):
        tied_lora.wrap(params, config)


def test_a_copy_goes_before_factors():
    own = adapted(["up", "down"], modules_to_save=["up"])
    assert set(own.adapters["modules_to_save"]) == {"up/kernel", "up/bias"}
    assert set(own.adapters["lora"]) == {"down/kernel"}


# Biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", None), ("all", {"up/bias", "down/bias", "lm_head/bias"}), ("lora_only", {"up/bias"})],
)
def test_biases(bias, expected, dtype):
    own = adapted(["up", "embed_tokens"], dtype=dtype, bias=bias)
    assert set(own.adapters) == ({"lora", "bias"} if expected else {"lora"})
    assert set(own.adapters.get("bias", {})) == (expected or set())
    explained = check(model, own, IDS)
    read = {r.site.leaf: r.served for r in explained.reads}
    assert {leaf for leaf, how in read.items() if how == "copy"} == (expected or set())
    merged = tied_lora.merge(own)
    for key, value in own.adapters.get("bias", {}).items():
        np.testing.assert_array_equal(merged[key.split("/")[0]]["bias"], value.astype(dtype))


def test_biases_in_a_model():
    own = wrapped(init(TiedLM()), ["embed_tokens"], bias="all")
    assert list(own.adapters["bias"]) == ["up/bias"]
    check(lambda p, t: TiedLM().apply({"params": p}, t), own, jnp.asarray(TOKENS))

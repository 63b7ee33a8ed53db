"""DoRA: the magnitude, the norm that is never made of a dense sum, and its constant gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.algebra.test_rows_programs import arrays_in
from tests.helpers.compiling import as_shipped
from tests.helpers.oracle import array, check, numbers
from tests.helpers.small_models import TOKENS, StackedLM, TiedLM, init, wrapped
from tests.interpreter.rules.test_lookup import ROWS

DTYPES = [jnp.float32, jnp.bfloat16]
IDS = jnp.array([3, 0, 3, 7])
X = array(4, 6, seed=2)


def dora(params, targets, **options):
    return wrapped(params, targets, use_dora=True, **options)


def table_of(dtype=jnp.float32):
    return dora({"embed": {"embedding": array(8, 6, seed=1, dtype=dtype)}}, ["embed"])


def dense(w, adapters, scaling, rows):
    """DoRA's weight by its definition, the norm being a constant to differentiation."""
    a, b = adapters["lora_a"], adapters["lora_b"]
    whole = w + scaling * (a @ b)
    norm = lax.stop_gradient(jnp.sqrt(jnp.sum(whole**2, axis=rows, keepdims=True)))
    return adapters["lora_magnitude"][None] * whole / norm


def served(explained):
    return {r.served for r in explained.reads}


# Against the definition


@pytest.mark.parametrize("key", ["embed/embedding", "dense/kernel"])
@pytest.mark.filterwarnings("ignore::flax_tied_lora.FrozenGradientWarning")
def test_values_and_gradients_are_those_of_the_definition(key):
    module, name = key.split("/")
    own = dora({module: {name: array(8, 6, seed=1)}}, [module])

    def fn(params, x):
        w = params[module][name]
        return jnp.sin(w[IDS] + x) @ w.T if name == "embedding" else jnp.sin(w.T @ (w @ x.T))

    def ours(own, x):
        return jnp.sum(tied_lora.adapt(fn, on_dense="error")(own, x) ** 2)

    def theirs(own, x):
        w = dense(own.params[module][name], own.adapters["lora"][key], own.scaling[key], 0)
        return jnp.sum(fn({module: {name: w}}, x) ** 2)

    for got, want in zip(
        jax.tree.leaves(jax.value_and_grad(ours, argnums=(0, 1))(own, X)),
        jax.tree.leaves(jax.value_and_grad(theirs, argnums=(0, 1))(own, X)), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("key", ["embed/embedding", "dense/kernel"])
def test_merge_is_the_definition(key):
    module, name = key.split("/")
    own = dora({module: {name: array(8, 6, seed=1)}}, [module])
    want = dense(own.params[module][name], own.adapters["lora"][key], own.scaling[key], 0)
    np.testing.assert_allclose(tied_lora.merge(own)[module][name], want, rtol=1e-5, atol=1e-5)


def test_starts_as_the_weight_itself():
    params = init(TiedLM())
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens", "up"], use_dora=True)
    new = tied_lora.wrap(params, config)
    merged = tied_lora.merge(new)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), merged, params
    )
    magnitude = new.adapters["lora"]["up/kernel"]["lora_magnitude"]
    np.testing.assert_allclose(magnitude, np.linalg.norm(params["up"]["kernel"], axis=0), rtol=1e-6)


@pytest.mark.filterwarnings("ignore::flax_tied_lora.FrozenGradientWarning")
def test_a_column_of_zeros_stays_finite():
    params = {"dense": {"kernel": array(8, 6, seed=1).at[:, 2].set(0)}}
    config = tied_lora.LoraConfig(r=2, target_modules=["dense"], use_dora=True)
    new = tied_lora.wrap(params, config)
    np.testing.assert_allclose(
        tied_lora.merge(new)["dense"]["kernel"], params["dense"]["kernel"], rtol=1e-6, atol=1e-7
    )
    run = tied_lora.adapt(lambda p, x: x @ p["dense"]["kernel"])
    grads = jax.grad(lambda a: jnp.sum(run(a, array(3, 8)) ** 2))(new)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))


# At every way to read a weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["W[ids]", "negative ids", "transposed", "scaled", "some columns"])
def test_lookups(form, dtype):
    assert served(check(lambda p: ROWS[form](p["embed"]["embedding"]), table_of(dtype))) == {
        "low rank"
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_table(dtype):
    def fn(params, x):
        w = params["embed"]["embedding"]
        hot = jax.nn.one_hot(IDS, 8, dtype=w.dtype)
        return (w[IDS] + hot @ w + x) @ w.T, (2 * w[1:5]) @ x.T

    assert served(check(fn, table_of(dtype), X.astype(dtype))) == {"low rank"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_member(dtype):
    w = array(8, 6, seed=1, dtype=dtype)
    params = {"embed": {"embedding": w}, "head": {"kernel": w.T}}
    own = dora(params, ["embed"], ties=[("embed/embedding", "head/kernel")])

    def fn(params, x):
        return (params["embed"]["embedding"][IDS] + x) @ params["head"]["kernel"]

    assert served(check(fn, own, X.astype(dtype))) == {"low rank"}


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["embed_tokens", "lm_head"]])
def test_head_axes_and_stacked_layers(targets):
    model = StackedLM()
    params = init(model)

    def fn(params, tokens):
        return model.apply({"params": params}, tokens)

    sites = tied_lora.trace(fn, params, jnp.asarray(TOKENS))
    own = dora(params, targets, sites=sites)
    if "q_proj" in targets:
        magnitude = own.adapters["lora"]["layers/layer/q_proj/kernel"]["lora_magnitude"]
        assert magnitude.shape == (3, 2, 4)
    assert served(check(fn, own, jnp.asarray(TOKENS))) == {"low rank"}
    norms = np.linalg.norm(np.asarray(tied_lora.merge(own)["lm_head"]["kernel"]), axis=0)
    if "lm_head" in targets:
        want = np.abs(own.adapters["lora"]["lm_head/kernel"]["lora_magnitude"])
        np.testing.assert_allclose(norms, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype):
    params = {"experts": {"kernel": array(3, 6, 5, seed=1, dtype=dtype)}}

    def fn(params, x):
        return jnp.einsum("etd,edf->etf", x, params["experts"]["kernel"])

    x = array(3, 4, 6, seed=2, dtype=dtype)
    own = dora(params, ["experts"], sites=tied_lora.trace(fn, params, x))
    assert own.adapters["lora"]["experts/kernel"]["lora_magnitude"].shape == (3, 5)
    assert served(check(fn, own, x)) == {"low rank"}


@pytest.mark.parametrize(
    "program",
    [jax.jit, jax.checkpoint, lambda f: lambda w, x: jax.grad(lambda x: jnp.sum(f(w, x)))(x),
     lambda f: lambda w, x: lax.scan(lambda c, _: (c, f(w, c)), x, None, length=2)[1]],
    ids=["jit", "checkpoint", "gradient", "scan"],
)  # fmt: skip
def test_programs(program):
    def both(w, x):
        return jnp.tanh((w[IDS] + x) @ w.T)

    explained = check(lambda p, x: program(both)(p["embed"]["embedding"], x), table_of(), X)
    assert served(explained) == {"low rank"}


# What it costs


def test_the_norm_is_not_made_of_a_dense_sum():
    v, d = 4096, 32
    own = dora({"embed": {"embedding": array(v, d, seed=1)}}, ["embed"])
    ids = numbers(16, below=v, seed=5)

    def model(params, ids):
        return jax.nn.logsumexp(params["embed"]["embedding"][ids] @ params["embed"]["embedding"].T)

    def loss(adapters, params, ids):
        return tied_lora.adapt(model, on_dense="error")(
            own.replace(adapters=adapters, params=params), ids
        )

    fn = jax.value_and_grad(loss)
    made = arrays_in(jax.make_jaxpr(fn)(own.adapters, own.params, ids).jaxpr)
    tables = [a.shape for a in made if sorted(a.shape) == [d, v]]
    # The square of the frozen table, which is reduced on the spot, and views of the table.
    assert tables.count((v, d)) <= 3, tables
    temp = as_shipped(jax.jit(fn).lower(own.adapters, own.params, ids)).memory_analysis()
    plain = as_shipped(jax.jit(model).lower(own.params, ids)).memory_analysis()
    logits = 4 * 16 * v
    assert (
        temp.temp_size_in_bytes < plain.temp_size_in_bytes + 3 * logits + 64 * 1024 < 4 * v * d * 4
    )

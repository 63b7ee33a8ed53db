"""Data of another dtype than the weight's: factors meet it as the merged weight would."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from flax_tied_lora._algebra.factor import operation_dtype, promoted
from tests.helpers.oracle import array, wrapped

KINDS = ["lora", "dora", "rows", "copy", "quantized"]


def data(dtype, *shape, seed=7):
    x = array(*shape, seed=seed)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return lax.complex(x, array(*shape, seed=seed + 1)).astype(dtype)
    return (3 * x).astype(dtype)


def adapted(kind, leaf, dtype=jnp.float32):
    shape = (16, 32) if leaf == "kernel" else (64, 16)
    return wrapped({"module": {leaf: array(*shape, seed=1, dtype=dtype)}}, ["module"], kind=kind)


def product(w, x, axis=0):
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    kind = jnp.complex64 if is_complex else jnp.float32
    numbers = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, w, numbers, preferred_element_type=kind)


FORMS = {
    "kernel": lambda p, x: product(p["module"]["kernel"], x),
    "embedding": lambda p, x: product(p["module"]["embedding"], x, axis=1),
}


def close(found, expected, dtype):
    assert found.dtype == expected.dtype
    scale = float(np.abs(np.asarray(expected)).max())
    tolerance = 2e-5 if jnp.finfo(dtype).bits >= 32 else 3e-2
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance * scale
    )


@pytest.mark.parametrize("leaf", FORMS)
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.float16, jnp.bfloat16, jnp.int8], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_data_meets_factors_as_it_meets_the_merged_weight(kind, dtype, leaf):
    weights, x = adapted(kind, leaf), data(dtype, 3, 16)
    found = tied_lora.adapt(FORMS[leaf], on_dense="error")(weights, x)
    close(found, FORMS[leaf](tied_lora.merge(weights), x), jnp.float32)


@pytest.mark.parametrize("leaf", FORMS)
@pytest.mark.parametrize("kind", ["lora", "dora", "copy", "rows"])
@pytest.mark.parametrize(
    ("weight", "dtype"),
    [(jnp.bfloat16, jnp.float16), (jnp.float16, jnp.bfloat16), (jnp.bfloat16, jnp.complex64)],
)
def test_low_precision_beside_another(kind, weight, dtype, leaf):
    weights, x = adapted(kind, leaf, weight), data(dtype, 3, 16)
    found = tied_lora.adapt(FORMS[leaf], on_dense="error")(weights, x)
    close(found, FORMS[leaf](tied_lora.merge(weights), x), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_complex_gradients(kind):
    weights, x, form = adapted(kind, "kernel"), data(jnp.complex64, 3, 16), FORMS["kernel"]
    run = tied_lora.adapt(form, on_dense="error")

    def loss(run, adapters):
        return jnp.sum(jnp.abs(run(weights.replace(adapters=adapters), x)) ** 2)

    ours = jax.grad(lambda a: loss(run, a))(weights.adapters)
    theirs = jax.grad(lambda a: loss(lambda w, x: form(tied_lora.merge(w), x), a))(weights.adapters)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(b).max() + 1))


SCALED = {
    "kernel times complex columns": lambda w, z: w * z[None, :],
    "columns cut": lambda w, z: (w * z[None, :])[:, 2:5],
    "imaginary kernel": lambda w, z: z[None, :16] @ (w * jnp.complex64(1j)),
}


@pytest.mark.parametrize("fn", SCALED.values(), ids=SCALED.keys())
@pytest.mark.parametrize("kind", ["lora", "dora", "rows"])
def test_a_complex_scale(kind, fn, standard_promotion):
    weights, z = adapted(kind, "kernel"), data(jnp.complex64, 32)

    def of_params(params, z):
        return fn(params["module"]["kernel"], z)

    found = tied_lora.adapt(of_params, on_dense="allow")(weights, z)
    close(found, of_params(tied_lora.merge(weights), z), jnp.float32)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.bfloat16, jnp.float32),
        (jnp.complex64, jnp.bfloat16, jnp.complex64),
        (jnp.complex64, jnp.float64, jnp.complex128),
        (jnp.float8_e4m3fn, jnp.bfloat16, jnp.bfloat16),
        (jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32),
        (jnp.float8_e4m3fn, jnp.float8_e4m3fn, jnp.float8_e4m3fn),
    ],
)
def test_promotion(first, second, expected):
    assert promoted(first, second) == promoted(second, first) == expected


@pytest.mark.parametrize("data", [jnp.int8, jnp.int32, jnp.bool_])
def test_integers_take_the_weights_dtype(data):
    assert operation_dtype(data, jnp.bfloat16) == jnp.bfloat16

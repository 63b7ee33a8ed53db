"""Initial factors that read the weight, and orthogonal ones: what they are, without PEFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_tied_lora._adapters.init_from_weight import from_weight, orthogonal
from flax_tied_lora._config.checks import reads_weight

HOWS = ("pissa", "pissa_niter_4", "olora")
SHAPES = ((12, 7), (7, 12), (9, 9))
KEY = jax.random.key(0)
RANK, SCALING = 3, 1.5


def matrix(shape=(12, 7), dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def singular_values(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", HOWS)
def test_the_parts_add_up_to_the_weight(how, shape):
    weight = matrix(shape)
    a, b, residual = from_weight(how, weight, RANK, SCALING, KEY)
    assert (a.shape, b.shape, residual.shape) == ((shape[0], RANK), (RANK, shape[1]), shape)
    assert a.dtype == b.dtype == residual.dtype == jnp.float32
    np.testing.assert_allclose(SCALING * (a @ b) + residual, weight, atol=2e-6)
    assert np.linalg.matrix_rank(np.asarray(a @ b)) == RANK
    assert np.linalg.norm(residual) < 0.95 * np.linalg.norm(weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_40"])
def test_pissa_takes_the_largest_singular_values(how, shape):
    weight = matrix(shape)
    a, b, residual = from_weight(how, weight, RANK, SCALING, KEY)
    expected = singular_values(weight)
    np.testing.assert_allclose(SCALING * singular_values(a @ b)[:RANK], expected[:RANK], rtol=1e-4)
    rest = singular_values(residual)[: len(expected) - RANK]
    np.testing.assert_allclose(rest, expected[RANK:], rtol=1e-4)
    # Both factors have the same half of each singular value.
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-4)


def test_more_iterations_come_closer():
    weight = matrix((60, 50))
    best = singular_values(weight)[RANK:]
    norms = [
        np.linalg.norm(from_weight(f"pissa_niter_{k}", weight, RANK, SCALING, KEY)[2])
        for k in (0, 1, 8, 40)
    ]
    assert norms[0] > norms[1] > norms[2] > norms[3] >= 0.999999 * np.linalg.norm(best)
    assert norms[3] == pytest.approx(np.linalg.norm(best), rel=1e-3)


def test_only_the_randomised_one_draws_from_the_key():
    weight, other = matrix((60, 50)), jax.random.key(1)
    for how in ("pissa", "olora"):
        first, second = (from_weight(how, weight, RANK, SCALING, k) for k in (KEY, None))
        assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
    first, second = (from_weight("pissa_niter_1", weight, RANK, SCALING, k) for k in (KEY, other))
    assert np.abs(first[2] - second[2]).max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_beginning_of_a_qr_decomposition(shape):
    weight = matrix(shape)
    a, b, _ = from_weight("olora", weight, RANK, SCALING, KEY)
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-6)
    q, r = np.linalg.qr(weight.T)
    np.testing.assert_allclose(a @ b, (q[:, :RANK] @ r[:RANK]).T, atol=1e-5)
    np.testing.assert_array_equal(np.triu(a, 1), np.zeros_like(a))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("how", HOWS)
def test_small_floats_are_decomposed_in_float32(how, dtype):
    weight = jnp.asarray(matrix(), dtype)
    a, b, residual = from_weight(how, weight, RANK, SCALING, KEY)
    assert (a.dtype, b.dtype, residual.dtype) == (jnp.float32, jnp.float32, dtype)
    wide = from_weight(how, weight.astype(jnp.float32), RANK, SCALING, KEY)
    np.testing.assert_array_equal(a, wide[0])
    np.testing.assert_array_equal(b, wide[1])
    np.testing.assert_array_equal(residual, wide[2].astype(dtype))


@pytest.mark.parametrize("how", HOWS)
def test_under_jit_and_vmap_and_on_shapes(how):
    weights = np.stack([matrix(seed=i) for i in range(6)]).reshape(2, 3, 12, 7)
    keys = jax.random.split(KEY, (2, 3))
    scaling = jnp.float32(SCALING)

    def one(weight, key):
        return from_weight(how, weight, RANK, scaling, key)

    batched = jax.vmap(jax.vmap(one))
    shapes = jax.eval_shape(batched, weights, keys)
    assert [x.shape for x in shapes] == [(2, 3, 12, RANK), (2, 3, RANK, 7), (2, 3, 12, 7)]
    a, b, residual = jax.jit(batched)(weights, keys)
    for i, j in np.ndindex(2, 3):
        expected = one(weights[i, j], keys[i, j])
        np.testing.assert_allclose(a[i, j] @ b[i, j], expected[0] @ expected[1], atol=1e-5)
        np.testing.assert_allclose(residual[i, j], expected[2], atol=1e-5)


def test_sharded_weights():
    mesh = jax.make_mesh((4, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
    weight = matrix((16, 8))
    placed = jax.device_put(weight, jax.NamedSharding(mesh, jax.P("x", "y")))
    for how in HOWS:
        found = jax.jit(lambda w, k, how=how: from_weight(how, w, RANK, SCALING, k))(placed, KEY)
        expected = from_weight(how, weight, RANK, SCALING, KEY)
        np.testing.assert_allclose(found[0] @ found[1], expected[0] @ expected[1], atol=1e-5)
        np.testing.assert_allclose(found[2], expected[2], atol=1e-5)


def test_full_rank_leaves_what_the_scaling_leaves():
    for how in HOWS:
        residual = from_weight(how, matrix(), 7, SCALING, KEY)[2]
        # OLoRA's factors are of the weight itself, PiSSA's of the weight over the scaling.
        left = 1 - SCALING if how == "olora" else 0
        np.testing.assert_allclose(residual, left * matrix(), atol=1e-5)


def test_orthogonal_factors_have_no_product():
    a, b = orthogonal(KEY, 200, 120, 8)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((200, 8), (8, 120), jnp.float32, jnp.float32)
    assert np.abs(a @ b).max() < 1e-6
    # A standard normal mix of half the unit rows, over 10: every entry has variance 1/200.
    for x in (a, b):
        assert np.linalg.matrix_rank(np.asarray(x)) == 4
        assert np.std(x) == pytest.approx(np.sqrt(0.5) / 10, rel=0.15)
    other = orthogonal(jax.random.key(1), 200, 120, 8)
    assert np.abs(other[0] - a).max() > 1e-2
    shapes = jax.eval_shape(lambda k: orthogonal(k, 5, 6, 2), KEY)
    assert [x.shape for x in shapes] == [(5, 2), (2, 6)]


# What is refused


def test_names():
    for how in ("pissa", "pissa_niter_0", "pissa_niter_16", "olora", "OLoRA"):
        assert reads_weight(how)
    for how in (
        True, False, None, "gaussian", "orthogonal", "PiSSA", "pissa_", "pissa_niter_",
        "pissa_niter_-1", "pissa_niter_x", "pissa_niter_1_niter_2", "corda",
    ):  # fmt: skip
        assert not reads_weight(how)
        with pytest.raises(ValueError, match="expected 'pissa', 'pissa_niter_<number of it"):
            from_weight(how, matrix(), RANK, SCALING, KEY)  # pyright: ignore


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.complex64, jnp.float8_e4m3fn])
def test_other_dtypes_are_refused(how, dtype):
    name = np.dtype(dtype).name
    with pytest.raises(TypeError, match=f"'{how}': up/kernel is {name}; expected float32, fl"):
        from_weight(how, jnp.ones((4, 4), dtype), 2, SCALING, KEY, leaf="up/kernel")


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(TypeError, match="the weight is float64; expected"):
        from_weight("pissa", jnp.ones((4, 4), jnp.float64), 2, SCALING, KEY)


@pytest.mark.parametrize("how", HOWS)
def test_what_is_no_matrix_is_refused(how):
    for shape in ((4,), (2, 4, 4), ()):
        with pytest.raises(ValueError, match=r"the weight is \[.*\]; expected a matrix"):
            from_weight(how, jnp.ones(shape), 1, SCALING, KEY)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rank", [8, 0, -1])
def test_a_rank_that_the_weight_cannot_hold_is_refused(how, rank):
    message = rf"the weight \[12, 7\] gives factors of rank 1 to 7; found rank {rank}\. Change r"
    with pytest.raises(ValueError, match=message):
        from_weight(how, matrix(), rank, SCALING, KEY)


def test_an_odd_orthogonal_rank_is_refused():
    with pytest.raises(ValueError, match="'orthogonal': up/kernel has rank 3; expected an even"):
        orthogonal(KEY, 8, 8, 3, leaf="up/kernel")

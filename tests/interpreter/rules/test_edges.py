"""Places where a delta was once lost, applied wrongly, or refused for nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers.compiling import as_shipped

X = jax.random.normal(jax.random.key(1), (3, 8))
IDS = jnp.array([1, 5, 7])


def wrapped(dtype: Any = jnp.float32, **options: Any) -> tied_lora.Adapted:
    kernel = jax.random.normal(jax.random.key(0), (8, 4)).astype(dtype)
    config = tied_lora.LoraConfig(r=2, lora_alpha=4, target_modules=["dense"], **options)
    adapted = tied_lora.wrap({"dense": {"kernel": kernel}}, config)
    keys = iter(jax.random.split(jax.random.key(2), 2))
    return adapted.replace(
        adapters=jax.tree.map(
            lambda f: f + jax.random.normal(next(keys), f.shape), adapted.adapters
        )
    )


def check(use: Any, adapted: Any = None, **options: Any) -> None:
    """Compares values and gradients with those of the merged weight."""
    adapted = wrapped() if adapted is None else adapted

    def ours(adapters: Any) -> Any:
        found = tied_lora.adapt(lambda p: use(p["dense"]["kernel"]), **options)
        return found(adapted.replace(adapters=adapters))

    def merged(adapters: Any) -> Any:
        return use(tied_lora.merge(adapted.replace(adapters=adapters))["dense"]["kernel"])

    def gradient(f: Any) -> Any:
        return jax.grad(lambda adapters: jnp.sum(jnp.sin(f(adapters))))

    for function in (lambda f: f, gradient):
        left, right = (jax.tree.leaves(function(f)(adapted.adapters)) for f in (ours, merged))
        for a, b in zip(left, right, strict=True):
            assert jnp.abs(a - b).max() <= 2e-5 * jnp.abs(b).max()


def product(x: jax.Array) -> Any:
    def use(w: jax.Array) -> jax.Array:
        dims = (((1,), (0,)), ((), ()))
        return lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)

    return use


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bool_, jnp.bfloat16, jnp.float8_e4m3fn])
def test_data_of_another_dtype_leaves_the_delta_its_precision(dtype):
    check(product((3 * X).astype(dtype)), on_dense="error")


def test_data_of_another_dtype_in_grouped_products():
    sizes = jnp.array([2, 1])
    narrow = X.astype(jnp.bfloat16)

    def use(w: jax.Array) -> jax.Array:
        both = jnp.stack([w, 2 * w])
        return lax.ragged_dot(narrow, both, sizes, preferred_element_type=jnp.float32)

    check(use, on_dense="error")


def test_a_scale_is_applied_before_the_cast_to_float16():
    adapted = wrapped(jnp.float16)
    big = {"dense": {"kernel": jnp.full((8, 4), 600, jnp.float16)}}
    adapted = adapted.replace(params=big)
    x = jnp.full((3, 8), 30, jnp.float16)
    use = tied_lora.adapt(lambda p: x @ (p["dense"]["kernel"] * jnp.float16(1e-3)))
    merged = tied_lora.merge(adapted)["dense"]["kernel"]
    expected = x.astype(jnp.float32) @ (merged.astype(jnp.float32) * 1e-3)
    found = use(adapted)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=5e-3)


def test_a_small_divisor_does_not_overflow_in_float16():
    adapted = wrapped(jnp.float16)
    small = jax.tree.map(lambda x: x * jnp.asarray(1e-4, x.dtype), adapted.params)
    zero = jax.tree.map(jnp.zeros_like, adapted.adapters)
    use = tied_lora.adapt(
        lambda p: X.astype(jnp.float16) @ (p["dense"]["kernel"] / jnp.float16(1e-5))
    )
    assert jnp.all(jnp.isfinite(use(adapted.replace(params=small, adapters=zero))))


@pytest.mark.parametrize("kind", ["scan", "while"])
def test_a_loop_that_changes_its_weight_runs_once(kind):
    seen: list[int] = []

    def body(carry: Any) -> Any:
        w, x = carry
        jax.debug.callback(lambda: seen.append(1))
        return w * 0.9, x + (X @ w)

    def use(w: jax.Array) -> jax.Array:
        start = (w, jnp.zeros((3, 4)))
        if kind == "scan":
            return lax.scan(lambda c, _: (body(c), None), start, None, length=3)[0][1]
        return lax.fori_loop(0, 3, lambda _, c: body(c), start)[1]

    tied_lora.adapt(lambda p: use(p["dense"]["kernel"]), on_dense="allow")(wrapped())
    jax.effects_barrier()
    assert len(seen) == 3


@pytest.mark.parametrize("through", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_a_carry_handed_on_through_a_function_is_unchanged(through):
    body = through(lambda carry: (carry[0], jnp.tanh(carry[1] @ carry[0] @ carry[0].T)))

    def use(w: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (body(c), None), (w, X), None, length=3)[0][1]

    check(use, on_dense="error")


def test_a_scan_of_no_steps():
    def use(w: jax.Array) -> jax.Array:
        empty = w.reshape(2, 4, 4)[:0]
        return lax.scan(lambda x, k: (x @ k, None), X[:, :4], empty)[0]

    check(use, on_dense="allow")


def test_an_index_out_of_bounds_where_the_delta_is_constant():
    def use(w: jax.Array) -> jax.Array:
        many = jnp.broadcast_to(w[None], (3, 8, 4))
        return jnp.take(many, jnp.array([1, 5]), axis=0, mode="fill", fill_value=0)

    check(use, on_dense="allow")


def test_columns_cut_out_by_index_are_a_projection():
    """A fused kernel from which each use cuts its columns."""

    def model(params: Any, start: jax.Array) -> jax.Array:
        kernel = params["dense"]["kernel"]
        return X @ lax.dynamic_slice_in_dim(kernel, start, 2, axis=1)

    adapted = wrapped()
    sites = tied_lora.trace(model, tied_lora.base(adapted), jnp.int32(1))
    assert [(s.role, s.rows, s.cols) for s in sites] == [("projection", (0,), (1,))]
    found = tied_lora.explain(model, adapted, jnp.int32(1))
    assert [(r.site.role, r.served) for r in found.reads] == [("projection", "low rank")]
    check(lambda w: X @ lax.dynamic_slice_in_dim(w, jnp.int32(1), 2, axis=1), on_dense="error")


@pytest.mark.parametrize("transform", [jax.jvp, jax.linearize], ids=["jvp", "linearize"])
def test_dropout_in_a_forward_differentiated_function_is_refused(transform):
    def model(params: Any, x: jax.Array) -> Any:
        def f(x: jax.Array) -> jax.Array:
            return x @ params["dense"]["kernel"]

        return jax.jvp(f, (x,), (x,))[1] if transform is jax.jvp else jax.linearize(f, x)[1](x)

    adapted = wrapped(lora_dropout=0.5).train(jax.random.key(0))
    with pytest.raises(ValueError, match="'dense/kernel' is read in a function that was differen"):
        tied_lora.adapt(model)(adapted, X)
    tied_lora.adapt(model)(adapted.eval(), X)


def test_dropout_inside_shard_map_differs_where_the_data_does():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jnp.ones((4, 8))

    def model(params: Any, check_vma: bool) -> jax.Array:
        return jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(jax.P(), jax.P("x")), out_specs=jax.P("x"),
            check_vma=check_vma,
        )(params["dense"]["kernel"], rows)  # fmt: skip

    adapted = wrapped(lora_dropout=0.5).train(jax.random.key(0))
    found = np.asarray(jax.jit(lambda a: tied_lora.adapt(model)(a, True))(adapted))
    assert len({row.tobytes() for row in found}) > 1
    with pytest.raises(ValueError, match="shard_map with check_vma=False"):
        tied_lora.adapt(model)(adapted, False)
    plain = tied_lora.adapt(model)(adapted.eval(), False)
    np.testing.assert_allclose(plain, rows @ tied_lora.merge(adapted)["dense"]["kernel"], rtol=1e-5)


def test_objects_that_keep_state_reach_the_function_as_themselves():
    rngs = nnx.Rngs(0)
    found: list[Any] = []

    def model(params: Any, rngs: Any, batch: Any) -> jax.Array:
        found.extend([rngs, batch["rngs"]])
        return X @ params["dense"]["kernel"]

    tied_lora.adapt(model)(wrapped(), rngs, {"rngs": rngs})
    assert all(x is rngs for x in found)


def test_factors_of_another_shape_are_refused():
    adapted = wrapped()
    pair = adapted.adapters["lora"]["dense/kernel"]
    for name, bad in {"lora_a": jnp.ones((7, 2)), "lora_b": jnp.ones((3, 4))}.items():
        adapters = {"lora": {"dense/kernel": {**pair, name: bad}}}
        with pytest.raises(ValueError, match=rf"Adapted.replace: {name} of 'dense/kernel' is flo"):
            adapted.replace(adapters=adapters)


def test_a_custom_function_that_closes_over_something_gets_no_rule():
    def make(scale: float) -> Any:
        @jax.custom_vjp
        def scaled(x: jax.Array) -> jax.Array:
            return scale * x

        scaled.defvjp(lambda x: (scale * x, None), lambda _, g: (scale * g,))
        return scaled

    with pytest.raises(ValueError, match="'scaled' closes over scale; functions that differ"):
        tied_lora.register_rule(make(2.0), lambda *_: NotImplemented)


def test_rows_picked_from_stacked_kernels_compile():
    """XLA's CPU compiler aborts on this product's transposition if it may fold the two."""
    config = tied_lora.LoraConfig(r=2, target_modules=["dense"])
    kernel = jax.random.normal(jax.random.key(0), (3, 8, 4, 4))
    params = {"dense": {"kernel": kernel}}

    def product(params: Any) -> jax.Array:
        return jnp.einsum("nr,erlc->nelc", jnp.ones((2, 8)), params["dense"]["kernel"][:, :, :, :])

    def stacked(params: Any) -> jax.Array:
        return jnp.einsum("elnr,erlc->elnc", jnp.ones((3, 4, 2, 8)), params["dense"]["kernel"])

    def model(params: Any) -> jax.Array:
        return jnp.take(params["dense"]["kernel"], jnp.array([[0, 3], [1, 2]]), axis=2)

    sites = tied_lora.trace(stacked, params)
    adapted = tied_lora.wrap(params, config, sites=sites)
    adapted = adapted.replace(adapters=jax.tree.map(lambda x: x + 0.5, adapted.adapters))
    for function in (model, product):
        run = as_shipped(jax.jit(tied_lora.adapt(function, on_dense="allow")).lower(adapted))
        found, expected = run(adapted), function(tied_lora.merge(adapted))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", [jnp.multiply, lambda x, w: w / x])
def test_one_entry_of_a_weight_times_an_array(operation):
    """JAX's arithmetic takes a scalar beside an array of any shape, with no broadcast between."""
    check(lambda w: operation(2 + jnp.abs(X), w[0, 0]), on_dense="allow")

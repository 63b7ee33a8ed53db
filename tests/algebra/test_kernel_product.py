"""Kernels and their deltas, served as one: values, derivatives, and what the compiler makes."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import flax_tied_lora as tied_lora
from tests.helpers import oracle
from tests.helpers.compiling import as_shipped

WIDTH, LAYERS = 12, ("one", "two", "three")

PRODUCTS = {
    "tokens": lambda k, x: x[0] @ k,
    "batch and tokens": lambda k, x: x @ k,
    "tokens first": lambda k, x: jnp.einsum("btd,do->tbo", x, k),
    "tokens apart": lambda k, x: jnp.einsum("btd,do->bot", x, k),
    "columns first": lambda k, x: jnp.einsum("btd,do->obt", x, k),
    "transposed": lambda k, x: jnp.einsum("btd,od->bto", x, k),
    "heads": lambda k, x: jnp.einsum("btd,dhk->bthk", x, k.reshape(WIDTH, 3, 4)),
    "rows in two axes": lambda k, x: jnp.einsum("bthk,hko->bto", x.reshape(2, 5, 3, 4),
                                                k.reshape(3, 4, WIDTH)),
    "one token": lambda k, x: x[:, :1] @ k,
}  # fmt: skip


def wrapped(layers: int = 3, dtype: Any = jnp.float32) -> tied_lora.Adapted:
    own = LAYERS[:layers]
    params = {k: oracle.array(WIDTH, WIDTH, seed=i, dtype=dtype) / 4 for i, k in enumerate(own)}
    config = tied_lora.LoraConfig(r=3, lora_alpha=5, target_modules=list(own))
    return oracle.perturbed(tied_lora.wrap(params, config))


def model(params: Any, x: jax.Array) -> jax.Array:
    for name in LAYERS:
        x = jnp.tanh(x @ params[name])
    return x


X = oracle.array(2, 5, WIDTH, seed=7)


LOW = ("tokens", "batch and tokens", "transposed", "heads")
CASES = [(name, jnp.float32) for name in PRODUCTS] + [(name, jnp.bfloat16) for name in LOW]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[f"{n}, {d.__name__}" for n, d in CASES])
def test_a_product(name, dtype):
    product = PRODUCTS[name]
    adapted = wrapped(1, dtype)
    explained = oracle.check(lambda p, x: product(p["one"], x), adapted, X.astype(dtype))
    assert oracle.only(explained, "projection")[0].flops > 0


def test_forward_and_second_derivatives():
    """Of factors and data: those of the merged model."""

    def moved(adapted: Any, x: Any, function: Any) -> Any:
        direction = jax.tree.map(jnp.sin, (adapted.adapters, x))

        def of(adapters: Any, x: Any) -> Any:
            return function(adapted.replace(adapters=adapters), x)

        def slope(adapters: Any, x: Any) -> Any:
            return jax.jvp(of, (adapters, x), direction)[1].sum()

        return jax.jvp(of, (adapted.adapters, x), direction)[1], jax.grad(slope)(
            adapted.adapters, x
        )

    ours = moved(wrapped(), X, tied_lora.adapt(model))
    theirs = moved(wrapped(), X, lambda adapted, x: model(tied_lora.merge(adapted), x))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_scaling_is_not_rounded():
    """Halfway between two numbers of bfloat16: all of a gradient would be off by 0.3 %."""
    scaling, dtype = jnp.float32(1.25 + 2**-8), jnp.bfloat16

    def gradients(adapted: Any, x: jax.Array, function: Any) -> Any:
        def loss(adapters: Any, scaling: Any) -> jax.Array:
            here = adapted.replace(adapters=adapters, scaling={"one": scaling})
            return jnp.sum(oracle.array(4, 16, WIDTH, seed=8) * function(here, x))

        return jax.grad(loss)(adapted.adapters, scaling)

    def product(params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["one"]).astype(jnp.float32)

    adapted, x = wrapped(1, dtype), oracle.array(4, 16, WIDTH, seed=7, dtype=dtype)
    ours = gradients(adapted, x, tied_lora.adapt(product))
    adapted, x = jax.tree.map(lambda a: a.astype(jnp.float32), (adapted, x))
    exact = gradients(adapted, x, lambda adapted, x: product(tied_lora.merge(adapted), x))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert abs(jnp.vdot(a, b) / jnp.vdot(b, b) - 1) < 2**-9


def test_symbolic_shapes():
    """One exported program for any number of sequences, of any length."""
    shape = jax.export.symbolic_shape("sequences, tokens")
    adapted, x = jax.eval_shape(wrapped), jax.ShapeDtypeStruct((*shape, WIDTH), jnp.float32)
    apply = tied_lora.adapt(model)
    step = jax.jit(tied_lora.value_and_grad(lambda adapted, x: apply(adapted, x).sum()))
    exported = jax.export.export(step)(adapted, x)
    ours, theirs = exported.call(wrapped(), X), step(wrapped(), X)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert jnp.allclose(a, b, atol=1e-4)


def test_only_what_is_asked_for_is_differentiated():
    """Along data alone: for each product with a kernel two of its factors, and none more."""
    apply, adapted = tied_lora.adapt(model), jax.eval_shape(wrapped)

    def of_data(x: Any, adapted: Any) -> Any:
        return jax.jvp(lambda x: apply(adapted, x), (x,), (jnp.sin(x),))

    def plain(x: Any, adapted: Any) -> Any:
        return jax.jvp(lambda x: model(adapted.params, x), (x,), (jnp.sin(x),))

    def products(function: Any) -> int:
        compiled = as_shipped(jax.jit(function).lower(X, adapted))
        return len(re.findall(r" dot\(", compiled.as_text()))

    assert products(plain) == 2 * len(LAYERS)
    assert products(of_data) == 3 * products(plain)


def kernels(function: Any, *args: Any) -> int:
    """How many kernels of its own making the compiled program has: products are a library's."""
    text = as_shipped(jax.jit(function).lower(*args)).as_text()
    entry = text[text.index("\nENTRY") :]
    return len(re.findall(r"kind=k(?:Loop|Input|Output)| (?:copy|transpose)\(", entry))


def test_no_kernel_more_is_made_of_a_forward_pass():
    """The scaling is part of the sum, which is part of what reads it."""
    adapted, x = jax.eval_shape(lambda: (wrapped(), jnp.ones((4, 64, WIDTH))))
    plain = kernels(model, adapted.params, x)
    assert 0 < kernels(tied_lora.adapt(model), adapted, x) <= plain


def test_two_kernels_more_are_made_of_a_layers_gradient():
    """The scaling of a thin array and of one factor; nothing is transposed or copied."""
    adapted, x = jax.eval_shape(lambda: (wrapped(), jnp.ones((4, 64, WIDTH))))

    def plain(params: Any, x: Any) -> Any:
        return model(params, x).sum()

    ours = tied_lora.value_and_grad(tied_lora.adapt(plain))
    frozen = kernels(jax.value_and_grad(plain, argnums=1), adapted.params, x)
    assert kernels(ours, adapted, x) <= frozen + 2 * len(LAYERS)


def test_tokens_that_a_mesh_may_split_stay_in_their_axes():
    """Joined, an axis within them that is split would have to be put together first."""
    apply = tied_lora.adapt(model)
    step = jax.jit(tied_lora.value_and_grad(lambda adapted, x: apply(adapted, x).sum()))

    def joined(x: jax.Array) -> int:
        return step.lower(wrapped(), x).as_text().count("stablehlo.reshape")

    x = jnp.ones((4, 8, WIDTH))
    assert joined(x) > 0
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "tokens"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "tokens")))
            assert joined(placed) == 0


def test_a_sequence_that_is_split_is_not_gathered():
    mesh = jax.make_mesh((2, 4), ("data", "tokens"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(jnp.ones((4, 64, WIDTH)), jax.NamedSharding(mesh, jax.P("data", "tokens")))
    apply = tied_lora.adapt(model)
    step = tied_lora.value_and_grad(lambda adapted, x: apply(adapted, x).sum())
    text = jax.jit(step).lower(wrapped(), x).compile().as_text() or ""
    assert "all-reduce" in text
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)

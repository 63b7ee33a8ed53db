"""`jax.export` with sizes that are left open: one adapted program for any batch and length."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers.full_logits import assert_same, compiled
from tests.helpers.oracle import array, numbers, wrapped

# A table so wide that its logits are added in place.
V, D, LONGEST = 512, 8, 16
PARAMS = {
    "embed": {"embedding": array(V, D, seed=1)},
    "positions": {"embedding": array(LONGEST, D, seed=2)},
    "up": {"kernel": array(D, D, seed=3)},
    "conv": {"kernel": array(3, D, D, seed=4)},
    "experts": {"kernel": array(2, D, D, seed=5)},
}


def table(params: Any) -> Any:
    return params["embed"]["embedding"]


def kernel(params: Any, name: str) -> Any:
    return params[name]["kernel"]


def hidden(params: Any, ids: Any) -> Any:
    x = table(params)[ids] + params["positions"]["embedding"][None, : ids.shape[1]]
    return jnp.tanh(x @ kernel(params, "up") / 4)  # not saturated, where gradients are all rounding


def logits(params: Any, ids: Any) -> Any:
    return hidden(params, ids) @ table(params).T


def attention(params: Any, ids: Any) -> Any:
    """Attention of tokens to as many positions."""
    places = lax.slice_in_dim(params["positions"]["embedding"], 0, ids.shape[1])
    return jax.nn.softmax(hidden(params, ids) @ places.T) @ places


def attention_in_heads(params: Any, ids: Any) -> Any:
    places = lax.slice_in_dim(params["positions"]["embedding"], 0, ids.shape[1])
    places = places.reshape(-1, 2, D // 2)
    x = hidden(params, ids).reshape(*ids.shape, 2, D // 2)
    shares = jax.nn.softmax(jnp.einsum("bthk,nhk->bhtn", x, places))
    return jnp.einsum("bhtn,nhk->bthk", shares, places)


def of_bags(params: Any, ids: Any) -> Any:
    return jax.nn.one_hot(ids, V).mean(axis=1) @ table(params)


def step_by_step(params: Any, ids: Any) -> Any:
    def body(state: Any, ids: Any) -> Any:
        state = jnp.tanh(state @ kernel(params, "up") + table(params)[ids])
        return state, state @ table(params).T

    start = jnp.zeros((ids.shape[0], D))
    return lax.scan(jax.checkpoint(body), start, ids.T)[1]


def over_the_table(params: Any, ids: Any) -> Any:
    """Steps along the length, of which each has a row of a table of positions."""

    def body(total: Any, row: Any) -> Any:
        return jnp.tanh(total @ kernel(params, "up") + row[None]), total

    rows = params["positions"]["embedding"][: ids.shape[1]]
    return lax.scan(body, table(params)[ids[:, 0]], rows)[1]


def convolved(params: Any, ids: Any) -> Any:
    dims = ("NWC", "WIO", "NWC")
    kernel_ = kernel(params, "conv")
    return lax.conv_general_dilated(hidden(params, ids), kernel_, (1,), "SAME", None, None, dims)


def of_experts(params: Any, ids: Any) -> Any:
    rows = hidden(params, ids).reshape(-1, D)
    first = jnp.sum(ids < V // 2)
    sizes = jnp.stack([first, ids.size - first]).astype(jnp.int32)
    return lax.ragged_dot(rows, kernel(params, "experts"), sizes)


def loss(params: Any, ids: Any, **options: Any) -> Any:
    labels = jnp.where(ids % 5 == 0, -100, (ids + 1) % V)
    return linear_cross_entropy(hidden(params, ids), table(params), labels, **options)


def loss_of_each(params: Any, ids: Any) -> Any:
    return jax.vmap(functools.partial(loss, params))(ids[:, None])


PROGRAMS: dict[str, Callable[..., Any]] = {
    "logits": logits,
    "logits of each": lambda params, ids: jax.vmap(lambda i: logits(params, i[None]))(ids),
    "attention": attention,
    "attention in heads": attention_in_heads,
    "bags": of_bags,
    "step by step": step_by_step,
    "over the table": over_the_table,
    "convolution": convolved,
    "experts": of_experts,
    "loss": loss,
    "loss of each token": functools.partial(loss, reduction="none", z_loss=0.1),
    "loss with a cap": functools.partial(loss, logit_soft_cap=3.0, label_smoothing=0.1),
    "loss in small chunks": functools.partial(loss, chunk_size=7, reduction="sum"),
    "loss of each sequence": loss_of_each,
}


def check(program: Callable[..., Any], adapted: Any, shape: str, sizes: Any) -> None:
    """Checks an exported program, values and gradients, against that of merged params."""
    served = tied_lora.adapt(program, on_dense="error")

    def step(adapters: Any, ids: Any, run: Any = served) -> Any:
        def total(adapters: Any) -> Any:
            out = run(adapted.replace(adapters=adapters), ids)
            # Weighted, not bent: where a sine's slope is small, it magnifies roundings.
            places = jnp.arange(out.size, dtype=out.dtype).reshape(out.shape)
            return jnp.sum(out * jnp.cos(places)), out

        return jax.grad(total, has_aux=True)(adapters)

    def merged(adapted: Any, ids: Any) -> Any:
        return program(tied_lora.merge(adapted), ids)

    constraints = [f"t <= {LONGEST}"] if "t" in shape else []
    ids = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, constraints=constraints), jnp.int32)
    run = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))
    exported = run(adapted.adapters, ids)  # which holds the program in its serialised form
    for batch, length in sizes:
        ids = numbers(batch, length, below=V, seed=batch)
        expected = compiled(functools.partial(step, run=merged), adapted.adapters, ids)
        assert_same(exported.call(adapted.adapters, ids), expected, 5e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_any_batch_and_length(name):
    sites = tied_lora.trace(PROGRAMS[name], PARAMS, jnp.zeros((2, 3), int))
    adapted = wrapped(PARAMS, sites.leaves(), sites=sites)
    check(PROGRAMS[name], adapted, "b, t", [(1, 1), (20, LONGEST)])


@pytest.mark.parametrize("kind", ["dora", "rows", "copy", "quantized"])
@pytest.mark.parametrize("name", ["logits", "attention", "loss"])
def test_every_kind_of_adapter(name, kind):
    targets = ["positions"] if name == "attention" else ["embed", "up"]
    adapted = wrapped(PARAMS, targets, kind=kind)
    check(PROGRAMS[name], adapted, "b, t", [(3, 5)])


@pytest.mark.parametrize("name", ["logits", "loss"])
def test_any_batch_of_one_length(name):
    """Logits are added a part at a time, along the axis whose size is a number."""
    adapted = wrapped(PARAMS, ["embed"])
    check(PROGRAMS[name], adapted, f"b, {LONGEST}", [(1, LONGEST), (3, LONGEST)])


def test_costs_are_formulas():
    adapted = wrapped(PARAMS, ["embed", "up"])
    shape = jax.export.symbolic_shape("b, t", constraints=[f"t <= {LONGEST}"])
    for program in (logits, loss):
        explained = tied_lora.explain(program, adapted, jax.ShapeDtypeStruct(shape, jnp.int32))
        explained.assert_tied()
        assert re.search(r"extra: \d+\*b\*t FLOPs", str(explained))


def test_what_is_materialised_is_said_as_a_formula():
    adapted = wrapped(PARAMS, ["positions"])

    def fn(params: Any, ids: Any) -> Any:
        return jnp.sin(lax.slice_in_dim(params["positions"]["embedding"], 0, ids.shape[1]))

    shape = jax.export.symbolic_shape("b, t", constraints=[f"t <= {LONGEST}"])
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    with pytest.raises(tied_lora.DensifyError, match=r"one array of 32\*t bytes"):
        jax.eval_shape(tied_lora.adapt(fn, on_dense="error"), adapted, ids)

"""The loss a chunk at a time: its sums in float32, its memory, and its arithmetic."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers.compiling import as_shipped
from tests.helpers.full_logits import assert_same, compiled, cross_entropy
from tests.helpers.oracle import array, numbers

V, D, TOKENS = 17, 6, (3, 9)
HIDDEN, TABLE, BIAS = array(*TOKENS, D, seed=2), array(V, D, seed=1), array(V, seed=3)
LABELS = numbers(*TOKENS, below=V).at[0, 2:5].set(-100)
WEIGHTS = jnp.abs(array(*TOKENS, seed=4))
CHUNK = 7  # does not divide 27


@pytest.mark.parametrize("chunk", [1, 26, 27, 1000, None])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    run = functools.partial(linear_cross_entropy, labels=LABELS, chunk_size=chunk)
    assert_same(run(HIDDEN, TABLE), cross_entropy(HIDDEN, TABLE, LABELS))


def test_bfloat16_adds_up_in_float32():
    hidden, table = (8 * array(64, 96, seed=5)).astype(jnp.bfloat16), array(40, 96, seed=6)
    table, labels = (table / 8).astype(jnp.bfloat16), numbers(64, below=40)
    loss = functools.partial(linear_cross_entropy, labels=labels, chunk_size=8, reduction="sum")
    value, (of_hidden, of_table) = compiled(jax.value_and_grad(loss, (0, 1)), hidden, table)
    wide = [x.astype(jnp.float32) for x in (hidden, table)]
    plain = functools.partial(cross_entropy, labels=labels, reduction="sum")
    expected, gradients = compiled(jax.value_and_grad(plain, (0, 1)), *wide)
    assert (value.dtype, of_hidden.dtype, of_table.dtype) == ("float32", "bfloat16", "bfloat16")
    assert_same(value, expected, 1e-6)  # the products of bfloat16 are exact in float32
    assert_same((of_hidden, of_table), gradients, 2 * float(jnp.finfo(jnp.bfloat16).eps))


def test_dtypes_that_differ_meet_in_the_wider():
    low = HIDDEN.astype(jnp.bfloat16)
    expected = cross_entropy(low.astype(jnp.float32), TABLE, LABELS)
    value, gradient = jax.value_and_grad(linear_cross_entropy)(low, TABLE, LABELS)
    assert_same(value, expected)
    assert gradient.dtype == jnp.bfloat16


def _stated(program: Any) -> tuple[int, float]:
    return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()["flops"]


def _stated_of_step(loss: Any, tokens: int, **options: Any) -> tuple[int, float]:
    """Memory and arithmetic of a step."""
    return _stated(_step(loss, tokens, **options))


def _step(loss: Any, tokens: int, **options: Any) -> Any:
    """Returns a compiled loss with its gradients by hidden states and factors."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"embed": {"embedding": shape((8192, 64))}}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=8, target_modules=["embed"]))
    served = tied_lora.adapt(
        lambda p, h, y: loss(h, p["embed"]["embedding"], y, **options), on_dense="error"
    )

    def step(adapted: Any, h: jax.Array, y: jax.Array) -> Any:
        def of(adapters: Any, h: jax.Array) -> jax.Array:
            return served(adapted.replace(adapters=adapters), h, y)

        return jax.value_and_grad(of, (0, 1))(adapted.adapters, h)

    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return as_shipped(jax.jit(step).lower(adapted, shape((tokens, 64)), labels))


def test_memory_and_arithmetic_of_a_training_step():
    tokens = 2048
    ours, _ = _stated_of_step(linear_cross_entropy, tokens)
    plain, flops = _stated_of_step(cross_entropy, tokens)
    assert ours <= 0.1 * plain, f"{ours / plain:.3f} of the memory of plain logits"
    # The compiler counts a loop's body once: with one chunk all products are there to be counted.
    _, whole = _stated_of_step(linear_cross_entropy, tokens, chunk_size=tokens)
    assert whole <= 1.01 * flops, f"{whole / flops:.3f} of the arithmetic of plain logits"


@pytest.mark.parametrize("options", [{}, {"logit_soft_cap": 5.0}], ids=["plain", "capped"])
def test_the_gradient_of_logits_has_their_memory(options):
    """A larger chunk costs one array more of its size, not two."""
    large, small = (
        _stated_of_step(linear_cross_entropy, 1024, chunk_size=n, **options)[0] for n in (512, 256)
    )
    assert large - small <= 1.1 * (512 - 256) * 8192 * 4


@pytest.mark.parametrize(
    ("tokens", "options", "times"),
    [(2048, {}, 1), (2048, {"logit_soft_cap": 5.0}, 2), (256, {}, 2)],
    ids=["plain", "capped", "few tokens"],
)
def test_exponentials_of_a_chunk_are_computed_once(tokens, options, times):
    """Twice where an array of them is more memory: beside capped logits, or of few tokens."""
    text = _step(linear_cross_entropy, tokens, **options).as_text()
    assert len(re.findall(r"= f32\[\d+,8192\]\S* exponential\(", text)) == times


def test_chunks_are_of_a_number_that_can_be_split_further():
    """127 tokens would be taken one by one in the loops over their logits."""
    traced = str(jax.make_jaxpr(jax.grad(linear_cross_entropy))(
        array(2 * 127, 8), array(40, 8), numbers(2 * 127, below=40)
    ))  # fmt: skip
    assert "f32[128,40]" in traced
    assert "f32[127,40]" not in traced


def test_evaluation_forms_no_gradients():
    args = (array(64, 32), array(512, 32), numbers(64, below=512))
    value, gradient = (
        _stated(as_shipped(jax.jit(f).lower(*args)))[1]
        for f in (linear_cross_entropy, jax.grad(linear_cross_entropy))
    )
    product = 2 * 64 * 32 * 512
    assert product <= value < 1.5 * product
    assert 2 * product <= gradient < 2.5 * product

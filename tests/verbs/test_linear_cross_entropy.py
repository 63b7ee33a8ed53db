"""linear_cross_entropy is the loss of the full logits: its options, shapes, labels and tables."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers.full_logits import assert_same, compiled, cross_entropy, value_and_gradients
from tests.helpers.oracle import array, numbers

V, D, TOKENS = 17, 6, (3, 9)


HIDDEN, TABLE, BIAS = array(*TOKENS, D, seed=2), array(V, D, seed=1), array(V, seed=3)
LABELS = numbers(*TOKENS, below=V).at[0, 2:5].set(-100)
WEIGHTS = jnp.abs(array(*TOKENS, seed=4))
CHUNK = 7  # does not divide 27


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01, "logit_soft_cap": 3.0},
        {"reduction": "none", "label_smoothing": 0.3, "z_loss": 0.1, "logit_scale": 0.5},
        {"logit_soft_cap": 1.5, "logit_scale": 2.0, "z_loss": 0.1},
        {"label_smoothing": 0.2, "ignore_index": 3},
        {"reduction": "none", "logit_soft_cap": 2.0, "ignore_index": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_every_option_is_the_loss_of_the_full_logits(options, vocab_axis):
    labels = jnp.where(LABELS == -100, options.get("ignore_index", -100), LABELS)

    def of(loss: Any, **more: Any) -> Any:
        def run(hidden: Any, table: Any, weights: Any, bias: Any) -> Any:
            return loss(
                hidden, table, labels, weights=weights, bias=bias, vocab_axis=vocab_axis,
                **options, **more,
            )  # fmt: skip

        return value_and_gradients(run, (0, 1, 2, 3))

    table = TABLE.T if vocab_axis else TABLE
    ours, theirs = compiled(
        lambda *args: (
            of(linear_cross_entropy, chunk_size=CHUNK)(*args),
            of(cross_entropy)(*args),
        ),
        HIDDEN, table, WEIGHTS, BIAS,
    )  # fmt: skip
    assert_same(ours, theirs)


def test_by_default_it_is_optax_with_integer_labels():
    labels = numbers(*TOKENS, below=V)
    logits = HIDDEN @ TABLE.T
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert_same(linear_cross_entropy(HIDDEN, TABLE, labels), expected.mean())
    assert_same(linear_cross_entropy(HIDDEN, TABLE, labels, reduction="none"), expected)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,)])
def test_any_batch_shape(shape):
    hidden, labels = array(*shape, D), numbers(*shape, below=V)
    for reduction in ("none", "sum"):
        ours = functools.partial(linear_cross_entropy, table=TABLE, reduction=reduction)
        theirs = functools.partial(cross_entropy, table=TABLE, reduction=reduction)
        assert_same(
            *compiled(
                lambda h, y, a=ours, b=theirs: (a(h, labels=y), b(h, labels=y)), hidden, labels
            )
        )
    capped = functools.partial(linear_cross_entropy, labels=labels, table=TABLE, logit_soft_cap=5)
    assert jax.grad(capped)(hidden).shape == hidden.shape


def test_where_no_token_counts_the_mean_and_its_gradient_are_zero():
    nobody = jnp.full(TOKENS, -100)
    for labels, weights in ((nobody, None), (LABELS, jnp.zeros(TOKENS, bool))):
        loss = functools.partial(linear_cross_entropy, labels=labels, weights=weights)
        value, gradient = jax.value_and_grad(loss)(HIDDEN, TABLE)
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize("label", [-1, V, 2**31 - 1])
def test_a_label_outside_of_the_vocabulary_is_not_a_number(label):
    labels = LABELS.at[1, 1].set(label)
    losses = linear_cross_entropy(HIDDEN, TABLE, labels, reduction="none")
    assert jnp.argwhere(jnp.isnan(losses)).tolist() == [[1, 1]]
    value, gradient = jax.value_and_grad(linear_cross_entropy)(HIDDEN, TABLE, labels)
    assert jnp.isnan(value)
    assert jnp.isnan(gradient[1, 1]).all()
    assert jnp.isfinite(gradient[2]).all()


def test_a_quantised_table_stays_quantised():
    stored = tied_lora.QuantizedArray.of(TABLE, "int8", 1, 2)
    for reduction in ("mean", "none"):

        def of(loss: Any, table: Any, reduction: Any = reduction) -> Any:
            run = functools.partial(loss, table=table, labels=LABELS, reduction=reduction)
            return value_and_gradients(run, (0,))

        ours = compiled(lambda h, table: of(linear_cross_entropy, table)(h), HIDDEN, stored)
        theirs = compiled(of(cross_entropy, stored.dequantize()), HIDDEN)
        assert_same(ours, theirs)


@pytest.mark.parametrize("weights", [[1, -3, 7, 2], [0, 0, 0, 0], [0, 0, 5, 0]])
def test_weights_that_sum_to_zero_have_a_mean_of_zero(weights):
    labels = jnp.array([1, 2, -100, 3])
    weights = jnp.array(weights, jnp.float32)  # the third is of no token

    def loss(hidden, weights):
        return linear_cross_entropy(hidden, TABLE, labels, weights=weights)

    value, gradients = jax.value_and_grad(loss, (0, 1))(HIDDEN[0, :4], weights)
    assert float(value) == 0
    for gradient in gradients:
        assert jnp.all(gradient == 0)

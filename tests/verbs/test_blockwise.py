"""Losses of other libraries that go over a table block by block, served by this library's loss."""

from __future__ import annotations

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.losses import blockwise_cross_entropy_rule
from tests.helpers.filtered import equinox, filter_custom_vjp
from tests.helpers.oracle import array, check, wrapped

VOCAB, WIDTH = 12, 6
LABELS = jnp.array([[1, 5, 0], [11, -100, 12]])  # two that are no rows of the table
HIDDEN = array(2, 3, WIDTH, seed=3)


class Axis(NamedTuple):
    name: str
    size: int


@jax.tree_util.register_pytree_node_class
class Named:
    """As Haliax's ``NamedArray``: the loss goes by the names of axes."""

    def __init__(self, array, axes):
        self.array, self.axes = array, axes

    def tree_flatten(self):
        return [self.array], self.axes

    @classmethod
    def tree_unflatten(cls, axes, arrays):
        return cls(arrays[0], axes)


def plain(pred, labels, block, vocab_axis=0):
    """Returns the loss of each token and the normaliser, as blocks of ``block`` would have it."""
    hidden, table = pred
    logits = jnp.einsum("...d,dv->...v" if vocab_axis else "...d,vd->...v", hidden, table)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return normaliser - (logits * targets).sum(-1), normaliser


def as_library(function):
    """Returns a function with its own derivative as its own, through equinox's filter."""
    made = filter_custom_vjp(function)

    def forward(pred, *args):
        return function(pred, *args), ()

    def backward(_, g, pred, *args):
        return jax.vjp(lambda pred: function(pred, *args), pred)[1](g)[0]

    made.defvjp(forward, backward)
    return made


@pytest.fixture(autouse=True)
def _equinox(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", equinox)


def table_of(*shape):
    return wrapped({"head": {"weight": array(*shape, seed=1)}}, ["head"])


def served(fn, adapted, *args):
    return {r.served for r in check(fn, adapted, *args).reads}


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_loss_and_normaliser_of_each_token(vocab_axis):
    loss = as_library(plain)
    tied_lora.register_rule(loss, blockwise_cross_entropy_rule)
    adapted = table_of(*((WIDTH, VOCAB) if vocab_axis else (VOCAB, WIDTH)))

    def fn(params, hidden):
        losses, normaliser = loss((hidden, params["head"]["weight"]), LABELS, 4, vocab_axis)
        return losses.sum() + 0.1 * (normaliser**2).sum()

    assert served(fn, adapted, HIDDEN) == {"low rank"}


def test_loss_alone_within_a_jitted_and_checkpointed_function():
    loss = as_library(lambda *args: plain(*args)[0])
    tied_lora.register_rule(loss, blockwise_cross_entropy_rule)

    @jax.jit
    @jax.checkpoint
    def fn(params, hidden):
        return loss((jnp.tanh(hidden), params["head"]["weight"]), LABELS, 4)

    assert served(fn, table_of(VOCAB, WIDTH), HIDDEN) == {"low rank"}


def test_axes_of_named_arrays_are_known_by_their_names():
    batch, position, embed = Axis("batch", 2), Axis("position", 3), Axis("embed", 3)
    vocab = Axis("vocab", 3)  # every size is that of several axes
    labels = Named(jnp.array([[0, 1, 2], [2, 0, 1]]), (batch, position))

    def by_name(pred, labels, block):
        hidden, table = pred
        order = [hidden.axes.index(a) for a in (batch, position, embed)]
        axis = table.axes.index(vocab)
        return plain((jnp.transpose(hidden.array, order), table.array), labels.array, block, axis)

    loss = as_library(by_name)
    tied_lora.register_rule(loss, blockwise_cross_entropy_rule)
    for axes in ((embed, vocab), (vocab, embed)):

        def fn(params, hidden, axes=axes):
            pred = Named(hidden, (embed, batch, position)), Named(params["head"]["weight"], axes)
            return loss(pred, labels, 4)[0]

        assert served(fn, table_of(3, 3), array(3, 2, 3, seed=4)) == {"low rank"}


@pytest.mark.parametrize(
    ("function", "hidden"),
    [
        (lambda *args: plain(*args)[0].sum(), HIDDEN),  # not of each token
        (lambda *args: (*plain(*args), LABELS), HIDDEN),
        (lambda pred, labels, b: (plain(pred, labels, b)[1], labels), HIDDEN),
        (lambda pred, labels, b: plain(pred, labels[0], b)[0], HIDDEN[0]),  # labels of other tokens
    ],
)
@pytest.mark.filterwarnings("ignore::flax_tied_lora.DensifyWarning")
def test_a_call_of_another_form_is_as_its_author_wrote_it(function, hidden):
    loss = as_library(function)
    tied_lora.register_rule(loss, blockwise_cross_entropy_rule)
    adapted = table_of(VOCAB, WIDTH)

    def fn(params, hidden):
        return loss((hidden, params["head"]["weight"]), LABELS, 4)

    merged = fn(tied_lora.merge(adapted), hidden)
    found = tied_lora.adapt(fn)(adapted, hidden)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(merged), strict=True):
        assert jnp.allclose(x, y, atol=1e-4)
    reads = tied_lora.explain(fn, adapted, hidden).reads
    assert [r.served for r in reads] == ["dense"]

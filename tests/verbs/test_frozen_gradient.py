"""Frozen params that are differentiated are said, by whatever way; what is not, costs nothing."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from tests.helpers.small_models import TOKENS, TiedLM, init, wrapped

MODEL = TiedLM()
ADAPTED = wrapped(init(MODEL), ["embed_tokens", "up"])


def loss(adapted, tokens):
    logits = tied_lora.adapt(MODEL.apply, on_dense="error")({"params": adapted}, tokens)
    return jnp.mean(jnp.square(logits))


def scanned(adapted, tokens):
    def body(total, own):
        return total + loss(adapted, own), None

    return jax.lax.scan(body, 0.0, tokens[None])[0]


FORMS = {
    "plain": loss,
    "jit": jax.jit(loss),
    "checkpoint": jax.checkpoint(loss),
    "scan": scanned,
    "vmap": lambda a, t: jax.vmap(loss, (None, 0))(a, t[None]).sum(),
    "cond": lambda a, t: jax.lax.cond(t[0, 0] >= 0, lambda: loss(a, t), lambda: 0.0),
}


def said(function, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    kinds = {w.category for w in caught}
    assert kinds <= {tied_lora.FrozenGradientWarning}
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_an_adapted_is_said(form, compiled):
    jax.clear_caches()  # what was differentiated before is not traced again
    by_hand = jax.grad(FORMS[form])
    messages = said(jax.jit(by_hand) if compiled else by_hand, ADAPTED, TOKENS)
    assert len(messages) >= 1
    assert "'embed_tokens/embedding' and 1 more are differentiated" in messages[0]
    assert "tied_lora.value_and_grad(loss_fn)" in messages[0]
    assert "nnx.DiffState(0, nnx.LoRAParam)" in messages[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_adapters_is_not(form, compiled):
    ours = tied_lora.value_and_grad(FORMS[form])
    assert not said(jax.jit(ours) if compiled else ours, ADAPTED, TOKENS)


def test_once_for_a_call():
    assert len(said(jax.grad(loss), ADAPTED, TOKENS)) == 1


def test_other_derivatives_are_not():
    def of_data(x):
        return tied_lora.adapt(lambda p: jnp.sum(jnp.tanh(x @ p["up"]["kernel"])))(ADAPTED)

    with pytest.warns(tied_lora.UnreadTargetWarning):
        jax.grad(of_data)(jnp.ones((2, 8)))
    grad = tied_lora.adapt(jax.grad(lambda p, t: jnp.mean(MODEL.apply({"params": p}, t) ** 2)))
    assert not said(jax.jit(grad), ADAPTED, TOKENS)


def test_what_is_compiled_first_and_differentiated_then_hands_on_no_copies():
    """Of the frozen params, which the backward pass reads: it is given those that there are."""
    closed = jax.make_jaxpr(tied_lora.value_and_grad(jax.jit(loss)))(ADAPTED, TOKENS)
    frozen = {x.shape for x in jax.tree.leaves(ADAPTED.params) if x.ndim > 1}
    compiled = [eqn for eqn in closed.jaxpr.eqns if "jit" in eqn.primitive.name]
    assert len(compiled) == 2
    assert not frozen & {out.aval.shape for out in compiled[0].outvars}

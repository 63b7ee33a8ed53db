"""Backward passes are told by JAX's marks on name stacks, and refused where these are others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora._interpreter import backward, sites
from tests.helpers.oracle import array
from tests.helpers.small_models import wrapped

PARAMS = {"embed_tokens": {"embedding": array(12, 8, seed=1)}}
X = array(4, 8, seed=2)


def tied(params, x):
    w = params["embed_tokens"]["embedding"]
    return jnp.sum((w[jnp.array([3, 0, 3, 11])] + x) @ w.T)


@pytest.fixture
def separate():
    found = tied_lora.trace(tied, PARAMS, X)
    with pytest.warns(tied_lora.WeightTyingWarning):
        return wrapped(PARAMS, ["embed_tokens", "lm_head"], sites=found, ensure_weight_tying=False)


@pytest.fixture(autouse=True)
def _looked_for_again():
    forget()
    yield
    forget()


def forget():
    backward.marks_are_known.cache_clear()
    sites.module_scope.cache_clear()


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("jvp(model)", False),
        ("transpose(jvp(model))", True),
        ("transpose(jvp(model))/jvp(model)/rematted_computation", False),
        ("transpose(jvp(transpose(jvp(model))))", False),
        ("transpose(jvp(model))/vmap(rematted_computation)/jvp(jvp(model))", False),
        # Another pass within one: of a second derivative, or of a checkpoint with jax_remat3.
        ("transpose(jvp(model))/transpose(jvp(jvp(model)))", {False: False, True: True}),
        ("transpose(jvp(model))/transpose(jvp(jvp(model)))/rematted_computation",
         {False: True, True: False}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("another", [False, True])
def test_is_backward(scope, expected, another, monkeypatch):
    monkeypatch.setattr(backward, "_checkpoints_call_another", lambda flag: another)
    wanted = expected[another] if isinstance(expected, dict) else expected
    assert backward.is_backward(scope) is wanted


def test_the_marks_are_those_of_this_release_of_jax():
    assert backward.marks_are_known()


def test_the_marks_are_looked_for_in_whatever_surrounds_the_first_use(separate):
    def loss(x):
        return tied_lora.adapt(tied)(separate, x)

    with jax.named_scope("transpose(outside)"):
        jax.jit(jax.grad(loss))(X)
    assert backward.marks_are_known()


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        (backward, "TRANSPOSED", "reversed("),
        (backward, "RECOMPUTED", "computed_again"),
        (sites, "_MARKS", frozenset()),
    ],
)
def test_other_marks_refuse_separate_adapters(monkeypatch, separate, module, name, other):
    monkeypatch.setattr(module, name, other)
    forget()
    with pytest.raises(
        RuntimeError,
        match=rf"adapt: 'embed_tokens/embedding' has separate .* jax {jax.__version__} it cannot",
    ):
        tied_lora.adapt(tied)(separate, X)
    # One adapter for all call sites needs no roles.
    together = wrapped(PARAMS, ["embed_tokens"])
    assert jnp.isfinite(tied_lora.adapt(tied)(together, X))

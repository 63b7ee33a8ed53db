"""Templates of what was saved: optimizers of every kind, and other containers than the saved."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint
from flax_tied_lora.checkpoint import CheckpointError
from tests.helpers.saved_base import base_params, wrapped

CONFIG = tied_lora.LoraConfig(r=2, target_modules=["up"])


def noisy(tree):
    """Other values of the same types, so that what is restored cannot be what is made anew."""
    return jax.tree.map(lambda x: (jnp.arange(x.size).reshape(x.shape) + 1).astype(x.dtype), tree)


def same(found, expected):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert np.array_equal(x, y)


# Whatever has init and update


class Momentum:
    """An optimizer that is nothing of Optax's."""

    def init(self, params):
        return {"momentum": jax.tree.map(jnp.zeros_like, params)}

    def update(self, grads, state, params=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.MultiSteps(optax.adamw(1e-3), every_k_schedule=4),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.apply_if_finite(optax.adam(0.1), 3),
        optax.contrib.schedule_free_adamw(0.1),
        Momentum(),
    ],
    ids=lambda x: type(x).__name__,
)
def test_any_optimizer(tmp_path, optimizer):
    adapted = wrapped()
    state = noisy(optimizer.init(adapted.adapters))
    checkpoint.save(tmp_path / "a", adapted, opt_state=state)
    found = checkpoint.restore(tmp_path / "a", base_params(), opt_state=optimizer).opt_state
    assert jax.tree.structure(found) == jax.tree.structure(state)
    same(found, state)


def test_an_optimizer_that_does_not_take_the_adapters(tmp_path):
    class Picky(Momentum):
        def init(self, params):
            raise KeyError("layers")

    checkpoint.save(tmp_path / "a", wrapped(), opt_state={"x": jnp.ones(1)})
    with pytest.raises(CheckpointError, match=r"opt_state.init fails .*KeyError: 'layers'"):
        checkpoint.restore(tmp_path / "a", base_params(), opt_state=Picky())


# NNX


@functools.cache
def module():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 8, rngs=rngs)

    return Model(nnx.Rngs(0))


def optimizer_of_nnx():
    adapted = tied_lora.nnx.wrap(module(), CONFIG)
    optimizer = nnx.Optimizer(adapted, optax.adam(0.1), wrt=nnx.LoRAParam)
    nnx.update(optimizer, noisy(nnx.state(optimizer)))
    return adapted, optimizer


KINDS = {
    "optimizer": lambda optimizer: optimizer,
    "state": nnx.state,
    "split": lambda optimizer: nnx.split(optimizer)[1],
    "pure": lambda optimizer: nnx.to_pure_dict(nnx.state(optimizer)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_of_nnx_and_its_state_restore_each_other(tmp_path, kind):
    adapted, optimizer = optimizer_of_nnx()
    functional = tied_lora.nnx.adapted(adapted)
    checkpoint.save(tmp_path / "a", functional, opt_state=KINDS[kind](optimizer))
    base = tied_lora.nnx.params(module())
    _, fresh = optimizer_of_nnx()
    for other in KINDS.values():
        template = other(fresh)
        found = checkpoint.restore(tmp_path / "a", base, opt_state=template).opt_state
        assert type(found) is type(template)
        same(nnx.state(found), nnx.state(optimizer))


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ("optimizer", "optax", "pass the nnx.Optimizer that was saved, on a module that is"),
        ("state", "optax", "pass the nnx.Optimizer that was saved, .* or its nnx.state"),
        ("optimizer", "opt_state", "pass the nnx.Optimizer that was saved"),
        ("opt_state", "optimizer", "pass the Optax optimizer whose .*; of an nnx.Optimizer, its"),
        ("optax", "state", "pass the Optax optimizer whose state was saved"),
        ("opt_state", "optax", "pass the opt_state of the nnx.Optimizer that was saved"),
    ],
)
def test_kinds_that_are_not_each_others_say_which_to_pass(tmp_path, saved, asked, message):
    adapted, optimizer = optimizer_of_nnx()
    functional = tied_lora.nnx.adapted(adapted)
    states = {name: kind(optimizer) for name, kind in KINDS.items()} | {
        "opt_state": optimizer.opt_state,
        "optax": optax.adam(0.1).init(functional.adapters),
    }
    checkpoint.save(tmp_path / "a", functional, opt_state=states[saved])
    template = optax.adam(0.1) if asked == "optax" else states[asked]
    with pytest.raises(CheckpointError, match=f"opt_state in .* does not fit: .*{message}"):
        checkpoint.restore(tmp_path / "a", tied_lora.nnx.params(module()), opt_state=template)


# Other containers


def test_containers_are_the_templates(tmp_path):
    extra = {"list": [jnp.ones(2), None, ()], "dict": {"0": jnp.zeros(3)}, "empty": {}}
    checkpoint.save(tmp_path / "a", wrapped(), extra=extra)
    template = {"list": (jnp.zeros(2),), "dict": [jnp.ones(3)]}
    found = checkpoint.restore(tmp_path / "a", base_params(), extra=template).extra
    assert jax.tree.structure(found) == jax.tree.structure(template)
    same(found, {"list": (jnp.ones(2),), "dict": [jnp.zeros(3)]})

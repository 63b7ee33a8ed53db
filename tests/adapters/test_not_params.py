"""An `Adapted` in a function that did not go through `adapt`: an error that says to adapt it."""

from __future__ import annotations

import copy
import pickle

import chex
import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.errors import ApplyScopeInvalidVariablesTypeError
from flax.training.train_state import TrainState

import flax_tied_lora as tied_lora

PARAMS = {"up": {"kernel": jnp.ones((4, 4))}}
CONFIG = tied_lora.LoraConfig(r=2, target_modules=["up"])
ADAPTED = tied_lora.wrap(PARAMS, CONFIG)
HINT = (
    r"it takes the place of params where a function went through adapt, "
    r'tied_lora\.adapt\(model\.apply\)\(\{"params": adapted\}, \.\.\.\), or as '
    r"AdaptedModel\(model, adapted\); adapted\.params are the frozen params"
)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="up")(x)


class Module(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))


USES = {
    "entry": (lambda a: a["up"], r"Adapted\['up'\]: "),
    "or": (lambda a: a or PARAMS, r"bool\(Adapted\): "),  # as transformers' Flax models do
    "in": (lambda a: "up" in a, "'up' in an Adapted: "),
    "dict": (dict, r"iter\(Adapted\): "),
    "freeze": (flax.core.freeze, r"iter\(Adapted\): "),
    "array": (jnp.asarray, "an Adapted as an array: "),
    "array of numpy": (np.asarray, "an Adapted as an array: "),
    "variables": (lambda a: Model().apply(a, jnp.ones((1, 4))), "'params' in an Adapted: "),
    "train state": (
        lambda a: TrainState.create(apply_fn=None, params=a, tx=optax.sgd(0.1)),
        r"in an Adapted: .*Of a TrainState, params=adapted\.adapters are what is trained; in a",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_what_is_done_to_params(name):
    use, words = USES[name]
    with pytest.raises(TypeError, match=words) as error:
        use(ADAPTED)
    assert error.match(HINT)


@pytest.mark.parametrize("name", ["items", "keys", "values", "get", "copy", "pop"])
def test_attributes_that_the_params_have(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}': {HINT}"):
        getattr(ADAPTED, name)


def test_attributes_of_a_state_and_its_update():
    adapted = tied_lora.wrap(nnx.state(Module(), nnx.Param), CONFIG)
    for name in ("up", "flat_state"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}': {HINT}"):
            getattr(adapted, name)
    with pytest.raises(AttributeError, match=HINT):
        nnx.update(Module(), adapted)


def test_attributes_that_nobody_has():
    for name in ("up", "shape", "_dict", "__jax_array__"):
        assert not hasattr(ADAPTED, name)
        with pytest.raises(AttributeError, match=rf"'Adapted' object has no attribute '{name}'$"):
            getattr(ADAPTED, name)


def test_all_else_takes_it_as_the_pytree_that_it_is(tmp_path):
    for again in (
        copy.copy(ADAPTED), copy.deepcopy(ADAPTED), pickle.loads(pickle.dumps(ADAPTED)),
        jax.jit(lambda a: a)(ADAPTED), jax.tree.map(lambda x: x, ADAPTED),
        flax.core.freeze({"params": ADAPTED})["params"], jax.device_put(ADAPTED),
    ):  # fmt: skip
        chex.assert_trees_all_equal(again, ADAPTED)
    optimizer = optax.masked(optax.sgd(0.1, 0.9), jax.tree.map(lambda _: True, ADAPTED))
    updates, _ = optimizer.update(ADAPTED, optimizer.init(ADAPTED), ADAPTED)
    assert isinstance(optax.apply_updates(ADAPTED, updates), tied_lora.Adapted)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "it", ADAPTED)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "it", ADAPTED)
    chex.assert_trees_all_equal(restored, ADAPTED)


def test_what_asks_it_nothing_has_errors_of_its_own():
    """As docs/limits.md has them: these functions look at nothing but its type."""
    with pytest.raises(ApplyScopeInvalidVariablesTypeError, match="a dictionary with string keys"):
        Model().apply({"params": ADAPTED}, jnp.ones((1, 4)))
    with pytest.raises(AssertionError, match=r"expected \(frozen\)dict; got .*Adapted"):
        flax.traverse_util.flatten_dict(ADAPTED)

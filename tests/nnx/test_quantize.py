"""NNX modules that are stored quantised: the oracle is the module with the dequantised params."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora import QuantizedArray
from flax_tied_lora._tree.paths import flatten
from tests.helpers.oracle import array, numbers

TOKENS = numbers(2, 5, below=48)
CONFIG = tied_lora.LoraConfig(r=2, target_modules=["embed", "up"])
MATRICES = {"embed/embedding", "up/kernel", "down/kernel"}


class Model(nnx.Module):
    """A tied table, a layer that is adapted and one that is not, and state that is no param."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(48, 32, rngs=rngs)
        self.head = self.embed
        self.up, self.down = (nnx.Linear(32, 32, rngs=rngs) for _ in range(2))
        self.running = nnx.BatchStat(jnp.ones((32, 32)))

    def __call__(self, tokens):
        x = self.embed(tokens)
        self.running.set_value(self.running.get_value() * 0.5)
        return self.head.attend(x + self.down(jnp.tanh(self.up(x))))


MODULE = Model(nnx.Rngs(0))


def perturbed(adapted):
    state = nnx.state(adapted, nnx.LoRAParam)
    nnx.update(adapted, jax.tree.map(lambda x: 0.3 * array(*x.shape, seed=x.size), state))
    return adapted


def quantised_of(module):
    leaves, _ = flatten(tied_lora.nnx.params(module))
    return {path for path, leaf in leaves.items() if isinstance(leaf, QuantizedArray)}


@pytest.mark.parametrize("first", ["quantize", "wrap"])
def test_module_runs_on_its_stored_weights(first):
    if first == "quantize":
        adapted = tied_lora.nnx.wrap(tied_lora.nnx.quantize(MODULE, "nf4"), CONFIG)
    else:
        adapted = tied_lora.nnx.quantize(tied_lora.nnx.wrap(MODULE, CONFIG), "nf4")
    adapted = perturbed(adapted)
    assert not quantised_of(MODULE)
    assert quantised_of(adapted) >= MATRICES
    assert isinstance(adapted.running.get_value(), jax.Array)
    adapted.on_dense = "error"
    merged = tied_lora.nnx.merge(adapted)
    assert not quantised_of(merged)
    expected = merged(TOKENS)
    np.testing.assert_allclose(adapted(TOKENS), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        nnx.jit(lambda module, x: module(x))(adapted, TOKENS), expected, rtol=1e-5, atol=1e-5
    )
    assert quantised_of(adapted) >= MATRICES  # what came back is what went in
    served = {r.site.leaf: r.served for r in tied_lora.nnx.explain(adapted, TOKENS).reads}
    served = {path.replace("head", "embed"): how for path, how in served.items()}
    assert served == dict.fromkeys(MATRICES, "low rank") | {"down/kernel": "quantised"}
    assert tied_lora.nnx.trace(adapted, TOKENS) == tied_lora.nnx.trace(MODULE, TOKENS)


def test_training_and_the_way_there_and_back():
    adapted = tied_lora.nnx.wrap(tied_lora.nnx.quantize(MODULE), CONFIG)
    before = tied_lora.nnx.params(adapted)
    optimizer = nnx.Optimizer(adapted, optax.sgd(1e-3), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(adapted, optimizer):
        def loss(adapted):
            return jnp.mean(jnp.square(adapted(TOKENS) - 1))

        found, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
        optimizer.update(adapted, grads)
        return found

    losses = [step(adapted, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    after = tied_lora.nnx.params(adapted)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    again = tied_lora.nnx.from_adapted(MODULE, tied_lora.nnx.adapted(adapted))
    assert quantised_of(again) == quantised_of(adapted) >= MATRICES
    np.testing.assert_array_equal(again(TOKENS), adapted(TOKENS))


def test_what_is_no_params_is_refused():
    for module in (MODULE, tied_lora.nnx.wrap(MODULE, CONFIG)):
        with pytest.raises(TypeError, match=r"an nnx.Module, .* use flax_tied_lora.nnx.quantize"):
            tied_lora.quantize(module)
    with pytest.raises(TypeError, match=r"quantize: expected an nnx.Module, got dict"):
        tied_lora.nnx.quantize({})
    with pytest.raises(ValueError, match="is quantised already"):
        tied_lora.nnx.quantize(tied_lora.nnx.quantize(MODULE))

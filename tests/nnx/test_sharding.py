"""FSDP through NNX on eight devices: the single-device result, and all is where its leaf is."""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.collectives import Collective, collectives
from tests.helpers.nnx_models import loss, wrapped

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Adam's own code wants it.

VOCAB, WIDTH, INNER = 192, 16, 32
TOKENS = np.arange(8 * 6, dtype=np.int32).reshape(8, 6) * 5 % VOCAB
TABLE = "embed_tokens/embedding"
STEPS, RANK = 3, 2


class Model(nnx.Module):
    """A tied decoder of one layer; positions are trained whole, so that gradients reach rows."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(8, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)

    def __call__(self, tokens: Any) -> jax.Array:
        x = self.embed_tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        x = x + self.down(jnp.tanh(self.up(x)))
        return self.embed_tokens.attend(x / WIDTH**0.5)


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def place(x: Any) -> Any:
    """Returns an array split along its longer axis; whole, if it is a vector."""
    spec = [None] * x.ndim
    if x.ndim == 2:
        spec[int(x.shape[0] < x.shape[1])] = "data"
    return jax.device_put(x, jax.NamedSharding(mesh(), jax.P(*spec)))


def adapted(*, sharded: bool, table: bool = True) -> Any:
    """Returns the model, wrapped, its params placed before."""
    graphdef, state = nnx.split(Model(nnx.Rngs(0)))
    module = nnx.merge(graphdef, jax.tree.map(place, state) if sharded else state)
    targets = ["up", "down", *["embed_tokens"] * table]
    model = tied_lora.nnx.wrap(module, tied_lora.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=targets, modules_to_save=["positions"]
    ))  # fmt: skip
    # No delta is zero; what `wrap` placed stays there.
    noise = nnx.state(wrapped(Model(nnx.Rngs(0)), targets, modules_to_save=["positions"]),
                      nnx.LoRAParam)  # fmt: skip
    own = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), noise, own))
    return model


def tokens() -> Any:
    return jax.device_put(TOKENS, jax.NamedSharding(mesh(), jax.P("data")))


def places(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def trained(model: Any, tokens: Any) -> tuple[list[float], Any]:
    """Returns the losses, and the optimizer; the step is that of docs/nnx.md."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    own = places(nnx.state(model, nnx.LoRAParam))

    @nnx.jit
    def step(model: Any, optimizer: Any, tokens: Any) -> jax.Array:
        trainable = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=trainable)(model, tokens)
        optimizer.update(model, jax.lax.with_sharding_constraint(grads, own))
        return value

    return [float(step(model, optimizer, tokens)) for _ in range(STEPS)], optimizer


@pytest.fixture(scope="module")
def both() -> Any:
    """Losses, model and optimizer on one device, then on eight, and where its arrays were."""
    with jax.numpy_dtype_promotion("standard"):
        one, eight = adapted(sharded=False), adapted(sharded=True)
        before = places(nnx.state(eight))
        return (one, *trained(one, TOKENS)), (eight, *trained(eight, tokens())), before


def test_values_are_those_of_one_device(both):
    (one, losses, _), (eight, found, _), _ = both
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert losses[-1] < losses[0]
    for a, b in zip(
        jax.tree.leaves(nnx.state(eight)), jax.tree.leaves(nnx.state(one)), strict=True
    ):
        # Adam's steps go by the sign where a gradient is near nothing.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_everything_is_where_its_leaf_is(both):
    _, (model, _, optimizer), before = both
    factors = model.adapters["lora"][TABLE]
    assert {s.data.shape for s in factors["lora_a"].get_value().addressable_shards} == {
        (VOCAB // 8, RANK)
    }
    own = nnx.state(model, nnx.LoRAParam, nnx.Param)
    old = nnx.filter_state(before, nnx.LoRAParam, nnx.Param)
    for x, sharding in zip(jax.tree.leaves(own), jax.tree.leaves(old), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    factors, state = jax.tree.leaves(nnx.state(model, nnx.LoRAParam)), optimizer.opt_state[0]
    for moments in (state.mu, state.nu):
        for x, factor in zip(jax.tree.leaves(moments), factors, strict=True):
            assert x.sharding.is_equivalent_to(factor.sharding, x.ndim)


def test_nothing_of_the_tables_size_is_exchanged_for_its_adapter():
    def exchanged(table: bool) -> collections.Counter[Collective]:
        graphdef, factors, rest = nnx.split(adapted(sharded=True, table=table), nnx.LoRAParam, ...)

        def gradient(factors: Any, rest: Any, tokens: Any) -> Any:
            return jax.grad(lambda x: loss(nnx.merge(graphdef, x, rest), tokens))(factors)

        run = jax.jit(gradient, out_shardings=places(factors))
        program = run.lower(factors, rest, tokens()).compile()
        return collections.Counter(collectives(program))

    theirs, ours = exchanged(False), exchanged(True)
    assert not [c for c in (ours - theirs).elements() if c.size >= VOCAB * WIDTH / 8]
    more = sum(c.bytes for c in ours.elements()) - sum(c.bytes for c in theirs.elements())
    # The bound of `test_collectives.py`, in float32.
    assert 0 < more <= 4 * RANK * (4 * (VOCAB + WIDTH) + 10 * TOKENS.size)

"""`nnx.step`: what it writes, state that moves, dropout, meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.nnx_models import TOKENS, Head, SharedVariable, Stacked, wrapped

pytestmark = pytest.mark.usefixtures("standard_promotion")
OPTIMIZER = optax.adam(0.05)


def loss_fn(model, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(
        model(tokens), jnp.asarray(tokens)
    ).mean()


def adapted(**options):
    return wrapped(SharedVariable(nnx.Rngs(0)), ["lm_head", "up"], **options)


@nnx.jit
def by_hand(model, optimizer, tokens):
    trained = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=trained)(model, tokens)
    optimizer.update(model, grads)
    return loss


def run(step, model, steps=3):
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)
    return [float(step(model, optimizer, TOKENS)) for _ in range(steps)]


def test_it_trains_as_a_loop_by_hand():
    ours, theirs = adapted(), adapted()
    np.testing.assert_allclose(
        run(tied_lora.nnx.step(loss_fn), ours), run(by_hand, theirs), rtol=1e-5
    )
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class Large(nnx.Module):
    def __init__(self, rngs):
        self.embed_tokens = nnx.Embed(4096, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.lm_head = Head(self.embed_tokens.embedding)

    def __call__(self, tokens):
        return self.lm_head(self.norm(self.embed_tokens(tokens)))


@pytest.mark.parametrize("how", ["nnx.step", "graph_updates"])
def test_the_frozen_params_are_neither_written_nor_touched(how):
    model = tied_lora.nnx.wrap(
        Large(nnx.Rngs(0)), tied_lora.LoraConfig(r=1, target_modules=["lm_head"])
    )
    model.train()
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)
    table = model.module.embed_tokens.embedding.get_value()
    own = nnx.jit(by_hand.fun, graph_updates=False)
    step = tied_lora.nnx.step(loss_fn) if how == "nnx.step" else own
    report = step.lower(model, optimizer, TOKENS).compile().memory_analysis()
    assert report.output_size_in_bytes < table.nbytes / 2
    copied = by_hand.lower(model, optimizer, TOKENS).compile().compiled.memory_analysis()
    assert copied.output_size_in_bytes > table.nbytes  # what is not to be
    step(model, optimizer, TOKENS)
    assert model.module.embed_tokens.embedding.get_value() is table


def test_state_of_the_module_moves():
    net = Stacked(nnx.Rngs(0), remat=True)
    sites = tied_lora.nnx.trace(net, TOKENS)
    model = wrapped(net, ["embed_tokens", "lin"], sites=sites, lora_dropout=0.1)
    model.train()
    mean = model.layers.norm.mean.get_value()
    losses = run(tied_lora.nnx.step(loss_fn), model, 6)
    assert losses[-1] < losses[0]
    assert np.all(model.layers.norm.mean[...] != mean)
    np.testing.assert_array_equal(model.layers.dropout.rngs.count[...], [6, 6, 6])
    assert model.lora_dropout.rngs.count[...] == 6


def test_auxiliary_values_and_keyword_arguments():
    def with_aux(model, tokens, *, scale):
        return scale * loss_fn(model, tokens), {"scale": scale}

    model = adapted()
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)
    expected = float(loss_fn(model, TOKENS))
    loss, aux = tied_lora.nnx.step(with_aux, has_aux=True)(model, optimizer, TOKENS, scale=2.0)
    assert float(loss) == pytest.approx(2 * expected, rel=1e-5)
    assert aux == {"scale": 2.0}


def test_dropout_that_is_not_on_is_said():
    model, step = adapted(lora_dropout=0.5), tied_lora.nnx.step(loss_fn)
    text = r"nnx.step: the config has lora_dropout=0.5, and no dropout is on: adapted.train\(\)"
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)
    with pytest.warns(tied_lora.NoDropoutWarning, match=text) as caught:
        step(model, optimizer, TOKENS)
    assert [w.filename for w in caught] == [__file__]
    model.train()
    step(model, optimizer, TOKENS)


def test_on_a_mesh_factors_stay_where_they_are():
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("m",), axis_types=axes, devices=jax.devices()[:4])
    model = adapted()
    expected = run(by_hand, adapted())
    own = nnx.state(model, nnx.LoRAParam)
    table = model.adapters["lora"]["embed_tokens/embedding"]["lora_a"].get_value()
    split = jax.NamedSharding(mesh, jax.P("m"))
    places = jax.tree.map(
        lambda x: split if x.shape == table.shape else jax.NamedSharding(mesh, jax.P()), own
    )
    nnx.update(model, jax.tree.map(jax.device_put, own, places))
    np.testing.assert_allclose(run(tied_lora.nnx.step(loss_fn), model), expected, rtol=1e-5)
    after = nnx.state(model, nnx.LoRAParam)
    for x, place in zip(*map(jax.tree.leaves, (after, places)), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)


def test_what_is_refused():
    with pytest.raises(TypeError, match="step: loss_fn is a int; expected a function"):
        tied_lora.nnx.step(3)
    with pytest.raises(TypeError, match=r"nnx.step: found a \w+ and a NoneType; expected an adap"):
        tied_lora.nnx.step(loss_fn)(adapted(), None)

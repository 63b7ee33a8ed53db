"""`train.step`: what it writes, whom it gives memory to, dropout, meshes, Optax's optimizers."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import train
from tests.helpers.small_models import TOKENS, TiedLM, init, randomised

# Optax relies on JAX's usual promotion itself.
pytestmark = pytest.mark.usefixtures("standard_promotion")

MODEL = TiedLM()
PARAMS = init(MODEL)
APPLY = tied_lora.adapt(MODEL.apply, on_dense="error")


def fresh(params=PARAMS, **fields):
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens", "up"], **fields)
    adapted = tied_lora.wrap(params, config)
    return adapted.replace(adapters=randomised(adapted.adapters, 3))


def loss_fn(adapted, tokens, scale=1.0):
    logits = APPLY({"params": adapted}, tokens)
    return scale * optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def by_hand(optimizer, adapted, steps):
    """Returns adapters and losses of a loop in which nothing is compiled by this library."""
    state, losses = optimizer.init(adapted.adapters), []
    for _ in range(steps):
        loss, grads = jax.jit(tied_lora.value_and_grad(loss_fn))(adapted, TOKENS)
        updates, state = jax.jit(optimizer.update)(grads, state, adapted.adapters)
        adapted = adapted.replace(adapters=optax.apply_updates(adapted.adapters, updates))
        losses.append(float(loss))
    return adapted.adapters, losses


def fit(optimizer, adapted, steps, **options):
    step = train.step(loss_fn, optimizer, **options)
    state, losses = optimizer.init(adapted.adapters), []
    for _ in range(steps):
        adapted, state, loss = step(adapted, state, TOKENS)
        losses.append(float(loss))
    return adapted, state, losses


@pytest.mark.parametrize("optimizer", [
    optax.adamw(0.1), optax.MultiSteps(optax.adam(0.1), 2),
    optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    optax.contrib.schedule_free_adamw(0.1),
], ids=["adamw", "MultiSteps", "inject_hyperparams", "schedule_free"])  # fmt: skip
def test_it_trains_as_a_loop_by_hand(optimizer):
    adapters, losses = by_hand(optimizer, fresh(), 4)
    adapted, _, found = fit(optimizer, fresh(), 4)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    chex.assert_trees_all_close(adapted.adapters, adapters, rtol=1e-3, atol=1e-4)
    assert found[-1] < found[0]


@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(), optax.lbfgs()], ids=["polyak", "lbfgs"])
@pytest.mark.parametrize("has_aux", [False, True])
def test_optimizers_that_ask_for_the_loss(optimizer, has_aux):
    loss = (lambda a, t: (loss_fn(a, t), None)) if has_aux else loss_fn
    step, adapted = train.step(loss, optimizer, has_aux=has_aux), fresh()
    state, losses = optimizer.init(adapted.adapters), []
    for _ in range(3):
        adapted, state, value = step(adapted, state, TOKENS)
        losses.append(float(value[0] if has_aux else value))
    assert losses[-1] < losses[0]


def test_anything_with_init_and_update_is_an_optimizer():
    class Sgd:
        def init(self, adapters):
            return ()

        def update(self, grads, state, adapters):
            return jax.tree.map(lambda g: -0.1 * g, grads), state

    found, _, _ = fit(Sgd(), fresh(), 2)
    expected, _, _ = fit(optax.sgd(0.1), fresh(), 2)
    chex.assert_trees_all_close(found.adapters, expected.adapters, rtol=1e-6)


def test_the_frozen_params_are_neither_written_nor_touched():
    table = jax.random.normal(jax.random.key(0), (32768, 16))
    adapted = tied_lora.wrap(
        {"embed": {"embedding": table}}, tied_lora.LoraConfig(r=1, target_modules=["embed"])
    )
    apply = tied_lora.adapt(lambda params, ids: jnp.tanh(params["embed"]["embedding"][ids]).sum())
    step, optimizer = train.step(apply, optax.sgd(0.1)), optax.sgd(0.1)
    state = optimizer.init(adapted.adapters)
    report = step.lower(adapted, state, jnp.arange(4)).compile().memory_analysis()
    assert report.output_size_in_bytes < table.nbytes / 2
    assert report.alias_size_in_bytes > 0.9 * report.output_size_in_bytes  # donated
    after, _, _ = step(adapted, state, jnp.arange(4))
    assert after.params["embed"]["embedding"] is table
    assert after.plan is adapted.plan
    assert all(after.scaling[key] is scalar for key, scalar in adapted.scaling.items())


def test_it_is_compiled_once():
    traces = []

    def counted(adapted, tokens):
        traces.append(tokens)
        return loss_fn(adapted, tokens)

    adapted, optimizer = fresh(), optax.adam(0.1)
    step, state = train.step(counted, optimizer), optimizer.init(adapted.adapters)
    for _ in range(3):
        adapted, state, _ = step(adapted, state, TOKENS)
    assert len(traces) == 1


def test_auxiliary_values_and_keyword_arguments():
    def with_aux(adapted, tokens, *, scale):
        return loss_fn(adapted, tokens, scale), {"scale": scale}

    adapted, optimizer = fresh(), optax.sgd(0.1)
    step, state = train.step(with_aux, optimizer, has_aux=True), optimizer.init(adapted.adapters)
    expected = float(loss_fn(adapted, TOKENS))
    adapted, state, (loss, aux) = step(adapted, state, TOKENS, scale=2.0)
    assert float(loss) == pytest.approx(2 * expected, rel=1e-5)
    assert aux == {"scale": 2.0}


# Memory that is given away


def test_what_was_given_to_a_step_is_gone_and_says_so():
    first, optimizer = fresh(), optax.adam(0.1)
    step, start = train.step(loss_fn, optimizer), optimizer.init(first.adapters)
    second, state, _ = step(first, start, TOKENS)
    with pytest.raises(ValueError, match=r"given to an earlier step.*state, loss = step\(adapted"):
        step(first, state, TOKENS)
    with pytest.raises(ValueError, match="given to an earlier step"):
        step(second, start, TOKENS)
    for use in (lambda: loss_fn(first, TOKENS), lambda: tied_lora.merge(first)):
        with pytest.raises(ValueError, match=r"donated to a training step.*donate=False"):
            use()
    step(second, state, TOKENS)


def test_nothing_is_given_away_unless_asked():
    adapted = fresh()
    once, _, losses = fit(optax.adam(0.1), adapted, 2, donate=False)
    again, _, same = fit(optax.adam(0.1), adapted, 2, donate=False)
    assert losses == same
    chex.assert_trees_all_equal(once.adapters, again.adapters)


def test_a_copy_that_is_the_frozen_leaf_itself_is_kept():
    config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens"], modules_to_save=["up"])
    adapted = tied_lora.wrap(PARAMS, config)
    own = dict.fromkeys(adapted.adapters["modules_to_save"])
    own = {key: PARAMS["up"][key.split("/")[-1]] for key in own}
    adapted = adapted.replace(adapters={**adapted.adapters, "modules_to_save": own})
    after, _, _ = fit(optax.sgd(0.1), adapted, 2)
    assert not PARAMS["up"]["kernel"].is_deleted()
    assert np.any(after.adapters["modules_to_save"]["up/kernel"] != PARAMS["up"]["kernel"])


# Dropout


def test_every_step_has_masks_of_its_own():
    adapted = fresh(lora_dropout=0.5).train(jax.random.key(0))
    step, optimizer = train.step(loss_fn, optax.sgd(0.0)), optax.sgd(0.0)  # nothing moves
    state, losses, keys = optimizer.init(adapted.adapters), [], []
    for _ in range(3):
        keys.append(jax.random.key_data(adapted.rng).tobytes())
        adapted, state, loss = step(adapted, state, TOKENS)
        losses.append(float(loss))
    assert len(set(losses)) == len(set(keys)) == 3


def test_the_same_key_gives_the_same_run_and_the_callers_key_stays():
    key = jax.random.key(7)
    runs = [fit(optax.adam(0.1), fresh(lora_dropout=0.5).train(key), 3)[2] for _ in range(2)]
    assert runs[0] == runs[1]
    assert not key.is_deleted()
    assert runs[0] != fit(optax.adam(0.1), fresh(lora_dropout=0.5).train(jax.random.key(8)), 3)[2]


def test_a_run_goes_on_from_its_key():
    whole = fit(optax.adam(0.1), fresh(lora_dropout=0.5).train(jax.random.key(1)), 4)[2]
    optimizer, adapted = optax.adam(0.1), fresh(lora_dropout=0.5).train(jax.random.key(1))
    adapted, state, first = fit(optimizer, adapted, 2)
    kept = adapted.rng, adapted.eval()
    adapted, step = kept[1].train(kept[0]), train.step(loss_fn, optimizer)
    for expected in whole[2:]:
        adapted, state, loss = step(adapted, state, TOKENS)
        assert float(loss) == expected
    assert first == whole[:2]


def test_dropout_that_is_not_on_is_said():
    adapted, optimizer = fresh(lora_dropout=0.5), optax.sgd(0.1)
    step, state = train.step(loss_fn, optimizer), optimizer.init(adapted.adapters)
    text = r"step: the config has lora_dropout=0.5, and no dropout is on: adapted.train\(key\)"
    with pytest.warns(tied_lora.NoDropoutWarning, match=text) as caught:
        adapted, state, _ = step(adapted, state, TOKENS)
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(tied_lora.NoDropoutWarning, match="value_and_grad: the config") as caught:
        tied_lora.value_and_grad(loss_fn)(adapted, TOKENS)
    assert [w.filename for w in caught] == [__file__]
    step(adapted.train(jax.random.key(0)), state, TOKENS)  # and neither of these
    tied_lora.value_and_grad(loss_fn)(fresh(), TOKENS)


# Meshes


@pytest.mark.parametrize("spec", [("m", None), (None, "m"), ()])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_everything_stays_and_one_program_is_compiled(spec, kind):
    axes = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((4,), ("m",), axis_types=axes, devices=jax.devices()[:4])
    whole, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P(*spec))
    table = jax.random.normal(jax.random.key(0), (12, 8))
    params = {"embed": jax.device_put(table, split)}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=2, target_modules=["embed"]))
    adapted = adapted.replace(adapters=jax.tree.map(
        lambda x, new: jax.device_put(new, x.sharding),
        adapted.adapters, randomised(adapted.adapters, 1),
    ))  # fmt: skip
    traces = []

    def loss(adapted, ids, place=None):
        def model(params, ids):
            return jnp.square(params["embed"].at[ids].get(out_sharding=place)).sum()

        traces.append(ids)
        return tied_lora.adapt(model)(adapted, ids)

    place = whole if kind == "Explicit" else None
    optimizer = optax.adam(0.1)
    adapters, scaling = jax.tree.map(
        jnp.asarray, jax.device_get((adapted.adapters, adapted.scaling))
    )
    plain = adapted.replace(params={"embed": table}, adapters=adapters, scaling=scaling)
    with jax.set_mesh(mesh):
        step = train.step(functools.partial(loss, place=place), optimizer)
        state = optimizer.init(adapted.adapters)
        before = jax.tree.map(lambda x: x.sharding, adapted.adapters)
        for _ in range(3):
            adapted, state, value = step(adapted, state, jnp.arange(6))
        assert jax.tree.map(lambda x: x.sharding, adapted.adapters) == before
        assert jax.tree.map(lambda x: x.sharding, state[0].mu) == before
        assert len(traces) == 1
    expected, state = train.step(loss, optimizer), optimizer.init(plain.adapters)
    for _ in range(3):
        plain, state, wanted = expected(plain, state, jnp.arange(6))
    np.testing.assert_allclose(value, wanted, rtol=1e-4)


# What is refused


def test_what_is_refused():
    with pytest.raises(TypeError, match="step: loss_fn is a int; expected a function"):
        train.step(3, optax.sgd(0.1))
    with pytest.raises(TypeError, match="step: the optimizer is a float; expected one of Optax"):
        train.step(loss_fn, 0.1)
    with pytest.raises(TypeError, match="step: the first argument is a dict; expected an Adapted"):
        train.step(loss_fn, optax.sgd(0.1))({}, None, TOKENS)

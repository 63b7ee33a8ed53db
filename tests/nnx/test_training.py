"""Training an adapted `nnx.Module`, in each idiom that people write; and what is saved of it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora import checkpoint, peft
from flax_tied_lora.names import names_of
from tests.helpers.nnx_models import TOKENS, SharedVariable, Stacked, Stateful, loss, wrapped

STEPS = 4
TRAINABLE = nnx.DiffState(0, nnx.LoRAParam)
OPTIMIZER = optax.sgd(0.1)  # Adam's own code wants JAX's usual promotion.


@functools.cache
def module() -> SharedVariable:
    return SharedVariable(nnx.Rngs(0))


def adapted(**options):
    return wrapped(module(), ["lm_head", "up"], **options)


def factors(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


@functools.cache
def expected():
    """Losses and factors of a loop over the plain `Adapted` of the core, with Optax."""
    core = tied_lora.nnx.adapted(adapted())
    graphdef, _ = nnx.split(module())
    # The core's params have both paths of the shared Variable; the graph knows one.
    shapes = nnx.state(module(), nnx.Param)

    def core_loss(params, tokens):
        state = jax.tree.unflatten(
            jax.tree.structure(shapes),
            [params["embed_tokens"]["embedding"], params["up"]["bias"], params["up"]["kernel"]],
        )
        return loss(nnx.merge(graphdef, state), tokens)

    grad = jax.jit(tied_lora.value_and_grad(tied_lora.adapt(core_loss)))
    state, losses = OPTIMIZER.init(core.adapters), []
    for _ in range(STEPS):
        value, grads = grad(core, TOKENS)
        updates, state = OPTIMIZER.update(grads, state)
        core = core.replace(adapters=optax.apply_updates(core.adapters, updates))
        losses.append(float(value))
    return losses, core.adapters


def check(losses, model_factors):
    wanted, wanted_factors = expected()
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert losses[-1] < losses[0]
    for a, b in zip(
        jax.tree.leaves(model_factors["adapters"]), jax.tree.leaves(wanted_factors), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@nnx.jit
def step(model, optimizer, tokens):
    value, grads = nnx.value_and_grad(loss, argnums=TRAINABLE)(model, tokens)
    optimizer.update(model, grads)
    return value


class TestLoops:
    def test_nnx_jit_and_optimizer(self):
        model = adapted()
        frozen = jax.tree.map(jnp.copy, nnx.state(model.module))
        optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)

        check([float(step(model, optimizer, TOKENS)) for _ in range(STEPS)], factors(model))
        for a, b in zip(
            jax.tree.leaves(nnx.state(model.module)), jax.tree.leaves(frozen), strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_model_and_optimizer_in_one(self):
        both = nnx.ModelAndOptimizer(adapted(), OPTIMIZER, wrt=nnx.LoRAParam)

        @nnx.jit
        def step_of_both(both, tokens):
            value, grads = nnx.value_and_grad(loss, argnums=TRAINABLE)(both.model, tokens)
            both.update(grads)
            return value

        check([float(step_of_both(both, TOKENS)) for _ in range(STEPS)], factors(both.model))

    def test_a_graph_that_is_cached(self):
        model = adapted()
        optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)
        cached = nnx.cached_partial(step, model, optimizer)
        check([float(cached(TOKENS)) for _ in range(STEPS)], factors(model))

    def test_steps_in_one_scan(self):
        model = adapted()
        optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)

        @nnx.jit
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def steps(carry, tokens):
            return carry, step(*carry, tokens)

        _, losses = steps((model, optimizer), jnp.stack([jnp.asarray(TOKENS)] * STEPS))
        check(losses.tolist(), factors(model))

    def test_split_and_merge_with_optax(self):
        model = adapted()
        graphdef, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)
        state = OPTIMIZER.init(trainable)

        @jax.jit
        def step(trainable, state, frozen, tokens):
            def of_factors(trainable):
                return loss(nnx.merge(graphdef, trainable, frozen), tokens)

            value, grads = jax.value_and_grad(of_factors)(trainable)
            updates, state = OPTIMIZER.update(grads, state)
            return optax.apply_updates(trainable, updates), state, value

        losses = []
        for _ in range(STEPS):
            trainable, state, value = step(trainable, state, frozen, TOKENS)
            losses.append(float(value))
        nnx.update(model, trainable)
        check(losses, factors(model))

    def test_nnx_grad_without_jit(self):
        model = adapted()
        grads = nnx.grad(loss, argnums=TRAINABLE)(model, TOKENS)
        jitted = nnx.jit(nnx.grad(loss, argnums=TRAINABLE))(model, TOKENS)
        assert set(nnx.to_pure_dict(grads)) == {"adapters"}
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(jitted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    def test_plain_functions_of_a_state(self):
        graphdef, state = nnx.split(module())
        config = tied_lora.LoraConfig(r=2, target_modules=["embed_tokens"])
        core = tied_lora.wrap(state, config)
        apply = tied_lora.adapt(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
        np.testing.assert_allclose(apply(core, TOKENS), module()(TOKENS), atol=1e-6)

    def test_stacked_layers_with_state(self):
        """Factors, running statistics and random streams of stacked layers move in one step."""
        net = Stacked(nnx.Rngs(0), remat=True)
        sites = tied_lora.nnx.trace(net, TOKENS)
        model = wrapped(net, ["embed_tokens", "lin"], sites=sites, lora_dropout=0.1)
        model.train()
        optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)

        kernel, mean = model.layers.lin.kernel.get_value(), model.layers.norm.mean.get_value()
        losses = [float(step(model, optimizer, TOKENS)) for _ in range(6)]
        assert losses[-1] < losses[0]
        np.testing.assert_array_equal(model.layers.lin.kernel[...], kernel)
        assert np.all(model.layers.norm.mean[...] != mean)
        np.testing.assert_array_equal(model.layers.dropout.rngs.count[...], [6, 6, 6])
        assert model.lora_dropout.rngs.count[...] == 6
        assert model.adapters["lora"]["layers/lin/kernel"]["lora_a"].shape == (3, 8, 2)
        tied_lora.nnx.explain(model, TOKENS).assert_tied()


class TestStored:
    def test_orbax_saves_only_the_factors(self, tmp_path):
        model, other = adapted(), tied_lora.nnx.wrap(module(), adapted().plan.config)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "factors", nnx.state(model, nnx.LoRAParam))
            checkpointer.wait_until_finished()
            names = ocp.PyTreeCheckpointer().metadata(tmp_path / "factors").item_metadata.tree
            assert set(names) == {"adapters"}
            template = nnx.state(nnx.eval_shape(lambda: other), nnx.LoRAParam)
            nnx.update(other, checkpointer.restore(tmp_path / "factors", template))
        assert jax.tree.all(jax.tree.map(np.array_equal, factors(other), factors(model)))

    def test_checkpoint_with_optimizer_state(self, tmp_path):
        model = adapted(lora_dropout=0.1)
        core = tied_lora.nnx.adapted(model)
        state = OPTIMIZER.init(core.adapters)
        checkpoint.save(tmp_path / "adapter", core, opt_state=state, step=3)
        restored = checkpoint.restore(
            tmp_path / "adapter", tied_lora.nnx.params(module()), opt_state=OPTIMIZER
        )
        other = tied_lora.nnx.from_adapted(module(), restored.adapted)
        assert other.plan is model.plan
        assert nnx.graphdef(other) == nnx.graphdef(model)
        assert jax.tree.all(jax.tree.map(np.array_equal, factors(other), factors(model)))

    def test_peft_round_trip(self, tmp_path):
        """By the paths of both of the Variable's names, as PyTorch has two modules for them."""
        names = names_of(None, [
            ("embed_tokens/embedding", "model.embed_tokens.weight", None, "embedding"),
            ("lm_head/embedding", "lm_head.weight", None, "linear"),
            ("up/kernel", "model.up.weight", None, "linear"),
            ("up/bias", "model.up.bias"),
        ])  # fmt: skip
        model = adapted(ensure_weight_tying=True)
        peft.save_adapter(tmp_path / "peft", tied_lora.nnx.adapted(model), names)
        loaded = peft.load_adapter(tmp_path / "peft", tied_lora.nnx.params(module()), names)
        other = tied_lora.nnx.from_adapted(module(), loaded)
        for a, b in zip(jax.tree.leaves(factors(other)), jax.tree.leaves(factors(model)),
                        strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)


class TestAdaptedAndBack:
    def test_arithmetic(self):
        model = adapted()
        core = tied_lora.nnx.adapted(model)
        doubled = core.replace(scaling={k: 2 * v for k, v in core.scaling.items()})
        other = tied_lora.nnx.from_adapted(model, doubled)
        assert all(other.lora_scaling[k][...] == v for k, v in doubled.scaling.items())
        base, one, two = (m(TOKENS) for m in (model.module.encode, model.encode, other.encode))
        assert np.abs(one - base).max() > 0.1
        assert np.abs(two - one).max() > 0.1

    def test_dropout_of_the_factors(self):
        model = wrapped(Stateful(nnx.Rngs(0)), ["lin"], lora_dropout=0.5)
        layer = nnx.jit(lambda model, x: model.layers[0].lin(x))
        x = jnp.ones((2, 8))
        still = layer(model, x)
        np.testing.assert_array_equal(layer(model, x), still)
        model.train()
        first, second = layer(model, x), layer(model, x)
        assert np.abs(first - second).max() > 1e-3
        model.train(jax.random.key(7))
        third = layer(model, x)
        model.train(jax.random.key(7))
        np.testing.assert_array_equal(layer(model, x), third)
        quiet = nnx.view(model, deterministic=True)
        assert quiet.lora_dropout.deterministic
        assert not model.lora_dropout.deterministic
        model.eval()
        np.testing.assert_array_equal(layer(model, x), still)

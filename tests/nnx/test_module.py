"""An adapted module: the merged one's results, and its attributes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.nnx_models import (
    CONFIG,
    TOKENS,
    VOCAB,
    WIDTH,
    SharedVariable,
    Stateful,
    adapted,
    close,
    loss,
    shared_variable,
    wrapped,
)
from tests.helpers.small_models import randomised


class TestOracle:
    """An adapted module equals the merged one, values and gradients."""

    def test_values_and_gradients(self):
        model = adapted()
        trainable = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=trainable)(model, TOKENS)

        def merged_loss(factors):
            nnx.update(own := nnx.clone(model), factors)
            return loss(tied_lora.nnx.merge(own), TOKENS)

        expected = jax.value_and_grad(merged_loss)(nnx.state(model, nnx.LoRAParam))
        close((value, grads), expected)
        # One array for each factor of a tie: the sum over both uses of the table.
        shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(grads)["adapters"]["lora"])
        assert shapes == {
            "embed_tokens/embedding": {"lora_a": (VOCAB, 2), "lora_b": (2, WIDTH)},
            "up/kernel": {"lora_a": (WIDTH, 2), "lora_b": (2, WIDTH)},
        }

    @pytest.mark.parametrize(
        "options",
        [
            {"modules_to_save": ["up"], "target_modules": ["lm_head"]},
            {"trainable_token_indices": {"lm_head": [1, 2]}, "target_modules": ["up"]},
            {"bias": "all"},
            {"use_dora": True},
            {"init_lora_weights": "pissa"},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_every_kind_of_adapter_is_a_lora_param(self, options):
        module = shared_variable()
        config = tied_lora.LoraConfig(**{"r": 2, "target_modules": ["lm_head", "up"], **options})
        model = tied_lora.nnx.wrap(module, config)
        close(model(TOKENS), module(TOKENS), 1e-4)
        kinds = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
        assert jax.tree.structure(kinds) == jax.tree.structure({"adapters": model_adapters(model)})
        nnx.update(model, randomised(nnx.state(model, nnx.LoRAParam), 1))
        close(model(TOKENS), tied_lora.nnx.merge(model)(TOKENS), 1e-4)

    def test_random_keys(self):
        one, two, three = (
            tied_lora.nnx.wrap(shared_variable(), CONFIG, rng=rng)
            for rng in (nnx.Rngs(3), nnx.Rngs(3)(), jax.random.key(4))
        )
        key = "up/kernel"
        a, b, c = (m.adapters["lora"][key]["lora_a"][...] for m in (one, two, three))
        np.testing.assert_array_equal(a, b)
        assert np.all(a != c)

    def test_the_module_given_is_left_alone(self):
        module = SharedVariable(nnx.Rngs(0))
        before, graphdef = nnx.state(module), nnx.graphdef(module)
        model = wrapped(module, ["lm_head", "up"], init_lora_weights="pissa")
        assert nnx.graphdef(module) == graphdef
        assert all(
            a is b
            for a, b in zip(
                jax.tree.leaves(nnx.state(module)), jax.tree.leaves(before), strict=True
            )
        )
        assert model.module.up.kernel is not module.up.kernel
        assert model.module.up.bias.get_value() is module.up.bias.get_value()


def model_adapters(model):
    return tied_lora.nnx.adapted(model).adapters


class TestAttributes:
    def test_methods_run_with_the_adapters(self):
        model = adapted()
        plain = tied_lora.nnx.merge(model)
        x = jnp.ones((2, WIDTH))
        close(model.encode(TOKENS), plain.encode(TOKENS))
        close(model.embed_tokens.attend(x), plain.embed_tokens.attend(x))
        close(model.up(x), plain.up(x))
        assert model.encode.__name__ == "encode"
        assert model.encode.__self__ is model

    def test_attributes_are_the_modules(self):
        model = adapted()
        assert model.config == ("tiny", VOCAB)
        assert model.embed_tokens.embedding is model.module.embed_tokens.embedding
        assert type(model.up.kernel) is nnx.Param
        model.config = "other"
        model.up.use_bias = "set"
        assert (model.module.config, model.module.up.use_bias) == ("other", "set")
        del model.config
        assert not hasattr(model, "config")
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = model.nothing
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = model.up.nothing

    def test_a_property_that_computes_with_weights(self):
        model = adapted()
        with pytest.warns(tied_lora.DensifyWarning, match="is handed back"):
            table = model.table
        close(table, tied_lora.nnx.merge(model).table)

    def test_submodules_in_containers(self):
        model = wrapped(Stateful(nnx.Rngs(0)), ["lin"])
        model.eval()
        plain = tied_lora.nnx.merge(model)
        x = y = jnp.ones((2, WIDTH))
        for layer, merged in zip(model.layers, plain.layers, strict=True):
            x, y = layer(x), merged(y)
        close(x, y)
        close(model.layers[-1:][0].lin(x), plain.layers[1].lin(x))
        assert "layers[0]" in repr(model.layers[0])

    def test_a_module_of_modules(self):
        model = adapted()
        outer = nnx.Sequential(model, lambda x: 2 * x)
        close(outer(TOKENS), 2 * model(TOKENS))
        assert list(nnx.to_pure_dict(nnx.state(outer, nnx.LoRAParam))["layers"]) == [0]

    def test_on_dense(self):
        class Odd(SharedVariable):
            def __call__(self, tokens):
                return super().__call__(tokens) + jnp.sum(jnp.sin(self.up.kernel[...]))

        model = wrapped(Odd(nnx.Rngs(0)), ["up"])
        with pytest.warns(tied_lora.DensifyWarning, match="'up/kernel' is read by 'sin'") as seen:
            model(TOKENS)
        assert seen[0].filename == __file__
        model.on_dense = "error"
        with pytest.raises(tied_lora.DensifyError):
            model(TOKENS)

    def test_an_adapter_that_is_not_used(self):
        model = wrapped(SharedVariable(nnx.Rngs(0)), ["up"])
        model.module.encode = model.module.embed_tokens
        with pytest.warns(tied_lora.UnreadTargetWarning, match="'up/kernel'") as seen:
            model(TOKENS)
        assert seen[0].filename == __file__

    @pytest.mark.filterwarnings("error::flax_tied_lora.UnreadTargetWarning")
    @pytest.mark.filterwarnings("ignore::flax_tied_lora.DensifyWarning")
    def test_a_weight_that_one_method_hands_out_and_another_takes(self):
        class Decoder(SharedVariable):
            def kernels(self):
                return [self.up.kernel[...]]

            def __call__(self, tokens, kernels=()):
                return self.embed_tokens(tokens) @ kernels[0]

        model = wrapped(Decoder(nnx.Rngs(0)), ["up"])
        merged = tied_lora.nnx.merge(model)
        expected = merged(TOKENS, merged.kernels())
        close(model(TOKENS, model.kernels()), expected)
        # Within jit it is a copy of the module that is called.
        close(nnx.jit(lambda m, *a: m(*a))(model, TOKENS, model.kernels()), expected)


def test_partition_names():
    with nnx.use_eager_sharding(False):
        init = nnx.with_partitioning(nnx.initializers.normal(), (None, "model"))
        module = nnx.Linear(4, 4, kernel_init=init, rngs=nnx.Rngs(0))
        model = tied_lora.nnx.wrap(
            module, tied_lora.LoraConfig(r=2, target_modules=["kernel"], use_dora=True)
        )
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model, nnx.LoRAParam)))
    assert specs["adapters"]["lora"]["kernel"] == {
        "lora_a": jax.P(None, None),
        "lora_b": jax.P(None, "model"),
        "lora_magnitude": jax.P("model"),
    }


def test_another_lora_in_the_module():
    """Flax's own factors are no targets; they stay, and are trained with ours."""

    class Own(SharedVariable):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.up = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)

    module = Own(nnx.Rngs(0))
    module.up.lora.lora_b.set_value(jnp.ones((2, WIDTH)))
    model = wrapped(module, ["lm_head", "up"])
    assert [g.key for g in model.plan.adapted] == ["embed_tokens/embedding", "up/kernel"]
    assert set(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))) == {"adapters", "module"}
    plain = tied_lora.nnx.merge(model)
    close(plain.up.lora.lora_b[...], model.module.up.lora.lora_b[...])
    close(model(TOKENS), plain(TOKENS))
    with pytest.raises(ValueError, match=r"'lora_a'.*names no leaf"):
        tied_lora.nnx.wrap(module, tied_lora.LoraConfig(r=2, target_modules=["lora_a"]))

"""`tied_lora.nnx`: ties in a module's graph, calls, attributes, conversions, bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora._tree.paths import flatten
from tests.helpers.nnx_models import (
    TOKENS,
    VOCAB,
    WIDTH,
    SharedModule,
    SharedVariable,
    Stateful,
    loss,
    wrapped,
)
from tests.helpers.small_models import randomised

CONFIG = tied_lora.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head", "up"])


@functools.cache
def shared_variable() -> SharedVariable:
    return SharedVariable(nnx.Rngs(0))


def adapted(**options):
    return wrapped(shared_variable(), ["lm_head", "up"], **options)


def close(found, expected, tolerance=2e-5):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


class TestTies:
    def test_two_paths_of_one_variable(self):
        model = adapted()
        group = model.plan.groups[0]
        assert {m.path for m in group.members} == {"embed_tokens/embedding", "lm_head/embedding"}
        assert group.key == "embed_tokens/embedding"
        assert list(model.adapters["lora"]) == [group.key, "up/kernel"]
        assert "lm_head/embedding" in str(model)
        by_other_name = wrapped(shared_variable(), ["embed_tokens", "up"])
        close(model(TOKENS), by_other_name(TOKENS))

    def test_shared_submodule(self):
        module = SharedModule(nnx.Rngs(0))
        model = wrapped(module, ["decoder.lm_head", "up"])
        paths = {m.path for m in model.plan.groups[0].members}
        assert paths == {"embed_tokens/embedding", "decoder/lm_head/embedding"}
        tied_lora.nnx.explain(model, TOKENS).assert_tied()
        plain = tied_lora.nnx.merge(model)
        assert plain.decoder.lm_head is plain.embed_tokens
        close(model(TOKENS), plain(TOKENS))

    def test_the_key_is_the_tables_path(self):
        """Not the first in the graph's order: call sites are shown by it, too."""

        class Other(nnx.Module):
            def __init__(self, rngs):
                self.embed_tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
                self.a_head = self.embed_tokens.embedding

            def __call__(self, tokens):
                return self.embed_tokens(tokens) @ self.a_head[...].T

        model = wrapped(Other(nnx.Rngs(0)), ["a_head"])
        assert list(model.adapters["lora"]) == ["embed_tokens/embedding"]
        explained = tied_lora.nnx.explain(model, TOKENS)
        explained.assert_tied()
        assert {r.site.leaf for r in explained.reads} == {"embed_tokens/embedding"}
        close(model(TOKENS), tied_lora.nnx.merge(model)(TOKENS))

    def test_every_path_and_cycles(self):
        class Cyclic(nnx.Module):
            def __init__(self, rngs):
                self.inner = nnx.Dict(linear=nnx.Linear(2, 2, rngs=rngs))
                self.twice = nnx.List([self.inner, self.inner])
                self.inner.parent = self
                self.weight = self.inner.linear.kernel

        found, _ = flatten(tied_lora.nnx.params(Cyclic(nnx.Rngs(0))))
        ways = ("inner/linear", "twice/0/linear", "twice/1/linear")
        assert set(found) == {f"{w}/{x}" for w in ways for x in ("kernel", "bias")} | {"weight"}
        assert len({id(x) for x in found.values()}) == 2

    def test_declared_tie_of_two_variables(self):
        class Untied(SharedVariable):
            def __init__(self, rngs):
                super().__init__(rngs)
                self.lm_head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

        module = Untied(nnx.Rngs(0))
        ties = [("embed_tokens/embedding", "lm_head/kernel")]
        model = wrapped(module, ["embed_tokens"], ties=ties)
        tied_lora.nnx.explain(model, TOKENS).assert_tied()
        plain, base = tied_lora.nnx.merge(model), tied_lora.nnx.base(model)
        close(plain.lm_head.kernel[...], plain.embed_tokens.embedding[...].T)
        close(base.lm_head.kernel[...], module.embed_tokens.embedding[...].T)
        close(model(TOKENS), plain(TOKENS))

    def test_abstract_module(self):
        module = nnx.eval_shape(lambda: SharedVariable(nnx.Rngs(0)))
        model = tied_lora.nnx.wrap(module, CONFIG)
        tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
        tied_lora.nnx.explain(model, tokens).assert_tied()
        assert len(model.plan.groups[0].members) == 2
        factors = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(factors))

    def test_separate_adapters_need_two_variables(self):
        config = tied_lora.LoraConfig(
            r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=False
        )
        module = SharedVariable(nnx.Rngs(0))
        with (
            pytest.warns(tied_lora.WeightTyingWarning),
            pytest.raises(ValueError, match=r"one nnx\.Variable.*nnx\.Param\(variable"),
        ):
            tied_lora.nnx.wrap(module, config)
        module.lm_head.embedding = nnx.Param(module.embed_tokens.embedding.get_value())
        with pytest.warns(tied_lora.WeightTyingWarning):
            model = tied_lora.nnx.wrap(module, config)
        nnx.update(model, randomised(nnx.state(model, nnx.LoRAParam), 1))
        plain = tied_lora.nnx.merge(model, untie={"lm_head": "lm_head/embedding"})
        assert plain.lm_head.embedding is not plain.embed_tokens.embedding
        close(model(TOKENS), plain(TOKENS))


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


class TestTraceAndExplain:
    def test_trace(self):
        sites = tied_lora.nnx.trace(shared_variable(), TOKENS)
        assert [s.role for s in sites.of("embed_tokens/embedding")] == ["lookup", "projection"]
        model = tied_lora.nnx.wrap(
            shared_variable(), tied_lora.LoraConfig(r=2, target_modules="all-linear"), sites=sites
        )
        assert [g.key for g in model.plan.adapted] == ["up/kernel"]
        assert tied_lora.nnx.trace(model, TOKENS) == sites

    def test_methods(self):
        model = adapted()
        reads = tied_lora.nnx.explain(model, TOKENS, method="encode").reads
        assert [r.site.leaf for r in reads] == ["embed_tokens/embedding", "up/kernel"]
        x = jnp.ones((1, WIDTH))
        for method in ("up", "up.__call__", lambda module, x: module.up(x)):
            (read,) = tied_lora.nnx.explain(model, x, method=method).reads
            assert read.served == "low rank"
            assert read.site.leaf == "up/kernel"

    def test_nothing_is_changed(self):
        module = Stateful(nnx.Rngs(0))
        model = wrapped(module, ["lin"])
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.RngCount, nnx.BatchStat))
        tied_lora.nnx.explain(model, TOKENS)
        tied_lora.nnx.trace(model, TOKENS)
        close(nnx.state(model, nnx.RngCount, nnx.BatchStat), before, 0)


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


class TestBadInput:
    @pytest.mark.parametrize("function", ["merge", "base", "adapted", "explain"])
    def test_not_adapted(self, function):
        with pytest.raises(TypeError, match=f"{function}: expected an AdaptedModule.*SharedVar"):
            getattr(tied_lora.nnx, function)(shared_variable())

    def test_not_a_module(self):
        with pytest.raises(TypeError, match=r"expected an nnx\.Module, got State"):
            tied_lora.nnx.wrap(nnx.state(shared_variable()), CONFIG)
        with pytest.raises(ValueError, match=r"Dropout has no nnx\.Param"):
            tied_lora.nnx.wrap(nnx.Dropout(0.5), CONFIG)
        with pytest.raises(TypeError, match="expected an Adapted"):
            tied_lora.nnx.from_adapted(shared_variable(), {})

    def test_adapted_already(self):
        with pytest.raises(TypeError, match=r"this module is adapted already.*nnx\.base"):
            tied_lora.nnx.wrap(adapted(), CONFIG)
        with pytest.raises(TypeError, match="'model' in this module is adapted already"):
            tied_lora.nnx.wrap(nnx.Dict(model=adapted()), CONFIG)

    def test_wrong_target_and_config(self):
        with pytest.raises(ValueError, match=r"'head'.*names no leaf"):
            tied_lora.nnx.wrap(
                shared_variable(), tied_lora.LoraConfig(r=2, target_modules=["head"])
            )
        with pytest.raises(TypeError, match="config is a dict"):
            tied_lora.nnx.wrap(shared_variable(), {})

    def test_what_needs_a_trace(self):
        config = tied_lora.LoraConfig(r=2, target_modules="all-linear")
        with pytest.raises(ValueError, match="all-linear") as error:
            tied_lora.nnx.wrap(shared_variable(), config)
        assert "tied_lora.nnx.trace(module, tokens)" in error.value.__notes__[0]

    def test_method(self):
        with pytest.raises(TypeError, match="method is a int"):
            tied_lora.nnx.explain(adapted(), TOKENS, method=3)
        with pytest.raises(TypeError, match="'config' of SharedVariable is no method"):
            tied_lora.nnx.trace(shared_variable(), TOKENS, method="config")

    def test_another_modules_adapted(self):
        ours = tied_lora.nnx.adapted(adapted())
        with pytest.raises(ValueError, match=r"no nnx\.Param at 'embed_tokens/embedding'"):
            tied_lora.nnx.from_adapted(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), ours)
        other = nnx.clone(shared_variable())
        other.up.kernel = nnx.Param(jnp.ones((WIDTH, 2)))
        with pytest.raises(ValueError, match=r"'up/kernel' is float32\[8, 8\]; the module has"):
            tied_lora.nnx.from_adapted(other, ours)

    def test_structure_changed_after_wrap(self):
        model = adapted()
        del model.module.up
        with pytest.raises(ValueError, match=r"no nnx\.Param at 'up/kernel' any more"):
            model(TOKENS)

    def test_untie_of_one_variable(self):
        with pytest.raises(ValueError, match="untie names 'lm_head'"):
            tied_lora.nnx.merge(adapted(), untie={"lm_head": "lm_head/embedding"})

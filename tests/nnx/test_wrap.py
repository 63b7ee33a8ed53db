"""Ties that a module's graph knows: two paths of one variable, a module in two places."""

from __future__ import annotations

import jax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora._tree.paths import flatten
from tests.helpers.nnx_models import (
    CONFIG,
    TOKENS,
    VOCAB,
    WIDTH,
    SharedModule,
    SharedVariable,
    adapted,
    close,
    shared_variable,
    wrapped,
)
from tests.helpers.small_models import randomised


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


class TestState:
    def test_what_is_no_factor_is_the_bases(self):
        """As tunix's ``is_sharing_backbone`` compares an actor with its reference."""
        module = shared_variable()
        model = wrapped(module, ["embed_tokens", "up"])
        rest = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))
        base = jax.tree.leaves(nnx.state(module, nnx.Not(nnx.LoRAParam)))
        assert len(rest) == len(base)
        assert all(a is b for a, b in zip(rest, base, strict=True))

    def test_the_state_of_an_abstract_module_has_the_same_places(self):
        model = wrapped(shared_variable(), ["embed_tokens", "up"])
        abstract = nnx.eval_shape(lambda: wrapped(shared_variable(), ["embed_tokens", "up"]))
        assert jax.tree.structure(nnx.state(abstract)) == jax.tree.structure(nnx.state(model))
        assert nnx.graphdef(abstract) == nnx.graphdef(model)

    def test_other_scalings_are_kept_and_stacked_ones_are_variables(self):
        model = wrapped(shared_variable(), ["embed_tokens", "up"])
        core = tied_lora.nnx.adapted(model)
        assert all(isinstance(x, jax.Array) for x in core.scaling.values())
        other = core.replace(scaling={key: 3 * x for key, x in core.scaling.items()})
        again = tied_lora.nnx.from_adapted(model, other)
        assert tied_lora.nnx.adapted(again).scaling == other.scaling
        # A state that is saved carries them: put into a module as wrapped, it is refused.
        assert len(jax.tree.leaves(nnx.state(again, tied_lora.nnx.Scaling))) == len(core.scaling)
        assert not jax.tree.leaves(nnx.state(model, tied_lora.nnx.Scaling))
        stacked = tied_lora.select(tied_lora.stack([core, other]), 1)
        slots = tied_lora.nnx.from_adapted(model, stacked)
        assert len(jax.tree.leaves(nnx.state(slots, tied_lora.nnx.Scaling))) == len(core.scaling)
        close(slots(TOKENS), again(TOKENS))

    def test_scalings_of_a_traced_adapted(self):
        model = wrapped(shared_variable(), ["embed_tokens", "up"])
        core = tied_lora.nnx.adapted(model)
        called = jax.jit(lambda core: tied_lora.nnx.from_adapted(model, core)(TOKENS))
        close(called(core), model(TOKENS))

"""What is refused in the place of a module, and of what belongs to one."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from tests.helpers.nnx_models import CONFIG, TOKENS, WIDTH, adapted, shared_variable


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

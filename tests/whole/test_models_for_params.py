"""A model where its params belong: one error in every function, which says what to pass."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import qwix
from flax import nnx

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig
from flax_tied_lora.names import names_of

CONFIG = LoraConfig(r=2, target_modules=["up"])
NAMES = names_of(None, [("up/kernel", "up.weight")])
LLAMA = {"model_type": "llama"}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="up")(x)


class Module(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class Model:
    """As transformers' Flax models are: it holds params and takes others."""

    def __init__(self):
        self.params = {"up": {"kernel": jnp.ones((4, 4))}}

    def __call__(self, x, params=None):
        return x @ (params or self.params)["up"]["kernel"]


FUNCTIONS = {
    "wrap": lambda params: tied_lora.wrap(params, CONFIG),
    "grow_vocabulary": lambda params: tied_lora.grow_vocabulary(params, 10),
    "load_adapter": lambda params: tied_lora.peft.load_adapter("nowhere", params, NAMES),
    "find_ties": tied_lora.find_ties,
    "quantize": tied_lora.quantize,
    "dequantize": tied_lora.dequantize,
    "stored_bytes": tied_lora.stored_bytes,
    "restore": lambda params: tied_lora.checkpoint.restore("nowhere", params),
    "restore_params": lambda params: tied_lora.checkpoint.restore_params("nowhere", params),
    "save_params": lambda params: tied_lora.checkpoint.save_params("nowhere", params),
    "extract": lambda params: tied_lora.arithmetic.extract(params, params, CONFIG),
    "save_merged": lambda params: tied_lora.peft.save_merged("nowhere", params, NAMES, LLAMA),
    "to_state_dict": lambda params: tied_lora.names.to_state_dict(params, NAMES),
    "from_state_dict": lambda params: tied_lora.names.from_state_dict({}, params, NAMES),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_model(what):
    expected = rf"^{what}: expected params, got Model, a model; pass model\.params$"
    with pytest.raises(TypeError, match=expected):
        FUNCTIONS[what](Model())
    expected = rf"^{what}: expected params, got Linen, a Flax module; pass what its init returns"
    with pytest.raises(TypeError, match=expected):
        FUNCTIONS[what](Linen())


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("wrap", r"use tied_lora\.nnx\.wrap\(module, config\)"),
        ("grow_vocabulary", r"grow its state, .* nnx\.update or tied_lora\.nnx\.from_adapted"),
        ("load_adapter", r"pass its state, .* by tied_lora\.nnx\.from_adapted"),
        ("find_ties", r"pass its state, nnx\.state\(module, nnx\.Param\)"),
        ("quantize", r"use flax_tied_lora\.nnx\.quantize\(module\)"),
        ("save_params", r"pass its state, nnx\.state\(module, nnx\.Param\)"),
    ],
)
def test_a_module_of_nnx(what, remedy):
    expected = rf"^{what}: expected params, got Module, an nnx\.Module[,;] .*{remedy}$"
    with pytest.raises(TypeError, match=expected):
        FUNCTIONS[what](Module())


def test_the_adapted_params_of_a_model_without_adapt():
    model = Model()
    adapted = tied_lora.wrap(model.params, CONFIG)
    with pytest.raises(TypeError, match=r"tied_lora\.adapt\(model\.apply\)"):
        model(jnp.ones((2, 4)), params=adapted)
    tied_lora.adapt(model)(jnp.ones((2, 4)), params=adapted)


@pytest.mark.filterwarnings("ignore:'VariableState' was removed")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", [["up"], "all-linear", r".*up", ["other", "up.kernel"]])
def test_params_that_qwix_quantised(bias, targets):
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32, use_bias=bias, name="up")(nn.Dense(32, name="other")(x))

    x = jnp.ones((2, 32))
    params = Both().init(jax.random.key(0), x)["params"]
    rule = qwix.QuantizationRule(module_path="up", weight_qtype="int8")
    model = qwix.quantize_model(Both(), qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    quantised = qwix.quantize_params(params, shapes)
    with pytest.raises(ValueError, match=r"names 'up/kernel', which qwix has quantised: .* q"):
        tied_lora.wrap(quantised, LoraConfig(r=2, target_modules=targets))
    adapted = tied_lora.wrap(quantised, LoraConfig(r=2, target_modules=["other"]))
    out = tied_lora.adapt(model.apply)({"params": adapted}, x)
    assert jnp.allclose(out, model.apply({"params": quantised}, x))

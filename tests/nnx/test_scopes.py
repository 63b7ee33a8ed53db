"""Scopes of a module's calls: module paths and methods, as Linen names them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora._nnx.scopes import with_scopes
from tests.helpers.nnx_models import close

TOKENS = jnp.arange(4)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.residual(x, self.proj(x))

    def residual(self, x, y):
        return x + self.proj(jnp.tanh(y))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 8, rngs=rngs)
        self.layers = nnx.List([Layer(rngs)])
        keys = jax.random.split(jax.random.key(0), 2)
        self.stack = nnx.vmap(Layer)(nnx.Rngs(params=keys))

    @nnx.jit
    def encode(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        walk: Any = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return walk(x, self.stack)

    def __call__(self, tokens):
        encode: Any = self.encode
        return self.embed.attend(encode(tokens))


class Head(nnx.Module):
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x, table):
        return jnp.sin(x * self.scale) @ table.T


class Heads(nnx.Module):
    """A table that two modules multiply with, so that its role tells none of them."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 8, rngs=rngs)
        self.first, self.second = Head(1.0), Head(2.0)

    def __call__(self, tokens):
        x, table = jax.lax.stop_gradient(self.embed(tokens)), self.embed.embedding[...]
        return self.first(x, table), self.second(x, table)


def test_module_paths_and_methods():
    model = Model(nnx.Rngs(0))
    graph = nnx.graphdef(model)
    sites = tied_lora.nnx.trace(model, TOKENS)
    inside = "Model/Model.encode"
    assert [(s.leaf, s.scope) for s in sites] == [
        ("embed/embedding", f"{inside}/embed"),
        ("layers/0/proj/kernel", f"{inside}/layers/0/proj"),
        ("layers/0/proj/kernel", f"{inside}/layers/0/0.residual/proj"),
        ("stack/proj/kernel", f"{inside}/stack/proj"),
        ("stack/proj/kernel", f"{inside}/stack/stack.residual/proj"),
        ("embed/embedding", "Model/embed.attend"),
    ]
    assert nnx.graphdef(model) == graph
    of_method = tied_lora.nnx.trace(model, jnp.ones((1, 8)), method="embed.attend")
    assert [s.scope for s in of_method] == ["Model/embed.attend"]


@pytest.mark.parametrize("target", ["attend", "embed.attend", r".*\.attend"])
def test_a_method_is_a_target(target):
    model = Model(nnx.Rngs(0))
    sites = tied_lora.nnx.trace(model, TOKENS)
    config = tied_lora.LoraConfig(
        r=2, target_modules=[target] if target[0] != "." else target, init_lora_weights=False,
        lora_alpha=1,
    )  # fmt: skip
    adapted = tied_lora.nnx.wrap(model, config, sites=sites)
    assert [g.key for g in adapted.plan.adapted] == ["embed/embedding"]
    explanation = tied_lora.nnx.explain(adapted, TOKENS)
    explanation.assert_tied()
    assert [r.site.scope for r in explanation.reads] == [
        "Model/Model.encode/embed",
        "Model/embed.attend",
    ]
    close(adapted(TOKENS), tied_lora.nnx.merge(adapted)(TOKENS))


def test_exclusions_by_scope():
    model = Model(nnx.Rngs(0))
    sites = tied_lora.nnx.trace(model, TOKENS)
    config = tied_lora.LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*/stack/.*")
    plan = tied_lora.nnx.wrap(model, config, sites=sites).plan
    assert [g.key for g in plan.adapted] == ["layers/0/proj/kernel"]


@pytest.mark.filterwarnings("ignore::flax_tied_lora.WeightTyingWarning")
@pytest.mark.filterwarnings("error::flax_tied_lora.UnreadTargetWarning")
def test_an_adapter_for_the_call_sites_of_one_method():
    model = Heads(nnx.Rngs(0))
    sites = tied_lora.nnx.trace(model, TOKENS)
    config = tied_lora.LoraConfig(
        r=2, target_modules=["first"], ensure_weight_tying=False, init_lora_weights=False
    )
    adapted = tied_lora.nnx.wrap(model, config, sites=sites)
    first, second = adapted(TOKENS)
    close(second, model(TOKENS)[1])
    plain = tied_lora.merge(tied_lora.nnx.adapted(adapted), untie={"first": "first/table"})
    close(first, Head(1.0)(model.embed(TOKENS), plain["first"]["table"]))
    assert type(adapted.module) is Heads


def test_what_a_class_has_beside_methods():
    class Odd(Layer):
        act, negative = staticmethod(jnp.tanh), lambda x: -x
        Inner = Layer

        @classmethod
        def width(cls):
            return cls.act(jnp.ones(8))

        @property
        def kernel(self):
            return self.proj.kernel[...]

        def __call__(self, x):
            assert self.Inner is Layer
            assert super().__call__(x).shape == x.shape
            return (type(self).act(self.act(x)) * self.width()[None]) @ type(self).negative(
                self.kernel
            )

    sites = tied_lora.nnx.trace(Odd(nnx.Rngs(0)), jnp.ones((2, 8)))
    assert sites.sites[-1].scope == "Odd"


def test_the_modules_of_a_call_are_what_they_were():
    model = Model(nnx.Rngs(0))
    graph = nnx.graphdef(model)

    def fail(model):
        raise RuntimeError(type(model).__name__)

    with pytest.raises(RuntimeError, match="Model"):
        with_scopes(fail)(model)
    layer, fresh = with_scopes(lambda m: (m.layers[0], type(m.layers[0])(nnx.Rngs(0))))(model)
    assert type(layer) is Layer
    assert type(fresh) is Layer
    assert nnx.graphdef(model) == graph


def test_a_class_that_counts_its_subclasses_is_left_alone():
    known = []

    class Counted(Layer):
        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            known.append(cls)

    class Child(Counted):
        pass

    sites = tied_lora.nnx.trace(Child(nnx.Rngs(0)), jnp.ones((2, 8)))
    assert known == [Child]
    assert [s.scope for s in sites] == ["Child/proj", "Child/proj"]  # of nnx.Linear

"""Models of many layers: what tracing and wrapping cost grows with their number, not faster.

Counted in Python's calls, which no other load of the machine changes.
"""

from __future__ import annotations

import cProfile
import functools
import gc
import pstats
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import flax_tied_lora as tied_lora

X = jnp.ones((2, 4))


class Layers(nn.Module):
    count: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.count):
            x = nn.Dense(4, name=f"layer_{i}")(x)
        return x


def calls(function: Callable[[], Any]) -> int:
    """Returns the number of Python calls that a function makes, the second time."""
    function()
    profile = cProfile.Profile()
    profile.runcall(function)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@functools.cache
def counted(layers: int) -> dict[str, int]:
    apply = Layers(layers).apply
    params = jax.eval_shape(Layers(layers).init, jax.random.key(0), X)["params"]
    named = tied_lora.LoraConfig(r=2, target_modules=list(params), rank_pattern={"layer_0": 1})
    every = tied_lora.LoraConfig(r=2, target_modules="all-linear")
    # `make_jaxpr` keeps what a function gave: each time it is asked for a new one here.
    sites = tied_lora.trace(apply, {"params": params}, X)
    adapted = tied_lora.wrap(params, named, sites=sites)

    def loss(adapted, x):
        return tied_lora.adapt(apply)({"params": adapted}, x).sum()

    return {
        "plain": calls(lambda: jax.make_jaxpr(lambda v: apply(v, X))({"params": params})),
        "adapt": calls(lambda: jax.make_jaxpr(tied_lora.adapt(apply))({"params": adapted}, X)),
        "gradient": calls(lambda: jax.make_jaxpr(tied_lora.value_and_grad(loss))(adapted, X)),
        "trace": calls(lambda: tied_lora.trace(apply, {"params": params}, X)),
        "wrap": calls(lambda: tied_lora.wrap(params, named, sites=sites)),
        "wrap all-linear": calls(lambda: tied_lora.wrap(params, every, sites=sites)),
        "explain": calls(lambda: str(tied_lora.explain(apply, {"params": adapted}, X))),
        "plan": calls(lambda: tied_lora.Plan.from_json(adapted.plan.to_json())),
    }


@pytest.mark.parametrize(
    "what",
    ["plain", "adapt", "gradient", "trace", "wrap", "wrap all-linear", "explain", "plan"],
)
def test_four_times_the_layers_cost_four_times_as_much(what):
    assert counted(100)[what] < 4.4 * counted(25)[what]


@functools.cache
def counted_of_a_chain(layers: int) -> dict[str, int]:
    """The same of bare products, which leave what each layer costs nothing to hide behind."""
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    params = {f"layer_{i}": {"kernel": shape} for i in range(layers)}
    config = tied_lora.LoraConfig(r=2, target_modules=list(params))
    adapted = tied_lora.wrap(params, config)
    deltas, scaling = adapted.adapters["lora"], adapted.scaling

    def chain(params, x):
        for layer in params.values():
            x = x @ layer["kernel"]
        return x.sum()

    def by_hand(deltas, scaling, params, x):
        for key, layer in zip(deltas, params.values(), strict=True):
            own = deltas[key]
            x = x @ layer["kernel"] + (x @ own["lora_a"]) @ own["lora_b"] * scaling[key]
        return x.sum()

    def traced(function, *args):
        return calls(lambda: jax.make_jaxpr(lambda *args: function(*args))(*args))

    apply = tied_lora.adapt(chain)
    return {
        "adapt": traced(apply, adapted, X),
        "gradient": traced(tied_lora.value_and_grad(apply), adapted, X),
        "wrap": calls(lambda: tied_lora.wrap(params, config)),
        "by hand": traced(by_hand, deltas, scaling, params, X),
        "by hand, gradient": traced(jax.value_and_grad(by_hand), deltas, scaling, params, X),
    }


@pytest.mark.parametrize("what", ["adapt", "gradient", "wrap"])
def test_each_layer_of_a_chain_costs_the_same(what):
    few, some, many = (counted_of_a_chain(n)[what] for n in (100, 200, 400))
    assert many - some == pytest.approx(2 * (some - few), rel=0.02)


@pytest.mark.parametrize(
    ("what", "beside", "limit"),
    [("adapt", "by hand", 1.15), ("gradient", "by hand, gradient", 0.95)],
)
def test_a_chain_takes_little_more_than_by_hand(what, beside, limit):
    assert counted_of_a_chain(200)[what] < limit * counted_of_a_chain(200)[beside]


@pytest.mark.parametrize("what", ["adapt", "trace"])
def test_adapted_is_traced_in_at_most_one_and_a_half_times_the_calls(what):
    assert counted(100)[what] < 1.5 * counted(100)["plain"]


def test_the_collector_is_on_again_afterwards():
    counted(25)
    assert gc.isenabled()

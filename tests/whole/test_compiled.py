"""What the compiler reports of adapted programs: it does not vary, so it is asserted."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import gpt2_shape
from tests.helpers.compiling import as_shipped

TARGETS = ["wte", "c_attn"]
SHAPE = gpt2_shape.Shape()


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    """The training step of DESIGN's measurements: GPT-2's width, 4 layers, 2 x 128 tokens."""
    lowered = {
        "attention only": gpt2_shape.ours(SHAPE, ["c_attn"]),
        "ours": gpt2_shape.ours(SHAPE, TARGETS, on_dense="error"),
        "by hand": gpt2_shape.by_hand(SHAPE, TARGETS),
        "densified": gpt2_shape.densified(SHAPE, TARGETS),
    }
    return {name: as_shipped(program) for name, program in lowered.items()}


def flops(compiled: Any) -> float:
    return compiled.cost_analysis()["flops"]


def tables(compiled: Any, shape: gpt2_shape.Shape = SHAPE) -> int:
    """How many values of the table's size the program makes, either way round."""
    v, d = shape.vocabulary, shape.width
    made = re.compile(rf"= f32\[(?:{v},{d}|{d},{v})\]\S* (?!parameter|bitcast)")
    return len(made.findall(compiled.as_text()))


def test_flops_are_those_of_tied_lora_by_hand(programs):
    # XLA counts a loop's body once; the delta's logits are made in a loop of 8 parts.
    uncounted = 7 / 8 * 2 * SHAPE.batch * SHAPE.length * SHAPE.vocabulary * gpt2_shape.RANK
    ours = flops(programs["ours"]) + uncounted
    assert 0.995 < ours / flops(programs["by hand"]) <= 1.005


def test_flops_of_a_densified_table_would_show(programs):
    assert flops(programs["densified"]) > 1.3 * flops(programs["ours"])


def test_no_array_of_the_tables_size_is_made(programs):
    assert tables(programs["ours"]) == tables(programs["attention only"]) == 0
    assert tables(programs["densified"]) > 0  # the pattern finds what it looks for


def temporary(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporary_memory_is_that_of_lora_on_attention_only(programs):
    """The logits are there once: the delta's are added to them in place."""
    assert temporary(programs["ours"]) <= 1.05 * temporary(programs["attention only"])
    assert temporary(programs["by hand"]) > 1.5 * temporary(programs["attention only"])


def test_a_loss_without_logits_takes_little_of_it(programs):
    compiled = as_shipped(gpt2_shape.without_logits(SHAPE, TARGETS))
    assert temporary(compiled) <= 0.6 * temporary(programs["attention only"])


def test_a_loss_without_logits_of_many_tokens():
    shape = dataclasses.replace(SHAPE, batch=8, length=512)
    without = temporary(as_shipped(gpt2_shape.without_logits(shape, TARGETS)))
    assert without <= 0.5 * temporary(as_shipped(gpt2_shape.ours(shape, ["c_attn"])))


def layered(policy: Any = None, jitted: bool = False) -> Any:
    """A loss over six calls of one rematerialised layer, then a tied projection."""

    def layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda k, x: jnp.tanh(x @ k), policy=policy)(kernel, x)

    if jitted:
        layer = jax.jit(layer)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"]["embedding"][tokens]
        for i in range(6):
            x = layer(params[f"layer_{i}"]["kernel"], x)
        return jnp.sum((x @ params["embed"]["embedding"].T) ** 2)

    return loss


def layered_params() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 7)
    kernels = {
        f"layer_{i}": {"kernel": jax.random.normal(k, (16, 16)) / 4} for i, k in enumerate(keys[1:])
    }
    return {"embed": {"embedding": jax.random.normal(keys[0], (64, 16))}, **kernels}


def counts(function: Any, *args: Any) -> dict[str, int]:
    text = jax.jit(function).lower(*args).as_text()
    return {
        "functions": len(re.findall(r"func\.func", text)),
        "barriers": text.count("optimization_barrier"),
    }


POLICIES = {
    "nothing saved": None,
    "dots saved": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@pytest.mark.parametrize("jitted", [False, True], ids=["inline", "jitted"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_differentiated_function_keeps_its_rematerialisation(policy, jitted):
    """`adapt(jax.grad(loss))`: barriers and functions are those of the plain program."""
    params, tokens = layered_params(), jnp.arange(8)
    config = tied_lora.LoraConfig(r=2, target_modules=["embed", *(f"layer_{i}" for i in range(6))])
    adapted = tied_lora.wrap(params, config)
    step = jax.value_and_grad(layered(policy, jitted))
    plain = counts(step, params, tokens)
    ours = counts(tied_lora.adapt(step, on_dense="allow"), adapted, tokens)
    assert plain["barriers"] == (1 if jitted else 6)  # a jitted layer is one function
    assert ours == plain


def test_layers_called_six_times_stay_one_function():
    """The same by differentiating an adapted function: the layer is not made once for each call."""
    params, tokens = layered_params(), jnp.arange(8)
    config = tied_lora.LoraConfig(r=2, target_modules=["embed", *(f"layer_{i}" for i in range(6))])
    adapted = tied_lora.wrap(params, config)
    loss = layered(jitted=True)
    plain = counts(loss, params, tokens)
    assert counts(tied_lora.adapt(loss), adapted, tokens) == plain

    def of_adapters(adapters: Any, adapted: Any) -> Any:
        return tied_lora.adapt(loss)(adapted.replace(adapters=adapters), tokens)

    def of_kernels(params: Any) -> Any:
        return loss(params, tokens)

    ours = counts(jax.grad(of_adapters), adapted.adapters, adapted)
    assert ours["functions"] <= counts(jax.grad(of_kernels), params)["functions"]
    assert ours["barriers"] == 1


def test_a_scanned_model_stays_one_loop_and_small():
    def model(params: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, params["layers"]["kernel"])[0]

    params = {"layers": {"kernel": jax.random.normal(jax.random.key(0), (30, 16, 16)) / 4}}
    x = jnp.ones((4, 16))
    sites = tied_lora.trace(model, params, x)
    config = tied_lora.LoraConfig(r=2, target_modules=["layers"])
    adapted = tied_lora.wrap(params, config, sites=sites)
    plain = jax.jit(model).lower(params, x).as_text()
    ours = jax.jit(tied_lora.adapt(model, on_dense="error")).lower(adapted, x).as_text()
    assert ours.count("stablehlo.while") == plain.count("stablehlo.while") == 1
    assert ours.count("stablehlo.dot_general") == 3


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_training_step_exports(platform):
    """The adapted training step of a small model lowers for platforms that are not here."""
    shape = gpt2_shape.Shape(512, 32, 64, 4, 2, 2, 16)
    whole = gpt2_shape.adapted(shape, TARGETS)
    apply = tied_lora.adapt(lambda p, t: gpt2_shape.forward(p, t, shape), on_dense="error")
    optimizer = optax.adamw(1e-3)

    def of_adapters(adapters: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        return gpt2_shape.loss(apply(frozen.replace(adapters=adapters), tokens), tokens)

    step = gpt2_shape.training_step(of_adapters, optimizer)
    state = jax.eval_shape(optimizer.init, whole.adapters)
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    leaves, treedef = jax.tree.flatten((whole, whole.adapters, state, tokens))
    flat = jax.jit(lambda *xs: jax.tree.leaves(step(*jax.tree.unflatten(treedef, xs))))
    exported = jax.export.export(flat, platforms=[platform])(*leaves)
    assert exported.platforms == (platform,)
    count = len(jax.tree.leaves((whole.adapters, state)))
    assert len(exported.out_avals) == count + 1

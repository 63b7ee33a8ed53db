"""The loss inside `adapt`: its table stays symbolic, whatever is around it and in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora.losses import linear_cross_entropy
from tests.helpers.full_logits import assert_same, compiled, cross_entropy
from tests.helpers.oracle import array, check, numbers, perturbed, wrapped

V, D = 12, 6
PARAMS = {"embed": {"embedding": array(V, D, seed=1)}}
HIDDEN, LABELS = array(3, 8, D, seed=2), numbers(3, 8, below=V).at[1, :3].set(-100)
TIED = wrapped(PARAMS, ["embed"])


def table(params: Any) -> Any:
    return params["embed"]["embedding"]


def fused(params: Any, hidden: Any, labels: Any = LABELS, **options: Any) -> Any:
    return linear_cross_entropy(hidden, table(params), labels, chunk_size=5, **options)


def plain(params: Any, hidden: Any, labels: Any = LABELS, **options: Any) -> Any:
    return cross_entropy(hidden, table(params), labels, **options)


def step(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of an `Adapted` and data: the loss, and the gradients of both."""

    def run(adapted: Any, hidden: Any) -> Any:
        def of(adapters: Any, hidden: Any) -> Any:
            return loss(adapted.replace(adapters=adapters), hidden)

        return jax.value_and_grad(of, (0, 1))(adapted.adapters, hidden)

    return run


def same_as_merged(
    program: Callable[..., Any], adapted: Any, reference: Callable[..., Any], **options: Any
) -> None:
    """Checks an adapted program against one of full logits and merged params."""
    ours = step(functools.partial(tied_lora.adapt(program, on_dense="error"), **options))
    theirs = step(lambda adapted, x: reference(tied_lora.merge(adapted), x, **options))
    assert_same(*compiled(lambda *a: (ours(*a), theirs(*a)), adapted, HIDDEN))


@pytest.mark.parametrize("kind", ["lora", "dora", "rows", "copy", "quantized"])
def test_every_kind_of_adapter(kind):
    same_as_merged(
        fused, wrapped(PARAMS, ["embed"], kind=kind), plain,
        label_smoothing=0.1, z_loss=0.05, logit_soft_cap=3.0,
    )  # fmt: skip


def test_a_kernel_and_a_bias():
    params = {"head": {"kernel": array(D, V, seed=3), "bias": array(V, seed=4)}}
    config = {"r": 2, "target_modules": ["head"], "bias": "lora_only"}
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(**config))
    adapted = perturbed(adapted)

    def program(loss: Any) -> Any:
        return lambda p, h: loss(
            h, p["head"]["kernel"], LABELS, vocab_axis=1, bias=p["head"]["bias"]
        )

    same_as_merged(program(linear_cross_entropy), adapted, program(cross_entropy))


def model(loss: Any) -> Any:
    """The table looked up and projected with: tied."""

    def run(params: Any, hidden: Any) -> Any:
        hidden = jnp.tanh(hidden + table(params)[jnp.maximum(LABELS, 0)])
        return loss(params, hidden)

    return run


def in_scan(loss: Any) -> Any:
    def run(params: Any, hidden: Any) -> Any:
        def body(total: Any, x: Any) -> Any:
            return total + loss(params, *x), None

        return jax.lax.scan(body, jnp.float32(0), (hidden, LABELS))[0]

    return run


def over_vmaps(loss: Any) -> Any:
    def run(params: Any, hidden: Any) -> Any:
        one = jax.vmap(jax.vmap(loss, (None, None, 0)), (None, 0, None))
        return jnp.sum(jnp.sin(one(params, hidden, LABELS)))

    return run


def in_branch(loss: Any) -> Any:
    return lambda params, hidden: jax.lax.cond(
        hidden[0, 0, 0] > 0, loss, lambda p, h: 2 * loss(p, h), params, hidden
    )


PROGRAMS = {
    "tied": model,
    "jit": lambda loss: lambda params, hidden: jax.jit(loss)(params, hidden),
    "checkpoint": lambda loss: jax.checkpoint(model(loss)),
    "scan": in_scan,
    "vmap": over_vmaps,
    "cond": in_branch,
    "all": lambda loss: jax.jit(jax.checkpoint(in_scan(model(loss)))),
}


@pytest.mark.parametrize("name", ["tied", "jit", "checkpoint", "scan", "vmap", "cond"])
def test_around_it(name):
    program = PROGRAMS[name]
    same_as_merged(program(fused), TIED, program(plain))
    reads = tied_lora.explain(program(fused), TIED, HIDDEN).reads
    losses = [r for r in reads if r.site.operation == "linear_cross_entropy"]
    assert losses
    for read in losses:
        assert (read.served, read.site.role) == ("low rank", "projection")
        assert (read.site.rows, read.site.cols, read.groups) == ((1,), (0,), ("embed/embedding",))


def test_differentiated_before_it_is_adapted():
    def gradients(loss: Any) -> Any:
        return lambda params, hidden: jax.grad(model(loss), (0, 1))(params, hidden)

    ours = tied_lora.adapt(gradients(fused), on_dense="error")
    theirs = gradients(plain)
    assert_same(*compiled(lambda a, h: (ours(a, h), theirs(tied_lora.merge(a), h)), TIED, HIDDEN))
    check(lambda p, h: jax.grad(lambda h: fused(p, h))(h), TIED, HIDDEN)


def test_without_reduction_it_is_plain_operations():
    explained = check(lambda p, h: fused(p, h, reduction="none"), TIED, HIDDEN)
    assert [(r.site.operation, r.served) for r in explained.reads] == [("dot_general", "low rank")]


def test_a_table_for_each_example():
    def program(loss: Any) -> Any:
        def run(params: Any, hidden: Any) -> Any:
            stack = jnp.stack([table(params), 2 * table(params), -table(params)])
            return jnp.sum(jax.vmap(lambda t, h, y: loss({"embed": {"embedding": t}}, h, y))(
                stack, hidden, LABELS
            ))  # fmt: skip

        return run

    same_as_merged(program(fused), TIED, program(plain))


def test_adapters_stacked_for_one_batch():
    others = [wrapped(PARAMS, ["embed"], seed=seed) for seed in range(3)]
    stacked = tied_lora.stack(others)
    loss = tied_lora.adapt(lambda p, h, y: fused(p, h, y), on_dense="error")
    together = jax.vmap(loss, (tied_lora.adapter_axes(stacked), 0, 0))(stacked, HIDDEN, LABELS)
    alone = [
        plain(tied_lora.merge(a), h, y) for a, h, y in zip(others, HIDDEN, LABELS, strict=True)
    ]
    assert_same(together, jnp.stack(alone))


def test_separate_adapters_serve_the_projection_by_its_own():
    config = tied_lora.LoraConfig(
        r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=False
    )
    params = {"embed_tokens": {"embedding": table(PARAMS)}}

    def program(loss: Any) -> Any:
        def run(params: Any, hidden: Any) -> Any:
            whole = params["embed_tokens"]["embedding"]
            return loss({"embed": {"embedding": whole}}, hidden + whole[jnp.maximum(LABELS, 0)])

        return run

    sites = tied_lora.trace(program(fused), params, HIDDEN)
    with pytest.warns(tied_lora.WeightTyingWarning, match="an adapter of its own"):
        adapted = perturbed(tied_lora.wrap(params, config, sites=sites))
    assert len(adapted.adapters["lora"]) == 2
    ours, theirs = (step(tied_lora.adapt(program(x), on_dense="error")) for x in (fused, plain))
    assert_same(*compiled(lambda *a: (ours(*a), theirs(*a)), adapted, HIDDEN))


def test_dropout_draws_one_mask_for_value_and_gradient():
    config = tied_lora.LoraConfig(r=2, target_modules=["embed"], lora_dropout=0.5)
    adapted = tied_lora.wrap(PARAMS, config)
    adapted = adapted.replace(adapters=TIED.adapters).train(jax.random.key(0))
    loss = tied_lora.adapt(fused, on_dense="error")

    def along(t: Any) -> Any:
        moved = jax.tree.map(lambda x: x * (1 + t), adapted.adapters)
        return loss(adapted.replace(adapters=moved), HIDDEN)

    value, slope = compiled(jax.value_and_grad(along), jnp.float32(0))
    high, low = compiled(lambda t: (along(t), along(-t)), jnp.float32(1e-2))
    assert abs(value - along(jnp.float32(0))) < 1e-5
    assert abs(slope - (high - low) / 2e-2) < 1e-2 * abs(slope)
    assert abs(value - loss(adapted.eval(), HIDDEN)) > 1e-3


def test_bfloat16():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    check(lambda p, h: fused(p, h), wrapped(low, ["embed"]), HIDDEN.astype(jnp.bfloat16))


def test_the_call_sites_cost_is_that_of_the_thin_products():
    (read,) = tied_lora.explain(fused, TIED, HIDDEN).reads
    assert read.flops == 2 * 24 * 2 * (V + D)  # 24 tokens, rank 2
    assert read.bytes == 5 * 4 * (V + 2)  # those of a chunk


def test_what_has_to_be_added_up_is_reported():
    rows, cols = array(V, 1, seed=5), array(1, D, seed=6)

    def program(loss: Any) -> Any:
        def run(params: Any, hidden: Any) -> Any:
            scaled = table(params) * jnp.broadcast_to(rows, (V, D))
            return loss({"embed": {"embedding": scaled * jnp.broadcast_to(cols, (V, D))}}, hidden)

        return run

    with pytest.raises(tied_lora.DensifyError, match="'linear_cross_entropy', whose scale varies"):
        tied_lora.adapt(program(fused), on_dense="error")(TIED, HIDDEN)
    with pytest.warns(tied_lora.DensifyWarning, match="one array of 288 bytes"):
        value = tied_lora.adapt(program(fused))(TIED, HIDDEN)
    assert_same(value, program(plain)(tied_lora.merge(TIED), HIDDEN))
    (read,) = tied_lora.explain(program(fused), TIED, HIDDEN).reads
    assert read.served == "dense"

"""explain: every call site and how it was served; as a table, as data, and assert_tied."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from flax_tied_lora import NotTiedError
from tests.helpers.small_models import TOKENS, VOCAB, WIDTH, StackedLM, TiedLM, init, wrapped

MODEL = TiedLM()
PARAMS = init(MODEL)
ADAPTED = wrapped(PARAMS, ["embed_tokens", "up"])
TABLE = "embed_tokens/embedding"


def explained(fn=MODEL.apply, params=ADAPTED, tokens=TOKENS):
    return tied_lora.explain(fn, {"params": params}, tokens)


def test_every_site_of_every_group():
    explanation = explained()
    assert [
        (r.site.leaf, r.site.operation, r.site.role, r.served, r.groups) for r in explanation.reads
    ] == [
        (TABLE, "gather", "lookup", "low rank", (TABLE,)),
        ("up/kernel", "dot_general", "projection", "low rank", ("up/kernel",)),
        (TABLE, "dot_general", "projection", "low rank", (TABLE,)),
    ]
    assert [r.site.scope for r in explanation.of(TABLE)] == [
        "TiedLM/embed_tokens", "TiedLM/embed_tokens.attend"
    ]  # fmt: skip
    explanation.assert_tied()


def test_sites_are_those_of_the_trace():
    sites = tied_lora.trace(MODEL.apply, {"params": PARAMS}, TOKENS)
    adapted = [s for s in sites if s.leaf in (TABLE, "up/kernel")]
    assert [r.site for r in explained().reads] == adapted


def test_stacked_sites_are_those_of_the_trace():
    model = StackedLM()
    params = init(model)
    sites = tied_lora.trace(model.apply, {"params": params}, TOKENS)
    adapted = wrapped(params, ["q_proj", "o_proj"], sites=sites)
    explanation = explained(model.apply, adapted)
    assert [r.site for r in explanation.reads] == [
        s for s in sites if s.leaf.endswith(("q_proj/kernel", "o_proj/kernel"))
    ]
    explanation.assert_tied()


def test_cost_of_a_projection():
    params = {"w": jnp.ones((64, 32))}
    explanation = tied_lora.explain(
        lambda p, x: x @ p["w"], wrapped(params, ["w"]), jnp.ones((5, 64))
    )
    [read] = explanation.reads
    assert read.flops == 2 * 5 * 64 * 2 + 2 * 5 * 2 * 32
    assert read.bytes == 4 * (5 * 2 + 5 * 32)


def test_on_shapes_alone():
    shapes = jax.eval_shape(lambda: PARAMS)
    config = tied_lora.LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "up"])
    abstract = tied_lora.wrap(shapes, config)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
    assert explained(params=abstract, tokens=tokens) == explained()


def test_as_data():
    rows = explained().to_dicts()
    assert json.loads(json.dumps(rows))[0]["leaf"] == TABLE
    assert rows[2] == {
        "group": TABLE, "leaf": TABLE, "operation": "dot_general", "ordinal": 0,
        "scope": "TiedLM/embed_tokens.attend", "role": "projection", "rows": (1,), "cols": (0,),
        "batch": (), "served": "low rank", "factors": [TABLE],
        "flops": 2 * 6 * WIDTH * 2 + 2 * 6 * 2 * VOCAB, "bytes": 4 * (6 * 2 + 6 * VOCAB),
    }  # fmt: skip


def test_as_a_table():
    lines = str(explained()).splitlines()
    assert lines[0].startswith("leaf")
    assert lines[2].split()[:6] == [TABLE, "gather", "#0", "lookup", "low", "rank"]
    assert lines[-1].startswith("3 call sites, 0 densified; extra: ")
    assert len(lines) == 6


def test_members_of_one_group():
    w = jnp.ones((12, 8))
    adapted = wrapped({"a": {"embedding": w}, "b": w, "c": w.T}, ["a"], ties=[("a/embedding", "c")])
    fn = lambda p, ids: (p["a"]["embedding"][ids] @ p["b"].T, jnp.ones((2, 8)) @ p["c"])  # noqa: E731
    explanation = tied_lora.explain(fn, adapted, jnp.array([1]))
    explanation.assert_tied()
    assert [r.site.leaf for r in explanation.of("a/embedding")] == ["a/embedding", "b", "c"]
    assert {row["group"] for row in explanation.to_dicts()} == {"a/embedding"}


def test_member_that_was_not_read():
    w = jnp.ones((12, 8))
    adapted = wrapped({"a": {"embedding": w}, "b": w}, ["a"])
    explanation = tied_lora.explain(
        lambda p, ids: p["a"]["embedding"][ids], adapted, jnp.array([1])
    )
    with pytest.raises(NotTiedError, match="assert_tied: 'b' is adapted and read nowhere"):
        explanation.assert_tied()
    with pytest.raises(AssertionError):
        explanation.assert_tied()


def test_site_that_was_densified():
    def fn(p, ids):
        return p["embed_tokens"]["embedding"][ids], jnp.sin(p["embed_tokens"]["embedding"])

    explanation = tied_lora.explain(fn, wrapped(PARAMS, ["embed_tokens"]), jnp.array([1]))
    [read] = [r for r in explanation.reads if r.served == "dense"]
    assert (read.site.operation, read.bytes) == ("sin", 4 * VOCAB * WIDTH)
    assert "1 densified" in str(explanation)
    with pytest.raises(
        NotTiedError, match=r"sin #0 of 'embed_tokens/embedding'.*adding the weight"
    ):
        explanation.assert_tied()


def test_explains_a_training_step_and_jit():
    def loss(adapters):
        run = tied_lora.adapt(MODEL.apply)
        return jnp.mean(run({"params": ADAPTED.replace(adapters=adapters)}, TOKENS) ** 2)

    jax.grad(loss)(ADAPTED.adapters)
    explanation = explained(jax.jit(MODEL.apply))
    assert explanation.reads == explained().reads


def test_several_adapted_arguments_are_told_apart():
    params = {"w": jnp.ones((8, 8))}
    one, two = (wrapped(params, ["w"], seed=s) for s in (1, 2))
    explanation = tied_lora.explain(
        lambda a, b: a["w"] @ jnp.ones(8) + b["w"] @ jnp.ones(8), one, two
    )
    leaves = [r.site.leaf for r in explanation.reads]
    assert leaves == ["w (adapted argument 0)", "w (adapted argument 1)"]
    assert len(explanation.of("w")) == 2
    assert len(explanation.of(leaves[0])) == 1
    explanation.assert_tied()
    unread = tied_lora.explain(lambda a, b: a["w"] @ jnp.ones(8), one, two)
    with pytest.raises(
        NotTiedError, match=r"'w \(adapted argument 1\)' is adapted and read nowhere"
    ):
        unread.assert_tied()


def test_cost_of_one_product_of_several_leaves_is_at_the_first():
    params = {"q": jnp.ones((64, 16)), "k": jnp.ones((64, 8))}
    explanation = tied_lora.explain(
        lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1), wrapped(params, ["q", "k"]),
        jnp.ones((5, 64)),
    )  # fmt: skip
    assert [r.site.leaf for r in explanation.reads] == ["q", "k"]
    first, second = explanation.reads
    # Each delta is padded with zeros to the width of both.
    assert first.flops == 2 * (2 * 5 * 64 * 2 + 2 * 5 * 2 * 24)
    assert first.bytes == 2 * 4 * (5 * 2 + 5 * 24)
    assert (second.flops, second.bytes) == (0, 0)


def test_cost_of_a_product_of_two_leaves_counts_each_once():
    params = {"down": jnp.ones((64, 16)), "up": jnp.ones((16, 64))}
    explanation = tied_lora.explain(
        lambda p, x: x @ (p["down"] @ p["up"]), wrapped(params, ["down", "up"]), jnp.ones((5, 64))
    )
    densify = 2 * 64 * 2 * (64 + 16)  # each delta with the other's frozen matrix
    both = 2 * 2 * 2 * 16 + 2 * 64 * 2 * (2 + 64)  # a delta with the other
    assert sum(r.flops for r in explanation.reads) == 2 * densify + both


def test_cost_does_not_depend_on_how_the_frozen_weight_is_stored():
    params = {"w": jnp.ones((64, 32))}
    x = jnp.ones((5, 64))

    def cost(params, x):
        [read] = tied_lora.explain(lambda p, x: x @ p["w"], wrapped(params, ["w"]), x).reads
        return read.flops, read.bytes

    expected = (2 * 5 * 2 * (64 + 32), 4 * 5 * (2 + 32))
    assert cost(params, x) == expected
    assert cost({"w": params["w"].astype(jnp.bfloat16)}, x.astype(jnp.bfloat16)) == expected
    assert cost(tied_lora.quantize(params), x) == expected
    assert cost(params, x[None])[0] == expected[0]


def test_cost_of_a_loop_is_that_of_a_step():
    params = {"w": jnp.ones((3, 64, 64))}
    sites = tied_lora.trace(
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0],
        params,
        jnp.ones((5, 64)),
    )
    adapted = wrapped(params, ["w"], sites=sites)
    [read] = tied_lora.explain(
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], adapted,
        jnp.ones((5, 64)),
    ).reads  # fmt: skip
    assert read.flops == 2 * 5 * 2 * (64 + 64)

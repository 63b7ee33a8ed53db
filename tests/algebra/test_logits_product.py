"""Projections that are much wider than what they are made of: the delta is added in place."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_tied_lora as tied_lora
from flax_tied_lora._algebra import logits_product
from flax_tied_lora._algebra.factor import RANK, Factor
from flax_tied_lora._algebra.product import Product
from tests.helpers import oracle
from tests.helpers.compiling import as_shipped

VOCABULARY, WIDTH = 96, 4
FORMS = {
    "parts": logits_product.by_parts,
    "rank one": logits_product.rank_one,
    "product": logits_product.product_added,
}


def adapted(key: str = "embed", rank: int = 3, **options: Any) -> tied_lora.Adapted:
    shape = (VOCABULARY, WIDTH) if key == "embed" else (WIDTH, VOCABULARY)
    config = tied_lora.LoraConfig(r=rank, target_modules=[key], **options)
    return oracle.perturbed(tied_lora.wrap({key: oracle.array(*shape)}, config))


def operands(rank: int = 3, tokens: tuple[int, ...] = (4, 6)) -> Any:
    shapes = [(*tokens, VOCABULARY), (*tokens, rank), (VOCABULARY, rank)]
    base, hidden, second = (oracle.array(*shape, seed=i) for i, shape in enumerate(shapes))
    labels = tuple(f"x{i}" for i in range(len(tokens)))
    product = Product((*labels, 1), (*labels, 0), base.dtype, None)
    return product, base, Factor(hidden, (*labels, RANK)), Factor(second, (0, RANK))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("tokens", [(4, 6), (23,), (2, 3, 4), (2,), ()], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["second by columns", "second by rank"])
def test_every_form_is_the_product(form, tokens, first):
    product, base, hidden, second = operands(tokens=tokens)
    expected = base + hidden.array @ second.array.T
    if first:
        second = Factor(second.array.T, (RANK, 0))
    assert logits_product.is_flat(product, hidden, second)
    assert jnp.allclose(form(product, base, hidden, second), expected, atol=1e-5)


def table(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["embed"].T


PROJECTIONS = {
    "table": ("embed", table),
    "kernel": ("head", lambda p, x: x @ p["head"]),
    "columns first": ("embed", lambda p, x: jnp.einsum("vd,btd->vbt", p["embed"], x)),
    "split columns": (
        "embed",
        lambda p, x: jnp.einsum("btd,ghd->btgh", x, p["embed"].reshape(8, 12, WIDTH)),
    ),
}
KINDS = {"r=1": {"rank": 1}, "r=4": {"rank": 4}, "DoRA": {"use_dora": True}}


@pytest.mark.parametrize(("key", "model"), PROJECTIONS.values(), ids=PROJECTIONS.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_wide_projection_is_that_of_the_merged_weight(key, model, kind):
    x = oracle.array(2, 12, WIDTH)
    (read,) = oracle.check(model, adapted(key, **kind), x).reads
    assert read.served == "low rank"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    whole = jax.tree.map(lambda a: a.astype(dtype), adapted())
    oracle.check(table, whole, oracle.array(2, 12, WIDTH, dtype=dtype))


def test_it_composes():
    """Forward mode, second derivatives, batches, loops, rematerialisation: as the merged weight."""
    whole, x = adapted(), oracle.array(2, 12, WIDTH)

    def of(function: Any, params: Any) -> Any:
        def loss(adapters: Any, x: jax.Array) -> jax.Array:
            return jax.nn.logsumexp(function(params(adapters), x), axis=-1).sum()

        return loss

    ours = of(tied_lora.adapt(table), lambda a: whole.replace(adapters=a))
    theirs = of(table, lambda a: tied_lora.merge(whole.replace(adapters=a)))

    def close(a: Any, b: Any) -> None:
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert jnp.allclose(one, other, atol=1e-4, rtol=1e-4)

    start, ones = whole.adapters, jax.tree.map(jnp.ones_like, whole.adapters)
    uses = {
        "jvp": lambda f: jax.jvp(lambda a: f(a, x), (start,), (ones,)),
        "hvp": lambda f: jax.jvp(jax.grad(lambda a: f(a, x)), (start,), (ones,))[1],
        "vmap": lambda f: jax.vmap(jax.grad(f, 1), (None, 0))(start, x),
        "remat": lambda f: jax.grad(jax.checkpoint(f))(start, x),
        "scan": lambda f: lax.scan(lambda c, x: (c + f(start, x), None), 0.0, x)[0],
    }
    for use in uses.values():
        close(jax.jit(lambda use=use: use(ours))(), jax.jit(lambda use=use: use(theirs))())


def test_an_adapter_for_each_example():
    one = adapted()
    other = one.replace(adapters=jax.tree.map(jnp.negative, one.adapters))
    stacked, x = tied_lora.stack([one, other]), oracle.array(2, 24, WIDTH)
    of_batch = jax.jit(tied_lora.per_example(tied_lora.adapt(table)))
    out = of_batch(tied_lora.select(stacked, jnp.array([1, 0])), x)
    for i, own in enumerate([other, one]):
        assert jnp.allclose(out[i], table(tied_lora.merge(own), x[i]), atol=1e-5)


def test_what_each_platform_is_given(monkeypatch):
    """On TPU and GPU terms of rank one if they are few, for many tokens; on the CPU a loop."""
    whole, x = adapted(), oracle.array(2, 12, WIDTH)
    wide = "tensor<2x12x96xf32>"

    def made(platform: str) -> tuple[int, int]:
        function = jax.jit(tied_lora.adapt(table))
        text = function.trace(whole, x).lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"optimization_barrier .* : (.*)", text)[-1] == wide
        products = [line for line in text.splitlines() if "dot_general" in line and wide in line]
        return len(products), text.count("stablehlo.while")

    assert made("tpu") == made("cuda") == (2, 0)
    monkeypatch.setattr(logits_product, "MANY", 24)
    jax.clear_caches()
    assert made("tpu") == made("cuda") == (1, 0)
    assert made("cpu") == (1, 1)


@pytest.mark.parametrize("tokens", [(64,), (8, 8)], ids=str)
def test_a_gradient_by_the_far_factor_is_a_fast_product(tokens):
    """[rank, tokens] . [tokens, columns]: the other way round XLA for the CPU is slow."""
    apply = tied_lora.adapt(table)
    step = tied_lora.value_and_grad(lambda adapted, x: jnp.sin(apply(adapted, x)).sum())
    text = as_shipped(jax.jit(step).lower(adapted(), oracle.array(*tokens, WIDTH))).as_text()
    products = re.findall(r"= f32\[(3,96|96,3)\]\S* dot\(.*?(lhs_contr.*?\}, rhs_\S+\})", text)
    assert products == [("3,96", "lhs_contracting_dims={1}, rhs_contracting_dims={0}")]


def test_a_loop_of_parts_makes_no_second_array():
    product, base, hidden, second = operands(tokens=(8, 64))

    def temporary(form: Any) -> int:
        program = jax.jit(lambda x, w, h, b: form(product, x @ w, h, b))
        x, w = jnp.ones((8, 64, WIDTH)), jnp.ones((WIDTH, VOCABULARY))
        compiled = as_shipped(program.lower(x, w, hidden, second))
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(logits_product.by_parts) <= 0.3 * base.nbytes
    assert temporary(logits_product.product_added) >= base.nbytes


def test_a_part_is_read_where_it_is_written():
    """A product, and one operation that adds it in place: no copy of the part before it."""
    product, *args = operands(tokens=(8, 64))
    program = jax.jit(functools.partial(logits_product.by_parts, product), donate_argnums=0)
    text = as_shipped(program.lower(*args)).as_text()
    (body,) = re.findall(r"body=%([\w.-]+)", text)
    lines = text.partition(f"%{body} (")[2].partition("\n}")[0].splitlines()
    made = [
        x for x in lines if re.search(rf"= f32\[[\d,]*{VOCABULARY}\]\S* (?!get-tuple|bitcast)", x)
    ]
    assert len(made) == 2, made
    assert "dynamic-update-slice" in made[-1]

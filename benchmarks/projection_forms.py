"""Forms of a projection with a delta, `x W^T + s (x b^T) a^T`, as the TPU's compiler makes them.

Nothing runs and nothing is allocated: programs are compiled for a TPU v5e, with or without one at
hand. `--all` takes every shape with every rank.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import _tpu
import jax
import jax.numpy as jnp
import optax
from _harness import store
from jax import Array, lax

import flax_tied_lora as tied_lora

SCALING = 2.0
WIDTHS = {49152: 576, 50257: 768, 256000: 2304}  # SmolLM2-135M, GPT-2, Gemma 2 2B
CELLS = [  # tokens, vocabulary, rank
    (2048, 50257, 8), (2048, 50257, 64), (256, 50257, 8), (4096, 50257, 8),
    (2048, 49152, 8), (2048, 256000, 8),
]  # fmt: skip
NONE, OURS = "no delta", "adapt"


def hidden(x: Array, b: Array) -> Array:
    h = lax.dot_general(x, b.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type="f4")
    return (h * SCALING).astype(x.dtype)


def product(x: Array, w: Array, kind: Any = None) -> Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=kind)


def no_delta(x: Array, w: Array, a: Array, b: Array) -> Array:
    return product(x, w)


def two_products(x: Array, w: Array, a: Array, b: Array) -> Array:
    return product(x, w) + product(hidden(x, b), a.astype(x.dtype))


def two_wide_products(x: Array, w: Array, a: Array, b: Array) -> Array:
    wide = product(x, w, "f4") + product(hidden(x, b), a.astype(x.dtype), "f4")
    return wide.astype(x.dtype)


def one_product(x: Array, w: Array, a: Array, b: Array) -> Array:
    return product(
        jnp.concatenate([x, hidden(x, b)], 1), jnp.concatenate([w, a.astype(w.dtype)], 1)
    )


def terms(x: Array, w: Array, a: Array, b: Array) -> Array:
    """A sum of as many outer products as the rank, one after the other."""
    h, a = hidden(x, b), a.astype(x.dtype)
    out = product(x, w, "f4")
    for k in range(a.shape[1]):
        out += h[:, k, None].astype("f4") * a[None, :, k].astype("f4")
    return out.astype(x.dtype)


def reduced(x: Array, w: Array, a: Array, b: Array) -> Array:
    """The same sum as one reduction of a product that is broadcast to three axes."""
    h, a = hidden(x, b).astype("f4"), a.astype(x.dtype).astype("f4")
    return (product(x, w, "f4") + jnp.sum(h[:, None] * a[None], -1)).astype(x.dtype)


def loop(x: Array, w: Array, a: Array, b: Array) -> Array:
    """Two products for an eighth of the tokens at a time, written into the result."""
    size = x.shape[0] // 8

    def body(i: Array, out: Array) -> Array:
        part = two_wide_products(lax.dynamic_slice_in_dim(x, i * size, size), w, a, b)
        return lax.dynamic_update_slice_in_dim(out, part, i * size, 0)

    return lax.fori_loop(0, 8, body, jnp.zeros((x.shape[0], w.shape[0]), x.dtype))


def with_products_tangent(form: Callable[..., Array]) -> Callable[..., Array]:
    """Gives a form the derivative of two products."""
    function = jax.custom_jvp(form)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return form(*primals), jax.jvp(two_wide_products, primals, tangents)[1]

    return function


@jax.custom_vjp
def one_product_each_way(x: Array, w: Array, a: Array, b: Array) -> Array:
    """One product, and one for the gradients of `x` and of `x b^T`."""
    return one_product(x, w, a, b)


def _forward(x: Array, w: Array, a: Array, b: Array) -> Any:
    return one_product(x, w, a, b), (x, w, a, b)


def _backward(saved: Any, g: Array) -> Any:
    x, w, a, b = saved
    both = lax.dot(g, jnp.concatenate([w, a.astype(w.dtype)], 1))
    dx, dh = both[:, : x.shape[1]], both[:, x.shape[1] :] * SCALING
    da = lax.dot_general(g, hidden(x, b), (((0,), (0,)), ((), ())), preferred_element_type="f4")
    db = lax.dot_general(dh, x, (((0,), (0,)), ((), ())), preferred_element_type="f4")
    return (
        dx + lax.dot(dh, b.astype(x.dtype)), jnp.zeros_like(w), da.astype(a.dtype),
        db.astype(b.dtype),
    )  # fmt: skip


one_product_each_way.defvjp(_forward, _backward)


def adapted(x: Array, w: Array, a: Array, b: Array) -> Array:
    """What this library does."""
    params = {"embed": jax.ShapeDtypeStruct(w.shape, w.dtype)}
    config = tied_lora.LoraConfig(
        r=a.shape[1], lora_alpha=int(SCALING * a.shape[1]), target_modules=["embed"]
    )
    whole = tied_lora.wrap(params, config)
    factors = {"lora": {"embed": {"lora_a": a, "lora_b": b}}}
    assert jax.tree.structure(whole.adapters) == jax.tree.structure(factors)
    scaling = jax.tree.map(lambda x: jnp.full(x.shape, SCALING, x.dtype), whole.scaling)
    whole = whole.replace(params={"embed": w}, adapters=factors, scaling=scaling)
    return tied_lora.adapt(lambda p, x: x @ p["embed"].T, on_dense="error")(whole, x)


FORMS: dict[str, Callable[..., Array]] = {
    NONE: no_delta,
    OURS: adapted,
    "two products": two_products,
    "two products in float32": two_wide_products,
    "sum of rank-one terms": with_products_tangent(terms),
    "reduction of a broadcast": with_products_tangent(reduced),
    "one product": one_product_each_way,
    "loop over tokens": with_products_tangent(loop),
}


def loss_of(form: Callable[..., Array]) -> Callable[..., Any]:
    """Returns a function of data, table, factors, labels: a loss, gradients but the table's."""

    def loss(x: Array, w: Array, a: Array, b: Array, labels: Array) -> Array:
        logits = form(x, w, a, b).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.value_and_grad(loss, (0, 2, 3))


def measure(
    form: Callable[..., Array], tokens: int, vocabulary: int, rank: int, dtype: Any, kind: str,
    device: Any,
) -> dict[str, Any]:  # fmt: skip
    width = WIDTHS[vocabulary]
    struct = jax.ShapeDtypeStruct
    args = [
        struct((tokens, width), dtype), struct((vocabulary, width), dtype),
        struct((vocabulary, rank), jnp.float32), struct((rank, width), jnp.float32),
    ]  # fmt: skip
    if kind == "loss and gradients":
        form = loss_of(form)
        args.append(struct((tokens,), jnp.int32))
    program = _tpu.compiled(form, *args, device=device)
    arrays = _tpu.made(program.as_text(), tokens * vocabulary)
    return _tpu.figures(program) | {"[T, V] arrays written": arrays}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown, a table for each shape."""
    out = []
    for (tokens, vocabulary, rank, dtype, kind), group in itertools.groupby(
        rows, lambda r: (r["T"], r["V"], r["r"], r["dtype"], r["pass"])
    ):
        cells = list(group)
        base = next(c for c in cells if c["form"] == NONE)
        logits = tokens * vocabulary * jnp.dtype(dtype).itemsize
        out += [
            f"\nT={tokens}, V={vocabulary}, D={WIDTHS[vocabulary]}, r={rank}, {dtype}, {kind} "
            f"(one [T, V] array: {logits / 2**20:.0f} MiB)\n",
            "| form | temp MiB | GFLOP | GB moved | est. Mcycles | / no delta | [T, V] written |",
            "|---|---|---|---|---|---|---|",
        ]
        for c in cells:
            out.append(
                f"| {c['form']} | {c['temporary bytes'] / 2**20:.0f} | {c['FLOPs'] / 1e9:.0f} | "
                f"{c['bytes accessed'] / 1e9:.2f} | {c['estimated cycles'] / 1e6:.2f} | "
                f"{c['estimated cycles'] / base['estimated cycles']:.2f} | "
                f"{', '.join(t.split('[')[0] for t in c['[T, V] arrays written']) or 'none'} |"
            )
    return "\n".join(out)


def main() -> None:
    device = _tpu.devices()[0]
    cells = CELLS
    if "--all" in sys.argv[1:]:
        cells = list(itertools.product((256, 2048, 4096), WIDTHS, (8, 64)))
    rows = []
    for (tokens, vocabulary, rank), dtype, kind, name in itertools.product(
        cells, ("bfloat16", "float32"), ("forward", "loss and gradients"), FORMS
    ):
        start = time.perf_counter()
        found = measure(FORMS[name], tokens, vocabulary, rank, dtype, kind, device)
        cell = {"T": tokens, "V": vocabulary, "r": rank, "dtype": dtype, "pass": kind}
        rows.append(cell | {"form": name} | found)
        seconds = time.perf_counter() - start
        print(*rows[-1].values(), f"{seconds:.0f} s", sep=" | ", file=sys.stderr, flush=True)
    store("projection_forms", {**_tpu.versions(device), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()

"""What is only there for XLA on the CPU. A test that fails at its second assertion is good news.

It says that XLA does by itself what the workaround in `_algebra/for_cpu.py` is for: it can go.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_tied_lora._algebra import for_cpu
from tests.helpers.compiling import as_shipped
from tests.helpers.oracle import array, numbers

TOKENS, WIDTH, COLUMNS, RANK = 64, 8, 2048, 3
X, W = array(TOKENS, WIDTH), array(WIDTH, COLUMNS, seed=1)
HIDDEN, FACTOR = array(TOKENS, RANK, seed=2), array(RANK, COLUMNS, seed=3)
LOGITS = 4 * TOKENS * COLUMNS


def program(function: Any, *args: Any) -> Any:
    return as_shipped(jax.jit(function).lower(*args))


def temporary(function: Any, *args: Any) -> int:
    return program(function, *args).memory_analysis().temp_size_in_bytes


def by_parts(x: Any, w: Any, hidden: Any, factor: Any) -> Any:
    return for_cpu.added_by_parts(x @ w, hidden, factor, None)


def test_a_product_is_added_in_place():
    args = X, W, HIDDEN, FACTOR
    assert temporary(by_parts, *args) < 0.5 * LOGITS
    assert temporary(lambda x, w, hidden, factor: x @ w + hidden @ factor, *args) >= LOGITS


def test_a_gradient_over_tokens_copies_nothing():
    x, w = X.reshape(4, 16, WIDTH), array(WIDTH, RANK, seed=4)

    def copies(product: Any) -> int:
        step = jax.grad(lambda w, x: jnp.sin(product(x, w)).sum())
        return len(re.findall(r" (?:copy|transpose)\(", program(step, w, x).as_text()))

    def joined(x: Any, w: Any) -> Any:
        return for_cpu.tokens_joined(x, 2) @ w

    assert for_cpu.joins_tokens(x, 2)
    assert copies(joined) == 0
    assert copies(lambda x, w: x @ w) > 0


def test_a_gradient_by_a_wide_factor_is_a_fast_product():
    def products(product: Any) -> list[str]:
        step = jax.grad(lambda factor, hidden: jnp.sin(product(hidden, factor)).sum())
        text = program(step, FACTOR.T, HIDDEN).as_text()
        return re.findall(r"= f32\[(3,2048|2048,3)\]\S* dot\(", text)

    def ranks_first(hidden: Any, factor: Any) -> Any:
        rows, columns = for_cpu.rank_first(hidden, 1), for_cpu.rank_first(factor, 1)
        return lax.dot_general(rows, columns, (((0,), (0,)), ((), ())))

    assert products(ranks_first) == ["3,2048"]
    assert products(lambda hidden, factor: hidden @ factor.T) == ["2048,3"]


def test_integers_wait_for_data():
    """Dequantised for each product, and not once for both."""
    values = numbers(WIDTH, WIDTH, below=100).astype(jnp.int8)

    def dequantised(waiting: Any) -> int:
        def function(x: Any, values: Any) -> Any:
            for _ in range(2):
                x = jnp.tanh(x @ waiting(x, values).astype(jnp.float32))
            return x

        text = program(function, X, values).as_text()
        return len(
            re.findall(r"= f32\[8,8\]\S* (?:fusion|convert)\(.*s8|= f32\[8,8\]\S* convert\(", text)
        )

    assert dequantised(for_cpu.waited_for) == 2
    barrier = dequantised(lambda x, values: lax.optimization_barrier((x, values))[1])
    # The XLA of jax 0.12 waits by itself; that of the jax for Python 3.11 does not.
    assert barrier == (1 if jax.__version_info__ < (0, 11) else 2)


def test_a_function_of_rows_has_their_memory():
    def slopes(by_rows: Any) -> int:
        def function(*args: Any) -> Any:
            logits = by_parts(*args)
            norm = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
            out = by_rows(lambda x, n: jnp.exp(x - n[:, None]), logits, norm)
            return norm, out @ args[1].T

        return temporary(function, X, W, HIDDEN, FACTOR)

    assert slopes(for_cpu.by_rows) < 1.5 * LOGITS
    assert slopes(lambda function, *args: function(*args)) >= 2 * LOGITS


def test_an_entry_of_each_row_is_picked_without_an_array():
    places = numbers(TOKENS, below=COLUMNS)

    def summed(values: Any, places: Any) -> Any:
        hot = jnp.arange(COLUMNS)[None] == places[:, None]
        return jnp.sum(jnp.where(hot, values, 0), axis=-1)

    def memory(picked: Any) -> int:
        def loss_and_slopes(x: Any, w: Any, places: Any) -> Any:
            values = x @ w
            norm = jnp.log(jnp.sum(jnp.exp(values), axis=-1))
            return norm - picked(values, places), jnp.exp(values - norm[:, None]) @ w.T

        return temporary(loss_and_slopes, X, W, places)

    assert jnp.allclose(for_cpu.at_places(X @ W, places), summed(X @ W, places))
    assert memory(for_cpu.at_places) < 1.5 * LOGITS
    assert memory(summed) >= 2 * LOGITS

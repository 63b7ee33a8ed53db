"""Drawing control flow: a body of rearranging operations, a read, or another call in it."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from tests.helpers.draw_reads import POLICIES, read
from tests.helpers.draw_rearranging import REARRANGING, SIMPLE
from tests.helpers.draw_values import LARGEST, Maker, Value
from tests.helpers.programs import Call

# kind -> the call; {f}: the body, {v}: its argument, {s}: a vector of two, {p}: an integer or 0.
CALLS = {
    "jit": "jax.jit({f})({v})",
    "jit twice": "jax.jit({f})({v}) + jax.jit({f})(2.0 * {v})",
    "checkpoint": "jax.checkpoint({f}, policy={policy})({v})",
    "scan, constant": "lax.scan(lambda c, s: (c, {f}({v}) * s), 0, {s})[1]",
    "scan, carried": "lax.scan(lambda c, s: (c, {f}(c) * s), {v}, {s})[1]",
    "scan, changed": "lax.scan(lambda c, s: (c * 0.5, {f}(c) * s), {v}, {s})[1]",
    "scan, swapped": "lax.scan(lambda c, s: (c[::-1], {f}(c[0]) * s), ({v}, -{v}), {s})[1]",
    "scan, data": "lax.scan(lambda c, s: (c * 0.5 + {f}({v}), None), {f}({v}), {s})[0]",
    "fori": "lax.fori_loop(0, 2, lambda i, y: y * 0.5 + {f}({v}), {f}({v}))",
    "cond": "lax.cond({p} > 0, {f}, lambda w: {f}(w * 2.0), {v})",
    "cond, alike": "lax.cond({p} > 0, {f}, {f}, {v})",
    "switch": "lax.switch({p} + 1, [{f}, lambda w: {f}(-w), {f}], {v})",
    "jvp": "jax.jvp({f}, ({v},), ({v},))[1]",
}
# The same with a body that takes one entry of the leading axis.
WALKS = {
    "scan": "lax.scan(lambda c, w: (c, {f}(w)), 0, {v}, reverse={flag})[1]",
    "scan, unrolled": "lax.scan(lambda c, w: (c, {f}(w)), 0, {v}, unroll={count})[1]",
    "vmap": "jax.vmap({f})({v})",
    "map": "lax.map({f}, {v})",
}
GRADIENT = "jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.real({f}(w)).astype(jnp.float32))))({v})"


def call(m: Maker, v: Value, depth: int) -> Value | None:
    """Draws a body and a transformation around it."""
    kind = m.pick(*CALLS, *(WALKS if len(v.shape) > 1 else ()), "gradient")
    function, argument = m.fresh("f"), m.fresh("w")
    outside, m.steps, data, m.data = m.steps, [], m.data, []
    inner = Value(argument, v.shape[1:] if kind in WALKS else v.shape, v.dtype)
    # What a loop makes at each step, and what is differentiated, is an array in any case.
    rearranges = kind in ("jit", "checkpoint", "cond", "cond, alike", "switch", "jvp")
    result = _body(m, inner, depth, reads=not rearranges or m.pick(1, 0))
    body, m.steps, m.data = tuple(m.steps), outside, data

    shape, dtype = result.shape, result.dtype
    if kind.startswith("scan") and kind in CALLS and kind != "scan, data":
        shape = (2, *shape)
    if kind in WALKS:
        shape = (v.shape[0], *shape)
    if kind == "gradient":
        shape, dtype = v.shape, v.dtype
    form = GRADIENT if kind == "gradient" else {**CALLS, **WALKS}[kind]
    if math.prod(shape) > 4 * LARGEST:
        return None
    steps = f"{m.floats((2,), result.dtype)}" if "{s}" in form else ""
    text = form.format(
        f=function, v=v.name, s=steps, p=m.ints((), 2, -1) if "{p}" in form else "",
        policy=m.pick(*POLICIES) if "{policy}" in form else "",
        flag=m.pick(True, False) if "{flag}" in form else "",
        count=m.pick(1, v.shape[0]) if "{count}" in form else "",
    )  # fmt: skip
    name = m.fresh("w" if result.name[0] == "w" else "y")  # w: may still be a weight
    m.steps.append(Call(name, function, argument, body, result.name, text))
    return Value(name, shape, dtype)


def _body(m: Maker, v: Value, depth: int, reads: bool) -> Value:
    chain = REARRANGING if m.pick(0, 0, 0, 1) else SIMPLE
    for _ in range(m.draw(st.integers(0, 2))):
        v = m.pick(*chain)(m, v) or v
    if depth > 1 and m.pick(0, 0, 1):
        return call(m, v, depth - 1) or v
    if reads:
        v = read(m, v)
    return v

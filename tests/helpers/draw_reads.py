"""Drawing where a weight meets data: lookups, products, and what densifies it."""

from __future__ import annotations

import math
import string

from hypothesis import strategies as st

from tests.helpers.draw_values import LARGEST, Maker, Operation, Value, at, changed

POLICIES = (
    "None", "jax.checkpoint_policies.everything_saveable", "jax.checkpoint_policies.dots_saveable",
    "jax.checkpoint_policies.save_only_these_names('w')",
)  # fmt: skip


def _ids(m: Maker, n: int, beyond: int, room: int) -> tuple[str, tuple[int, ...]]:
    """Returns indices of any rank, some up to so many below or above bounds, and their shape."""
    shapes = [s for s in ((), (3,), (2, 2), (1, 2, 2), (0,)) if math.prod(s) <= room]
    shape = m.pick(*shapes)
    return m.ints(shape, n + beyond, -n - beyond if beyond else 0), shape


def take(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None:
        return None
    n = v.shape[i]
    beyond, least = m.pick((0, 0), (3, -n - 2))
    shape = m.pick((), (3,), (2, 2))
    ids = m.ints(shape, n + beyond, least)
    # Out of bounds on purpose: each mode has its own answer, which has to be that of the weight.
    mode = m.pick("'clip'", "'wrap'", "'fill'", "'fill', fill_value=0", "'fill', fill_value=0.5")
    form = f"jnp.take({v.name}, {ids}, axis={i}, mode={mode})"
    return m.step(form, changed(v.shape, i, *shape), v.dtype, "y")


def index(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None:
        return None
    beyond = m.pick(0, 0, 2)  # out of bounds on purpose, in each mode
    ids, shape = _ids(m, v.shape[i], beyond, LARGEST // max(math.prod(v.shape) // v.shape[i], 1))
    if i == 0 and m.pick(True, False):
        form = m.pick("{}[({},)]", "{}[{}, ...]", "{}.at[{}].get(mode='fill', fill_value=-1)",
                      "{}.at[{}].get(mode='clip')", "{}.at[{}].get(mode='promise_in_bounds')",
                      "jax.vmap(lambda i, w={}: w[i])(jnp.atleast_1d({}))")  # fmt: skip
        if "vmap" in form and not shape:
            shape = (1,)
        return m.step(form.format(v.name, ids), (*shape, *v.shape[1:]), v.dtype, "y")
    return m.step(at(v, i, ids), changed(v.shape, i, *shape), v.dtype, "y")


def index_two(m: Maker, v: Value) -> Value | None:
    if len(v.shape) < 2:
        return None
    shape, beyond = m.pick((3,), (2, 2)), m.pick(0, 0, 2)
    first, second = m.ints(shape, v.shape[0] + beyond), m.ints(shape, v.shape[1] + beyond)
    return m.step(f"{v.name}[{first}, {second}]", (*shape, *v.shape[2:]), v.dtype, "y")


def index_batched(m: Maker, v: Value) -> Value | None:
    if len(v.shape) < 2:
        return None
    ids = m.ints((v.shape[0], 2), v.shape[1] + m.pick(0, 0, 2))
    form = f"jax.vmap(lambda w, i: w[i])({v.name}, {ids})"
    return m.step(form, (v.shape[0], 2, *v.shape[2:]), v.dtype, "y")


def along_axis(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None:
        return None
    shape = changed(v.shape, i, 2)
    ids = m.ints(shape, v.shape[i] + m.pick(0, 0, 2))
    return m.step(f"jnp.take_along_axis({v.name}, {ids}, axis={i})", shape, v.dtype, "y")


def one_hot(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None:
        return None
    ids, shape = m.ints((3,), v.shape[i]), (3, *changed(v.shape, i))
    hot = f"jax.nn.one_hot({ids}, {v.shape[i]}, dtype={v.name}.dtype)"
    form = m.pick(
        "{0}",
        "jnp.squeeze(jnp.swapaxes(jnp.expand_dims({0}, 1), 0, 1), 0)",
        "jnp.flip({0}, 0)",
        "{0} + jnp.flip({0}, 1)",  # a bag of two tokens
        "0.9 * {0} + 0.1",  # smoothed labels
    )
    return m.step(f"jnp.tensordot({form.format(hot)}, {v.name}, (1, {i}))", shape, v.dtype, "y")


def window(m: Maker, v: Value) -> Value | None:
    if not v.shape:
        return None
    sizes = tuple(m.draw(st.integers(1, n)) for n in v.shape)
    starts = ", ".join(m.ints((), n + 2) for n in v.shape)
    return m.step(f"lax.dynamic_slice({v.name}, ({starts},), {sizes})", sizes, v.dtype, "y")


def product(m: Maker, v: Value) -> Value | None:
    """Draws a dot_general of any layout: axes summed over, batch axes, the leaf on either side."""
    roles = [m.pick("sum", "sum", "free", "free", "batch") for _ in v.shape]
    summed = [i for i, r in enumerate(roles) if r == "sum"]
    batch = [i for i, r in enumerate(roles) if r == "batch"]
    free = [i for i, r in enumerate(roles) if r == "free"]
    more = m.pick((), (3,), (2, 2))
    order = m.draw(st.permutations([*summed, *batch, *("more" for _ in more)]))
    extra = iter(more)
    sizes = tuple(next(extra) if k == "more" else v.shape[k] for k in order)
    own = tuple(v.shape[i] for i in free)
    lead = tuple(v.shape[i] for i in batch)
    if max(math.prod(sizes), math.prod((*lead, *own, *more))) > LARGEST:
        return None
    there = [order.index(i) for i in summed], [order.index(i) for i in batch]
    wide = (", preferred_element_type=jnp.float32", "float32")
    options, dtype = m.pick(
        ("", v.dtype), ("", v.dtype), wide, (", precision='highest'", v.dtype), ("data", "")
    )  # fmt: skip
    if options == "data":
        x, options, dtype = _other_data(m, sizes, v.dtype)
    else:
        x = m.floats(sizes, v.dtype)
    if m.pick(True, False):
        dims = ((summed, there[0]), (batch, there[1]))
        return m.step(
            f"lax.dot_general({v.name}, {x}, {dims}{options})", (*lead, *own, *more), dtype, "y"
        )
    dims = ((there[0], summed), (there[1], batch))
    return m.step(
        f"lax.dot_general({x}, {v.name}, {dims}{options})", (*lead, *more, *own), dtype, "y"
    )


def _other_data(m: Maker, sizes: tuple[int, ...], dtype: str) -> tuple[str, str, str]:
    """Draws data of another dtype than the weight's; what the product's options and dtype are."""
    if dtype == "float32" and m.pick(True, False):
        parts = m.floats(sizes, dtype), m.floats(sizes, dtype)
        return f"lax.complex({parts[0]}, {parts[1]})", "", "complex64"
    others = [d for d in ("float32", "bfloat16", "float16") if d != dtype]
    return m.floats(sizes, m.pick(*others)), ", preferred_element_type=jnp.float32", "float32"


def einsum(m: Maker, v: Value) -> Value | None:
    """Draws an einsum; the data may be what an earlier read gave."""
    names = string.ascii_lowercase[: len(v.shape)]
    fitting = [
        (d, i, j) for d in m.data if d.dtype == v.dtype and len(d.shape) < 4
        for i, n in enumerate(d.shape) for j, k in enumerate(v.shape) if n == k
    ]  # fmt: skip
    if fitting and m.pick(True, False):
        d, i, j = m.pick(*fitting)
        theirs = "".join(names[j] if k == i else "uvxyz"[k] for k in range(len(d.shape)))
        x, sizes = d.name, dict(zip(theirs, d.shape, strict=True))
    else:
        kept = [c for c in names if m.pick(True, False)]
        sizes = {c: v.shape[names.index(c)] for c in kept} | {"z": 3}
        theirs = "".join(m.draw(st.permutations(list(sizes))))
        x = m.floats(tuple(sizes[c] for c in theirs), v.dtype)
    sizes |= dict(zip(names, v.shape, strict=True))
    out = "".join(
        c for c in m.draw(st.permutations(list(sizes))) if c not in theirs or m.pick(1, 0)
    )
    shape = tuple(sizes[c] for c in out)
    if math.prod(shape) > LARGEST or len(out) > 5:
        return None
    pairs = ((theirs, x), (names, v.name))
    (a, first), (b, second) = pairs if m.pick(True, False) else pairs[::-1]
    return m.step(f"jnp.einsum('{a},{b}->{out}', {first}, {second})", shape, v.dtype, "y")


def with_itself(m: Maker, v: Value) -> Value | None:
    if len(v.shape) < 2 or len(v.shape) > 3:
        return None
    i = m.axis(v)
    assert i is not None
    rest = changed(v.shape, i)
    shape = (*rest, *rest)
    if math.prod(shape) > LARGEST:
        return None
    return m.step(f"jnp.tensordot({v.name}, {v.name}, (({i},), ({i},)))", shape, v.dtype, "y")


def of_two(m: Maker, v: Value) -> Value | None:
    """Draws a product of two forms of the weight, both of which stay weights up to it."""
    if len(v.shape) != 2:
        return None
    form, shape = m.pick(
        ("{0} @ {0}.T", (v.shape[0],) * 2),
        ("{0}.T @ (2.0 * {0})", (v.shape[1],) * 2),
        ("jnp.einsum('ij,ij->i', {0}, jnp.flip({0}, 0))", v.shape[:1]),
        ("{0} * jnp.flip({0}, 1)", v.shape),
        ("{0} / (2.0 + {0} * {0})", v.shape),
    )
    return m.step(form.format(v.name), shape, v.dtype, "y") if math.prod(shape) <= LARGEST else None


def ragged(m: Maker, v: Value) -> Value | None:
    if len(v.shape) != 3 or 0 in v.shape:
        return None
    groups, rows, cols = v.shape
    x, sizes = m.floats((6, rows), v.dtype), [2, 0, 3, 1, *[0] * groups][:groups]
    form = f"lax.ragged_dot({x}, {v.name}, jnp.array({sizes}))"
    return m.step(form, (6, cols), v.dtype, "y")


def conv(m: Maker, v: Value) -> Value | None:
    if len(v.shape) != 3 or 0 in v.shape:
        return None
    _, channels, outs = v.shape
    groups = m.pick(*(g for g in (1, 2) if outs % g == 0))
    stride = m.pick(1, 2)
    x = m.floats((2, 5, channels * groups), v.dtype)
    form = (
        f"lax.conv_general_dilated({x}, {v.name}, ({stride},), 'SAME', "
        f"dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count={groups})"
    )
    return m.step(form, (2, -(-5 // stride), outs), v.dtype, "y")


def other(m: Maker, v: Value) -> Value:
    form = m.pick(
        "jnp.sin({})", "{0} * {0}", "jnp.cumsum({}, 0)", "jax.nn.softmax({}, 0)", "{} + 1.0"
    )
    if not v.shape:
        form = "jnp.sin({})"
    return m.step(form.format(v.name), v.shape, v.dtype, "y")


def read(m: Maker, v: Value) -> Value:
    """Draws a read that fits the value; the value itself if three tries found none."""
    for _ in range(3):
        if (y := m.pick(*READS)(m, v)) is not None:
            return y
    return v


READS: tuple[Operation, ...] = (
    take, take, index, index, index_two, index_batched, along_axis, one_hot, window, product,
    product, product, einsum, einsum, with_itself, of_two, ragged, conv, other,
)  # fmt: skip

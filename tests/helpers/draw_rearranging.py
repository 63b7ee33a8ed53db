"""Drawing what only rearranges, scales or sums a value: a weight stays one."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from tests.helpers.draw_values import LARGEST, Maker, Operation, Value, at, changed


def transpose(m: Maker, v: Value) -> Value:
    order = tuple(m.draw(st.permutations(range(len(v.shape)))))
    return m.step(f"jnp.transpose({v.name}, {order})", tuple(v.shape[i] for i in order), v.dtype)


def merge_axes(m: Maker, v: Value) -> Value | None:
    if len(v.shape) < 2:
        return None
    i = m.draw(st.integers(0, len(v.shape) - 2))
    shape = (*v.shape[:i], v.shape[i] * v.shape[i + 1], *v.shape[i + 2 :])
    return m.step(f"{v.name}.reshape({shape})", shape, v.dtype)


def split_axis(m: Maker, v: Value) -> Value | None:
    i = m.axis(v, 2)
    if i is None or len(v.shape) > 3:
        return None
    n = v.shape[i]
    first = m.pick(*(k for k in range(1, n + 1) if n % k == 0))
    shape = changed(v.shape, i, first, n // first)
    return m.step(f"{v.name}.reshape({shape})", shape, v.dtype)


def expand(m: Maker, v: Value) -> Value | None:
    if len(v.shape) > 3:
        return None
    i = m.draw(st.integers(0, len(v.shape)))
    shape = (*v.shape[:i], 1, *v.shape[i:])
    return m.step(f"jnp.expand_dims({v.name}, {i})", shape, v.dtype)


def squeeze(m: Maker, v: Value) -> Value | None:
    ones = [i for i, n in enumerate(v.shape) if n == 1]
    if not ones or len(v.shape) < 2:
        return None
    i = m.pick(*ones)
    return m.step(f"jnp.squeeze({v.name}, {i})", changed(v.shape, i), v.dtype)


def broadcast(m: Maker, v: Value) -> Value | None:
    if len(v.shape) > 3 or 2 * math.prod(v.shape) > LARGEST:
        return None
    i = m.draw(st.integers(0, len(v.shape)))
    shape = (*v.shape[:i], 2, *v.shape[i:])
    return m.step(f"jnp.broadcast_to(jnp.expand_dims({v.name}, {i}), {shape})", shape, v.dtype)


def cut(m: Maker, v: Value) -> Value | None:
    i = m.axis(v, 2)
    if i is None:
        return None
    n = v.shape[i]
    start = m.draw(st.integers(0, n - 1))
    stop, stride = m.draw(st.integers(start + 1, n)), m.pick(1, 1, 2)
    rows = len(range(start, stop, stride))
    return m.step(at(v, i, f"{start}:{stop}:{stride}"), changed(v.shape, i, rows), v.dtype)


def split(m: Maker, v: Value) -> Value | None:
    even = [i for i, n in enumerate(v.shape) if n % 2 == 0]
    if not even:
        return None
    i, part = m.pick(*even), m.pick(0, 1)
    shape = changed(v.shape, i, v.shape[i] // 2)
    return m.step(f"jnp.split({v.name}, 2, axis={i})[{part}]", shape, v.dtype)


def concatenate(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None or 3 * math.prod(v.shape) > LARGEST:
        return None
    more = m.floats(changed(v.shape, i, 2), v.dtype)
    first, second = m.pick((v.name, more), (more, v.name), (v.name, v.name))
    added = v.shape[i] if first == second else 2
    shape = changed(v.shape, i, v.shape[i] + added)
    return m.step(f"jnp.concatenate([{first}, {second}], axis={i})", shape, v.dtype)


def pad(m: Maker, v: Value) -> Value | None:
    i = m.axis(v, 2)
    if i is None or 3 * math.prod(v.shape) > LARGEST:
        return None
    low, high, inner = m.pick((0, 2, 0), (1, 0, 0), (-1, 1, 0), (0, 1, 1))
    config = [(low, high, inner) if k == i else (0, 0, 0) for k in range(len(v.shape))]
    n = v.shape[i]
    value = f"jnp.array({m.pick('0', '0.5')}, {v.name}.dtype)"
    shape = changed(v.shape, i, n + low + high + inner * (n - 1))
    return m.step(f"lax.pad({v.name}, {value}, {config})", shape, v.dtype)


def cast(m: Maker, v: Value) -> Value:
    if m.low and m.pick(True, False):
        return m.step(f"{v.name}.astype(low)", v.shape, m.low)
    return m.step(f"{v.name}.astype(jnp.float32)", v.shape, "float32")


def scalar(m: Maker, v: Value) -> Value:
    form = m.pick("{} * 2.0", "{} / 3.0", "-{}", "0.5 * {}", "{} * {s}", "{} / (2.0 + {s} * {s})")
    s = m.floats((), v.dtype) if "{s}" in form else ""
    return m.step(form.format(v.name, s=s), v.shape, v.dtype)


def vector(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None:
        return None
    shape = tuple(n if k == i else 1 for k, n in enumerate(v.shape))
    form = m.pick("{} * {}", "{} / (2.0 + jnp.abs({}))")
    return m.step(form.format(v.name, m.floats(shape, v.dtype)), v.shape, v.dtype)


def same(m: Maker, v: Value) -> Value:
    form = m.pick("lax.optimization_barrier({})", "jnp.copy({})", "{0} + 0.5 * {0}",
                  "{0} - 2.0 * {0}", "lax.stop_gradient({})",
                  "checkpoint_name({}, 'w')")  # fmt: skip
    return m.step(form.format(v.name), v.shape, v.dtype)


def flip(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None:
        return None
    return m.step(f"jnp.flip({v.name}, {i})", v.shape, v.dtype)


def added(m: Maker, v: Value) -> Value | None:
    """Draws a weight added to itself, once or many times, as in smoothing or a prefix sum."""
    i = m.axis(v)
    if i is None:
        return None
    form = m.pick(
        "{0} + jnp.flip({0}, {i})",
        "{0} - jnp.roll({0}, 1, {i})",
        "functools.reduce(lambda w, _: 0.5 * (w + jnp.flip(w, {i})), range({n}), {0})",
        "functools.reduce(lambda w, k: w + jnp.roll(w, k, {i}) / 4, range({n}), {0})",
        "lax.associative_scan(jnp.add, {0}, axis={i})",
    )
    return m.step(form.format(v.name, i=i, n=m.pick(2, 4, 8)), v.shape, v.dtype)


def total(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None or len(v.shape) < 2:
        return None
    return m.step(f"jnp.{m.pick('sum', 'mean')}({v.name}, {i})", changed(v.shape, i), v.dtype)


def element(m: Maker, v: Value) -> Value | None:
    i = m.axis(v)
    if i is None or len(v.shape) < 2:
        return None
    n, shape = v.shape[i], changed(v.shape, i)
    if m.pick(True, False):
        return m.step(at(v, i, str(m.draw(st.integers(-n, n - 1)))), shape, v.dtype)
    index = m.ints((), n)
    return m.step(
        f"lax.dynamic_index_in_dim({v.name}, {index}, {i}, keepdims=False)", shape, v.dtype
    )


REARRANGING: tuple[Operation, ...] = (
    transpose, merge_axes, split_axis, expand, squeeze, broadcast, cut, split, concatenate, pad,
    cast, scalar, vector, same, flip, added, total, element,
)  # fmt: skip
# Rows and columns are scaled, summed or mixed in these: fewer of them keeps more programs low rank.
SIMPLE: tuple[Operation, ...] = (
    transpose, split_axis, expand, squeeze, broadcast, cut, split, concatenate, pad, cast, scalar,
    same, flip, added,
)  # fmt: skip

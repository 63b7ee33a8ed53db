"""Hypothesis strategy for the programs of `programs.py`.

The shape and dtype of every value are kept while drawing, so that what is drawn is valid code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.helpers.programs import Leaf, Program, Step

LARGEST = 600  # entries of a value: programs stay cheap to compile and run


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value of the program."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass
class Maker:
    """A program in the making."""

    draw: Any
    low: str
    arguments: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    steps: list[Any] = dataclasses.field(default_factory=list)
    data: list[Value] = dataclasses.field(default_factory=list)
    count: int = 0

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def axis(self, v: Value, least: int = 1) -> int | None:
        """Returns an axis of at least that size."""
        axes = [i for i, n in enumerate(v.shape) if n >= least]
        return self.draw(st.sampled_from(axes)) if axes else None

    def fresh(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def floats(self, shape: tuple[int, ...], dtype: str) -> str:
        """Returns the name of a new argument of that shape."""
        name = self.fresh("x")
        sizes = "".join(f"{n}, " for n in shape)
        self.arguments.append((name, f"array({sizes}seed={self.count}, dtype=jnp.{dtype})"))
        return name

    def ints(self, shape: tuple[int, ...], below: int, least: int = 0) -> str:
        name = self.fresh("i")
        sizes = "".join(f"{n}, " for n in shape)
        bounds = f"below={below}, least={least}, seed={self.count}"
        self.arguments.append((name, f"numbers({sizes}{bounds})"))
        return name

    def step(self, expression: str, shape: tuple[int, ...], dtype: str, letter: str = "w") -> Value:
        name = self.fresh(letter)
        self.steps.append(Step(name, expression))
        return Value(name, tuple(shape), dtype)


Operation = Callable[[Maker, Value], Value | None]


def at(v: Value, axis: int, index: str) -> str:
    return f"{v.name}[{', '.join([':'] * axis + [index])}]"


def changed(shape: tuple[int, ...], axis: int, *sizes: int) -> tuple[int, ...]:
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


# Rearranging


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
    cast, scalar, vector, same, flip, total, element,
)  # fmt: skip
# Rows and columns are scaled, summed or mixed in these: fewer of them keeps more programs low rank.
SIMPLE: tuple[Operation, ...] = (
    transpose, split_axis, expand, squeeze, broadcast, cut, split, concatenate, pad, cast, scalar,
    same, flip,
)  # fmt: skip


@st.composite
def programs(draw: Any) -> Program:
    """Draws a program."""
    # These modules draw with the operations above.
    from tests.helpers.draw_calls import call
    from tests.helpers.draw_reads import read

    leaf = draw(leaves())
    low = "bfloat16" if leaf.dtype == "bfloat16" else draw(
        st.sampled_from(["", "", "", "bfloat16", "float16"])
    )  # fmt: skip
    m, results = Maker(draw, low), []
    for _ in range(draw(st.integers(1, 2))):
        if leaf.tied and draw(st.booleans()):
            v = m.step('params["head"]["kernel"]', leaf.shape[::-1], leaf.dtype)
        else:
            place = '["embed"]["embedding"]' if leaf.tied else '["dense"]["kernel"]'
            v = m.step(f"params{place}", leaf.shape, leaf.dtype)
        chain = REARRANGING if draw(st.integers(0, 3)) == 0 else SIMPLE
        for _ in range(draw(st.integers(0, 3))):
            v = draw(st.sampled_from(chain))(m, v) or v
        if draw(st.integers(0, 2)) == 0:
            v = call(m, v, depth=2) or v
        if v.name[0] == "w":
            v = read(m, v)
        results.append(v)
        m.data.append(v)
    names = tuple(dict.fromkeys(v.name for v in results))
    return Program(leaf, tuple(m.arguments), tuple(m.steps), names, low)


@st.composite
def leaves(draw: Any) -> Leaf:
    """Draws a leaf: a tied table, a kernel of two axes, stacked or per-head kernels."""
    kind = draw(st.sampled_from(["tied", "tied", "kernel", "3", "3", "4"]))
    rank, dtype = draw(st.integers(1, 2)), draw(st.sampled_from(["float32", "float32", "bfloat16"]))
    adapters = draw(st.sampled_from(["lora", "lora", "lora", "dora", "rows", "copy", "quantized"]))
    if kind == "tied":
        shape = draw(st.sampled_from([(6, 4), (8, 3), (4, 6)]))
        return Leaf(shape, dtype, rank, kind=adapters)
    ndim = 2 if kind == "kernel" else int(kind)
    shape = tuple(draw(st.sampled_from([2, 3, 4])) for _ in range(ndim))
    labels = draw(st.permutations([*"rc", *draw(st.sampled_from(["bb", "rb", "cb", "rc"]))][:ndim]))
    rows, cols = (tuple(i for i, x in enumerate(labels) if x == side) for side in "rc")
    if adapters == "rows" and (ndim > 2 or shape[cols[0]] < 3):
        adapters = "lora"  # tokens are along one axis, and two of them are not to be all there is
    return Leaf(shape, dtype, rank, rows, cols, adapters)

"""What drawing a program needs: values of known shape and dtype, and a program in the making."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.helpers.programs import Step

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

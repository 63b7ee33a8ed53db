"""Random programs for the oracle: straight-line JAX code around a weight, nested in control flow.

A program is data: its leaf, its arguments, and a list of steps, each a line of Python or a body
with a transformation around it. What runs is the rendered code, so what a failure prints is what
ran.
"""

from __future__ import annotations

import dataclasses
import textwrap
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import flax_tied_lora as tied_lora
from tests.helpers import oracle


@dataclasses.dataclass(frozen=True)
class Step:
    """One line: ``name = expression``."""

    name: str
    expression: str

    def lines(self) -> list[str]:
        return [f"{self.name} = {self.expression}"]


@dataclasses.dataclass(frozen=True)
class Call:
    """A body, and an expression that calls it under a transformation.

    Attributes:
      name: of the result.
      function: name of the body.
      argument: name of its one argument.
      body: its steps.
      result: what it returns.
      expression: the call.
    """

    name: str
    function: str
    argument: str
    body: tuple[Any, ...]
    result: str
    expression: str

    def lines(self) -> list[str]:
        inner = [line for step in self.body for line in step.lines()]
        return [
            f"def {self.function}({self.argument}):",
            *("    " + line for line in (*inner, f"return {self.result}")),
            f"{self.name} = {self.expression}",
        ]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The adapted leaf: a tied pair of table and transposed head, or one kernel.

    Attributes:
      shape, dtype: of the leaf.
      rank: of the factors.
      rows, cols: its axes; () for two axes in order, of a tied table; all others are batch.
      kind: of its adapters, as `tests.helpers.oracle.wrapped` has it.
      slot: of stacked adapters the one that is served: 1 its own, -1 none; the others are NaN.
        None where nothing is stacked.
    """

    shape: tuple[int, ...]
    dtype: str
    rank: int
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()
    kind: str = "lora"
    slot: int | None = None

    @property
    def tied(self) -> bool:
        return not self.rows

    def code(self) -> str:
        if self.slot is None:
            return self._alone()
        return f"{self._alone()}\nadapted = among_nan(adapted, {self.slot})"

    def _alone(self) -> str:
        weight = f"array(*{self.shape}, seed=1, dtype=jnp.{self.dtype})"
        if self.tied:
            return (
                f"table = {weight}\n"
                'params = {"embed": {"embedding": table}, "head": {"kernel": table.T}}\n'
                'ties = [("embed/embedding", "head/kernel")]\n'
                f'adapted = wrapped(params, ["embed"], r={self.rank}, kind="{self.kind}", '
                "ties=ties)"
            )
        return (
            f"adapted = labelled({self.shape}, {self.rows}, {self.cols}, r={self.rank}, "
            f'dtype=jnp.{self.dtype}, kind="{self.kind}")'
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, its leaf and its arguments.

    Attributes:
      leaf: the adapted leaf.
      arguments: ``(name, code)`` of each.
      steps: the program.
      results: names of what it returns.
      low: the dtype that its casts to lower precision go to, or "" where it has none.
    """

    leaf: Leaf
    arguments: tuple[tuple[str, str], ...]
    steps: tuple[Any, ...]
    results: tuple[str, ...]
    low: str

    def code(self) -> str:
        """Returns the program as code that runs from the root of the repository."""
        names = [name for name, _ in self.arguments]
        lines = [line for step in self.steps for line in step.lines()]
        low = f"jnp.{self.low or 'float32'}"
        head = f"def program({', '.join(['params', *names])}, low={low}):"
        reference = "lambda *args: program(*args, low=jnp.float32)" if self.low else "None"
        return "\n".join(
            [
                "import functools",
                "",
                "import jax",
                "import jax.numpy as jnp",
                "from jax import lax",
                "from jax.ad_checkpoint import checkpoint_name",
                "from tests.helpers.oracle import array, check, labelled, numbers, wrapped",
                "from tests.helpers.slots import among_nan",
                "",
                head,
                textwrap.indent("\n".join([*lines, f"return [{', '.join(self.results)}]"]), "    "),
                "",
                self.leaf.code(),
                *(f"{name} = {code}" for name, code in self.arguments),
                f"print(check(program, {', '.join(['adapted', *names])},",
                f'            on_dense="allow", reference={reference}))',
            ]
        )

    def _space(self) -> dict[str, Any]:
        source = self.code().rsplit("\nprint(check(", 1)[0]
        space: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": lax, "tied_lora": tied_lora}
        exec(compile(source, "<program>", "exec"), space)
        return space

    def is_possible(self) -> bool:
        """Returns whether JAX itself can run and differentiate the program on plain params."""
        space = self._space()
        arguments = [space[name] for name, _ in self.arguments]

        def total(params: Any) -> jax.Array:
            outputs = space["program"](params, *arguments)
            return sum(jnp.sum(jnp.abs(y).astype(jnp.float32)) for y in jax.tree.leaves(outputs))

        try:
            jax.eval_shape(jax.value_and_grad(total), tied_lora.base(space["adapted"]))
        except (NotImplementedError, TypeError):  # JAX rounds nothing complex, for one
            return False
        return True

    def run(self) -> list[str]:
        """Checks the program; returns the messages of weights that were added up."""
        space = self._space()
        program, low = space["program"], self.low
        with warnings.catch_warnings():
            # A program may well cut away all that it read.
            warnings.simplefilter("ignore", tied_lora.UnreadTargetWarning)
            return oracle.compare(
                program,
                space["adapted"],
                *(space[name] for name, _ in self.arguments),
                on_dense="warn",
                reference=(lambda *args: program(*args, low=jnp.float32)) if low else None,
            )

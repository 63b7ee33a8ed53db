"""What a rule is, and what it may ask of the evaluation that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NotImplementedType
from typing import Any, Protocol

from flax_tied_lora._algebra.site_filter import Role
from flax_tied_lora._algebra.weight import Term, Weight
from flax_tied_lora._interpreter.jaxprs import JaxprEqn, Var
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.sites import LeafInfo, Read


class Operand(Protocol):
    """What each operand of a rule has, an array or a symbolic weight."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


class RuleContext(Protocol):
    """What a rule may ask of the evaluation that it is part of.

    Most rules need only `evaluate`.
    """

    def evaluate(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Returns ``function(*operands)``, where symbolic weights are served as everywhere else.

        Args:
          function: plain JAX code. What it returns are arrays: a weight among its results is
            materialised.
          operands: arrays, symbolic weights, and pytrees of these.
        """
        ...

    def run(self, eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
        """Returns the outputs of an equation on arrays, run as it stands."""
        ...

    def apply(self, eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
        """Returns the outputs of an equation on arrays and symbolic weights, by its own rule."""
        ...

    def dense(self, eqn: JaxprEqn, weight: Weight) -> Any:
        """Returns a weight materialised as one array, and reports it with the equation's name.

        Raises:
          DensifyError: the caller of `adapt` asked for ``on_dense="error"``.
        """
        ...

    def returned(self, weight: Weight) -> Any:
        """Returns a weight materialised because the function hands it back."""
        ...

    def read(
        self, operation: str, weight: Weight, role: Role, *,
        rows: Sequence[int] = (), cols: Sequence[int] | None = None, batch: Sequence[int] = (),
    ) -> tuple[Term, ...]:  # fmt: skip
        """Returns the terms of a weight at a call site, which is kept among the reads.

        Args:
          operation: the name under which `explain` shows the call site.
          weight: the weight read.
          role: what the call site does with it.
          rows: axes of the weight that are picked from or summed over.
          cols: axes that remain in the result; all others by default.
          batch: axes that are walked in step with the data.
        """
        ...

    def picks_rows(
        self, weight: Weight, summed: Sequence[int], operand: Var, contracted: Sequence[int]
    ) -> bool:
        """Returns whether a product with a weight is a lookup of its rows.

        Args:
          summed: axes of the weight that are contracted.
          operand: what it is multiplied with.
          contracted: axes of the operand, in the order of ``summed``.
        """
        ...

    def is_table(self, weight: Weight) -> bool:
        """Returns whether a weight is a table, as far as is known."""
        ...

    def stays_weight(self, operation: str, weight: Weight, indexed: Sequence[int]) -> bool:
        """Returns whether indexing these axes picks no rows of a table, but layers or columns."""
        ...

    def varying_axes(self, operand: Var) -> tuple[int, ...]:
        """Returns the axes along which an operand may vary; it is constant along the others."""
        ...


class Evaluation(RuleContext, Protocol):
    """What the evaluator and the rules for programs inside an equation ask beyond that.

    The attributes are those of `Context`.
    """

    leaves: Mapping[str, LeafInfo]
    memo: dict[Any, Any]
    here: str
    provenance: Provenance
    shown: Mapping[str, str]

    @property
    def full_scope(self) -> str: ...

    def inside(self, reads: list[Read], provenance: Provenance, **changes: Any) -> Evaluation:
        """Returns the context of a program inside the current equation, with reads of its own."""
        ...

    def met(self, reads: Sequence[Read]) -> None:
        """Takes over the call sites of a program inside the current equation."""
        ...


class Rule(Protocol):
    """How an operation is served when a symbolic weight is among its operands.

    Called as ``rule(context, equation, *operands)``; a rule of `custom_rule` with the arguments of
    its function in place of the operands. Returns the list of the operation's outputs, each an
    array, or a symbolic weight where the operation only rearranges one; or `NotImplemented` where
    the rule does not cover this form of the operation, whose weights are then materialised.
    """

    # Both with Any: to a type checker, any further parameters.
    def __call__(
        self, context: RuleContext, equation: JaxprEqn, /, *operands: Any, **options: Any
    ) -> Sequence[Any] | NotImplementedType: ...

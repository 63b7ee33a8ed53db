"""What rules may ask of the evaluation that they are part of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from flax_tied_lora._algebra.site_filter import LOOKUP, OTHER, PROJECTION
from flax_tied_lora._algebra.term import Term
from flax_tied_lora._algebra.weight import Weight
from flax_tied_lora._interpreter import registry
from flax_tied_lora._interpreter.backward import is_backward, refuse_unknown
from flax_tied_lora._interpreter.costs import Cost, cost_beyond_plain, total
from flax_tied_lora._interpreter.equations import run
from flax_tied_lora._interpreter.evaluate import evaluate
from flax_tied_lora._interpreter.jaxprs import JaxprEqn, Var, operation_of
from flax_tied_lora._interpreter.materialised import (
    DensifyError,
    bytes_of,
    densified,
    is_plain,
    served_by,
)
from flax_tied_lora._interpreter.provenance import Provenance
from flax_tied_lora._interpreter.sites import (
    DENSE,
    DEQUANTISED,
    CallSite,
    LeafInfo,
    Read,
    module_scope,
)

OnDense = Literal["warn", "error", "allow"]


@dataclasses.dataclass
class Context:
    """What rules may ask of the evaluation that they are part of.

    Attributes:
      on_dense: what to do where a weight has to be materialised.
      leaves: what is known of each leaf.
      reads: the call sites met so far, in program order.
      memo: inner programs that were rebuilt already.
      outside: the name stack outside of the program evaluated.
      here: the name stack of the current equation within it.
      provenance: where the values of the program evaluated come from.
      shown: the names of leaves for which this program has stand-ins.
      counts: whether it is counted what serving the call sites costs: for that they are traced
        once more.
      uncounted: where, among the reads, those are of which it is not counted yet.
    """

    on_dense: OnDense = "warn"
    leaves: Mapping[str, LeafInfo] = dataclasses.field(default_factory=dict)
    reads: list[Read] = dataclasses.field(default_factory=list)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    outside: str = ""
    here: str = ""
    provenance: Provenance = dataclasses.field(default_factory=Provenance)
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    counts: bool = False
    uncounted: list[int] = dataclasses.field(default_factory=list)

    # Running

    def run(self, eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
        """Returns the outputs of an equation on arrays, run as it stands."""
        pairs = zip(eqn.invars, operands, strict=True)
        return run([eqn], {v: x for v, x in pairs if isinstance(v, Var)}, eqn.outvars)

    def apply(self, eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
        """Returns the outputs of an equation on arrays and weights."""
        if not any(isinstance(x, Weight) for x in operands):
            return self.run(eqn, operands)
        before = len(self.reads)
        outputs = registry.apply(self, eqn, operands)
        if self.counts:
            self._count(eqn, operands, before)
        return outputs

    def evaluate(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Returns ``function(*operands)``, weights among the operands staying symbolic in it."""
        leaves, tree = jax.tree.flatten(operands, is_leaf=lambda x: isinstance(x, Weight))
        avals = [
            jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, Weight) else x for x in leaves
        ]
        traced = jax.make_jaxpr(function, return_shape=True)
        closed, shape = traced(*jax.tree.unflatten(tree, avals))
        inner = self.inside(reads := [], Provenance())
        outputs = evaluate(inner, closed, leaves)
        self.met(reads)
        dense = [self.returned(x) if isinstance(x, Weight) else x for x in outputs]
        return jax.tree.unflatten(jax.tree.structure(shape), dense)

    def inside(self, reads: list[Read], provenance: Provenance, **changes: Any) -> Context:
        """Returns the context of a program inside the current equation, with its list of reads."""
        return dataclasses.replace(
            self, reads=reads, uncounted=[], outside=self.full_scope, here="",
            provenance=provenance, **changes,
        )  # fmt: skip

    def met(self, reads: Sequence[Read]) -> None:
        """Takes over the call sites of a program inside the current equation."""
        for read in reads:
            scope = module_scope(self.here, read.site.scope)
            self.reads.append(
                dataclasses.replace(read, site=dataclasses.replace(read.site, scope=scope))
            )

    @property
    def full_scope(self) -> str:
        return "/".join(s for s in (self.outside, self.here) if s)

    # Knowing

    def stays_weight(self, operation: str, weight: Weight, indexed: Sequence[int]) -> bool:
        """Returns whether indexing these axes picks no rows of a table, but layers or columns."""
        for origin in weight.origins:
            touched, info = set(origin.on_leaf(indexed)), self.leaves.get(origin.leaf)
            if info is None:
                # Nothing is known of a leaf whose axes are being told from its call sites: what is
                # cut out, or picked from three axes or more, may still be multiplied with.
                picks = operation == "gather" and len(weight.shape) < 3
            elif operation == "gather":
                picks = not touched <= set(info.batch)
            else:
                picks = info.is_table and bool(touched & set(info.rows))
            if picks:
                return False
        return True

    def picks_rows(
        self, weight: Weight, summed: Sequence[int], operand: Var, contracted: Sequence[int]
    ) -> bool:
        """Returns whether a product with a weight is a lookup of its rows.

        It is where what is summed over is one axis along which the operand is one-hot, and where
        the weight is known to be a table and its rows are summed over: with whatever weights, so
        that a bag of tokens, smoothed labels or attention over a table read it as a lookup does.

        Args:
          summed: axes of the weight.
          operand: what it is multiplied with.
          contracted: axes of the operand, in the order of ``summed``.
        """
        shape = getattr(operand.aval, "shape", ())
        long = [axis for axis in contracted if shape[axis] != 1]
        if len(long) == 1 and long[0] in self.provenance.one_hot_axes(operand):
            return True
        for origin in weight.origins:
            info = self.leaves.get(origin.leaf)
            axes = origin.on_leaf(summed)
            if info is not None and info.is_table and axes and set(axes) <= set(info.rows):
                return True
        return False

    def is_table(self, weight: Weight) -> bool:
        """Returns whether a weight is a table, as far as is known."""
        known = [self.leaves.get(origin.leaf) for origin in weight.origins]
        return all(info is None or info.is_table for info in known)

    def varying_axes(self, operand: Var) -> tuple[int, ...]:
        """Returns the axes along which an operand may vary; it is constant along the others."""
        return self.provenance.varying_axes(operand)

    # Reading

    def read(
        self, operation: str, weight: Weight, role: Any, *,
        rows: Sequence[int] = (), cols: Sequence[int] | None = None, batch: Sequence[int] = (),
    ) -> tuple[Term, ...]:  # fmt: skip
        """Returns the terms that are for a call site, which it notes down.

        Args:
          operation: name of the primitive.
          rows, cols, batch: axes of the weight; ``cols`` is all others by default.
        """
        if cols is None:
            cols = [i for i in range(len(weight.shape)) if i not in (*rows, *batch)]
        meant = LOOKUP if role == OTHER and all(o.picked for o in weight.origins) else role
        terms = weight.at(self._forward(operation, meant, weight), module_scope(self.full_scope))
        groups = tuple(dict.fromkeys(t.group for t in terms if t.group))
        self.uncounted.append(len(self.reads))
        for origin in weight.origins:
            dims: dict[str, Any] = {}
            if role != OTHER:
                dims = {"rows": rows, "cols": cols, "batch": batch}
                dims = {name: origin.on_leaf(axes) for name, axes in dims.items()}
            name, kind = operation, role
            if role == PROJECTION and origin.picked_by == "gather":
                # What was picked by index is walked in step with the data; where nothing else is
                # left of it, it was a lookup after all.
                whole = tuple(sorted({*dims["rows"], *dims["cols"]} - {*origin.picked}))
                dims = {n: tuple(x for x in a if x not in origin.picked) for n, a in dims.items()}
                if not dims["cols"]:
                    name, kind = origin.picked_by, LOOKUP
                    dims = {"rows": origin.picked, "cols": whole}
            if role == OTHER and origin.picked:
                left = tuple(x for held in origin.axes for x in held if x not in origin.picked)
                name, kind = origin.picked_by, LOOKUP
                dims = {"rows": origin.picked, "cols": tuple(sorted(set(left)))}
            scope = module_scope(self.here)
            site = CallSite(origin.leaf, name, scope=scope, role=kind, **dims)
            self.reads.append(Read(site, served_by(terms), groups))
        return terms

    def _count(self, eqn: JaxprEqn, operands: Sequence[Any], before: int) -> None:
        """Writes down what an equation costs beyond the unadapted one, at the first of its reads.

        Args:
          before: how many reads there were before it. What they cost that it met inside is theirs.
        """
        at = next((i for i in self.uncounted if i >= before), None)
        if at is None:
            return
        self.uncounted[:] = [i for i in self.uncounted if i < before]
        quiet = dataclasses.replace(
            self, on_dense="allow", reads=[], memo={}, counts=False, uncounted=[]
        )
        beyond = cost_beyond_plain(functools.partial(registry.apply, quiet, eqn), operands)
        inside = total(Cost(r.flops, r.bytes) for r in self.reads[before:])
        flops, size = beyond.without(inside)
        self.reads[at] = dataclasses.replace(self.reads[at], flops=flops, bytes=size)

    def _forward(self, operation: str, role: Any, weight: Weight) -> Any:
        """Returns the role of the site that a site in a backward pass belongs to.

        The backward pass of a projection reads as a lookup, as its rows are summed over, and that
        of a one-hot lookup as a projection.
        """
        if all(t.sites is None for t in weight.terms):
            return role
        leaf = weight.origins[0].leaf
        refuse_unknown(self.full_scope, self.shown.get(leaf, leaf))
        if role == OTHER or operation in ("gather", "dynamic_slice"):
            return role
        if not is_backward(self.full_scope):
            return role
        return PROJECTION if role == LOOKUP else LOOKUP

    def dense(self, eqn: JaxprEqn, weight: Weight) -> Any:
        """Returns a weight materialised, and reports it unless it is an array as it stands."""
        return self._materialised(operation_of(eqn), weight)

    def returned(self, weight: Weight) -> Any:
        """Returns a weight materialised because the function hands it back."""
        return self._materialised("return", weight)

    def _materialised(self, operation: str, weight: Weight) -> Any:
        # What was picked and went elsewhere than into a product was a lookup after all.
        picked = all(o.picked for o in weight.origins)
        if not picked:
            self._refuse_separate(operation, weight)
        terms = weight.at(LOOKUP if picked else OTHER, module_scope(self.full_scope))
        if picked or is_plain(weight, terms):
            if picked or operation != "return":
                self.read(operation, weight, OTHER)
        else:
            self.materialises(operation, weight, terms)
        return weight.dense(terms)

    def _refuse_separate(self, operation: str, weight: Weight) -> None:
        """Refuses a site of no known role where adapters are for lookups or for projections."""
        filters = [t.sites for t in weight.terms if t.sites is not None]
        if any(f.role or any(other.role for other in f.others) for f in filters):
            leaf = weight.origins[0].leaf
            raise ValueError(
                f"adapt: {self.shown.get(leaf, leaf)!r} has separate adapters for its lookups and "
                f"its projections, and {operation!r} in {module_scope(self.full_scope)!r} is "
                "neither. Tie them (ensure_weight_tying=None or True), or write a rule "
                "(register_rule)"
            )

    def materialises(self, operation: str, weight: Weight, terms: Sequence[Term]) -> None:
        """Reports that terms of a weight are made an array of its size, or refuses it."""
        groups = tuple(dict.fromkeys(t.group for t in terms if t.group))
        undropped = weight.replace(terms=tuple(terms)).keyed

        def read(leaf: str, scope: str) -> Read:
            site = CallSite(leaf, operation, scope=module_scope(scope), role=OTHER)
            served = DEQUANTISED if all(t.stored for t in terms) else DENSE
            return Read(site, served, groups, 0, bytes_of(weight), undropped)

        self.reads += [read(o.leaf, self.here) for o in weight.origins]
        if self.on_dense == "error":
            leaf = weight.origins[0].leaf
            raise DensifyError(densified(read(self.shown.get(leaf, leaf), self.full_scope)))

"""`explain`: every call site of every adapted group, and how it was served."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flax_tied_lora._interpreter.context import Context
from flax_tied_lora._interpreter.sites import DENSE, DEQUANTISED, Read, numbered, with_batch
from flax_tied_lora._planning.plan import GroupPlan
from flax_tied_lora._tree.table import cell, folded, table
from flax_tied_lora._verbs.adapt import call, mark_of


class NotTiedError(AssertionError):
    """A member of a tie group was not read, was read without the group's factors, or densified."""

    __module__ = "flax_tied_lora"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The call sites of an adapted call; prints as a table.

    Attributes:
      reads: each call site, how it was served, and what that cost.
      groups: the adapted groups.
    """

    reads: tuple[Read, ...]
    groups: tuple[GroupPlan, ...]

    def of(self, key: str) -> tuple[Read, ...]:
        """Returns the call sites of a group, by its key."""
        # Of several adapted arguments, each has its mark behind the key.
        groups = [g for g in self.groups if f"{g.key} (".startswith(f"{key} (")]
        paths = {m.path for g in groups for m in g.members} or {key}
        return tuple(r for r in self.reads if r.site.leaf in paths)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns the call sites as plain data, one dict each."""
        owner = {m.path: g.key for g in self.groups for m in g.members}
        return [
            {"group": owner.get(r.site.leaf, r.site.leaf), **dataclasses.asdict(r.site),
             "served": r.served, "factors": list(r.groups), "flops": r.flops, "bytes": r.bytes}
            for r in self.reads
        ]  # fmt: skip

    def assert_tied(self) -> None:
        """Checks that every member of every adapted group was read, by its factors, none densified.

        Raises:
          NotTiedError: an `AssertionError` that names the leaf, and the call site if there is one.
        """
        for group in self.groups:
            for member in group.members:
                reads = [r for r in self.reads if r.site.leaf == member.path]
                if not reads:
                    raise NotTiedError(
                        f"assert_tied: {member.path!r} is adapted and read nowhere in this call"
                    )
                for read in reads:
                    if read.served == DEQUANTISED:
                        continue  # of the frozen part; what the adapter does has a line of its own
                    if read.served == DENSE:
                        raise NotTiedError(
                            f"assert_tied: {read.site} was served by adding the weight and its "
                            "delta up"
                        )
                    if group.key not in read.groups:
                        raise NotTiedError(
                            f"assert_tied: {read.site} was served by the factors of {read.groups}, "
                            f"expected those of {group.key!r}"
                        )

    def __str__(self) -> str:
        header = ("leaf", "operation", "role", "served", "extra flops", "extra bytes", "scope")
        rows = [
            (r.site.leaf, f"{r.site.operation} #{r.site.ordinal}", r.site.role, r.served, r.flops,
             r.bytes, r.site.scope)
            for r in self.reads
        ]  # fmt: skip
        flops, size = sum(r.flops for r in self.reads), sum(r.bytes for r in self.reads)
        dense = sum(r.served in (DENSE, DEQUANTISED) for r in self.reads)
        return (
            f"{table(header, folded(rows, sums=[4, 5]))}\n{len(self.reads)} call sites, {dense} "
            f"densified; extra: {cell(flops)} FLOPs, {cell(size)} bytes"
        )


def _marked(group: GroupPlan, mark: str) -> GroupPlan:
    members = tuple(dataclasses.replace(m, path=m.path + mark) for m in group.members)
    return dataclasses.replace(group, members=members)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Returns every call site of every adapted group in a call, and how each is served.

    Nothing is computed: the arguments may hold `jax.ShapeDtypeStruct`.

    Args:
      fn: a function of plain params, as `adapt` takes it.
      *args: its arguments, with an `Adapted` where the params go.
      **kwargs: its keyword arguments.

    Raises:
      ValueError: there is no `Adapted` among the arguments.

    Example::

      print(tied_lora.explain(model.apply, {"params": adapted}, tokens))
      tied_lora.explain(model.apply, {"params": adapted}, tokens).assert_tied()
    """
    return explained(lambda a, k: call(fn, Context("allow", counts=True), a, k)[1:], args, kwargs)


def explained(meet: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Explanation:
    """Returns the explanation of a call of which nothing is computed.

    Args:
      meet: returns the call sites that a call meets, and its adapted arguments.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    # Only what has no values is abstract; the model may branch on the rest.
    abstract = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]
    seen: list[Any] = []

    def run(*values: Any) -> None:
        filled = list(leaves)
        for i, value in zip(abstract, values, strict=True):
            filled[i] = value
        args, kwargs = jax.tree.unflatten(treedef, filled)
        reads, adapteds = meet(args, kwargs)
        groups = tuple(
            _marked(group, mark_of(number, adapteds))
            for number, adapted in enumerate(adapteds) for group in adapted.plan.adapted
        )  # fmt: skip
        ndims = {m.path: len(g.shape) for g in groups for m in g.members}
        seen[:] = [with_batch(numbered(reads), ndims), groups]

    jax.eval_shape(run, *(leaves[i] for i in abstract))
    return Explanation(*seen)

"""What an adapted module is made of: ties that the graph knows, and adapters as Variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._nnx.leaves import aliases_of, variables_of
from flax_tied_lora._planning.tying import says_untied
from flax_tied_lora._ties.find import find_ties
from flax_tied_lora._ties.groups import Member, TieGroup
from flax_tied_lora._ties.sources import SAME_ARRAY
from flax_tied_lora._tree.paths import flatten


def with_aliases(params: Any, aliases: Mapping[str, str], ties: Any) -> Any:
    """Returns what `wrap` takes as ties, with the Variables of several paths among them.

    Arrays say so themselves; where a Variable is abstract, only the module's graph knows.
    """
    leaves, _ = flatten(params)
    shared = [
        TieGroup((Member(first), Member(other)), (SAME_ARRAY,))
        for other, first in aliases.items() if isinstance(leaves[first], jax.ShapeDtypeStruct)
    ]  # fmt: skip
    if not shared or says_untied(ties):
        return ties
    return [*shared, *find_ties(params, ties)]


def boxed(module: nnx.Module, adapted: Adapted) -> dict[str, Any]:
    """Returns the adapters as `nnx.LoRAParam`, with partition names from the leaf's Variable."""
    variables, aliases = variables_of(module), aliases_of(module)
    made: dict[str, Any] = {
        kind: jax.tree.map(nnx.LoRAParam, tree) for kind, tree in adapted.adapters.items()
    }
    for group, adapter in adapted.plan.adapters():
        variable = variables.get(aliases.get(group.key, group.key))
        names = None if variable is None else variable.get_metadata("out_sharding", None)
        if not isinstance(names, tuple | jax.P):
            continue
        own = made[adapter.kind][adapter.key]
        for name, axes in group.axes(adapter).items():
            box = own[name] if name else own
            slots = (None,) * (adapted.slot is not None)
            box.set_metadata(out_sharding=(*slots, *_along(names, axes)))
    return made


def _along(names: Any, axes: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the partition names of an array's axes, each an axis of the leaf or the rank."""
    return tuple(names[a] if isinstance(a, int) and a < len(names) else None for a in axes)

"""Ties that a model declares and its params do not have: a loader made two arrays of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._names.mapping import Names, UnmappedError
from flax_tied_lora._names.model_config import says_tied
from flax_tied_lora._ties.groups import TieGroup
from flax_tied_lora._ties.sources import DECLARED, Link, differ, from_config


def from_names(leaves: Mapping[str, Any], names: Names) -> list[Link]:
    """Returns the ties that a table of names has between leaves that are both there."""
    links = []
    for tie in names.ties:
        shape = tuple(getattr(leaves.get(tie.path), "shape", ()))
        for path, leaf in leaves.items() if len(shape) == 2 else ():
            own = tuple(getattr(leaf, "shape", ()))
            if path == tie.path or own not in (shape, shape[::-1]):
                continue
            weight = _torch_weight(path, names)
            if weight is None or weight.name not in tie.names:
                continue
            # Leaves that are stored otherwise are two arrays, and one parameter in PyTorch.
            if weight.maps_by_axis == names.own_weight(tie).maps_by_axis:
                # A projection's kernel is [width, vocabulary] in Flax, the table in PyTorch.
                links.append(Link(tie.path, path, own == shape[::-1], DECLARED))
    return links


def from_model(leaves: Mapping[str, Any], model: Any) -> list[Link]:
    """Returns the ties that a model's config has between leaves, if it says which they are."""
    config = getattr(model, "config", None)
    if config is None or says_tied(config) is not True:
        return []
    try:
        return from_config(leaves, config, [])
    except ValueError:
        return []


def _torch_weight(path: str, names: Names) -> TorchWeight | None:
    try:
        return names.to_torch(path, 2)[0]
    except (UnmappedError, ValueError):
        return None


def not_in(links: Sequence[Link], groups: Sequence[TieGroup]) -> list[Link]:
    """Returns the ties that no group has."""
    groups_of = {path: group for group in groups for path in group.paths}
    return [x for x in links if groups_of.get(x.first) is not groups_of.get(x.second, x)]


def refuse_lost(what: str, leaves: Mapping[str, Any], links: Sequence[Link]) -> None:
    """Refuses params in which leaves that a model ties are arrays of other values.

    Raises:
      ValueError: they are.
    """
    for link in links:
        if differ(leaves, link):
            raise ValueError(
                f"{what}: the model ties {link.second!r} to {link.first!r}, and these params have "
                "arrays of other values there; a loader that does not know of the tie makes one "
                f"at random. Wrap or load with ties=model.config, which drops {link.second!r} and "
                f"reads {link.first!r} in its place; or if {link.second!r} was trained by itself, "
                "give the model's config, and the one that names_of is given, "
                "tie_word_embeddings=False"
            )


def dropped(leaves: Mapping[str, Any], group: TieGroup) -> list[str]:
    """Returns the members of a group whose values are others than those of its first leaf."""
    first = group.members[0]
    links = [
        Link(first.path, m.path, m.transposed != first.transposed, "") for m in group.members[1:]
    ]
    return [link.second for link in links if differ(leaves, link)]

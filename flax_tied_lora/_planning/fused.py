"""Parts of fused leaves, each with factors of its own: q, k and v in one kernel, gate and up."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax_tied_lora._config.axes_and_parts import parts_of_leaf
from flax_tied_lora._config.config import LoraConfig
from flax_tied_lora._planning.matches import excluded
from flax_tied_lora._planning.plan import Span
from flax_tied_lora._planning.tying import Share
from flax_tied_lora._ties.groups import TieGroup


def fused_parts(group: TieGroup, leaf: Any, whole: Share, config: LoraConfig) -> tuple[Share, ...]:
    """Returns the parts of a fused leaf that are targeted; all of a leaf that is not fused.

    Raises:
      ValueError: the config cuts members of the group differently; the leaf is cut by call sites,
        too; a part is targeted that there is not.
    """
    spans = _spans(group, leaf, config)
    if not spans:
        return (whole,)
    if whole.members or whole.sites is not None:
        raise ValueError(
            f"wrap: {group.key!r} is in parts {', '.join(map(repr, spans))}, and "
            f"ensure_weight_tying=False wants an adapter for {whole.name!r} only; leave one of the "
            "two out"
        )
    shares = []
    for name, span in spans.items():
        hits = tuple(
            h for h in whole.hits
            if h.part == name
            or (not h.part and not excluded(config, f"{h.leaf}:{name}", f"{h.module}:{name}"))
        )  # fmt: skip
        if hits:
            shares.append(dataclasses.replace(whole, hits=hits, name=name, span=span))
    return tuple(shares)


def _spans(group: TieGroup, leaf: Any, config: LoraConfig) -> dict[str, Span]:
    """Returns the parts of a group's canonical leaf, by name."""
    by_member: dict[str, dict[str, Span]] = {}
    for member in group.members:
        shape = tuple(leaf.shape)[::-1] if member.transposed else tuple(leaf.shape)
        spans = parts_of_leaf(config.parts, member.path, shape)
        if spans and member.transposed:
            spans = {name: (1 - axis, *cut) for name, (axis, *cut) in spans.items()}
        if spans:
            by_member[member.path] = spans  # type: ignore[assignment]
    first, *others = by_member or [""]
    for other in others:
        if by_member[other] != by_member[first]:
            raise ValueError(
                f"wrap: parts cuts {first!r} into {by_member[first]} and {other!r} into "
                f"{by_member[other]}, in the layout of {group.key!r}, which both are; say one thing"
            )
    return by_member.get(first, {})

"""`save_params` and `restore_params`: full params, with each tie group stored once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flax_tied_lora._adapters.adapted import Adapted
from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._checkpoint.items import decode, template_of, without_boxes
from flax_tied_lora._checkpoint.record import absolute, orbax_args, read_record, write
from flax_tied_lora._planning.plan import Plan
from flax_tied_lora._planning.tying import warn_of_dropped
from flax_tied_lora._ties.find import Ties, find_ties
from flax_tied_lora._ties.groups import Member, TieGroup
from flax_tied_lora._tree.foreign import refuse_models
from flax_tied_lora._tree.paths import flatten, is_marker, named_leaves, path_name
from flax_tied_lora._tree.quantized_array import FOUR_BITS, QTYPES, QuantizedArray, is_quantized


def save_params(path: str | os.PathLike[str], params: Any, *, ties: Ties | Plan = "auto") -> None:
    """Saves full params as one checkpoint, with one copy of what is tied.

    Orbax alone stores an array that is at two places of a pytree twice, and restores two arrays.

    Args:
      path: directory to make; it has this name only when all of it is written.
      params: plain params; of an `Adapted`, its ``base`` or its ``merge``.
      ties: as in `find_ties`; or the plan of an `Adapted`, for its groups. ``"auto"`` finds members
        that are the same array; a transposed one has to be declared.

    Raises:
      CheckpointError: something exists at ``path``, another save to it is running, or a leaf cannot
        be stored.
      ValueError: a declared tie does not fit.

    Example::

      checkpoint.save_params("merged", tied_lora.merge(adapted), ties=adapted.plan)
      params = checkpoint.restore_params("merged")
    """
    if isinstance(params, Adapted):
        raise CheckpointError(
            "save_params: params is an Adapted; save tied_lora.merge(adapted) for its params with "
            "the adapters in them, tied_lora.base(adapted) for those without, or the adapters "
            "alone with checkpoint.save"
        )
    refuse_models("save_params", params, "; pass its state, nnx.state(module, nnx.Param)")
    if isinstance(ties, Plan):
        ties = [group.tie() for group in ties.groups]
    groups = [g for g in find_ties(params, ties) if len(g.members) > 1]
    members = {m.path for g in groups for m in g.members[1:]}
    leaves, treedef = flatten(without_boxes(params))
    for group in groups:
        warn_of_dropped("save_params", group, leaves, 3)
    once = [None if name in members or is_marker(x) else x for name, x in leaves.items()]
    facts: dict[str, Any] = {"ties": [dataclasses.asdict(group) for group in groups]}
    stored = {n: [x.qtype, x.axis] for n, x in leaves.items() if is_quantized(x)}
    if stored:
        facts["quantized"] = stored
    write(path, orbax_args(facts, {"params": jax.tree.unflatten(treedef, once)}))


def restore_params(
    path: str | os.PathLike[str], target: Any = None, *, sharding: Any = None
) -> Any:
    """Returns params that `save_params` saved; members of a tie are the same array again.

    A member that is the transpose of the stored array becomes a transposed copy, as an array cannot
    be both; wrap the params with ``ties=`` to have one array again.

    Args:
      path: what `save_params` wrote.
      target: params of the same structure, abstract ones too, with the containers, boxes and
        shardings to restore. None: nested dicts (lists for tuples), on the default device.
      sharding: a `jax.sharding.Sharding` for all leaves, or a pytree like the params of shardings;
        members of a tie go where the first of them goes.

    Raises:
      CheckpointError: no checkpoint, a missing or damaged file, a newer format, or a target that
        does not fit.
    """
    refuse_models("restore_params", target)
    path = absolute(path)
    record, items = read_record(path, "ties")
    groups = [
        TieGroup(tuple(Member(**m) for m in g["members"]), tuple(g["found"]))
        for g in record["ties"]
    ]
    copies = {m.path: (g.key, m.transposed) for g in groups for m in g.members[1:]}
    stored = record.get("quantized", {})
    if target is None:
        target = template_of(path / "params", items["params"])
        with explained("restore_params: damaged record in", path, "restore another checkpoint"):
            target = _quantized(target, {n: x for n, x in stored.items() if n not in copies})
    pairs, treedef = named_leaves(target, _is_leaf)
    names = [path_name(p) for p, _ in pairs]
    leaves = [x for _, x in pairs]
    _check_members(path, dict(zip(names, leaves, strict=True)), copies, stored)
    if sharding is not None:
        leaves = _placed(leaves, treedef, sharding, path)
    once = [None if name in copies else x for name, x in zip(names, leaves, strict=True)]
    restored = decode(path / "params", items["params"], jax.tree.unflatten(treedef, once))
    arrays = dict(zip(names, jax.tree.leaves(restored, is_leaf=_is_leaf), strict=True))
    wanted = dict(zip(names, leaves, strict=True))
    for name, (key, transposed) in copies.items():
        arrays[name] = arrays[key].T if transposed else arrays[key]
        if wanted[name] is not None and arrays[name].shape != tuple(np.shape(wanted[name])):
            raise CheckpointError(
                f"restore_params: {name!r} is {arrays[name].shape} in {path}, as a member of the "
                f"tie group of {key!r}, and {tuple(np.shape(wanted[name]))} in the target; pass a "
                "target of the structure that was saved"
            )
    return jax.tree.unflatten(treedef, [arrays[name] for name in names])


def _is_leaf(node: Any) -> bool:
    return node is None or is_quantized(node)


def _quantized(tree: Any, stored: Mapping[str, Any]) -> Any:
    """Returns a template in which integers and scales are quantised leaves, as they were.

    Args:
      tree: of nested dicts and lists.
      stored: ``{path: (qtype, axis)}`` of the quantised leaves.
    """
    found: set[str] = set()

    def make(path: str, tree: Any) -> Any:
        if path in stored:
            found.add(path)
            return _checked(path, tree, *stored[path])
        if isinstance(tree, dict):
            return {key: make(f"{path}/{key}".lstrip("/"), x) for key, x in tree.items()}
        if isinstance(tree, list):
            return [make(f"{path}/{i}".lstrip("/"), x) for i, x in enumerate(tree)]
        return tree

    template = make("", tree)
    missing = sorted(set(stored) - found)
    if missing:
        raise ValueError(f"{missing[0][:80]!r} is quantised; expected a leaf that is there")
    return template


def _checked(path: str, tree: Any, qtype: str, axis: int) -> QuantizedArray:
    """Returns a quantised leaf, after a check that integers, scales, type and axis fit."""
    if not isinstance(tree, dict) or set(tree) != {"values", "scales"}:
        raise ValueError(f"{path!r} is quantised; expected values and scales")
    if qtype not in QTYPES:
        raise ValueError(f"{path!r} is quantised as {qtype!r}; expected one of {list(QTYPES)}")
    leaf = QuantizedArray(tree["values"], tree["scales"], qtype, axis)
    dtype = np.uint8 if qtype in FOUR_BITS else np.int8
    shapes = leaf.values.shape, leaf.scales.shape
    same = [n == m for i, (n, m) in enumerate(zip(*shapes, strict=False)) if i != axis]
    if (
        leaf.values.dtype != dtype
        or len(shapes[0]) != len(shapes[1])
        or axis >= leaf.ndim
        or not all(same)
        or leaf.scales.shape[axis] == 0
        or leaf.shape[axis] % leaf.scales.shape[axis]
    ):
        raise ValueError(
            f"{path!r} is {leaf.values.dtype}{list(shapes[0])} with scales {list(shapes[1])}; "
            f"expected {np.dtype(dtype)} in blocks along axis {axis}, as {qtype} is stored"
        )
    return leaf


def _check_members(
    path: Any, target: Mapping[str, Any], copies: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    """Checks that a target has what was tied, and that what was quantised is so there."""
    for name, (key, transposed) in copies.items():
        if name not in target:
            raise CheckpointError(
                f"restore_params: the target has no {name!r}, which {path} holds as a member of "
                f"the tie group of {key!r}; pass a target of the structure that was saved"
            )
        leaf = target.get(key)
        if leaf is None or (transposed and len(np.shape(leaf)) != 2):
            what = "nothing" if leaf is None else f"of shape {np.shape(leaf)}"
            raise CheckpointError(
                f"restore_params: {key!r} is {what}, and {path} holds it as the array of "
                f"{name!r}; pass a target of the structure that was saved, or restore another "
                "checkpoint"
            )
    for name, leaf in target.items():
        if is_quantized(leaf) and [leaf.qtype, leaf.axis] != stored.get(name, [None, None]):
            raise CheckpointError(
                f"restore_params: {name!r} is quantised as {leaf.qtype} along axis {leaf.axis} in "
                f"the target, and {_how(stored.get(name))} in {path}; pass a target of the "
                "structure that was saved"
            )


def _how(stored: Any) -> str:
    return "not" if stored is None else f"as {stored[0]} along axis {stored[1]}"


def _placed(leaves: list[Any], treedef: Any, sharding: Any, path: Any) -> list[Any]:
    """Returns abstract leaves that are placed as ``sharding`` says."""
    if isinstance(sharding, jax.sharding.Sharding):
        places = [sharding] * len(leaves)
    else:
        with explained("restore_params: sharding is not like the params of", path):
            places = treedef.flatten_up_to(sharding)
    return [
        jax.tree.map(
            lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), leaf
        )
        for leaf, place in zip(leaves, places, strict=True)
    ]

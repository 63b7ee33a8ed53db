"""Items of a checkpoint: pytrees, written with a listing and read back into a template.

A listing is ``{leaf name: {"shape", "dtype", "kind", "checksum", ...}}``: what each leaf was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flax_tied_lora._adapters.fingerprint import checksum, raw
from flax_tied_lora._checkpoint.errors import CheckpointError, explained
from flax_tied_lora._tree.boxes import is_box, unboxed
from flax_tied_lora._tree.foreign import loaded_type
from flax_tied_lora._tree.keys import is_key
from flax_tied_lora._tree.paths import is_boxed_array, is_tracer
from flax_tied_lora._tree.processes import differing

_RESTORE_ANOTHER = "restore another checkpoint"
_NUMBERS = (bool, int, float)


def without_boxes(tree: Any) -> Any:
    """Returns a pytree in which each box is replaced by its array.

    So is an `nnx.Variable`, and an array of another library.
    """
    variable = loaded_type("flax.nnx", "Variable")

    def holds_an_array(x: Any) -> bool:
        return is_box(x) or isinstance(x, variable) or is_boxed_array(x)

    def value(x: Any) -> Any:
        if isinstance(x, variable):
            return x.get_value()
        if is_boxed_array(x):
            return jax.tree.leaves(x, is_leaf=lambda inside: inside is not x)[0]
        return unboxed(x)

    return jax.tree.map(value, tree, is_leaf=holds_an_array)


def refuse_tracers(item: str, tree: Any) -> None:
    """Raises a `CheckpointError` if a leaf of the pytree is a tracer."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if is_tracer(leaf):
            raise CheckpointError(
                f"save: {item} leaf {_name(path)!r} is a tracer; save outside jax.jit and other "
                "transformations"
            )


def encode(item: str, tree: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Returns a pytree as one of plain arrays, and its listing.

    Boxes are replaced by their arrays, typed random keys by their data, and numbers by arrays. The
    listing has checksums because Orbax has them for its indices only, not for the data.

    Raises:
      CheckpointError: a leaf cannot be stored, or was deleted.
    """
    refuse_tracers(item, tree)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(without_boxes(tree))
    listing: dict[str, dict[str, Any]] = {}
    arrays = []
    for path, leaf in pairs:
        name = _name(path)
        if name in listing:
            raise CheckpointError(
                f"save: two leaves of {item} are both named {name!r} in a checkpoint, where the "
                "entries of a path are joined by '.'; rename a key that contains '.'"
            )
        _check_storable(item, name, leaf)
        array = raw(leaf)
        if not isinstance(array, jax.Array):
            array = np.asarray(array)
        elif jax.process_count() > 1 and array.is_fully_addressable:
            array = np.array(array)  # Orbax takes an array of one process only from NumPy.
        arrays.append(array)
        listing[name] = {
            "shape": list(np.shape(leaf)),
            "dtype": _dtype(leaf),
            "kind": _kind(leaf),
            "checksum": checksum(array),
        }
        if is_key(leaf):
            listing[name]["impl"] = str(jax.random.key_impl(leaf))
    sums = jax.device_get([entry["checksum"] for entry in listing.values()])
    for entry, total in zip(listing.values(), sums, strict=True):
        entry["checksum"] = int(total)
    _check_same_everywhere(item, listing, arrays)
    return jax.tree.unflatten(treedef, arrays), listing


def template_of(directory: epath.Path, listing: Mapping[str, Any]) -> Any:
    """Returns a template of an item as it was saved: dicts, lists (for tuples, too), leaves."""
    with explained("restore: missing or damaged files in", directory, _RESTORE_ANOTHER):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _example(listing[_name(path)]), _stored(directory)
        )


def decode(directory: epath.Path, listing: Mapping[str, Any], template: Any) -> Any:
    """Returns the pytree that `encode` was given, read from an item's directory.

    Args:
      directory: of the item.
      listing: what `encode` returned.
      template: the pytree's structure, with arrays or abstract ones; leaves are known by their
        names, so that containers may be others than those that were saved. A leaf that is committed
        to a sharding, or is a `jax.ShapeDtypeStruct` with one, says where the array goes; others
        are read to the host, and go where JAX puts new arrays.

    Raises:
      CheckpointError: the template does not fit, or a file is missing or damaged.
    """
    item = directory.name
    pairs = jax.tree_util.tree_leaves_with_path(without_boxes(template))
    wanted = {_name(path): leaf for path, leaf in pairs}
    _check_fit(item, directory, listing, wanted)
    if not wanted:
        return template
    with explained("restore: missing or damaged files in", directory, _RESTORE_ANOTHER):
        # As it was saved: containers of the template may be others.
        request = jax.tree_util.tree_map_with_path(
            lambda path, _: _request(wanted[_name(path)]), _stored(directory)
        )
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(directory, args=ocp.args.StandardRestore(request))
        read = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        arrays = [read[name] for name in wanted]
        sums = jax.device_get([checksum(array) for array in arrays])
    for name, total in zip(wanted, sums, strict=True):
        if int(total) != listing[name]["checksum"]:
            raise CheckpointError(
                f"restore: {item} leaf {name!r} in {directory} is damaged: its checksum is "
                f"{int(total)}, expected {listing[name]['checksum']}. Restore another checkpoint"
            )
    leaves = [
        _like(leaf, array, listing[name])
        for (name, leaf), array in zip(wanted.items(), arrays, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _stored(directory: epath.Path) -> Any:
    """Returns Orbax's description of an item as it was saved: of dicts, lists and arrays."""
    return ocp.StandardCheckpointHandler().metadata(directory).tree


def _name(path: Any) -> str:
    """Returns a leaf's name in Orbax."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _check_same_everywhere(
    item: str, listing: Mapping[str, dict[str, Any]], arrays: list[Any]
) -> None:
    """Refuses leaves that are an array in each process and differ: only one would be written."""
    local = [n for n, x in zip(listing, arrays, strict=True) if isinstance(x, np.ndarray)]
    odd = np.flatnonzero(differing([listing[name]["checksum"] for name in local]))
    if odd.size:
        more = f", nor have {odd.size - 1} more" if odd.size > 1 else ""
        raise CheckpointError(
            f"save: {item} leaf {local[odd[0]]!r} has not the same values in all "
            f"{jax.process_count()} processes{more}, and each has an array of its own, of which "
            "one would be saved. Compute it alike in all of them, or make it one array of the mesh "
            "(jax.make_array_from_process_local_data)"
        )


def _kind(leaf: Any) -> str:
    if isinstance(leaf, _NUMBERS):
        return type(leaf).__name__
    return "numpy" if isinstance(leaf, np.ndarray | np.generic) else "jax"


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def _describe(shape: Any, dtype: str) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _check_storable(item: str, name: str, leaf: Any) -> None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        problem = "abstract; expected an array"
    elif isinstance(leaf, jax.Array):
        if not leaf.is_deleted():
            return
        problem = "deleted: it was donated to a compiled function; save that function's result"
    elif isinstance(leaf, (np.ndarray, np.generic, *_NUMBERS)):
        if np.asarray(leaf).dtype.kind not in "OSUMm":
            return
        problem = f"of dtype {np.asarray(leaf).dtype}; expected numbers"
    else:
        problem = f"a {type(leaf).__name__}; expected an array or a number"
    raise CheckpointError(f"save: {item} leaf {name!r} is {problem}")


def _check_fit(
    item: str, directory: epath.Path, listing: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Checks the leaves of a template, by name, against a listing: names, shapes and dtypes."""
    problems = [f"{name!r} is only in the checkpoint" for name in listing if name not in wanted]
    problems += [f"{name!r} is not in the checkpoint" for name in wanted if name not in listing]
    for name, leaf in wanted.items():
        if name in listing:
            saved = _describe(listing[name]["shape"], listing[name]["dtype"])
            asked = _describe(np.shape(leaf), _dtype(leaf))
            dtype = raw(leaf).dtype
            if _kind(leaf) == "jax" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
                problems.append(
                    f"{name!r} is {saved}, which needs jax_enable_x64, or a NumPy array as template"
                )
            elif saved != asked:
                problems.append(f"{name!r} is {saved} in the checkpoint and {asked} as asked for")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        remedy = {
            "opt_state": _which_optimizer(listing, wanted),
            "adapted": "the files belong to another plan; restore another checkpoint",
        }.get(item, f"pass {'target' if item == 'params' else item} as it was saved")
        raise CheckpointError(
            f"restore: {item} in {directory} does not fit: {'; '.join(problems[:3])}{more}. "
            f"Check that it is the right checkpoint, and {remedy}"
        )


def _which_optimizer(listing: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Returns what to pass for a state of an optimizer that another template does not fit."""
    saved, asked = map(_is_of_nnx, (listing, wanted))
    if saved and not asked:
        return (
            "pass the nnx.Optimizer that was saved, on a module that is wrapped with the same "
            "config, or its nnx.state"
        )
    if asked and not saved:
        return (
            "pass the Optax optimizer whose state was saved; of an nnx.Optimizer, its opt_state "
            "alone"
        )
    if any(".adapters." in name for name in listing):
        return "pass the opt_state of the nnx.Optimizer that was saved"
    return "pass the optimizer, or a state of it, that was saved"


def _is_of_nnx(names: Mapping[str, Any]) -> bool:
    """Returns whether leaves are named like those of an `nnx.Optimizer`: Optax's, and a count."""
    return "step" in names and all(n.startswith("opt_state.") for n in names if n != "step")


def _example(entry: Mapping[str, Any]) -> Any:
    """Returns a template of a leaf, given its entry in a listing."""
    kind, shape = entry["kind"], tuple(entry["shape"])
    if "impl" in entry:
        return jax.ShapeDtypeStruct(shape, jax.random.key(0, impl=entry["impl"]).dtype)
    if kind == "jax":
        return jax.ShapeDtypeStruct(shape, jnp.dtype(entry["dtype"]))
    if kind == "numpy":
        return np.empty(shape, jnp.dtype(entry["dtype"]))
    return {t.__name__: t for t in _NUMBERS}[kind]()


def _request(leaf: Any) -> Any:
    """Returns what to ask Orbax for: an array on the host, or one with a sharding."""
    array = raw(leaf)
    sharding = _sharding(leaf)
    if sharding is None:
        return np.empty(array.shape, array.dtype)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _sharding(leaf: Any) -> Any:
    """Returns the sharding that a template's leaf asks for, or None."""
    placed = isinstance(leaf, jax.ShapeDtypeStruct) or (
        isinstance(leaf, jax.Array) and leaf.committed
    )
    return leaf.sharding if placed else None


def _like(leaf: Any, array: Any, entry: Mapping[str, Any]) -> Any:
    """Returns an array that was read as what the template's leaf is: number, key, array."""
    if isinstance(leaf, _NUMBERS):
        return array.item()
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, np.ndarray):
        return array
    array = jnp.asarray(array)
    return jax.random.wrap_key_data(array, impl=entry["impl"]) if "impl" in entry else array

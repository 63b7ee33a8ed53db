"""Leaf paths: how a leaf of any pytree is named, and how targets are matched against names."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from flax_tied_lora._tree.quantized_array import is_quantized

_T = TypeVar("_T")
# What a box (`nn.Partitioned`, `nnx.Variable`) calls the array it holds; not part of a leaf's name.
_BOX_FIELDS = frozenset({"value", "raw_value"})


@jax.tree_util.register_static
class TiedLeaf:
    """Leafless marker that stands where a member of a tie group was taken out of a pytree.

    The array is stored once, at the group's canonical leaf; `adapt`, `merge` and `base` put it
    back.
    """

    def __init__(self, key: str, transposed: bool = False):
        self.key, self.transposed = key, transposed

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TiedLeaf)
            and (self.key, self.transposed) == (other.key, other.transposed)
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.key, self.transposed))

    def __repr__(self) -> str:
        return f"TiedLeaf({self.key!r}{', transposed' if self.transposed else ''})"


def is_marker(node: Any) -> bool:
    return isinstance(node, TiedLeaf)


def refuse_markers(what: str, leaves: Mapping[str, Any], instead: str) -> None:
    """Refuses leaves among which there are markers: the params of an `Adapted`.

    Args:
      instead: what to do, for the error.

    Raises:
      TypeError: there is one.
    """
    for path, leaf in leaves.items():
        if is_marker(leaf):
            raise TypeError(
                f"{what}: {path!r} is a marker of a tie group: these are the params of an Adapted; "
                f"{instead}"
            )


def is_leaf(node: Any) -> bool:
    """Returns whether a node of the params counts as a leaf, whatever it holds."""
    return is_marker(node) or is_quantized(node)


def path_name(path: Sequence[Any]) -> str:
    """Returns the name of a key path: its entries joined by ``/``, without the boxes' fields.

    >>> import jax
    >>> path_name((jax.tree_util.DictKey("dense"), jax.tree_util.DictKey("kernel")))
    'dense/kernel'
    """
    entries = list(path)
    while entries and isinstance(entries[-1], GetAttrKey) and entries[-1].name in _BOX_FIELDS:
        entries.pop()
    return "/".join(map(_entry_name, entries))


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] = is_leaf
) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """Returns the leaves of a pytree, each with the key path of its name, and the structure.

    As `jax.tree_util.tree_flatten_with_path`, but that the path of a leaf in a box ends at the box.
    """
    boxed: list[Any] = []

    def ends(node: Any) -> bool:
        if _may_be_boxed(type(node)) and is_boxed_array(node, is_leaf):
            boxed.append(node)
            return True
        return is_leaf(node)

    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=ends)
    if boxed:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
        pairs = [(path, leaf) for (path, _), leaf in zip(pairs, leaves, strict=True)]
    return pairs, treedef


def is_boxed_array(node: Any, is_leaf: Callable[[Any], bool] = is_leaf) -> bool:
    """Returns whether a node is an array of another library around one of JAX's.

    Haliax's and Penzai's ``NamedArray`` are: one array, whose dtype and shape they say themselves.
    A module that has one param says neither.
    """
    if not _may_be_boxed(type(node)) or is_leaf(node):
        return False
    inside = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    return len(inside) == 1 and (is_leaf(inside[0]) or jax.tree_util.all_leaves(inside))


@functools.cache
def _may_be_boxed(kind: type) -> bool:
    """Returns whether a class says dtype and shape itself, and is none of JAX's own that do."""
    tracer: type = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue]
    if issubclass(kind, (jax.Array, jax.ShapeDtypeStruct, tracer)):
        return False
    says_dtype = isinstance(getattr(kind, "dtype", None), property)
    return says_dtype and (hasattr(kind, "shape") or hasattr(kind, "named_shape"))


def _entry_name(entry: Any) -> str:
    match entry:
        case DictKey(key) | FlattenedIndexKey(key):
            return str(key)
        case GetAttrKey(name):
            return name
        case SequenceKey(idx):
            return str(idx)
    return str(entry).strip(".[]'\"")


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Returns ``{leaf path: leaf}`` in flattening order, and the tree's structure.

    Markers count as leaves, so that what was taken out can be put back, and so does what is stored
    quantised.

    Raises:
      ValueError: two leaves have the same path.
    """
    pairs, treedef = named_leaves(tree)
    leaves: dict[str, Any] = {}
    for path, leaf in pairs:
        name = path_name(path)
        if name in leaves:
            raise ValueError(
                f"two leaves of the params are both named {name!r}: rename one of them "
                "(a key that contains '/' reads like a nested one)"
            )
        leaves[name] = leaf
    return leaves, treedef


def module_of(path: str) -> str:
    """Returns the path of the module that holds the leaf: all but the last entry."""
    return path.rpartition("/")[0]


def leaf_name(path: str) -> str:
    return path.rpartition("/")[2]


def dotted(path: str) -> str:
    """Returns a path in PyTorch's spelling, which PEFT's patterns are written in."""
    return path.replace("/", ".")


class Listed(tuple[str, ...]):
    """Names of modules, each of which means every path that ends with it; many take no longer."""

    @functools.cached_property
    def positions(self) -> dict[str, int]:
        """Where each name stands first, by its dotted spelling."""
        return {dotted(name): i for i, name in reversed(list(enumerate(self)))}


def matches(target: str | Collection[str], path: str) -> str | None:
    """Returns the target that names ``path``, or None.

    A sequence names a path that equals one of its entries or ends with it, entry for entry; a
    string is a regular expression for the whole of it. Either may be spelled with ``/`` or ``.``.
    Follows ``peft.tuners.tuners_utils.check_target_module_exists``.
    """
    spellings = (path, dotted(path))
    if isinstance(target, str):
        return target if any(re.fullmatch(target, s) for s in spellings) else None
    if isinstance(target, Listed):
        found = [target.positions[t] for t in tails(path) if t in target.positions]
        return target[min(found)] if found else None
    for name in target:
        tail = dotted(name)
        if spellings[1] == tail or spellings[1].endswith("." + tail):
            return name
    return None


def tails(path: str) -> list[str]:
    """Returns the dotted names that a path ends with, entry for entry: itself comes first.

    >>> tails("layers/0/q_proj")
    ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    entries = dotted(path).split(".")
    return [".".join(entries[i:]) for i in range(len(entries))]


def ending_with(
    targets: Iterable[str], named: Iterable[tuple[_T, Iterable[str]]]
) -> dict[str, list[_T]]:
    """Returns, for each target, the things that it names in a list of targets, as `matches` has it.

    In one pass over the things, however many targets there are.

    Args:
      named: each thing with its paths.
    """
    found: dict[str, list[_T]] = {dotted(target): [] for target in targets}
    for thing, paths in named:
        for tail in dict.fromkeys(tail for path in paths for tail in tails(path)):
            if tail in found:
                found[tail].append(thing)
    return found


def nearby(name: str, names: Iterable[str], limit: int = 5) -> list[str]:
    """Returns the names that look most like ``name``, for an error's remedy."""
    last = {dotted(n).rpartition(".")[2]: n for n in sorted(names, reverse=True)}
    close = difflib.get_close_matches(dotted(name).rpartition(".")[2], list(last), limit, 0.5)
    return [last[c] for c in close] or sorted(last.values())[:limit]


def layer_index(path: str, layers_pattern: Collection[str] | None) -> int | None:
    """Returns the index of the layer that a module path lies in, or None.

    The first number that stands behind one of the patterns, or without patterns behind any entry;
    Flax's ``layers_3`` counts like ``layers/3``. Follows
    ``peft.tuners.tuners_utils.check_target_module_exists``.
    """
    for pattern in layers_pattern or ("[^.]*?",):
        match = re.match(rf"(?:^|.*?\.){pattern}[._](\d+)(?:\.|$)", dotted(path))
        if match:
            return int(match.group(1))
    return None


def is_tracer(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def describe(leaf: Any) -> str:
    """Returns a leaf's shape and dtype, for messages: ``float32[16, 8]``."""
    shape = ", ".join(map(str, getattr(leaf, "shape", ())))
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}[{shape}]"

"""A PyTorch state dict from params, and params from one, with ties."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_tied_lora._names.layout import TorchWeight, from_torch_arrays, to_torch_array, torch_view
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._tree.foreign import refuse_models
from flax_tied_lora._tree.paths import describe, flatten, is_marker
from flax_tied_lora._tree.processes import refuse_spread
from flax_tied_lora._tree.quantized_array import plain_array


class Entry(NamedTuple):
    """A tensor of a state dict that is not in memory yet: ``get()`` makes it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    get: Callable[[], np.ndarray]


def state_entries(params: Any, names: Names, *, duplicates: bool = False) -> list[Entry]:
    """Returns the tensors of a model's PyTorch state dict, to be made one at a time.

    Args:
      params: pytree of arrays, or of ``jax.ShapeDtypeStruct`` for names and shapes alone.
      names: the correspondence.
      duplicates: whether to list every name of a tied tensor, as the PyTorch model's
        ``state_dict()`` does. By default each is listed once, under the input embedding's name, as
        in safetensors files.

    Raises:
      UnmappedError: a leaf has no PyTorch name; the error shows a line to add.
      ValueError: two leaves have one name, leaves that the config ties are not equal, or other
        processes hold parts of one.
    """
    leaves, _ = _arrays("to_state_dict", params)
    for path, leaf in leaves.items():
        refuse_spread("to_state_dict", path, leaf)
    entries: dict[str, Entry] = {}
    sources: dict[str, tuple[str, Any, TorchWeight]] = {}
    for path, leaf in leaves.items():
        for weight in names.to_torch(path, leaf.shape):
            if weight.name in entries:
                other, _, _ = sources[weight.name]
                raise ValueError(
                    f"{weight.name} would be both {other!r} and {path!r}: the table of names gives "
                    "two leaves one PyTorch name"
                )
            sources[weight.name] = path, leaf, weight
            entries[weight.name] = _entry(leaf, weight)
    for first, others in _tied_names(names, entries):
        for name in others:
            if name in sources:
                _check_equal(sources[first], sources[name])
                if not duplicates:
                    del entries[name]
            elif duplicates:
                entries[name] = entries[first]._replace(name=name)
    return list(entries.values())


def to_state_dict(params: Any, names: Names, *, duplicates: bool = False) -> dict[str, np.ndarray]:
    """Returns a model's PyTorch state dict as NumPy arrays: `state_entries`, each made.

    >>> import numpy as np
    >>> from flax_tied_lora.names import names_of
    >>> params = {"transformer": {"h": {"0": {"mlp": {"c_fc": {"kernel": np.zeros((12, 4))}}}}}}
    >>> {k: v.shape for k, v in to_state_dict(params, names_of("gpt2")).items()}
    {'transformer.h.0.mlp.c_fc.weight': (4, 12)}
    """
    entries = state_entries(params, names, duplicates=duplicates)
    return {entry.name: entry.get() for entry in entries}


def from_state_dict(
    tensors: Mapping[str, Any], params: Any, names: Names, *, strict: bool = True
) -> Any:
    """Returns params with the values of a PyTorch state dict, in its dtypes.

    Names are understood with and without the base model's prefix (``transformer.``), and a tied
    tensor may have any of its names. Each tensor is read when its leaf is made, so ``tensors`` may
    be a lazy mapping over files.

    Args:
      tensors: ``{name: array}``; NumPy must be able to read the arrays.
      params: pytree of arrays or ``jax.ShapeDtypeStruct`` of the model: paths and shapes.
      names: the correspondence.
      strict: whether a tensor that belongs to no leaf is an error.

    Raises:
      UnmappedError: a leaf has no PyTorch name; the error shows a line to add.
      ValueError: a tensor is missing, left over, of another shape, or differs from one that the
        config ties it to.
    """
    leaves, treedef = _arrays("from_state_dict", params)
    weights = {path: names.to_torch(path, leaf.shape) for path, leaf in leaves.items()}
    wanted = {w.name for group in weights.values() for w in group}
    tied = [(first, *others) for first, others in _tied_names(names, wanted)]
    groups = {name: group for group in tied for name in group}
    stored = _stored(tensors, names, wanted | set(groups))
    for group in dict.fromkeys(groups.values()):
        _check_one_tensor([stored[n] for n in group if n in stored], tensors)
    if strict:
        _check_left_over(set(tensors) - set(stored.values()), names)
    values = []
    for path, leaf in leaves.items():
        sources = [_source(w.name, stored, groups, path, leaf) for w in weights[path]]
        values.append(from_torch_arrays([tensors[s] for s in sources], weights[path], leaf.shape))
    return treedef.unflatten(values)


def _arrays(what: str, params: Any) -> tuple[dict[str, Any], Any]:
    """Returns ``{path: leaf}`` of params, all of them arrays, and their structure."""
    refuse_models(what, params)
    leaves, treedef = flatten(params)
    for path, leaf in leaves.items():
        if is_marker(leaf):
            raise ValueError(
                f"{path!r} was taken out of these params by wrap: give merge(adapted) or "
                "base(adapted), which put it back"
            )
        if not hasattr(leaf, "shape"):
            raise ValueError(f"leaf {path!r} is a {type(leaf).__name__}, expected an array")
    return leaves, treedef


def _entry(leaf: Any, weight: TorchWeight) -> Entry:
    get = functools.partial(_tensor, leaf, weight)
    return Entry(weight.name, weight.shape(leaf.shape), leaf.dtype, get)


def _tensor(leaf: Any, weight: TorchWeight) -> np.ndarray:
    return to_torch_array(plain_array(leaf), weight)


def _tied_names(names: Names, present: Container[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields for each tied tensor that is present the name of its leaf, and its other names."""
    for tie in names.ties:
        name = names.own_weight(tie).name
        if name in present:
            yield name, tie.names


def _check_equal(first: tuple[str, Any, TorchWeight], other: tuple[str, Any, TorchWeight]) -> None:
    (path, leaf, weight), (other_path, other_leaf, other_weight) = first, other
    shapes = weight.shape(leaf.shape), other_weight.shape(other_leaf.shape)
    concrete = not any(isinstance(x, jax.ShapeDtypeStruct) for x in (leaf, other_leaf))
    if shapes[0] != shapes[1] or (
        concrete and not _same(*(torch_view(plain_array(x), w) for _, x, w in (first, other)))
    ):
        raise ValueError(
            f"{other_path!r} {describe(other_leaf)} is not {path!r} {describe(leaf)}, which the "
            "model's config ties it to: tie them (tied_lora.merge keeps a tie), or say "
            "tie_word_embeddings=False in names_of and in the exported config"
        )


def _check_one_tensor(copies: Sequence[str], tensors: Mapping[str, Any]) -> None:
    for other in copies[1:]:
        if not _same(np.asarray(tensors[copies[0]]), np.asarray(tensors[other])):
            raise ValueError(
                f"{copies[0]} and {other} differ, and the model's config ties them: say "
                "tie_word_embeddings=False in names_of if they are two, or leave one of them out"
            )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays are equal, NaN to NaN, in shape and dtype too."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(np.all((a == b) | ((a != a) & (b != b))))


def _stored(tensors: Iterable[str], names: Names, wanted: Container[str]) -> dict[str, str]:
    """Returns ``{name in the table: name in the file}`` of the wanted tensors that there are."""
    tensors = list(tensors)
    stored = {name: name for name in tensors if name in wanted}
    for name in tensors:
        if name in stored:
            continue
        known = name
        for pattern, replacement in names.renamed:
            known = re.sub(pattern, replacement, known)
        start = f"{names.prefix}."
        for spelling in (known, start + known, known.removeprefix(start)):
            if spelling in wanted and spelling not in stored:
                stored[spelling] = name
                break
    return stored


def _check_left_over(left: Iterable[str], names: Names) -> None:
    extra = sorted(name for name in left if not names.is_ignored(name))
    if extra:
        more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
        raise ValueError(
            f"no leaf of the params is made of {', '.join(extra[:5])}{more}: give the params of "
            "the model that the file is of, or strict=False to leave these out"
        )


def _source(
    name: str,
    stored: Mapping[str, str],
    groups: Mapping[str, tuple[str, ...]],
    path: str,
    leaf: Any,
) -> str:
    for spelling in (name, *groups.get(name, ())):
        if spelling in stored:
            return stored[spelling]
    raise ValueError(
        f"leaf {path!r} {describe(leaf)} is {name} in PyTorch, and that is not among the tensors: "
        "give all of the model's files"
    )

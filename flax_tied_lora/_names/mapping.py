"""`Names`: a table of names with its ties, asked in both directions."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from flax_tied_lora._names.layout import MATRIX, TorchWeight
from flax_tied_lora._names.line import Line, check_whole, digest, suggestion

# Modules that pick rows of a tied table; the others that share it multiply by it.
LOOKUPS = ("embed_tokens", "embeddings", "embed", "shared", "wte")


class UnmappedError(KeyError):
    """A Flax leaf, or a PyTorch name, that no line of the table of names fits."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


@dataclasses.dataclass(frozen=True)
class Tie:
    """A leaf, and PyTorch parameters that are the same tensor as the leaf's own.

    Attributes:
      path: of the leaf.
      names: the PyTorch names, without the leaf's own.
    """

    path: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Names:
    """How a model's Flax leaf paths and its PyTorch parameter names correspond. Hashable.

    `names_of` makes it.

    Attributes:
      family: name of the family, or "own".
      lines: the family's table.
      extra: the user's lines, which take precedence over it.
      ties: parameters that are one tensor in PyTorch.
      prefix: what names begin with in a model with a head, and not in one without.
      ignored: patterns of what PyTorch files hold besides parameters.
      renamed: (pattern, replacement) of names in old files.
      hints: (pattern of paths, what to do where such a path is unmapped), or ().
      vocab_size: rows of PyTorch's input embedding, where the model's config says it.
    """

    family: str
    lines: tuple[Line, ...]
    extra: tuple[Line, ...] = ()
    ties: tuple[Tie, ...] = ()
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    hints: tuple[str, ...] = ()
    vocab_size: int | None = None

    def __repr__(self) -> str:
        return f"Names({self.family!r}, {len(self.extra) + len(self.lines)} lines)"

    @property
    def tied(self) -> Mapping[str, tuple[str, ...]]:
        """``{Flax path of the input embedding: PyTorch modules that share its weight}``."""
        tied = {}
        for tie in self.ties:
            weights = [name for name in tie.names if name.endswith(".weight")]
            if weights:
                tied[tie.path] = tuple(name.removesuffix(".weight") for name in weights)
        return MappingProxyType(tied)

    def to_torch(self, path: str, shape: int | Sequence[int]) -> tuple[TorchWeight, ...]:
        """Returns the PyTorch parameters that a leaf is: one, or one for each part of a fused leaf.

        Args:
          path: of the leaf.
          shape: of the leaf, or the number of its axes.

        Raises:
          UnmappedError: no line fits it; the error shows one to add.
          ValueError: the leaf has another number of axes than its line says, or sizes that its maps
            are not for; or its lines are not the whole of it.
        """
        known = None if isinstance(shape, int) else tuple(shape)
        ndim = shape if isinstance(shape, int) else len(shape)
        weights: list[TorchWeight] = []
        for table in self._by_path:
            for line in table.get(digest(path), ()):
                weights += line.weights(path, ndim, known) or ()
            if weights:
                break
        else:
            raise UnmappedError(self._no_name(path, known, ndim))
        if known is not None:
            check_whole(path, weights, known)
            for weight in weights:
                weight.shape(known)  # an error where a map is for another size
        return tuple(weights)

    def to_flax(self, name: str) -> tuple[str, TorchWeight]:
        """Returns the leaf that a PyTorch parameter is all or part of: its path, and where in it.

        The name of a tied parameter without a leaf of its own (``lm_head.weight``) gives the
        input embedding's leaf.

        Raises:
          UnmappedError: no line fits it; the error shows one to add.
        """
        for line in self._by_name.get(digest(name), ()):
            if leaf := line.leaf(name):
                return leaf
        if name in self._tie_of:
            tie = self._tie_of[name]
            weight = self.own_weight(tie)
            module, _, parameter = name.rpartition(".")
            kind = weight.kind
            if kind in ("embedding", MATRIX) and not module.endswith(LOOKUPS):
                kind = "linear"
            return tie.path, dataclasses.replace(
                weight, module=module, parameter=parameter, kind=kind
            )
        raise UnmappedError(self._no_path(name))

    def is_ignored(self, name: str) -> bool:
        """Returns whether a PyTorch tensor is not a parameter: a mask, positions."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def own_weight(self, tie: Tie) -> TorchWeight:
        """Returns the PyTorch parameter of a tie's own leaf."""
        lines = (line for table in self._by_path for line in table.get(digest(tie.path), ()))
        ndim = next((x.layout.ndim for x in lines if x.path_regex.fullmatch(tie.path)), 2)
        return self.to_torch(tie.path, ndim)[0]

    @functools.cached_property
    def _tie_of(self) -> dict[str, Tie]:
        return {name: tie for tie in reversed(self.ties) for name in tie.names}

    @functools.cached_property
    def _by_path(self) -> tuple[dict[str, list[Line]], ...]:
        tables = self.extra, self.lines
        return tuple(_grouped(lines, [line.path for line in lines]) for lines in tables)

    @functools.cached_property
    def _by_name(self) -> dict[str, list[Line]]:
        lines = (*self.extra, *self.lines)
        return _grouped(lines, [line.name for line in lines])

    def _no_name(self, path: str, shape: tuple[int, ...] | None, ndim: int) -> str:
        size = f" {list(shape)}" if shape is not None else f" of {ndim} axes"
        start = f"leaf {path!r}{size} has no PyTorch name in the table of {self.family!r}"
        if self.hints and re.fullmatch(self.hints[0], path):
            return f"{start}. {self.hints[1]}"
        return (
            f"{start}. Add a line for it, with its PyTorch name put right: "
            f"names_of(..., extra=[{suggestion(path, ndim)!r}])"
        )

    def _no_path(self, name: str) -> str:
        pattern = re.sub(r"\d+", "{}", name)
        module, _, parameter = pattern.rpartition(".")
        leaf = {"weight": "kernel"}.get(parameter, parameter)
        line = ("/".join(filter(None, [module.replace(".", "/"), leaf])), pattern)
        known = [line.name for line in (*self.extra, *self.lines)]
        similar = difflib.get_close_matches(pattern, known, 3)
        close = f" The table has {', '.join(map(repr, similar))}." if similar else ""
        return (
            f"PyTorch parameter {name!r} has no Flax leaf in the table of {self.family!r}.{close} "
            f"Add a line for it, with its leaf's path put right: names_of(..., extra=[{line!r}])"
        )


def _grouped(lines: Sequence[Line], patterns: Sequence[str]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line, pattern in zip(lines, patterns, strict=True):
        groups.setdefault(digest(pattern), []).append(line)
    return groups

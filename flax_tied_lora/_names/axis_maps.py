"""The maps on one axis, for leaves that are stored scaled, shifted, in another order, or padded.

A map says what PyTorch's axis is, given the leaf's: which of the leaf's entries each of its entries
is (`AxisMap.order`), times one number (`AxisMap.factor`), plus another (`AxisMap.offset`).
"""

from __future__ import annotations

import dataclasses
import math
import operator

import numpy as np

from flax_tied_lora._names.axis_map import AxisMap


@dataclasses.dataclass(frozen=True)
class Scale(AxisMap):
    """The parameter is the leaf times a number.

    MaxText stores a query divided by the root of the head's size, ``Scale(math.sqrt(head_dim))``.
    The product is rounded once, to the array's dtype.

    Raises:
      ValueError: the number is 0, infinite or NaN, which nothing undoes.

    >>> Scale(8.0).to_torch(np.array([1.0, 2.0]))
    array([ 8., 16.])
    """

    by: float

    def __post_init__(self):
        by = self.by
        if isinstance(by, bool) or not isinstance(by, int | float | np.floating | np.integer):
            raise ValueError(f"Scale({by!r}): expected a number")
        object.__setattr__(self, "by", float(by))
        if not 2.0**-126 <= abs(self.by) <= 2.0**126:  # as float32 holds it and its inverse
            raise ValueError(
                f"Scale({by!r}) has no inverse in float32, so that what is written could not be "
                "read back; expected a finite number that is not 0"
            )

    @property
    def factor(self) -> float:
        return self.by


@dataclasses.dataclass(frozen=True)
class Offset(AxisMap):
    """The parameter is the leaf plus a number: a norm's scale that one of both stores less 1.

    It is the only map of its line, which is a vector's: no low-rank delta meets it.

    Raises:
      ValueError: the number is not finite.

    >>> Offset(-1.0).to_torch(np.array([1.0, 3.0]))
    array([0., 2.])
    """

    by: float

    def __post_init__(self):
        if not (isinstance(self.by, (int, float)) and math.isfinite(self.by)):
            raise ValueError(f"Offset({self.by!r}): expected a finite number")

    @property
    def offset(self) -> float:
        return self.by


@dataclasses.dataclass(frozen=True)
class Permutation(AxisMap):
    """PyTorch's entry ``i`` is the leaf's entry ``entries[i]``.

    Raises:
      ValueError: the entries are not 0, 1, ... in some order.

    >>> Permutation((2, 0, 1)).to_torch(np.array([5, 6, 7]))
    array([7, 5, 6])
    """

    entries: tuple[int, ...]

    def __post_init__(self):
        try:
            entries = tuple(map(operator.index, self.entries))
        except TypeError:
            entries = ()
        object.__setattr__(self, "entries", entries)
        if not entries or sorted(entries) != list(range(len(entries))):
            raise ValueError(
                f"Permutation of {len(entries)} entries has no inverse; expected each of 0, 1, ... "
                "once, in PyTorch's order"
            )

    def order(self, size: int) -> np.ndarray:
        if size != len(self.entries):
            raise ValueError(f"a Permutation of {len(self.entries)} is not for {size} entries")
        return np.array(self.entries)


@dataclasses.dataclass(frozen=True)
class Interleaved(AxisMap):
    """The leaf has the two entries that a rotary embedding turns together side by side.

    So do Meta's and MaxText's Llama; PyTorch (Hugging Face) has all the first of them, and then all
    the second.

    Attributes:
      head_dim: size of a head, where the axis holds several heads one after the other; None: it is
        that of one head.
      rotary_dim: how many entries of a head, from its first, are turned; None: all.
      torch: whether it is PyTorch's parameter that has them side by side, and the leaf the halves.

    Raises:
      ValueError: a size is odd, not above 0, or the two do not fit.

    >>> Interleaved().to_torch(np.array([0, 1, 2, 3, 4, 5]))
    array([0, 2, 4, 1, 3, 5])
    """

    head_dim: int | None = None
    rotary_dim: int | None = None
    torch: bool = False

    def __post_init__(self):
        for name in ("head_dim", "rotary_dim"):
            size = getattr(self, name)
            odd_head = name == "head_dim" and self.rotary_dim is not None
            fits = type(size) is int and size > 0 and (odd_head or size % 2 == 0)
            if size is not None and not fits:
                raise ValueError(f"Interleaved: {name}={size!r}; expected an even number above 0")
        if self.head_dim and self.rotary_dim and self.rotary_dim > self.head_dim:
            raise ValueError(
                f"Interleaved: rotary_dim={self.rotary_dim} of head_dim={self.head_dim}; expected "
                "no more than a head has"
            )

    def order(self, size: int) -> np.ndarray:
        head = self.head_dim or size
        turned = self.rotary_dim or head
        if size % head or turned > head or turned % 2:
            raise ValueError(f"{self} is not for {size} entries")
        within = np.arange(head)
        pairs = within[:turned].reshape(turned // 2, 2).T.reshape(-1)
        within[:turned] = np.argsort(pairs) if self.torch else pairs
        return (np.arange(0, size, head)[:, None] + within).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Padding(AxisMap):
    """One side has entries at the end that the other lacks, as a table padded for a mesh has rows.

    They are left out on the way to the other side, and zeros on the way back.

    Attributes:
      leaf: how many entries the leaf has.
      torch: how many the parameter has.

    Raises:
      ValueError: a number is not above 0.

    >>> Padding(leaf=4, torch=3).to_torch(np.array([1, 2, 3, 0]))
    array([1, 2, 3])
    >>> Padding(leaf=4, torch=3).from_torch(np.array([1, 2, 3]))
    array([1, 2, 3, 0])
    """

    leaf: int
    torch: int

    def __post_init__(self):
        for name in ("leaf", "torch"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"Padding: {name}={size!r}; expected a number above 0")

    def order(self, size: int) -> np.ndarray:
        if size != self.leaf:
            raise ValueError(f"{self} is not for {size} entries")
        entries = np.arange(self.torch)
        return np.where(entries < self.leaf, entries, -1)

    def leaf_size(self, size: int) -> int:
        if size != self.torch:
            raise ValueError(f"{self} is not for {size} entries of PyTorch's")
        return self.leaf

"""`QuantizedArray`: an array stored as small integers and a scale for each block of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import register_dataclass

from flax_tied_lora._tree.sharding import automatic, explicit, shard_count

FOUR_BITS = ("int4", "nf4")
QTYPES = ("int8", *FOUR_BITS)


def qwix() -> Any:
    """Returns the library that quantises and dequantises.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "quantised params need qwix, which is not installed: "
            "pip install 'flax-tied-lora[quantized]'"
        ) from error
    return qwix


class QuantizedArray:
    """A frozen array as integers and scales, block by block along an axis; a pytree.

    Attributes:
      values: int8 of the array's shape; of four bits, two in a uint8, so that ``axis`` has half the
        length: those of a block's first half are the low bits, those of its second half the high.
        (XLA for the CPU turns a whole array of its own 4-bit types into bytes to cut a slice.)
      scales: of the array's shape, but for one entry for each block along ``axis``. Their dtype is
        the array's.
      qtype: ``"int8"``, ``"int4"`` or ``"nf4"``.
      axis: along which the blocks lie.
    """

    def __init__(self, values: Any, scales: Any, qtype: str, axis: int):
        self.values, self.scales, self.qtype, self.axis = values, scales, qtype, axis

    @classmethod
    def of(cls, array: Any, qtype: str, axis: int, block: int) -> QuantizedArray:
        """Returns an array quantised (``qwix.quantize``, by the largest magnitude in a block).

        Args:
          array: floating point, its axis a multiple of the block; abstract or not.
          block: entries that share a scale, an even number.
        """
        others = [i for i in range(len(array.shape)) if i != axis]

        def integers(array: Any) -> QuantizedArray:
            made = qwix().quantize(
                jnp.asarray(array).astype(jnp.float32), qtype, channelwise_axes=others,
                tiled_axes={axis: block}, scale_dtype=array.dtype,
            )  # fmt: skip
            values = made.qvalue
            if qtype in FOUR_BITS:
                values = _packed(values, axis, made.scale.shape[axis])
            return cls(values, made.scale, qtype, axis)

        def make(array: Any) -> QuantizedArray:
            sharding = explicit(jax.typeof(array))
            if sharding is None:
                return integers(array)
            shapes = jax.eval_shape(integers, jax.ShapeDtypeStruct(array.shape, array.dtype))
            return automatic(integers, jax.tree.map(lambda x: _fitting(sharding, x), shapes))(array)

        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.eval_shape(make, array)
        return jax.jit(make)(array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        entries = 2 if self.qtype in FOUR_BITS else 1
        return tuple(n * entries if i == self.axis else n for i, n in enumerate(self.values.shape))

    @property
    def dtype(self) -> Any:
        """Dtype of the array that it stands for."""
        return self.scales.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """Number of entries of the array that it stands for."""
        return math.prod(self.shape)

    @property
    def T(self) -> QuantizedArray:  # noqa: N802 (an array's)
        """The transpose, of an array with two axes."""
        return QuantizedArray(self.values.T, self.scales.T, self.qtype, 1 - self.axis)

    @property
    def nbytes(self) -> int:
        """Bytes that it is stored in, scales included."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (self.values, self.scales))

    def dequantize(self) -> Array:
        """Returns the array that it stands for."""
        return dequantized(self.values, self.scales, self.qtype, self.axis)

    def __repr__(self) -> str:
        if not all(hasattr(x, "shape") for x in (self.values, self.scales)):
            return f"QuantizedArray({self.values}, {self.scales}, {self.qtype!r}, {self.axis})"
        block = self.shape[self.axis] // self.scales.shape[self.axis]
        shape = ", ".join(map(str, self.shape))
        return f"QuantizedArray({self.dtype}[{shape}] as {self.qtype}, blocks of {block})"


register_dataclass(QuantizedArray, ["values", "scales"], ["qtype", "axis"])


def is_quantized(node: Any) -> bool:
    """Returns whether a leaf is stored quantised."""
    return isinstance(node, QuantizedArray)


def dequantized_leaves(leaves: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the quantised leaves among some as arrays; one under several paths is one array."""
    made: dict[int, Array] = {}
    stored = {path: leaf for path, leaf in leaves.items() if is_quantized(leaf)}
    for leaf in stored.values():
        if id(leaf) not in made:
            made[id(leaf)] = leaf.dequantize()
    return {path: made[id(leaf)] for path, leaf in stored.items()}


def plain_array(leaf: Any) -> Any:
    """Returns the array that a leaf stands for; a quantised one is dequantised."""
    return leaf.dequantize() if is_quantized(leaf) else leaf


def array_of(leaf: Any) -> Any:
    """Returns the array that a leaf is stored in: of a quantised one the integers."""
    return leaf.values if is_quantized(leaf) else leaf


def dequantized(values: Array, scales: Array, qtype: str, axis: int) -> Array:
    """Returns integers times their scales (``qwix.dequantize``).

    Args:
      scales: with as many axes as the values, each as long, of length 1, or for ``axis`` one entry
        for each block.
    """

    def make(values: Array, scales: Array) -> Array:
        if qtype in FOUR_BITS:
            values = _unpacked(values, axis, scales.shape[axis], qtype)
        if not values.size:  # none is a multiple of no scale, to qwix
            return jnp.zeros(values.shape, scales.dtype)
        return qwix().dequantize(qwix().QArray(values, scales, None, qtype))

    sharding = explicit(jax.typeof(values))
    return (make if sharding is None else automatic(make, sharding))(values, scales)


def _fitting(sharding: jax.NamedSharding, array: Any) -> jax.NamedSharding:
    """Returns a sharding without the axes that an array is too short for."""
    spec = (*sharding.spec, *[None] * (len(array.shape) - len(sharding.spec)))
    mesh = sharding.mesh
    kept = [
        names if n % shard_count(mesh, names) == 0 else None
        for names, n in zip(spec, array.shape, strict=True)
    ]
    return jax.NamedSharding(mesh, jax.P(*kept))


def _packed(values: Array, axis: int, blocks: int) -> Array:
    shape = values.shape
    low, high = jnp.split(
        _in_blocks(lax.convert_element_type(values, jnp.int8), axis, blocks), 2, axis=axis + 1
    )
    both = (low & 15) | (high << 4)
    half = tuple(n // 2 if i == axis else n for i, n in enumerate(shape))
    return lax.bitcast_convert_type(both, jnp.uint8).reshape(half)


def _unpacked(values: Array, axis: int, blocks: int, qtype: str) -> Array:
    shape = values.shape
    pairs = _in_blocks(values, axis, blocks)
    four = jnp.concatenate([pairs & 15, pairs >> 4], axis=axis + 1)
    whole = four.reshape(tuple(n * 2 if i == axis else n for i, n in enumerate(shape)))
    if qtype == "int4":  # in two's complement
        return (lax.bitcast_convert_type(whole, jnp.int8) ^ 8) - 8
    return whole


def _in_blocks(values: Array, axis: int, blocks: int) -> Array:
    shape = values.shape
    return values.reshape(*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])

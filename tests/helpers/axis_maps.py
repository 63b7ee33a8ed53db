"""Random maps of axes, for the tests of tables of names and of adapters' files."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from flax_tied_lora.names import AxisMap, Interleaved, Padding, Permutation, Scale

SCALES = (2.0, -0.5, 3.0, 0.3535533905932738)


def maps_of(data: Any, size: int, *, padding: bool = True, growing: bool = True) -> list[AxisMap]:
    """Returns up to three maps, each for what the one before it makes of an axis of this size.

    Args:
      data: of hypothesis.
      padding: whether one of them may be `Padding`; with ``growing`` PyTorch's may be the longer.
    """
    maps: list[AxisMap] = []
    for _ in range(data.draw(st.integers(0, 3))):
        kinds = ["scale", "permutation"]
        kinds += ["interleaved"] if size % 2 == 0 else []
        kinds += ["padding"] if padding and (size > 1 or growing) else []
        kind = data.draw(st.sampled_from(kinds))
        if kind == "scale":
            maps.append(Scale(data.draw(st.sampled_from(SCALES))))
        elif kind == "permutation":
            maps.append(Permutation(tuple(data.draw(st.permutations(range(size))))))
        elif kind == "interleaved":
            maps.append(Interleaved(torch=data.draw(st.booleans())))
        else:
            least, most = max(1, size - 2), size + 2 if growing else size
            maps.append(Padding(size, data.draw(st.integers(least, most))))
        size = maps[-1].torch_size(size)
    return maps

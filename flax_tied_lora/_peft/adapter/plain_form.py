"""The plain form of an adapter's file: what readers of `lora_A`, `lora_B`, r and alpha serve right.

`arithmetic.plain` makes the factors plain. What is added here is for servers that compute several
modules in one product: a partner without factors gets some of zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from flax_tied_lora._names.layout import TorchWeight
from flax_tied_lora._names.mapping import Names
from flax_tied_lora._peft.adapter.file_tensors import PREFIX
from flax_tied_lora._peft.adapter.parameters import parameters_of_leaves
from flax_tied_lora._peft.files.safetensors_write import TensorSource
from flax_tied_lora._tree.boxes import unboxed

# Modules that servers fuse, by the last part of their names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def partners(
    adapted: Collection[str], leaves: Mapping[str, Any], names: Names
) -> dict[str, tuple[int, int]]:
    """Returns the modules that are fused with adapted ones and have no factors: [outputs, inputs].

    Args:
      adapted: modules that have factors, by PyTorch's names.
      leaves: the params, by path.
    """
    wanted = set()
    for module in adapted:
        parent, _, last = module.rpartition(".")
        for fused in FUSED:
            if last in fused:
                wanted |= {f"{parent}.{other}" if parent else other for other in fused}
    wanted -= set(adapted)
    found = {}
    for path, weights in parameters_of_leaves(leaves, names).items() if wanted else ():
        for weight in weights:
            if weight.module in wanted and weight.parameter == "weight":
                found[weight.module] = _matrix(weight, unboxed(leaves[path]).shape)
    return found


def _matrix(weight: TorchWeight, leaf_shape: tuple[int, ...]) -> tuple[int, int]:
    outputs, inputs = weight.shape(leaf_shape)
    return (inputs, outputs) if weight.kind == "conv1d" else (outputs, inputs)


def zero_factors(
    modules: Mapping[str, tuple[int, int]], rank: int, dtype: np.dtype
) -> Iterator[TensorSource]:
    """Yields factors of zeros for modules of these sizes."""
    for module, (outputs, inputs) in modules.items():
        for name, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            yield TensorSource(
                f"{PREFIX}{module}.{name}.weight", shape, dtype,
                lambda shape=shape: np.zeros(shape, dtype),
            )  # fmt: skip

"""Tiny models of Hugging Face, and PEFT's adapters of them, that need neither to be read.

`test_reference.py` makes them with both, and holds them to both: so a library can be compared with
PyTorch where PyTorch is not installed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "references"
VOCABULARY, WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD = 120, 16, 24, 4, 2, 8
TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 6)).astype(np.int32)
RANK, ALPHA = 2, 4
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of PyTorch with drawn weights, and what it answers.

    Attributes:
      name: of its folder.
      config: of transformers.
      shapes: of its parameters by their names; tied ones once.
      logits: [batch, length, vocabulary].
      adapted_logits: with PEFT's adapter in `adapter`.
    """

    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    logits: np.ndarray
    adapted_logits: np.ndarray

    @property
    def adapter(self) -> Path:
        """Folder of the adapter, as PEFT wrote it."""
        return FOLDER / self.name / "adapter"

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return {name: drawn(name, shape) for name, shape in self.shapes.items()}

    @property
    def merged(self) -> dict[str, np.ndarray]:
        """The weights with the adapter's deltas added."""
        weights = self.weights
        for name, a in self.factors.items():
            module, _, rest = name.partition(".lora_")
            if f"{module}.weight" not in weights or rest not in ("A.weight", "embedding_A"):
                continue  # lora_B, or the tied head's
            delta = self.factors[name.replace("_A", "_B")] @ a
            delta = delta.T if rest == "embedding_A" else delta
            weights[f"{module}.weight"] += ALPHA / RANK * delta
        return weights

    @functools.cached_property
    def factors(self) -> dict[str, np.ndarray]:
        """The adapter's tensors, without PEFT's prefix."""
        tensors = load_file(self.adapter / "adapter_model.safetensors")
        return {name.removeprefix(_PREFIX): x for name, x in tensors.items()}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns random numbers that depend on a name alone.

    They are sixteenths, and factors quarters, so that a table is exact in bfloat16, with a delta
    and without: where a library rounds a table to that, nothing is lost.
    """
    numbers = np.random.default_rng(zlib.crc32(name.encode()))
    if "lora_" in name:
        return (numbers.integers(-1, 2, shape) / 4).astype(np.float32)
    values = np.asarray(numbers.standard_normal(shape) * 0.25)
    if name.endswith(("norm.weight", "layernorm.weight", "layer_norm.weight")):
        values = values / 2 + 1
    return (np.round(values * 16) / 16).astype(np.float32)


@functools.cache
def reference(name: str) -> Reference:
    """Returns a stored reference."""
    content = json.loads((FOLDER / name / "model.json").read_text())
    with np.load(FOLDER / name / "logits.npz") as logits:
        return Reference(
            name,
            content["config"],
            {n: tuple(shape) for n, shape in content["shapes"].items()},
            logits["base"],
            logits["adapted"],
        )


def params_of(reference: Reference, like: Any, names: Any, merged: bool = False) -> Any:
    """Returns a library's params from a reference's weights."""
    import jax

    from flax_tied_lora.names import from_state_dict

    weights = reference.merged if merged else reference.weights
    return jax.tree.map(jnp.asarray, from_state_dict(weights, like, names))

"""Decoders of EasyDeL, SkyRL tx, bonsai and Levanter as one small function.

Each library's imitation has its own leaf names, its own shapes, and reads each weight by the axes
in which it is stored, one layer after another or in a scan.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from tests.libraries.reference import HEAD, HEADS, HIDDEN, KEY_HEADS, VOCABULARY, WIDTH

# The axes of a projection: d width, h heads, j key heads, g heads a key head, k a head's entries,
# q and c all entries of the heads and the key heads, f hidden.
FLAT = {"q": "dq", "k": "dc", "v": "dc", "o": "qd", "gate": "df", "up": "df", "down": "fd"}
WITH_HEADS = {**FLAT, "q": "dhk", "k": "djk", "v": "djk", "o": "hkd"}
OUTPUTS_FIRST = {
    "q": "jgkd", "k": "jkd", "v": "jkd", "o": "dhk", "gate": "fd", "up": "fd", "down": "df"
}  # fmt: skip
_INPUTS = {"o": ("hk", "q"), "down": ("f",)}
_MLP = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Like:
    """How a library stores a decoder.

    Attributes:
      family: of the reference: llama, qwen3, gemma3.
      axes: of each projection.
      table, layers, last_norm: paths.
      leaf, scale: names of a projection's leaf and a norm's.
      attention: name of a layer's attention.
      stacked: whether the layers are stacked, and scanned.
      head: path of the head's leaf, where that is read and not the table.
    """

    family: str
    axes: dict[str, str]
    table: str
    layers: str
    last_norm: str
    leaf: str
    scale: str
    attention: str = "self_attn"
    stacked: bool = False
    head: str | None = None

    @property
    def count(self) -> int:
        return 8 if self.family == "gemma3" else 2

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "d": HEADS * HEAD if self.family == "llama" else WIDTH, "h": HEADS, "j": KEY_HEADS,
            "g": HEADS // KEY_HEADS, "k": HEAD, "f": HIDDEN, "q": HEADS * HEAD,
            "c": KEY_HEADS * HEAD,
        }  # fmt: skip

    @property
    def norms(self) -> list[str]:
        more = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        norms = ["input_layernorm", "post_attention_layernorm"]
        return norms + more if self.family == "gemma3" else norms

    @property
    def block(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's leaves by their paths in it."""
        size = self.sizes
        shapes = {self.of(p): tuple(size[a] for a in axes) for p, axes in self.axes.items()}
        shapes |= {f"{norm}/{self.scale}": (size["d"],) for norm in self.norms}
        if self.family != "llama":
            shapes |= {f"{self.attention}/{x}_norm/{self.scale}": (HEAD,) for x in "qk"}
        return shapes

    def of(self, projection: str) -> str:
        module = "mlp" if projection in _MLP else self.attention
        return f"{module}/{projection}_proj/{self.leaf}"

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of all leaves by their paths."""
        width, shapes = self.sizes["d"], {}
        for path, shape in self.block.items():
            if self.stacked:
                shapes[f"{self.layers}/{path}"] = (self.count, *shape)
            else:
                shapes |= {f"{self.layers}/{i}/{path}": shape for i in range(self.count)}
        shapes |= {self.table: (VOCABULARY, width), f"{self.last_norm}/{self.scale}": (width,)}
        if self.head:
            shapes[self.head] = (width, VOCABULARY)
        return {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in shapes.items()}

    def logits(self, params: Any, tokens: Any) -> Any:
        """Returns logits [batch, length, vocabulary]."""
        x = params[self.table][tokens]
        x = x * math.sqrt(x.shape[-1]) if self.family == "gemma3" else x
        if self.stacked:
            stack = {path: params[f"{self.layers}/{path}"] for path in self.block}
            body = jax.checkpoint(lambda x, block: (self._layer(block, x, 0), None))
            x = jax.lax.scan(body, x, stack)[0]
        else:
            for i in range(self.count):
                block = {path: params[f"{self.layers}/{i}/{path}"] for path in self.block}
                x = self._layer(block, x, i)
        x = self._norm(params[f"{self.last_norm}/{self.scale}"], x)
        if self.head:
            return jnp.einsum("btd,dv->btv", x, params[self.head])
        return x @ params[self.table].T

    def _layer(self, block: Any, x: Any, place: int) -> Any:
        norm = lambda name, x: self._norm(block[f"{name}/{self.scale}"], x)  # noqa: E731
        gemma = self.family == "gemma3"
        y = self._attention(block, norm("input_layernorm", x), not gemma or place % 6 == 5)
        x = x + (norm("post_attention_layernorm", y) if gemma else y)
        y = norm("pre_feedforward_layernorm" if gemma else "post_attention_layernorm", x)
        active = functools.partial(jax.nn.gelu, approximate=True) if gemma else jax.nn.silu
        y = active(self._project(block, "gate", y)) * self._project(block, "up", y)
        y = self._project(block, "down", y)
        return x + (norm("post_feedforward_layernorm", y) if gemma else y)

    def _project(self, block: Any, projection: str, x: Any) -> Any:
        weight, axes = block[self.of(projection)], self.axes[projection]
        inputs = next((i for i in _INPUTS.get(projection, ("d",)) if i in axes), "")
        outputs = "".join(a for a in axes if a not in inputs)
        x = x.reshape(*x.shape[:2], *(self.sizes[a] for a in inputs))
        return jnp.einsum(f"bt{inputs},{axes}->bt{outputs}", x, weight)

    def _attention(self, block: Any, x: Any, is_global: bool) -> Any:
        q, k, v = (
            self._project(block, p, x).reshape(*x.shape[:2], -1, HEAD) for p in ("q", "k", "v")
        )
        if self.family != "llama":
            path = f"{self.attention}/%s_norm/{self.scale}"
            q, k = self._norm(block[path % "q"], q), self._norm(block[path % "k"], k)
        theta = 1_000_000.0 if self.family == "gemma3" and is_global else 10_000.0
        q, k = _turned(q, theta), _turned(k, theta)
        k, v = (jnp.repeat(a, HEADS // KEY_HEADS, axis=2) for a in (k, v))
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(HEAD)
        apart = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
        seen = (apart >= 0) & (is_global | (apart < 4))
        mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)
        return self._project(block, "o", mixed)

    def _norm(self, scale: Any, x: Any) -> Any:
        scale = scale + 1 if self.family == "gemma3" else scale
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _turned(x: Any, theta: float) -> Any:
    """Returns queries or keys turned by their positions, in planes of two halves."""
    angles = jnp.arange(x.shape[1])[:, None] * theta ** -(jnp.arange(0, HEAD, 2) / HEAD)
    sin, cos = jnp.sin(angles)[:, None, :], jnp.cos(angles)[:, None, :]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

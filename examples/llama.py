"""Llama and its kin in NNX: one readable class for what their configs say.

Llama, Mistral, Qwen 2 and 3, SmolLM 2 and 3, Gemma 1 to 3 (text). Leaves have Hugging Face's names
and numbers; a kernel is stored [in, out]. Where input and output are tied there is one table::

    model = Llama(Config.from_hf(config), rngs=nnx.Rngs(0))  # or loading.load(directory)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import families
import jax
import jax.numpy as jnp
import rotary
from flax import nnx
from rotary import Rope

# Of each layer, keys and values [batch, slots, heads, dim].
Cache = list[tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What a ``config.json`` says, under Hugging Face's names, and what it leaves to the class."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    ropes: tuple[Rope | None, ...]  # of each layer; None: it has none
    windows: tuple[int | None, ...]  # of each layer: how far back it sees; None: to the beginning
    activation: str = "silu"
    attention_bias: bool = False  # of query, key and value
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norms: bool = False
    norms_around: bool = False  # behind attention and feed-forward layer, too
    norm_offset: float = 0.0  # what norms add to their weight
    embedding_scale: float = 1.0
    query_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None

    @classmethod
    def from_hf(cls, found: Mapping[str, Any]) -> Config:
        """Returns the config of a Hugging Face model.

        Args:
          found: its ``config.json``, of transformers 4 or 5.

        Raises:
          ValueError: the model is of another family, or what it does is not known here.
        """
        found = families.completed(found)
        kind, gemma = found["model_type"], found["model_type"].startswith("gemma")
        try:
            width, heads = found["hidden_size"], found["num_attention_heads"]
            dim = found.get("head_dim") or width // heads
            bias = found["attention_bias"] or kind == "qwen2"
            return cls(
                **{name: found[name] for name in (
                    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "max_position_embeddings", "rms_norm_eps", "mlp_bias",
                    "tie_word_embeddings",
                )},
                num_key_value_heads=found.get("num_key_value_heads") or heads,
                head_dim=dim,
                ropes=rotary.ropes(found, dim),
                windows=families.windows(found),
                activation=_activation(found, gemma),
                attention_bias=bias,
                output_bias=bias and kind != "qwen2",
                query_key_norms=kind in ("qwen3", "gemma3_text"),
                norms_around=kind in ("gemma2", "gemma3_text"),
                norm_offset=float(gemma),
                embedding_scale=math.sqrt(width) if gemma else 1.0,
                query_scale=(found.get("query_pre_attn_scalar") or dim) ** -0.5,
                attention_cap=found.get("attn_logit_softcapping"),
                logit_cap=found.get("final_logit_softcapping"),
            )  # fmt: skip
        except KeyError as error:
            raise ValueError(f"the config of this {kind} model has no {error}") from None


def _activation(found: Mapping[str, Any], gemma: bool) -> str:
    name = found.get("hidden_activation") or found.get("hidden_act") or "silu"
    if gemma:  # "gelu" in the first configs is meant to be this one
        name = "gelu_pytorch_tanh" if name in ("gelu", "silu") else name
    if name not in ("silu", "gelu_pytorch_tanh"):
        raise ValueError(f"hidden_act is {name!r}: expected 'silu' or 'gelu_pytorch_tanh'")
    return name


class Embedding(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        shape = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """``x @ kernel + bias``: float [..., inputs] -> [..., outputs]."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs, dtype: Any
    ):
        kernel = jax.random.normal(rngs.params(), (inputs, outputs), dtype)
        self.kernel = nnx.Param(kernel * inputs**-0.5)
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x @ self.kernel[...]
        return x + self.bias[...] if hasattr(self, "bias") else x


class Norm(nnx.Module):
    """Root mean square norm, in float32."""

    def __init__(self, size: int, config: Config, *, dtype: Any):
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.weight = nnx.Param(jnp.full(size, 1 - config.norm_offset, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        if self.offset:  # Gemma rounds last, the others before they multiply
            return (y * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * self.weight[...]


class Attention(nnx.Module):
    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs, dtype: Any):
        self.config, self.layer = config, layer
        linear = functools.partial(Linear, rngs=rngs, dtype=dtype)
        width, bias = config.hidden_size, config.attention_bias
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = linear(width, heads * config.head_dim, bias=bias)
        self.k_proj = linear(width, groups * config.head_dim, bias=bias)
        self.v_proj = linear(width, groups * config.head_dim, bias=bias)
        self.o_proj = linear(heads * config.head_dim, width, bias=config.output_bias)
        if config.query_key_norms:
            self.q_norm = Norm(config.head_dim, config, dtype=dtype)
            self.k_norm = Norm(config.head_dim, config, dtype=dtype)

    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Any, mask: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        c = self.config
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, c.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if c.query_key_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope := c.ropes[self.layer]:
            q, k = rotary.rotated(q, positions, rope), rotary.rotated(k, positions, rope)
        seen = positions
        if cache is not None:  # rows are as far as each other, and the cache as long as all of them
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, positions[0, 0], axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache, seen = (k, v), jnp.arange(k.shape[1])[None]
        visible = positions[:, :, None] >= seen[:, None, :]  # [batch, queries, keys]
        if window := c.windows[self.layer]:
            visible &= positions[:, :, None] - seen[:, None, :] < window
        if mask is not None:
            visible &= mask[:, None, :]
        q = q.reshape(*q.shape[:2], k.shape[2], -1, c.head_dim)  # heads by the key that they share
        scores = jnp.einsum("bqgnd,bkgd->bgnqk", q, k).astype(jnp.float32) * c.query_scale
        if c.attention_cap:
            scores = c.attention_cap * jnp.tanh(scores / c.attention_cap)
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
        shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bgnqk,bkgd->bqgnd", shares, v)
        return self.o_proj(y.reshape(*x.shape[:2], -1)), cache


class FeedForward(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        linear = functools.partial(Linear, bias=config.mlp_bias, rngs=rngs, dtype=dtype)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        act = jax.nn.silu if self.activation == "silu" else jax.nn.gelu
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs, dtype: Any):
        norm = functools.partial(Norm, config.hidden_size, config, dtype=dtype)
        self.around = config.norms_around
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        if self.around:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.self_attn = Attention(config, layer, rngs=rngs, dtype=dtype)
        self.mlp = FeedForward(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, *context: Any) -> tuple[jax.Array, Any]:
        y, cache = self.self_attn(self.input_layernorm(x), *context)
        if self.around:
            x = x + self.post_attention_layernorm(y)
            y = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(y), cache
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Body(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any):
        self.embed_tokens = Embedding(config, rngs=rngs, dtype=dtype)
        numbers = range(config.num_hidden_layers)
        self.layers = nnx.List([Layer(config, i, rngs=rngs, dtype=dtype) for i in numbers])
        self.norm = Norm(config.hidden_size, config, dtype=dtype)


class Llama(nnx.Module):
    """A causal language model."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        self.model = Body(config, rngs=rngs, dtype=dtype)
        if not config.tie_word_embeddings:
            sizes = config.hidden_size, config.vocab_size
            self.lm_head = Linear(*sizes, rngs=rngs, dtype=dtype)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, cache: Cache | None = None,
        mask: jax.Array | None = None,
    ) -> Any:  # fmt: skip
        """Returns logits, float32 [batch, length, vocabulary], and the cache if there is one.

        Args:
          tokens: int32 [batch, length].
          positions: int32 [batch, length]; left out, from 0 on.
          cache: from ``empty_cache``; tokens at ``positions`` are entered, and see those before.
          mask: bool [batch, keys], of those that may be seen; left out, all.
        """
        hidden, cache = self._hidden(tokens, positions, cache, mask)
        logits = (hidden @ self.output_matrix().T).astype(jnp.float32)
        if cap := self.config.logit_cap:
            logits = cap * jnp.tanh(logits / cap)
        return logits if cache is None else (logits, cache)

    def hidden(
        self, tokens: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns what the output projection takes, float [batch, length, width]."""
        return self._hidden(tokens, positions, None, mask)[0]

    def output_matrix(self) -> jax.Array:
        """Returns the output projection as a table, [vocabulary, width]: tied, the embedding."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.embedding[...]
        return self.lm_head.kernel[...].T

    def empty_cache(self, batch: int, slots: int) -> Cache:
        shape = batch, slots, self.config.num_key_value_heads, self.config.head_dim
        zeros = jnp.zeros(shape, self.model.norm.weight[...].dtype)
        return [(zeros, zeros) for _ in range(self.config.num_hidden_layers)]

    def _hidden(self, tokens: Any, positions: Any, cache: Any, mask: Any) -> tuple[jax.Array, Any]:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.model.embed_tokens.embedding[...][tokens]
        x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        caches = [None] * self.config.num_hidden_layers if cache is None else list(cache)
        for i, layer in enumerate(self.model.layers):
            x, caches[i] = layer(x, positions, caches[i], mask)
        return self.model.norm(x), None if cache is None else caches

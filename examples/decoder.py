"""A small language model in Linen whose output projection is its input embedding."""

from __future__ import annotations

import flax.linen as nn
import jax


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, heads = x.shape[-1], (*x.shape[:-1], self.heads, -1)
        y = nn.RMSNorm(name="norm_1")(x)
        q, k, v = (
            nn.Dense(width, use_bias=False, name=f"{n}_proj")(y).reshape(heads) for n in "qkv"
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(width, use_bias=False, name="o_proj")(y)
        y = nn.Dense(4 * width, use_bias=False, name="up_proj")(nn.RMSNorm(name="norm_2")(x))
        return x + nn.Dense(width, use_bias=False, name="down_proj")(nn.gelu(y))


class Decoder(nn.Module):
    """Tokens int32 [batch, length] -> logits [batch, length, vocabulary]."""

    vocabulary: int = 256
    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 128

    def setup(self):
        self.embed_tokens = nn.Embed(self.vocabulary, self.width)
        self.positions = self.param(
            "positions", nn.initializers.normal(0.02), (self.length, self.width)
        )
        self.layer = [Block(self.heads) for _ in range(self.layers)]
        self.norm = nn.RMSNorm()

    def hidden_states(self, tokens: jax.Array) -> jax.Array:
        """All but the output projection: what `linear_cross_entropy` takes."""
        x = self.embed_tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.layer:
            x = block(x)
        return self.norm(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed_tokens.attend(self.hidden_states(tokens))


def loss_of(model: Decoder, loss):
    """Returns ``fn(params, rows)``: a loss of hidden states, table and the tokens after each."""

    def fn(params, rows):
        hidden = model.apply({"params": params}, rows[:, :-1], method="hidden_states")
        return loss(hidden, params["embed_tokens"]["embedding"], rows[:, 1:])

    return fn

"""Three layers in a list and a head that may be tied; which of its leaves are adapted."""

from __future__ import annotations

import flax.linen as nn
import jax

import flax_tied_lora as tied_lora
from flax_tied_lora import LoraConfig
from tests.helpers.small_models import TOKENS, VOCAB, WIDTH, init


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(x)
        return x + nn.Dense(WIDTH, name="v_proj")(nn.Dense(WIDTH, name="q_proj")(x))


class Deep(nn.Module):
    """Three layers in a list, and a head that may be tied."""

    tied: bool = True

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH, name="embed_tokens")
        x = embed(tokens)
        for i in range(3):
            x = Block(name=f"layers_{i}")(x)
        if not self.tied:
            return nn.Dense(VOCAB, use_bias=False, name="lm_head")(x)
        with jax.named_scope("lm_head"):
            return embed.attend(x)


MODEL = Deep()
PARAMS = init(MODEL)
SITES = tied_lora.trace(MODEL.apply, {"params": PARAMS}, TOKENS)
TABLE = "embed_tokens/embedding"


def adapted_keys(targets, params=PARAMS, sites=None, ties="auto", **options):
    config = LoraConfig(r=2, target_modules=targets, **options)
    return {g.key for g in tied_lora.wrap(params, config, sites=sites, ties=ties).plan.adapted}


def kernels(name, layers=(0, 1, 2)):
    return {f"layers_{i}/{name}/kernel" for i in layers}

"""Decoding one token at a time with a cache: SmolLM2-135M, its adapters merged and not.

A call of a compiled step for each token, and all tokens of a round in one program, a loop, as
transformers' ``generate`` has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import _harness
import _models
import jax
import jax.numpy as jnp
import numpy as np
import smollm2
import transformers

import flax_tied_lora as tied_lora

TARGETS = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS = 8  # decoded in a round
CONTEXT = 256


def tiny() -> tuple[Any, Any]:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    flax = smollm2.FlaxLlama(config, _do_init=False)
    return flax, jax.jit(flax.init_weights, static_argnums=1)(jax.random.key(0), (1, 8))


class Decoder:
    """A compiled program, the cache donated; called, it decodes `TOKENS` tokens.

    Args:
      step: of params, cache, token and position; returns tokens, the last of them, and the cache.
    """

    def __init__(self, step: Callable[..., Any], params: Any, cache: Any):
        self.params, self.blank = params, cache
        jitted = jax.jit(step, donate_argnums=1)
        self.compiled = jitted.lower(params, cache, jnp.ones((1, 1), jnp.int32), 0).compile()
        self.restart()

    def restart(self) -> None:
        self.cache, self.position = jax.tree.map(jnp.copy, self.blank), 0
        self.token = jnp.ones((1, 1), jnp.int32)
        jax.block_until_ready(self.cache)

    def __call__(self) -> list[int]:
        found: list[int] = []
        while len(found) < TOKENS:
            args = self.params, self.cache, self.token, np.int32(self.position)
            tokens, self.token, self.cache = self.compiled(*args)
            self.position += len(tokens)
            found += tokens.tolist()
        return found


def main() -> None:
    args = _harness.parser(__doc__, rounds=31).parse_args()
    transformers.logging.set_verbosity_error()
    if (args.rounds + 1) * TOKENS > CONTEXT:
        raise SystemExit(f"{args.rounds} rounds of {TOKENS} tokens do not fit in {CONTEXT}")
    model, params = tiny() if args.tiny else smollm2.load(context=CONTEXT)[:2]
    config = tied_lora.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    adapted = _models.shaken(tied_lora.wrap(params, config, ties=smollm2.TIES))

    def step(params: Any, cache: Any, token: jax.Array, position: Any) -> Any:
        logits, new = model.module.apply(
            {"params": params, "cache": cache}, token, jnp.ones((1, CONTEXT), jnp.int32),
            jnp.full((1, 1), position), return_dict=False, mutable=["cache"],
        )  # fmt: skip
        token = jnp.argmax(logits[0], axis=-1).astype(jnp.int32)
        return token[0], token, new["cache"]

    def loop(params: Any, cache: Any, token: jax.Array, position: Any) -> Any:
        def one(carry: Any, number: Any) -> Any:
            found, token, cache = step(params, *carry, position + number)
            return (cache, token), found[0]

        (cache, token), found = jax.lax.scan(one, (cache, token), jnp.arange(TOKENS))
        return found, token, cache

    shapes = jax.eval_shape(functools.partial(model.init_cache, 1, CONTEXT))
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    merged = tied_lora.merge(adapted)
    decoders = {}
    for how, program in (("", step), (", in one program", loop)):
        served = tied_lora.adapt(program, on_dense="error")
        decoders[f"unmerged{how}"] = Decoder(served, adapted, cache)
        decoders[f"merged{how}"] = Decoder(program, merged, cache)
    first = {name: decoder() for name, decoder in decoders.items()}
    if len({tuple(tokens) for tokens in first.values()}) > 1:
        raise SystemExit(f"merged and unmerged decode other tokens: {first}")
    seconds = _harness.interleaved(decoders, args.rounds)
    _harness.store(
        "decoding",
        {
            "what": f"{TOKENS} tokens decoded one by one, greedily, with a cache of {CONTEXT}, "
            "one sequence, float32, rank 8 on the tied table and attention",
            "rounds": args.rounds,
            "median seconds": _harness.medians(seconds),
            **_harness.costs({name: decoder.compiled for name, decoder in decoders.items()}),
            "arrays passed": {n: len(jax.tree.leaves(d.params)) for n, d in decoders.items()},
            "ratios": {
                f"unmerged / merged{how}": _harness.ratio(seconds, f"unmerged{how}", f"merged{how}")
                for how in ("", ", in one program")
            },
        },
    )


if __name__ == "__main__":
    main()

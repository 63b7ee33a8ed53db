"""How long tracing, lowering and compiling takes, adapted against plain: 30 layers, not run.

By hand: the same deltas written beside each product and the lookup, scaled after their products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from _harness import beside_plain, interleaved, medians, rounds_from_arguments, store
from flax import linen as nn
from transformers import FlaxLlamaForCausalLM, LlamaConfig
from transformers import logging as transformers_logging

import flax_tied_lora as tied_lora

BATCH, LENGTH = 2, 128
TARGETS = ["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"]
TABLE, HEAD = "model/embed_tokens/embedding", "lm_head/kernel"


def main() -> None:
    rounds = rounds_from_arguments()
    transformers_logging.set_verbosity_error()
    # SmolLM2-135M's shape. Abstract arrays: its weights are not needed.
    config = LlamaConfig(
        num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, intermediate_size=1536, max_position_embeddings=2048,
    )  # fmt: skip
    model = FlaxLlamaForCausalLM(config, _do_init=False)
    params = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 8)))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def loss(params, tokens):
        mask = jnp.ones((BATCH, LENGTH), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
        logits = model.module.apply({"params": params}, tokens, mask, positions)[0]
        return jax.nn.logsumexp(logits, axis=-1).mean()

    adapted = tied_lora.wrap(
        params,
        tied_lora.LoraConfig(r=8, target_modules=TARGETS),
        ties=[(TABLE, HEAD)],
    )
    adapted_loss = tied_lora.adapt(loss, on_dense="error")

    def by_hand(deltas, scaling, params, tokens):
        def served(call, args, kwargs, context):
            out, path = call(*args, **kwargs), "/".join(context.module.path)
            table, key = deltas[TABLE], f"{path}/kernel"
            if context.method_name != "__call__":
                return out
            if f"{path}/embedding" == TABLE:
                return out + table["lora_a"][args[0]] @ table["lora_b"] * scaling[TABLE]
            if key == HEAD:
                return out + args[0] @ table["lora_b"].T @ table["lora_a"].T * scaling[TABLE]
            if key in deltas:
                own = deltas[key]
                return out + args[0] @ own["lora_a"] @ own["lora_b"] * scaling[key]
            return out

        with nn.intercept_methods(served):
            return loss(params, tokens)

    def fresh(function, *args):
        jax.clear_caches()
        return jax.jit(function).lower(*args)

    def kernels_of(params):
        """The leaves that the adapted model has factors for, to be differentiated as they are."""
        flat = jax.tree_util.tree_flatten_with_path(params)[0]
        return [x for path, x in flat if any(t in str(path) for t in TARGETS)]

    def plain_gradient(chosen, params, tokens):
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        values = iter(chosen)
        leaves = [next(values) if any(t in str(p) for t in TARGETS) else x for p, x in flat]
        return loss(jax.tree.unflatten(treedef, leaves), tokens)

    deltas = adapted.adapters["lora"], adapted.scaling
    cases = {
        "forward, plain": lambda: fresh(loss, params, tokens),
        "forward, adapted": lambda: fresh(adapted_loss, adapted, tokens),
        "forward, by hand": lambda: fresh(by_hand, *deltas, params, tokens),
        "gradient, plain": lambda: fresh(
            jax.value_and_grad(plain_gradient), kernels_of(params), params, tokens
        ),
        "gradient, adapted": lambda: fresh(tied_lora.value_and_grad(adapted_loss), adapted, tokens),
        "gradient, by hand": lambda: fresh(jax.value_and_grad(by_hand), *deltas, params, tokens),
    }
    for run in cases.values():
        run()
    seconds = interleaved(cases, rounds)
    # Each is lowered again: a lowered program keeps what was compiled of it.
    waiting = {name: [run() for _ in range(rounds)] for name, run in cases.items()}
    compiling = interleaved(
        {name: lambda own=own: own.pop().compile() for name, own in waiting.items()}, rounds
    )
    store(
        "tracing",
        {
            "what": "seconds to trace and lower, caches cleared; SmolLM2-135M's shape, 121 targets",
            "rounds": rounds,
            "median seconds": medians(seconds),
            "median seconds to compile": medians(compiling),
            **beside_plain("", seconds),
            **beside_plain("compiling, ", compiling),
        },
    )


if __name__ == "__main__":
    main()

"""The output loss, value and gradients: without logits against optax on all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _harness import costs, interleaved, medians, parser, ratio, store

import flax_tied_lora as tied_lora

RANK = 8


def main() -> None:
    args = parser(__doc__, rounds=21).parse_args()
    # SmolLM2-135M's table.
    count, vocabulary, width = (512, 256, 16) if args.tiny else (2048, 49152, 576)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"embed": {"embedding": jax.random.normal(keys[0], (vocabulary, width)) / 24}}
    hidden = jax.random.normal(keys[1], (count, width))
    labels = jax.random.randint(keys[2], (count,), 0, vocabulary)
    adapted = tied_lora.wrap(params, tied_lora.LoraConfig(r=RANK, target_modules=["embed"]))

    def plain(params: Any, hidden: Any) -> Any:
        logits = hidden @ params["embed"]["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def fused(params: Any, hidden: Any, chunk: int | None = None) -> Any:
        table = params["embed"]["embedding"]
        return tied_lora.losses.linear_cross_entropy(hidden, table, labels, chunk_size=chunk)

    def frozen(loss: Any) -> Any:
        return jax.value_and_grad(loss, 1)

    def tied(loss: Any) -> Any:
        served = tied_lora.adapt(loss, on_dense="error")

        def step(adapted: Any, hidden: Any) -> Any:
            def of(adapters: Any, hidden: Any) -> Any:
                return served(adapted.replace(adapters=adapters), hidden)

            return jax.value_and_grad(of, (0, 1))(adapted.adapters, hidden)

        return step

    steps = {
        "frozen, plain": (frozen(plain), params),
        "frozen, fused": (frozen(fused), params),
        "tied, plain": (tied(plain), adapted),
        "tied, fused": (tied(fused), adapted),
    } | {
        f"tied, fused, chunks of {n}": (tied(functools.partial(fused, chunk=n)), adapted)
        for n in (256, 512)
    }
    compiled: dict[str, Any] = {
        name: jax.jit(step).lower(first, hidden).compile() for name, (step, first) in steps.items()
    }

    def run(name: str) -> None:
        jax.block_until_ready(compiled[name](steps[name][1], hidden))

    cases = {name: functools.partial(run, name) for name in steps}
    for case in cases.values():
        case()
    seconds = interleaved(cases, args.rounds)
    reported = costs(compiled)
    memory = reported["temporary MiB"]
    base = "frozen, plain"
    store(
        "linear_cross_entropy",
        {
            "what": "the loss and its gradients, of hidden states and of a tied delta's factors; "
            f"{count} tokens, vocabulary {vocabulary}, width {width}, rank {RANK}, "
            f"{jnp.dtype(hidden.dtype).name}",
            "rounds": args.rounds,
            "median seconds": medians(seconds),
            **reported,
            "time / frozen, plain": {n: ratio(seconds, n, base) for n in cases if n != base},
            "memory / frozen, plain": {n: m / memory[base] for n, m in memory.items()},
        },
    )


if __name__ == "__main__":
    main()

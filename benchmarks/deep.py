"""How long tracing takes with thousands of layers, adapted against plain, forward and gradient.

Layers of `nn.Dense`, and a chain of bare products. By hand: the same deltas written beside each
product, `x @ w + (x @ a) @ b * s`: what LoRA costs where nothing is found out by a library. Of the
bare chain it is the measure: an adapted layer has five operations and four arrays where a plain one
has one of each.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from _harness import beside_plain, interleaved, medians, parser, store
from flax import linen as nn

import flax_tied_lora as tied_lora

WIDTH, RANK, TOKENS = 64, 8, 4
LAYERS = [1_000, 3_000, 10_000]
LEAST = 3  # rounds with more than the first of these; of that, all that are asked for


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Dense(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = nn.Dense(WIDTH, name=f"layer_{i}")(x)
        return x


def dense(params: Any, x: jax.Array) -> jax.Array:
    model: Any = Dense(len(params))
    return model.apply({"params": params}, x)


def dense_by_hand(deltas: Any, scaling: Any, params: Any, x: jax.Array) -> jax.Array:
    def served(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out, key = call(*args, **kwargs), "/".join((*context.module.path, "kernel"))
        if key not in deltas:
            return out
        own = deltas[key]
        return out + (args[0] @ own["lora_a"]) @ own["lora_b"] * scaling[key]

    with nn.intercept_methods(served):
        return dense(params, x)


def chain(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = x @ layer["kernel"]
    return x


def chain_by_hand(deltas: Any, scaling: Any, params: Any, x: jax.Array) -> jax.Array:
    for name, layer in params.items():
        own, s = deltas[f"{name}/kernel"], scaling[f"{name}/kernel"]
        x = x @ layer["kernel"] + (x @ own["lora_a"]) @ own["lora_b"] * s
    return x


MODELS: dict[str, tuple[Any, Any, dict[str, tuple[int, ...]]]] = {
    "layers of nn.Dense": (dense, dense_by_hand, {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}),
    "a chain of x @ w": (chain, chain_by_hand, {"kernel": (WIDTH, WIDTH)}),
}


def wrapped(params: Any) -> tied_lora.Adapted:
    return tied_lora.wrap(params, tied_lora.LoraConfig(r=RANK, target_modules=list(params)))


def cases(model: Any, by_hand: Any, params: Any) -> dict[str, Callable[[], Any]]:
    """Returns what is timed of a model: each case traces it once, caches cleared."""
    x, adapted = array(TOKENS, WIDTH), wrapped(params)
    apply = tied_lora.adapt(model, on_dense="error")
    deltas = adapted.adapters["lora"], adapted.scaling
    kernels = {name: layer["kernel"] for name, layer in params.items()}

    def plain_loss(kernels: Any, params: Any, x: jax.Array) -> jax.Array:
        return model({n: {**p, "kernel": kernels[n]} for n, p in params.items()}, x).sum()

    def adapted_loss(adapted: Any, x: jax.Array) -> jax.Array:
        return apply(adapted, x).sum()

    def loss_by_hand(*args: Any) -> jax.Array:
        return by_hand(*args).sum()

    def traced(function: Any, *args: Any) -> Callable[[], Any]:
        def run() -> None:
            jax.clear_caches()
            jax.make_jaxpr(lambda *args: function(*args))(*args)

        return run

    return {
        "forward, plain": traced(model, params, x),
        "forward, adapted": traced(apply, adapted, x),
        "forward, by hand": traced(by_hand, *deltas, params, x),
        "gradient, plain": traced(jax.value_and_grad(plain_loss), kernels, params, x),
        "gradient, adapted": traced(tied_lora.value_and_grad(adapted_loss), adapted, x),
        "gradient, by hand": traced(jax.value_and_grad(loss_by_hand), *deltas, params, x),
    }


def of_model(
    model: Any, by_hand: Any, shapes: Mapping[str, Any], counts: Sequence[int], rounds: int
) -> dict[str, Any]:
    columns: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, float]] = {}
    for layers in counts:
        leaves = {name: array(*shape) for name, shape in shapes.items()}
        params = {f"layer_{i}": dict(leaves) for i in range(layers)}
        own = cases(model, by_hand, params)
        if layers == counts[0]:
            for run in own.values():
                run()
        own["wrap"] = functools.partial(wrapped, params)
        seconds = interleaved(own, max(rounds * counts[0] // layers, LEAST), time.process_time)
        columns[f"seconds, {layers:,} layers"] = medians(seconds)
        found |= beside_plain(f"{layers:,} layers, ", seconds)
    (few, *_, many), (least, *_, most) = columns.values(), counts
    by_layer = {case: many[case] / most / (few[case] / least) for case in few}
    return {**columns, f"a layer, of {most:,} / of {least:,}": by_layer, **found}


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="(1000 3000 10000)")
    options = own.parse_args()
    counts = [3, 6] if options.tiny else options.layers
    store(
        "deep",
        {
            "what": "seconds of the CPU to trace, caches cleared; "
            f"all rounds of {counts[0]:,} layers, {LEAST} or more of others",
            "rounds": options.rounds,
            **{name: of_model(*MODELS[name], counts, options.rounds) for name in MODELS},
        },
    )


if __name__ == "__main__":
    main()

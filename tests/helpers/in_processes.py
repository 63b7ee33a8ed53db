"""What `test_processes.py` runs in several processes: one mesh, arrays that none has whole.

Each check prints a line, ``name: what it found`` as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import flax_tied_lora as tied_lora
import flax_tied_lora.nnx
from flax_tied_lora import arithmetic, checkpoint, names, peft
from flax_tied_lora._adapters.fingerprint import fingerprint

TABLE, KERNEL = "transformer/wte/embedding", "transformer/h/0/attn/c_attn/kernel"
SPECS = {"wte": jax.P("x", "y"), "c_attn": jax.P("y", None), "bias": jax.P()}
CONFIG = tied_lora.LoraConfig(r=2, lora_alpha=4, target_modules=["wte", "c_attn"])
OTHERS = {
    "dora, rows": tied_lora.LoraConfig(
        r=2, target_modules=["c_attn"], use_dora=True, trainable_token_indices={"wte": [1, 5, 9]}
    ),
    "pissa, copy": tied_lora.LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights="pissa", modules_to_save=["wte"]
    ),
}
NAMES = names.names_of("gpt2")
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def params_on(mesh: jax.sharding.Mesh | None) -> Any:
    """Returns the params, made in their shards where there is a mesh; the same on any."""

    def make(key: jax.Array) -> Any:
        table, kernel = jax.random.normal(key, (16, 32)), jax.random.normal(key, (96, 32)) / 6
        attn = {"c_attn": {"kernel": kernel, "bias": jnp.ones(96)}}
        return {"transformer": {"wte": {"embedding": table}, "h": {"0": {"attn": attn}}}}

    if mesh is None:
        return jax.jit(make)(jax.random.key(0))
    at = {name: jax.NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    attn = {"c_attn": {"kernel": at["c_attn"], "bias": at["bias"]}}
    where = {"transformer": {"wte": {"embedding": at["wte"]}, "h": {"0": {"attn": attn}}}}
    return jax.jit(make, out_shardings=where)(jax.random.key(0))


def model(params: Any, tokens: Any) -> jax.Array:
    inner = params["transformer"]
    attn, table = inner["h"]["0"]["attn"]["c_attn"], inner["wte"]["embedding"]
    x = table[tokens]
    x = x + jnp.tanh(x @ attn["kernel"].T + attn["bias"][None, None])[..., :32]
    return x @ table.T


def trained(adapted: tied_lora.Adapted) -> tied_lora.Adapted:
    """Returns an `Adapted` whose adapters are what training might leave; the same on any mesh."""

    def one(path: Any, x: Any) -> Any:
        wave = sum(jnp.sin(1.0 + i + jax.lax.broadcasted_iota(jnp.float32, x.shape, i))
                   for i in range(x.ndim))  # fmt: skip
        return x + 0.2 * wave

    return adapted.replace(adapters=jax.tree_util.tree_map_with_path(one, adapted.adapters))


def far(a: Any, b: Any) -> float:
    """Returns how far apart two pytrees are at most."""
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, (a, b)),
               strict=True))  # fmt: skip


def raised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def checks(folder: Path, mesh: jax.sharding.Mesh) -> dict[str, Callable[[], Any]]:
    params = params_on(mesh)
    adapted = trained(tied_lora.wrap(params, CONFIG))
    optimizer = optax.adam(1e-2)
    run = jax.jit(tied_lora.adapt(model, on_dense="error"))
    plain = jax.jit(model)

    def restored() -> Any:
        state = optimizer.init(adapted.adapters)
        extra = {"key": jax.random.key(3), "n": np.arange(3)}
        checkpoint.save(folder / "adapter", adapted, opt_state=state, step=5, extra=extra)
        found = checkpoint.restore(folder / "adapter", params, opt_state=optimizer)
        for new, old in zip(*(jax.tree.leaves(x.adapters) for x in (found.adapted, adapted)),
                            strict=True):  # fmt: skip
            assert new.sharding == old.sharding
        loss = tied_lora.value_and_grad(lambda a: jnp.sum(run(a, TOKENS) ** 2))
        _, grads = jax.jit(loss)(found.adapted)
        updates, _ = optimizer.update(grads, found.opt_state)
        assert np.isfinite(float(optax.tree.norm(updates)))
        return far(found.adapted.adapters, adapted.adapters), found.step

    def whole() -> float:
        checkpoint.save_params(folder / "merged", tied_lora.merge(adapted))
        places = jax.tree.map(lambda x: x.sharding, params)
        found = checkpoint.restore_params(folder / "merged", sharding=places)
        return far(found, tied_lora.merge(adapted))

    def peft_files() -> Any:
        peft.save_adapter(folder / "peft", adapted, NAMES, save_embedding_layers=True)
        found = peft.load_adapter(folder / "peft", params, NAMES)
        again = raised(peft.save_adapter, folder / "peft", adapted, NAMES)
        assert found.adapters["lora"][TABLE]["lora_a"].sharding.mesh == mesh
        return far(found.adapters, adapted.adapters), again

    def other(config: tied_lora.LoraConfig) -> float:
        own = trained(tied_lora.wrap(params, config))
        return far(run(own, TOKENS), plain(tied_lora.merge(own), TOKENS))

    def equal_values() -> Any:
        turned = {"lm_head": {"kernel": params["transformer"]["wte"]["embedding"].T}}
        groups = tied_lora.find_ties({**params, **turned}, equal_values=True)
        return [sorted(m.path for m in g.members) for g in groups if len(g.members) > 1]

    def sums() -> float:
        both = arithmetic.combine([adapted, adapted], [0.25, 0.75])
        return far(tied_lora.merge(both), tied_lora.merge(adapted))

    def extracted() -> float:
        found = arithmetic.extract(params, tied_lora.merge(adapted), CONFIG)
        return far(tied_lora.merge(found.adapted), tied_lora.merge(adapted))

    def stacked() -> list[float]:
        """Two adapters in three slots, one put in later: each slot is its adapter merged."""
        other = adapted.replace(adapters=jax.tree.map(lambda x: x / 2, adapted.adapters))
        slots = tied_lora.put(tied_lora.stack([adapted], capacity=3), 2, other)
        factor = slots.adapters["lora"][TABLE]["lora_a"]
        place = jax.NamedSharding(mesh, jax.P(None, "x"))
        assert factor.sharding.is_equivalent_to(place, factor.ndim)
        found = [run(tied_lora.select(slots, i), TOKENS) for i in (0, 2, -1)]
        alone = [plain(p, TOKENS) for p in (*map(tied_lora.merge, (adapted, other)), params)]
        each = jax.jit(tied_lora.per_example(tied_lora.adapt(model, on_dense="error")))
        batch = each(tied_lora.select(slots, [2, -1]), TOKENS)
        return [far(found, alone), far(batch, jnp.stack([alone[1][0], alone[2][1]]))]

    def grown() -> list[float]:
        """Old tokens' logits stay; new rows and factors have the places of the old."""
        larger, vocabulary = tied_lora.grow_vocabulary(adapted, 18, pad_to_multiple_of=4)
        factor = larger.adapters["lora"][TABLE]["lora_a"]
        assert factor.sharding == adapted.adapters["lora"][TABLE]["lora_a"].sharding
        table = larger.params["transformer"]["wte"]["embedding"]
        assert table.sharding == params["transformer"]["wte"]["embedding"].sharding
        logits = run(larger, TOKENS)
        before, merged = run(adapted, TOKENS), plain(tied_lora.merge(larger), TOKENS)
        assert (vocabulary.size, logits.shape[-1]) == (20, 20)
        return [far(logits[..., :16], before), far(logits, merged)]

    def gradients() -> float:
        """Those of a compiled loss, outside of `jit`, where their factors are."""
        _, grads = tied_lora.value_and_grad(jax.jit(lambda a: jnp.sum(jnp.sin(run(a, TOKENS)))))(
            adapted
        )
        for x, y in zip(*map(jax.tree.leaves, (grads, adapted.adapters)), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        return float(optax.tree.norm(grads))

    own = {"mine": jnp.full(3, jax.process_index(), jnp.int32)}
    return {
        "devices": lambda: [jax.process_count(), jax.device_count()],
        "oracle": lambda: far(run(adapted, TOKENS), plain(tied_lora.merge(adapted), TOKENS)),
        **{name: functools.partial(other, config) for name, config in OTHERS.items()},
        "fingerprint": lambda: fingerprint(params, adapted.plan),
        "restored": restored,
        "whole": whole,
        "peft": peft_files,
        "equal values": equal_values,
        "sums": sums,
        "extracted": extracted,
        "quantized": lambda: far(
            run(tied_lora.quantize(adapted, "int8"), TOKENS), run(adapted, TOKENS)
        ),
        "stacked": stacked,
        "grown": grown,
        "gradients": gradients,
        "nnx": lambda: in_nnx(params_on(mesh)),
        "printed": lambda: str(adapted),
        "differs": lambda: raised(checkpoint.save, folder / "never", adapted, extra=own),
        "never": lambda: (folder / "never").exists(),
        "save_merged": lambda: raised(
            peft.save_merged, folder / "hf", adapted, NAMES, {"model_type": "gpt2"}
        ),
        "state dict": lambda: raised(names.to_state_dict, params, NAMES),
    }


class Module(nnx.Module):
    """A tied table, for `in_nnx`."""

    def __init__(self, table: jax.Array):
        self.embed = nnx.Embed(*table.shape, rngs=nnx.Rngs(0), embedding_init=lambda *_: table)

    def __call__(self, tokens: Any) -> jax.Array:
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


def in_nnx(params: Any) -> list[float]:
    """Returns the losses of steps of an adapted module, which `test_processes.py` has as well."""
    module = Module(params["transformer"]["wte"]["embedding"])
    config = tied_lora.LoraConfig(r=2, target_modules=["embed"])
    start = trained(tied_lora.wrap(tied_lora.nnx.params(module), config))
    model = tied_lora.nnx.from_adapted(module, start)
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.LoRAParam)
    places = jax.tree.map(lambda x: x.sharding, nnx.state(model, nnx.LoRAParam))

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        trainable = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(TOKENS) ** 2), argnums=trainable)(
            model
        )
        optimizer.update(model, jax.lax.with_sharding_constraint(grads, places))
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    merged = tied_lora.nnx.merge(model)
    called = nnx.jit(lambda module: module(TOKENS))
    assert far(called(model), called(merged)) < 1e-4
    for x, place in zip(*map(jax.tree.leaves, (nnx.state(model, nnx.LoRAParam), places)),
                        strict=True):  # fmt: skip
        assert x.sharding.is_equivalent_to(place, x.ndim)
    return losses


def die_saving(folder: Path, mesh: jax.sharding.Mesh) -> None:
    """Has process 1 end, after the checks of `checkpoint.save`, before it writes its parts."""
    adapted = trained(tied_lora.wrap(params_on(mesh), CONFIG))
    if jax.process_index() == 1:
        ocp.Checkpointer.save = lambda *_, **__: os._exit(1)
    checkpoint.save(folder / "adapter", adapted)


def main() -> None:
    parser = argparse.ArgumentParser()
    options = [("folder", Path), ("coordinator", str), ("processes", int), ("process", int)]
    for name, kind in options:
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--dies", action="store_true", help="number 1, while it saves")
    args = parser.parse_args()
    warnings.simplefilter("error")
    jax.distributed.initialize(
        args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=10
    )
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((jax.device_count() // 2, 2), ("x", "y"), axis_types=auto)
    if args.dies:
        die_saving(args.folder, mesh)
    for name, check in checks(args.folder, mesh).items():
        sys.stdout.write(json.dumps({name: check()}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

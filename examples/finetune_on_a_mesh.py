"""Fine-tunes a tied language model on a mesh of devices: one CPU or a TPU pod, the same program.

    python examples/finetune_on_a_mesh.py                                    # one device
    JAX_NUM_CPU_DEVICES=8 python examples/finetune_on_a_mesh.py --mesh data=2,model=4
    python examples/finetune_on_a_mesh.py --mesh data=8,model=8 --distributed # each host of a pod

Elsewhere than on a pod or a cluster that JAX knows, processes are told of each other: two of them,
with 4 devices each, share a mesh of 8 when the same command runs twice,

    JAX_NUM_CPU_DEVICES=4 python examples/finetune_on_a_mesh.py --mesh data=2,model=4 \\
        --coordinator localhost:12345 --processes 2 --process 0              # and --process 1

docs/scaling.md goes through it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import corpus
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import placing

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint

TARGETS = ["embed_tokens", "q_proj", "v_proj", "up_proj", "down_proj"]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    add = result.add_argument
    add(
        "--mesh",
        type=placing.axes,
        default="data=1,model=1",
        help="sizes of the axes (%(default)s)",
    )
    add("--shard", choices=placing.LAYOUTS, default="vocab", help="what splits the table (vocab)")
    add("--distributed", action="store_true", help="several processes, which JAX finds by itself")
    add("--coordinator", metavar="HOST:PORT", help="several processes: where number 0 listens")
    add("--processes", type=int, help="how many there are")
    add("--process", type=int, help="which of them this is")
    add("--base", type=Path, help="params that checkpoint.save_params wrote; left out, random ones")
    add(
        "--output",
        type=Path,
        help="folder of checkpoints, which all processes see; goes on from it",
    )
    add("--save-every", type=int, default=50, help="steps between checkpoints (%(default)s)")
    add("--steps", type=int, default=100, help="of the whole run (%(default)s)")
    add("--batch", type=int, default=8, help="rows in a step, over all devices (%(default)s)")
    add("--length", type=int, default=64, help="tokens in a row (%(default)s)")
    add("--width", type=int, default=64, help="of the random model (%(default)s)")
    add("--layers", type=int, default=2, help="of the random model (%(default)s)")
    add("--vocabulary", type=int, default=256, help="rows of the table, 256 or more (%(default)s)")
    add("--rank", type=int, default=8, help="of the factors (%(default)s)")
    add("--learning-rate", type=float, default=1e-2, help="AdamW's (%(default)s)")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.distributed or args.coordinator:  # before anything else of JAX
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    say = print if jax.process_index() == 0 else lambda *_, **__: None
    mesh = placing.make_mesh(args.mesh)
    kind = jax.devices()[0].device_kind
    say(f"{jax.process_count()} processes, {jax.device_count()} devices ({kind}), "
        f"mesh {dict(mesh.shape)}, --shard {args.shard}")  # fmt: skip

    rows_sharding = placing.rows_sharding(mesh, args.shard, args.batch)

    # The frozen params: made, or read, straight into their shards.
    model = decoder.Decoder(args.vocabulary, args.width, args.layers, length=args.length)
    init = lambda key: model.init(key, jnp.zeros((1, args.length), jnp.int32))["params"]  # noqa: E731
    abstract = placing.place(jax.eval_shape(init, jax.random.key(0)), mesh, args.shard)
    if args.base:
        params = checkpoint.restore_params(args.base, abstract)
    else:
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))

    # Factors go where the rows and columns of their leaf are, the optimizer's state where they are.
    config = tied_lora.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS)
    adapted = tied_lora.wrap(params, config)
    optimizer = optax.adamw(args.learning_rate)
    state = placing.optimizer_state(optimizer, adapted.adapters, mesh)
    say(placing.described({"params": adapted.params, **adapted.adapters, "optimizer": state}))

    # Each slice of the mesh has rows of the batch; a process gives those of its own devices.
    tokens = np.frombuffer(corpus.documentation_text().encode(), np.uint8).astype(np.int32)

    def batch(rows: np.ndarray) -> jax.Array:
        return placing.global_batch(rows, rows_sharding)

    plain_loss = decoder.loss_of(model, tied_lora.losses.linear_cross_entropy)
    loss_fn = tied_lora.adapt(plain_loss, on_dense="error")
    train_step = tied_lora.train.step(loss_fn, optimizer)  # what it writes stays in its shards

    first = jax.ShapeDtypeStruct((args.batch, args.length + 1), jnp.int32, sharding=rows_sharding)
    explanation = tied_lora.explain(plain_loss, adapted, first)
    explanation.assert_tied()
    say(f"{len(explanation.reads)} call sites; tied, none densified")

    step = 0
    manager = checkpoint.Manager(args.output.absolute(), max_to_keep=2) if args.output else None
    if manager and manager.latest_step() is not None:  # of any mesh, any number of processes
        adapted, state, step, _ = manager.restore(params, opt_state=state)
        say(f"going on from step {step}")
    batches = corpus.batches(tokens, args.batch, args.length, seed=0, start=step)
    started, done = time.perf_counter(), 0
    while step < args.steps:
        adapted, state, loss = train_step(adapted, state, batch(next(batches)))
        step, done = step + 1, done + args.batch * args.length
        say(f"step {step}: loss {float(loss):.6f}, "
            f"{done / (time.perf_counter() - started):.0f} tokens/s", flush=True)  # fmt: skip
        if manager and (step % args.save_every == 0 or step == args.steps):
            manager.save(step, adapted, opt_state=state)
    if manager:
        manager.close()


if __name__ == "__main__":
    main()

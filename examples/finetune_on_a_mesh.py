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
import contextlib
import sys
import time
from collections.abc import Sequence

import program
import runs
from program import positive

TARGETS = ["embed_tokens", "q_proj", "v_proj", "up_proj", "down_proj"]


def axes(text: str) -> dict[str, int]:
    """Returns the sizes of the mesh's axes, 1 of one that is not named: ``"data=2,model=4"``."""
    sizes = {"data": 1, "model": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdecimal() or not int(size):
            raise argparse.ArgumentTypeError(f"{part!r}: expected data=N or model=N, N at least 1")
        sizes[name] = int(size)
    return sizes


def parser() -> argparse.ArgumentParser:
    result = program.Parser(__doc__)
    add = result.add_argument
    add("--mesh", type=axes, default="data=1,model=1", help="sizes of the axes (%(default)s)")
    add("--shard", choices=["vocab", "width", "fsdp"], default="vocab",
        help="what splits the table (%(default)s)")  # fmt: skip
    add("--distributed", action="store_true", help="several processes, which JAX finds by itself")
    add("--coordinator", metavar="HOST:PORT", help="several processes: where number 0 listens")
    add("--processes", type=positive, metavar="N", help="how many there are")
    add("--process", type=program.natural, metavar="I", help="which of them this is, from 0")
    add("--base", type=program.existing_folder, metavar="FOLDER",
        help="params that checkpoint.save_params wrote; left out, random ones")  # fmt: skip
    add("--output", type=program.new_or_own_folder, metavar="FOLDER",
        help="of checkpoints, which all processes see; goes on from it")  # fmt: skip

    def size(name: str, default: int, text: str) -> None:
        add(name, type=positive, metavar="N", default=default, help=f"{text} (%(default)s)")

    size("--save-every", 50, "steps between checkpoints")
    size("--steps", 100, "of the whole run")
    size("--batch", 8, "rows in a step, over all devices")
    size("--length", 64, "tokens in a row")
    size("--width", 64, "of the random model, a multiple of 4")
    size("--layers", 2, "of the random model")
    size("--vocabulary", 256, "rows of the table, 256 or more")
    size("--rank", 8, "of the factors")
    add("--learning-rate", type=program.rate, metavar="X", default=1e-2,
        help="AdamW's (%(default)s)")  # fmt: skip
    return result


def check(args: argparse.Namespace) -> None:
    """Refuses options that do not fit each other."""
    if (args.coordinator is None) != (args.process is None) or bool(args.coordinator) != bool(
        args.processes
    ):
        raise program.RefusedError(
            "--coordinator, --processes and --process go together: give all of them, or none"
        )
    if args.processes and args.process >= args.processes:
        raise program.RefusedError(
            f"--process {args.process} is none of --processes {args.processes}: the last is "
            f"{args.processes - 1}"
        )
    if args.width % 4:
        raise program.RefusedError(
            f"--width {args.width}: give a multiple of 4, the number of heads"
        )
    if args.vocabulary < 256:
        raise program.RefusedError(
            f"--vocabulary {args.vocabulary}: the text's bytes need 256 or more"
        )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    go_on = program.command(__file__, argv)

    def run() -> int:
        check(args)
        return train(args, go_on)

    return program.run(run, go_on)


def train(args: argparse.Namespace, go_on: str) -> int:
    import corpus  # here: what is above answers at once
    import decoder
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import placing

    import flax_tied_lora as tied_lora
    from flax_tied_lora import checkpoint

    folder = None
    if args.output:
        names = "batch length width layers vocabulary rank learning_rate"
        settings = {name: getattr(args, name) for name in names.split()}
        settings["base"] = args.base and str(args.base.absolute())
        folder = runs.RunFolder(args.output, args.output, settings, "name another --output")
        folder.check()
    tokens = np.frombuffer(corpus.documentation_text().encode(), np.uint8).astype(np.int32)
    with program.refusing(ValueError):
        corpus.batches(tokens, args.batch, args.length, seed=0)
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
    config = tied_lora.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS)
    with program.refusing(ValueError):  # checkpoint.CheckpointError is one
        tied_lora.wrap(abstract, config)
        params = checkpoint.restore_params(args.base, abstract) if args.base else None
    if params is None:
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        params = jax.jit(init, out_shardings=shardings)(jax.random.key(0))

    # Factors go where the rows and columns of their leaf are, the optimizer's state where they are.
    adapted = tied_lora.wrap(params, config)
    optimizer = optax.adamw(args.learning_rate)
    state = placing.optimizer_state(optimizer, adapted.adapters, mesh)
    say(placing.described({"params": adapted.params, **adapted.adapters, "optimizer": state}))

    # Each slice of the mesh has rows of the batch; a process gives those of its own devices.
    def batch(rows: np.ndarray) -> jax.Array:
        return placing.global_batch(rows, rows_sharding)

    plain_loss = decoder.loss_of(model, tied_lora.losses.linear_cross_entropy)
    loss_fn = tied_lora.adapt(plain_loss, on_dense="error")
    train_step = tied_lora.train.step(loss_fn, optimizer)  # what it writes stays in its shards
    loss_now = jax.jit(loss_fn)

    first = jax.ShapeDtypeStruct((args.batch, args.length + 1), jnp.int32, sharding=rows_sharding)
    explanation = tied_lora.explain(plain_loss, adapted, first)
    explanation.assert_tied()
    say(f"{len(explanation.reads)} call sites; tied, none densified")

    step, manager = 0, None
    if folder:
        with program.refusing(checkpoint.CheckpointError):
            manager = checkpoint.Manager(args.output.absolute(), max_to_keep=2)
            if manager.latest_step() is not None:  # of any mesh, any number of processes
                adapted, state, step, _ = manager.restore(params, opt_state=state)
                say(f"going on from step {step}")
        if jax.process_index() == 0:
            folder.begin()
    batches = corpus.batches(tokens, args.batch, args.length, seed=0, start=step)
    started, done, stopped = time.perf_counter(), 0, False
    with (
        program.StopRequest(go_on) as stop,
        runs.failing(args.output, None, checkpoint.CheckpointError),
        manager or contextlib.nullcontext(),
    ):
        while step < args.steps and not stopped:
            rows = batch(next(batches))
            adapted, state, loss = train_step(adapted, state, rows)
            step, done = step + 1, done + args.batch * args.length
            runs.check_loss(float(loss), step, manager, args.output)
            say(f"step {step}: loss {float(loss):.6f}, "
                f"{done / (time.perf_counter() - started):.0f} tokens/s", flush=True)  # fmt: skip
            stopped = placing.anywhere(stop.made)  # all processes stop after the same step
            if manager and (stopped or step == args.steps or step % args.save_every == 0):
                runs.check_loss(float(loss_now(adapted, rows)), step, manager, args.output)
                manager.save(step, adapted, opt_state=state)
    if stopped:
        say(f"stopped; step {step} is {'saved' if manager else 'not saved: there is no --output'}")
    return program.INTERRUPTED if stopped else 0


if __name__ == "__main__":
    program.leave(main())

"""The demo from stage to stage: what is adapted, the training, what has come of it."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import program
from report import curve, quoted, section
from training import Job, State, train

import flax_tied_lora as tied_lora


def first_state(job: Job) -> State:
    """Wraps the model, shows what that did, and measures it before any training."""
    args = job.args
    section("What is adapted")
    rows = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    with program.refusing(ValueError):
        adapted = job.wrap(job.params)
    print(adapted)
    frozen = tied_lora.stored_bytes(adapted)
    print(f"Frozen params in memory: {frozen / 2**20:,.0f} MiB, each tied array once.")
    section("Where the adapted weights are read")
    explanation = tied_lora.explain(job.apply_plain, adapted, rows)
    print(explanation)
    explanation.assert_tied()
    print("assert_tied: every tied leaf is read, by the same factors, and none is made dense.")

    section("Before training")
    before = job.measured(adapted)
    return State(adapted, job.optimizer.init(adapted.adapters), 0, [], before)


def run(
    args: argparse.Namespace, folder: program.RunFolder, go_on: str, last_steps: Callable[[], int]
) -> int:
    """Returns the program's status.

    Args:
      args: its options.
      folder: of the run.
      go_on: the command that goes on with the run.
      last_steps: trains the last steps in a new process, and returns its status.
    """
    started = time.perf_counter()
    if args.only_train:
        job = Job(args)
        state = job.restored()
        if state is None:
            raise program.RefusedError(
                f"there is no checkpoint in {args.output} to go on from: leave --only-train out"
            )
        print(f"Restored step {state.step} in process {os.getpid()}.")
        finished = state.step == args.steps or train(job, state, args.steps, go_on)
        return 0 if finished else program.INTERRUPTED

    section("Model and text")
    job = Job(args)
    print(job.described())
    state = job.restored()
    if state is None:
        state = first_state(job)
    elif state.step < args.steps:
        section(f"Going on from step {state.step}")
        print(f"This is the run whose checkpoint is in {args.output}; --fresh would begin anew.")
    else:
        section("Already trained")
        print(f"All {state.step} steps are in the checkpoint in {args.output}; "
              "--fresh would begin anew.")  # fmt: skip
    print(f"Before any training, the held-out loss is {state.before['loss']:.3f} nats per token, "
          f"and {args.prompt!r} continues:\n{quoted(state.before['text'])}")  # fmt: skip

    if state.step < (here := max(args.steps - args.last_steps, 1)):
        section("Training")
        folder.begin()
        if not train(job, state, here, go_on):
            return program.INTERRUPTED
    if state.step < args.steps:
        section("Saved; a new process restores and goes on")
        print(f"Step {state.step} is in {args.output / 'checkpoints'}.", flush=True)
        del state
        if status := last_steps():
            stopped = status in (program.INTERRUPTED, -signal.SIGINT)
            return program.INTERRUPTED if stopped else status
        state = job.restored()
        assert state is not None

    section("After training")
    after = job.measured(state.adapted)
    print(f"Now the held-out loss is {after['loss']:.3f} nats per token "
          f"({state.before['loss']:.3f} before), and {args.prompt!r} continues:\n"
          f"{quoted(after['text'])}")  # fmt: skip
    curve(args.output / "loss.png", state.losses, state.before["loss"], after["loss"])
    print(f"The loss curve is in {args.output / 'loss.png'}.")

    section("Merged")
    show_merged(job, state.adapted)
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes.")
    return 0


def show_merged(job: Job, adapted: tied_lora.Adapted) -> None:
    """Compares the plain model with merged params to the adapted one."""
    tokens = jnp.asarray(job.held_out[: job.args.batch, :-1])
    expected = jax.jit(job.apply)(adapted, tokens)
    merged = tied_lora.merge(adapted)
    found = jax.jit(job.apply_plain)(merged, tokens)
    difference = jnp.abs(found - expected).max() / jnp.abs(expected).max()
    print("merge() gives plain params for the plain model. Its logits differ from the adapted "
          f"model's by\n{difference:.1e} of the largest logit.")  # fmt: skip
    embedding = merged["model"]["embed_tokens"]["embedding"]
    tied = bool((merged["lm_head"]["kernel"] == embedding.T).all())
    print(f"The output projection is {'still' if tied else 'NO LONGER'} the embedding, transposed.")

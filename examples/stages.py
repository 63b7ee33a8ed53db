"""The program from stage to stage: what is adapted, the training, what has come of it."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import loading
import program
import runs
from job import Job, State
from report import curve, quoted, section
from training import train

import flax_tied_lora as tied_lora
from flax_tied_lora import peft


def first_state(job: Job) -> State:
    """Wraps the model, shows what that did, and measures it before any training."""
    section("What is adapted")
    with program.refusing(ValueError):
        adapted = job.wrap(job.params)
    print(adapted)
    frozen = tied_lora.stored_bytes(adapted)
    print(f"Frozen params in memory: {frozen / 2**20:,.0f} MiB, each tied array once.")
    section("Where the adapted weights are read")
    explanation = tied_lora.explain(job.plain_loss, adapted, *job.shapes())
    print(explanation)
    explanation.assert_tied()
    print("assert_tied: every tied leaf is read, by the same factors, and none is made dense.")

    section("Before training")
    state = State(adapted, job.optimizer.init(adapted.adapters), 0, [], [], "")
    state.held_out = [(0, job.held_out_loss(adapted))]
    state.before = job.continued(adapted)
    return state


def run(
    args: argparse.Namespace, folder: runs.RunFolder, go_on: str, last_steps: Callable[[], int]
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
        finished = state.is_finished(args) or train(job, state, args.steps, go_on)
        return 0 if finished else program.INTERRUPTED

    section("Model and text")
    job = Job(args)
    print(job.described())
    state = job.restored()
    if state is None:
        state = first_state(job)
    elif not state.is_finished(args):
        section(f"Going on from step {state.step}")
        print(f"This is the run whose checkpoint is in {args.output}; --fresh would begin anew.")
    else:
        section("Already trained")
        print(f"All {state.step} steps are in the checkpoint in {args.output}; "
              "--fresh would begin anew.")  # fmt: skip
    before = state.held_out[0][1]
    print(f"Before any training, the held-out loss is {before:.3f} nats per token, "
          f"and {args.prompt!r} continues:\n{quoted(state.before)}")  # fmt: skip

    here = max(args.steps - args.last_steps, 1)
    if state.step < here and not state.is_finished(args):
        section("Training")
        folder.begin()
        if not train(job, state, here, go_on):
            return program.INTERRUPTED
    if not state.is_finished(args):
        section("Saved; a new process restores and goes on")
        print(f"Step {state.step} is in {args.output / 'checkpoints'}.", flush=True)
        del state
        if status := last_steps():
            stopped = status in (program.INTERRUPTED, -signal.SIGINT)
            return program.INTERRUPTED if stopped else status
        state = job.restored()
        assert state is not None

    section("After training")
    with program.refusing(peft.AdapterFileError):
        best = job.best()
    step, after = state.best
    print(f"Now the held-out loss is {after:.3f} nats per token ({before:.3f} before), after step "
          f"{step}, the best,\nand {args.prompt!r} continues:\n"
          f"{quoted(job.continued(best))}")  # fmt: skip
    curve(args.output / "loss.png", state.losses, state.held_out)
    print(f"The loss curve is in {args.output / 'loss.png'}, its numbers in metrics.jsonl.")

    section("What to load")
    with runs.failing(job.folder, job.adapter, peft.AdapterFileError, OSError):
        write_merged(job, best)
    print_loading(job)
    print(f"\nDone in {(time.perf_counter() - started) / 60:.1f} minutes.")
    return 0


def write_merged(job: Job, best: tied_lora.Adapted) -> None:
    """Writes the merged model as transformers has models, reads it back, and compares the two."""
    peft.save_merged(job.merged, best, job.names, job.model_config, overwrite=True)
    job.tokenizer.save_pretrained(job.merged)
    settings = job.path / "generation_config.json"
    if settings.is_file():
        shutil.copy(settings, job.merged)
    tokens = jnp.asarray(job.held_out.tokens[: job.args.batch, :-1])
    expected = jax.jit(tied_lora.adapt(job.logits, on_dense="error"))(best, tokens)
    again = loading.load(job.merged, jnp.dtype(job.args.dtype))
    found = jax.jit(lambda model, tokens: model(tokens))(again, tokens)
    difference = jnp.abs(found - expected).max() / jnp.abs(expected).max()
    print(f"{job.merged} is the model with the adapter merged in, the tie still a tie. Read back, "
          f"its logits differ from\nthe adapted model's by {difference:.1e} of the largest "
          "logit. With transformers, or here:")  # fmt: skip
    print(f'    model = AutoModelForCausalLM.from_pretrained("{job.merged}")\n'
          f"    python examples/finetune.py --model {job.merged} TEXT --output OTHER")  # fmt: skip


def print_loading(job: Job) -> None:
    """Says how the adapter is loaded."""
    where = f'"{job.path}"'
    if job.path.is_file():
        where = f'"{job.path.parent}", gguf_file="{job.path.name}"'
    print(f"{job.adapter} is the adapter alone, in PEFT's form. With peft:")
    print(f"    base = AutoModelForCausalLM.from_pretrained({where})\n"
          f'    model = PeftModel.from_pretrained(base, "{job.adapter}")')  # fmt: skip

"""The training loop of the demo: an ordinary Optax loop over adapters, with checkpoints.

Nothing in it prints but the loop itself, and nothing in it depends on which model it trains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from typing import Any

import corpus
import generation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import program
import smollm2
from tqdm import tqdm

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint


@dataclasses.dataclass
class State:
    """What a run has come to; all of it is in the checkpoints."""

    adapted: tied_lora.Adapted
    opt_state: Any
    step: int
    losses: list[float]  # of every step
    before: dict[str, Any]  # held-out loss and continuation, untrained


class Job:
    """What stays the same all through a run: options, model, text and compiled functions."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.output / "checkpoints"
        # The most tokens that a row, or the prompt with its continuation, can have.
        prompt = generation.window_length(len(args.prompt.encode()), args.new_tokens)
        context = max(args.length, prompt)
        # What is wrong with options and files is said before the weights are read.
        with program.refusing(ValueError, OSError, ModuleNotFoundError):
            file = smollm2.GgufFile(args.model, context=context)
            self.model, self.tokenizer = file.model, file.tokenizer
            self._check_lengths(file.context)
            self._take_text()
            self._take_targets(file.shapes)
        self.params = file.load()
        self.count = sum(x.size for x in jax.tree.leaves(self.params) if isinstance(x, jax.Array))
        if args.quantize:
            self.params = tied_lora.quantize(self.params, args.quantize)
        self.apply = tied_lora.adapt(self.apply_plain, on_dense="error")
        self.optimizer = optax.adamw(
            optax.warmup_cosine_decay_schedule(
                args.learning_rate / max(args.warmup, 1), args.learning_rate,
                min(args.warmup, args.steps // 2), args.steps, args.learning_rate / 10,
            )
        )  # fmt: skip
        self.loss = jax.jit(self.loss_fn)
        self.train_step = tied_lora.train.step(self.loss_fn, self.optimizer)

    def _check_lengths(self, most: int) -> None:
        args = self.args
        prompt = len(generation.encode(self.tokenizer, args.prompt))
        for what, length in {
            "--length": args.length,
            "--prompt with --new-tokens": generation.window_length(prompt, args.new_tokens),
        }.items():
            if length > most:
                raise ValueError(f"{what} takes {length} tokens, and the model {most}: lower it")

    def _take_text(self) -> None:
        args = self.args
        text = corpus.read_text(*args.text) if args.text else corpus.documentation_text()
        tokens = generation.encode(self.tokenizer, text)
        self.letters = len(text)
        self.train_tokens, held_out = corpus.split(tokens, args.held_out)
        corpus.batches(self.train_tokens, args.batch, args.length, args.seed)
        held_out = held_out[: args.held_out_tokens + 1]
        rows = corpus.windows(held_out, args.length)
        self.held_out = rows[: len(rows) // args.batch * args.batch]
        if not len(self.held_out):
            raise ValueError(
                f"{len(held_out)} held-out tokens make no batch: raise --held-out and "
                "--held-out-tokens, or give more text"
            )

    def _take_targets(self, shapes: Any) -> None:
        """Finds out on shapes alone what is adapted."""
        args = self.args
        self.config = tied_lora.LoraConfig(
            r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout,
            target_modules=args.targets,
        )  # fmt: skip
        self.apply_plain = generation.causal_lm(self.model)
        rows = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
        self.sites = tied_lora.trace(self.apply_plain, shapes, rows)
        with warnings.catch_warnings(action="ignore"):  # they come again, with the weights
            self.wrap(shapes)

    def wrap(self, params: Any) -> tied_lora.Adapted:
        rng = jax.random.key(self.args.seed)
        return tied_lora.wrap(params, self.config, sites=self.sites, ties=smollm2.TIES, rng=rng)

    def loss_fn(self, adapted: tied_lora.Adapted, rows: jax.Array) -> jax.Array:
        logits = self.apply(adapted, rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def take_step(self, state: State, rows: jax.Array) -> None:
        """Takes a training step; its key, for dropout, is that of its number."""
        key = jax.random.fold_in(jax.random.key(self.args.seed), state.step)
        adapted, state.opt_state, loss = self.train_step(
            state.adapted.train(key), state.opt_state, rows
        )
        state.adapted, state.step = adapted.eval(), state.step + 1
        state.losses.append(float(loss))

    def measured(self, adapted: tied_lora.Adapted) -> dict[str, Any]:
        """Returns the held-out loss and the continuation of the prompt."""
        batches = self.held_out.reshape(-1, self.args.batch, self.args.length + 1)
        loss = np.mean([self.loss(adapted, jnp.asarray(rows)) for rows in batches])
        prompt, count = self.args.prompt, self.args.new_tokens
        text = generation.generate(self.apply, adapted, self.tokenizer, prompt, count)
        return {"loss": float(loss), "text": text}

    def described(self) -> str:
        config = self.model.config
        device = jax.devices()[0]
        name = self.args.model.name if self.args.model else "SmolLM2-135M-Instruct"
        source = ", ".join(map(str, self.args.text)) or "Python's own documentation"
        return (
            f"{name}: {config.num_hidden_layers} layers, {self.count / 1e6:.1f} million parameters "
            f"in {self.args.quantize or 'float32'}, on {device.device_kind}.\n"
            f"{source}: {self.letters:,} letters; {len(self.train_tokens):,} tokens to train on, "
            f"{self.held_out[:, 1:].size:,} held out."
        )

    def checkpoints(self) -> checkpoint.Manager:
        return checkpoint.Manager(self.folder, max_to_keep=2)

    def restored(self) -> State | None:
        """Returns the state of the last checkpoint, or None where there is none yet."""
        with program.refusing(checkpoint.CheckpointError), self.checkpoints() as manager:
            if manager.latest_step() is None:
                return None
            last = manager.restore(self.params, opt_state=self.optimizer)
        notes = json.loads(last.extra["notes"].tobytes())
        return State(last.adapted, last.opt_state, last.step, notes["losses"], notes["before"])

    def save(self, manager: checkpoint.Manager, state: State, rows: jax.Array) -> None:
        """Saves what can be gone on from: a state whose own loss is a number."""
        loss = float(self.loss(state.adapted, rows))
        program.check_loss(loss, state.step, manager, self.folder)
        notes = {"losses": state.losses, "before": state.before}
        extra = {"notes": np.frombuffer(json.dumps(notes).encode(), np.uint8)}
        manager.save(state.step, state.adapted, opt_state=state.opt_state, extra=extra)


def train(job: Job, state: State, until: int, go_on: str) -> bool:
    """Trains up to a step, saving on the way; returns whether it is to go on after it.

    Raises:
      FailedError: the loss is no number any more, or a checkpoint cannot be written.
    """
    args = job.args
    batches = corpus.batches(job.train_tokens, args.batch, args.length, args.seed, state.step)
    bar = tqdm(
        total=args.steps, initial=state.step, disable=None, file=sys.stdout,
        bar_format="{percentage:3.0f}% |{bar}| step {n} of {total}, {remaining} left{postfix}",
    )  # fmt: skip
    with (
        program.StopRequest(go_on) as stop,
        program.failing(checkpoint.CheckpointError, job.folder),
        job.checkpoints() as manager,
        bar,
    ):
        print("Compiling the training step.", flush=True)
        for rows in map(jnp.asarray, batches):
            started = time.perf_counter()
            job.take_step(state, rows)
            program.check_loss(state.losses[-1], state.step, manager, job.folder)
            rate = args.batch * args.length / (time.perf_counter() - started)
            line = f"loss {np.mean(state.losses[-10:]):.2f}, {rate:.0f} tokens/s"
            bar.set_postfix_str(line, refresh=False)
            bar.update()
            last = stop.made or state.step == until
            if bar.disable and (last or state.step % max(args.steps // 10, 1) == 0):
                print(f"step {state.step:4} of {args.steps}: {line}", flush=True)
            if last or state.step % args.save_every == 0:
                job.save(manager, state, rows)
            if last:
                break
    if stop.made:
        print(f"Stopped, and saved step {state.step}.")
    return not stop.made

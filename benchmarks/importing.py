"""How long a fresh process takes to import the package, beside what it stands on."""

from __future__ import annotations

import subprocess
import sys

from _harness import interleaved, medians, ratio, rounds_from_arguments, store

IMPORTS = {
    "nothing": "pass",
    "jax, flax.core": "import jax, flax.core",
    "flax": "import flax",
    "flax, flax.nnx": "import flax, flax.nnx",
    "flax_tied_lora": "import flax_tied_lora",
}


def main() -> None:
    rounds = rounds_from_arguments()
    cases = {
        name: lambda text=text: subprocess.run([sys.executable, "-c", text], check=True)
        for name, text in IMPORTS.items()
    }
    for run in cases.values():  # Files are read from the disk once.
        run()
    seconds = interleaved(cases, rounds)
    store(
        "importing",
        {
            "what": "seconds of whole processes that import something and end",
            "rounds": rounds,
            "median seconds": medians(seconds),
            "flax_tied_lora / flax": ratio(seconds, "flax_tied_lora", "flax"),
            "flax_tied_lora / jax, flax.core": ratio(seconds, "flax_tied_lora", "jax, flax.core"),
        },
    )


if __name__ == "__main__":
    main()

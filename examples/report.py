"""What the fine-tuning program prints and draws."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path


def section(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


def quoted(text: str, width: int = 88) -> str:
    """Returns a text in lines of at most ``width`` letters, with a bar before each."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(f"  | {line}".rstrip() for line in lines)


def curve(
    path: Path, losses: Sequence[float], before: float, after: float, smooth: int = 20
) -> None:
    """Draws the loss of every step, its running mean and the held-out loss at both ends."""
    from matplotlib.figure import Figure

    steps = range(1, len(losses) + 1)
    means = [sum(part) / len(part) for i in steps for part in [losses[max(i - smooth, 0) : i]]]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", label="each step")
    axes.plot(steps, means, color="C0", label=f"mean of {smooth} steps")
    axes.plot([0, len(losses)], [before, after], "o--", color="C1", label="held-out text")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)

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
    path: Path, losses: Sequence[float], held_out: Sequence[tuple[int, float]], smooth: int = 20
) -> None:
    """Draws the loss of every step, its running mean, and the held-out loss on the way.

    Args:
      path: of the picture.
      losses: of every step.
      held_out: step and loss, the first of them untrained.
      smooth: of how many steps the mean is.
    """
    from matplotlib.figure import Figure

    steps = range(1, len(losses) + 1)
    means = [sum(part) / len(part) for i in steps for part in [losses[max(i - smooth, 0) : i]]]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", label="each step")
    axes.plot(steps, means, color="C0", label=f"mean of {smooth} steps")
    axes.plot(*zip(*held_out, strict=True), "o-", color="C1", label="held-out text")
    best, lowest = min(held_out, key=lambda found: found[1])
    below = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center"}
    axes.annotate(f"{lowest:.2f}", (best, lowest), **below)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)

"""What a run measures: JSON lines, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Writer = Callable[[int, Mapping[str, float]], None]


class Metrics:
    """``metrics.jsonl``, a line for each time that something is measured, and other writers.

    A run that goes on from a step drops the lines of later ones: it comes to them again.

    Args:
      folder: of the run.
      step: the last one that is done.
      loggers: of ``LOGGERS``.
      settings: of the run.

    Raises:
      OSError: the file cannot be read or written.
    """

    def __init__(
        self, folder: Path, step: int, loggers: Sequence[str], settings: Mapping[str, Any]
    ) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        draft = self.path.with_suffix(f".{os.getpid()}")
        kept = (line for line in lines if _step_of(line) <= step)
        draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(draft, self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)  # a line at a time
        self._others = [LOGGERS[name](folder, step, settings) for name in loggers]

    def __enter__(self) -> Metrics:
        return self

    def write(self, step: int, **values: float) -> None:
        """Writes values of a step, finite or not: JSON has no NaN, and gets a null."""
        finite = {k: value if math.isfinite(value) else None for k, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for write, _ in self._others:
            write(step, values)

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        for _, close in self._others:
            close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")  # the last line of a run that was killed


def _tensorboard(
    folder: Path, step: int, settings: Mapping[str, Any]
) -> tuple[Writer, Callable[[], None]]:
    if importlib.util.find_spec("tensorboardX"):
        from tensorboardX import SummaryWriter
    else:
        from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(
    folder: Path, step: int, settings: Mapping[str, Any]
) -> tuple[Writer, Callable[[], None]]:
    import wandb

    name = folder / "wandb_id"  # a run that goes on is the same run there
    if not name.exists():
        name.write_text(uuid.uuid4().hex, encoding="utf-8")
    run = wandb.init(
        dir=str(folder), id=name.read_text(encoding="utf-8"), resume="allow",
        config=json.loads(json.dumps(settings, default=str)),
    )  # fmt: skip
    return lambda step, values: run.log(dict(values), step=step), run.finish


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb}
PACKAGES = {"tensorboard": ("tensorboardX", "torch.utils.tensorboard"), "wandb": ("wandb",)}


def check_installed(loggers: Sequence[str]) -> None:
    """Refuses writers whose package is missing.

    Raises:
      ModuleNotFoundError: the message says what to install.
    """
    for name in loggers:
        first, *others = PACKAGES[name]
        if not any(_is_installed(package) for package in (first, *others)):
            raise ModuleNotFoundError(f"--log {name} needs a package: pip install {first}")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False

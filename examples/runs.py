"""The folder of a run: its checkpoints, the options they were made with, and what is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from program import FailedError, RefusedError


def steps_in(checkpoints: Path) -> list[int]:
    """Returns the numbers of the steps in a folder: a step has its name when all of it is written.

    Raises:
      RefusedError: it is a file.
    """
    try:
        names = [path.name for path in checkpoints.iterdir()]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise RefusedError(f"{checkpoints} is a file: name another --output") from None
    return sorted(int(name) for name in names if name.isdecimal())


def kept(checkpoints: Path | None, adapter: Path | None = None) -> str:
    """Says what there is to go on from, and which adapter is there."""
    text = "No step was saved."
    if steps := steps_in(checkpoints) if checkpoints else []:
        text = f"Step {steps[-1]}, the last one saved, is kept in {checkpoints}."
    if adapter and adapter.exists():
        text += f" The best adapter so far is kept in {adapter}."
    return text


class RunFolder:
    """A run's folder: its checkpoints, and beside them the options that they were made with.

    Args:
      folder: of the run.
      checkpoints: the folder of the steps, ``folder`` or one in it.
      settings: what a checkpoint must have been made with to be gone on from; JSON values by the
        name of their option.
      otherwise: what to do with other settings.
      results: what a run leaves in its folder besides.
    """

    def __init__(
        self, folder: Path, checkpoints: Path, settings: Mapping[str, Any], otherwise: str,
        results: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.folder, self.checkpoints, self.otherwise = folder, checkpoints, otherwise
        self.settings = json.loads(json.dumps(settings))
        self.results = [folder / name for name in results]
        self.record = folder / "run.json"

    def check(self) -> None:
        """Refuses checkpoints and results that were not made with these settings."""
        if not (steps_in(self.checkpoints) or any(path.exists() for path in self.results)):
            return
        try:
            made_with = dict(json.loads(self.record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise RefusedError(
                f"{self.folder} holds checkpoints of another program, or its results "
                f"({self.record} does not say which options they were made with): name another "
                "--output"
            ) from None
        for name in sorted({*made_with, *self.settings}):
            there, now = made_with.get(name), self.settings.get(name)
            if there != now:
                option = f"--{name.replace('_', '-')}" if name != "text" else "a text of checksum"
                raise RefusedError(
                    f"the checkpoint in {self.folder} was made with {option} {there}, and now "
                    f"{option} {now}: give the option that it was made with, or {self.otherwise}"
                )

    def begin(self) -> None:
        """Writes the settings down, before the first checkpoint."""
        if steps_in(self.checkpoints):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.record.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
        os.replace(draft, self.record)

    def remove(self) -> None:
        """Removes the checkpoints and the results, if they are a run's, to begin anew."""
        for path in (self.checkpoints, *self.results) if self.record.exists() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_loss(
    loss: float, step: int, manager: Any, checkpoints: Path | None, adapter: Path | None = None
) -> None:
    """Stops a run whose loss is no number any more; what was saved before is left alone.

    Raises:
      FailedError: the loss is NaN or infinite.
    """
    if math.isfinite(loss):
        return
    if manager is not None:
        manager.wait_until_finished()
    raise FailedError(
        f"step {step}: the loss is {loss}, which no further step would mend. "
        f"{kept(checkpoints, adapter)} Train with a lower --learning-rate, in another --output"
    )


@contextlib.contextmanager
def failing(
    checkpoints: Path | None, adapter: Path | None, *errors: type[Exception]
) -> Iterator[None]:
    """Takes errors of writing for a `FailedError`, which says what there still is."""
    log = logging.getLogger("absl")
    usual = log.level
    log.setLevel(logging.CRITICAL)  # Orbax raises what it logs: it is said once, and last
    try:
        yield
    except errors as raised:
        raise FailedError(
            f"{raised}. {kept(checkpoints, adapter)} When that is mended, the same command goes on"
        ) from raised
    finally:
        log.setLevel(usual)

"""Programs of several processes that share one mesh: started, read and, if they hang, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 300


def run(
    program: Path, arguments: Sequence[str], *, processes: int = 1, devices: int = 1,
    seconds: float = SECONDS, check: bool = True,
) -> list[str]:  # fmt: skip
    """Returns what each of the processes printed on its standard output.

    Args:
      program: takes ``--coordinator``, ``--processes`` and ``--process``, if there are several.
      arguments: its other arguments.
      devices: of each process.
      check: whether each has to end well.
    """
    where = ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
    running: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        for i in range(processes):
            several = [*where, "--process", str(i)] if processes > 1 else []
            process = subprocess.Popen(
                [sys.executable, str(program), *arguments, *several], env=environment(devices),
                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            stack.callback(end, process)
            running.append(process)
        printed = [process.communicate(timeout=seconds) for process in running]
    for process, (_, errors) in zip(running, printed, strict=True):
        assert process.returncode == 0 or not check, errors[-5000:]
    return [output + ("" if check else errors) for output, errors in printed]


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a process: compiled as here, the same seed gives the same bits."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags),
        "JAX_NUM_CPU_DEVICES": str(devices), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Ends a process and what it started, if it has not ended; a peer would wait for ever."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """Returns a port that the system says is free."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]

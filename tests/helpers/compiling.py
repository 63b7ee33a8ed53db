"""How XLA compiles in tests: quickly rather than well, for most programs run once or twice.

The options are low-level ones: what a program computes and in which order is decided before them.
Tests of what the compiler reports, and what is run with ``XLA_FLAGS`` that name an optimisation
level, compile as users do.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

_QUICK: dict[str, tuple[Any, Any]] = {  # in tests, and XLA's own value
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
    "xla_cpu_use_fusion_emitters": (False, True),
}
_UNTIL = {"xla_cpu_use_fusion_emitters": (0, 11)}


def _known() -> dict[str, tuple[Any, Any]]:
    """Returns those that the installed XLA knows: one that it does not know ends the process."""
    version = tuple(int(x) for x in importlib.metadata.version("jaxlib").split(".")[:2])
    return {n: v for n, v in _QUICK.items() if n not in _UNTIL or version < _UNTIL[n]}


def quick() -> dict[str, Any]:
    """Returns compiler options for the CPU that make compiling quick."""
    return {name: value for name, (value, _) in _known().items()}


def as_shipped(lowered: Any) -> Any:
    """Returns a lowered program compiled as users compile it, for what XLA then reports of it."""
    options = {name: value for name, (_, value) in _known().items()}
    # Off in workers that share the cores (conftest.py), where XLA then takes other products.
    return lowered.compile(compiler_options={**options, "xla_cpu_multi_thread_eigen": True})


def flags() -> list[str]:
    """Returns `quick` as XLA's flags; none where a GPU is used or the environment says how."""
    of_others = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    if of_others or os.environ["JAX_PLATFORMS"] != "cpu":
        return []
    return [f"--{name}={str(value).lower()}" for name, value in quick().items()]

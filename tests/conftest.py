"""What every test runs under: CPU with eight devices, strict promotion, no network.

Files whose tests need what is not installed are left out, and the summary says which.

Promotion is strict everywhere but where the models are other people's, or a program is run as its
users run it (`OTHERS_MODELS`): these rely on JAX's usual rules. A single test elsewhere asks for
those with the fixture ``standard_promotion``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import compiling

# JAX reads these when it starts, so they come before its import. A GPU run sets JAX_PLATFORMS.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    *compiling.flags(),
]
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: a thread pool in each would only fight over them.
    flags.append("--xla_cpu_multi_thread_eigen=false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = " ".join(flags).strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402


def set_promotion(dtypes: str, ranks: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


set_promotion("strict", "raise")

# How many examples is each test's own business. print_blob: a failure can be run again as printed.
quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, print_blob=True, suppress_health_check=quiet
)
hypothesis.settings.register_profile(
    "slow", deadline=None, derandomize=False, print_blob=True, suppress_health_check=quiet
)
hypothesis.settings.register_profile(
    "quick", hypothesis.settings.get_profile("default"), max_examples=10
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

OTHERS_MODELS = {
    Path(__file__).parent / name
    for name in (
        "models", "libraries", "against_torch", "features/test_quantized_smollm2.py",
        "examples/test_finetune.py", "examples/test_finetune_chat.py",
        "examples/test_finetune_peft.py", "examples/test_finetune_refused.py",
        "examples/test_finetune_stopped.py", "examples/test_llama.py", "examples/test_smollm2.py",
        "examples/test_on_a_mesh.py", "examples/test_on_a_mesh_stopped.py",
    )
}  # fmt: skip
# Where PyTorch's CPU build is not to be had (Python 3.12 and newer) the extra ``test`` installs
# neither it nor a transformers with Flax classes. Only these files, folders and tests need them.
# MaxText is for Python 3.12 and newer, skyrl-tx (``tx``) for older ones.
NEEDED = {
    "torch": (
        "against_torch", "examples/test_finetune_peft.py", "examples/test_llama.py",
        "examples/test_smollm2.py", "libraries/test_gemma.py", "libraries/test_reference.py",
        "whole/test_benchmarks.py::test_a_program_runs[against_peft",
    ),
    "maxtext": ("libraries/test_maxtext.py", "libraries/maxtext_models.py"),
    "tx": ("libraries/test_skyrl.py", "libraries/skyrl_models.py"),
    "transformers<5": (
        "examples/test_smollm2.py", "models", "whole/test_training_loops.py",
        "whole/test_benchmarks.py::test_a_program_runs[decoding",
        "whole/test_docs.py::test_page_runs[docs/losses.md",
        "whole/test_docs.py::test_page_runs[docs/vocabulary.md",
    ),
    # Flags for the forms that programs are to take, and objects of one's own in them.
    "jax>=0.11": ("interpreter/test_jaxprs_high.py", "interpreter/test_jaxprs_own_types.py"),
}  # fmt: skip
# Compiled programs are never dropped by JAX itself; past this much a worker starts again from none.
CACHE_LIMIT_KIB = 3 * 1024 * 1024


def is_installed(needed: str) -> bool:
    name, bound, limit = re.fullmatch(r"([a-z]+)(?:(<|>=)([\d.]+))?", needed).groups()
    if importlib.util.find_spec(name) is None:
        return False
    if bound is None:
        return True
    found, wanted = (
        [int(n) for n in v.split(".")[:2]] for v in (importlib.metadata.version(name), limit)
    )
    return found < wanted if bound == "<" else found >= wanted


# By what they need: asked of every worker, and of the process that collects nothing itself.
LEFT_OUT = {needed: names for needed, names in NEEDED.items() if not is_installed(needed)}
TESTS = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return any(collection_path == TESTS / x for xs in LEFT_OUT.values() for x in xs) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    starts = tuple(f"{TESTS.name}/{x}" for xs in LEFT_OUT.values() for x in xs if "::" in x)
    left_out = [item for item in items if item.nodeid.startswith(starts)] if starts else []
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for needed, names in LEFT_OUT.items():
        paths = [TESTS / name for name in names if "::" not in name]
        files = [f for p in paths for f in (p.glob("test_*.py") if p.is_dir() else [p])]
        tests = f", {n} more tests" if (n := sum("::" in name for name in names)) else ""
        terminalreporter.line(f"left out: {needed} is not installed ({len(files)} files{tests})")


@contextlib.contextmanager
def jax_usual_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", autouse=True)
def promotion_of_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gives tests of other people's models JAX's usual promotion, their own fixtures included."""
    usual = not OTHERS_MODELS.isdisjoint((request.path, *request.path.parents))
    with jax_usual_promotion() if usual else contextlib.nullcontext():
        yield


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Gives one test JAX's usual promotion."""
    with jax_usual_promotion():
        yield


@pytest.fixture
def promotion_in_threads() -> Iterator[None]:
    """Gives one test JAX's usual promotion in threads that it starts, too."""
    set_promotion("standard", "allow")
    yield
    set_promotion("strict", "raise")


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Drops JAX's compiled programs after a module if the process has grown large."""
    yield
    if resident_kib() > CACHE_LIMIT_KIB:
        jax.clear_caches()


def resident_kib() -> int:
    """Returns the process's resident memory now (Linux), or 0 where it cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024

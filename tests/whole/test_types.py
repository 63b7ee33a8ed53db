"""What a user's type checker sees: pyright, strict, on a program and on one full of mistakes."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import pytest

import flax_tied_lora as tied_lora
from tests.types import user_program

FOLDER = Path(__file__).parents[1] / "types"
MODULES = ("arithmetic", "checkpoint", "losses", "names", "nnx", "peft", "serving", "train")


@pytest.fixture(scope="module")
def found() -> Mapping[str, Mapping[int, str]]:
    """What pyright says of each program, by line."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "--project", FOLDER], capture_output=True, text=True, check=False, timeout=300
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= 2, done.stderr
    said: dict[str, dict[int, str]] = {"user_program.py": {}, "mistakes.py": {}}
    for error in report["generalDiagnostics"]:
        line = error["range"]["start"]["line"] + 1
        said[Path(error["file"]).name][line] = error["message"]
    return said


def test_a_users_program_has_no_error(found):
    assert found["user_program.py"] == {}


def test_each_mistake_is_found_on_its_line(found):
    text = (FOLDER / "mistakes.py").read_text().splitlines()
    expected = {i for i, line in enumerate(text, 1) if "# mistake:" in line}
    assert len(expected) >= 10
    assert set(found["mistakes.py"]) == expected


def test_the_program_uses_every_public_function():
    modules = {name: getattr(tied_lora, name) for name in MODULES} | {"tied_lora": tied_lora}
    text = (FOLDER / "user_program.py").read_text()
    pairs = re.findall(r"(?=\b(\w+)\.(\w+))", text)
    used = [getattr(modules[m], name, None) for m, name in pairs if m in modules]
    for module in modules.values():
        functions = {n: f for n in module.__all__ if inspect.isfunction(f := getattr(module, n))}
        assert functions
        assert not [name for name, function in functions.items() if function not in used]


@pytest.mark.usefixtures("standard_promotion")  # Adam of Optax raises a float to an integer
def test_the_program_runs(tmp_path):
    tokens = jnp.arange(8).reshape(2, 4)
    assert user_program.functional(tokens, tmp_path).shape == (2, 4, 32)
    assert user_program.modules(tokens).shape == (2, 4, 32)

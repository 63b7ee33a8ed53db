"""Training loops of pages and programs: found in their source, and asked what a step returns.

A step is a call of ``train.step`` or ``nnx.step``, or a function that updates an optimizer and is
compiled by its decorator. Each is wrapped where it is made, so that its first call asks the
compiler for its report; then every step that the source has must have been run.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest
from flax import nnx

import flax_tied_lora as tied_lora

MAKERS = {"train.step", "tied_lora.train.step", "nnx.step", "tied_lora.nnx.step"}
UPDATES = {"apply_updates", "apply_gradients"}
_NAME = "__loops__"


class Loops(ast.NodeTransformer):
    """The steps of some sources, and what the compiler said of those that were called.

    Attributes:
      found: lines at which there is a step.
      reports: of each, what it returns beyond what it is trained of, and the base, in bytes.
    """

    def __init__(self):
        self.found: set[str] = set()
        self.reports: dict[str, tuple[int, int]] = {}

    def compiled(self, source: str, filename: str, names: dict[str, Any], line: int = 0) -> Any:
        """Returns the code of a source in which its steps are wrapped; runs in ``names``."""
        self._source, self._line = Path(filename).name, line
        tree = ast.fix_missing_locations(self.visit(ast.parse(source)))
        assert not any(map(_updates, _outside_functions(tree))), (
            f"{filename}: an optimizer's update outside of a function: nothing compiles it"
        )
        names[_NAME] = self
        return compile(ast.increment_lineno(tree, line), filename, "exec")

    def module(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        """Returns a program, imported during a test, in which its steps are wrapped."""
        module = ModuleType(path.stem)
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, path.stem, module)
        exec(self.compiled(path.read_text(), str(path), vars(module)), vars(module))
        return module

    def check(self, *, least: int = 0) -> None:
        """Checks that every step was called, and returned less than half the base."""
        assert len(self.found) >= least
        assert set(self.reports) == self.found, "steps that were not called"
        for where, (returned, base) in self.reports.items():
            assert base > 0, f"{where}: no frozen params among the arguments"
            assert returned < base / 2, (
                f"{where}: the step returns {returned:,} bytes beyond adapters and state; the base "
                f"is {base:,}"
            )

    def made(self, where: str, step: Any) -> Any:
        """Returns a step that asks for the compiler's report when it is first called."""
        return _Asked(self, where, step)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.func) not in MAKERS:
            return node
        made = ast.Attribute(ast.Name(_NAME, ast.Load()), "made", ast.Load())
        return ast.Call(made, [ast.Constant(self._where(node)), node], [])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if any(map(_updates, _outside_functions(node))):
            # Around its other decorators, which compile it.
            where = repr(self._where(node))
            wrap = f"(lambda step: {_NAME}.made({where}, step))"
            node.decorator_list.insert(0, ast.parse(wrap, mode="eval").body)
        return node

    def _where(self, node: Any) -> str:
        where = f"{self._source}:{self._line + node.lineno}"
        self.found.add(where)
        return where


class _Asked:
    def __init__(self, loops: Loops, where: str, step: Any):
        self._loops, self._where, self._step = loops, where, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._where not in self._loops.reports:
            assert hasattr(self._step, "lower"), f"{self._where}: a step that nothing compiles"
            report = self._step.lower(*args, **kwargs).compile().memory_analysis()
            base, other = _bytes_of((args, kwargs))
            self._loops.reports[self._where] = report.output_size_in_bytes - other, base
        return self._step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes of a tree but those of functions in it."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _outside_functions(child)


def _updates(node: ast.AST) -> bool:
    """Returns whether a node is the update of an optimizer."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    named = node.func.attr == "update" and ast.unparse(node.func.value) != "nnx"
    return node.func.attr in UPDATES or (named and len(node.args) > 1)


def _bytes_of(arguments: Any) -> tuple[int, int]:
    """Returns how many bytes of arguments are frozen params, and how many are not.

    Those of one device: the compiler reports what one has.
    """
    base, seen, total = 0, set(), 0
    kinds = (tied_lora.Adapted, nnx.Module, nnx.Optimizer, nnx.Variable)
    for node in jax.tree.leaves(arguments, is_leaf=lambda x: isinstance(x, kinds)):
        frozen, rest = _parted(node)
        for x in (*frozen, *rest):
            if id(x) not in seen:
                seen.add(id(x))
                size = _nbytes(x)
                total += size
                base += size * any(x is y for y in frozen)
    return base, total - base


def _parted(node: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(node, tied_lora.Adapted):
        rest = (node.adapters, node.scaling, node.rng, node.slot)
        return jax.tree.leaves(node.params), jax.tree.leaves(rest)
    if isinstance(node, nnx.Module | nnx.Optimizer):
        node = nnx.state(node)
    frozen: list[Any] = []
    rest = []
    for x in jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        kind = isinstance(x, nnx.Param) and not isinstance(x, nnx.LoRAParam)
        (frozen if kind else rest).extend(jax.tree.leaves(x))
    return frozen, rest


def _nbytes(x: Any) -> int:
    if not isinstance(x, jax.Array):
        return 0
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

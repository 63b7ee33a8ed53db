"""The house of docs/architecture.md: its folders, what each may know, and no circle."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flax_tied_lora"
NAME = "flax_tied_lora"
FILES = {
    ".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f
    for f in sorted(PACKAGE.rglob("*.py"))
}
# From the first to the last in which data flows: a folder imports from those before it only.
FLOORS = (
    "_tree", "_config", "_algebra", "_interpreter", "_losses", "_names", "_ties", "_planning",
    "_adapters", "_verbs",
)  # fmt: skip
WINGS = ("_vocabulary", "_train", "_nnx", "_checkpoint", "_arithmetic", "_peft")
# Which folders may import a library that not all of the package needs.
ALONE = {
    "flax.nnx": ("_nnx",),
    "optax": ("_train", "_checkpoint"),
    "orbax": ("_checkpoint",),
    "etils": ("_checkpoint",),
    "safetensors": ("_peft",),
}


@functools.cache
def imports(module: str) -> list[tuple[ast.stmt, str, str]]:
    """Returns the package's own imports of a module: statement, module, and name or ""."""
    found = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            first, _, path = (node.module or "").partition(".")
            for alias in node.names if first == NAME else ():
                whole = ".".join(p for p in (path, alias.name) if p)
                pair = (whole, "") if whole in FILES else (path, alias.name)
                found.append((node, *pair))
    return found


@functools.cache
def outside(module: str) -> set[str]:
    """Returns what a module imports from elsewhere, as dotted paths."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] != NAME}


def folder(module: str) -> str:
    return module.split(".")[0]


@functools.cache
def reached(module: str) -> set[str]:
    """Returns all modules that importing one imports, by itself or through others."""
    seen, left = set(), [module]
    while left:
        for _, other, _ in imports(left.pop()):
            if other not in seen:
                seen.add(other)
                left.append(other)
    return seen


def test_every_module_is_in_a_folder_or_public():
    top = {m for m in FILES if "." not in m and m.startswith("_")}
    assert top == {*FLOORS, *WINGS, "__init__"}


def test_every_file_is_in_the_table_of_the_docs():
    text = (ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^\| `([^`]+\.py)`", text, re.MULTILINE)
    files = {str(f.relative_to(PACKAGE)) for f in FILES.values()}
    named = {f for f in files if not f.endswith("__init__.py")}
    assert len(set(listed)) == len(listed)
    assert set(listed) == named


@pytest.mark.parametrize("name", [*FLOORS, *WINGS])
def test_a_folder_says_what_lives_in_it_and_what_it_may_know(name):
    doc = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
    assert "know" in doc.lower(), f"{name}: say what it may know"


def test_folders_import_downwards_only():
    order = {name: i for i, name in enumerate(FLOORS)}
    wrong = []
    for module in FILES:
        here = folder(module)
        for _, other, _ in imports(module):
            there = folder(other)
            if here == there or (not here.startswith("_") or here == "__init__"):
                continue
            if here in WINGS:
                fine = there in order  # wings never import one another
            else:
                fine = there in order and order[there] < order[here]
            if not fine:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_module_imports_itself_through_others():
    circles = [m for m in FILES if m in reached(m) and m not in ("", "__init__")]
    assert not circles


def test_one_file_knows_jax_extend():
    knows = {m for m in FILES if any(name.startswith("jax.extend") for name in outside(m))}
    assert knows == {"_interpreter.jaxprs"}


def test_planning_knows_no_evaluator():
    evaluator = {"_interpreter.evaluate", "_interpreter.context", "_interpreter.rules"}
    for module in FILES:
        if folder(module) in ("_planning", "_ties", "_config"):
            assert not reached(module) & evaluator, module


def test_imports_are_at_the_top_of_a_file():
    wrong = []
    for module, file in FILES.items():
        tree = ast.parse(file.read_text())
        top = {n.lineno for n in tree.body if isinstance(n, ast.ImportFrom)}
        if module == "__init__":  # what is loaded on first use, for type checkers
            checked = [n for n in tree.body if isinstance(n, ast.If)]
            top |= {n.lineno for block in checked for n in block.body}
        defined = [n.lineno for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        first = min(defined, default=10**9)
        lines = [node.lineno for node, *_ in imports(module)]
        wrong += [f"{module}:{n}" for n in lines if n not in top or n > first]
    assert not wrong


def test_private_names_stay_in_their_folder():
    wrong = [
        f"{module} imports {name} of {other}"
        for module in FILES
        for _, other, name in imports(module)
        if name.startswith("_") and not name.startswith("__") and other
    ]
    assert not wrong


def test_a_library_is_imported_where_it_is_wrapped():
    wrong = []
    for module in FILES:
        for name in outside(module):
            for library, homes in ALONE.items():
                inside = name == library or name.startswith(f"{library}.")
                if inside and folder(module) not in homes:
                    wrong.append(f"{module} imports {name}")
    assert not wrong


def test_no_private_part_of_jax():
    assert not [m for m in FILES for name in outside(m) if "_src" in name.split(".")]


@pytest.mark.parametrize("module", [m for m in FILES if not m.startswith("_")])
def test_public_modules_only_reexport(module):
    tree = ast.parse(FILES[module].read_text())
    kinds = (ast.ImportFrom, ast.Expr, ast.Assign)
    assert all(isinstance(node, kinds) for node in tree.body)
    (exported,) = (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    assert sorted(exported) == sorted({name for _, _, name in imports(module)})


def test_no_file_is_over_300_lines():
    folders = ("flax_tied_lora", "tests", "examples", "benchmarks")
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    assert not [str(f) for f in files if len(f.read_text().splitlines()) > 300]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_are_there(page):
    tops = "_[a-z]+|tests|examples|benchmarks|docs"
    named = re.findall(rf"`((?:{tops})/[\w/.*-]*)`", page.read_text())
    missing = {
        name
        for name in named
        if not any(list(top.glob(name.rstrip("/"))) for top in (ROOT, PACKAGE))
    }
    assert not missing

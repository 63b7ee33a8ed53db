"""The tests mirror the package: where a module is tested is known from where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, TESTS = ROOT / "flax_tied_lora", ROOT / "tests"
# Folders of tests that stand for no folder of the package.
OTHERS = {
    "against_torch": "PEFT and PyTorch beside this library",
    "examples": "the programs in examples/",
    "features": "what a config turns on, through all of the package",
    "helpers": "models, adapters and comparisons that tests share",
    "libraries": "models of the libraries in docs/libraries/",
    "models": "transformers' Flax models",
    "types": "a user's programs, for a type checker",
    "whole": "the package as one: random programs, compiled programs, meshes, docs, architecture",
}
# Files that are about several modules of their folder.
SEVERAL = {
    "checkpoint/test_damage.py": "records and stored trees that are damaged",
    "checkpoint/test_errors.py": "what each function refuses",
    "checkpoint/test_fuzz.py": "records that are edited at random",
    "nnx/test_sharding.py": "modules on a mesh",
    "nnx/test_slots.py": "modules with stacked adapters",
    "nnx/test_training.py": "loops that train a module",
    "peft/adapter/test_damage.py": "adapters that are damaged, case by case",
    "peft/adapter/test_fuzz.py": "adapters that are damaged at random",
    "peft/files/test_damage.py": "files that are damaged",
    "peft/files/test_large.py": "files of more than 2 GB",
    "train/test_optax.py": "adapters in Optax's hands",
}
FOLDERS = sorted(f.parent for f in PACKAGE.rglob("_*/**/__init__.py"))


def mirror(folder: Path) -> Path:
    """Returns the folder of the tests of a folder of the package."""
    first, *rest = folder.relative_to(PACKAGE).parts
    return TESTS.joinpath(first.removeprefix("_"), *rest)


def covers(test: Path, modules: set[str]) -> bool:
    """Returns whether a test file is called after a module: test_<module>, test_<module>_<what>."""
    about = test.stem.removeprefix("test_")
    return any(about == m or about.startswith(f"{m}_") for m in modules)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_each_folder_has_its_folder_of_tests(folder):
    modules = {f.stem for f in folder.glob("*.py")} - {"__init__"}
    tests = sorted(mirror(folder).glob("*.py"))
    assert any(mirror(folder).rglob("test_*.py")), f"{folder.name} has no tests"
    strangers = [
        str(name)
        for test in tests
        if str(name := test.relative_to(TESTS)) not in SEVERAL and not covers(test, modules)
    ]
    assert not strangers, f"{strangers}: name them after a module, or say in SEVERAL what they are"


def test_no_folder_of_tests_stands_for_nothing():
    mirrored = {mirror(f).relative_to(TESTS).parts[0] for f in FOLDERS}
    found = {f.name for f in TESTS.iterdir() if f.is_dir() and any(f.rglob("*.py"))}
    assert found == {*mirrored, *OTHERS}
    assert all((TESTS / name).exists() for name in SEVERAL)


def test_all_tests_are_in_a_folder():
    assert [f.name for f in TESTS.glob("*.py")] == ["conftest.py"]


def test_helpers_hold_no_tests():
    assert not list((TESTS / "helpers").glob("test_*.py"))


def test_no_file_is_too_long():
    long = {f.name: n for f in TESTS.rglob("*.py") if (n := f.read_text().count("\n")) > 300}
    assert not long

"""A release: one place for its version, files that hold what README names, tools of one version."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import flax_tied_lora as tied_lora

ROOT = Path(__file__).parents[2]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = METADATA["project"]
VERSION = PROJECT["version"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# What a checkout holds besides its files.
MADE = (".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist",
        "site", "out", "shared", "demo_output", "finetuned")  # fmt: skip


def pages() -> list[Path]:
    """Returns the files that a reader reads."""
    return [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")]


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, out: Path) -> Path:
    """Builds a file from a tree as pyproject.toml's backend does: "sdist" or "wheel"."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    python("-c", code, cwd=tree)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the source distribution of this tree, unpacked."""
    tmp = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, tmp / "tree", ignore=shutil.ignore_patterns(*MADE))
    (tmp / "out").mkdir()
    with tarfile.open(build("sdist", tmp / "tree", tmp / "out")) as archive:
        archive.extractall(tmp, filter="data")
    return tmp / f"flax_tied_lora-{VERSION}"


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Returns the wheel that is made from the source distribution."""
    return zipfile.ZipFile(build("wheel", sdist, tmp_path_factory.mktemp("wheel")))


def files(folder: Path) -> set[str]:
    """Returns the files below a folder, without what Python leaves there."""
    paths = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {str(p) for p in paths if "__pycache__" not in p.parts}


def test_the_version_is_said_in_one_place():
    assert tied_lora.__version__ == VERSION, "install again: pip install -e ."
    said = re.compile(rf"(?<![\w.=]){re.escape(VERSION)}(?!\w|\.\d)")
    read = [*pages(), *ROOT.glob("flax_tied_lora/**/*.py"), ROOT / "mkdocs.yml", ROOT / "Makefile"]
    read = [p for p in read if p.name != "CHANGELOG.md"]
    assert not [str(p.relative_to(ROOT)) for p in read if said.search(p.read_text())]


def test_the_changelog_ends_with_this_version():
    sections = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    for name, date in sections[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", name), name
        assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date), f"{name}: when was it released?"
    if sections[1:]:
        assert sections[1][0] == VERSION


def test_the_source_distribution_is_the_checkout(sdist):
    for folder in ("benchmarks", "docs", "examples", "flax_tied_lora", "tests", ".ci", ".github"):
        assert files(sdist / folder) == files(ROOT / folder), folder
    text = (ROOT / "README.md").read_text()
    linked = {x for x in re.findall(r"\]\(([^)#]+)", text) if "://" not in x}
    named = {*linked, *re.findall(r"`((?:examples|benchmarks|docs)/\S+?)`", text)}
    for name in {*named, "CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml"}:
        assert (sdist / name).exists(), name


def test_the_tests_of_the_source_distribution_can_be_collected(sdist):
    test = next(sdist.glob("tests/**/test_adapt.py"))
    options = ("-p", "no:cacheprovider", "-q", "--collect-only")
    found = python("-m", "pytest", *options, str(test.relative_to(sdist)), cwd=sdist)
    assert "tests collected" in found


def test_the_wheel_is_the_package(sdist, wheel):
    about = f"flax_tied_lora-{VERSION}.dist-info/"
    names = {n for n in wheel.namelist() if not n.startswith(about)}
    assert names == {f"flax_tied_lora/{n}" for n in files(ROOT / "flax_tied_lora")}
    assert f"{about}licenses/LICENSE" in wheel.namelist()
    metadata = email.message_from_bytes(wheel.read(f"{about}METADATA"))
    assert metadata["Version"] == VERSION
    assert metadata["Description-Content-Type"] == "text/markdown"
    pythons = {c.rpartition(" ")[2] for c in metadata.get_all("Classifier") if ":: 3." in c}
    assert pythons == {"3.11", "3.12", "3.13"}
    assert metadata["Requires-Python"] == ">=3.11"


def requirement(text: str) -> str:
    """Returns the name of a requirement, without its extras."""
    return re.split(r"[\[<>=~!;]", text)[0].strip()


def test_pre_commit_has_the_tools_of_pyproject():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    extras = PROJECT["optional-dependencies"]
    pinned = {requirement(x): x for x in [*extras["dev"], *extras["types"]]}
    hooks = {hook["id"]: hook["additional_dependencies"] for hook in repo["hooks"]}
    assert hooks["ruff-check"] == hooks["ruff-format"] == [pinned["ruff"]]
    read = [*PROJECT["dependencies"], *extras["quantized"]]
    assert sorted(hooks["pyright"]) == sorted([pinned["pyright"], *read])


def test_the_oldest_releases_are_those_that_pyproject_allows():
    lines = (ROOT / ".ci/oldest.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["quantized"]]
    floors = [x.replace(">=", "==", 1) for x in wanted if ">=" in x.partition(";")[0]]
    (jax,) = (x for x in floors if x.startswith("jax=="))
    assert sorted(pins) == sorted([*floors, jax.replace("jax", "jaxlib")])


def made_by_make() -> set[str]:
    """Returns the targets of the Makefile."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_run_what_there_is(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    for step in (step for job in jobs.values() for step in job["steps"]):
        run, uses = step.get("run", ""), step.get("uses")
        assert set(re.findall(r"\bmake ([\w-]+)", run)) <= made_by_make()
        for script in re.findall(r"(?<![\w/])(?:\.ci|examples)/[\w.]+", run):
            assert (ROOT / script).exists(), script
        assert not uses or re.search(r"@(v\d+|release/v\d+)$", uses), uses


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_name_what_there_is(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`make ([\w-]+)", text)) <= made_by_make()
    for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"`[^`]*`", "", text)):
        if "://" not in link:
            assert (page.parent / link).exists(), link

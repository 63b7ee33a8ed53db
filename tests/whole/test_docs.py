"""The README and docs run as they stand: their Python blocks, page by page, from top to bottom.

A block with ``>>>`` is a doctest; any other is run as a program. The blocks of one page share their
names. A block that is not meant to run is marked ``python no-run`` (or is no ``python`` block).
Every training step of a page is asked what it returns: no copy of the frozen params.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from tests.helpers.loops import Loops

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```python *\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page, tmp_path, monkeypatch, standard_promotion):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), str(page))


def run_page(text: str, filename: str) -> None:
    names: dict[str, object] = {"__name__": "page"}
    loops = Loops()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        code = match[1]
        if ">>>" in code:
            block = doctest.DocTestParser().get_doctest(code, names, filename, filename, line)
            doctest.DebugRunner(optionflags=FLAGS).run(block, clear_globs=False)
            names.update(block.globs)
        else:
            exec(loops.compiled(code, filename, names, line), names)
    loops.check()


def test_a_wrong_page_fails():
    fence = "```"
    good = f"{fence}python\nx = 1\n{fence}\n\n{fence}python\n>>> x + 1\n2\n{fence}\n"
    run_page(good, "page.md")
    with pytest.raises(doctest.DocTestFailure):
        run_page(good.replace("2", "3"), "page.md")
    with pytest.raises(ZeroDivisionError):
        run_page(good.replace("x = 1", "x = 1 / 0"), "page.md")
    run_page(f"{fence}python no-run\n1 / 0\n{fence}\n", "page.md")

"""Imitations of T5X's models: the names that are shipped for it, beside PyTorch and PEFT."""

from __future__ import annotations

import pytest

from tests.libraries.held import assert_in_page, row_of
from tests.libraries.pages import run_library_page
from tests.libraries.t5x_like import build


@pytest.mark.parametrize(("example", "scanned"), [("t5", False), ("umt5", False), ("umt5", True)])
def test_the_family_is_held(example, scanned, tmp_path):
    row = row_of(build(example, scanned), tmp_path)
    assert_in_page(row, "python -m pytest tests/libraries/test_t5x_like.py")


def test_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imitation = """
from tests.libraries.reference import TOKENS as tokens
from tests.libraries.t5x_like import build, logits

targets, params = tokens, build("t5", False).params

class model:
    def apply(variables, tokens, *_, enable_dropout):
        return logits(False, variables["params"], tokens)
"""
    run_library_page("t5x", 2, imitation)

"""An imitation of Gemma in Flax's own examples: its names, beside PyTorch and PEFT."""

from __future__ import annotations

from tests.libraries.flax_gemma_like import build
from tests.libraries.held import assert_in_page, row_of
from tests.libraries.pages import run_library_page


def test_the_family_is_held(tmp_path):
    row = row_of(build(), tmp_path)
    assert_in_page(row, "python -m pytest tests/libraries/test_flax_gemma_like.py")


def test_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imitation = """
from tests.libraries.flax_gemma_like import build, logits as logits_of
from tests.libraries.reference import TOKENS as tokens

params = build().params
"""
    run_library_page("flax-examples", 1, imitation)

"""KerasHub: tiny models of it, adapted beside merged and beside PyTorch."""

from __future__ import annotations

import pytest

from tests.libraries import comparing
from tests.libraries.held import assert_in_page, row_of
from tests.libraries.kerashub_models import FAMILIES, build
from tests.libraries.pages import run_library_page


@comparing.each_of(FAMILIES, quick=["Qwen 3", "Gemma 3"])
def test_the_family_is_held(name, tmp_path):
    row = row_of(build(name), tmp_path)
    assert_in_page(row, "python -m pytest -m '' tests/libraries/test_kerashub.py")


@pytest.mark.slow
def test_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_library_page("kerashub", 3)

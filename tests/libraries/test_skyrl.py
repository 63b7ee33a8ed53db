"""SkyRL tx: tiny models of it, adapted beside merged and beside PyTorch."""

from __future__ import annotations

import re

import pytest

from tests.libraries.held import assert_in_page, row_of
from tests.libraries.reference import TOKENS
from tests.libraries.skyrl_models import FAMILIES, build
from tests.whole.test_docs import ROOT


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_held(name, tmp_path):
    row = row_of(build(name), tmp_path)
    assert_in_page(row, "python -m pytest tests/libraries/test_skyrl.py")


def test_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "libraries" / "skyrl-tx.md").read_text()
    blocks = re.findall(r"```python no-run\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names = {"tokens": TOKENS}
    for block in blocks:
        exec(compile(block, "skyrl-tx.md", "exec"), names)

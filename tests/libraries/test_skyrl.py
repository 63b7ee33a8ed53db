"""SkyRL tx: tiny models of it, adapted beside merged and beside PyTorch."""

from __future__ import annotations

import pytest

from tests.libraries.held import assert_in_page, row_of
from tests.libraries.skyrl_models import FAMILIES, build


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_held(name, tmp_path):
    row = row_of(build(name), tmp_path)
    assert_in_page(row, "python -m pytest tests/libraries/test_skyrl.py")

"""KerasHub: tiny models of it, adapted beside merged and beside PyTorch."""

from __future__ import annotations

import pytest

from tests.libraries.held import assert_in_page, row_of
from tests.libraries.kerashub_models import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_held(family, tmp_path):
    row = row_of(build(family), tmp_path)
    assert_in_page(row, "python -m pytest tests/libraries/test_kerashub.py")

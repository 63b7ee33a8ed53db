"""Imitations of MaxText's models: the names that are shipped for it, beside PyTorch and PEFT."""

from __future__ import annotations

import pytest

from tests.libraries.held import row_of
from tests.libraries.maxtext_like import FAMILIES, build


@pytest.mark.parametrize("scanned", [False, True], ids=["", "scanned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_held(family, scanned, tmp_path):
    *_, peft = row_of(build(family, scanned), tmp_path)
    assert peft == "yes"

"""MaxText: tiny models of it, adapted beside merged and beside PyTorch."""

from __future__ import annotations

import pytest

from tests.libraries.held import assert_in_page, row_of
from tests.libraries.maxtext_models import build
from tests.libraries.pages import run_library_page

# Family, whether its layers are scanned, whether it is the Linen module.
CASES = {
    "Llama 3.1": ("Llama 3.1", False, False),
    "Llama 3.1 scanned, Linen": ("Llama 3.1", True, True),
    "Llama 2 scanned": ("Llama 2", True, False),
    "Qwen 3": ("Qwen 3", False, False),
    "Qwen 3 scanned": ("Qwen 3", True, False),
    "Gemma 2": ("Gemma 2", False, False),
    "Gemma 2 scanned, Linen": ("Gemma 2", True, True),
    "Gemma 3": ("Gemma 3", False, False),
    "Gemma 3 scanned": ("Gemma 3", True, False),
}
QUICK = ("Llama 3.1", "Gemma 2 scanned, Linen")
# MaxText and what it imports use what newer releases of their own dependencies deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_the_family_is_held(case, tmp_path):
    row = row_of(build(*CASES[case]), tmp_path)
    assert_in_page(row, "python -m pytest -m '' tests/libraries/test_maxtext.py")


@pytest.mark.slow
def test_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_library_page("maxtext", 4)

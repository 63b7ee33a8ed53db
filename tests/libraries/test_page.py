"""docs/libraries.md runs as it stands. Its blocks are marked ``no-run`` for who has no tunix."""

from __future__ import annotations

import flax
import pytest

from tests.libraries import gemma_models as gemma_models  # its import of gemma, without TensorFlow
from tests.libraries import tunix_models as tunix_models
from tests.whole.test_docs import ROOT, run_page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "libraries.md"
    text = page.read_text()
    assert text.count("```python no-run") == text.count("```python") == 5
    # As importing tunix leaves it; here it was imported before, and the setting put back.
    with flax.config.temp_flip_flag("always_shard_variable", False):
        run_page(text.replace("```python no-run", "```python"), str(page))

"""The pages of docs/libraries/ run as they stand.

Their blocks are marked ``no-run`` for who has not the library, and then no page of the others
runs them. A page whose library has an environment of its own has its test there.
"""

from __future__ import annotations

import flax
import pytest

from tests.libraries import gemma_models as gemma_models  # its import of gemma, without TensorFlow
from tests.libraries import tunix_models as tunix_models
from tests.whole.test_docs import ROOT, run_page


@pytest.mark.slow
@pytest.mark.parametrize(("page", "blocks"), [("tunix", 4), ("gemma", 1)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_page_runs(page, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "docs" / "libraries" / f"{page}.md"
    text = file.read_text()
    assert text.count("```python no-run") == text.count("```python") == blocks
    # As importing tunix leaves it; here it was imported before, and the setting put back.
    with flax.config.temp_flip_flag("always_shard_variable", False):
        run_page(text.replace("```python no-run", "```python"), str(file))

"""The pages of tunix and gemma in docs/libraries/ run as they stand."""

from __future__ import annotations

import flax
import pytest

from tests.libraries import gemma_models as gemma_models  # its import of gemma, without TensorFlow
from tests.libraries import tunix_models as tunix_models
from tests.libraries.pages import run_library_page


@pytest.mark.slow
@pytest.mark.parametrize(("page", "blocks"), [("tunix", 4), ("gemma", 1)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_page_runs(page, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As importing tunix leaves it; here it was imported before, and the setting put back.
    with flax.config.temp_flip_flag("always_shard_variable", False):
        run_library_page(page, blocks)

"""The pages of EasyDeL, SkyRL tx, bonsai and Levanter, run on imitations.

A page's first block makes a model of the library; here an imitation takes its place.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.libraries.other_models import build
from tests.libraries.reference import TOKENS
from tests.whole.test_docs import ROOT

PAGES = {
    "easydel": "easydel/llama", "skyrl-tx": "skyrl-tx/qwen3", "bonsai": "bonsai/qwen3",
    "levanter": "levanter/llama",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = build(PAGES[page])
    text = (ROOT / "docs" / "libraries" / f"{page}.md").read_text()
    first, *blocks = re.findall(r"```python no-run\n(.*?)```", text, re.DOTALL)
    assert "def logits_of" in first
    assert len(blocks) == 2
    config = {"model_type": PAGES[page], "tie_word_embeddings": True}
    names: dict[str, Any] = {
        "params": held.params, "logits_of": held.call, "tokens": TOKENS, "config": config,
        "theirs": held.pytorch.config,
    }  # fmt: skip
    for block in blocks:
        # The page shows of config.json what its reader looks for; this is the rest.
        whole = re.sub(r'\{"model_type": "\w+"\}', "theirs", block)
        exec(compile(whole, f"{page}.md", "exec"), names)

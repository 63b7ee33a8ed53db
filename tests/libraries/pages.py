"""The pages of docs/libraries/, run as they stand."""

from __future__ import annotations

from tests.whole.test_docs import ROOT, run_page


def run_library_page(page: str, blocks: int) -> None:
    """Runs a page's blocks, all of which are marked ``no-run`` for who has not its library."""
    file = ROOT / "docs" / "libraries" / f"{page}.md"
    text = file.read_text()
    assert text.count("```python no-run") == text.count("```python") == blocks
    run_page(text.replace("```python no-run", "```python"), str(file))

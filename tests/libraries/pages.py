"""The pages of docs/libraries/, run as they stand."""

from __future__ import annotations

from tests.whole.test_docs import ROOT, run_page


def run_library_page(page: str, blocks: int, before: str = "") -> None:
    """Runs a page's blocks, all of which are marked ``no-run`` for who has not its library.

    Args:
      before: a program that makes what the page takes for granted.
    """
    file = ROOT / "docs" / "libraries" / f"{page}.md"
    text = file.read_text()
    assert text.count("```python no-run") == text.count("```python") == blocks
    text = text.replace("```python no-run", "```python")
    run_page(f"```python\n{before}\n```\n{text}" if before else text, str(file))

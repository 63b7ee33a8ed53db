"""The page of rules and the registry name the same primitives."""

from __future__ import annotations

import re
from pathlib import Path

from flax_tied_lora._interpreter import registry

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def test_the_page_names_every_primitive_that_has_a_rule():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    ours = {
        n for n, rule in registry._RULES.items() if rule.__module__.startswith("flax_tied_lora")
    }
    assert named == ours

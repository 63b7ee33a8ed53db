"""The table of families in docs/models.md is what the models' own traces give."""

from __future__ import annotations

import os
from pathlib import Path

from tests.models.checks import explanation_of, model_tests
from tests.models.families import FAMILIES
from tests.models.families import clip_of_old_jax as clip_of_old_jax

pytestmark = model_tests
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: written by tests/models/test_table.py -->", "<!-- end -->"
UPDATE = "UPDATE_DOCS"
COMMAND = f"{UPDATE}=1 python -m pytest tests/models/test_table.py"


def row_of(name: str) -> tuple[str, ...]:
    """Returns a row of the table: a class, its tied table, its sites, and what else is tested."""
    family = FAMILIES[name]
    leaf = " = ".join(f"`{x}`" for x in (family.table, family.untied_head) if x)
    sites = [
        f"{read.site.role} (`{read.site.operation}`) in `{read.site.scope.partition('/')[2]}`: "
        f"{read.served}"
        for read in explanation_of(name).of(family.table)
    ]
    also = {"generate": family.generates, "checkpoint": family.checkpoint}
    tested = ", ".join(what for what, there in also.items() if there)
    return name, f"`{family.model}`", leaf, "; ".join(sites), tested


def made() -> str:
    header = ("name", "class", "tied table", "its call sites, and how they are served", "also")
    lines = [header, ("---",) * len(header), *map(row_of, sorted(FAMILIES))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_docs_have_this_table():
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE.name} has no {BEGIN} ... {END}"
    page = f"{before}{BEGIN}\n\n{made()}\n\n{END}{after}"
    if os.environ.get(UPDATE):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, f"the table in {PAGE.name} is stale; run {COMMAND}"

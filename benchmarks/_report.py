"""Writes the tables and plots of docs/performance.md from the stored results.

python benchmarks/_report.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _figures
import _plots

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
BEGIN = "<!-- begin: written by benchmarks/_report.py -->\n"
END = "<!-- end -->\n"


def number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def spread(value: Any) -> tuple[str, str]:
    """Returns a figure, and its quartiles if it has some."""
    if not _figures.is_ratio(value):
        return f"{value:.3f}", "-"
    return f"{value['median']:.3f}", f"{value['quartile 1']:.3f} to {value['quartile 3']:.3f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def targets(records: dict[str, dict[str, Any]], folder: str = "") -> list[str]:
    """Returns the table of figures that have a target; of a folder's, with the files' names."""
    rows = []
    for target, name, label, value in _figures.against_targets(records):
        middle, quartiles = spread(value)
        verdict = target.verdict(value["median"] if _figures.is_ratio(value) else value)
        if _figures.is_trial(records[name]):
            verdict = "a trial run"
        place = f"`{folder}/{name}.json`" if folder else f"[{name}](#{name})"
        rows.append([label, target.wanted(), middle, quartiles, verdict, place])
    return table(["figure", "target", "median", "quartiles", "met", "result"], rows)


def caption(record: dict[str, Any]) -> list[str]:
    figures = record["figures"]
    versions = ", ".join(f"{p} {v}" for p, v in record["versions"].items())
    cores = f", {record['cores']} cores" if "cores" in record else ""
    cores = f", {record['processor']}{cores}" if "processor" in record else cores
    peak = record.get("peak MiB of the process")
    lines = [
        *([figures["what"][0].upper() + figures["what"][1:] + "."] if "what" in figures else []),
        f"`{record['command']}`, {record['date']}, {record['device']}{cores}; "
        f"Python {record['python']}, {versions}.",
        *([f"{figures['rounds']} rounds."] if "rounds" in figures else []),
        *([f"At most {peak:,.0f} MiB in the process."] if peak else []),
    ]
    if _figures.is_trial(record):
        lines.append("**A trial run with few rounds: it shows that the program runs, no more.**")
    return [*lines, ""]


def block(figures: dict[str, Any]) -> list[str]:
    """Returns tables of what one dict of figures holds: by case, ratios, texts, then its parts."""
    nested = {k: v for k, v in figures.items() if isinstance(v, dict) and not _figures.is_ratio(v)}
    columns = {k: v for k, v in nested.items() if v and all(map(_figures.is_number, v.values()))}
    ratios = {k: v for k, v in figures.items() if _figures.is_ratio(v)}
    for key, value in nested.items():
        if value and all(map(_figures.is_ratio, value.values())):
            ratios |= dict(_figures.labelled({key: value}))
    lines = []
    if columns:
        cases = list(dict.fromkeys(case for column in columns.values() for case in column))
        rows = [
            [case, *(number(c[case]) if case in c else "-" for c in columns.values())]
            for case in cases
        ]
        lines += table(["", *columns], rows)
    if ratios:
        rows = [[label, *spread(value)] for label, value in ratios.items()]
        lines += table(["ratio", "median", "quartiles"], rows)
    texts = {k: v for k, v in figures.items() if isinstance(v, str) and k != "what"}
    if texts:
        lines += table(["", ""], [[k, v] for k, v in texts.items()])
    for key, value in nested.items():
        if key not in columns and not all(map(_figures.is_ratio, value.values())):
            lines += [f"**{key}**", "", *block(value)]
    return lines


def page(
    text: str,
    records: dict[str, dict[str, Any]],
    elsewhere: dict[str, dict[str, dict[str, Any]]] | None = None,
) -> str:
    """Returns the page with what is between its two markers made anew."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page has no marker: it needs the lines {BEGIN}{END}")
    lines = ["", "### Against the targets", "", *targets(records)]
    for folder, others in (elsewhere or {}).items():
        lines += [f"### Against the targets: {folder}", "", *targets(others, folder)]
    for file, (alt, panels_of) in _plots.PLOTS.items():
        lines += [f"![{alt}](images/{file})", ""] if panels_of(records) else []
    for name, record in records.items():
        lines += [f"### {name}", "", *caption(record), *block(record["figures"])]
    return before + BEGIN + "\n".join(lines) + END + after


def main() -> None:
    records = _figures.stored(RESULTS)
    path = DOCS / "performance.md"
    path.write_text(page(path.read_text(), records, _figures.stored_elsewhere(RESULTS)))
    _plots.draw(records, DOCS / "images")
    print(f"{path.relative_to(ROOT)} is made of {', '.join(records)}")


if __name__ == "__main__":
    main()

"""Results as text: tables to read (Markdown, plain), CSV to compute with, durations in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]], numeric: bool = False) -> str:
    """A Markdown table; bars in cells are escaped. `numeric` aligns all columns but the first right."""
    columns = list(columns)
    rules = ["---", *["---:" if numeric else "---"] * (len(columns) - 1)]
    lines = [columns, rules, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def aligned_table(columns: Iterable[str], rows: Iterable[Iterable[str]], alignment: str = "<<") -> str:
    """A table in plain text, without a head if `columns` is empty.

    Args:
        alignment: "<" (left) or ">" (right) for each of the first columns; the others go to the right.
    """
    lines = [line for line in (list(columns), *map(list, rows)) if line]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = alignment.ljust(len(widths), ">")
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=False)
        ).rstrip()
        for line in lines
    )


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys, which become the header; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def provenance(rows: list[dict[str, Any]]) -> str:
    """On which devices, and at which commits, rows with these two keys were measured."""
    devices, commits = (sorted({row[key] for row in rows if row[key]}) for key in ("device", "commit"))
    return f"Device: {'; '.join(devices) or '–'}. Commit: {', '.join(commits) or 'none'} (+: with changes)."


def duration(seconds: float) -> str:
    """Seconds as people read them: 45 s, 12 min, 3 h 20 min, 4.5 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 2 * 1440 else f"{minutes / 1440:,.1f} days"

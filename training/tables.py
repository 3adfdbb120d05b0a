"""Tables of results as text: Markdown to read, CSV to compute with, and where the figures come from."""

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


def aligned_table(columns: Iterable[str], rows: list[tuple[str, ...]]) -> str:
    """A table in plain text, numbers to the right."""
    lines = [tuple(columns), *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
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

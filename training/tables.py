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

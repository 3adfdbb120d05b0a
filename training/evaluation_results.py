"""Evaluations in a run's folder, eval/*.json: reading them, and their table and plots.

A file is what training/evaluate_checkpoints.py writes for a checkpoint and data; it may come from elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_json_object
from training import plots
from training.evaluation import WINDOWS
from training.metrics import is_number
from training.run_folder import RunFolder

LIMIT_BYTES = 64 * 2**20
RESULT_NUMBERS = ("seq_len", "tokens", "loss", "bits_per_byte")
OPTIONAL_NUMBERS = ("perplexity", "word_perplexity", "loss_low", "loss_high")
EVALUATION_COLUMNS = (
    "checkpoint",
    "data",
    "seq_len",
    "window",
    "precision",
    "tokens",
    "loss",
    "95 % interval",
    "perplexity",
    "word perplexity",
    "bits per byte",
)


def read_evaluations(folder: RunFolder) -> tuple[list[dict[str, Any]], list[str]]:
    """The contents of eval/*.json in order of names (that of steps), and the names of unreadable files.

    Different data of one name have a part of their fingerprint in it.
    """
    read = {path.name: read_evaluation(path) for path in sorted(folder.evaluations.glob("*.json"))}
    unreadable = [name for name, evaluation in read.items() if evaluation is None]
    return with_unique_data_names(
        [evaluation for evaluation in read.values() if evaluation is not None]
    ), unreadable


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """What eval.py wrote, optional numbers null where they are missing; None if it is another file."""
    try:
        evaluation = read_json_object(path, LIMIT_BYTES)
        results = [dict.fromkeys(OPTIONAL_NUMBERS) | result for result in evaluation["results"]]
        evaluation = {"step": None, "training_tokens": None} | evaluation | {"results": results}
        return evaluation if _is_evaluation(evaluation) else None
    except (DataError, KeyError, TypeError, ValueError):
        return None


def _is_evaluation(evaluation: dict[str, Any]) -> bool:
    """Whether every value that is shown is of its kind; the file may come from elsewhere."""
    results = evaluation["results"]
    counts = [evaluation["step"], evaluation["training_tokens"]]
    optional = [result[key] for result in results for key in OPTIONAL_NUMBERS]
    numbers = [result[key] for result in results for key in RESULT_NUMBERS]
    positions = [place for result in results for place in result.get("loss_by_position", [])]
    return (
        isinstance(evaluation["data"], str)
        and all(result["window"] in WINDOWS for result in results)
        and all(result.get("precision", "bf16") in ("bf16", "fp32") for result in results)
        and all((result["loss_low"] is None) == (result["loss_high"] is None) for result in results)
        and all(count is None or is_number(count) for count in counts)
        and all(value is None or is_number(value) or _is_finite(value) for value in optional)
        and all(map(is_number, numbers))
        and all(len(place) == 3 and all(map(is_number, place)) for place in positions)
    )


def _is_finite(value: Any) -> bool:
    """A word perplexity has no bound, where words are long."""
    return type(value) is float and math.isfinite(value)


def with_unique_data_names(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations whose data names also hold a part of the fingerprint where different data share a name."""
    known: dict[str, set[Any]] = {}
    for evaluation in evaluations:
        known.setdefault(evaluation["data"], set()).add(evaluation.get("data_fingerprint"))
    return [
        evaluation | {"data": f"{evaluation['data']} ({str(evaluation.get('data_fingerprint'))[:8]})"}
        if len(known[evaluation["data"]]) > 1
        else evaluation
        for evaluation in evaluations
    ]


def evaluation_rows(evaluation: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of a table of evaluations, one row a result, under `EVALUATION_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for result in evaluation["results"]:
        low, high = result["loss_low"], result["loss_high"]
        rows.append(
            (
                _checkpoint(evaluation),
                str(evaluation["data"]),
                str(result["seq_len"]),
                _window(result),
                result.get("precision", "–"),
                f"{result['tokens']:,}",
                f"{result['loss']:.4f}",
                f"{low:.4f} – {high:.4f}" if low is not None else "–",
                _number(result["perplexity"], ",.3f"),
                _number(result["word_perplexity"], ",.5g"),
                f"{result['bits_per_byte']:.4f}",
            )
        )
    return rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def draw_evaluations(
    folder: RunFolder, evaluations: list[dict[str, Any]], trained_seq_len: int | None
) -> list[Path]:
    """Plot evaluations by length and position (the last checkpoint of each data) and over tokens."""
    precisions = {result.get("precision") for evaluation in evaluations for result in evaluation["results"]}
    newest = list({evaluation["data"]: evaluation for evaluation in evaluations}.values())
    by_length: dict[str, list[tuple[float, float]]] = {}
    by_position: list[plots.Line] = []
    for evaluation in newest:
        for result in evaluation["results"]:
            label = f"{_checkpoint(evaluation)} on {evaluation['data']}, {_kind(result, precisions)}"
            if result["perplexity"] is not None:
                by_length.setdefault(label, []).append((result["seq_len"], result["perplexity"]))
            positions = [(max(2 * first, 1), loss) for first, _, loss in result.get("loss_by_position", [])]
            by_position.append((f"{label}, seq_len {result['seq_len']:,}", *_columns(positions)))
    over_tokens: dict[str, list[tuple[float, float]]] = {}
    for evaluation in evaluations:
        for result in evaluation["results"]:
            if None not in (evaluation["training_tokens"], result["perplexity"]):
                label = f"{evaluation['data']}, {_kind(result, precisions)}, seq_len {result['seq_len']:,}"
                over_tokens.setdefault(label, []).append(
                    (evaluation["training_tokens"], result["perplexity"])
                )
    drawn = []
    if by_length:
        drawn += [folder.plots / "perplexity_by_length.png", folder.plots / "loss_by_position.png"]
        lines = [(label, *_columns(points)) for label, points in by_length.items()]
        plots.plot_perplexity_by_length(drawn[0], lines)
        plots.plot_loss_by_position(drawn[1], by_position, trained_seq_len)
    if any(len({tokens for tokens, _ in points}) > 1 for points in over_tokens.values()):
        drawn.append(folder.plots / "perplexity_over_tokens.png")
        lines = [(label, *_columns(points)) for label, points in over_tokens.items()]
        plots.plot_perplexity_over_tokens(drawn[-1], lines)
    return drawn


def _kind(result: dict[str, Any], precisions: set[str | None]) -> str:
    """How a result was scored, the precision if there are several: those of one kind make up a line."""
    words = [_window(result)]
    if result.get("max_tokens"):
        words.append(f"max_tokens={result['max_tokens']}")
    if len(precisions) > 1 and result.get("precision"):
        words.append(result["precision"])
    return " ".join(words)


def _window(result: dict[str, Any]) -> str:
    """The rule, and the stride where it is not the default's half of the length."""
    stride = result.get("stride")
    is_default = stride in (None, max(result["seq_len"] // 2, 1))
    return result["window"] if is_default else f"{result['window']} stride={stride}"


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(x, y) pairs as a list of x in ascending order and one of y."""
    ordered = sorted(points)
    return [x for x, _ in ordered], [y for _, y in ordered]


def _checkpoint(evaluation: dict[str, Any]) -> str:
    step = evaluation.get("step")
    return f"step {step}" if step is not None else Path(str(evaluation.get("checkpoint"))).name

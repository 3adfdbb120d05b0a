"""What scripts/multi_gpu.py found, from the sweeps' manifests and curves: table.md, results.csv, plot.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data.files import explain_write_errors, write_atomically
from training import plots
from training.rank_kill import RankKill, losses
from training.sweep import Manifest, Point, SweepDefinition
from training.sweep_report import CELLS
from training.tables import csv_text, markdown_table, provenance

LOSS_GOAL = 2e-3  # largest |difference| to one GPU over all steps
SPEED_GOALS = {"zero1": 0.95, "zero2": 0.95, "zero3": 0.85}  # of one GPU's tokens/s per GPU
HEADS = (
    "model",
    "GPUs",
    "engine",
    "max loss difference",
    "tokens/s per GPU",
    "of one GPU's",
    "MFU",
    "GiB",
)

Rows = list[dict[str, Any]]


def write_multi_gpu_report(
    folder: Path,
    sweeps: dict[int, SweepDefinition],
    points: dict[int, list[Point]],
    kill: RankKill | None,
) -> None:
    """Write table.md, results.csv and plot.png into `folder` from the results so far.

    Args:
        sweeps, points: by number of GPUs; those on one GPU are what the others are compared with.
    """
    rows = _rows(folder, sweeps, points)
    with explain_write_errors(folder):
        write_atomically(folder / "results.csv", csv_text(rows).encode())
        write_atomically(folder / "table.md", _table(sweeps, rows, kill).encode())
    _plot(folder / "plot.png", rows, kill)


def _rows(folder: Path, sweeps: dict[int, SweepDefinition], points: dict[int, list[Point]]) -> Rows:
    """A dictionary per run; speeds in tokens/s per GPU."""
    rows: Rows = []
    references: dict[str, dict[str, Any]] = {}
    for count, sweep in sweeps.items():
        part = folder / f"gpus_{count}"
        records = Manifest(part, sweep, points[count]).records
        for point in points[count]:
            record = records[point.name]
            measured = record.get("measured") or {}
            run_folder = part / "points" / point.name
            row = {
                "model": point.label,
                "num_gpus": count,
                "engine": point.crossed["engine"],
                "status": record["status"],
                "tokens_per_second_per_gpu": measured["tokens_per_second"] / count if measured else None,
                "peak_memory_gib": measured.get("peak_memory_gib"),
                "mfu": measured.get("mfu"),
                "last_loss": measured.get("loss"),
            }
            reference = references.setdefault(point.label, row | {"run_folder": run_folder})
            row |= _against(row, run_folder, reference)
            row |= {key: record.get(key) for key in ("device", "commit", "seconds", "error")}
            rows.append(row | {"run_folder": str(run_folder)})
    return rows


def _against(row: dict[str, Any], run_folder: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """A finished run against the finished run on one GPU: None where one of them is not finished."""
    if not row["status"] == reference["status"] == "done":
        return {"steps_compared": None, "max_loss_difference": None, "share_of_one_gpu": None}
    ours, theirs = losses(run_folder), losses(reference["run_folder"])
    differences = _differences(ours, theirs)
    return {
        "steps_compared": len(differences),
        # runs with different logged steps count as infinitely far apart
        "max_loss_difference": max(differences.values()) if ours.keys() == theirs.keys() else math.inf,
        "share_of_one_gpu": row["tokens_per_second_per_gpu"] / reference["tokens_per_second_per_gpu"],
    }


def _differences(ours: dict[int, float], theirs: dict[int, float]) -> dict[int, float]:
    """Step to |difference| of two curves, where both have a value."""
    return {step: abs(ours[step] - theirs[step]) for step in sorted(ours.keys() & theirs.keys())}


def _table(sweeps: dict[int, SweepDefinition], rows: Rows, kill: RankKill | None) -> str:
    """The whole of table.md."""
    most = max(sweeps)
    sweep = sweeps[most]
    body = []
    for row in rows:
        goal = SPEED_GOALS.get(row["engine"]) if row["num_gpus"] > 1 else None
        body.append(
            [
                row["model"],
                str(row["num_gpus"]),
                row["engine"],
                _cell(row, "max_loss_difference", "{:.2e}", LOSS_GOAL, at_most=True),
                _cell(row, "tokens_per_second_per_gpu", "{:,.0f}"),
                _cell(row, "share_of_one_gpu", "{:.1%}", goal),
                _cell(row, "mfu", "{:.1%}"),
                _cell(row, "peak_memory_gib", "{:.1f}"),
            ]
        )
    parts = [
        f"# Training on up to {most} GPUs",
        f"{provenance(rows)} seq_len {sweep.seq_lens[0]:,}, {sweep.batch_tokens:,} tokens a step in every "
        f"run, {sweep.steps} steps, same data and seed. Speeds are medians over steps {sweep.skip_steps + 1} "
        f"to {sweep.steps}; losses are compared with the model's run on one GPU at every step.",
        f"Goals: loss difference at most {LOSS_GOAL:g}; "
        + ", ".join(f"{engine} {goal:.0%}" for engine, goal in SPEED_GOALS.items())
        + " of one GPU's speed per GPU. ✗ marks a goal that is missed.",
        markdown_table(HEADS, body, numeric=True),
    ]
    if kill is not None:
        parts += ["## One rank killed, resumed on fewer and on more GPUs", _kill_text(kill)]
    parts += ["![Losses and speeds](plot.png)"]
    errors = [
        f"- {row['model']}, {row['num_gpus']} GPUs, {row['engine']}: {row['error']}"
        for row in rows
        if row["error"]
    ]
    if errors:
        parts += ["## Runs that did not finish", "\n".join(errors)]
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, Any], key: str, form: str, goal: float | None = None, at_most: bool = False) -> str:
    """A value, with ✗ where it misses its goal; the run's status where it has none."""
    value = row[key]
    if value is None:
        return CELLS.get(row["status"], "–")
    missed = goal is not None and (value > goal if at_most else value < goal)
    return form.format(value) + (" ✗" if missed else "")


def _kill_text(kill: RankKill) -> str:
    """What happened in each leg, and how far the losses are from the run that was never stopped."""
    result = kill.result
    lines = [f"- {kill.describe(leg)}" for leg in result["legs"]]
    differences = _differences(kill.curve(), losses(kill.uninterrupted))
    resumed = {step: value for step, value in differences.items() if step > kill.kill_after}
    if len(result["legs"]) == 3 and resumed:
        worst = max(resumed.values())
        lines.append(
            f"- Losses of steps {min(resumed)} to {max(resumed)} against the run never stopped: at most "
            f"{worst:.2e} apart{' ✗' if worst > LOSS_GOAL else ''}."
        )
    if result.get("error"):
        lines.append(f"- ✗ {result['error']}")
    return "\n".join(lines) or "Not run yet."


def _plot(path: Path, rows: Rows, kill: RankKill | None) -> None:
    """Loss difference to one GPU over steps, and share of one GPU's speed over GPUs."""
    figure, (left, right) = plots.new_figure(num_columns=2, height=4.8)
    done = [row for row in rows if row["status"] == "done"]
    references = {row["model"]: losses(Path(row["run_folder"])) for row in done if row["num_gpus"] == 1}
    for row in done:
        if row["num_gpus"] > 1 and row["model"] in references:
            curve = _differences(losses(Path(row["run_folder"])), references[row["model"]])
            label = f"{row['model']}, {row['num_gpus']} GPUs, {row['engine']}"
            left.plot(list(curve), list(curve.values()), linewidth=1, label=label)
    if kill is not None and (curve := _differences(kill.curve(), losses(kill.uninterrupted))):
        left.plot(list(curve), list(curve.values()), "k:", label="killed and resumed against not stopped")
    left.axhline(LOSS_GOAL, color="gray", linestyle="--", linewidth=1)
    left.set(xlabel="step", ylabel="|loss difference| (nats per token)", ylim=(0, None))
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for row in done:
        if row["num_gpus"] > 1 and row["share_of_one_gpu"] is not None:
            shares = lines.setdefault((row["model"], row["engine"]), {1: 1.0})
            shares[row["num_gpus"]] = row["share_of_one_gpu"]
    for (model, engine), shares in lines.items():
        right.plot(list(shares), list(shares.values()), "o-", label=f"{model}, {engine}")
    right.set_xticks(sorted({row["num_gpus"] for row in rows}))
    right.set(xlabel="GPUs", ylabel="tokens/s per GPU, of one GPU's", ylim=(0, None))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)  # up to 24 lines
    plots.save(figure, path)

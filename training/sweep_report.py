"""What a sweep found: results.csv (a row per point), table.md, and plots of speed, memory and loss.

A line of a table or plot is a model with its own settings; the axis is the sequence length, or the first
crossed setting where there is one length only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from data.files import explain_write_errors, write_atomically
from models.config import ModelConfig
from training import plots
from training.config import compose
from training.sweep import Manifest, Point, SweepDefinition
from training.tables import csv_text, markdown_table, provenance
from training.train_config import TrainConfig

COLUMNS = (
    "model",
    "seq_len",
    "status",
    "tokens_per_second",
    "peak_memory_gib",
    "loss",
    "valid_loss",
    "mfu",
    "step_ms",
    "steps_measured",
)
MORE_COLUMNS = (
    "paper_tokens_per_second_per_gpu",
    "attention",
    "batch_tokens",
    "steps",
    "engine",
    "num_gpus",
    "device",
    "commit",
    "seconds",
    "run_folder",
    "error",
)

# Tokens/s per GPU on 2 A100 80G, by (model, attention) and length (arXiv 2405.17381, "Various Lengths,
# Constant Speed"); the batch is not stated. None: out of memory.
PAPER_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 81920, 94208)
PAPER = {
    ("llama-385m", "softmax"): (35931, 32453, 28184, 21996, 15479, 9715, 5643, 4604, 4078),
    ("tnl-385m", "quadratic"): (41789, 39043, 34894, 28627, 21112, 13852, 8247, 6824, 6012),
    ("tnl-385m", "lightning"): (38615, 38680, 38714, 38172, 37755, 37364, 38278, 38457, 38596),
    ("llama-1b", "softmax"): (14897, 13990, 12644, 10887, 8468, 5836, 3820, 3167, None),
    ("tnl-1b", "quadratic"): (21195, 20128, 18553, 16012, 12594, 8848, 5611, 4625, None),
    ("tnl-1b", "lightning"): (20052, 19967, 20009, 19841, 19805, 19691, 20077, 20186, None),
    ("llama-3b", "softmax"): (7117, 6708, 6008, 4968, 3755, 2558, None, None, None),
    ("tnl-3b", "quadratic"): (8001, 7649, 7117, 6152, 4859, 3512, None, None, None),
    ("tnl-3b", "lightning"): (7524, 7593, 7599, 7559, 7545, 7545, None, None, None),
}
PAPER_NAMES = {"softmax": "LLaMA-FA2", "quadratic": "TNL-LA1", "lightning": "TNL-LA2"}
NOT_ARCHITECTURE = ("vocab_size", "backend", "activation_checkpointing")  # model settings of how to run it
CELLS = {"oom": "OOM", "failed": "failed", "stopped": "stopped", "running": "running", "waiting": "–"}
SAME_SIZE = 1.1  # largest ratio of parameters between models whose speeds are set against each other


def write_results(folder: Path, sweep: SweepDefinition, manifest: Manifest, points: list[Point]) -> None:
    """Write results.csv, table.md and plots/ into the sweep's folder, from the manifest alone."""
    rows = rows_of(folder, sweep, manifest, points)
    grid = Grid(sweep, points, rows)
    with explain_write_errors(folder):
        write_atomically(folder / "results.csv", csv_text(rows).encode())
        write_atomically(folder / "table.md", table(sweep, grid, rows).encode())
    for name, (key, title) in grid.plots().items():
        plot(folder / "plots" / name, grid, key, title)


def rows_of(folder: Path, sweep: SweepDefinition, manifest: Manifest, points: list[Point]) -> list[dict]:
    """One dictionary per point with COLUMNS, the crossed settings, and MORE_COLUMNS."""
    rows = []
    for point in points:
        record = manifest.records[point.name]
        figures = {"model": point.label, "seq_len": point.seq_len, "status": record["status"]}
        figures |= record.get("measured") or {}
        figures |= {
            "paper_tokens_per_second_per_gpu": paper_figures(point.config.model).get(point.seq_len),
            "attention": attention_kind(point.config.model),
            "batch_tokens": sweep.batch_tokens,
            "steps": sweep.steps,
            "engine": point.values["engine"],
            "num_gpus": sweep.num_gpus,
            "run_folder": str(folder / "points" / point.name),
        }
        figures |= {key: record.get(key) for key in ("device", "commit", "seconds", "error")}
        columns = {key: figures.get(key) for key in COLUMNS}
        rows.append(columns | point.crossed | {key: figures.get(key) for key in MORE_COLUMNS})
    return rows


def paper_figures(model: ModelConfig) -> dict[int, int | None]:
    """What the paper measured for the model, by length; {} for any architecture but the paper's own."""
    speeds = PAPER.get((model.name, model.attention))
    if speeds is None:
        return {}
    chosen = {key: getattr(model, key) for key in ("attention", *NOT_ARCHITECTURE)}
    is_own = replace(_named_model(model.name), **chosen) == model
    return dict(zip(PAPER_LENGTHS, speeds, strict=False)) if is_own else {}


@cache
def _named_model(name: str) -> ModelConfig:
    """What `model=name` alone chooses; results are written after every point, and ask again."""
    return compose(TrainConfig, [f"model={name}"], "train").model


def attention_kind(model: ModelConfig) -> str:
    """The attention of all layers, or "hybrid" where some of them use softmax."""
    uses_softmax = [model.uses_softmax(layer) for layer in range(model.num_layers)]
    if all(uses_softmax):
        return "softmax"
    return "hybrid" if any(uses_softmax) else model.attention


@dataclass(slots=True)
class Series:
    """One line of the tables and plots: a model with its own and crossed settings.

    Attributes:
        others: the crossed settings beside the axis, as key=value.
        rows: rows of results.csv by their place on the axis.
    """

    label: str
    model: ModelConfig
    others: list[str]
    rows: dict[Any, dict]

    def values(self, key: str) -> dict[Any, float]:
        """A column's values along the axis; points without one are left out."""
        return {place: row[key] for place, row in self.rows.items() if row[key] is not None}


class Grid:
    """The points laid out as lines over an axis.

    Attributes:
        axis: "seq_len", or the first crossed setting with several values where there is one length only.
        places: the axis' values in order: lengths, or values as text.
    """

    def __init__(self, sweep: SweepDefinition, points: list[Point], rows: list[dict]) -> None:
        keys = list(points[0].crossed)
        several = [key for key in keys if len({point.crossed[key] for point in points}) > 1]
        self.axis = several[0] if len(sweep.seq_lens) == 1 and several else "seq_len"
        self.sweep = sweep
        self.places = list(dict.fromkeys(row[self.axis] for row in rows))
        if self.axis == "seq_len":
            self.places.sort()
        lines: dict[str, Series] = {}
        for point, row in zip(points, rows, strict=True):
            others = [f"{key}={value}" for key, value in point.crossed.items() if key != self.axis]
            label = " ".join([point.label, *others])
            lines.setdefault(label, Series(label, point.config.model, others, {})).rows[row[self.axis]] = row
        self.lines = list(lines.values())

    @property
    def loss_key(self) -> str:
        """The column that says how good a point is."""
        return "valid_loss" if self.sweep.evaluate else "loss"

    def plots(self) -> dict[str, tuple[str, str]]:
        """File name to column and title of each plot."""
        kind = "validation" if self.sweep.evaluate else f"training, step {self.sweep.steps}"
        return {
            "tokens_per_second": ("tokens_per_second", "tokens/s"),
            "peak_memory": ("peak_memory_gib", "peak memory (GiB)"),
            "loss": (self.loss_key, f"loss (nats per token, {kind})"),
        }


def table(sweep: SweepDefinition, grid: Grid, rows: list[dict]) -> str:
    """The whole of table.md."""
    done = sum(row["status"] == "done" for row in rows)
    engines = ", ".join(dict.fromkeys(row["engine"] for row in rows))
    parts = [
        f"# Sweep {sweep.name}",
        f"{done} of {len(rows)} points done. {provenance(rows)} {sweep.num_gpus} rank(s) a point, "
        f"engine {engines}, {sweep.batch_tokens:,} tokens a step.",
        f"Speeds are medians over steps {sweep.skip_steps + 1} to {sweep.steps} "
        f"({sweep.steps - sweep.skip_steps} steps, one run a point).",
        "## Tokens/s per GPU" if sweep.num_gpus > 1 else "## Tokens/s",
        _speed_table(grid),
        _crossovers(grid),
    ]
    if any(row["mfu"] is not None for row in rows):
        parts += ["## Model FLOPs utilisation", _matrix(grid, "mfu", "{:.1%}")]
    else:
        parts.append("Model FLOPs utilisation: not known, this device's peak is not on record.")
    parts += ["## Peak memory (GiB)", _matrix(grid, "peak_memory_gib", "{:.2f}")]
    parts += [f"## {grid.plots()['loss'][1].capitalize()}", _matrix(grid, grid.loss_key, "{:.4f}")]
    parts += [
        "## Plots",
        "\n".join(f"![{title}](plots/{name}.png)" for name, (_, title) in grid.plots().items()),
    ]
    errors = [
        f"- {line.label}, {grid.axis} {place}: {row['error']}"
        for line in grid.lines
        for place, row in line.rows.items()
        if row["error"]
    ]
    if errors:
        parts += ["## Points that did not finish", "\n".join(errors)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _speed_table(grid: Grid) -> str:
    """Tokens/s of every line, flatness, and under it the paper's figures where the size is the same."""
    num_gpus = grid.sweep.num_gpus
    heads = [_place_text(place) for place in grid.places]
    body = []
    for line in grid.lines:
        speeds = {place: value / num_gpus for place, value in line.values("tokens_per_second").items()}
        cells = [_cell(line, place, speeds, "{:,.0f}") for place in grid.places]
        body.append([line.label, *cells, _flatness(speeds)])
        paper = paper_figures(line.model) if grid.axis == "seq_len" else {}
        shown = {place: paper[place] for place in grid.places if place in paper}
        if shown:
            size = line.model.name.rsplit("-", 1)[-1]  # "385m" of "tnl-385m"
            name = f"*paper: {PAPER_NAMES[line.model.attention]}, {size}, A100 80G*"
            cells = [
                ("OOM" if shown[p] is None else f"{shown[p]:,}") if p in shown else "–" for p in grid.places
            ]
            body.append([name, *cells, _flatness({p: v for p, v in shown.items() if v is not None})])
    return markdown_table([grid.axis, *heads, "max/min"], body, numeric=True)


def _flatness(speeds: dict[Any, float]) -> str:
    """Largest over smallest speed: 1 for a speed that does not depend on the length."""
    return f"{max(speeds.values()) / min(speeds.values()):.3f}" if len(speeds) > 1 else "–"


def _matrix(grid: Grid, key: str, form: str) -> str:
    heads = [_place_text(place) for place in grid.places]
    body = [
        [line.label, *(_cell(line, place, line.values(key), form) for place in grid.places)]
        for line in grid.lines
    ]
    return markdown_table([grid.axis, *heads], body, numeric=True)


def _cell(line: Series, place: Any, values: dict[Any, float], form: str) -> str:
    if place in values:
        return form.format(values[place])
    return CELLS.get(line.rows[place]["status"], "–") if place in line.rows else "–"


def _place_text(place: Any) -> str:
    """A length as 1K, 128K; other places as they are."""
    return f"{place // 1024}K" if isinstance(place, int) and place % 1024 == 0 else str(place)


def _crossovers(grid: Grid) -> str:
    """Where each linear or hybrid model passes the softmax model of its size."""
    if grid.axis != "seq_len":
        return ""
    sentences = []
    for ours in grid.lines:
        for theirs in grid.lines:
            kind = attention_kind(ours.model)
            if kind not in ("lightning", "hybrid") or attention_kind(theirs.model) != "softmax":
                continue
            sizes = sorted(_body_parameters(line.model) for line in (ours, theirs))
            if ours.others == theirs.others and sizes[1] <= SAME_SIZE * sizes[0]:
                name = f"{ours.label} (hybrid)" if kind == "hybrid" else ours.label
                sentences.append(f"- {name} against {theirs.label}: {_crossover(ours, theirs)}")
    return "\n".join(["Crossover of speeds:", "", *sentences]) if sentences else ""


def _body_parameters(model: ModelConfig) -> int:
    """Parameters without the embedding, whose size follows the tokenizer."""
    return replace(model, vocab_size=1).num_parameters()


def _crossover(ours: Series, theirs: Series) -> str:
    """From which length on `ours` is faster, interpolated on log scales between measured lengths."""
    our_speeds, their_speeds = ours.values("tokens_per_second"), theirs.values("tokens_per_second")
    lengths = sorted(our_speeds.keys() & their_speeds.keys())
    if not lengths:
        return "no length measured for both."
    leads = [math.log(our_speeds[length] / their_speeds[length]) for length in lengths]
    if leads[-1] <= 0:
        return f"not faster up to {lengths[-1]:,} tokens."
    behind = [index for index, lead in enumerate(leads) if lead <= 0]
    if not behind:
        return f"faster at every length measured, from {lengths[0]:,} tokens on."
    low = behind[-1]
    share = leads[low] / (leads[low] - leads[low + 1])
    crossing = lengths[low] * (lengths[low + 1] / lengths[low]) ** share
    between = f"between {lengths[low]:,} and {lengths[low + 1]:,}"
    return f"faster from about {float(f'{crossing:.2g}'):,.0f} tokens on ({between}, interpolated)."


def plot(path: Path, grid: Grid, key: str, title: str) -> None:
    """Draw a column over the axis, one line per model, as PNG and SVG; crosses at the foot say OOM."""
    from matplotlib.ticker import NullLocator

    height = 5 + 0.18 * len(grid.lines)  # the legend is below
    figure, (axes,) = plots.new_figure(f"{grid.sweep.name}: {title}", height=height)
    numeric = _numbers(grid.places)
    num_lost = 0  # lines with a point out of memory so far
    for index, line in enumerate(grid.lines):
        values = line.values(key)
        style: dict[str, Any] = {"color": f"C{index}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
        x = [numeric[place] for place in grid.places if place in values]
        y = [values[place] for place in grid.places if place in values]
        axes.plot(x, y, marker="o", label=line.label, **style)
        lost = [numeric[place] for place, row in line.rows.items() if row["status"] == "oom"]
        if lost:
            at_foot = axes.get_xaxis_transform()
            axes.plot(lost, [0.02 + 0.03 * num_lost] * len(lost), "x", color=f"C{index}", transform=at_foot)
            num_lost += 1
    if num_lost:
        axes.plot([], [], "x", color="gray", label="out of memory (at the foot, in the line's color)")
    if grid.axis == "seq_len":
        plots.length_axis(axes)
    else:
        axes.set(xlabel=grid.axis, xscale="linear" if _categories(grid.places) else "log")
    axes.set_xticks(list(numeric.values()), [_place_text(place) for place in grid.places])
    axes.xaxis.set_minor_locator(NullLocator())
    if "loss" not in key:
        highest = max((value for line in grid.lines for value in line.values(key).values()), default=0)
        axes.set_ylim(0, 1.08 * highest or None)  # room above a flat line
    axes.set_ylabel(title)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    for suffix in (".png", ".svg"):
        plots.save(figure, path.with_suffix(suffix))


def _numbers(places: list) -> dict[Any, float]:
    """Where each place lies on the x axis: at its value, or evenly spaced if one is not a positive number."""
    if _categories(places):
        return {place: float(index) for index, place in enumerate(places)}
    return {place: float(place) for place in places}


def _categories(places: list) -> bool:
    try:
        return any(not float(place) > 0 for place in places)
    except ValueError:
        return True

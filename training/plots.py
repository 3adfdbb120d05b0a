"""Plots as image files, drawn without a display: those of a run, and what the plots of other reports share.

Every plot_ function takes plain values and the path to write. Losses are in nats per token.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from data.files import explain_write_errors, write_atomically

SMOOTHED_POINTS = 200  # a curve of more points is drawn faintly, with its running mean over it
DOTS_PER_INCH = 120
MAX_LINES = 10  # a plot of more lines can't be read: the last ones are drawn

Line = tuple[str, list[float], list[float]]  # label, x, y


def plot_loss(path: Path, train: Line, valid: Line) -> None:
    """Training and validation loss over tokens, on a logarithmic loss axis."""
    figure, (axes,) = new_figure("Loss")
    _curve(axes, train, "tab:blue")
    if valid[1]:
        axes.plot(valid[1], valid[2], "o-", color="tab:orange", label=valid[0], markersize=4)
    axes.set(ylabel="loss (nats per token)", yscale="log")
    plain_ticks(axes.yaxis)
    _token_axis(axes)
    axes.legend()
    save(figure, path)


def plot_optimization(path: Path, learning_rate: Line, gradient_norm: Line) -> None:
    """Learning rate, and below it the gradient's norm before clipping on a logarithmic axis."""
    figure, (above, below) = new_figure("Learning rate and gradient norm", num_rows=2)
    above.plot(learning_rate[1], learning_rate[2], color="tab:green")
    above.set(ylabel="learning rate", ylim=(0, None))
    _curve(below, gradient_norm, "tab:purple")
    below.set(ylabel="gradient norm", yscale="log")
    plain_ticks(below.yaxis)
    _token_axis(below)
    save(figure, path)


def plot_throughput(path: Path, speed: Line) -> None:
    """Training tokens per second over tokens."""
    figure, (axes,) = new_figure("Throughput")
    _curve(axes, speed, "tab:red")
    axes.set(ylabel="tokens per second", ylim=(0, None))
    plain_ticks(axes.yaxis)
    _token_axis(axes)
    save(figure, path)


def plot_layers(path: Path, grad_norms: list[Line], activation_rms: list[Line]) -> None:
    """Gradient norm and scale of the output of each layer over tokens, first to last layer."""
    from matplotlib import colormaps

    figure, panels = new_figure("Layers", num_rows=2)
    measured = (grad_norms, "gradient norm"), (activation_rms, "RMS of the output")
    for axes, (lines, label) in zip(panels, measured, strict=True):
        for index, (layer, x, y) in enumerate(lines):
            named = layer if index in (0, len(lines) - 1) else None
            axes.plot(x, y, color=colormaps["viridis"](index / len(lines)), label=named)
        axes.set(ylabel=label, yscale="log")
        plain_ticks(axes.yaxis)
        axes.legend(fontsize="small")
    _token_axis(panels[-1])
    save(figure, path)


def plot_perplexity_by_length(path: Path, lines: list[Line]) -> None:
    """Perplexity over sequence length, one line per checkpoint, data and window rule."""
    figure, (axes,) = new_figure("Perplexity by sequence length")
    _lines(axes, lines)
    least, most = axes.dataLim.intervaly
    axes.set(ylabel="perplexity per token", yscale="log" if most > 10 * least else "linear")
    plain_ticks(axes.yaxis)
    length_axis(axes)
    save(figure, path)


def plot_loss_by_position(path: Path, lines: list[Line], trained_seq_len: int | None) -> None:
    """Loss over context (tokens read, in powers of two), with a mark at the length trained on."""
    figure, (axes,) = new_figure("Loss by position in the window")
    _lines(axes, lines)
    axes.set(ylabel="loss (nats per token)")
    length_axis(axes, "context (tokens, up to)")
    if trained_seq_len:
        axes.axvline(trained_seq_len, color="gray", linestyle=":", label="training length")
    axes.legend(fontsize="small")
    save(figure, path)


def plot_perplexity_over_tokens(path: Path, lines: list[Line]) -> None:
    """Perplexity of a run's checkpoints over training tokens, one line per data, length and window rule."""
    figure, (axes,) = new_figure("Perplexity of checkpoints")
    _lines(axes, lines)
    axes.set(ylabel="perplexity per token", yscale="log")
    plain_ticks(axes.yaxis)
    _token_axis(axes)
    save(figure, path)


def _curve(axes, line: Line, color: str) -> None:
    label, x, y = line
    if len(x) <= SMOOTHED_POINTS:
        axes.plot(x, y, color=color, label=label)
        return
    width = len(x) // 50
    mean = np.convolve(y, np.ones(width) / width, mode="valid")
    axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(x[width - 1 :], mean, color=color, label=f"{label} (mean of {width} points)".strip())


def _lines(axes, lines: list[Line]) -> None:
    for label, x, y in lines[-MAX_LINES:]:
        axes.plot(x, y, "o-", label=label.replace("$", r"\$"), markersize=4)  # a $ would begin a formula
    axes.legend(fontsize="small")


def _token_axis(axes) -> None:
    """Training tokens along x, as 10M."""
    from matplotlib.ticker import EngFormatter

    axes.set(xlabel="training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


# What the plots of other reports use too.


def new_figure(
    title: str = "", num_rows: int = 1, num_columns: int = 1, height: float | None = None
) -> tuple[Any, list[Any]]:
    """A figure and the axes of its panels, row by row; panels below each other share their x axis."""
    from matplotlib.figure import Figure  # not pyplot: it keeps state and may want a display

    size = (1 + 6 * num_columns, height or 2.5 + 1.7 * num_rows)  # inches
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title)
    panels = list(figure.subplots(num_rows, num_columns, sharex="col", squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def length_axis(axes, label: str = "sequence length (tokens)") -> None:
    """Lengths along x, in powers of two."""
    axes.set(xlabel=label)
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis)


def plain_ticks(axis) -> None:
    """Label an axis with plain numbers; a logarithmic one between powers of ten too, where there is room."""
    from matplotlib.ticker import FuncFormatter, StrMethodFormatter

    def between_powers(value: float, _: int | None) -> str:
        low, high = axis.get_view_interval()
        has_room = high < 8 * low or f"{value:e}"[0] in "235"
        return f"{value:,.12g}" if has_room else ""

    axis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
    if axis.get_scale() == "log" and axis.get_transform().base == 10:
        axis.set_minor_formatter(FuncFormatter(between_powers))
        axis.set_tick_params(which="minor", labelsize="small")
        axis.grid(visible=True, which="minor", alpha=0.15)


def save(figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format that the path's suffix names."""
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=DOTS_PER_INCH)
    with explain_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, image.getvalue())

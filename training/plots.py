"""Plots of a run as PNG files, drawn without a display: curves over tokens, perplexity over length.

Every function takes plain values and the path to write. Losses are in nats per token.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.files import explain_write_errors, write_atomically

SMOOTHED_POINTS = 200  # a curve of more points is drawn faintly, with its running mean over it
MAX_LINES = 10  # a plot of more lines can't be read: the last ones are drawn

Line = tuple[str, list[float], list[float]]  # label, x, y


def plot_loss(path: Path, train: Line, valid: Line) -> None:
    """Training and validation loss over tokens, on a logarithmic loss axis."""

    def draw(axes) -> None:
        _curve(axes, train, "tab:blue")
        if valid[1]:
            axes.plot(valid[1], valid[2], "o-", color="tab:orange", label=valid[0], markersize=4)
        axes.set(xlabel="training tokens", ylabel="loss (nats per token)", yscale="log")
        plain_ticks(axes.yaxis)
        axes.legend()

    _save(path, "Loss", [draw])


def plot_optimization(path: Path, learning_rate: Line, gradient_norm: Line) -> None:
    """Learning rate, and below it the gradient's norm before clipping on a logarithmic axis."""

    def draw_rate(axes) -> None:
        axes.plot(learning_rate[1], learning_rate[2], color="tab:green")
        axes.set(ylabel="learning rate", ylim=(0, None))

    def draw_norm(axes) -> None:
        _curve(axes, gradient_norm, "tab:purple")
        axes.set(xlabel="training tokens", ylabel="gradient norm", yscale="log")
        plain_ticks(axes.yaxis)

    _save(path, "Learning rate and gradient norm", [draw_rate, draw_norm])


def plot_throughput(path: Path, speed: Line) -> None:
    """Training tokens per second over tokens."""

    def draw(axes) -> None:
        _curve(axes, speed, "tab:red")
        axes.set(xlabel="training tokens", ylabel="tokens per second", ylim=(0, None))

    _save(path, "Throughput", [draw])


def plot_layers(path: Path, grad_norms: list[Line], activation_rms: list[Line]) -> None:
    """Gradient norm and scale of the output of each layer over tokens, first to last layer."""
    from matplotlib import colormaps

    def draw(axes, lines: list[Line], label: str) -> None:
        for index, (layer, x, y) in enumerate(lines):
            named = layer if index in (0, len(lines) - 1) else None
            axes.plot(x, y, color=colormaps["viridis"](index / len(lines)), label=named)
        axes.set(xlabel="training tokens", ylabel=label, yscale="log")
        plain_ticks(axes.yaxis)
        axes.legend(fontsize="small")

    panels = [
        lambda axes: draw(axes, grad_norms, "gradient norm"),
        lambda axes: draw(axes, activation_rms, "RMS of the output"),
    ]
    _save(path, "Layers", panels)


def plot_perplexity_by_length(path: Path, lines: list[Line]) -> None:
    """Perplexity over sequence length, one line per checkpoint, data and window rule."""

    def draw(axes) -> None:
        _lines(axes, lines)
        axes.set(xlabel="sequence length (tokens)", ylabel="perplexity per token")
        axes.set_xscale("log", base=2)
        plain_ticks(axes.xaxis)

    _save(path, "Perplexity by sequence length", [draw])


def plot_loss_by_position(path: Path, lines: list[Line], trained_seq_len: int | None) -> None:
    """Loss over context (tokens read, in powers of two), with a mark at the length trained on."""

    def draw(axes) -> None:
        _lines(axes, lines)
        axes.set(xlabel="context (tokens, up to)", ylabel="loss (nats per token)")
        axes.set_xscale("log", base=2)
        plain_ticks(axes.xaxis)
        if trained_seq_len:
            axes.axvline(trained_seq_len, color="gray", linestyle=":", label="training length")
        axes.legend(fontsize="small")

    _save(path, "Loss by position in the window", [draw])


def plot_perplexity_over_tokens(path: Path, lines: list[Line]) -> None:
    """Perplexity of a run's checkpoints over training tokens, one line per data, length and window rule."""

    def draw(axes) -> None:
        _lines(axes, lines)
        axes.set(xlabel="training tokens", ylabel="perplexity per token", yscale="log")
        plain_ticks(axes.yaxis)

    _save(path, "Perplexity of checkpoints", [draw])


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


def plain_ticks(axis) -> None:
    """Label a logarithmic axis with plain numbers, also between powers of ten as far as there is room."""
    from matplotlib.ticker import FuncFormatter, StrMethodFormatter

    def between_powers(value: float, _: int | None) -> str:
        low, high = axis.get_view_interval()
        has_room = high < 8 * low or f"{value:e}"[0] in "235"
        return f"{value:,g}" if has_room else ""

    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if axis.get_transform().base == 10:
        axis.set_minor_formatter(FuncFormatter(between_powers))
        axis.set_tick_params(which="minor", labelsize="small")


def _save(path: Path, title: str, panels: list[Callable[[Any], None]]) -> None:
    from matplotlib.figure import Figure  # not pyplot: it keeps state and may want a display
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 2.5 + 1.7 * len(panels)), dpi=120, layout="constrained")
    figure.suptitle(title)
    all_axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
    for axes, draw in zip(all_axes, panels, strict=True):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        if axes.get_xlabel() == "training tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    image = io.BytesIO()
    figure.savefig(image, format="png")
    with explain_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, image.getvalue())

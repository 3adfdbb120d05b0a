"""A run that explains itself: report.md and plots/*.png out of what its folder holds.

In: config.yaml, metrics.jsonl, samples.jsonl, eval/*.json; any of them may be missing.
Out: report.md, which embeds the plots by relative path.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from data.files import explain_write_errors, write_atomically
from models.config import MAX_LAYERS
from training import plots
from training.config import CONFIG_DIR, compose, override
from training.errors import SettingError
from training.evaluation_results import (
    EVALUATION_COLUMNS,
    draw_evaluations,
    evaluation_rows,
    read_evaluations,
)
from training.metrics import is_number, read_metrics
from training.run_folder import RunFolder
from training.saved_config import flatten, load_saved_config, model_config_from
from training.tables import markdown_table
from training.train_config import TrainConfig

SHOWN_SAMPLES = 3
MAIN_SETTINGS = (
    "experiment",
    "seed",
    "seq_len",
    "batch_tokens",
    "max_steps",
    "optim.lr",
    "schedule.name",
    "data.source",
    "data.path",
    "tokenizer.kind",
    "engine.zero_stage",
    "engine.precision",
)


def write_run_report(folder: RunFolder) -> None:
    """Write report.md and the plots of a run, replacing earlier ones.

    Raises:
        SettingError: config.yaml is there but can't be read, or a file is a link.
        DataError: the folder can't be written, or a file can't belong to a run.
    """
    folder.check_links()
    config = _read_config(folder.config) if folder.config.exists() else {}
    metrics = read_metrics(folder.metrics)
    evaluations, unreadable = read_evaluations(folder)
    samples = _read_samples(folder.samples)
    drawn = draw_metrics(folder, metrics) + draw_evaluations(folder, evaluations, config.get("seq_len"))
    sections = [
        f"# {folder.path.resolve().name}",
        _summary(config, metrics),
        _figures(metrics),
        _settings(config),
        _plots(folder, drawn),
        _evaluations(evaluations, unreadable),
        _samples(samples),
        _next_steps(folder, config),
    ]
    with explain_write_errors(folder.path):
        write_atomically(folder.report, "\n\n".join(filter(None, sections)).encode() + b"\n")


def _read_config(path: Path) -> dict[str, Any]:
    """The run's settings; the settings that the report uses have been type-checked.

    Raises:
        SettingError: one has the wrong type.
    """
    config = load_saved_config(path)
    model_config_from(config, path)
    kinds = {"data.source": str, "max_steps": int, "sample_prompt": str, "seq_len": int}
    flat = flatten(config)
    wrong = [key for key, kind in kinds.items() if key in flat and type(flat[key]) is not kind]
    if wrong:
        raise SettingError(f"{path}: {wrong[0]} has the wrong type for a run's settings.")
    return config


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """Lines of samples.jsonl; one that a crash cut short is left out."""
    return [line for line in read_metrics(path) if isinstance(line.get("text"), str)]


def draw_metrics(folder: RunFolder, metrics: list[dict[str, Any]]) -> list[Path]:
    """Plot the training curves that the metrics hold; returns the files."""
    drawn = []
    loss, valid = _series(metrics, "loss", "training"), _series(metrics, "valid_loss", "validation")
    if loss[1]:
        drawn.append(folder.plots / "loss.png")
        plots.plot_loss(drawn[-1], loss, valid)
    rate, norm = _series(metrics, "lr"), _series(metrics, "grad_norm")
    if rate[1] and norm[1]:
        drawn.append(folder.plots / "optimization.png")
        plots.plot_optimization(drawn[-1], rate, norm)
    norms, scales = _layer_series(metrics, "layer_grad_norms"), _layer_series(metrics, "layer_activation_rms")
    if norms and scales:
        drawn.append(folder.plots / "layers.png")
        plots.plot_layers(drawn[-1], norms, scales)
    speed = _series(metrics, "tokens_per_second")
    if speed[1]:
        drawn.append(folder.plots / "throughput.png")
        plots.plot_throughput(drawn[-1], speed)
    return drawn


def _series(metrics: list[dict[str, Any]], key: str, label: str = "") -> plots.Line:
    points = [
        (line["tokens"], line[key])
        for line in metrics
        if is_number(line.get(key)) and is_number(line.get("tokens"))
    ]
    return label, [tokens for tokens, _ in points], [value for _, value in points]


def _layer_series(metrics: list[dict[str, Any]], key: str) -> list[plots.Line]:
    """One line a layer out of lists with a value a layer."""
    measured = [line for line in metrics if isinstance(line.get(key), list)]
    layers = range(min((len(line[key]) for line in measured), default=0))[:MAX_LAYERS]
    return [
        _series(
            [{"tokens": line.get("tokens"), key: line[key][layer]} for line in measured],
            key,
            f"layer {layer}",
        )
        for layer in layers
    ]


def _summary(config: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """What was run, in a sentence or two."""
    if not config and not metrics:
        return "Nothing has been trained here yet."
    text = "A training run"
    if config:
        model = model_config_from(config, Path("config.yaml"))
        size = f", {model.num_parameters():,} parameters" if model.vocab_size else ""
        data = flatten(config).get("data.source", "no data")
        text = f"{model.name} ({model.attention} attention{size}) on {data}"
    steps = [line for line in metrics if is_number(line.get("loss")) and is_number(line.get("tokens"))]
    if not steps:
        return f"{text}: no step has been logged yet."
    of_steps = f" of {config['max_steps']:,}" if "max_steps" in config else ""
    return f"{text}, after {steps[-1]['step']:,}{of_steps} steps and {steps[-1]['tokens']:,} tokens."


def _figures(metrics: list[dict[str, Any]]) -> str:
    """Table of each metric's last value; training loss is averaged, since one step sees few texts."""
    last: dict[str, Any] = {}
    for line in metrics:
        last |= {key: value for key, value in line.items() if is_number(value)}
    steps = [line for line in metrics if is_number(line.get("loss"))]
    tail = steps[-max(1, len(steps) // 10) :]
    loss_name = "training loss"
    if len(tail) > 1:
        last["loss"] = sum(line["loss"] for line in tail) / len(tail)
        loss_name += f", mean of {len(tail)} logged steps from {tail[0]['step']:,} on"
    shown = (
        (loss_name, "loss", "{:.4f} nats per token"),
        ("validation loss", "valid_loss", "{:.4f} nats per token"),
        ("validation perplexity", "valid_perplexity", "{:,.3f}"),
        ("validation bits per byte", "valid_bits_per_byte", "{:.4f}"),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
        ("model FLOPs utilization", "mfu", "{:.1%}"),
        ("step time", "step_ms", "{:,.1f} ms"),
        ("peak memory of a rank", "peak_memory_gib", "{:.2f} GiB"),
    )
    rows = [(name, form.format(last[key])) for name, key, form in shown if key in last]
    skipped = sum(bool(line.get("skipped")) for line in metrics)
    if skipped:
        rows.append(("steps skipped for a non-finite gradient", str(skipped)))
    return "## Final figures\n\n" + markdown_table(("figure", "value"), rows) if rows else ""


def _settings(config: dict[str, Any]) -> str:
    flat = flatten(config)
    rows = [(f"`{key}`", _quoted(flat[key])) for key in MAIN_SETTINGS if flat.get(key) is not None]
    if not rows:
        return ""
    return (
        "## Settings\n\n"
        + markdown_table(("setting", "value"), rows)
        + "\n\nAll: [config.yaml](config.yaml)."
    )


def _quoted(value: Any) -> str:
    """A setting as code in a line of Markdown."""
    return "`" + " ".join(str(value)[:200].replace("`", "'").split()) + "`"


def _plots(folder: RunFolder, drawn: list[Path]) -> str:
    """The plots, by paths relative to the report."""
    images = [
        f"![{path.stem.replace('_', ' ')}]({path.relative_to(folder.path).as_posix()})" for path in drawn
    ]
    return "## Curves\n\n" + "\n\n".join(images) if images else ""


def _evaluations(evaluations: list[dict[str, Any]], unreadable: list[str]) -> str:
    rows = [row for evaluation in evaluations for row in evaluation_rows(evaluation)]
    parts = ["## Evaluations", markdown_table(EVALUATION_COLUMNS, rows)] if rows else []
    parts += [f"`eval/{name}` can't be read: run its evaluation again." for name in unreadable]
    return "\n\n".join(parts)


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    blocks = []
    for sample in samples[-SHOWN_SAMPLES:]:
        text = f"{sample.get('prompt', '')}{sample['text']}"
        blocks.append(f"Step {sample['step']}:\n\n{fenced(text)}")
    return "## Samples\n\n" + "\n\n".join(blocks)


def fenced(text: str, language: str = "text") -> str:
    """A fenced block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _next_steps(folder: RunFolder, config: dict[str, Any]) -> str:
    path = shlex.quote(str(folder.path))
    prompt = shlex.quote(override("prompt", config.get("sample_prompt", "def ")))
    ways = {
        "Resume, or train longer with a larger max_steps:": _resume_command(folder, config),
        "Score it with all of each document in sight (at other lengths with `seq_lens=[512,2048]`, on other "
        "text with `data=text data.path=FILE`):": f"python eval.py checkpoint={path} window=streaming",
        "Generate text:": f"python -m scripts.generate checkpoint={path} {prompt}",
        "Export it for Hugging Face transformers:": (
            f"python -m scripts.export_hf checkpoint={path} output={path}-hf"
        ),
        "Write this report again:": f"python -m scripts.report run_dir={path}",
    }
    blocks = [f"{what}\n\n{fenced(command, 'sh')}" for what, command in ways.items()]
    return "## Next steps\n\n" + "\n\n".join(blocks)


def _resume_command(folder: RunFolder, config: dict[str, Any]) -> str:
    """The command that continues a run: its groups, and each setting that differs from their defaults."""
    flat = flatten(config)
    groups = {
        "model": flat.get("model.name"),
        "data": flat.get("data.source"),
        "tokenizer": flat.get("tokenizer.kind"),
        "schedule": flat.get("schedule.name"),
    }
    arguments = [override("run_dir", str(folder.path))]
    arguments += [
        f"{group}={choice}"
        for group, choice in groups.items()
        if re.fullmatch(r"\w[\w.-]*", str(choice)) and (CONFIG_DIR / group / f"{choice}.yaml").exists()
    ]
    paths = ("data.path", "data.name", "tokenizer.path")  # what some groups can't be composed without
    arguments += [override(key, flat[key]) for key in paths if flat.get(key)]
    try:
        defaults = flatten(compose(TrainConfig, arguments, "train"))
    except SettingError:
        arguments, defaults = arguments[:1], {}
    not_repeated = ["resume", "overwrite"]  # of that start: they would delete the run, or refuse to resume it
    not_repeated += ["model.vocab_size", "schedule.total_steps", "init_from", "experiment"]  # the run's stay
    arguments += [
        override(key, value)
        for key, value in flat.items()
        if key in defaults and key not in not_repeated and value != defaults[key]
    ]
    return " ".join(["python train.py", *map(shlex.quote, arguments)])

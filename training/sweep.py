"""A sweep: which training runs it consists of, and the status of each.

`SweepDefinition` (the YAML files in configs/sweep/) crosses models, sequence lengths and any other settings
into points, each one run of train.py. `Manifest` keeps their settings and results in sweep.json, so that the
same command after a stop runs only what is missing.
"""

from __future__ import annotations

import re
import shlex
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.files import explain_write_errors, read_json_object, write_json
from training.config import compose, split_setting, sweep_points
from training.errors import SettingError
from training.metrics import is_number, read_metrics
from training.micro_batch import check_micro_batch, sequences_per_rank
from training.run_folder import RunFolder
from training.train_config import TrainConfig

MANIFEST_LIMIT_BYTES = 4 * 2**20  # thousands of points; larger ones take long and much memory to parse
STATUSES = ("waiting", "running", "done", "oom", "failed", "stopped")
FINISHED = ("done", "oom", "failed")  # not run again unless asked for
MEASURED = ("tokens_per_second", "step_ms", "mfu", "peak_memory_gib", "loss", "valid_loss", "steps_measured")
STEP_NUMBERS = ("tokens_per_second", "step_ms", "peak_memory_gib")
MAY_GROW = ("models", "seq_lens", "cross")  # may get new points in a sweep that has begun

# Settings of train.py that a sweep sets itself, see `_point`.
OWNED = (
    "run_dir",
    "seq_len",
    "batch_tokens",
    "max_steps",
    "resume",
    "overwrite",
    "log_every",
    "eval_every",
    "save_every",
    "sample_every",
)


@dataclass(kw_only=True, slots=True)
class SweepDefinition:
    """The group `sweep`: everything that decides what is measured.

    Example:
        SweepDefinition(models=["tnl-tiny", "tnl-tiny model.attention=quadratic"], seq_lens=[256, 512])
    """

    name: str = "custom"  # for titles and the default run_dir
    models: list[str] = field(default_factory=list)  # each a model= choice, then settings of its own
    seq_lens: list[int] = field(default_factory=list)  # tokens
    batch_tokens: int = 131072  # tokens of an optimizer step, the same at every length
    micro_tokens: int | None = None  # tokens of a micro-step on each GPU, or one sequence; null: what fits
    steps: int = 30  # optimizer steps of each point
    skip_steps: int = 10  # first steps left out of speeds: compilation and warm-up
    engine: str = "zero1"  # engine= choice
    num_gpus: int = 1  # GPUs of a point; on a CPU its processes
    settings: list[str] = field(default_factory=list)  # of every point
    cross: list[str] = field(default_factory=list)  # "key=a,b": every value with every model and length
    evaluate: bool = False  # score the validation documents at the end
    save_every: int = 0  # 0: a point that is stopped starts again from its first step

    def __post_init__(self) -> None:
        for key in ("models", "seq_lens"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise SettingError(f"sweep.{key}={values} names a value twice.")
        if min(self.seq_lens, default=1) < 1:
            raise SettingError(f"sweep.seq_lens={self.seq_lens}: all must be at least 1.")
        for key in ("batch_tokens", "steps", "num_gpus"):
            if getattr(self, key) < 1:
                raise SettingError(f"sweep.{key}={getattr(self, key)} must be at least 1.")
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise SettingError(f"sweep.micro_tokens={self.micro_tokens} must be at least 1, or null.")
        if not 0 <= self.skip_steps < self.steps:
            raise SettingError(
                f"sweep.skip_steps={self.skip_steps} must be at least 0 and below sweep.steps={self.steps}."
            )
        if self.save_every < 0:
            raise SettingError(f"sweep.save_every={self.save_every} must be 0 (off) or more.")


@dataclass(slots=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: of its folder under points/; the same settings have the same name.
        label: the model and its own settings, a line in tables and plots.
        crossed: the crossed settings, key to value as text.
        settings: arguments of train.py, all but run_dir.
        config: what train.py makes of them.
    """

    name: str
    label: str
    seq_len: int
    crossed: dict[str, str]
    settings: list[str]
    config: TrainConfig

    @property
    def values(self) -> dict[str, str]:
        """`settings` by their keys."""
        return dict(map(split_setting, self.settings))


def expand(sweep: SweepDefinition) -> list[Point]:
    """All points: models, then crossed settings, then lengths.

    Raises:
        SettingError: a point that train.py would refuse, or a setting that belongs to the sweep.
    """
    for key in ("models", "seq_lens"):
        if not getattr(sweep, key):
            raise SettingError(f"sweep.{key} is empty: give at least one, as sweep.{key}=[...].")
    points = []
    for entry in sweep.models:
        model, *own = shlex.split(entry)
        label = " ".join([model, *(setting.removeprefix("model.") for setting in own)])
        for crossed in sweep_points(sweep.cross):
            for seq_len in sweep.seq_lens:
                chosen = [*sweep.settings, f"model={model}", *own, *crossed]
                points.append(_point(sweep, label, seq_len, crossed, chosen))
    names = [point.name for point in points]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise SettingError(f"sweep.models, sweep.cross: {doubled[0]} results from them twice.")
    return points


def _point(sweep: SweepDefinition, label: str, seq_len: int, crossed: list[str], chosen: list[str]) -> Point:
    for setting in chosen:
        key, _ = split_setting(setting)
        if key in OWNED:
            raise SettingError(
                f"{setting}: a sweep sets {key} of its points itself, from run_dir and sweep.seq_lens, "
                "batch_tokens, steps, evaluate, save_every. Leave it out."
            )
    settings = {
        "engine": sweep.engine,
        "seq_len": str(seq_len),
        "batch_tokens": str(sweep.batch_tokens),
        "max_steps": str(sweep.steps),
        "log_every": "1",
        "eval_every": str(sweep.steps if sweep.evaluate else 0),
        "save_every": str(sweep.save_every),
        "sample_every": "0",
        # a work-around: train.py evaluates at its last step whatever eval_every says; one token costs nothing
        **({} if sweep.evaluate else {"eval_tokens": "1"}),
        # without checkpoints a stopped point starts again; its measurements come from one process
        "resume": "auto" if sweep.save_every else "never",
        "overwrite": "false" if sweep.save_every else "true",
    }
    if sweep.micro_tokens is not None:
        tokens = min(sweep.micro_tokens, sweep.batch_tokens // sweep.num_gpus)
        settings["micro_batch_size"] = str(max(1, tokens // seq_len))
    settings |= dict(map(split_setting, chosen))
    arguments = [f"{key}={value}" for key, value in settings.items()]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", " ".join([label, *crossed, f"seq_len={seq_len}"]))
    try:
        config = compose(TrainConfig, arguments, "train")
        source = f" (of sweep.micro_tokens={sweep.micro_tokens} or sweep.settings)"
        check_micro_batch(config, sequences_per_rank(config, sweep.num_gpus), source)
    except SettingError as error:
        raise SettingError(f"sweep point {name}: {error}") from None
    return Point(name, label, seq_len, dict(map(split_setting, crossed)), arguments, config)


class Manifest:
    """sweep.json in the sweep's folder: the definition, and for each point its settings, status and result.

    A record holds `settings`, `status` (one of STATUSES), and once run `seconds`, `exit_code`, `device`,
    `commit`, `error` and `measured` (see `measure`).
    """

    def __init__(self, folder: Path, sweep: SweepDefinition, points: list[Point]) -> None:
        """Open the folder's manifest, or begin one; nothing is written before `save`.

        Raises:
            SettingError: the folder holds another sweep, and the text names what differs; or a link.
            DataError: the file is damaged.
        """
        self.path = folder / "sweep.json"
        self.definition = asdict(sweep)
        saved: dict[str, Any] = {}
        _check_links(folder)
        if self.path.exists():
            manifest = read_json_object(self.path, MANIFEST_LIMIT_BYTES)
            saved = _check_same_sweep(self.path, manifest, self.definition, points)
        self.records = {
            point.name: saved.get(point.name, {"settings": point.settings, "status": "waiting"})
            for point in points
        }

    def save(self) -> None:
        """Write the file, whole or not at all."""
        with explain_write_errors(self.path.parent):
            write_json(self.path, {"definition": self.definition, "points": self.records})

    def missing(self, points: list[Point], retry: list[str]) -> list[Point]:
        """The points that are not finished, and those whose status is in `retry`."""
        statuses = {name: record["status"] for name, record in self.records.items()}
        return [
            point for point in points if statuses[point.name] not in FINISHED or statuses[point.name] in retry
        ]


def _check_same_sweep(
    path: Path, manifest: dict[str, Any], definition: dict[str, Any], points: list[Point]
) -> dict[str, Any]:
    """The saved records, if the sweep is the one that was begun there, with or without new points."""
    old, records = manifest.get("definition"), manifest.get("points")
    if (
        not isinstance(old, dict)
        or not isinstance(records, dict)
        or not all(_is_record(record) for record in records.values())
    ):
        raise SettingError(f"{path}: not a sweep's manifest. Choose another run_dir, or delete the file.")
    settings = {point.name: point.settings for point in points}
    kept_all = all(settings.get(name) == record.get("settings") for name, record in records.items())
    differing = [
        f"sweep.{key}={definition[key]} (there: {str(old.get(key))[:200]})"
        for key in definition
        if definition[key] != old.get(key) and not (kept_all and key in MAY_GROW)
    ]
    if differing or not kept_all:
        what = "; ".join(differing) or "the settings of its points (a config has changed)"
        raise SettingError(
            f"{path.parent} holds a sweep with other settings: {what}. Points can only be added there: "
            "use its settings, or another run_dir."
        )
    return records


def _check_links(folder: Path) -> None:
    """Refuse links in a sweep's folder, which may come from elsewhere."""
    for path in (folder / "points", folder / "plots", *folder.glob("points/*")):
        if path.is_symlink():
            raise SettingError(
                f"{path} is a link: links in a sweep's folder are not followed. "
                "Replace it by what it leads to."
            )


def _is_record(record: Any) -> bool:
    """Whether a point's record holds what `Runner` writes, each value of the right type."""
    if not isinstance(record, dict) or record.get("status") not in STATUSES:
        return False
    measured = record.get("measured")
    texts = [record.get(key) for key in ("device", "commit", "error")]
    numbers = [record.get(key) for key in ("seconds", "exit_code")]
    if isinstance(measured, dict):
        speed: Any = measured.get("tokens_per_second")
        if set(measured) != set(MEASURED) or not (is_number(speed) and speed > 0):
            return False
        numbers += measured.values()
    return (
        (measured is not None or record["status"] != "done")
        and (measured is None or isinstance(measured, dict))
        and all(value is None or isinstance(value, str) for value in texts)
        and all(value is None or is_number(value) for value in numbers)
    )


def measure(folder: Path, sweep: SweepDefinition) -> dict[str, Any] | None:
    """A finished point's figures out of its metrics.jsonl, or None if it logged no step to time.

    Speeds are medians over the logged steps after the first `skip_steps`; `steps_measured` says how many.
    Memory is the largest of all; `loss` is that of the last step, None if the step was skipped or the loss is
    not finite, and `valid_loss`, if the sweep evaluates, that of the last evaluation.
    """
    lines = read_metrics(RunFolder(folder).metrics)
    steps = [line for line in lines if all(is_number(line.get(key)) for key in STEP_NUMBERS)]
    timed = [line for line in steps if line["step"] > sweep.skip_steps]
    if not timed:
        return None
    evaluations = [
        line["valid_loss"] for line in lines if is_number(line.get("valid_loss")) and sweep.evaluate
    ]
    skipped = {line["step"] for line in lines if line.get("skipped")}
    utilisations = [line["mfu"] for line in timed if is_number(line.get("mfu"))]
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timed),
        "step_ms": statistics.median(line["step_ms"] for line in timed),
        "mfu": statistics.median(utilisations) if utilisations else None,
        "peak_memory_gib": max(line["peak_memory_gib"] for line in steps),
        "loss": None if steps[-1]["step"] in skipped else steps[-1].get("loss"),
        "valid_loss": evaluations[-1] if evaluations else None,
        "steps_measured": len(timed),
    }

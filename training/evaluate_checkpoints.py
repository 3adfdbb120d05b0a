"""Perplexity of trained models: what `eval.py` does.

In: checkpoints, a text or prepared data, lengths and a window rule. Out: for each checkpoint and data a JSON
file in eval/ of the run folder (of the export or the lone checkpoint itself where there is no run), a table,
and plots of the run. A result that is there already, for the same weights, data and settings, is not computed
again. A point that fails leaves the results of the others as they are.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import explain_write_errors, write_atomically
from training.command import reader_may_leave
from training.distributed import World, process_group
from training.errors import SettingError
from training.evaluation import WINDOWS, evaluate, resolve_stride
from training.evaluation_results import (
    EVALUATION_COLUMNS,
    draw_evaluations,
    evaluation_rows,
    read_evaluation,
    read_evaluations,
)
from training.evaluation_text import Text, check_tokenizer, default_length, open_text
from training.metrics import finite
from training.out_of_memory import is_out_of_memory
from training.run_folder import RunFolder
from training.saved_config import load_saved_config
from training.tables import aligned_table
from training.weights import SavedModel, check_precision, find_models, identify, load_model

SCORING = 2  # counted up when the same settings would give other numbers, so that old results are not reused
SHOWN_PROBLEMS = 4
TIMEOUT_MINUTES = 240.0  # ranks may wait this long for one that has longer documents
WINDOW_RULES = {
    "disjoint": "windows of seq_len inputs that don't overlap, each from a fresh state",
    "strided": "overlapping windows of seq_len inputs; after the first, each scores its last stride targets",
    "streaming": "the state is carried over the document; seq_len, the chunk, matters by rounding only",
}
Evaluation = tuple[RunFolder, dict[str, Any]]  # where it belongs, and what its file holds


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """What to score, and how."""

    checkpoint: str | None = None  # run folder (its newest valid checkpoint), checkpoint, export, or a glob
    data: DataConfig | None = None  # null: the validation split of the run's own data
    tokenizer: TokenizerConfig | None = None  # null: the checkpoint's own; another one is refused
    seq_lens: list[int] | None = None  # tokens; null: the length that the run was trained on
    window: str = "disjoint"  # disjoint, strided or streaming
    stride: int | None = None  # strided: targets scored by a window; null: half of the length
    max_tokens: int = 0  # score the first so many tokens; 0 for all
    batch_tokens: int = 16384  # tokens of a forward pass (at least one window), and of a streamed chunk
    precision: str | None = None  # bf16 or fp32; null: as trained
    output: str | None = None  # also write the results to this JSON file

    def __post_init__(self) -> None:
        if self.seq_lens is not None and (not self.seq_lens or min(self.seq_lens) < 1):
            raise SettingError(f"seq_lens={self.seq_lens} must be lengths of at least 1, as [1024,8192].")
        if self.window not in WINDOWS:
            raise SettingError(f"window={self.window!r} is unknown. Allowed: {', '.join(WINDOWS)}.")
        if self.stride is not None and self.window != "strided":
            raise SettingError(f"stride={self.stride} needs window=strided.")
        if self.stride is not None and self.stride < 1:
            raise SettingError(f"stride={self.stride} must be at least 1, or null for half of seq_lens.")
        if self.max_tokens < 0:
            raise SettingError(f"max_tokens={self.max_tokens} must be 0 (all) or more.")
        if self.batch_tokens < 1:
            raise SettingError(f"batch_tokens={self.batch_tokens} must be at least 1.")
        check_precision(self.precision)
        if self.data is not None and self.data.valid_path:
            raise SettingError(
                f"data.valid_path={self.data.valid_path}: give the text to score as data.path."
            )


def evaluate_checkpoints(config: EvalConfig) -> int:
    """Score every checkpoint at every length, on all ranks together; prints a table; returns the exit code.

    Raises:
        SettingError: a wrong setting or file, or points that failed; the others have been printed and kept.
    """
    if config.checkpoint is None:
        raise SettingError("checkpoint is not set: give a run folder, a checkpoint, an export or a glob.")
    if config.output and Path(config.output).is_dir():
        raise SettingError(f"output={config.output} is a folder: give the name of a JSON file.")
    if config.output and not _can_be_written(Path(config.output)):
        raise SettingError(f"output={config.output} can't be written: choose another folder.")
    with process_group(TIMEOUT_MINUTES) as world:
        evaluations, problems = _evaluate_all(config, world)
        if world.is_first and evaluations:
            _show(config, evaluations)
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        if len(problems) > SHOWN_PROBLEMS:
            shown.append(f"and {len(problems) - SHOWN_PROBLEMS} more points failed.")
        raise SettingError("\n".join(shown))
    return 0


def _can_be_written(file: Path) -> bool:
    """Whether it, or what is there of the folders above it, lets itself be written."""
    there = next(path for path in (file, *file.absolute().parents) if path.exists())
    return os.access(there, os.W_OK)


def _evaluate_all(config: EvalConfig, world: World) -> tuple[list[Evaluation], list[str]]:
    """What was scored and what went wrong, the same on every rank."""

    def read(path: Path) -> tuple[SavedModel, Text]:
        saved = identify(path)
        saved.home.check_links()  # results are written there
        check_tokenizer(config.tokenizer, saved)
        return saved, open_text(config.data, saved, config.max_tokens, opened, world.log)

    paths = world.on_first(lambda: find_models(str(config.checkpoint), world.log))
    opened: dict[str, Text] = {}
    evaluations: list[Evaluation] = []
    problems: list[str] = []
    on_terminal = world.is_first and sys.stderr.isatty()
    with tqdm(total=0, unit="token", unit_scale=True, dynamic_ncols=True, disable=not on_terminal) as bar:
        for path in paths:
            try:
                saved, text = world.on_all(partial(read, path))
                content, failed = _evaluate_one(config, saved, text, world, bar)
            except SettingError as error:
                problems.append(str(error))
            else:
                evaluations += [(saved.home, content)] if content["results"] else []
                problems += failed
    return evaluations, problems


def _evaluate_one(
    config: EvalConfig, saved: SavedModel, text: Text, world: World, bar: tqdm
) -> tuple[dict[str, Any], list[str]]:
    """One model at every length, in the shape of its file, and the lengths that could not be scored."""
    results: list[dict[str, Any]] = []
    problems: list[str] = []
    evaluation = {
        "checkpoint": str(saved.path),
        "checkpoint_hash": saved.hash,
        "step": saved.step,
        "training_tokens": saved.tokens,
        "tokenizer": saved.tokenizer.fingerprint,
        "data": text.prepared.name,
        "data_fingerprint": text.prepared.fingerprint,
        "results": results,
    }
    not_kept = ""
    file, known = world.on_first(partial(_known_results, saved, evaluation))
    model = None
    for seq_len in config.seq_lens or [default_length(saved, text)]:
        settings = _point_settings(config, saved, seq_len)
        result = next((entry for entry in known if settings.items() <= entry.items()), None)
        if result is None:
            try:
                model = model or world.on_all(partial(_Guarded, saved.path, settings["precision"], world))
                bar.set_description(f"{saved.name}, {config.window} {seq_len}")
                result = settings | _score(model, text, settings, config.batch_tokens, world, bar)
            except SettingError as error:
                problems.append(str(error))
                continue
            known.append(result)
            try:
                world.on_first(partial(_write, file, evaluation | {"results": known}))
            except SettingError as error:  # a model on a read-only disk can be scored all the same
                not_kept = str(error)
        results.append(result)
    if not_kept and config.output is None:
        problems.append(f"{not_kept} Or give output=FILE: then they are kept there.")
    elif not_kept:
        world.log(f"results are kept in {config.output} only: {not_kept}")
    return evaluation, problems


def _point_settings(config: EvalConfig, saved: SavedModel, seq_len: int) -> dict[str, Any]:
    """All that a result depends on beside weights and data."""
    return {
        "seq_len": seq_len,
        "window": config.window,
        "stride": resolve_stride(seq_len, config.window, config.stride),
        "max_tokens": config.max_tokens,
        "precision": config.precision or saved.precision,
        "scoring": SCORING,
    }


class _Guarded:
    """A loaded model that runs out of memory without leaving the other ranks behind.

    From then on it answers with zeros, until `check` tells every rank.
    """

    def __init__(self, path: Path, precision: str, world: World) -> None:
        self._model = load_model(path, world.device, precision).model
        self._problem: str | None = None

    def __call__(self, tokens, targets, **settings):
        if self._problem is None:
            try:
                return self._model(tokens, targets, **settings)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._problem = "out of memory"
        zeros = torch.zeros(targets.shape)
        return (zeros, settings["state"]) if "state" in settings else zeros

    def check(self, point: str, world: World) -> None:
        """Raise on every rank if any of them has run out of memory."""
        failed = any(world.gather(self._problem is not None))
        self._problem = None
        if failed:
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
            raise SettingError(f"{point}: out of memory. Use a shorter length, or a smaller batch_tokens.")


def _score(
    model: _Guarded, text: Text, settings: dict[str, Any], batch_tokens: int, world: World, bar: tqdm
) -> dict[str, Any]:
    """One point as it goes into the file."""
    bar.total += sum(len(document.ids) - 1 for document in text.documents)
    result = evaluate(
        model,
        text.documents,
        settings["seq_len"],
        world,
        window=settings["window"],
        stride=settings["stride"],
        batch_tokens=batch_tokens,
        progress=bar.update,
    )
    point = f"seq_lens={settings['seq_len']}"
    model.check(point, world)
    if not math.isfinite(result.loss):
        raise SettingError(
            f"{point}: the loss is {result.loss}. The model's weights or activations diverged."
        )
    return {key: finite(value) for key, value in asdict(result).items()}  # perplexity may be infinite


def _known_results(saved: SavedModel, evaluation: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
    """The file for these results, and those of the same weights and data that it holds.

    It is eval/<step>-<data>.json; where that is of other data of the same name, a fingerprint is appended.
    A damaged one is written anew.
    """
    file = saved.home.evaluations / f"{saved.name}-{evaluation['data']}.json"
    earlier = read_evaluation(file) or {}
    if earlier and earlier.get("data_fingerprint") != evaluation["data_fingerprint"]:
        file = file.with_name(f"{file.stem}-{evaluation['data_fingerprint'][:8]}.json")
        earlier = read_evaluation(file) or {}
    same = all(earlier.get(key) == evaluation[key] for key in ("checkpoint_hash", "data_fingerprint"))
    return file, earlier["results"] if same else []


def _write(file: Path, content: Any) -> None:
    with explain_write_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())


def _show(config: EvalConfig, evaluations: list[Evaluation]) -> None:
    """Print the table, write `output`, and draw the plots of each run."""
    homes = {home.path: home for home, _ in evaluations}
    rows = []
    for home, content in evaluations:
        name = home.path.name
        for first, *others in evaluation_rows(content):
            rows.append((f"{name} {first}" if len(homes) > 1 and first != name else first, *others))
    with reader_may_leave():
        print(f"window={config.window}: {WINDOW_RULES[config.window]}")
        print(aligned_table(EVALUATION_COLUMNS, rows))
    contents = [content for _, content in evaluations]
    if config.output:
        _write(Path(config.output), contents if len(contents) > 1 else contents[0])
    for home in homes.values():
        saved = load_saved_config(home.config) if home.config.exists() else {}
        try:
            draw_evaluations(home, read_evaluations(home)[0], saved.get("seq_len"))
        except DataError as error:
            print(f"no plots: {error}", file=sys.stderr)

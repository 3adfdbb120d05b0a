"""Trained models from files: a run folder, one checkpoint, a glob of them, an import or an export."""

from __future__ import annotations

import glob
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.config import TokenizerConfig
from data.tokenizer import Tokenizer, load_tokenizer
from models.config import ModelConfig
from models.transnormer import TransNormer
from training.checkpoint import MANIFEST_HASH, Checkpoint, CheckpointError, newest_checkpoint, open_checkpoint
from training.errors import SettingError
from training.model_folder import ModelFolder, is_model_folder, open_model_folder
from training.run_folder import RunFolder
from training.saved_config import load_saved_config, model_config_from
from training.state import saved_tokens

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(kw_only=True, slots=True)
class SavedModel:
    """A trained model as its files describe it, without its weights.

    Attributes:
        path: of the checkpoint, import or export.
        source: the opened checkpoint or model folder; its weights are neither read nor verified.
        home: the run folder around it; its own folder if it lies in none.
        step, tokens: of its training; None for an import or export.
        settings: the saved settings of its run; of an import or export, empty.
        precision: "bf16" or "fp32", what it was trained in; of an import or export, what it is stored in.
    """

    path: Path
    source: Checkpoint | ModelFolder
    home: RunFolder
    step: int | None = None
    tokens: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """What its files of results begin with."""
        return self.path.resolve().name if self.step is None else f"step_{self.step:08d}"

    @property
    def hash(self) -> str:
        """Equal for equal weights and settings; of an import or export all its files are read."""
        return self.source.hash

    @property
    def tokenizer_path(self) -> Path:
        return self.path if self.step is None else self.path / "tokenizer"


@dataclass(kw_only=True, slots=True)
class TrainedModel(SavedModel):
    """A SavedModel with its weights loaded: it can be scored, sampled, exported or trained on."""

    model: TransNormer


def check_precision(precision: str | None) -> None:
    """Refuse an unknown precision."""
    if precision not in (None, *PRECISIONS):
        raise SettingError(f"precision={precision!r} is unknown. Allowed: {', '.join(PRECISIONS)}, null.")


def find_model(spec: str | None, key: str = "checkpoint") -> Path:
    """The folder of the one model that `checkpoint=` names; what is passed over is told on stderr.

    Raises:
        SettingError: it is not set, or names several.
        CheckpointError: as find_models.
    """
    if spec is None:
        raise SettingError(f"{key} is not set: give a run folder, a checkpoint or an export.")
    found = find_models(spec, partial(print, file=sys.stderr), key)
    if len(found) > 1:
        raise SettingError(f"{key}={spec} names {len(found)} models: give one.")
    return found[0]


def find_models(spec: str, log: Callable[[str], None], key: str = "checkpoint") -> list[Path]:
    """Folders that `checkpoint=` names: a run's newest valid checkpoint, a checkpoint, an export, or a glob.

    Args:
        key: the setting that `spec` is the value of.

    Raises:
        CheckpointError: nothing there that can be loaded; of a glob's matches the others are left out.
    """
    path = Path(spec)
    if any(mark in spec for mark in "*?[") and not path.exists():
        return _find_matches(spec, log, key)
    if not path.is_dir():
        raise CheckpointError(f"{key}={spec}: no such folder. Give a run folder, a checkpoint or an export.")
    run = RunFolder(path)
    if run.checkpoints.is_dir():
        try:
            newest = newest_checkpoint(run.checkpoints, log)
        except CheckpointError as error:
            raise CheckpointError(f"{key}={spec}: {error}") from None
        if newest is not None:
            return [newest.folder]
        if not is_model_folder(path):
            raise CheckpointError(f"{key}={spec}: the run holds no checkpoint yet.")
    if any((path / name).exists() for name in (MANIFEST_HASH, "state.json")) or is_model_folder(path):
        return [path]
    if path.name == run.checkpoints.name and any(path.glob("step_*")):
        raise CheckpointError(f"{key}={spec} holds a run's checkpoints: give the run, {path.parent}, or one.")
    raise CheckpointError(f"{key}={spec}: neither a run folder nor a checkpoint nor an export.")


def _find_matches(spec: str, log: Callable[[str], None], key: str) -> list[Path]:
    """The models among what a glob matches."""
    found: list[Path] = []
    problems: list[str] = []
    for path in sorted(glob.glob(spec)):
        try:
            found += find_models(path, log, key) if Path(path).is_dir() else []
        except CheckpointError as error:
            problems.append(str(error))
    if not found:
        raise CheckpointError(problems[0] if problems else f"{key}={spec}: no file or folder matches.")
    for problem in problems:
        log(f"left out: {problem}")
    return found


def identify(path: Path) -> SavedModel:
    """Read what a checkpoint, import or export says about itself; its weights are not verified.

    Raises:
        CheckpointError, SettingError: it is incomplete or damaged.
    """
    if is_model_folder(path):
        folder, home = open_model_folder(path), RunFolder(path)
        precision = "bf16" if folder.dtype == "bfloat16" else "fp32"
        return SavedModel(
            path=path, source=folder, home=home, precision=precision, tokenizer=load_tokenizer(path)
        )
    home = RunFolder(path.parent.parent if path.parent.name == "checkpoints" else path)
    checkpoint = open_checkpoint(path, verify=False)
    settings = load_saved_config(path / "config.yaml")
    return SavedModel(
        path=path,
        source=checkpoint,
        home=home,
        step=checkpoint.step,
        tokens=saved_tokens(checkpoint),
        settings=settings,
        precision=saved_precision(settings, path),
        tokenizer=load_tokenizer(path / "tokenizer"),
    )


def load_model(path: Path, device: torch.device | str = "cpu", precision: str | None = None) -> TrainedModel:
    """Load a checkpoint's fp32 master weights, or an import's or export's weights, in eval mode.

    Args:
        precision: "bf16" or "fp32"; None takes that of the files. LRPE's frequencies stay fp32.

    Raises:
        CheckpointError: damaged, or of another model than its settings say.
    """
    saved = identify(path)
    if isinstance(saved.source, ModelFolder):
        model = build_model(saved.source.config, saved.source.weights(), path)
        if saved.tokenizer.vocab_size > model.lm_head.out_features:
            raise CheckpointError(
                f"{path}: the tokenizer has {saved.tokenizer.vocab_size} ids, config.json a vocab_size of "
                f"{model.lm_head.out_features}. They belong to different models."
            )
    else:
        config = model_config_from(saved.settings, path / "config.yaml")
        model = build_model(replace(config, backend="auto"), open_checkpoint(path).weights(), path)
    model.to(device=device, dtype=PRECISIONS[precision or saved.precision]).eval()
    return TrainedModel(**{f.name: getattr(saved, f.name) for f in fields(saved)}, model=model)


def saved_precision(settings: dict, path: Path) -> str:
    """What a checkpoint's run computed in: "bf16" or "fp32"."""
    engine = settings.get("engine")
    precision = engine.get("precision") if isinstance(engine, dict) else None
    if precision not in tuple(PRECISIONS):
        raise CheckpointError(f"{path / 'config.yaml'}: engine.precision is {str(precision)[:40]!r}.")
    return precision


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor], where: Path) -> TransNormer:
    """A model with these weights, fp32 on the CPU.

    Raises:
        CheckpointError: names keys and shapes that don't fit the settings.
    """
    check_size(config, {name: tuple(weight.shape) for name, weight in weights.items()}, where)
    model = TransNormer(config)
    copy_weights(model, weights, where)
    return model


def check_size(config: ModelConfig, shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """Refuse settings of a model of quite another size than the weights, before it is built."""
    stored = sum(map(math.prod, shapes.values()))
    if config.num_layers > len(shapes) or not 1 / 2 <= stored / max(config.num_parameters(), 1) <= 2:
        raise CheckpointError(
            f"{where}: its settings describe a model of another size than the {stored:,} weights in it."
        )


def copy_weights(model: TransNormer, weights: Mapping[str, torch.Tensor], where: Path) -> None:
    """Give a model these weights, after check_weights."""
    check_weights(model, {name: tuple(weight.shape) for name, weight in weights.items()}, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def check_weights(model: TransNormer, shapes: dict[str, tuple[int, ...]], where: Path) -> None:
    """Refuse weights that are missing, unknown or of another shape than the model's."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{where} does not fit the model: {shown}.")


def find_initial_model(spec: str, tokenizer: TokenizerConfig) -> Path:
    """The folder of the model that `init_from=` names.

    Raises:
        CheckpointError: none there, or these settings can't give its tokenizer: said before they are used.
    """
    path = find_model(spec, "init_from")
    saved = identify(path)
    other_kind = tokenizer.kind not in ("file", saved.tokenizer.kind)
    other_size = tokenizer.kind == "sentencepiece" and tokenizer.vocab_size != saved.tokenizer.vocab_size
    if other_kind or other_size:
        raise _other_tokenizer(saved)
    return path


def _other_tokenizer(saved: SavedModel) -> CheckpointError:
    return CheckpointError(
        f"init_from: {saved.path} has another tokenizer: "
        f"use tokenizer=file tokenizer.path={saved.tokenizer_path}."
    )


def load_initial_weights(model: TransNormer, path: Path, tokenizer: Tokenizer) -> None:
    """Start a run from the trained weights at `path`; the tokenizer must be theirs.

    Raises:
        CheckpointError: another architecture, or another tokenizer.
    """
    trained = load_model(path, precision="fp32")
    if trained.tokenizer.fingerprint != tokenizer.fingerprint:
        raise _other_tokenizer(trained)
    try:
        copy_weights(model, dict(trained.model.named_parameters()), path)
    except CheckpointError as error:
        raise CheckpointError(f"init_from, a {trained.model.config.name}: {error}") from None

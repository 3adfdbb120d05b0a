"""Trained models from files: a run folder, one checkpoint, a glob of them, an import or an export."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data.tokenizer import Tokenizer, load_tokenizer
from models.config import ModelConfig
from models.transnormer import TransNormer
from training.checkpoint import (
    MANIFEST,
    CheckpointError,
    newest_checkpoint,
    open_checkpoint,
)
from training.config import load_saved_config, model_config_from
from training.model_folder import is_model_folder, open_model_folder
from training.run_folder import RunFolder
from training.state import saved_tokens


@dataclass(slots=True)
class TrainedModel:
    """A model that can be scored, sampled, exported or trained on.

    Attributes:
        path: the checkpoint or export it came from.
        run_dir: the run folder around it, if it lies in one; an import or export is its own.
        step: optimizer steps; None for an import or export.
        settings: the saved settings of its run (config.yaml); of an import or export model and precision.
        hash: equal for equal weights and settings.
    """

    model: TransNormer
    tokenizer: Tokenizer
    path: Path
    run_dir: Path | None
    step: int | None
    tokens: int | None
    settings: dict
    hash: str


def find_models(spec: str, log: Callable[[str], None] = print, key: str = "checkpoint") -> list[Path]:
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
        if newest is None:
            raise CheckpointError(f"{key}={spec}: the run holds no checkpoint yet.")
        return [newest.folder]
    if (path / MANIFEST).exists() or (path / "state.json").exists() or is_model_folder(path):
        return [path]
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


def load_model(path: Path, device: torch.device | str = "cpu", precision: str | None = None) -> TrainedModel:
    """Load a checkpoint's fp32 master weights, or an import's or export's weights, in eval mode.

    Args:
        precision: "bf16" or "fp32"; None takes what the run was trained in, or what an import or export is
            stored in. LRPE's frequencies stay fp32.

    Raises:
        CheckpointError: damaged, or of another model than its settings say.
    """
    if is_model_folder(path):
        return _load_model_folder(path, device, precision)
    checkpoint = open_checkpoint(path)
    settings = load_saved_config(path / "config.yaml")
    config = replace(model_config_from(settings, path / "config.yaml"), backend="auto")  # of this machine
    model = build_model(config, checkpoint.weights(), path)
    _prepare(model, device, precision or saved_precision(settings, path))
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else None
    return TrainedModel(
        model=model,
        tokenizer=load_tokenizer(path / "tokenizer"),
        path=path,
        run_dir=run_dir,
        step=checkpoint.step,
        tokens=saved_tokens(checkpoint),
        settings=settings,
        hash=checkpoint.hash,
    )


def saved_precision(settings: dict, path: Path) -> str:
    """What a checkpoint's run computed in: "bf16" or "fp32"."""
    engine = settings.get("engine")
    precision = engine.get("precision") if isinstance(engine, dict) else None
    if precision not in ("bf16", "fp32"):
        raise CheckpointError(f"{path / 'config.yaml'}: engine.precision is {str(precision)[:40]!r}.")
    return precision


def _load_model_folder(path: Path, device: torch.device | str, precision: str | None) -> TrainedModel:
    folder = open_model_folder(path)
    tokenizer = load_tokenizer(path)
    model = build_model(folder.config, folder.weights(), path)
    if tokenizer.vocab_size > model.lm_head.out_features:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, config.json a vocab_size of "
            f"{model.lm_head.out_features}. They belong to different models."
        )
    stored = "bf16" if folder.dtype == "bfloat16" else "fp32"
    _prepare(model, device, precision or stored)
    return TrainedModel(
        model=model,
        tokenizer=tokenizer,
        path=path,
        run_dir=path,
        step=None,
        tokens=None,
        settings={"model": asdict(folder.config), "engine": {"precision": stored}},
        hash=folder.hash,
    )


def _prepare(model: TransNormer, device: torch.device | str, precision: str) -> None:
    model.to(device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32).eval()


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor], where: Path) -> TransNormer:
    """A model with these weights, fp32 on the CPU.

    Raises:
        CheckpointError: names keys and shapes that don't fit the settings.
    """
    stored = sum(tensor.numel() for tensor in weights.values())
    if config.num_layers > len(weights) or not 1 / 2 <= stored / max(config.num_parameters(), 1) <= 2:
        raise CheckpointError(  # before a model of any size is built; check_weights is exact
            f"{where}: its settings describe a model of another size than the {stored:,} weights in it."
        )
    model = TransNormer(config)
    check_weights(model, {name: tuple(tensor.shape) for name, tensor in weights.items()}, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


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


def load_initial_weights(model: TransNormer, spec: str, tokenizer: Tokenizer) -> None:
    """Start a run from trained weights (`init_from=`); the tokenizer must be theirs.

    Raises:
        CheckpointError: another architecture, or another tokenizer.
    """
    source = find_models(spec, key="init_from")[-1]
    trained = load_model(source, precision="fp32")
    if trained.tokenizer.fingerprint != tokenizer.fingerprint:
        where = source if is_model_folder(source) else source / "tokenizer"
        raise CheckpointError(
            f"init_from={spec} has another tokenizer: use tokenizer=file tokenizer.path={where}."
        )
    weights = dict(trained.model.named_parameters())
    check_weights(model, {name: tuple(weight.shape) for name, weight in weights.items()}, source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])

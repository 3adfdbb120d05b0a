"""Load a checkpoint at any number of ranks and ZeRO stage, and compare every bit of the state with its files.

    deepspeed --module scripts.check_loading checkpoint=outputs/x zero_stage=3
    python -m scripts.check_loading checkpoint=outputs/x/checkpoints/step_00001000

Compared are the fp32 weights, their moments, and below stage 3 the weights used in compute. Exit 0 if all are
equal, 1 if not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from models.transnormer import TransNormer
from training.checkpoint import Checkpoint, open_checkpoint
from training.command import run_command
from training.distributed import World, process_group
from training.engine import Engine
from training.errors import SettingError
from training.model_folder import is_model_folder
from training.optimizer import OptimConfig
from training.saved_config import load_saved_config, model_config_from
from training.train_config import EngineConfig, TrainConfig
from training.weights import check_size, check_weights, find_model, saved_precision


@dataclass(kw_only=True, slots=True)
class CheckLoadingConfig:
    """What to load, and how."""

    checkpoint: str | None = None  # a run folder (its newest valid checkpoint) or a checkpoint
    zero_stage: int = 1  # to load it at: 0, 1, 2 or 3


def main(config: CheckLoadingConfig) -> int:
    """Load, compare, and say what came out on the first rank; 0 if every bit is equal."""
    path = find_model(config.checkpoint)
    if is_model_folder(path):
        raise SettingError(f"checkpoint={path} is an import or export, which holds weights alone.")
    with process_group(timeout_minutes=5) as world:
        checkpoint = open_checkpoint(path, verify=False)
        engine, precision = _engine(checkpoint, config.zero_stage, world)
        engine.load(checkpoint.read, 1)
        differing, num_values = _compare(engine, checkpoint)
        differing = [name for names in world.gather(differing) for name in names]
        total = int(world.sum([float(num_values)])[0])
        expected = sum(math.prod(checkpoint.shapes[name]) for _, name in checkpoint.fragments)
        if total != expected:
            differing.append(f"{expected - total:,} values that no rank holds")
        if world.is_first:
            where = f"{checkpoint.folder} on {world.size} rank(s), ZeRO {config.zero_stage}, {precision}"
            verdict = f"differs in {', '.join(differing[:5])}" if differing else "equal bit for bit"
            print(f"{where}: {total:,} values, {verdict}")
        engine.close()
        return 1 if differing else 0


def _engine(checkpoint: Checkpoint, zero_stage: int, world: World) -> tuple[Engine, str]:
    """An engine for the checkpoint's model, and its precision."""
    path = checkpoint.folder / "config.yaml"
    saved = load_saved_config(path)
    precision = saved_precision(saved, path.parent)
    engine = EngineConfig(zero_stage=zero_stage, precision=precision, compile="false")
    optim = saved.get("optim")
    optim = OptimConfig(name=str(optim.get("name") if isinstance(optim, dict) else optim))
    config = TrainConfig(model=model_config_from(saved, path), engine=engine, optim=optim)
    check_size(config.model, checkpoint.shapes, checkpoint.folder)
    model = TransNormer(config.model)
    check_weights(model, checkpoint.shapes, checkpoint.folder)
    return Engine(model, config, world, accumulation_steps=1, micro_batch_size=1), engine.precision


def _compare(engine: Engine, checkpoint: Checkpoint) -> tuple[list[str], int]:
    """Names of tensors on this rank that differ from the files, and how many values this rank holds alone."""
    differing = []
    for fragment in engine.fragments():
        for kind, tensor in fragment.tensors.items():
            saved = checkpoint.read(fragment.name, kind, fragment.start, tensor.numel())
            if not torch.equal(tensor.cpu(), saved):
                differing.append(f"{kind} of {fragment.name}")
    if engine.stage < 3:
        for name, p in engine.model.named_parameters():
            saved = checkpoint.read(name, "param", 0, p.numel()).view_as(p).to(p.dtype)
            if not torch.equal(p.detach().cpu(), saved):
                differing.append(f"compute weights of {name}")
    num_values = sum(
        tensor.numel() for fragment in engine.fragments_to_save() for tensor in fragment.tensors.values()
    )
    return differing, num_values


if __name__ == "__main__":
    run_command(main, CheckLoadingConfig, __doc__)

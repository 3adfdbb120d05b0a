"""Optimizer, its parameter groups, and the learning-rate schedule.

A schedule is a pure function of the step, so nothing of it needs saving.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from training.adamw_8bit import AdamW8bit
from training.errors import SettingError
from training.muon import MuonAdamW, is_block_matrix


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon for the matrices of the blocks; one learning rate for all."""

    name: str = "adamw"  # adamw_8bit: moments in a quarter of the memory; muon: without offloading
    lr: float | None = None  # peak; null: by the optimizer and the model's width
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # Muon's
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms and LRPE's frequencies have none
    grad_clip: float = 1.0  # largest global gradient norm; 0 switches clipping off

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "adamw_8bit", "muon"):
            raise SettingError(f"optim.name={self.name!r} is unknown. Allowed: adamw, adamw_8bit, muon.")
        for key in ("lr", "eps"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise SettingError(f"optim.{key}={value} must be above 0.")
        for key in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise SettingError(f"optim.{key}={getattr(self, key)} must be at least 0 and below 1.")
        for key in ("weight_decay", "grad_clip"):
            if getattr(self, key) < 0:
                raise SettingError(f"optim.{key}={getattr(self, key)} must not be negative.")


# Peak learning rate at a hidden size of 512, and the power of the width by which it falls, drawn through the
# best of sweeps at widths of 128 to 1,024 (docs/results.md). Muon's updates have the same root mean square at
# every width, so that their spectral norm grows with its root.
BASE_WIDTH = 512
DEFAULT_LR = {"adamw": (2e-3, 2 / 3), "adamw_8bit": (2e-3, 2 / 3), "muon": (5e-3, 1 / 2)}


def default_lr(optimizer: str, hidden_size: int) -> float:
    """The peak learning rate where none is set, to two digits."""
    base, power = DEFAULT_LR[optimizer]
    return float(f"{base * (BASE_WIDTH / hidden_size) ** power:.1e}")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then cosine, constant, or warm-up–stable–decay (wsd)."""

    name: str = "cosine"  # or wsd, constant
    warmup_steps: int = 1000  # capped at a tenth of total_steps
    total_steps: int | None = None  # length of the shape; null takes max_steps of the first start
    min_lr_ratio: float = 0.1  # share of the peak that is reached when all steps are taken
    decay_fraction: float = 0.2  # wsd: share of the steps that decays
    ramp_steps: int = 0  # steps in which the lengths below double, stage by stage, to those of the run
    ramp_seq_len: int | None = None  # first length to which sequences are cut; null: seq_len throughout
    ramp_batch_tokens: int | None = None  # first tokens per optimizer step; null: batch_tokens throughout

    def __post_init__(self) -> None:
        if self.name not in ("cosine", "wsd", "constant"):
            raise SettingError(f"schedule.name={self.name!r} is unknown. Allowed: cosine, wsd, constant.")
        if self.warmup_steps < 0:
            raise SettingError(f"schedule.warmup_steps={self.warmup_steps} must not be negative.")
        if self.total_steps is not None and self.total_steps < 1:
            raise SettingError(f"schedule.total_steps={self.total_steps} must be at least 1, or null.")
        if self.ramp_steps < 0:
            raise SettingError(f"schedule.ramp_steps={self.ramp_steps} must be 0 (off) or more.")
        if not self.ramp_steps and (self.ramp_seq_len or self.ramp_batch_tokens):
            raise SettingError(
                "schedule.ramp_seq_len and ramp_batch_tokens need schedule.ramp_steps above 0."
            )
        if self.ramp_steps and self.ramp_seq_len is None and self.ramp_batch_tokens is None:
            raise SettingError(
                f"schedule.ramp_steps={self.ramp_steps} has nothing to ramp: set schedule.ramp_seq_len or "
                "schedule.ramp_batch_tokens, or schedule.ramp_steps=0."
            )
        for key in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise SettingError(f"schedule.{key}={getattr(self, key)} must lie between 0 and 1.")


def lr_factor(config: ScheduleConfig, step: int) -> float:
    """Share of the peak learning rate at `step` (from 0). `config.total_steps` must be set."""
    total = config.total_steps
    assert total is not None
    warmup = min(config.warmup_steps, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    decay_steps = total - warmup
    if config.name == "wsd":
        decay_steps = min(decay_steps, round(config.decay_fraction * total))
        if decay_steps == 0:
            return 1.0
    progress = min(max(step - (total - decay_steps), 0) / max(decay_steps, 1), 1.0)
    if config.name == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def learning_rate(optim: OptimConfig, schedule: ScheduleConfig, step: int) -> float:
    """The learning rate at `step` (from 0). `optim.lr` and `schedule.total_steps` must be set."""
    assert optim.lr is not None
    return optim.lr * lr_factor(schedule, step)


def ramped(config: ScheduleConfig, first: int | None, last: int, step: int) -> int:
    """The value at `step` of what grows from `first` to `last`, a power of two times as much, by doubling.

    The steps of the ramp are shared equally among the values before `last`. None for `first` means `last`.
    """
    if first is None or step >= config.ramp_steps:
        return last
    num_doublings = (last // first).bit_length() - 1
    return first << (step * num_doublings // config.ramp_steps)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Weight decay on matrices (Muon's, if any, in a group of their own), none on vectors and frequencies."""
    named = list(model.named_parameters())
    of_blocks = {name for name, p in named if config.name == "muon" and is_block_matrix(name, p)}
    matrices = [p for name, p in named if p.ndim == 2 and name not in of_blocks]
    groups = [
        {"params": [p for name, p in named if name in of_blocks], "weight_decay": config.weight_decay},
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim != 2], "weight_decay": 0.0},
    ]
    for index, group in enumerate(groups):
        group["muon"] = index == 0
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters; the loop sets the learning rate before every step.

    Args:
        config: without a learning rate, the optimizer's is 0 until it is set.
        dtype: of Muon's matrix products.
    """
    groups = parameter_groups(model, config)
    lr, betas = config.lr or 0.0, (config.beta1, config.beta2)
    if config.name == "muon":
        momentum = config.momentum
        return MuonAdamW(groups, lr=lr, momentum=momentum, betas=betas, eps=config.eps, dtype=dtype)
    if config.name == "adamw_8bit":
        return AdamW8bit(groups, lr=lr, betas=betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, fused=True)

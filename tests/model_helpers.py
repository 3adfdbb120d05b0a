"""Models for the tests: with weights as they are drawn, every output is nearly the same."""

import torch

from models.config import ModelConfig
from models.transnormer import TransNormer


@torch.no_grad()
def make_model(config: ModelConfig, seed: int = 1) -> TransNormer:
    """Weights large enough that every layer matters."""
    model = TransNormer(config, seed).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(6)
    return model

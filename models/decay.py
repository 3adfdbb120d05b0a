"""Decay rates of the attention heads: slopes s >= 0 whose decay is exp(-s). They are never learnt."""

from __future__ import annotations

import math

from models.config import ModelConfig


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slopes (Press et al. 2021): 2^(-8(h+1)/H) for H a power of two.

    Other counts take the slopes of the next lower power of two P, then every second slope of 2P's set.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def layer_slopes(config: ModelConfig, layer: int) -> list[float]:
    """Slopes of layer `layer` (from 0), one per head.

    `published`: ALiBi slopes times (1 - l/(L-1) + 1e-5), as the released checkpoints use them.
    `paper`: (8h/H)(1 - l/L) with h = 1..H, as arXiv 2307.14995 prints it.
    A single layer keeps its full slopes, since no later layer exists to see further.
    """
    heads, layers = config.num_heads, config.num_layers
    if config.decay == "none":
        return [0.0] * heads
    if config.decay == "paper":
        scale = 1 - layer / layers if config.decay_layer_scaling else 1.0
        return [8.0 * (head + 1) / heads * scale for head in range(heads)]
    scale = 1 - layer / max(layers - 1, 1) + 1e-5 if config.decay_layer_scaling else 1.0
    return [slope * scale for slope in alibi_slopes(heads)]

"""Loss spikes: is this step's loss far above what the last ones lead to expect?

Expected is the median of the last losses; their spread is 1.4826 times the median absolute deviation from it,
which equals the standard deviation for normal noise (Rousseeuw and Croux 1993). Neither is moved by the
spikes themselves. A falling loss keeps the median above the next loss, so early training raises no alarm.
"""

from __future__ import annotations

import math
from statistics import median

WINDOW_STEPS = 64
MIN_STEPS = 16  # fewer losses than this say nothing about their spread
NUM_DEVIATIONS = 8.0
MIN_RISE_NATS = 0.3  # a smaller rise is not a spike, however quiet the run has been


def spike_limit(recent_losses: list[float]) -> float:
    """The loss above which the next step is a spike; infinite while too little is known."""
    if len(recent_losses) < MIN_STEPS:
        return math.inf
    expected = median(recent_losses)
    deviation = 1.4826 * median(abs(loss - expected) for loss in recent_losses)
    return expected + max(NUM_DEVIATIONS * deviation, MIN_RISE_NATS)


def remember(recent_losses: list[float], loss: float) -> None:
    """Add a step's loss to those that the next one is compared with."""
    if math.isfinite(loss):
        recent_losses.append(loss)
        del recent_losses[:-WINDOW_STEPS]

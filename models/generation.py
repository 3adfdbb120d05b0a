"""Text from a model, one token at a time from a carried state: constant memory with linear attention.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.transnormer import PREFILL_TOKENS, DecodeState

MIN_TEMPERATURE = 1e-6  # below it the likeliest token is taken: fp32 could not divide by it


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How the next token is drawn. temperature 0 takes the likeliest one.

    Raises:
        ValueError: names the setting and what is allowed.
    """

    temperature: float = 0.8
    top_k: int = 0  # keep the k likeliest tokens; 0 for all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0; 0 is greedy.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")


@torch.no_grad()
def generate(
    forward: Callable,
    prompt: list[int],
    max_tokens: int,
    sampling: SamplingConfig,
    device: torch.device,
    stop_id: int | None = None,
    num_ids: int | None = None,
    agree: Callable[[int], int] = int,
) -> Iterator[int]:
    """Yield token ids after `prompt` until `stop_id` or `max_tokens`.

    Args:
        forward: a `TransNormer` or anything called as one, in eval mode.
        prompt: at least one id (BOS).
        stop_id: ends the text; it is not yielded.
        num_ids: draw from the first so many ids, the tokenizer's, if the model has more.
        agree: gives all ranks one of the ids that each has drawn.
    """
    if not prompt:
        raise ValueError("the prompt has no token: begin it with BOS.")
    generator = torch.Generator(device).manual_seed(sampling.seed)
    state = DecodeState()
    for start in range(0, len(prompt), PREFILL_TOKENS):
        chunk = torch.tensor([prompt[start : start + PREFILL_TOKENS]], device=device)
        logits, state = forward(chunk, state=state, last_only=True)
    for index in range(max_tokens):
        token = agree(sample(logits[0, -1, :num_ids], sampling, generator))
        if token == stop_id:
            return
        yield token
        if index + 1 < max_tokens:
            logits, state = forward(torch.tensor([[token]], device=device), state=state)


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Draw one id from logits (V,)."""
    logits = logits.float()
    if sampling.temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    logits = (logits - logits.max()) / sampling.temperature  # the largest is 0: nothing overflows
    if 0 < sampling.top_k < len(logits):
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        surplus = ordered.cumsum(-1) - ordered >= sampling.top_p  # reached before this token
        probabilities[order[surplus]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))

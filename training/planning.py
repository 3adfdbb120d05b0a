"""What a plan needs beside the memory estimate: the vocabulary before there is a tokenizer, and the speed."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from data.tokenizer import ByteTokenizer
from training.errors import SettingError
from training.train_config import TrainConfig

Settings = TypeVar("Settings", bound=TrainConfig)


def with_vocabulary(config: Settings) -> Settings:
    """The settings with `model.vocab_size` filled in as the tokenizer's settings say.

    Raises:
        SettingError: only the tokenizer itself knows.
    """
    if config.model.vocab_size is not None:
        return config
    known = {"sentencepiece": config.tokenizer.vocab_size, "bytes": ByteTokenizer.vocab_size}
    if config.tokenizer.kind not in known:
        raise SettingError(
            f"model.vocab_size is not set, and tokenizer={config.tokenizer.kind} does not say it "
            "before it is opened: give model.vocab_size=N."
        )
    return replace(config, model=replace(config.model, vocab_size=known[config.tokenizer.kind]))


def predicted_tokens_per_second(config: TrainConfig, num_ranks: int, flops_per_second: float) -> float:
    """Tokens a second over all ranks if each did `flops_per_second` model FLOPs."""
    return num_ranks * flops_per_second / config.model.flops_per_token(config.seq_len)

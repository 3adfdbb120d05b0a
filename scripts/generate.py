"""Text from a trained model, printed as it comes, after the prompt that it continues.

    python -m scripts.generate checkpoint=outputs/x prompt="def "
    python -m scripts.generate checkpoint=outputs/x prompt="def " temperature=0 max_tokens=1000

Memory stays constant with linear attention. The same settings and seed give the same text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data.tokenizer import Tokenizer
from models.generation import SamplingConfig, generate
from models.transnormer import TransNormer
from training.command import reader_may_leave, run_command
from training.errors import SettingError
from training.weights import check_precision, find_model, load_model


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """What to continue, with which model, and how the tokens are drawn."""

    checkpoint: str | None = None  # a run folder (its newest valid checkpoint), one checkpoint or an export
    prompt: str = ""  # the text to continue
    max_tokens: int = 256  # the most to generate; the model's end of text ends it earlier
    temperature: float = 0.8  # 0: the likeliest token each time
    top_k: int = 0  # draw among this many of the likeliest tokens; 0: all
    top_p: float = 1.0  # and of these among the likeliest that together reach this probability
    seed: int = 0  # of what is drawn
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda
    precision: str | None = None  # bf16, fp32; null: that of training

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SettingError(f"max_tokens={self.max_tokens} must be at least 1.")
        check_precision(self.precision)
        if self.device not in ("auto", "cpu", "cuda"):
            raise SettingError(f"device={self.device!r} is unknown. Allowed: auto, cpu, cuda.")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingError(f"seed={self.seed} must be a number of 64 bits.")
        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise SettingError("prompt: it is not UTF-8. Give it in UTF-8.") from None
        self.sampling()

    def sampling(self) -> SamplingConfig:
        """The settings of drawing; a wrong one is refused."""
        return SamplingConfig(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed
        )


def main(config: GenerateConfig) -> int:
    """Print the prompt and its continuation; returns the exit code."""
    path = find_model(config.checkpoint)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("device=cuda, but no GPU can be used here: use device=cpu.")
    use_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_gpu else "cpu")
    trained = load_model(path, device, config.precision)
    with reader_may_leave():
        print(config.prompt, end="", flush=True)
        for text in continuation(trained.model, trained.tokenizer, config, device):
            print(text, end="", flush=True)
        print()
    return 0


def continuation(
    model: TransNormer, tokenizer: Tokenizer, config: GenerateConfig, device: torch.device
) -> Iterator[str]:
    """The text after the prompt, piece by piece; a character comes when all of its bytes are there."""
    decoder = tokenizer.decoder()
    ids = generate(
        model,
        [tokenizer.bos_id, *tokenizer.encode(config.prompt).tolist()],
        config.max_tokens,
        config.sampling(),
        device,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    )
    yield from (decoder.push(token) for token in ids)
    yield decoder.flush()


if __name__ == "__main__":
    run_command(main, GenerateConfig, __doc__)

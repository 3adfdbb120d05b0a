"""Tokenize text into shards that training and evaluation open with data=prepared.

    python -m scripts.prepare_data data=text data.path=TEXTS tokenizer.vocab_size=8192 output=DIR

Without output= the shards go to data.cache_dir, where train.py with the same settings finds them. A command
that was stopped continues where it was; one that is done says so at once. Progress is on stderr, the result
on stdout.
"""

import sys
from functools import partial
from pathlib import Path

from data.config import PrepareConfig
from data.prepare import PreparedData, prepare, prepare_folder
from training.command import run_command


def main(config: PrepareConfig) -> None:
    """Prepare, and print what the folder holds."""
    log = partial(print, file=sys.stderr)
    if config.output:
        prepared = prepare_folder(Path(config.output), config.data, config.tokenizer, log=log)
    else:
        prepared = prepare(config.data, config.tokenizer, log=log)
    print(describe(prepared))


def describe(prepared: PreparedData) -> str:
    """A small table of the splits and how to use them."""
    lines = [f"{'split':<8}{'documents':>14}{'tokens':>18}{'bytes':>18}{'bytes/token':>14}"]
    for split in (prepared.train, prepared.valid):
        ratio = split.bytes / split.tokens if split.tokens else 0.0
        lines.append(
            f"{split.name:<8}{split.documents:>14,}{split.tokens:>18,}{split.bytes:>18,}{ratio:>14.3f}"
        )
    lines.append(f"tokenizer: {prepared.tokenizer.kind}, {prepared.tokenizer.vocab_size:,} ids")
    lines.append(f"fingerprint: {prepared.fingerprint}")
    lines.append(f"use it with: data=prepared data.path={prepared.folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, PrepareConfig, __doc__, "prepare")

"""Train a tokenizer on the training documents of a source.

    python -m scripts.train_tokenizer data=text data.path=TEXTS tokenizer.vocab_size=8192 output=DIR

Use it with tokenizer=file tokenizer.path=DIR. A folder that holds something else is never written to.
Progress is on stderr, the result on stdout.
"""

import sys
from functools import partial
from pathlib import Path

from data.config import PrepareConfig
from data.errors import DataError
from data.files import explain_write_errors
from data.prepare import train_tokenizer
from data.sources import open_source
from training.command import run_command


def main(config: PrepareConfig) -> None:
    """Train, save, and print what was saved."""
    if not config.output:
        raise DataError("output is not set: give the folder for the tokenizer, output=DIR")
    if config.tokenizer.kind not in ("sentencepiece", "characters"):
        raise DataError(f"tokenizer={config.tokenizer.kind} is not trained: use sentencepiece or characters")
    if config.data.source == "prepared":
        raise DataError("data=prepared holds no text to train on: use python_stdlib, text or hub")
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"output={folder} is not empty: nothing is overwritten, choose another folder")
    log = partial(print, file=sys.stderr)
    source = open_source(config.data)
    if source.left_out:
        log(source.left_out)
    trained = train_tokenizer(source, config.data, config.tokenizer, log)
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trained.save(folder)
    print(f"saved {trained.kind}, {trained.vocab_size:,} ids")
    print(f"use it with: tokenizer=file tokenizer.path={folder}")


if __name__ == "__main__":
    run_command(main, PrepareConfig, __doc__, "prepare")
